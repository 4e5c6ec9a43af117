"""What the kernels should reach, predicted from their machine code: clocks, the unit that binds, the share of the peak.

    python -m bench.model                  H100, H200 and B200: two minutes of compiling on one core
    python -m bench.model --only H100

No GPU is needed, and none has said whether this is right. An iteration of a loop (machine_code.Loop) keeps each unit of
a core busy for so many clocks:

    products    multiply-adds / the tensor cores' rate, or what a product reads from shared memory / 128 bytes
    exponents   MUFU x threads / 16
    float32     F32 x threads / 128
    issue       instructions x warps / 4, those under the masks' `if` left out

A block's products wait for its softmax and its softmax for its products: alone on a core it takes their sum and LATENCY
for each change between the two ("chain"); at best, with the two warp groups of a block out of step, half of the
shorter one is hidden. (Log-probabilities have one product and no softmax in the loop: LATENCY, or nothing.) What stands
outside a block's loop is issued once, beside STARTUP. Blocks that share a core hide each other, until a unit is full.
So there are two predictions, and the table says both. Attention's iterations are counted in the very tables that the
launchers make. A decoding step of a group is its prompt's keys alone: the slots' own ones are a launch like the one of
64 slots. What it cannot know: clocks under a power limit, what L2 and HBM really deliver, copies that come late.
"""

import argparse
import functools
import math
from dataclasses import dataclass

import torch

from bench import compile as compiler
from bench import machine_code
from kernels.attention import _key_tiles, _query_tiles


@dataclass(frozen=True)
class GPU:
    """NVIDIA's data sheets: dense bfloat16, without sparsity."""
    generation: int
    cores: int     # SMs
    ghz: float     # at which the data sheet's TFLOP/s are reached
    fma: int       # bfloat16 multiply-adds a clock and core
    tb_s: float    # HBM


GPUS = {"H100": GPU(90, 132, 1.83, 2048, 3.35), "H200": GPU(90, 132, 1.83, 2048, 4.8),
        "B200": GPU(100, 148, 1.85, 4096, 8.0)}
LATENCY = 150     # clocks from a product's last operand to the first use of its result, barriers included
EXPOSED = 800     # clocks of a copy that is waited for right after its issue
STARTUP = 1500    # clocks of a block until its tables, its own rows and the first copies are there
LAUNCH_S = 5e-6   # of a decode step's attention: the launches inside a CUDA graph, filling the cores, the merge
HBM_SHARE = 0.92  # of the data sheet's bandwidth that a plain copy reaches
SHAPES = {"7B": (28, 4, 3584), "14B, 32B": (40, 8, 5120)}  # query heads, key/value heads, width; 128 channels
V = 152064
MODELLED = ("attention", "decode_split", "logp_fwd")
SFT = [(4096, 0, 0)] * 8              # sequences of 4,096 tokens
GRPO = [(2048, 512, 7)] * 4           # (prompt, response, responses of it)
DECODE = {"64 slots x 4,096": (64, 1, 4096), "16 prompts x 7 slots x 2,048": (16, 7, 2048),
          "1 slot x 32,768": (1, 1, 32768)}


def forest(groups):
    """Segments of groups (prompt, response, n), and how many pairs of tokens see each other."""
    rows, start, pairs = [], 0, 0
    for prompt, response, n in groups:
        parent = len(rows)
        rows.append((start, prompt, -1))
        rows += [(start + prompt + i * response, response, parent) for i in range(n)]
        start += prompt + n * response
        pairs += prompt * (prompt + 1) // 2 + n * (prompt * response + response * (response + 1) // 2)
    return torch.tensor(rows).numpy().tobytes(), pairs


