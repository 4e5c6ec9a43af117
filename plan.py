"""A run's memory and time on paper, before anything is loaded: what a rank holds in every phase, and whether it fits.

    python grpo.py --plan --recipe qwen2.5-32b --gpus 8 --gpu-gb 80 --model DIR     DIR needs a config.json only

Bytes follow from the model's config and the run's options alone. A phase has a few moments that can be its worst; each
is a dict of the parts that are held then, and the largest sum is the phase's peak. python -m bench.memory checks them
against the live tensors of real steps, and of a simulation of the real code at full size; docs/memory.md has what came
of it. GB are 10^9 bytes: a card of "80 GB" has 85.5 of them. That, and what the peak leaves, is for the allocator's
gaps.

Letters: n packed tokens of e bytes a number, W ranks; D, H, K, C, F, V and L as in model.py.
"""

import math
from dataclasses import dataclass, replace

import torch

from model import Model

# What a process takes of its card besides tensors: CUDA's context with the loaded kernels (about 0.6 GB on an H100),
# cuBLAS's workspaces (0.1), NCCL's buffers for a few groups of 8 ranks (about 1). Not measured.
CONTEXT = 2e9
GPUS_PER_NODE = 8
LOGP_COLUMNS = 256  # of a vocabulary tile of linear_logp's kernel on an H100: 12 bytes for each row and tile
GRADIENT_CHUNK = 2**27  # kernels/logp.py: elements of its gradients of logits ...
LOGIT_CHUNK = 2**24  # ... and of PyTorch's float32 logits
RATES = "400 2.5 300 40"  # an H100, as attained: TFLOP/s, memory TB/s, NVLink and host link GB/s one way


@dataclass(frozen=True)
class Work:
    """The options of a run that cost memory or time; grpo.py and distill.py make it of their own."""
    micro_tokens: int
    longest: int         # tokens of a sequence; the longest is a micro-batch by itself if it must
    dtype: torch.dtype
    checkpointing: bool
    offload: bool
    moment_bytes: int    # of the optimizer, a parameter
    reference: bool
    prompt_tokens: int   # the longest prompt and judgement, for the sampler; 0: nothing is sampled
    new_tokens: int
    group_size: int      # judgements of a prompt
    n_slots: int
    kv_gb: float
    sampler_ranks: int
    sequences: int       # judgements, or chains, a step
    updates: int         # optimizer steps a step
    triton: bool = True  # the kernels, or PyTorch's own operations

    @property
    def n(self):
        return max(self.micro_tokens, self.longest)

    @property
    def e(self):
        return self.dtype.itemsize


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters: of a block, of the rest (the root: embedding, head, last norm), the embedding, all, those
    of a rank's shards (rows rounded up, as FSDP2 does), and those of a rank's part of the sampler's copy."""
    block: int
    root: int
    embedding: int
    total: int
    shard: int
    part: int


