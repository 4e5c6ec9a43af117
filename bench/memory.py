"""The plan's numbers (plan.py) against live tensors: of real steps on this CPU, and of a simulation at full size.

    python -m bench.memory                                three sizes, 1 and 2 ranks: rollout, score, update, optimizer
    python -m bench.memory --simulate 32b --gpus 8        the real code, rank 0 of 8, on tensors without memory
    python -m bench.memory --distill [--simulate 32b]     either, of a step of distill.py and an evaluation
    python -m bench.memory --tables                       the recipes' plans, as docs/memory.md has them

What counts is the sum of all tensors' storages, operation by operation, not the process's memory. In the simulation the
process group is PyTorch's "fake" one, every Triton launch is left out, and a value that the host would read is made up;
the tensors that the kernels' autograd functions allocate and save are the real ones. What no simulation sees: the
allocator's gaps, other streams' buffers, CUDA and NCCL. Keys and values are what is left, so they are left out here; so
is the copy of the head that a sampler on a CPU has in oneDNN's order.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import batch
import common
import distill
import grpo
import model as model_py
import sample
from bench.fake import no_kernels
from bench.twins import SHAPES, geometry
from common import Ranks, Tally, init_ranks, make_optimizers, optimizer_step, shard
from draw import Sampling
from kernels.attention import _key_tiles, _query_tiles
from model import Model, ModelConfig, pack
from options import rates_of
from plan import Work, make_plan
from plan_table import seconds_of, suggested, table
from sample import Sampler, filled_copy
from split import Split

QWEN = {"7b": (28, 3584, 28, 4, 18944), "14b": (48, 5120, 40, 8, 13824), "32b": (64, 5120, 40, 8, 27648)}
HOST_MEMORY = common.host_memory
GRPO_RECIPES = {"qwen2.5-7b, deepseek-distill-7b": "7b", "qwen2.5-14b, deepseek-distill-14b": "14b",
                "qwen2.5-32b, deepseek-distill-32b": "32b", "qwen2.5-7b-one-gpu": "7b"}
DISTILL_RECIPES = {"qwen2.5-7b": "7b", "qwen2.5-14b": "14b", "qwen2.5-32b": "32b", "qwen2.5-7b-one-gpu": "7b"}
RATES = rates_of(grpo.Config)  # the defaults
N_TOKENIZER = 151665  # ids of Qwen2.5's tokenizer; the head has 152,064 rows


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that were made within it and are still there, but for those of `host`."""

    def __init__(self):
        super().__init__()
        self.size_of, self.host, self.now, self.peak, self.paused = {}, set(), 0, 0, False
        self.patches = contextlib.ExitStack()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again, with what lies here of it
        if function is torch.ops.aten._local_scalar_dense.default and types:  # a value of a fake tensor
            return {torch.bool: False, torch.int64: 1}.get(args[0].dtype, 0.5)
        out = function(*args, **kwargs or {})
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.device.type == "cpu" and not x.is_mkldnn and not self.paused:
                self.see(x.untyped_storage())
        return out

    def see(self, storage):
        key = storage._cdata
        if key in self.host:
            return
        if key not in self.size_of:
            weakref.finalize(storage, self.forget, key)
        self.count(storage.nbytes() - self.size_of.get(key, 0))
        self.size_of[key] = storage.nbytes()

    def forget(self, key):
        self.count(-self.size_of.pop(key))

    def count(self, n_bytes):
        self.now += n_bytes
        self.peak = max(self.peak, self.now)

    def aside(self, function):
        """The function, what it makes not being counted: the host's memory, which is this machine's device, too."""
        def call(*args, **kwargs):
            self.paused = True
            try:
                return function(*args, **kwargs)
            finally:
                self.paused = False
        return call

    def host_memory(self, x):
        """common.host_memory, not counted."""
        memory = self.aside(HOST_MEMORY)(x)
        key = memory.untyped_storage()._cdata
        self.host.add(key)
        weakref.finalize(memory.untyped_storage(), self.host.discard, key)
        return memory

    def __enter__(self):
        resize = torch.UntypedStorage.resize_

        def resize_(storage, size):  # FSDP2 frees what was whole by it
            out = resize(storage, size)
            if storage._cdata in self.size_of:
                self.see(storage)
            return out
        patch = mock.patch.object
        self.patches.enter_context(patch(common, "host_memory", self.host_memory))
        self.patches.enter_context(patch(torch.UntypedStorage, "resize_", resize_))
        # DTensor asks for shapes by making fake tensors of the whole
        name = "_propagate_tensor_meta_non_cached"
        self.patches.enter_context(patch(ShardingPropagator, name, self.aside(getattr(ShardingPropagator, name))))
        return super().__enter__()

    def __exit__(self, *args):
        self.patches.close()
        return super().__exit__(*args)


