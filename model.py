"""The Qwen2 / Qwen2.5 / Qwen3 decoder (and DeepSeek-R1-Distill-Qwen, which is a Qwen2), and its Hugging Face folder.

    model = Model.from_pretrained("Qwen2.5-7B-Instruct", device="cuda", dtype=torch.bfloat16)
    model.logits(ids)                          [T, V] float32: one sequence, for looking and for tests
    model(forest, scored_m)                    log-probability and entropy of chosen tokens: training; see Forest
    model(forest)                              hidden_nd, the states behind them
    model.run(tokens_n, positions_n, attend)   the same blocks with the caller's attention: prefill and decoding
    Model(config, Split(rank, n, group))       one of n ranks' part of it, for sampling
    model.save_pretrained(path)                config.json and safetensors, which transformers loads

Parameter names are Hugging Face's, so loading is a strict match of names and shapes. Every config field that changes
the mathematics is honoured or refused by name. Norms, rotary angles and softmax are float32 or wider whatever the
weights are.

Letters: N packed tokens, S segments, M scored tokens, D width, H query heads, K key/value heads, C channels of a head,
F width of the MLP, V vocabulary, L layers.
"""

import functools
import json
import math
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from files import whole, write_whole
from folder import check_config, load_weights, n_tokens, read_json, show, split_files, write_tensors
from kernels import add_rms_norm, attention, linear, linear_logp, logits, rms_norm, rope, swiglu, wide
from split import Split

