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
from model import Model, ModelConfig
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
    evaluated: int = 0   # prompts that the sampler gets at once, where they are not the step's: distill.py's

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
    saved = block_saved(config, work)
    kept = config.num_hidden_layers * (stream if work.checkpointing else saved)
    again = saved if work.checkpointing else 0  # of the block whose forward pass runs a second time
    reduced = 4 if root else 0  # bytes a parameter of whole gradients, in the masters' dtype, and of their sums
    leaves = max(work.e + reduced, reduced + reduced / world)
    logits = (work.e if work.triton else 4) * logit_block(config, work)
    backward = [
        {"whole weights": root + block_arrives, "activations": kept + stream,
         "logits": max(2 * head, head + logits + work.n * D * (4 + work.e))},
        {"whole weights": root + block + block_arrives, "activations": kept + again + work.n * work.e * (2 * F + 2 * D),
         "whole gradients": head + reduced * sizes.block + work.e * D * F},
        {"whole weights": root + block_arrives, "whole gradients": head + leaves * sizes.block,
         "activations": kept + 2 * stream},
        {"whole gradients": leaves * sizes.root, "activations": 2 * stream}]
    moments = forward_moments(config, work, sizes, world, kept) + backward
    return [{"gradients": 4 * sizes.shard} | moment for moment in moments]


def optimizer_moments(config, work, sizes, world):
    """With --offload a block's moments, or the embedding's, come beside the weights; on a CPU AdamW is not fused."""
    largest = max(sizes.block, sizes.embedding) / world
    parts = {"gradients": 4 * sizes.shard, "temporaries": 0 if work.triton else 8 * sizes.embedding / world}
    return [parts | {"moments": 8 * largest} if work.offload else parts]


def n_prompts(work, world):
    """That a sampler gets at once."""
    return min(work.n_slots, (work.evaluated or work.sequences) * work.sampler_ranks / world)


def sampler_parts(config, work, sizes, world):
    """The copy, and what filling it, a prefill or a draw takes besides. One process in float32 needs no copy."""
    D, F, _, _ = widths(config)
    whole = world == 1 and work.e == 4
    filling = 0 if whole else work.e * sizes.embedding * (2 * (world > 1) + 1 / world)
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
    found["save"] = [held | moments | {"whole weights": 8 * sizes.embedding * (world > 1)}]  # a tensor, and as it comes
    return {phase: max(moments, key=lambda parts: sum(parts.values())) for phase, moments in found.items()}


def keys_and_values(config, work, world, free):
    """Of a card with so many bytes left in the rollout: bytes for keys and values, tokens that they hold, and bytes
    that one group of the longest judgements needs. Like the sampler it takes nine tenths of them, or --kv-gb."""
    one = page_bytes(Split(0, work.sampler_ranks).config(config), 1, work.dtype)
    most = one * (work.n_slots * work.new_tokens + n_prompts(work, world) * work.prompt_tokens)
    if work.kv_gb:
        room = needed = int(min(most, 1e9 * work.kv_gb))
    else:
        room = int(min(most, 0.9 * max(free, 0)))
        needed = one * (work.prompt_tokens + min(work.n_slots, work.group_size) * work.new_tokens)
    return room, room // one, needed


def host_bytes(work, sizes, world):
    """A node's memory, by part. A checkpoint's copy, 12 bytes a parameter over all ranks, is there while it is written.
    Page-locked memory is taken as it is asked for (common.init_ranks says so to PyTorch)."""
    ranks = min(world, NODE)
    parts = {"checkpoint's copy": 12 * sizes.total * ranks / world}
    if work.offload:
        parts["moments, page-locked"] = 8 * sizes.shard * ranks
        if work.reference and world == 1:
            parts["reference"] = work.e * sizes.total
    # every rank has a step's rollouts: an id and a log-probability take 8 bytes
    parts["rollouts"] = 8 * ranks * work.sequences * (work.prompt_tokens + work.group_size * work.new_tokens)
    return parts


# ---------------------------------------------------------------------------------------------------------- the verdict


@dataclass(frozen=True)
class Plan:
    phases: dict   # phase -> part -> bytes of a rank
    host: dict     # part -> bytes of a node
    n_kept: int    # tokens whose keys and values fit
    fits: bool
    line: str      # the verdict in a line

    def peak(self, phase):
        return sum(self.phases[phase].values())


def make_plan(config, work, world, gpu_gb):
    """It fits if every phase does beside CONTEXT, the rollout with keys and values for one group of judgements, all of
    the longest length, so that none of them waits for another (or with --kv-gb, where that is given)."""
    if min(world, NODE) % work.sampler_ranks:
        raise ValueError(f"--sampler-ranks {work.sampler_ranks} does not divide the {min(world, NODE)} GPUs of a node")
    sizes = sizes_of(config, world, work.sampler_ranks)
    phases, n_kept, context = phases_of(config, work, sizes, world), 0, CONTEXT * work.triton
    if work.prompt_tokens:
        free = 1e9 * gpu_gb - context - sum(phases["rollout"].values())
        room, n_kept, needed = keys_and_values(config, work, world, free)
        phases["rollout"]["keys and values"] = max(room, needed)
    peaks = {phase: context + sum(parts.values()) for phase, parts in phases.items()}
    worst = max(peaks, key=lambda phase: (peaks[phase] > 1e9 * gpu_gb, phase != "rollout", peaks[phase]))
    fits = max(peaks.values()) <= 1e9 * gpu_gb
    verdict = "fits" if fits else "does not fit"
    line = f"{verdict}: {worst} takes {peaks[worst] / 1e9:.3g} of {gpu_gb:.3g} GB on each GPU, {world} in all"
    return Plan(phases, host_bytes(work, sizes, world), n_kept, fits, line)


def config_in(folder):
    file = Path(folder, "config.json")
    return ModelConfig.from_dict(read_json(file), file)


def check_fits(folder, work, ranks, gpu_gb):
    """Before anything is loaded: ValueError, on all ranks, if the run would not fit gpu_gb, or, at 0, what is free on
    the card that has least. A CPU has no such bound."""
    cuda = ranks.device.type == "cuda"
    if cuda and not gpu_gb:
        gpu_gb = min(ranks.gather(torch.cuda.mem_get_info(ranks.device)[0])) / 1e9
    if gpu_gb:
        plan = make_plan(config_in(folder), replace(work, triton=cuda), ranks.world, gpu_gb)
        if not plan.fits:
            raise ValueError(f"{folder}: {plan.line}; --plan shows the parts, and what would fit")