def rollouts_of(n_prompts, work, n_vocab):
    """Groups of the longest prompts and judgements, as if they had been written."""
    rng, groups = np.random.default_rng(0), []
    for _ in range(n_prompts):
        rollouts = [batch.Rollout(rng.integers(n_vocab, size=work.new_tokens).astype(np.int32),
                                  np.full(work.new_tokens, -1.0, np.float32)) for _ in range(work.group_size)]
        reward_g = torch.tensor([1.0, -1.0] * work.group_size)[:work.group_size]
        prompt_ids = rng.integers(n_vocab, size=work.prompt_tokens).astype(np.int32)
        groups.append(grpo.Group(None, prompt_ids, rollouts, [], reward_g, grpo.advantages(reward_g[None])[0]))
    return groups


def mini_batch_of(n_prompts, work, n_vocab, ranks):
    """GRPO's, of such groups; None for distill.py's step."""
    cfg = grpo.Config(model="-", data="-", micro_tokens=work.n)
    return grpo.make_mini_batch(cfg, ranks, rollouts_of(n_prompts, work, n_vocab)) if work.reference else None


def chains_of(work, n_vocab):
    """A micro-batch of chains of one length, as distill.sft_loss packs it: its forest, and which tokens are scored."""
    length = work.prompt_tokens + work.new_tokens
    forest = pack([(np.random.default_rng(i).integers(n_vocab, size=length), []) for i in range(work.n // length)])
    return forest, (forest.positions_n >= work.prompt_tokens).nonzero()[:, 0]


def step_of(mode, config, n_vocab, work, ranks, impl, write, mini_batch):
    """Bytes of each phase of a training step, the second (in the first AdamW has no moments yet); with what begins it.
    GRPO's; without a reference (work.reference) distill.py's, where the sampler writes for an evaluation."""
    def made(dtype):
        with torch.device("meta"):
            model = Model(config).to(dtype)
        model.n_vocab, model.impl, model.gradient_checkpointing = n_vocab, impl, work.checkpointing
        return shard(model, ranks, work.dtype)
    waits = work.offload and ranks.world == 1  # the reference, on the host, as in grpo.main; here each time a new one
    policy = made(torch.float32)
    references = [made(work.dtype).requires_grad_(False) for _ in range(3)] if work.reference else []
    cfg, tally, bytes_of = grpo.Config(model="-", data="-", kl_coef=1e-3), Tally(), {}
    chains = None if work.reference else chains_of(work, n_vocab)
    live = Live()

    def filled(model):
        model.to_empty(device="cpu")
        for x in model.parameters():
            common.local(x.detach()).normal_(std=0.02)
        return model

    def sft_update(chains, scored_m):
        for _ in range(2):  # the second finds gradients there
            logp_m, _ = policy(chains, scored_m)
            (-logp_m.sum() / len(scored_m)).backward()
    with mode, live, torch.random.fork_rng():
        filled(policy)
        reference = filled(references.pop()) if work.reference else None
        optimizers = make_optimizers(policy, "adamw", 1e-6, (0.9, 0.999), 0.01, work.offload)
        for group in [group for optimizer in optimizers for group in optimizer.param_groups] if work.triton else []:
            group["fused"] = True  # as on a GPU

        def phase(name, function, *args):
            live.peak = live.now
            out = function(*args)
            bytes_of[name] = live.peak
            return out
        phase("load", lambda: None)
        for _ in range(2):
            reference = None if waits else reference
            before = live.now
            copy = phase("rollout", filled_copy, policy, work.dtype, Split(0, work.sampler_ranks))
            bytes_of["sampler's copy"] = live.now - before
            filling = bytes_of["rollout"]
            phase("rollout", write, live, copy)
            bytes_of["rollout"] = max(bytes_of["rollout"], filling)
            del copy
            if work.reference:
                reference = filled(references.pop()) if waits else reference
                phase("score", grpo.score, reference, [mini_batch], 1.0, ranks.device)
                reference = None if waits else reference
                phase("update", grpo.accumulate_gradients, cfg, ranks, policy, mini_batch, tally, True)
            else:
                phase("update", sft_update, *chains)
            phase("optimizer", optimizer_step, policy, optimizers, 1e-6, 1.0, 0.5)
            # as checkpoint.own_weights does, but for the copies on the host
            phase("save", lambda: [common.full(x.to(torch.float32)).nbytes for x in policy.parameters()])
    return bytes_of


# ------------------------------------------------------------------------------------------------------------ simulated


# A recipe's step, but for shorter prompts: a micro-batch of whole groups, nearly all of whose tokens are scored
FULL = Work(micro_tokens=12288, longest=12288, dtype=torch.bfloat16, checkpointing=True, offload=False, reference=True,
            sequences=1024, updates=8, group_size=7, prompt_tokens=512, new_tokens=1682, n_slots=252, kv_gb=8.0,
            sampler_ranks=1)


DISTILL = dict(reference=False, updates=1, group_size=1)
FULL_DISTILL = replace(FULL, **DISTILL, sequences=128, prompt_tokens=128, new_tokens=1920)


def qwen(size, n_layers=None):
    """The published geometry of Qwen2.5."""
    L, D, H, K, F = QWEN[size]
    raw = geometry(n_layers or L, D, H, K, F, 152064).raw
    return ModelConfig.from_dict(raw | {"tie_word_embeddings": False})


@contextlib.contextmanager
def fake_world(world):
    """Rank 0 of so many, whose others do not exist; fake tensors in it, and kernels that are not launched."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    caches = (model_py._on_device, _query_tiles, _key_tiles)

    def real(function):
        def call(*args, **kwargs):
            with unset_fake_temporarily():
                return function(*args, **kwargs)
        return call
    patch = mock.patch.object
    try:
        with no_kernels(), patch(torch.Tensor, "numpy", real(torch.Tensor.numpy)), patch(batch, "pack", real(pack)), \
                patch(sample, "Model", real(Model)), patch(torch.nn.Module, "to", real(torch.nn.Module.to)):
            yield fakes
    finally:
        for cached in caches:  # fake tensors, which nobody else may meet
            cached.cache_clear()
        dist.destroy_process_group()


def simulate(config, work, world):
    """Bytes of each phase on rank 0 of `world`."""
    ranks = Ranks(0, world, torch.device("cpu"), together=work.sampler_ranks)
    mini_batch = mini_batch_of(2 * world, work, 1000, ranks)
    if mini_batch:
        mini_batch.micros[:] = mini_batch.micros[:1] * 2  # a later one finds gradients there
    with fake_world(world) as fakes:
        def write(live, copy):
            n_prompts = -(-work.n_slots // work.group_size)
            with unset_fake_temporarily():
                prompts = [[1 + i] * work.prompt_tokens for i in range(n_prompts)]
                sampling = Sampling(n=work.group_size, max_new_tokens=work.new_tokens)
                made = live.aside(batch.Batch)(copy, prompts, sampling, work.n_slots, work.kv_gb, work.n, graphs=False)
            fake = live.aside(fakes.from_tensor)
            for memory in (made.pool.k, made.pool.v):
                memory[:] = [fake(x) for x in memory]
            made.inputs.device = {name: fake(x) for name, x in made.inputs.device.items()}
            made.out_2b = fake(made.out_2b)
            with torch.no_grad():
                made.admit()
                made.inputs.fill(made.slots, made.pages, {i: work.prompt_tokens for i in made.pages})
                made.compute_step(work.n_slots, whole=True)
        return step_of(fakes, config, min(N_TOKENIZER, config.vocab_size), work, ranks, "triton", write, mini_batch)


# ------------------------------------------------------------------------------------------------------------- measured

N_GROUPS = 4  # of each rank: two micro-batches
WORK = Work(micro_tokens=1024, longest=152, dtype=torch.float32, checkpointing=True, offload=False, reference=True,
            sequences=N_GROUPS, updates=1, group_size=4, prompt_tokens=32, new_tokens=120, n_slots=16, kv_gb=4.0,
            sampler_ranks=1, triton=False)
WORK_DISTILL = replace(WORK, **DISTILL, longest=128, prompt_tokens=8)


def measure(config, work, ranks):
    """Bytes of each phase of a real step on this rank: small models only."""
    def write(live, copy):
        prompts = [[1 + i] * work.prompt_tokens for i in range(N_GROUPS)]
        sampling = Sampling(n=work.group_size, max_new_tokens=work.new_tokens)
        Sampler(copy, work.n_slots, work.kv_gb, work.n).generate(prompts, sampling)
    mini_batch = mini_batch_of(N_GROUPS * ranks.world, work, config.vocab_size, ranks)
    return step_of(contextlib.nullcontext(), config, config.vocab_size, work, ranks, None, write, mini_batch)


# ------------------------------------------------------------------------------------------------------------ the table


def compared(config, work, world, bytes_of):
    """Rows (part, plan, found, ratio), GB."""
    plan = make_plan(config, work, world, 1e6)
    planned = {phase: plan.peak(phase) for phase in plan.phases} | {
        "sampler's copy": plan.phases["rollout"]["sampler's copy"]}
    if work.triton:
        planned["rollout"] -= plan.phases["rollout"]["keys and values"]
    return [(part, planned[part] / 1e9, found / 1e9, planned[part] / found if found else 1.0)
            for part, found in bytes_of.items()]


def show(what, rows):
    print(f"{what:32} {'plan':>9} {'found':>9}  ratio   (GB)")
    for part, planned, found, ratio in rows:
        print(f"    {part:28} {planned:9.4f} {found:9.4f}  {ratio:.3f}")
    rounded = {part: [round(planned, 5), round(found, 5), round(ratio, 4)] for part, planned, found, ratio in rows}
    print(json.dumps({"bench": "memory", "what": what, "rows": rounded}), flush=True)


def tables():
    """The recipes' plans in Markdown, as docs/memory.md has them."""
    heads = ("recipe", "GPUs", "rollout", "score", "update", "fits", "least that fits", "judgements at once",
             "host, a node", "seconds a step")
    lines = ["| " + " | ".join(heads) + " |", "|---|---|--:|--:|--:|---|---|--:|--:|--:|"]
    whole = []
    for script, names in ((grpo, GRPO_RECIPES), (distill, DISTILL_RECIPES)):
        for name, size in names.items():
            recipe = name.split(",")[0]
            work = script.work_of(script.Config(model="-", data="-", **script.RECIPES[recipe]))
            boards = ((1, 80),) if "one-gpu" in name else ((8, 80), (16, 80), (8, 141))
            for world, gpu_gb in boards:
                plan = make_plan(qwen(size), work, world, gpu_gb)
                each = work.new_tokens + work.prompt_tokens / work.group_size
                peaks = [f"{plan.peak(phase) / 1e9:.1f}" if phase in plan.phases else "" for phase in
                         ("rollout", "score", "update")]
                at_once = f"{plan.n_kept / each:.0f} on {work.sampler_ranks}" if work.prompt_tokens else ""
                seconds = seconds_of(qwen(size), work, world, plan.n_kept, RATES)
                least = suggested(qwen(size), work, world, gpu_gb)
                row = [f"{script.__name__}.py {name}", f"{world} x {gpu_gb}", *peaks, "yes" if plan.fits else "no",
                       f"`--sampler-ranks {least.sampler_ranks}{' --offload' * least.offload}`", at_once,
                       f"{sum(plan.host.values()) / 1e9:.0f}", f"{sum(seconds.values()):.0f}"]
                lines.append("| " + " | ".join(row) + " |")
            world, gpu_gb = boards[0]
            plan = make_plan(qwen(size), work, world, gpu_gb)
            whole += ["", f"### {script.__name__}.py {name}, {world} x {gpu_gb} GB", "",
                      *table(plan, seconds_of(qwen(size), work, world, plan.n_kept, RATES))]
    return "\n".join(lines + whole) + "\n"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--simulate", choices=QWEN)
    parser.add_argument("--distill", action="store_true")
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--layers", type=int, help="so many of the model's")
    parser.add_argument("--sampler-ranks", type=int, default=1)
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=["tiny", "25m", "100m"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    script = ", distill.py" * args.distill
    if args.tables:
        return print(tables(), end="")
    if args.simulate:
        work = replace(FULL_DISTILL if args.distill else FULL, offload=args.offload, sampler_ranks=args.sampler_ranks)
        config = qwen(args.simulate, args.layers)
        what = f"{args.simulate} on {args.gpus}, simulated{script}" + (f", {args.layers} layers" if args.layers else "")
        show(what, compared(config, work, args.gpus, simulate(config, work, args.gpus)))
        return
    if "RANK" not in os.environ:  # each number of ranks in processes of its own
        for world in args.ranks:
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
            flags = ["--offload"] * args.offload + ["--distill"] * args.distill
            subprocess.run([*torchrun, "-m", "bench.memory", "--sizes", *args.sizes, *flags], check=True)
        return
    ranks = init_ranks()
    for size in args.sizes:
        config = geometry(*SHAPES[size])
        work = replace(WORK_DISTILL if args.distill else WORK, offload=args.offload, sequences=N_GROUPS * ranks.world)
        bytes_of = measure(config, work, ranks)
        if ranks.main:
            n = sum(x.numel() for x in Model(config).parameters())
            show(f"{size} ({n / 1e6:.0f}M), {ranks.world} ranks{script}", compared(config, work, ranks.world, bytes_of))


if __name__ == "__main__":
    main()