# --------------------------------------------------------------------------------------------------------------- config


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: angles = position * inv_freq; cos and sin are multiplied by `scale` (YaRN only)."""
    inv_freq: tuple[float, ...]
    scale: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int           # V; rows beyond the tokenizer's size are padding
    hidden_size: int          # D
    intermediate_size: int    # F
    num_hidden_layers: int    # L
    num_attention_heads: int  # H
    num_key_value_heads: int  # K; each is read by H / K query heads
    head_dim: int             # C; Qwen3 sets it by itself, so that H C need not be D
    rms_norm_eps: float
    tie_word_embeddings: bool  # the small models' head is the embedding
    qkv_bias: bool  # Qwen2: always; Qwen3: attention_bias
    o_bias: bool    # Qwen2: never; Qwen3: attention_bias
    qk_norm: bool   # Qwen3: RMSNorm over head_dim of q and k, before the rotation
    rope: Rope
    raw: dict = field(repr=False)  # config.json as read, written back by save_pretrained

    @staticmethod
    def from_dict(raw, where="config.json"):
        """Reads a Hugging Face config; ValueError names the field that is missing or that we do not compute."""
        def refuse(why):
            raise ValueError(f"{where}: {why}")
        check_config(raw, refuse)
        heads, hidden_size = raw["num_attention_heads"], raw["hidden_size"]
        kv_heads = raw.get("num_key_value_heads") or heads
        is_qwen3 = raw["model_type"] == "qwen3"
        head_dim = raw.get("head_dim")
        if not head_dim:
            if not is_qwen3 and hidden_size % heads:
                refuse(f"hidden_size {hidden_size} does not divide into {heads} heads, and there is no head_dim")
            head_dim = 128 if is_qwen3 else hidden_size // heads
        if heads % kv_heads or head_dim % 2:
            refuse(f"{heads} heads, {kv_heads} key/value heads, head_dim {head_dim}, hidden_size {hidden_size} do not "
                   "divide")
        bias = bool(raw.get("attention_bias", False))
        return ModelConfig(
            vocab_size=raw["vocab_size"], hidden_size=hidden_size, intermediate_size=raw["intermediate_size"],
            num_hidden_layers=raw["num_hidden_layers"], num_attention_heads=heads, num_key_value_heads=kv_heads,
            head_dim=head_dim, rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)), qkv_bias=not is_qwen3 or bias,
            o_bias=is_qwen3 and bias, qk_norm=is_qwen3, rope=read_rope(raw, head_dim, refuse), raw=raw)


def read_rope(raw, head_dim, refuse):
    """The rotary frequencies that a config asks for, under both spellings of its fields; types default, linear and
    yarn."""
    if "rope_parameters" in raw and raw.get("rope_scaling") is not None:
        refuse("has both rope_parameters and rope_scaling; keep one")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        refuse(f"rope_parameters (or rope_scaling) must be one flat table for all layers, got {rope!r}")
    for key in ("rope_theta", "factor", "original_max_position_embeddings", "max_position_embeddings",
                "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
        for value in (rope.get(key), raw.get(key)):
            if value is not None and (not isinstance(value, (int, float)) or not 0 <= value < 1e30):
                refuse(f"{key} must be a number, zero or more, got {show(value)}")
    if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor") or 1.0) != 1.0:
        refuse("partial_rotary_factor other than 1 is not supported")

    theta = next((x for x in (rope.get("rope_theta"), raw.get("rope_theta")) if x is not None), 10000.0)
    if theta <= 1:
        refuse(f"rope_theta must be above 1, got {theta!r}")
    # channel pair i turns by theta^(-2i/C) radians a token: pair 0 once in 6 tokens, the last of theta = 10^6 (C = 128)
    # once in five million
    inv_freq = [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return Rope(tuple(inv_freq))
    if kind == "linear":
        if not rope.get("factor"):
            refuse("rope type linear needs a factor")
        return Rope(tuple(f / rope["factor"] for f in inv_freq))
    if kind != "yarn":
        refuse(f"rope type {kind!r} is not supported; supported are default, linear and yarn")
    longest = raw.get("max_position_embeddings")
    original = (raw.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
                or longest)
    if not original or not (rope.get("factor") or longest):
        refuse("rope type yarn needs a factor and original_max_position_embeddings or max_position_embeddings")
    return yarn(rope, theta, inv_freq, rope.get("factor") or longest / original, original)


def yarn(rope, theta, inv_freq, factor, original):
    """YaRN (arXiv 2309.00071): channel pairs that turn more than beta_fast times over the original context keep their
    frequency, those that turn less than beta_slow times are slowed by `factor`, with a linear ramp between; cos and sin
    are scaled by 0.1 ln(factor) + 1.
    """
    head_dim = 2 * len(inv_freq)

    def pair_that_turns(times):  # the (fractional) channel pair that turns so often within the original context
        return head_dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))
    low = pair_that_turns(rope.get("beta_fast") or 32)
    high = pair_that_turns(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # the ramp must not divide by zero
    slowed = []
    for i, frequency in enumerate(inv_freq):
        share = min(max((i - low) / (high - low), 0.0), 1.0)
        slowed.append(frequency * (1 - share) + frequency / factor * share)

    def attention_scale(weight):
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0
    scale = rope.get("attention_factor")
    if scale is None:
        scale = attention_scale(1.0)
        if rope.get("mscale") and rope.get("mscale_all_dim"):  # DeepSeek's spelling
            scale = attention_scale(rope["mscale"]) / attention_scale(rope["mscale_all_dim"])
    return Rope(tuple(slowed), scale)


# --------------------------------------------------------------------------------------------------------------- forest


@dataclass(frozen=True)
class Forest:
    """A batch without padding: trees of one prompt and its responses, packed one token after another.

    pack([([1, 2, 3], [[4, 5], [6]]), ([7, 8], [])]) holds

        tokens     1 2 3  4 5  6  7 8        segments  start length parent
        positions  0 1 2  3 4  3  0 1                  0     3      -1       prompt
        previous   . 0 1  2 3  2  . 6                  3     2       0       first response
                                                       5     1       0       second response
                                                       6     2      -1       a sequence on its own

    A token sees its own segment up to itself and its parent whole, so a prompt is computed once for all its responses.
    `previous_n` is the one place that knows where a token's predictor sits: the token before a response's first is its
    prompt's last. Tokens that nothing predicts have -1.
    """
    tokens_n: torch.Tensor     # int64
    positions_n: torch.Tensor  # int64, position in the token's own sequence, prompt included
    previous_n: torch.Tensor   # int64
    segments_s3: torch.Tensor  # int64, on the CPU

    def to(self, device):
        return Forest(self.tokens_n.to(device), self.positions_n.to(device), self.previous_n.to(device),
                      self.segments_s3)


def pack(trees, device="cpu"):
    """trees: a list of (prompt ids, list of response ids), ids being lists or arrays. Returns their Forest; segments
    appear in that order."""
    parts, segments, n_tokens = [np.empty(0, np.int64)], [], 0
    for prompt, responses in trees:
        parent = len(segments)
        for ids in (prompt, *responses):
            segments.append((n_tokens, len(ids), parent if len(segments) > parent else -1))
            parts.append(np.asarray(ids, np.int64))
            n_tokens += len(ids)
    tokens_n = torch.from_numpy(np.concatenate(parts))
    segments_s3 = torch.tensor(segments, dtype=torch.int64).view(-1, 3)
    start_s, length_s, parent_s = segments_s3.unbind(1)
    has_parent_s = parent_s >= 0
    prefix_s = torch.where(has_parent_s, length_s[parent_s], 0)
    # A token's place in memory, less where its segment starts, plus what its sequence has before it
    positions_n = torch.arange(n_tokens) + (prefix_s - start_s).repeat_interleave(length_s)
    # The token before it in memory predicts a token; but a response's first token is predicted by its prompt's last
    # (none, if the prompt is empty), and a sequence's first token by none
    previous_n = torch.arange(-1, n_tokens - 1)
    before_first_s = torch.where(prefix_s > 0, start_s[parent_s] + length_s[parent_s] - 1, -1)
    nonempty_s = length_s > 0
    previous_n[start_s[nonempty_s]] = before_first_s[nonempty_s]
    return Forest(tokens_n, positions_n, previous_n, segments_s3).to(device)


def tokens_seen(segments_s3):
    """How many (token, token that it sees) there are in a forest, itself included: those of its own segment up to
    itself, and its parent's. Segments (0, 3, -1) and (3, 2, 0): 1 + 2 + 3 and 4 + 5."""
    _, length_s, parent_s = segments_s3.unbind(1)
    prefix_s = torch.where(parent_s >= 0, length_s[parent_s], 0)
    return int((length_s * prefix_s + length_s * (length_s + 1) // 2).sum())


def forward_flops(config, n_tokens, n_scored, n_seen=0):
    """Floating-point operations of a forward pass; a backward pass takes twice as many. Counted are a multiplication
    and an addition for each weight of a layer and token, and for each weight of the head and scored token; twice that
    (q k^T, and the weights times v) for each channel of the query heads and token seen."""
    D, C, H, K = config.hidden_size, config.head_dim, config.num_attention_heads, config.num_key_value_heads
    layer = 2 * D * (H + K) * C + 3 * D * config.intermediate_size  # q and o, k and v; gate, up and down
    in_layers = config.num_hidden_layers * (2 * n_tokens * layer + 4 * n_seen * H * C)
    return in_layers + 2 * n_scored * D * config.vocab_size


# ---------------------------------------------------------------------------------------------------------------- model


class Model(nn.Module):
    def __init__(self, config, split=Split()):
        """PyTorch's own initial weights, which are no Qwen's: use from_pretrained or random. config: the whole model's;
        with a split, its part's is kept."""
        super().__init__()
        config = split.config(config)
        self.config, self.split = config, split
        self.n_vocab = config.vocab_size  # rows of the head from here on are padding, see from_pretrained
        self.name = "the model"  # for errors: the folder it comes from
        self.impl = None  # which kernels compute it: see kernels/; "invariant" makes the sampler's bits the trainer's
        self.gradient_checkpointing = False  # recompute blocks in the backward pass: activations of one at a time
        self.model = nn.ModuleDict({  # named as in the checkpoints: model.layers.0.self_attn.q_proj.weight
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Block(config, split) for _ in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
        })
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, forest, scored_m=None, temperature=1.0):
        """Hidden states hidden_nd of a forest; or, given the indices of the tokens to score, logp_m and entropy_m.

        logp_m[j] = log p(tokens[i] | everything that token i sees before itself), i = scored_m[j], at the temperature.
        entropy_m is that distribution's, in nats, without gradient.
        """
        # The sampler passes an `attend` with a cache to the same `run`: so both agree up to rounding
        def attend(layer, q_nhc, k_nkc, v_nkc):
            return attention(q_nhc, k_nkc, v_nkc, forest.segments_s3, self.impl)
        hidden_nd = self.run(forest.tokens_n, forest.positions_n, attend)
        if scored_m is None:
            return hidden_nd
        source_m = forest.previous_n[scored_m]  # the shift by one, for training, reference and evaluation alike
        target_m = forest.tokens_n[scored_m]
        return linear_logp(hidden_nd[source_m], self.head_vd, target_m, temperature, self.impl)

    def run(self, tokens_n, positions_n, attend):
        """Embedding, blocks and final norm; attend(layer, q_nhc, k_nkc, v_nkc) -> out_nhc connects the tokens."""
        x_nd = self.model.embed_tokens(tokens_n)
        # once for all layers, and not rounded to the weights' dtype: bfloat16 has 8 bits for an angle's cosine
        cos_nc, sin_nc = rope_table(self.config.rope, positions_n, wide(x_nd.dtype))
        for i, block in enumerate(self.model.layers):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x_nd = checkpoint(block, x_nd, cos_nc, sin_nc, attend, i, self.impl, use_reentrant=False,
                                  preserve_rng_state=False)  # nothing here is random
            else:
                x_nd = block(x_nd, cos_nc, sin_nc, attend, i, self.impl)
        return self.model.norm(x_nd, self.impl)

    @property
    def head_vd(self):
        # nobody trained the padded rows: softmax would still give them a share, and the sampler could draw one
        head_vd = self.padded_head_vd
        return head_vd if self.n_vocab == len(head_vd) else head_vd[:self.n_vocab]  # a slice's backward pass is a copy

    @property
    def padded_head_vd(self):
        head = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return head.weight

    def fuse(self):
        """For sampling: q, k and v become one matrix product, gate and up another. The weights keep their names, and
        can be copied into, as parts of the whole ones. Last of all: a `to` after it would leave the whole ones behind,
        and training would not reach them."""
        for block in self.model.layers:
            block.self_attn.fuse()
            block.mlp.fuse()
        return self

    @torch.no_grad()
    def logits(self, ids):
        """[T, V] logits of one sequence of ids: float32, or float64 for a float64 model."""
        hidden_td = self(pack([(list(ids), [])], self.head_vd.device))
        return logits(hidden_td, self.head_vd, self.impl)

    @staticmethod
    def random(config, seed=0, device="cpu", dtype=torch.float32):
        """Normal(0, 0.02) matrices, unit norms, zero biases."""
        model = Model(config)
        rng = torch.Generator().manual_seed(seed)
        for name, x in model.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(x)
            elif x.ndim == 2:
                nn.init.normal_(x, std=0.02, generator=rng)
        return model.to(device, dtype)

    @staticmethod
    def from_pretrained(path, device="cpu", dtype=torch.float32, split=Split()):
        """Loads a Hugging Face folder, or this rank's part. Tensor after tensor, so the peak is the model and its
        largest tensor."""
        model, whole = Model.on_meta(path, split), Model.on_meta(path)
        load_weights(model, Path(path), device, dtype, split.part, {n: x.shape for n, x in whole.named_parameters()})
        return model

    @staticmethod
    def on_meta(path, split=Split()):
        """The model of a Hugging Face folder: shapes without memory, to be filled by folder.load_weights."""
        path = Path(path)
        config = ModelConfig.from_dict(read_json(path / "config.json"), path / "config.json")
        with torch.device("meta"):
            model = Model(config, split)
        model.name, model.n_vocab = str(path), n_tokens(path, config.vocab_size)
        return model

    def save_pretrained(self, path):
        """Writes config.json and the weights into `path`, in files of folder.MAX_FILE_BYTES at most."""
        path, weights = Path(path), dict(self.named_parameters())
        path.mkdir(parents=True, exist_ok=True)
        files = split_files({name: x.nbytes for name, x in weights.items()})
        with ExitStack() as stack:  # a disk that is full leaves the folder as it was
            for file, names in files.items():
                temporary = stack.enter_context(whole(path / file))
                write_tensors(temporary, {name: weights[name] for name in names})
            self.save_config(path, next(iter(weights.values())).dtype, files)
        for file in path.glob("model*.safetensors"):  # of a model that was here before
            if file.name not in files:
                file.unlink()

    def save_config(self, path, dtype, files):
        """Writes config.json for weights of this dtype, and the index if several files hold them: {file: [tensors]}."""
        # transformers 5 writes "dtype", older ones "torch_dtype"; both read both
        spelling = "torch_dtype" if "torch_dtype" in self.config.raw else "dtype"
        config = self.config.raw | {spelling: str(dtype).removeprefix("torch.")}
        write_whole(path / "config.json", json.dumps(config, indent=2))
        index = path / "model.safetensors.index.json"
        if len(files) == 1:
            index.unlink(missing_ok=True)
            return
        n_bytes = sum(x.numel() for x in self.parameters()) * dtype.itemsize
        weight_map = {name: file for file, names in files.items() for name in names}
        write_whole(index, json.dumps({"metadata": {"total_size": n_bytes}, "weight_map": weight_map}, indent=2))


class Block(nn.Module):
    def __init__(self, config, split):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, split)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, split)

    def forward(self, x_nd, cos_nc, sin_nc, attend, layer, impl):
        # pre-norm: what a layer computes is added to x, which itself is never normed. The sum and the next norm are one
        # pass over memory
        delta_nd = self.self_attn(self.input_layernorm(x_nd, impl), cos_nc, sin_nc, attend, layer, impl)
        norm = self.post_attention_layernorm
        x_nd, normed_nd = add_rms_norm(x_nd, delta_nd, norm.weight, norm.eps, impl)
        return x_nd + self.mlp(normed_nd, impl)