def sizes_of(config, world, sampler_ranks):
    with torch.device("meta"):
        named = dict(Model(config).named_parameters())
    block = sum(x.numel() for name, x in named.items() if name.startswith("model.layers.0."))
    total = sum(x.numel() for x in named.values())
    split = sum(x.numel() for name, x in named.items() if "_proj" in name)
    return Sizes(block, total - config.num_hidden_layers * block, config.vocab_size * config.hidden_size, total,
                 sum(-(-len(x) // world) * (x.numel() // len(x)) for x in named.values()),
                 total - split + split // sampler_ranks)


# ------------------------------------------------------------------------------------------------------ bytes of a phase


def widths(config):
    """D, F, and the channels of all query and of all key heads."""
    C = config.head_dim
    return (config.hidden_size, config.intermediate_size, config.num_attention_heads * C,
            config.num_key_value_heads * C)


def block_saved(config, work):
    """What a block keeps for its backward pass: the norms' outputs and their sum, q, k, v, the attention's output, gate,
    up and their product; 1/rms and log-sums in float32. PyTorch's own operations keep intermediate steps, too."""
    D, F, Q, KV = widths(config)
    if work.triton:
        kept = 3 * D + 2 * Q + 2 * KV + 3 * F + (Q + KV if config.qk_norm else 0)
        return work.n * (work.e * kept + 4 * config.num_attention_heads + 8)
    return work.n * work.e * (8 * D + 8 * Q + 8 * KV + 4 * F)


def block_backward(config, work):
    """The worst moment of a block's backward pass: gradients of gate, up and product, which itself is gone, and of the
    residual stream."""
    D, F, _, _ = widths(config)
    return block_saved(config, work) + work.n * work.e * (2 * F + 2 * D)


def head_backward(config, work):
    """The head's gradient beside a block of gradients of logits and those of the hidden states, in float32; or twice,
    when it is put into the padded head's place."""
    D, head = config.hidden_size, work.e * config.vocab_size * config.hidden_size
    chunk = work.e * GRADIENT_CHUNK if work.triton else 4 * LOGIT_CHUNK
    return work.n * D * work.e + max(2 * head, head + chunk + work.n * D * (4 + work.e))


def held(work, sizes):
    """What a rank holds in all phases."""
    return {"masters": 4 * sizes.shard, "moments": 0 if work.offload else work.moment_bytes * sizes.shard,
            "reference": work.e * sizes.shard if work.reference else 0}


def gathered(work, sizes, world):
    """Bytes of a block and of the root while they are whole, and of what they arrive in, which one GPU does not need;
    all 0 for one process that computes in the masters' own dtype, and is not sharded."""
    if world == 1 and work.e == 4:
        return 0, 0, 0, 0
    block, root = work.e * sizes.block, work.e * sizes.root
    return block, root, (world > 1) * block, (world > 1) * root


def forward_moments(config, work, sizes, world, checkpoints):
    """The root is gathered; a block runs; the head's logits are reduced. checkpoints: bytes that stay for a backward."""
    D, F, Q, KV = widths(config)
    block, root, block_arrives, root_arrives = gathered(work, sizes, world)
    stream = work.n * D * work.e
    tiles = 12 * math.ceil(config.vocab_size / LOGP_COLUMNS) * work.n if work.triton else 8 * LOGIT_CHUNK
    return [{"whole weights": root + root_arrives + block + block_arrives, "activations": stream},
            {"whole weights": root + block + block_arrives,
             "activations": checkpoints + work.n * work.e * (3 * D + 3 * F)},
            {"whole weights": root + block_arrives, "activations": checkpoints + 2 * stream, "head": tiles}]


def update_moments(config, work, sizes, world):
    """A later micro-batch of a mini-batch: all gradients are there."""
    D, F, _, _ = widths(config)
    block, root, block_arrives, _ = gathered(work, sizes, world)
    sharded = bool(root)
    stream = work.n * D * work.e
    gradient = work.e * sizes.embedding  # the head's, whole, until the root is reduced
    checkpoints = config.num_hidden_layers * (stream if work.checkpointing else block_saved(config, work))
    reduced = 4 * sharded  # bytes a parameter: gradients are summed over the ranks in float32
    backward = [
        {"whole weights": root + block_arrives, "activations": checkpoints, "head": head_backward(config, work)},
        {"whole weights": root + block + block_arrives, "head": gradient,
         "activations": checkpoints + block_backward(config, work),
         "whole gradients": reduced * sizes.block + work.e * D * F},
        {"whole weights": root + block_arrives, "head": gradient, "activations": checkpoints + 2 * stream,
         "whole gradients": (work.e + reduced + reduced / world) * sizes.block},
        {"whole gradients": (work.e + reduced) * sizes.root, "activations": 2 * stream}]
    moments = forward_moments(config, work, sizes, world, checkpoints) + backward
    return [moment | {"gradients": 4 * sizes.shard} for moment in moments]


def optimizer_moments(config, work, sizes, world):
    parts = {"gradients": 4 * sizes.shard}
    if work.offload:
        parts["moments"] = work.moment_bytes * max(sizes.block, sizes.embedding) / world
    elif not work.triton:  # on a CPU AdamW is not fused
        parts["temporaries"] = 8 * sizes.embedding / world
    return [parts]
