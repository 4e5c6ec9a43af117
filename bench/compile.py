"""Every kernel at every tuned configuration, compiled for GPUs that are not here: registers, spills, shared memory.

    python -m bench.compile                              sm_80, sm_90 and sm_100, bfloat16; six minutes on two cores
    python -m bench.compile --sm 89 120 --dtype float16  the cards with less shared memory

The operations are called on meta tensors, forward and backward, and their launches are recorded instead of run: so what
is compiled is what the launchers would ask for. `cuobjdump` of the triton package then reads registers, stack and local
memory (spills), and the loops: each generation's tensor-core instructions (HMMA on sm_80, HGMMA on sm_90, UTCHMMA on
sm_100), what else an iteration executes, and whether it waits for its own copies; ptxas says what it serializes.
Prints two tables and the faults; the exit status is 1 if there are any.
"""

import argparse
import importlib
import io
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # interpreted functions cannot be compiled
# ptxas's messages, which a kernel out of Triton's cache would not bring
os.environ.update(TRITON_DUMP_PTXAS_LOG="1", TRITON_ALWAYS_COMPILE="1")

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

import kernels  # noqa: E402
from bench import machine_code  # noqa: E402
from kernels import tiles  # noqa: E402

MODULES = "kernels.attention", "kernels.decode", "kernels.logp", "kernels.pointwise"
# name -> (module, function) of every kernel. Not kernels.attention: that is the operation, and hides the module
KERNELS = {name: (module, function) for module in map(importlib.import_module, MODULES)
           for name, function in vars(module).items() if name.endswith("_kernel")}
SHARED_KB = {80: 163, 90: 227, 100: 227, 89: 99, 120: 99}  # per block, NVIDIA's CUDA programming guide
TENSOR_CORE = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
TUNED = tuple((C, 7) for C in (32, 64, 128, 256))  # head size, query heads per key/value head: one for each tile
GEOMETRIES = TUNED + ((80, 7), (96, 7)) + tuple((C, share) for C in (64, 128) for share in (1, 4, 5, 8))
# Bytes of stack outside the loops: a few registers stored and read once are nothing beside a faster loop
SPILLED_OUTSIDE = 64
# On sm_80 a product takes its left factor from registers, where the product before it has left the scores: if the
# compiler sees that one leads to the other and lays them out alike, which it can if a tile has as many rows as
# channels. On later generations shared or tensor memory is the way
WEIGHTS_IN_REGISTERS = ("_attention_fwd_kernel", "_attention_bwd_q_kernel")
COLUMNS = ("HMMA + HGMMA + UTCHMMA", "MUFU", "F32", "INT", "copy", "shared + store", "spill", "barrier")
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
# HMMA will do: beside two float32 gradients of 256 channels, what HGMMA needs spills at every tile
OLDER_INSTRUCTIONS = {("attention_bwd_kv C=256", 90)}


@dataclass(frozen=True)
class Launch:
    """A kernel as a launcher asked for it: argument types, compile-time values, arguments divisible by 16, options."""
    kernel: str
    types: tuple
    constants: tuple
    divisible: tuple
    options: tuple

    @property
    def name(self):
        """What it computes, whatever the tile: attention_fwd C=64 PAGED."""
        values = dict(self.constants)
        rows = "group" * (self.kernel == "_decode_split_kernel" and values["BLOCK_M"] > 16)
        tiled = "BLOCK_M" in values or "GROUP" in values  # pointwise kernels are never fused
        invariant = "invariant" * (tiled and not dict(self.options)["enable_fp_fusion"])
        words = [self.kernel[1:].removesuffix("_kernel"), f"C={values.get('C')}" * ("C" in values),
                 f"share={values.get('SHARE')}" * (values.get("SHARE", 7) != 7), rows, invariant]
        words.append("PAGED" * (self.kernel == "_attention_fwd_kernel" and values["I"] > 0))
        return " ".join(filter(None, words + [key for key in ("BIAS", "ADD", "NORM") if values.get(key)]))

    @property
    def tile(self):
        """Its first two block sizes, warps, stages: 128x64 8w 3s."""
        sizes = [str(v) for k, v in self.constants if k.startswith("BLOCK")][:2]
        options = dict(self.options)
        return f"{'x'.join(sizes)} {options.get('num_warps', 4)}w {options.get('num_stages', 3)}s"


