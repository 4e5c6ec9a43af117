"""A run's memory and time on paper, before anything is loaded: what a rank holds in every phase, and whether it fits.

    python grpo.py --plan --recipe qwen2.5-32b --gpus 8 --gpu-gb 80 --model DIR     DIR needs a config.json only

Bytes follow from the model's config and the run's options alone. A phase has a few moments that can be its worst. Each
is a dict of the parts that are held then; the largest sum is the phase's peak. python -m bench.memory checks them
against the live tensors of real steps, and of a simulation of the real code at full size (docs/memory.md). GB are 10^9
bytes: a card of "80 GB" has 85.5 of them. That, and what the peak leaves, is for the allocator's gaps.

Letters: n packed tokens of e bytes a number; D, F, V, L as in model.py, Q and KV channels of all query and key heads.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from folder import read_json
from model import Model, ModelConfig, forward_flops
from options import rank_and_world
from pages import page_bytes
from split import Split

# What a process takes of its card besides tensors: CUDA's context with the loaded kernels (about 0.6 GB on an H100),
# cuBLAS's workspaces (0.1), NCCL's buffers for a few groups of 8 ranks (about 1). Not measured.
CONTEXT = 2e9
NODE = 8  # GPUs of a node
LOGP_COLUMNS = 256  # of a vocabulary tile of linear_logp's kernel on an H100: 12 bytes for each row and tile
GRADIENT_CHUNK = 2**27  # kernels/logp.py: the logits' gradients of a block ...
LOGIT_CHUNK = 2**24  # ... and on the PyTorch path the logits


@dataclass(frozen=True)
class Work:
    """The options of a run that cost memory or time, which grpo.py and distill.py fill in from their own."""
    micro_tokens: int
    longest: int         # tokens of the longest sequence: if it must, it is a micro-batch by itself
    dtype: torch.dtype
    checkpointing: bool
    offload: bool
    reference: bool
    sequences: int       # prompts, or chains, a step
    updates: int         # optimizer steps a step
    group_size: int      # judgements of a prompt
    prompt_tokens: int   # of the longest prompt and judgement that the sampler gets; 0: none are written
    new_tokens: int
    n_slots: int
    kv_gb: float
    sampler_ranks: int
    triton: bool = True  # the kernels, or PyTorch's own operations

    @property
    def n(self):
        return max(self.micro_tokens, self.longest)

    @property
    def e(self):
        return self.dtype.itemsize


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters: of a block, of the rest (the root: embedding, head, last norm), of the embedding, of all,
    of a rank's shards (rows rounded up, as FSDP2 does), of its part of the sampler's copy."""
    block: int
    root: int
    embedding: int
    total: int
    shard: int
    part: int


