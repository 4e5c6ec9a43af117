"""The same random weights as our Model and as transformers' Qwen2, and the alternating stopwatch of the benchmarks."""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from model import Model, ModelConfig

SHAPES = {  # layers, width, heads, kv heads, ffn, vocabulary; qwen2.5-0.5b is the published geometry
    "tiny": (4, 256, 8, 2, 768, 8192),
    "small": (12, 512, 8, 2, 1536, 32768),
    "25m": (8, 384, 6, 2, 1024, 32768),
    "100m": (12, 768, 12, 2, 2048, 32768),
    "qwen2.5-0.5b": (24, 896, 14, 2, 4864, 151936),
}


def options(*flags, **numbers):
    """The benchmarks' common options, a switch for each flag, and an integer option for each keyword, or, for a tuple,
    one of its words, by default the first."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=SHAPES, default="tiny")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=5, help="0: one each, cold, that which the memory is measured of")
    parser.add_argument("--side", choices=("ours", "peer"), help="run this side alone, and say its peak memory")
    parser.add_argument("--folder", help="the model's folder, for --side: made by whoever starts it")
    for name in flags:
        parser.add_argument(f"--{name}", action="store_true")
    for name, value in numbers.items():
        if isinstance(value, tuple):
            parser.add_argument("--" + name, choices=value, default=value[0])
        else:
            parser.add_argument("--" + name, type=int, default=value)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args


def geometry(L, D, H, K, F, V):
    return ModelConfig.from_dict({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_hidden_layers": L, "hidden_size": D,
        "num_attention_heads": H, "num_key_value_heads": K, "intermediate_size": F, "vocab_size": V,
        "max_position_embeddings": 32768, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": True})


def load(side, args, folder):
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, args.dtype)
    if side == "ours":
        return Model.from_pretrained(folder, device, dtype)
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").to(device)


def compare(name, args, work, units, ours, peer, flops=None):
    """Runs ours(model) and peer(model) alternately, prints a line for each run and, last, the JSON line: units a
    second, medians; the peak memory of each, in a process of its own; and, if `flops` says how many floating-point
    operations our matrix products are, what share of the machine's matrix rate that is."""
    calls = {"ours": ours, "peer": peer}
    if args.side:
        return run_side(calls[args.side], args)
    seconds, matrix_rates = {"ours": [], "peer": []}, []
    with tempfile.TemporaryDirectory() as folder:
        Model.random(geometry(*SHAPES[args.model]), dtype=getattr(torch, args.dtype)).save_pretrained(folder)
        memory = {side: measure_side(side, folder) for side in calls}
        if not args.runs:
            rates = [matrix_rate(args)]
            return report(name, args, work, units, {side: [m["s"]] for side, m in memory.items()}, memory, rates, flops)
        models = {side: load(side, args, folder) for side in calls}
    for run in range(args.runs + 1):  # the first warms up
        for side, call in calls.items():
            began = time.perf_counter()
            call(models[side])
            synchronize()
            if run:
                seconds[side].append(time.perf_counter() - began)
        if run:
            matrix_rates.append(matrix_rate(args))
            print(f"run {run}: ours {seconds['ours'][-1]:.3f} s, peer {seconds['peer'][-1]:.3f} s", flush=True)
    report(name, args, work, units, seconds, memory, matrix_rates, flops)


def report(name, args, work, units, seconds, memory, matrix_rates, flops=None, **more):
    """The JSON line of two sides' seconds, run by run, and their memory; more: what else stands in it."""
    rate = {side: units / statistics.median(s) for side, s in seconds.items()}
    row = {"bench": name, "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
           "threads": args.threads, "dtype": args.dtype, "model": args.model, "work": work,
           "ours": round(rate["ours"], 1), "peer": round(rate["peer"], 1),
           "ratio": round(rate["ours"] / rate["peer"], 2),
           "ratios": [round(p / o, 2) for o, p in zip(seconds["ours"], seconds["peer"])],
           "ours_gb": memory["ours"]["gb"], "peer_gb": memory["peer"]["gb"]} | more
    if flops:
        matrix = statistics.median(matrix_rates)
        row |= {"matrix_gflops": round(matrix / 1e9, 1),
                "share": round(flops / statistics.median(seconds["ours"]) / matrix, 3)}
    print(json.dumps(row))


def matrix_rate(args, n=2048):
    """Floating-point operations a second of one large product in this dtype, with these threads."""
    a = torch.randn(n, n).to("cuda" if torch.cuda.is_available() else "cpu", getattr(torch, args.dtype))
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        torch.mm(a, a)
        synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def run_side(call, args):
    """In its own process: the work once, and the peak."""
    model, began = load(args.side, args, args.folder), time.perf_counter()
    call(model)
    synchronize()
    print(json.dumps({"gb": round(peak_bytes() / 1e9, 3), "s": time.perf_counter() - began}))


def measure_side(side, folder, *more):
    """{"gb": the peak memory of a process that does this side's work alone}: this command, with --side."""
    module = "bench." + Path(sys.argv[0]).stem
    command = [sys.executable, "-m", module, *sys.argv[1:], "--side", side, "--folder", folder, *more]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(out.splitlines()[-1])


def peak_bytes():
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # not ru_maxrss, which a process starts with that of the one that started it
        return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