class Attention(nn.Module):
    def __init__(self, config, split):
        super().__init__()
        D, H, K, C = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.H, self.K, self.C, self.split = H, K, C, split
        # biases on q, k and v are Qwen2's own; Qwen3 norms q and k instead, and has none unless attention_bias is set
        self.q_proj = nn.Linear(D, H * C, bias=config.qkv_bias)
        self.k_proj = nn.Linear(D, K * C, bias=config.qkv_bias)
        self.v_proj = nn.Linear(D, K * C, bias=config.qkv_bias)
        self.o_proj = nn.Linear(H * C, D, bias=config.o_bias)
        self.q_norm = RMSNorm(C, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(C, config.rms_norm_eps) if config.qk_norm else None

        self.fused = None  # weight and bias of q, k and v in one, see fuse

    def fuse(self):
        projections = self.q_proj, self.k_proj, self.v_proj
        bias = _join([p.bias for p in projections]) if self.q_proj.bias is not None else None
        self.fused = _join([p.weight for p in projections]), bias

    def forward(self, x_nd, cos_nc, sin_nc, attend, layer, impl):
        H, K, C = self.H, self.K, self.C
        if self.fused:  # the heads of one product, side by side: they are read where they are
            qkv_nhc = linear(x_nd, *self.fused, impl).view(-1, H + 2 * K, C)
            q_nhc, k_nkc, v_nkc = qkv_nhc[:, :H], qkv_nhc[:, H:H + K], qkv_nhc[:, H + K:]
        else:
            q_nhc = linear(x_nd, self.q_proj.weight, self.q_proj.bias, impl).view(-1, H, C)
            k_nkc = linear(x_nd, self.k_proj.weight, self.k_proj.bias, impl).view(-1, K, C)
            v_nkc = linear(x_nd, self.v_proj.weight, self.v_proj.bias, impl).view(-1, K, C)
        # v is neither normed nor rotated: positions decide what is looked at, not what is read there
        if self.fused and self.q_norm is None:  # all heads turn alike: q's and k's in one
            qk_nhc = rope(qkv_nhc[:, :H + K], cos_nc, sin_nc, impl=impl)
            q_nhc, k_nkc = qk_nhc[:, :H], qk_nhc[:, H:]
        else:
            q_nhc = self.rotated(q_nhc, self.q_norm, cos_nc, sin_nc, impl)
            k_nkc = self.rotated(k_nkc, self.k_norm, cos_nc, sin_nc, impl)
        out_nhc = attend(layer, q_nhc, k_nkc, v_nkc)
        bias_d = self.o_proj.bias if self.split.rank == 0 else None  # of the sum, once
        return self.split.sum(linear(out_nhc.flatten(1), self.o_proj.weight, bias_d, impl))

    def rotated(self, x_nhc, norm, cos_nc, sin_nc, impl):
        """Qwen3 norms each head's channels first; Qwen2 has no such norm."""
        if norm is None:
            return rope(x_nhc, cos_nc, sin_nc, impl=impl)
        return rope(x_nhc, cos_nc, sin_nc, norm.weight, norm.eps, impl)


class MLP(nn.Module):
    def __init__(self, config, split):
        super().__init__()
        self.split = split
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.fused = None  # gate and up in one, see fuse

    def fuse(self):
        self.fused = _join([self.gate_proj.weight, self.up_proj.weight])

    def forward(self, x_nd, impl):
        if self.fused is not None:
            gate_nf, up_nf = linear(x_nd, self.fused, None, impl).chunk(2, 1)
        else:
            gate_nf = linear(x_nd, self.gate_proj.weight, None, impl)
            up_nf = linear(x_nd, self.up_proj.weight, None, impl)
        return self.split.sum(linear(swiglu(gate_nf, up_nf, impl), self.down_proj.weight, None, impl))


def _join(parameters):
    """Their rows in one tensor, of which they become views."""
    whole = torch.cat([x.data for x in parameters])
    for x, part in zip(parameters, whole.split([len(x) for x in parameters])):
        x.data = part
    return whole


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_nd, impl=None):
        return rms_norm(x_nd, self.weight, self.eps, impl)


def rope_table(rope, positions_n, dtype):
    """cos and sin of position * inv_freq, [N, C/2]; angles in float64: a float32 angle is off by 2e-3 at 32k."""
    angle_nc = positions_n[:, None] * _on_device(rope.inv_freq, positions_n.device)
    return (angle_nc.cos() * rope.scale).to(dtype), (angle_nc.sin() * rope.scale).to(dtype)


@functools.lru_cache
def _on_device(values, device):
    """Copied once, not at every decode step."""
    return torch.tensor(values, dtype=torch.float64, device=device)