def sizes_of(config, world, sampler_ranks):
    def counted(config, split, count=torch.Tensor.numel):
        """Of the root, and of a block: all are alike."""
        with torch.device("meta"):
            model = Model(replace(config, num_hidden_layers=1), split)
        block = sum(count(x) for x in model.model.layers[0].parameters())
        return sum(count(x) for x in model.parameters()) - block, block

    def rows(x):
        return -(-len(x) // world) * (x.numel() // len(x))
    L = config.num_hidden_layers
    root, block = counted(config, Split())
    shard_root, shard_block = counted(config, Split(), rows)
    part_root, part_block = counted(config, Split(0, sampler_ranks))
    return Sizes(block, root, config.vocab_size * config.hidden_size, root + L * block, shard_root + L * shard_block,
                 part_root + L * part_block)


def widths(config):
    """D, F, Q, KV."""
    C = config.head_dim
    return (config.hidden_size, config.intermediate_size, config.num_attention_heads * C,
            config.num_key_value_heads * C)


def logit_block(config, work):
    """Elements of linear_logp's blocks of logits (PyTorch's path), and of their gradients (both)."""
    return min(GRADIENT_CHUNK if work.triton else LOGIT_CHUNK, work.n * config.vocab_size)


# -------------------------------------------------------------------------------------------------------------- phases


def block_saved(config, work):
    """What a block keeps for its backward pass: its norms' outputs and the sum before the second, q, k, v, the
    attention's output, gate, up and their product; 1/rms and log-sums in float32. PyTorch's operations keep steps
    between, too."""
    D, F, Q, KV = widths(config)
    if not work.triton:
        return work.n * work.e * (7 * D + 5 * Q + 6 * KV + 4 * F)
    kept = 3 * D + 2 * Q + 2 * KV + 3 * F + (Q + KV if config.qk_norm else 0)
    return work.n * (work.e * kept + 4 * config.num_attention_heads + 8)


def whole_weights(work, sizes, world):
    """Bytes of a block and of the root while they are gathered, and of the buffers they arrive in, which one GPU does
    not need. Nothing for one process that computes in the masters' own dtype: its model is not sharded."""
    if world == 1 and work.e == 4:
        return 0, 0, 0, 0
    block, root, arrives = work.e * sizes.block, work.e * sizes.root, int(world > 1)
    return block, root, arrives * block, arrives * root


def forward_moments(config, work, sizes, world, kept=0):
    """The root and the first block arrive; a block's MLP; the head. kept: what stays of all blocks for a backward."""
    D, F, _, _ = widths(config)
    block, root, block_arrives, root_arrives = whole_weights(work, sizes, world)
    stream = work.n * D * work.e
    logits = 12 * work.n * -(-config.vocab_size // LOGP_COLUMNS) if work.triton else 8 * logit_block(config, work)
    return [{"whole weights": root + root_arrives + block + block_arrives, "activations": stream},
            {"whole weights": root + block + block_arrives, "activations": kept + work.n * work.e * (3 * D + 3 * F)},
            {"whole weights": root + block_arrives, "activations": kept + 2 * stream, "logits": logits}]


def score_moments(config, work, sizes, world):
    """The reference has the computing dtype: on one GPU it is not sharded."""
    if world == 1:
        sizes = replace(sizes, block=0, root=0)
    return forward_moments(config, work, sizes, world)


def update_moments(config, work, sizes, world):
    """A later micro-batch of an optimizer step, when all gradients are there: its forward pass, then backward

    1. the head: its gradient and the hidden states', beside a block of the logits', or twice, as it takes the padded
       head's place; 2. a block's MLP: gradients of gate, up and product beside the first two, the next block arriving,
       the last one's gradients, float32, on their way to the other ranks; 3. a block's gradients leave; 4. the root's.
    """
    D, F, _, _ = widths(config)
    block, root, block_arrives, _ = whole_weights(work, sizes, world)
    stream, head = work.n * D * work.e, work.e * sizes.embedding
    kept = config.num_hidden_layers * (stream if work.checkpointing else block_saved(config, work))
    reduced = 4 if root else 0  # bytes a parameter of whole gradients, in the masters' dtype, and of their sums
    leaves = max(work.e + reduced, reduced + reduced / world)
    logits = (work.e if work.triton else 4) * logit_block(config, work)
    backward = [
        {"whole weights": root + block_arrives, "activations": kept + stream,
         "logits": max(2 * head, head + logits + work.n * D * (4 + work.e))},
        {"whole weights": root + block + block_arrives, "whole gradients": head + reduced * sizes.block + work.e * D * F,
         "activations": kept + block_saved(config, work) + work.n * work.e * (2 * F + 2 * D)},
        {"whole weights": root + block_arrives, "whole gradients": head + leaves * sizes.block,
         "activations": kept + 2 * stream},
        {"whole gradients": leaves * sizes.root, "activations": 2 * stream}]
    moments = forward_moments(config, work, sizes, world, kept) + backward
    return [{"gradients": 4 * sizes.shard} | moment for moment in moments]


def optimizer_moments(config, work, sizes, world):
    """With --offload a block's moments, or the embedding's, are beside the weights; without a GPU AdamW is not fused."""
    largest = max(sizes.block, sizes.embedding) / world
    parts = {"gradients": 4 * sizes.shard, "temporaries": 0 if work.triton else 8 * sizes.embedding / world}
    return [parts | {"moments": 8 * largest} if work.offload else parts]


def n_prompts(work, world):
    """That a sampler gets at once."""
    return min(work.n_slots, work.sequences * work.sampler_ranks / world)


def sampler_parts(config, work, sizes, world):
    """The copy, and what filling it, a prefill or a draw takes besides. One process in float32 needs no copy."""
    D, F, _, _ = widths(config)
    whole = world == 1 and work.e == 4
    filling = 0 if whole else 2 * work.e * sizes.embedding
    n = min(work.n, n_prompts(work, world) * work.prompt_tokens)
    prefill = n * work.e * (3 * F // work.sampler_ranks + 6 * D)
    draw = 12 * work.n_slots * config.vocab_size
    return {"sampler's copy": 0 if whole else work.e * sizes.part, "sampler's work": max(filling, prefill + draw)}


def phases_of(config, work, sizes, world):
    """{phase: its parts at its worst moment}, keys and values left out."""
    masters = {"masters": 4 * sizes.shard}
    held = masters | {"reference": work.e * sizes.shard} if work.reference else masters
    if work.offload and world == 1:  # the reference waits on the host, too
        scoring, held = held, masters
    else:
        scoring = held
    moments = {} if work.offload else {"moments": 8 * sizes.shard}
    found = {"load": [scoring]}
    if work.prompt_tokens:
        found["rollout"] = [held | moments | sampler_parts(config, work, sizes, world)]
    if work.reference:
        found["score"] = [scoring | moments | parts for parts in score_moments(config, work, sizes, world)]
    found["update"] = [held | moments | parts for parts in update_moments(config, work, sizes, world)]
    found["optimizer"] = [held | moments | parts for parts in optimizer_moments(config, work, sizes, world)]
    found["save"] = [held | moments | {"whole weights": 4 * sizes.embedding}]  # a tensor at a time
    return {phase: max(moments, key=lambda parts: sum(parts.values())) for phase, moments in found.items()}


def keys_and_values(config, work, world, free):
    """(bytes for keys and values, tokens that they hold, bytes that one group of the longest judgements needs), of a
    card with so many bytes left in the rollout; like the sampler it takes nine tenths of them, or --kv-gb."""
    one = page_bytes(Split(0, work.sampler_ranks).config(config), 1, work.dtype)
    needed = one * (work.prompt_tokens + work.group_size * work.new_tokens)
    most = one * (work.n_slots * work.new_tokens + n_prompts(work, world) * work.prompt_tokens)
    room = int(min(most, 1e9 * work.kv_gb or 0.9 * max(free, 0)))
    return room, room // one, needed


def host_bytes(work, sizes, world):
    """A node's memory, by part. A checkpoint's copy, 12 bytes a parameter, is there while it is written, shared over all
    ranks. Page-locked memory is rounded up to powers of two by PyTorch, tensor by tensor: up to twice as much, on
    average 1.4 times, unless PYTORCH_CUDA_ALLOC_CONF says pinned_max_round_threshold_mb:1."""
    ranks = min(world, NODE)
    parts = {"checkpoint's copy": 12 * sizes.total * ranks / world}
    if work.offload:
        parts["moments, page-locked"] = 8 * sizes.shard * ranks
        if work.reference and world == 1:
            parts["reference"] = work.e * sizes.total
    # every rank has a step's rollouts: an id and a log-probability take 8 bytes
    parts["rollouts"] = 8 * ranks * work.sequences * (work.prompt_tokens + work.group_size * work.new_tokens)
    return parts


def seconds_of(config, work, sizes, world, n_kept, rates):
    """{phase: seconds a step}, from rates that a card attains: TFLOP/s, memory TB/s, NVLink and host link GB/s one way.

    Prompts are taken to be a quarter of the longest, judgements (or chains) an eighth. Operations are forward_flops';
    forward and backward cost three times a forward pass, with checkpointing four times. Sharded weights arrive
    meanwhile: the longer of the two counts. A decode step reads the copy and the keys of what it writes on; with several
    sampler ranks it waits 10 us for each sum. AdamW moves 28 bytes a parameter, --offload 16 over the host link.
    """
    flops, memory, nvlink, host = (rate * unit for rate, unit in zip(rates, (1e12, 1e12, 1e9, 1e9)))
    writes = work.group_size > 1  # rollouts; an evaluation is no part of a step
    prompt, new = (work.prompt_tokens / 4, work.new_tokens / 8) if writes else (0, work.longest / 8)
    written, read = work.sequences * work.group_size * new, work.sequences * prompt
    packed = written + read
    forward_s = forward_flops(config, packed, written, packed * (prompt + new / 2)) / world / flops
    micros = packed / world / work.n + work.updates / 2  # the last one of an update is half full on average

    def passes(n_forward, bytes_moved):
        return max(n_forward * forward_s, (world > 1) * micros * bytes_moved * sizes.total / nvlink)
    seconds = {}
    if writes:
        groups, held = world / work.sampler_ranks, prompt / work.group_size + new / 2
        slots = max(1, min(work.n_slots, n_kept / held, written / groups))
        one = page_bytes(Split(0, work.sampler_ranks).config(config), 1, work.dtype)
        sums = (work.sampler_ranks > 1) * 2 * config.num_hidden_layers

        def step(n):
            computed = max((work.e * sizes.part + n * held * one) / memory, 2 * sizes.part * n / flops)
            return computed + sums * (1e-5 + n * config.hidden_size * work.e / nvlink)
        prefill = forward_flops(config, read, 0, read * prompt / 2) / world / flops
        seconds["rollout"] = prefill + max(written / groups / slots * step(slots), work.new_tokens * step(1))
    if work.reference:
        seconds["score"] = passes(1, work.e)
    seconds["update"] = passes(3 + work.checkpointing, 2 * work.e + 4)
    seconds["optimizer"] = work.updates * sizes.shard * (28 / memory + work.offload * 16 / host)
    return seconds


# ---------------------------------------------------------------------------------------------------------- the verdict


@dataclass(frozen=True)
class Plan:
    phases: dict   # phase -> part -> bytes of a rank
    host: dict     # part -> bytes of a node
    seconds: dict  # phase -> seconds a step
    n_kept: int    # tokens whose keys and values fit
    fits: bool
    line: str      # the verdict in a line

    def peak(self, phase):
        return sum(self.phases[phase].values())


def make_plan(config, work, world, gpu_gb, rates=(400, 2.5, 300, 40)):
    """It fits if every phase does beside CONTEXT, the rollout with keys and values for one group of judgements, all of
    the longest length: then no judgement waits for its own group."""
    if min(world, NODE) % work.sampler_ranks:
        raise ValueError(f"--sampler-ranks {work.sampler_ranks} does not divide the {min(world, NODE)} GPUs of a node")
    sizes = sizes_of(config, world, work.sampler_ranks)
    phases, n_kept = phases_of(config, work, sizes, world), 0
    if work.prompt_tokens:
        free = 1e9 * gpu_gb - CONTEXT - sum(phases["rollout"].values())
        room, n_kept, needed = keys_and_values(config, work, world, free)
        phases["rollout"]["keys and values"] = max(room, needed)
    seconds = seconds_of(config, work, sizes, world, max(n_kept, work.new_tokens), rates)
    peaks = {phase: CONTEXT * work.triton + sum(parts.values()) for phase, parts in phases.items()}
    worst = max(peaks, key=lambda phase: (peaks[phase] > 1e9 * gpu_gb, phase != "rollout", peaks[phase]))
    fits = max(peaks.values()) <= 1e9 * gpu_gb
    line = (f"{'fits' if fits else 'does not fit'}: {worst} takes {peaks[worst] / 1e9:.3g} GB of a GPU's {gpu_gb:.3g}, "
            f"on {world}")
    return Plan(phases, host_bytes(work, sizes, world), seconds, n_kept,
                fits, line)


def suggested(config, work, world, gpu_gb):
    """The first that fits: without --offload before with it, few --sampler-ranks before many; with those the largest
    --micro-tokens of 1, 2 and 4 times. None if nothing does."""
    for offload in (False, True):
        for n in (1, 2, 4, 8):
            if min(world, NODE) % n or config.num_key_value_heads % n or config.intermediate_size % n:
                continue
            choice = replace(work, offload=offload, sampler_ranks=n)
            if not make_plan(config, choice, world, gpu_gb).fits:
                continue
            for times in (4, 2):
                larger = replace(choice, micro_tokens=times * work.micro_tokens)
                if make_plan(config, larger, world, gpu_gb).fits:
                    return larger
            return choice
    return None


def table(plan):
    """Lines of Markdown: a row a part, a column a phase, GB of a rank."""
    names = dict.fromkeys(name for parts in plan.phases.values() for name, size in parts.items() if size)
    rows = [["GB", *plan.phases], ["---"] + ["--:"] * len(plan.phases)]
    rows += [[name] + [f"{parts[name] / 1e9:.1f}" if parts.get(name) else "" for parts in plan.phases.values()]
             for name in names]
    rows.append(["peak"] + [f"{plan.peak(phase) / 1e9:.1f}" for phase in plan.phases])
    rows.append(["seconds a step"] + [f"{plan.seconds[phase]:.3g}" if phase in plan.seconds else ""
                                      for phase in plan.phases])
    return ["| " + " | ".join(row) + " |" for row in rows]


def config_in(folder):
    file = Path(folder, "config.json")
    return ModelConfig.from_dict(read_json(file), file)


def check_fits(folder, work, ranks, gpu_gb):
    """Before anything is loaded: ValueError, on all ranks, if the run would not fit gpu_gb, or, at 0, what is free on the
    card that has least. A CPU has no such bound."""
    cuda = ranks.device.type == "cuda"
    if cuda and not gpu_gb:
        gpu_gb = min(ranks.gather(torch.cuda.mem_get_info(ranks.device)[0])) / 1e9
    if gpu_gb:
        plan = make_plan(config_in(folder), replace(work, triton=cuda), ranks.world, gpu_gb)
        if not plan.fits:
            raise ValueError(f"{folder}: {plan.line}; --plan shows the parts, and what would fit")


def report(folder, work, gpus, gpu_gb, rates):
    """What --plan prints; gpus and gpu_gb as in the options."""
    config, world, gpu_gb = config_in(folder), gpus or rank_and_world()[1], gpu_gb or 80.0
    plan = make_plan(config, work, world, gpu_gb, rates)
    lines = [f"{plan.line}; {CONTEXT / 1e9:.0f} GB of it for CUDA and NCCL", "", *table(plan), ""]
    if work.prompt_tokens:
        each = work.new_tokens + work.prompt_tokens / work.group_size
        lines.append(f"keys and values: {plan.n_kept:,} tokens, {int(plan.n_kept / each)} judgements of the longest "
                     f"length at once on {work.sampler_ranks} GPU{'s' * (work.sampler_ranks > 1)}")
    host = ", ".join(f"{name} {size / 1e9:.0f}" for name, size in plan.host.items())
    lines.append(f"host memory of a node, GB: {sum(plan.host.values()) / 1e9:.0f}: {host}")
    choice = suggested(config, work, world, gpu_gb)
    if choice is None:
        lines.append("no --offload, --sampler-ranks or --micro-tokens makes it fit: take more GPUs")
    else:
        lines.append(f"the least that fits: --sampler-ranks {choice.sampler_ranks} --micro-tokens {choice.micro_tokens}"
                     + " --offload" * choice.offload)
    return "\n".join(lines)
