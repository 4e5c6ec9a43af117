"""What a decode step costs the host: its launches, and microseconds of Python, without a GPU (bench/fake.py).

    python -m bench.host                      28, 48 and 64 layers; around a graph with 32, 128 and 256 slots
    python -m bench.host --profile 28         where the Python of a step of 28 layers goes, by function

The first table is one step without a graph, Batch.compute_step(n, whole=True): launches that do nothing, and torch
operations on tensors so small that what they cost is being called. A GPU's host pays much the same for each, and the
driver's own launch, 2-3 us, on top. One launch alone is said first, as a yardstick for the machine. The second is the
rest of Batch.step when a graph holds the step: pages, upload, tolist, advance, record, with copies to another place in
memory for the copies to a GPU. Time is the thread's own, the least of all runs, since what else runs on the machine
only adds to it. JSON line last.
"""

import argparse
import cProfile
import json
import pstats
import time
from collections import Counter

import torch

from batch import Batch
from bench.fake import fake_gpu
from draw import Sampling
from kernels import pointwise
from kernels.tiles import POINTWISE
from model import Model, ModelConfig

GOAL_MS = {"step of 28 layers": 5.0, "around a graph": 0.5}


def tiny(n_layers):
    return Model.random(ModelConfig.from_dict({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_hidden_layers": n_layers, "hidden_size": 64,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64, "vocab_size": 512,
        "tie_word_embeddings": True})).requires_grad_(False).fuse()


def make_batch(model, n_slots, impl):
    """All slots taken, in groups of 8, after prompts of 20 tokens."""
    model.impl = "torch"  # prompts and a first step are computed; from here on nothing is
    prompts = [[1 + i] * 20 for i in range(-(-n_slots // 8))]
    batch = Batch(model, prompts, Sampling(n=8, max_new_tokens=4096), n_slots, kv_gb=1.0)
    batch.admit()
    batch.step()
    model.impl = impl
    return batch


def least_us(call, n):
    times = []
    for _ in range(n):
        began = time.thread_time()
        call()
        times.append(time.thread_time() - began)
    return round(1e6 * min(times))


@torch.inference_mode()
def step_without_graph(n_layers, n_slots, n_runs):
    """(launches, matrix products by the library, microseconds) of one step."""
    with fake_gpu() as counter:
        batch = make_batch(tiny(n_layers), n_slots, "triton")
        batch.compute_step(n_slots, whole=True)  # compiles
        counter.clear()
        batch.compute_step(n_slots, whole=True)
        launches = Counter(counter)
        return launches, least_us(lambda: batch.compute_step(n_slots, whole=True), n_runs)


@torch.inference_mode()
def one_launch(n_runs):
    """Microseconds of the smallest kernel's launch, the yardstick of a machine and its moment."""
    gate, up, out = torch.zeros(3, 8, 64)

    def launches():
        for _ in range(100):
            pointwise._swiglu_fwd_kernel[8, 1](gate, up, out, 64, 64, 64, 1024, **POINTWISE)
    with fake_gpu():
        return least_us(launches, n_runs) / 100


@torch.inference_mode()
def around_graph(n_slots, n_runs):
    batch = make_batch(tiny(1), n_slots, "torch")
    batch.compute = lambda n: None
    batch.inputs.device = {name: x.clone() for name, x in batch.inputs.device.items()}
    return least_us(batch.step, n_runs)


@torch.inference_mode()
def profile(n_layers, n_slots):
    with fake_gpu():
        batch = make_batch(tiny(n_layers), n_slots, "triton")
        batch.compute_step(n_slots, whole=True)
        profiler = cProfile.Profile()
        profiler.enable()
        for _ in range(20):
            batch.compute_step(n_slots, whole=True)
        profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, nargs="+", default=[28, 48, 64])
    parser.add_argument("--slots", type=int, nargs="+", default=[32, 128, 256])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--profile", type=int, metavar="LAYERS")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.profile:
        return profile(args.profile, 8)
    rows = {"launch_us": one_launch(args.runs), "step_us": {}, "around_us": {}}
    print(f"one launch: {rows['launch_us']:.1f} us")
    print("layers  launches  Python, us")
    for n_layers in args.layers:
        launches, us = step_without_graph(n_layers, 8, args.runs)
        rows["step_us"][n_layers] = us
        print(f"{n_layers:6} {sum(launches.values()):9} {us:11}   "
              + ", ".join(f"{n} {name[1:].removesuffix('_kernel')}" for name, n in launches.items()))
    print("slots   around a graph, us")
    for n_slots in args.slots:
        rows["around_us"][n_slots] = around_graph(n_slots, args.runs)
        print(f"{n_slots:5} {rows['around_us'][n_slots]:11}")
    print("goals, ms: " + ", ".join(f"{goal} {ms}" for goal, ms in GOAL_MS.items()))
    print(json.dumps({"bench": "host"} | rows))


if __name__ == "__main__":
    main()