def clocks(gpu, launch, code, n_dots):
    """Of one iteration: {unit: clocks}, the block alone (slow, fast), and how many blocks share a core."""
    values, warps = dict(launch.constants), dict(launch.options)["num_warps"]
    loop = min(code.loops, key=lambda loop: loop.mix["all"])  # without masks, where there are two
    mix, n_instructions = loop.mix, loop.mix["all"] - loop.skipped
    if "BLOCK_C" in values:
        fma = n_dots * values["BLOCK_M"] * values["BLOCK_N"] * values["BLOCK_C"]
    else:
        fma = values["BLOCK_N"] * values["BLOCK_V"] * values["BLOCK_D"]
    units = {"products": product_clocks(gpu, loop, warps, fma),
             "exponents": mix["MUFU"] * warps * 32 / 16,
             "float32": mix["F32"] * warps * 32 / 128,
             "issue": n_instructions * warps / 4}
    softmax = max(units[name] for name in ("exponents", "float32", "issue"))
    chain = units["products"] + softmax + n_dots * LATENCY + EXPOSED * loop.waits_for_own_copies
    if n_dots == 1:  # nothing to wait for: the next product's operands are there
        chain = max(units["products"], softmax) + LATENCY
    hidden = min(units["products"], softmax) / 2 * (warps > 4 and n_dots > 1)
    registers = -(-code.registers // 8) * 8 * warps * 32
    shared = compiler.SHARED_KB[gpu.generation] * 1024
    resident = max(1, min(65536 // registers, shared // max(code.shared, 1), 64 // warps))
    return units, (chain, chain - hidden), resident


def outside(launch, code):
    """Clocks of a block outside its loop."""
    return STARTUP + code.n_outside * dict(launch.options)["num_warps"] / 4


def product_clocks(gpu, loop, warps, fma):
    """Each product reads its right factor from shared memory, and its left one if that lies there too: narrow ones take
    longer to read than to multiply."""
    products = [x for x in loop.instructions if machine_code.classify(x[1]) in machine_code.PRODUCTS]
    total = 0
    for _, opcode, arguments in products:
        if opcode.startswith("HGMMA"):  # HGMMA.64x128x16: each of the warp groups its own 64 rows
            times, (rows, columns, depth) = warps // 4, (int(x) for x in opcode.split(".")[1].split("x"))
            left_is_shared = arguments.split(", ")[1].startswith("gdesc")  # one descriptor of both, or registers first
        else:                           # UTCHMMA does not say: 128 rows, 16 deep, and the columns on average
            assert opcode.startswith("UTCHMMA"), opcode
            times, rows, columns, depth = 1, 128, fma / len(products) / 128 / 16, 16
            left_is_shared = arguments.startswith("gdesc")
        left = rows * left_is_shared
        total += times * max(rows * columns * depth / gpu.fma, (left + columns) * depth * 2 / 128)
    return total


def waves(gpu, n_iterations, n_blocks, unit_clocks, alone, resident, once):
    """Seconds of all blocks, spread evenly over the cores; `once`: a block's clocks outside its loop."""
    per_core = max(max(unit_clocks.values()), alone / resident)
    return (n_iterations * per_core + n_blocks * once / resident) / gpu.cores / gpu.ghz / 1e9


def find(codes, name):
    return next((launch, code) for (launch, _), code in codes.items() if launch.name == name)


def attention_rows(gpu, codes, H, K, groups):
    """(kernel, tile, units, alone, resident, [slow s, fast s], useful multiply-adds) of forward and backward over a
    forest."""
    segments, pairs = forest(groups)
    share = "" if H // K == 7 else f" share={H // K}"
    rows = []
    for kernel, n_dots in (("attention_fwd", 2), ("attention_bwd_q", 3), ("attention_bwd_kv", 4)):
        launch, code = find(codes, f"{kernel} C=128{share}")
        values = dict(launch.constants)
        if kernel == "attention_bwd_kv":
            tiles = _key_tiles(segments, values["BLOCK_N"], torch.device("cpu"))
            n_iterations = -(-(tiles[:, 2] - tiles[:, 0]) * (H // K) // values["BLOCK_M"])
        else:
            tiles = _query_tiles(segments, values["BLOCK_M"] // (H // K), torch.device("cpu"))
            n_iterations = -(-(tiles[:, 2] + tiles[:, 1]) // values["BLOCK_N"])
        units, alone, resident = clocks(gpu, launch, code, n_dots)
        once = outside(launch, code)
        seconds = [waves(gpu, int(n_iterations.sum()) * K, len(tiles) * K, units, x, resident, once) for x in alone]
        rows.append((kernel, launch.tile, units, alone, resident, seconds, n_dots * pairs * H * 128))
    return rows


def show(gpu_name, work, shape, kernel, tile, units, alone, resident, reached, of):
    unit = "HBM" if min(reached) == max(reached) and of == "bandwidth" else max(units, key=units.get)
    low, high = sorted(reached)
    busy = " / ".join(f"{units[name]:.0f}" for name in ("products", "exponents", "issue"))
    share = f"{low:.0%}-{high:.0%}" if f"{low:.0%}" != f"{high:.0%}" else f"{low:.0%}"
    print(f"| {gpu_name} | {shape} | {work} | {kernel} {tile} | {busy} | {alone[1]:.0f}-{alone[0]:.0f}, {resident} "
          f"| {unit} | {share} of {of} | |")


@functools.lru_cache
def compiled_for(generation):
    """{(launch, generation): Code} of what is modelled."""
    def modelled(launch):
        return launch.name.startswith(MODELLED) and "invariant" not in launch.name
    return compiler.compile_all((generation,), torch.bfloat16, ((128, 7), (128, 5)), 1, modelled)


def decode_rows(name, gpu, found, shape, H, K):
    """The table's rows of decoding: a launch over the items' keys, whose partial results are written and read again."""
    for work, (n_items, members, n_keys) in DECODE.items():
        share = "" if H // K == 7 else f" share={H // K}"
        launch, code = find(found, f"decode_split C=128{share}" + " group" * (members > 1))
        units, alone, resident = clocks(gpu, launch, code, 2)
        block_keys = dict(launch.constants)["BLOCK_N"]
        wanted = min(2 * gpu.cores / n_items / K, n_keys / (4 * block_keys), 64)  # as decode._n_splits
        n_splits = 2 ** max(0, math.ceil(math.log2(wanted)))
        key_s = n_items * K * n_keys * 128 * 2 * 2 / gpu.tb_s / 1e12
        parts_s = n_items * members * H * n_splits * (128 + 1) * 4 * 2 / gpu.tb_s / 1e12
        work_s = [waves(gpu, n_items * K * n_keys / block_keys, n_items * K * n_splits, units, x, resident,
                        outside(launch, code)) for x in alone]
        reached = [key_s / (max((key_s + parts_s) / HBM_SHARE, s) + LAUNCH_S) for s in work_s]
        show(name, work, shape, "decode_split", launch.tile, units, alone, resident, reached, "bandwidth")


def predict(name, gpu):
    """The table's rows for one GPU."""
    found = compiled_for(gpu.generation)
    peak = gpu.cores * gpu.fma * gpu.ghz * 1e9
    for shape, (H, K, D) in SHAPES.items():
        if name == "H200":  # H100's cores with a faster memory: what only multiplies is the same
            decode_rows(name, gpu, found, shape, H, K)
            continue
        for work, groups in (("SFT", SFT), ("GRPO", GRPO)):
            rows = attention_rows(gpu, found, H, K, groups)
            for *row, seconds, useful in rows:
                show(name, work, shape, *row, [useful / s / peak for s in seconds], "peak")
            # the usual count: the backward pass is worth 2.5 forward ones, whatever is computed twice
            backward = [sum(row[5][i] for row in rows[1:]) for i in range(2)]
            low, high = (2.5 * rows[0][6] / s / peak for s in backward)
            print(f"| {name} | {shape} | {work} | backward, both | | | | {low:.0%}-{high:.0%} of peak | |")
        alone_s, forest_s = ([sum(row[5][i] for row in attention_rows(gpu, found, H, K, groups)) for i in range(2)]
                             for groups in ([(2560, 0, 0)] * 28, GRPO))
        print(f"| {name} | {shape} | GRPO | forward and backward, against a prompt for each response | | | | "
              f"{alone_s[0] / forest_s[0]:.2f} times as fast | |")
        decode_rows(name, gpu, found, shape, H, K)
        launch, code = find(found, "logp_fwd")
        units, alone, resident = clocks(gpu, launch, code, 1)
        values, N = dict(launch.constants), 16384
        n_blocks = -(-N // values["BLOCK_N"]) * -(-V // values["BLOCK_V"])
        alone = alone[0], max(units.values())
        seconds = [waves(gpu, n_blocks * D / values["BLOCK_D"], n_blocks, units, x, resident, outside(launch, code))
                   for x in alone]
        show(name, f"{N:,} tokens", shape, "logp_fwd", launch.tile, units, alone, resident,
             [N * V * D / s / peak for s in seconds], "peak")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", choices=tuple(GPUS), default=tuple(GPUS))
    print("| GPU | model | work | kernel, tile | clocks an iteration: products / exponents / issue | a block alone, "
          "blocks a core | binds | predicted | measured |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in parser.parse_args().only:
        predict(name, GPUS[name])
