"""What the training loops share: ranks, micro-batches, optimizer and schedule.

Nothing here knows what a pair, a rollout or a loss is.
"""

import atexit
import dataclasses
import gc
import math
import os
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ending import watch
from files import fail
from options import rank_and_world

# ---------------------------------------------------------------------------------------------------------------- ranks


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started; alone, rank 0 of 1."""
    rank: int
    world: int
    device: torch.device
    together: int = 1  # so many consecutive ranks sample as one (--sampler-ranks): theirs is one share of the work
    group: dist.ProcessGroup | None = None  # whose collectives these are; None = the one of all

    @property
    def main(self):
        return self.rank == 0

    @property
    def first(self):
        """Of those that sample as one: the rank whose results count."""
        return self.rank % self.together == 0

    def sum(self, x):
        """Sum of a tensor over the ranks."""
        if self.world > 1:
            x = x.clone()
            dist.all_reduce(x, group=self.group)
        return x

    def gather(self, x):
        """List of every rank's Python object, in rank order."""
        if self.world == 1:
            return [x]
        out = [None] * self.world
        dist.all_gather_object(out, x, group=self.group)
        return out

    def share(self, items):
        """This rank's share of a list. Example, 4 ranks, two together: ranks 0 and 1 have items 0, 2, 4, ..."""
        return items[self.rank // self.together::self.world // self.together]

    def gather_shares(self, x):
        """List of every share's Python object, in the shares' order."""
        return self.gather(x if self.first else None)[::self.together]

    def barrier(self):
        if self.world > 1:
            dist.barrier(group=self.group)

    def agree(self, action):
        """List of every rank's action(). A mistake (ValueError, OSError) of one is raised on all: none waits for it."""
        if self.world == 1:
            return [action()]
        result, error = None, None
        try:
            result = action()
        except OSError as e:
            error = e
        except ValueError as e:
            error = ValueError(str(e))  # its own kind may be one that cannot be sent
        answers = self.gather((result, error))
        for _, error in answers:
            if error is not None:
                raise error
        return [result for result, _ in answers]


def interleave(shares):
    """What the ranks made of their shares of a list, in the list's order: of [a, b, c] rank 0 of 2 had [a, c]."""
    n = len(shares)
    return [shares[i % n][i // n] for i in range(sum(map(len, shares)))]


def init_ranks(threads=0, together=1):
    """Joins torchrun's process group: nccl on GPUs, gloo on CPUs. threads: CPU threads, 0 = PyTorch's choice. together:
    --sampler-ranks; ValueError where the ranks do not divide into so many."""
    if threads:
        torch.set_num_threads(threads)
    # Before CUDA starts. Segments that grow: rollouts and updates ask for blocks of sizes that come once, and of what
    # was freed in other sizes nothing would fit
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    # split sums are added in float32: a decode step's products, of few rows, are split where the trainer's are not
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    rank, world = rank_and_world()
    on_node = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if on_node % together:  # then it divides the world, too: torchrun has as many on every node
        raise ValueError(f"--sampler-ranks {together} does not divide the {on_node} ranks of a node: give torchrun a "
                         "--nproc_per_node that is a multiple of it, or take another number")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda and device.index >= torch.cuda.device_count():
        fail(f"process {device.index} has no GPU of its own; --nproc_per_node is at most {torch.cuda.device_count()}")
    if cuda:
        torch.cuda.set_device(device)
    atexit.register(leave_ranks)
    if world > 1 and not dist.is_initialized():
        # ranks wait for each other's longest rollouts, and for rank 0 to write a checkpoint
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None,
                                timeout=timedelta(hours=4))
        atexit.register(watch())
    return Ranks(rank, world, device, together)


def leave_ranks():
    """Ends the process group. Left to the interpreter, gloo's threads abort one finished run in seven (SIGABRT)."""
    gc.collect()  # sharded models hold the group in reference cycles
    if dist.is_initialized():
        dist.destroy_process_group()


def shard(model, ranks, compute_dtype):
    """FSDP2: each rank keeps 1/world of every weight, gradient and optimizer state, and gathers a block when it runs.

    Weights stay in their own dtype (float32 masters) and compute in compute_dtype; gradients are summed, not averaged,
    because the losses are already divided by a global count. One process that computes in the weights' dtype is left
    alone.
    """
    own_dtype = next(model.parameters()).dtype
    if ranks.world == 1 and compute_dtype == own_dtype:
        return model
    if not dist.is_initialized():  # one GPU: a group of one, for the mixed precision
        backend = "nccl" if ranks.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    mesh = dist.init_device_mesh(ranks.device.type, (ranks.world,))
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=own_dtype, cast_forward_inputs=False)
    for module in [*model.model.layers, model]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    return model


def full(x):
    """The whole tensor on every rank, whether x is sharded or not."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def micro_batches(sizes, max_size, world):
    """Splits items of these sizes (tokens) into micro-batches: a list over micro-steps of a list over ranks of item
    indices.

    Every rank makes the same number of micro-steps (their collectives must match), with about equal tokens; a bin over
    max_size holds one item. A bin may be empty when there are fewer items than bins. Example, 2 ranks:
    micro_batches([9, 3, 2], 6, 2) == [[[0], [1]], [[2], []]].
    """
    longest_first = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    fewest = min(len(sizes), math.ceil(sum(sizes) / (max_size * world)))  # a first guess: long items may need more
    for n_steps in range(fewest, len(sizes) + 1):
        bins = [[] for _ in range(n_steps * world)]
        load = np.zeros(n_steps * world, dtype=np.int64)
        for i in longest_first:  # each goes where least lies: the greedy rule for even loads
            b = int(load.argmin())
            bins[b].append(i)
            load[b] += sizes[i]
        if all(load[b] <= max_size or len(bins[b]) == 1 for b in range(len(bins))):
            break
    return [bins[m * world:(m + 1) * world] for m in range(n_steps)]


# Dense bfloat16 operations a second, by a word of the GPU's name
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}


def flops_utilization(flops, seconds, ranks):
    """Model FLOPs utilization: the share of what all ranks' GPUs could do at their peak. None on a CPU, or a GPU that
    PEAK_FLOPS has not."""
    name = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "cpu"
    peak = next((peak for word, peak in PEAK_FLOPS.items() if word in name.replace("-", " ").split()), None)
    return peak and flops / (seconds * ranks.world * peak)


class Tally:
    """Means as (sum, count) pairs: added up over micro-batches, reduced over ranks, divided once."""

    def __init__(self):
        self.pairs = {}

    def add(self, name, total, count=1):
        total_before, count_before = self.pairs.get(name, (0.0, 0.0))
        self.pairs[name] = (total_before + float(torch.as_tensor(total).detach()), count_before + float(count))

    def means(self, ranks):
        """The same names must have been added on every rank."""
        names = sorted(self.pairs)
        table = torch.tensor([self.pairs[name] for name in names], dtype=torch.float64)
        sums = ranks.sum(table.to(ranks.device)).tolist()
        return {name: total / count if count else None for name, (total, count) in zip(names, sums)}


# ----------------------------------------------------------------------------------------------- optimizer and schedule


class HostAdamW(torch.optim.AdamW):
    """AdamW whose moments wait in the host's memory (pinned, if the weights are on a GPU), and are beside the weights
    within `step` only. One of these for each block: 61 GB of a 7B's moments, of which 2 GB are on the card at once."""

    @torch.no_grad()
    def step(self):
        home = {}
        for weight, slots in self.state.items():
            for key in ("exp_avg", "exp_avg_sq"):
                home[weight, key] = slots[key]
                slots[key] = placed(slots[key], torch.empty_like(local(slots[key]), device=weight.device))
        super().step()
        for weight, slots in self.state.items():
            for key in ("exp_avg", "exp_avg_sq"):
                at_home = home.get((weight, key))  # none before the first step
                memory = host_memory(local(weight)) if at_home is None else local(at_home)
                slots[key] = placed(slots[key], memory)


def local(x):
    """This rank's rows of a sharded tensor, or the tensor: to read, and to write in place."""
    return (x.to_local() if isinstance(x, DTensor) else x).detach()


def placed(x, memory):
    """x with its rows copied into this memory, on whatever device."""
    memory.copy_(local(x), non_blocking=True)
    if not isinstance(x, DTensor):
        return memory
    return DTensor.from_local(memory, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride())


def host_memory(x):
    return torch.empty_like(x, device="cpu", pin_memory=x.is_cuda)


MOMENTS = {torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"), HostAdamW: ("step", "exp_avg", "exp_avg_sq"),
           torch.optim.Muon: ("momentum_buffer",)}


def make_optimizers(model, name, lr, betas, weight_decay, offload=False):
    """AdamW, or Muon for the blocks' matrices with AdamW for the rest. Norms and biases are never decayed. offload:
    AdamW's moments stay on the host, see HostAdamW."""
    named = dict(model.named_parameters())
    muon = [n for n, x in named.items() if name == "muon" and x.ndim == 2 and ".layers." in n]
    blocks = {}  # "model.layers.0" or the like -> its parameters' names
    for n in named:
        if n not in muon:
            blocks.setdefault(".".join(n.split(".")[:3]) if offload else "all", []).append(n)
    # fused: no temporary copies of the gradients on a GPU
    options = {"lr": lr, "betas": betas, "fused": next(iter(named.values())).is_cuda}
    optimizers = []
    for names in blocks.values():
        groups = [{"params": [named[n] for n in names if named[n].ndim == 2], "weight_decay": weight_decay},
                  {"params": [named[n] for n in names if named[n].ndim < 2], "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        optimizers.append(HostAdamW(groups, **options) if offload else torch.optim.AdamW(groups, **options))
    if muon:
        optimizers.append(torch.optim.Muon([named[n] for n in muon], lr=lr, weight_decay=weight_decay,
                                           adjust_lr_fn="match_rms_adamw"))
    return optimizers


def learning_rate(step, n_steps, peak, n_warmup, final_frac=1.0):
    """Linear warm-up to `peak` over n_warmup steps, then a cosine to final_frac * peak at the last step (0-based)."""
    if step < n_warmup:
        return peak * (step + 1) / n_warmup
    done = (step - n_warmup) / max(1, n_steps - 1 - n_warmup)
    return peak * (final_frac + (1 - final_frac) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def optimizer_step(model, optimizers, lr, max_norm, loss):
    """Clips the gradient of the whole model to max_norm, steps, clears it; returns the norm before clipping.

    If that norm or the loss (a float, of all ranks) is not finite, the step is left out and NaN comes back: one such
    step would make every weight NaN.
    """
    norm = float(full(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)))
    finite = math.isfinite(norm) and math.isfinite(loss)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        if finite:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm if finite else math.nan


def is_finite(model, probe):
    """Is the gradient of a Forest's log-probabilities finite? Not after a step that was far too long: the weights can
    still be finite then, and even the probabilities, where a norm of them has overflowed."""
    scored_m = torch.arange(1, len(probe.tokens_n), device=probe.tokens_n.device)
    logp_m, _ = model(probe, scored_m)
    logp_m.sum().backward()
    norm = float(full(torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)))
    model.zero_grad(set_to_none=True)
    return math.isfinite(norm)  # the norm is of all ranks: they take the same way from here
