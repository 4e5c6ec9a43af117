"""What only a GPU can answer, part by part: each prints a table with its goals beside it; nine minutes for all.

    python -m bench.gpu                          all of them, on one GPU of 80 GB
    python -m bench.gpu --part decode step       some of them
    python -m bench.gpu --part decode --toy      tiny sizes, on a CPU too: that the command works

tests: the kernels' tests, compiled, bfloat16 included (`make test-gpu`), as far as they come in three minutes.

kernels: each operation at Qwen2.5-7B's shapes against PyTorch and, where installed, Liger and QuACK (bench/kernels.py).

step: GRPO of Qwen2.5-1.5B's geometry, all parameters, 16 prompts of 1,024 tokens x 7 rollouts of 512 tokens, two
updates: seconds and peak memory of each phase, the plan's beside them, and the update's share of the card's peak; then
the same with --batch-invariant: what that costs, and that the mismatch is 0.

decode: a step of 32 to 256 rollouts in Qwen2.5-7B's geometry, random weights, bfloat16, in groups of 7 on prompts of
2,048 tokens, each rollout 512 to about 1,000 tokens long. They are not written but put there, as rollouts that had been
put back: their keys come with the prefill (half a million tokens, 8 PFLOP, in all). Then STEPS steps with CUDA graphs
and STEPS without, after WARM_UP that compile and capture: about 400 steps of 10 to 40 ms. Beside a step stands the time
in which the card could read what the step has to read, once: the weights and the keys and values. The bandwidth is that
of a large copy on the same card. Last, where they are installed, vLLM and transformers' continuous batching on the same
prompts and rollouts, as prompts to be continued: the time of PEER_STEPS + 1 tokens less the time of one.

The last line is JSON: {part: {...}}.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import grpo
from batch import Batch, Rollout
from bench.train import Words
from common import Ranks, Tally, flops_utilization, make_optimizers, optimizer_step, shard
from data.pairs import Pair
from draw import Sampling
from model import Model, ModelConfig
from sample import Sampler, filled_copy
from split import Split

QWEN_7B = dict(num_hidden_layers=28, hidden_size=3584, num_attention_heads=28, num_key_value_heads=4,
               intermediate_size=18944, vocab_size=152064)
TOY = dict(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
           vocab_size=512)
QWEN_1_5B = dict(num_hidden_layers=28, hidden_size=1536, num_attention_heads=12, num_key_value_heads=2,
                 intermediate_size=8960, vocab_size=151936, tie_word_embeddings=True)
GROUP = 7
WARM_UP, STEPS, PEER_STEPS = 4, 40, 64
TEST_SECONDS, KERNEL_SECONDS = 180, 150
GOALS = {"a step over its bandwidth bound, at most": 1.5, "tokens/s at 128 slots on an H100, at least": 10_000}


def geometry(fields):
    return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rope_theta": 1e6, "rms_norm_eps": 1e-6,
            "max_position_embeddings": 32768, "tie_word_embeddings": False} | fields


def random_model(raw, device, dtype):
    """On the device from the start: on the host it would take minutes."""
    with torch.device("meta"):
        model = Model(ModelConfig.from_dict(raw)).to(dtype)
    model = model.to_empty(device=device)
    for name, x in model.named_parameters():
        if name.endswith("bias"):
            x.data.zero_()
        elif x.ndim == 1:
            x.data.fill_(1)
        else:
            x.data.normal_(std=0.02)
    return model


def bandwidth(device, n_bytes):
    """Bytes a second, read and written, of a large copy."""
    x = torch.zeros(n_bytes // 4, device=device)
    y, best = torch.empty_like(x), float("inf")
    for _ in range(10):
        synchronize(device)
        began = time.perf_counter()
        y.copy_(x)
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * x.numel() * x.element_size() / best


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------------------------- decode


def make_rollouts(n_slots, n_prompt, shortest, longest, n_vocab):
    """Prompts, and for each the token ids of its rollouts, n_slots in all groups together."""
    rng = torch.Generator().manual_seed(n_slots)

    def ids(n):
        return torch.randint(0, n_vocab, (n,), generator=rng).tolist()
    prompts = [ids(n_prompt) for _ in range(-(-n_slots // GROUP))]
    lengths = torch.randint(shortest, longest + 1, (len(prompts), GROUP), generator=rng).tolist()
    return prompts, [[ids(n) for n in group] for group in lengths]


def writing(model, prompts, rollouts, n_slots, n_room):
    """A Batch whose slots are taken by these rollouts, with room for n_room tokens more."""
    longest = max(len(ids) for group in rollouts for ids in group)
    batch = Batch(model, prompts, Sampling(GROUP, longest + n_room), n_slots)
    for i, group in enumerate(rollouts):
        batch.groups[i] = [Rollout(list(ids), [0.0] * len(ids)) for ids in group]
        batch.n_left[i] = GROUP
    batch.admit()
    assert len(batch.slots) == n_slots, f"{len(batch.slots)} of {n_slots} rollouts fit into this device's memory"
    return batch


def bytes_read(batch):
    """By a step, once each: the weights but for the embedding, of which a row a slot is read; the keys and values."""
    model, config = batch.model, batch.model.config
    weights = sum(x.numel() * x.element_size() for x in model.parameters())
    embedding = model.model.embed_tokens.weight
    if not config.tie_word_embeddings:
        weights -= embedding.numel() * embedding.element_size()
    n_tokens = sum(len(batch.prompts[i]) for i in {slot.prompt for slot in batch.slots})
    n_tokens += sum(len(slot.rollout.ids) for slot in batch.slots)
    return weights + n_tokens * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim \
        * embedding.element_size()


def ms_a_step(batch, n):
    for _ in range(WARM_UP):
        batch.step()
    seconds = []
    for _ in range(n):
        began = time.perf_counter()
        batch.step()  # reads what was drawn: the device is done
        seconds.append(time.perf_counter() - began)
    return 1e3 * statistics.median(seconds)


def decode(args):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    raw = geometry(TOY if args.toy else QWEN_7B)
    n_prompt, shortest, longest = (20, 8, 12) if args.toy else (2048, 512, 1000)
    slots, steps = ((4, 9), 3) if args.toy else ((32, 64, 128, 256), STEPS)
    lengths = n_prompt, shortest, longest
    speed = bandwidth(device, 2**26 if args.toy else 2**31)
    card = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    with torch.inference_mode():  # not the peers: a thread of transformers' is not in it
        model = random_model(raw, device, dtype).requires_grad_(False).fuse()
        rows = decode_ours(model, slots, lengths, steps, speed, card)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    n_slots = slots[len(slots) // 2]
    peers = {name: peer_tokens_per_second(name, raw, n_slots, lengths) for name in args.peers}
    for name, result in peers.items():
        print(f"{name}, {n_slots} slots: {result if isinstance(result, str) else f'{result} tokens/s'}")
    print("goals: " + "; ".join(f"{goal} {number}" for goal, number in GOALS.items()))
    return {"device": card, "dtype": str(dtype)[6:], "bandwidth_gb_s": round(speed / 1e9), "steps": rows,
            "peers": peers}


def decode_ours(model, slots, lengths, steps, speed, card):
    n_parameters = sum(x.numel() for x in model.parameters())
    print(f"{card}, {speed / 1e9:.0f} GB/s; {n_parameters / 1e9:.2f}e9 parameters, {str(model.head_vd.dtype)[6:]}")
    print("slots  graphs   ms a step   bound   ratio   tokens/s")
    rows = []
    for n_slots in slots:
        prompts, rollouts = make_rollouts(n_slots, *lengths, model.n_vocab)
        batch = writing(model, prompts, rollouts, n_slots, 2 * (steps + WARM_UP) + 1)
        with_graphs = batch.graphs is not None
        for graphs in (True, False) if with_graphs else (False,):
            if not graphs:
                batch.graphs = None
            bound = 1e3 * bytes_read(batch) / speed
            ms = ms_a_step(batch, steps)
            rows.append({"slots": n_slots, "graphs": graphs, "ms": round(ms, 3), "bound_ms": round(bound, 3),
                         "ratio": round(ms / bound, 2), "tok_s": round(1e3 * n_slots / ms)})
            print(f"{n_slots:5}  {'yes' if graphs else 'no':6} {ms:11.2f} {bound:7.2f} {ms / bound:7.2f} "
                  f"{1e3 * n_slots / ms:10.0f}", flush=True)
        del batch  # its pages, before the next one's
    return rows


def peer_tokens_per_second(name, raw, n_slots, lengths):
    """Tokens a second, or why there are none."""
    prompts, rollouts = make_rollouts(n_slots, *lengths, raw["vocab_size"])
    requests = [ids + own for ids, group in zip(prompts, rollouts) for own in group][:n_slots]
    try:
        generate = PEERS[name](raw, max(map(len, requests)) + PEER_STEPS + 1)
        generate(requests, 1)
        seconds = []
        for n in (1, 1 + PEER_STEPS):
            began = time.perf_counter()
            generate(requests, n)
            seconds.append(time.perf_counter() - began)
        return round(n_slots * PEER_STEPS / (seconds[1] - seconds[0]))
    except ImportError as e:
        return f"not installed ({e})"
    except Exception as e:  # whatever another program does, what was measured before is to be printed
        return f"failed: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"


def vllm(raw, longest):
    from vllm import LLM, SamplingParams
    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(raw | {"torch_dtype": "bfloat16"}))
    llm = LLM(str(folder), load_format="dummy", skip_tokenizer_init=True, max_model_len=longest, max_num_seqs=256,
              enable_prefix_caching=True, gpu_memory_utilization=0.85)

    def generate(requests, n):
        params = SamplingParams(temperature=1.0, max_tokens=n, ignore_eos=True, detokenize=False)
        out = llm.generate([{"prompt_token_ids": ids} for ids in requests], params, use_tqdm=False)
        assert all(len(request.outputs[0].token_ids) == n for request in out)
    return generate


def transformers(raw, longest):
    from transformers import AutoConfig, AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fields = {name: value for name, value in raw.items() if name not in ("model_type", "architectures")}
    config = AutoConfig.for_model("qwen2", **fields)
    # on a CPU it would take nearly all memory, and fill it with zeros
    memory = None if device == "cuda" else ContinuousBatchingConfig(num_blocks=64)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")

    def generate(requests, n):
        how = GenerationConfig(max_new_tokens=n, do_sample=True, temperature=1.0, eos_token_id=-1, pad_token_id=0)
        out = model.eval().generate_batch(requests, how, memory)
        assert len(out) == len(requests) and all(len(x.generated_tokens) == n for x in out.values()), "not all came out"
    return generate


PEERS = {"vllm": vllm, "transformers": transformers}


# -------------------------------------------------------------------------------------------- tests, kernels: commands


def run(command, seconds, **environment):
    """A command's output, all of it or what came in time."""
    try:
        done = subprocess.run([sys.executable, "-m", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True, timeout=seconds, cwd=Path(__file__).parents[1],
                              env={**os.environ, **environment})
        return done.stdout
    except subprocess.TimeoutExpired as e:
        return (e.stdout or b"").decode() + f"\nstopped after {seconds} s"


def tests(args):
    files = ["tests/test_kernels.py", "tests/test_invariance.py"]
    chosen = ["-m", "long or not long", *files] if not args.toy else ["-k", "empty", files[0]]
    device = {} if args.toy else {"RM_TEST_DEVICE": "cuda"}
    out = run(["pytest", "-q", "-x", *chosen], TEST_SECONDS, **device).strip().splitlines()
    print(*out[-5:], sep="\n")
    return {"line": out[-1]}


def kernels(args):
    toy = ["--dry", "--only", "pointwise"] if args.toy else ["--shape", "7b"]
    interpreted = {"TRITON_INTERPRET": "1"} if args.toy else {}
    *table, last = run(["bench.kernels", *toy], KERNEL_SECONDS, **interpreted).strip().splitlines()
    print(*table, sep="\n")
    return json.loads(last) if last.startswith("{") else {"line": last}


# --------------------------------------------------------------------------------------------------------------- step


def step(args):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    n_prompts, n_prompt, n_new = (2, 20, 6) if args.toy else (16, 1024, 512)
    cfg = grpo.Config(model="-", data="-", n_prompts=n_prompts, mini_prompts=n_prompts // 2, group_size=GROUP,
                      max_prompt_tokens=n_prompt, max_new_tokens=n_new, n_slots=n_prompts * GROUP,
                      dtype="bfloat16" if device.type == "cuda" else "float32")
    print("batch-invariant  phase       s    peak GB   planned")
    rows = []
    for invariant in (False, True) if device.type == "cuda" else (False,):
        rows += one_step(replace(cfg, batch_invariant=invariant), ModelConfig.from_dict(
            geometry(TOY if args.toy else QWEN_1_5B)), device)
    by_kind = {row["invariant"]: row for row in rows if row["phase"] == "update"}
    for row in by_kind.values():
        print(f"update{', batch-invariant' * row['invariant']}: {row['tok_s']} tokens/s, utilization {row['mfu']}, "
              f"mismatch {row['mismatch']:.2g}")
    return {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "phases": rows}


def one_step(cfg, config, device):
    """The second of two steps, the first compiles: a row for each phase."""
    ranks, dtype = Ranks(0, 1, device), getattr(torch, cfg.dtype)
    impl = "invariant" if cfg.batch_invariant else None
    model = shard(random_model(config.raw, device, torch.float32), ranks, dtype)
    reference = shard(random_model(config.raw, device, dtype).requires_grad_(False), ranks, dtype)
    model.impl = reference.impl = impl
    model.gradient_checkpointing = cfg.gradient_checkpointing
    optimizers = make_optimizers(model, "adamw", cfg.lr, (cfg.beta1, cfg.beta2), cfg.weight_decay)
    sampler = Sampler(None, cfg.n_slots, prefill_tokens=cfg.micro_tokens)
    pairs = [Pair(str(i), [], "", "", "a", "", "") for i in range(cfg.n_prompts)]
    rng = np.random.default_rng(0)
    prompts = {pair.id: rng.integers(0, config.vocab_size, cfg.max_prompt_tokens).astype(np.int32) for pair in pairs}
    plan = planned(config, cfg, device)
    for number in range(2):
        rows, tally, norms, worst = [], Tally(), [], 0.0

        def ended(phase, began):
            synchronize(device)
            peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
            rows.append({"invariant": cfg.batch_invariant, "phase": phase, "s": round(time.perf_counter() - began, 3),
                         "gb": round(peak / 1e9, 2), "planned_gb": plan.get(phase)})
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        sampler.model = filled_copy(model, dtype, Split())
        groups = grpo.rollout(cfg, sampler, Words(), pairs, prompts, number, ranks)
        sampler.model = None
        ended("rollout", began)
        began = time.perf_counter()
        for group in groups:  # random judgements have no verdict: every second one is taken for right
            group.advantage_g[:] = grpo.advantages(torch.tensor([[1.0 - 2 * (g % 2) for g in range(GROUP)]]))[0]
        minis = [grpo.make_mini_batch(cfg, ranks, groups[first:first + cfg.mini_prompts])
                 for first in range(0, cfg.n_prompts, cfg.mini_prompts)]
        grpo.score(reference, minis, cfg.temperature, device)
        ended("score", began)
        began = time.perf_counter()
        for mini in minis:
            loss, mismatches = grpo.accumulate_gradients(cfg, ranks, model, mini, tally, fresh=not norms)
            norms.append(optimizer_step(model, optimizers, cfg.lr, cfg.max_norm, loss))
            worst = max([worst, *mismatches])
        ended("update", began)
        flops = sum(grpo.training_flops(config, mini.micros) for mini in minis)
        rows[-1] |= {"mfu": flops_utilization(flops, rows[-1]["s"], ranks), "mismatch": worst, "norm": norms[-1],
                     "tok_s": round(sum(mini.n_packed for mini in minis) / rows[-1]["s"])}
    for row in rows:
        print(f"{str(row['invariant']):15}  {row['phase']:8} {row['s']:6.2f} {row['gb']:9.2f}   {row['planned_gb']}")
    return rows


def planned(config, cfg, device):
    """{phase: GB} of plan.py, of the memory that this card has."""
    try:
        from plan import make_plan
    except ImportError:
        return {}
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 80e9
    plan = make_plan(config, grpo.work_of(cfg), 1, total / 1e9)
    return {phase: round(plan.peak(phase) / 1e9, 2) for phase in plan.phases}


PARTS = {"tests": tests, "kernels": kernels, "step": step, "decode": decode}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--toy", action="store_true", help="tiny sizes, on a CPU if there is no GPU")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    args = parser.parse_args()
    if not args.toy and not torch.cuda.is_available():
        parser.error("this PyTorch sees no GPU; --toy shows on a CPU that the command works")
    results = {}
    for part in args.part:
        began = time.perf_counter()
        results[part] = PARTS[part](args)
        print(f"{part}: {time.perf_counter() - began:.0f} s")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
