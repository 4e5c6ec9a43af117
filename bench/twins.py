"""The same random weights as our Model and as transformers' Qwen2, and the alternating stopwatch of the benchmarks."""

import argparse
import json
import resource
import statistics
import tempfile
import time

import torch

from model import Model, ModelConfig

SHAPES = {  # layers, width, heads, kv heads, ffn, vocabulary; qwen2.5-0.5b is the published geometry
    "tiny": (4, 256, 8, 2, 768, 8192),
    "small": (12, 512, 8, 2, 1536, 32768),
    "qwen2.5-0.5b": (24, 896, 14, 2, 4864, 151936),
}


def options(**defaults):
    """The benchmarks' common flags, and an integer flag for each keyword."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=SHAPES, default="tiny")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=5)
    for name, value in defaults.items():
        parser.add_argument("--" + name, type=int, default=value)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args


def twins(args):
    """(ours, transformers' model) with equal random weights, on the GPU if there is one."""
    from transformers import AutoModelForCausalLM
    L, D, H, K, F, V = SHAPES[args.model]
    config = ModelConfig.from_dict({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_hidden_layers": L, "hidden_size": D,
        "num_attention_heads": H, "num_key_value_heads": K, "intermediate_size": F, "vocab_size": V,
        "max_position_embeddings": 32768, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": True})
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, args.dtype)
    with tempfile.TemporaryDirectory() as folder:
        Model.random(config, dtype=dtype).save_pretrained(folder)
        peer = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").to(device)
        return Model.from_pretrained(folder, device, dtype), peer


def race(name, args, work, units, ours, peer):
    """Runs both alternately, prints a row per run and, last, the JSON line; throughputs are units a second, medians."""
    seconds = {"ours": [], "peer": []}
    for run in range(args.runs + 1):  # the first warms up
        for who, call in (("ours", ours), ("peer", peer)):
            began = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if run:
                seconds[who].append(time.perf_counter() - began)
        if run:
            print(f"run {run}: ours {seconds['ours'][-1]:.3f} s, peer {seconds['peer'][-1]:.3f} s", flush=True)
    rate = {who: units / statistics.median(s) for who, s in seconds.items()}
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 1024 * resource.getrusage(
        resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"bench": name, "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
                      "threads": args.threads, "dtype": args.dtype, "model": args.model, "work": work,
                      "ours": round(rate["ours"], 1), "peer": round(rate["peer"], 1),
                      "ratio": round(rate["ours"] / rate["peer"], 2),
                      "ratios": [round(p / o, 2) for o, p in zip(seconds["ours"], seconds["peer"])],
                      "both_gb": round(peak / 1e9, 2)}))