class Recorder:
    """Stands in for a kernel: kernel[grid](...) is noted, with Triton's own specialization of the arguments."""

    def __init__(self, name, function, launches):
        self.name, self.function, self.launches = name, function, launches

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, **kwargs):
        options = {k: kwargs.pop(k) for k in OPTIONS if k in kwargs}
        values = dict(zip(self.function.arg_names, args)) | kwargs
        types, constants, divisible = [], [], []
        for i, parameter in enumerate(self.function.params):
            value = values[parameter.name]
            special = isinstance(value, int) and not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or special and value == 1:
                types.append("constexpr")
                constants.append((parameter.name, value))
                continue
            if isinstance(value, torch.Tensor):
                names = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int64: "*i64",
                         torch.int32: "*i32"}
                types.append(names[value.dtype])
                divisible.append(i)
            else:
                types.append("fp32" if isinstance(value, float) else "i32")
                if special and value % 16 == 0:
                    divisible.append(i)
        self.launches.append(Launch(self.name, tuple(types), tuple(constants), tuple(divisible),
                                    tuple(sorted(options.items()))))


def run_everything(dtype, geometries):
    """Each operation once per geometry of heads, else in Qwen2.5-7B's, forward and backward."""
    def new(*shape):
        return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)

    def backward(*outputs):
        outputs = [x for x in outputs if x.requires_grad]
        torch.autograd.backward(outputs, [torch.empty_like(x) for x in outputs])

    def step(B, pages, members):
        """B slots, and B prompts of as many members, with room for so many pages of 64 tokens each."""
        page_bt = torch.empty(B, pages, dtype=torch.int32, device="meta")
        x_b, slot_bg = (torch.empty(shape, dtype=torch.int64, device="meta") for shape in ((B,), (B, members)))
        return kernels.Tables(page_bt, x_b, page_bt, x_b, slot_bg, x_b, x_b, x_b, n_own=0, n_shared=0, page_size=64)

    K, D, F, V = 4, 3584, 18944, 151936
    segments = torch.tensor([(0, 100, -1), (100, 50, 0), (150, 50, 0)])
    for C, share in geometries:
        H = share * K
        for impl in ("triton", "invariant"):
            backward(kernels.attention(new(200, H, C), new(200, K, C), new(200, K, C), segments, impl))
            for members in (1, 7):
                kernels.decode_attention(new(8, H, C), new(99, K, 64, C), new(99, K, 64, C), step(8, 8, members), impl)
        long = step(1, 512, 1)  # many splits
        kernels.decode_attention(new(1, H, C), new(513, K, 64, C), new(513, K, 64, C), long, "triton")
        kernels.store(new(99, K, 64, C), new(99, K, 64, C), new(1, K, C), new(1, K, C), long.owner_x, long.owner_x,
                      "triton")
    target, table = torch.empty(208, dtype=torch.int64, device="meta"), torch.empty(208, 64, device="meta")
    for impl in ("triton", "invariant"):
        backward(kernels.linear_logp(new(208, D), new(V, D), target, 0.7, impl)[0])
    backward(kernels.linear(new(208, D), new(D, D), new(D), "invariant"))
    backward(kernels.linear(new(208, D), new(D, D), None, "invariant"))
    backward(kernels.rms_norm(new(208, D), new(D), 1e-6, "triton"))
    backward(*kernels.add_rms_norm(new(208, D), new(208, D), new(D), 1e-6, "triton"))
    backward(kernels.rope(new(208, 28, 128), table, table, impl="triton"))
    backward(kernels.rope(new(208, 28, 128), table, table, new(128), 1e-6, "triton"))
    backward(kernels.swiglu(new(208, F), new(208, F), "triton"))


def launches(generation, dtype, geometries=GEOMETRIES):
    """The distinct launches of run_everything on a GPU of this generation."""
    found = []
    with ExitStack() as patches:
        for name, (module, function) in KERNELS.items():
            patches.enter_context(mock.patch.object(module, name, Recorder(name, function, found)))
        patches.enter_context(mock.patch.object(tiles, "_generation", lambda device: generation))
        patches.enter_context(mock.patch.object(tiles, "runs_triton", lambda device, dtype: True))
        run_everything(dtype, geometries)
    never = set(KERNELS) - {launch.kernel for launch in found}
    assert not never, f"never launched: {never}"
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Code:
    """What is read from a compiled kernel. Memory in bytes."""
    registers: int
    spilled: int      # stack and local memory
    shared: int
    n_dots: int       # products in the source
    messages: tuple   # ptxas's on tensor cores: C7515 says that it serializes the products of a loop
    loops: tuple      # the innermost ones with tensor-core instructions: machine_code.Loop
    n_outside: int = 0  # instructions outside these loops


def compiled(launch, capability):
    """The Code of a launch on a GPU of this compute capability."""
    _, function = KERNELS[launch.kernel]
    source = ASTSource(function, dict(zip(function.arg_names, launch.types)), constexprs=dict(launch.constants),
                       attrs={(i,): [["tt.divisibility", 16]] for i in launch.divisible})
    options = {"enable_fp_fusion": True} | dict(launch.options)  # Triton's default, with a warning if unnamed
    log = io.StringIO()
    with redirect_stdout(log):
        binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    n_dots = binary.asm["ttir"].count("tt.dot")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump", "-res-usage", file.name]
        text = subprocess.run(command + ["-sass"] * (n_dots > 0), capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL"))
    assert "Compiling entry function" in log.getvalue(), "ptxas's log did not come: it may hold messages"
    messages = tuple(sorted(set(re.findall(r"\((C75\d\d)\)", log.getvalue()))))
    found = tuple(machine_code.loops(text))
    n_outside = len(machine_code.instructions(text)) - sum(len(loop.instructions) for loop in found)
    return Code(registers, stack + local, binary.metadata.shared, n_dots, messages, found, n_outside)


def compile_all(capabilities, dtype, geometries=GEOMETRIES, workers=2, chosen=lambda launch: True):
    """{(launch, capability): its Code}, of the chosen launches."""
    jobs = [(launch, cc) for cc in capabilities
            for launch in launches(cc if cc in tiles.GENERATIONS else "small", dtype, geometries) if chosen(launch)]
    with ProcessPoolExecutor(workers) as pool:
        return dict(zip(jobs, pool.map(compiled, *zip(*jobs))))


def faults(found, tensor_cores=True):
    """A line for everything in these {(launch, capability): Code} that must not be. See docs/kernels.md for the rules.
    """
    lines = []
    for (launch, cc), code in found.items():
        wrong = []
        if code.shared > SHARED_KB[cc] * 1024:
            wrong.append(f"{code.shared} bytes of shared memory, {SHARED_KB[cc]} KB exist")
        if not code.loops and code.spilled or code.spilled > SPILLED_OUTSIDE:
            wrong.append(f"{code.spilled} bytes of stack and local memory")
        if code.messages and cc in (90, 100):
            wrong.append(f"serialized products, ptxas says {' '.join(code.messages)}")
        if tensor_cores and code.n_dots and not any(TENSOR_CORE[cc] in loop.mix for loop in code.loops):
            if (launch.name, cc) not in OLDER_INSTRUCTIONS:
                wrong.append(f"no loop with {TENSOR_CORE[cc]}")
        for loop in code.loops:
            if loop.mix["spill"]:
                wrong.append(f"a loop with {loop.mix['spill']} instructions that spill")
            if loop.waits_for_own_copies and dict(launch.options)["num_stages"] > 1:
                wrong.append("a loop that waits for the copies it has just started: its stages overlap nothing")
            values = dict(launch.constants)
            if cc == 80 and launch.kernel in WEIGHTS_IN_REGISTERS and values["BLOCK_M"] >= values["BLOCK_C"]:
                if loop.mix["store"]:
                    wrong.append("a loop whose weights go through shared memory to the next product")
        lines += [f"sm_{cc} {launch.name}, {launch.tile}: {what}" for what in wrong]
    return lines


def mixes(found):
    """The table of the loops: a line for each, of the matrix kernels."""
    lines = ["| kernel | sm | tile | registers | spilled | " + " | ".join(COLUMNS) + " | all | of these masks |",
             "|---|" + "--:|" * (len(COLUMNS) + 6)]
    for (launch, cc), code in found.items():
        for loop in code.loops:
            counts = [sum(loop.mix[name] for name in names.split(" + ")) for names in (*COLUMNS, "all")]
            lines.append(f"| {launch.name} | {cc} | {launch.tile} | {code.registers} | {code.spilled} | "
                         + " | ".join(map(str, counts)) + f" | {loop.skipped} |")
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--sm", type=int, nargs="+", choices=tuple(SHARED_KB), default=(80, 90, 100))
    args = parser.parse_args()
    found = compile_all(args.sm, getattr(torch, args.dtype))
    print("| | " + " | ".join(f"sm_{cc}: tile, registers, shared KB, spilled bytes" for cc in args.sm) + " |")
    print("|---|" + "---|" * len(args.sm))
    for name in dict.fromkeys(launch.name for launch, _ in found):
        cells = {cc: f"{launch.tile}, {code.registers}, {code.shared / 1024:.0f}"
                 + f", {code.spilled}" * (code.spilled > 0)
                 for (launch, cc), code in found.items() if launch.name == name}
        print(f"| {name} | " + " | ".join(cells.get(cc, "") for cc in args.sm) + " |")
    print("\nThe loops, instructions of one iteration:\n", *mixes(found), sep="\n")
    wrong = faults(found, args.dtype != "float32")
    print(f"\n{len(found)} compilations, {len(wrong)} faults")
    print("\n".join(wrong))
    sys.exit(bool(wrong))
