"""Oracles: transformers' Qwen2 and Qwen3 on the same folder, as they are and with their float32 islands lifted to
float64; each sequence of a forest computed alone; hand-worked tables. Wrong folders and configs must end in one line
with the name."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

import folder as folder_module
import model as model_py
from kernels import linear_logp_ref
from model import Forest, Model, ModelConfig, forward_flops, pack, tokens_seen

QWEN2 = dict(model_type="qwen2", architectures=["Qwen2ForCausalLM"], vocab_size=97, hidden_size=48,
             intermediate_size=80,
             num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_act="silu", rms_norm_eps=1e-5,
             max_position_embeddings=128, tie_word_embeddings=False, use_sliding_window=False, sliding_window=16,
             rope_parameters={"rope_type": "default", "rope_theta": 1000.0})
QWEN3 = QWEN2 | dict(model_type="qwen3", architectures=["Qwen3ForCausalLM"], head_dim=24, attention_bias=False)
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 32}


def yarn(**changes):
    return QWEN2 | {"rope_parameters": YARN | changes}


CASES = {
    "Qwen2": QWEN2,
    "Qwen2 tied": QWEN2 | dict(tie_word_embeddings=True),
    "Qwen2 head_dim": QWEN2 | dict(head_dim=20),
    "Qwen2 GQA 7": QWEN2 | dict(num_attention_heads=14, head_dim=8),
    "Qwen2 GQA 1": QWEN2 | dict(num_key_value_heads=4),
    "Qwen2 eps": QWEN2 | dict(rms_norm_eps=0.1),
    "Qwen3": QWEN3,
    "Qwen3 tied": QWEN3 | dict(tie_word_embeddings=True),
    "Qwen3 attention_bias": QWEN3 | dict(attention_bias=True),
    "Qwen3 GQA 8": QWEN3 | dict(num_attention_heads=8, num_key_value_heads=1),
    "Qwen3 yarn": QWEN3 | dict(rope_parameters=YARN),
    "no theta": {key: value for key, value in QWEN2.items() if key != "rope_parameters"},
    "linear": QWEN2 | dict(rope_parameters={"rope_type": "linear", "rope_theta": 1000.0, "factor": 3.0}),
    "yarn": yarn(),
    "yarn no theta": QWEN2 | dict(rope_parameters={key: value for key, value in YARN.items() if key != "rope_theta"}),
    "yarn of the whole context": QWEN2 | dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1000.0,
                                                               "factor": 2.0}),
    "yarn original outside": yarn() | dict(original_max_position_embeddings=64),
    "yarn factor null": yarn(factor=None),
    "yarn attention_factor": yarn(attention_factor=1.5),
    "yarn mscale": yarn(mscale=1.4, mscale_all_dim=0.6),
    "yarn mscale alone": yarn(mscale=1.4),
    "yarn truncate": yarn(truncate=False),
    "yarn betas": yarn(beta_fast=4, beta_slow=0.5, truncate=False),
    "yarn singular ramp": yarn(beta_fast=2.0, beta_slow=2.0, truncate=False),
}
IDS = torch.randint(97, (90,), generator=torch.Generator().manual_seed(5)).tolist()  # past YaRN's original 32, 64


def randomize(module, seed=0):
    """Weights at which nothing can be dropped unseen: norms far from 1, biases far from 0, attention far from
    uniform."""
    rng = torch.Generator().manual_seed(seed)
    for name, x in module.named_parameters():
        noise = torch.randn(x.shape, generator=rng)
        x.data.copy_(1 + 0.3 * noise if "norm" in name else noise * (0.3 if x.ndim == 1 else 1 / math.sqrt(x.shape[1])))
    return module


def error(x, oracle):
    """Relative Frobenius error."""
    assert x.shape == oracle.shape
    return float((x.double() - oracle.double()).norm() / oracle.double().norm())


class Float64Torch:
    """Stands in for the name `torch` in transformers' modules: what they ask for in float32 they get in float64."""
    float = float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture
def lift(monkeypatch):
    """Lifts transformers' float32 islands (norms, rotary frequencies and tables, eager softmax) to float64."""
    def patch():
        import transformers.modeling_rope_utils
        import transformers.models.qwen2.modeling_qwen2
        import transformers.models.qwen3.modeling_qwen3
        for name in ("modeling_rope_utils", "models.qwen2.modeling_qwen2", "models.qwen3.modeling_qwen3"):
            monkeypatch.setattr(sys.modules["transformers." + name], "torch", Float64Torch())
    return patch


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """folder(config) is a float32 checkpoint of random weights that transformers wrote, under the config.json given."""
    pytest.importorskip("transformers")
    made = {}

    def make(config):
        key = json.dumps(config)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("hf")
            randomize(peer_class(config)(peer_config(config))).save_pretrained(made[key])
            (made[key] / "config.json").write_text(key)
        return made[key]
    return make


def peer_class(config):
    import transformers
    return getattr(transformers, config["architectures"][0])


def peer_config(config):
    return peer_class(config).config_class.from_dict(json.loads(json.dumps(config)))


def load_peer(path, dtype):
    return peer_class(json.loads((path / "config.json").read_text())).from_pretrained(
        path, dtype=dtype, attn_implementation="eager")


def logits_and_gradients(forward, parameters, ids):
    """Logits [T, V] and the gradient of the mean next-token loss in every parameter."""
    logits, nll = forward(ids)
    grads = torch.autograd.grad(nll, list(parameters.values()))
    return {"logits": logits.detach()} | dict(zip(parameters, grads))


def of_peer(path, dtype, ids=IDS):
    peer = load_peer(path, dtype)

    def forward(ids):
        logits = peer(torch.tensor([ids])).logits[0]
        return logits, torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]))
    return logits_and_gradients(forward, dict(peer.named_parameters()), ids)


def of_ours(path, dtype, ids=IDS):
    ours = Model.from_pretrained(path, dtype=dtype)

    def forward(ids):
        return ours.logits(ids), -ours(pack([(ids, [])]), torch.arange(1, len(ids)))[0].mean()
    return logits_and_gradients(forward, dict(ours.named_parameters()), ids)


# --------------------------------------------------------------------------------------------------------------- parity


def whole(gradients):
    """Every parameter's gradient in one vector."""
    return torch.cat([x.flatten() for name, x in sorted(gradients.items()) if name != "logits"])


@pytest.mark.parametrize("case", CASES)
def test_parity_with_transformers(case, folder, lift):
    """Oracle: transformers on the same folder: logits, and gradients of the next-token loss. Float32 against its
    float32 and float64 against its float64 with the islands lifted, per parameter; float64 against it as it is, where
    its own float32 rounding is all of the difference, for the logits and the gradient as one vector."""
    path = folder(CASES[case])
    ours, peer = of_ours(path, torch.float64), of_peer(path, torch.float64)
    assert ours.keys() == peer.keys() and ours["logits"].dtype == torch.float64
    assert error(ours["logits"], peer["logits"]) < 1e-6 and error(whole(ours), whole(peer)) < 1e-6
    assert_close(of_ours(path, torch.float32), of_peer(path, torch.float32), 1e-5)
    lift()
    assert_close(ours, of_peer(path, torch.float64), 1e-10)


def assert_close(ours, peer, limit):
    errors = {name: error(ours[name], peer[name]) for name in peer}
    assert max(errors.values()) < limit, (limit, max(errors, key=errors.get), max(errors.values()))


def old_spelling(config):
    """The same model as files before transformers 5 spell it: rope_theta and rope_scaling {"type"} beside,
    torch_dtype."""
    rope = dict(config["rope_parameters"])
    old = {key: value for key, value in config.items() if key != "rope_parameters"} | {"torch_dtype": "float32"}
    old |= {"rope_theta": rope.pop("rope_theta")} if "rope_theta" in rope else {}
    kind = rope.pop("rope_type")
    return old | {"rope_scaling": None if kind == "default" else {"type": kind} | rope}


@pytest.mark.parametrize("case", ["Qwen2", "Qwen3 tied", "Qwen3 yarn", "linear", "yarn", "yarn no theta",
                                  "yarn mscale"])
def test_old_spelling_is_the_same_model(case, folder, tmp_path):
    """Oracle: the logits under the new spelling, to the last bit; and transformers reads the old file as the same
    model."""
    shutil.copytree(folder(CASES[case]), tmp_path, dirs_exist_ok=True)
    ours = Model.from_pretrained(tmp_path, dtype=torch.float64).logits(IDS)
    old = old_spelling(CASES[case])
    for text in (json.dumps(old), json.dumps(old).replace('"type":', '"rope_type":')):
        (tmp_path / "config.json").write_text(text)
        assert torch.equal(Model.from_pretrained(tmp_path, dtype=torch.float64).logits(IDS), ours)
        assert error(ours, load_peer(tmp_path, torch.float64)(torch.tensor([IDS])).logits[0].detach()) < 1e-6


def test_published_configs():
    """Oracle: Qwen2.5-7B's and Qwen3-8B's shapes as published, and what they leave out: heads of 128, no bias in o, and
    a window that is not in use. Absent key/value heads mean as many as heads."""
    qwen25 = ModelConfig.from_dict(dict(
        model_type="qwen2", architectures=["Qwen2ForCausalLM"], hidden_act="silu", hidden_size=3584,
        intermediate_size=18944,
        max_position_embeddings=32768, max_window_layers=28, num_attention_heads=28, num_hidden_layers=28,
        num_key_value_heads=4, rms_norm_eps=1e-6, rope_theta=1e6, sliding_window=131072, tie_word_embeddings=False,
        torch_dtype="bfloat16",
        use_sliding_window=False, use_mrope=False, attention_dropout=0.0, vocab_size=152064, eos_token_id=151645))
    assert (qwen25.head_dim, qwen25.qkv_bias, qwen25.o_bias, qwen25.qk_norm) == (128, True, False, False)
    assert qwen25.rope.scale == 1 and qwen25.rope.inv_freq[-1] == pytest.approx(1e6 ** (-126 / 128))
    bare = {key: value for key, value in QWEN3.items()
            if key not in ("head_dim", "num_key_value_heads", "rope_parameters")}
    qwen3 = ModelConfig.from_dict(bare)
    assert (qwen3.head_dim, qwen3.num_key_value_heads, qwen3.qkv_bias, qwen3.qk_norm) == (128, 4, False, True)
    assert qwen3.rope.inv_freq[1] == pytest.approx(10000 ** (-2 / 128))


REFUSED = [
    (dict(model_type="llama"), "llama"), (dict(model_type=None), "model_type"),
    (dict(model_type="qwen2_moe"), "qwen2_moe"),
    (dict(architectures=["Qwen2ForSequenceClassification"]), "Qwen2ForSequenceClassification"),
    (dict(use_sliding_window=True, max_window_layers=1), "use_sliding_window"),
    (dict(layer_types=["full_attention", "sliding_attention"]), "layer_types"),
    (dict(layer_types=["full_attention", "chunked_attention"]), "layer_types"),
    (dict(hidden_act="gelu"), "hidden_act"), (dict(attention_dropout=0.1), "attention_dropout"),
    (dict(use_mrope=True), "use_mrope"), (dict(quantization_config={"quant_method": "awq"}), "quantization_config"),
    (dict(rope_parameters={"rope_type": "dynamic", "factor": 2.0}), "dynamic"),
    (dict(rope_parameters={"rope_type": "longrope"}), "longrope"),
    (dict(rope_parameters={"rope_type": "llama3"}), "llama3"),
    (dict(rope_parameters={"type": "ntk"}), "ntk"), (dict(rope_parameters={"rope_type": "linear"}), "factor"),
    (dict(rope_parameters={"full_attention": {"rope_theta": 1e6}}), "rope_parameters"),
    (dict(rope_parameters="yarn"), "rope_parameters"), (dict(rope_parameters={"rope_theta": "1e6"}), "rope_theta"),
    (dict(rope_parameters={"rope_type": "yarn", "factor": "4"}), "factor"),
    (dict(rope_parameters={"rope_type": "yarn"}, max_position_embeddings=None), "max_position_embeddings"),
    (dict(rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling"),
    (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
    (dict(num_key_value_heads=3), "key/value heads"), (dict(num_key_value_heads="2"), "num_key_value_heads"),
    (dict(hidden_size=50), "hidden_size"), (dict(head_dim=7), "head_dim"), (dict(head_dim="8"), "head_dim"),
    (dict(rms_norm_eps="1e-6"), "rms_norm_eps"),
    *[({key: value}, key) for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                      "num_attention_heads") for value in (None, 0, 1.5, True, 10**30)],
    (dict(num_key_value_heads=10**30), "num_key_value_heads"), (dict(num_hidden_layers=10**6), "num_hidden_layers"),
    (dict(rms_norm_eps=math.nan), "rms_norm_eps"), (dict(rms_norm_eps=-1e-6), "rms_norm_eps"),
    (dict(rope_parameters={"rope_theta": math.inf}), "rope_theta"),
    (dict(rope_parameters={"rope_theta": math.nan}), "rope_theta"),
]


@pytest.mark.parametrize("change,name", REFUSED, ids=lambda x: x if isinstance(x, str) else None)
def test_config_refused_by_name(change, name):
    """What we would compute wrongly, or cannot read, ends in one line with the file's and the field's or value's
    name."""
    ModelConfig.from_dict(QWEN2, "here.json")
    with pytest.raises(ValueError) as e:
        ModelConfig.from_dict(QWEN2 | change, "here.json")
    assert name in str(e.value) and str(e.value).startswith("here.json: ") and "\n" not in str(e.value)


def test_windows_that_are_not_in_use_are_accepted():
    """Oracle: transformers' layer_types: only layers from max_window_layers on slide, and only if
    use_sliding_window."""
    for change in (dict(use_sliding_window=True, max_window_layers=2),
                   dict(use_sliding_window=True, sliding_window=None),
                   dict(layer_types=["full_attention"] * 2), dict(layer_types=None), dict(max_window_layers=0)):
        ModelConfig.from_dict(QWEN2 | change)


# --------------------------------------------------------------------------------------------------------------- forest


def small(case="Qwen2", dtype=torch.float64):
    return randomize(Model(ModelConfig.from_dict(CASES[case]))).to(dtype)


def test_pack_docstring_example():
    """Oracle: the drawing in Forest's docstring."""
    forest = pack([([1, 2, 3], [[4, 5], [6]]), ([7, 8], [])])
    assert "pack([([1, 2, 3], [[4, 5], [6]]), ([7, 8], [])])" in Forest.__doc__
    lines = Forest.__doc__.splitlines()
    top = next(i for i, line in enumerate(lines) if "segments  start length parent" in line)
    column = lines[top].index("segments")
    left = [line[:column].split() for line in lines[top:top + 3]]
    right = [line[column:].split() for line in lines[top + 1:top + 5]]
    drawn = {name: [-1 if x == "." else int(x) for x in numbers] for name, *numbers in left}
    assert drawn == {"tokens": forest.tokens_n.tolist(), "positions": forest.positions_n.tolist(),
                     "previous": forest.previous_n.tolist()}
    assert [[int(x) for x in row[:3]] for row in right] == forest.segments_s3.tolist()


def test_pack_of_empty_prompts_and_responses():
    """Oracle: by hand. The first token after an empty prompt has no predictor: it was once given the last token of the
    tree before, and so a log-probability from somebody else's hidden state."""
    forest = pack([([1, 2], [[], [3]]), ([], [[5, 6], [7]]), ([], [])])
    assert forest.tokens_n.tolist() == [1, 2, 3, 5, 6, 7]
    assert forest.positions_n.tolist() == [0, 1, 2, 0, 1, 0]
    assert forest.previous_n.tolist() == [-1, 0, 1, -1, 3, -1]
    assert forest.segments_s3.tolist() == [[0, 2, -1], [2, 0, 0], [2, 1, 0], [3, 0, -1], [3, 2, 3], [5, 1, 3],
                                           [6, 0, -1]]
    empty = pack([])
    assert empty.tokens_n.shape == empty.previous_n.shape == (0,) and empty.segments_s3.shape == (0, 3)


TREES = [(IDS[:37], [IDS[40:49], [], IDS[50:83], IDS[3:4]]), (IDS[5:10], []), (IDS[60:90], [IDS[:8], IDS[20:29]]),
         ([], [IDS[7:12]])]


def weights_of(trees):
    """A fixed weight per (tree, segment, place), so that two orders of the same trees make the same loss."""
    rng = torch.Generator().manual_seed(9)
    return {(t, s, i): float(torch.randn((), generator=rng)) for t, (prompt, responses) in enumerate(trees)
            for s, ids in enumerate([prompt, *responses]) for i in range(len(ids))}


def forest_loss(model, trees, order, temperature):
    """logp and entropy by (tree, segment, place), and the gradients of the weighted sum of logp, from one packed
    forest."""
    forest = pack([trees[t] for t in order])
    keys = [(t, s, i) for t in order for s, ids in enumerate([trees[t][0], *trees[t][1]]) for i in range(len(ids))]
    scored = (forest.previous_n >= 0).nonzero()[:, 0]
    scored = scored[torch.randperm(len(scored), generator=torch.Generator().manual_seed(2))]  # any order will do
    logp, entropy = model(forest, scored, temperature)
    keys = [keys[i] for i in scored.tolist()]
    weight = weights_of(trees)
    grads = torch.autograd.grad(sum(weight[key] * x for key, x in zip(keys, logp)), list(model.parameters()))
    return dict(zip(keys, zip(logp.tolist(), entropy.tolist()))), grads


def alone_loss(model, trees, temperature):
    """The oracle of forest_loss: each prompt + response run on its own, whole logits, log_softmax; prompts scored
    once."""
    values, loss, weight = {}, 0, weights_of(trees)
    for t, (prompt, responses) in enumerate(trees):
        for s, response in [(0, [])] + list(enumerate(responses, 1)):
            logits = model(pack([(prompt + response, [])])) @ model.head_vd.t() / temperature
            for i in range(1, len(prompt)) if s == 0 else range(len(prompt) == 0, len(response)):
                at = i if s == 0 else len(prompt) + i
                row = logits[at - 1].log_softmax(0)
                values[t, s, i] = row[(prompt + response)[at]].item(), -(row.exp() * row).sum().item()
                loss = loss + weight[t, s, i] * row[(prompt + response)[at]]
    return values, torch.autograd.grad(loss, list(model.parameters()))


def assert_same(ours, oracle, limit):
    (values, grads), (oracle_values, oracle_grads) = ours, oracle
    assert values.keys() == oracle_values.keys()
    assert error(torch.tensor([values[key] for key in oracle_values]),
                 torch.tensor(list(oracle_values.values()))) < limit
    assert max(map(error, grads, oracle_grads)) < limit


@pytest.mark.parametrize("case,temperature", [("Qwen2", 1.0), ("Qwen3 tied", 0.7), ("yarn attention_factor", 1.3)])
def test_forest_is_its_sequences_alone(case, temperature):
    """Oracle: every prompt + response computed on its own: logp, entropy, gradients, in two orders of the trees, also
    when blocks are recomputed in the backward pass (which must change no bit)."""
    model = small(case)
    oracle = alone_loss(model, TREES, temperature)
    packed = forest_loss(model, TREES, [0, 1, 2, 3], temperature)
    assert_same(packed, oracle, 1e-12)
    assert_same(forest_loss(model, TREES, [3, 2, 0, 1], temperature), oracle, 1e-12)
    model.gradient_checkpointing = True
    again = forest_loss(model, TREES, [0, 1, 2, 3], temperature)
    assert again[0] == packed[0] and all(map(torch.equal, again[1], packed[1]))


def test_gradient_checkpointing_keeps_less():
    """What it is for: saved activations (the tensors autograd packs, once each) drop to a block's input per block."""
    def saved(model, forest):
        kept = {}

        def keep(x):
            kept[x.untyped_storage().data_ptr()] = x
            return x
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            model(forest)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        return sum(x.untyped_storage().nbytes() for at, x in kept.items() if at not in own)
    model, forest = small(), pack(TREES)
    everything = saved(model, forest)
    model.gradient_checkpointing = True
    assert saved(model, forest) < everything / 4


@pytest.mark.parametrize("case", ["Qwen2", "Qwen2 tied"])
def test_n_vocab_hides_the_rows_past_the_tokenizer(case):
    """Oracle: log_softmax over the first n_vocab logits; the hidden rows get no gradient from the head."""
    model = small(case)
    forest, scored = pack([([1, 2, 3], [[4, 5, 6]])]), torch.arange(1, 6)
    whole_logits = model.logits([1, 2, 3, 4, 5, 6])
    model.n_vocab = 60
    assert torch.equal(model.logits([1, 2, 3, 4, 5, 6]), whole_logits[:, :60])
    logp, entropy = model(forest, scored)
    rows = whole_logits[:5, :60].log_softmax(1)
    assert error(logp.detach(), rows.gather(1, torch.tensor([[2], [3], [4], [5], [6]]))[:, 0]) < 1e-12
    assert error(entropy, -(rows.exp() * rows).sum(1)) < 1e-12
    logp.sum().backward()
    head = model.model.embed_tokens if "tied" in case else model.lm_head
    assert head.weight.grad[:60].any() and not head.weight.grad[60:].any()


@pytest.mark.parametrize("case", ["Qwen2", "Qwen2 GQA 7", "Qwen3", "Qwen3 attention_bias"])
def test_fused_products_are_the_same_model(case):
    """Oracle: the model before fuse, in float64; the kernels, in the interpreter, against PyTorch. A weight that is
    copied into afterwards is the fused one's part."""
    forest = pack([(IDS[:20], [IDS[20:31], IDS[31:36]])])
    model, separate = small(case), small(case)
    model.fuse()
    with torch.no_grad():
        assert error(model(forest), separate(forest)) < 1e-14
        for m in (model, separate):
            m.model.layers[1].self_attn.k_proj.weight.mul_(2)
            m.model.layers[0].mlp.up_proj.weight.mul_(3)
        oracle = separate(forest)
        assert error(model(forest), oracle) < 1e-14
        model.float().fuse().impl = "triton"
        assert error(model(forest), oracle) < 1e-5


def test_bfloat16_stays_near_float64():
    """Oracle: the same weights in float64. Norms, angles and softmax are wide, so the error is that of bfloat16
    products."""
    half = small(dtype=torch.bfloat16)
    logits = half.logits(IDS)
    assert logits.dtype == torch.float32 and half(pack([(IDS, [])])).dtype == torch.bfloat16
    assert error(logits, half.double().logits(IDS)) < 0.03
    norm = small(dtype=torch.bfloat16).model.norm
    x = torch.randn(200, 48, generator=torch.Generator().manual_seed(1)).bfloat16()
    x_wide = x.double()
    # rounded once, and then the weight
    once = (x_wide / (x_wide.square().mean(-1, keepdim=True) + norm.eps).sqrt()).bfloat16()
    assert (norm(x) == norm.weight * once).float().mean() > 0.99


def test_rotary_angles_at_long_positions():
    """Oracle: Python floats. In float32, position * frequency at 100,000 is off by up to 4e-3."""
    rope = ModelConfig.from_dict(QWEN2).rope
    cos_nc, sin_nc = model_py.rope_table(rope, torch.tensor([100_003]), torch.float64)
    assert cos_nc[0].tolist() == pytest.approx([math.cos(100_003 * f) for f in rope.inv_freq], abs=1e-10)
    assert sin_nc[0].tolist() == pytest.approx([math.sin(100_003 * f) for f in rope.inv_freq], abs=1e-10)


# --------------------------------------------------------------------------------------------------------------- folder


def weights_equal(a, b):
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("case", ["Qwen2", "Qwen2 tied", "Qwen3 attention_bias", "yarn mscale"])
def test_transformers_loads_what_we_save(case, tmp_path, lift):
    """Oracle: transformers on our folder: equal weights, equal logits; and we read our own folder back to the last
    bit."""
    pytest.importorskip("transformers")
    model = small(case, torch.float32)
    model.save_pretrained(tmp_path)
    lift()
    peer = load_peer(tmp_path, torch.float64)
    assert weights_equal(model.double(), peer)
    assert error(model.logits(IDS), peer(torch.tensor([IDS])).logits[0].detach()) < 1e-10
    assert weights_equal(Model.from_pretrained(tmp_path, dtype=torch.float64), model)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_save_writes_the_dtype_under_the_files_own_spelling(tmp_path):
    """Oracle: config.json as it was, but for the dtype; the model's tensors."""
    for spelling in ("torch_dtype", "dtype"):
        model = Model.random(ModelConfig.from_dict(QWEN2 | {spelling: "float32", "eos_token_id": [3, 4]}),
                             dtype=torch.bfloat16)
        model.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text()) == model.config.raw | {spelling: "bfloat16"}
        saved, state = load_file(tmp_path / "model.safetensors"), model.state_dict()
        assert saved.keys() == state.keys() and all(torch.equal(saved[name], state[name]) for name in state)
    again = Model.from_pretrained(tmp_path, dtype=torch.bfloat16)
    again.save_pretrained(tmp_path)  # over the very file it was loaded from
    assert weights_equal(again, Model.from_pretrained(tmp_path, dtype=torch.bfloat16))


def test_a_large_model_is_saved_in_several_files_as_transformers_does(folder, tmp_path, monkeypatch):
    """Oracle: the rule by which transformers' save_pretrained splits, in the order of our tensors; its index; and what
    it loads of ours."""
    hub = pytest.importorskip("huggingface_hub")
    peer = load_peer(folder(QWEN2), torch.float32)
    peer.save_pretrained(tmp_path / "theirs", max_shard_size=50_000)
    monkeypatch.setattr(folder_module, "MAX_FILE_BYTES", 50_000)
    model = Model.from_pretrained(folder(QWEN2))
    model.save_pretrained(tmp_path / "ours")
    wanted = hub.split_torch_state_dict_into_shards(dict(model.named_parameters()), max_shard_size=50_000)
    ours = {p.name: list(load_file(p)) for p in (tmp_path / "ours").glob("model*.safetensors")}
    assert len(ours) == 4 and {name: sorted(x) for name, x in ours.items()} == \
        {name: sorted(x) for name, x in wanted.filename_to_tensors.items()}
    ours["model.safetensors.index.json"] = None
    index, theirs = (json.loads((tmp_path / name / "model.safetensors.index.json").read_text())
                     for name in ("ours", "theirs"))
    assert index["weight_map"] == wanted.tensor_to_filename and index.keys() == theirs.keys()
    assert index["metadata"]["total_size"] == theirs["metadata"]["total_size"]
    assert weights_equal(load_peer(tmp_path / "ours", torch.float32), peer)
    monkeypatch.undo()
    model.save_pretrained(tmp_path / "ours")  # in one file, where there were several
    assert {p.name for p in (tmp_path / "ours").iterdir()} == {"config.json", "model.safetensors"}
    monkeypatch.setattr(folder_module, "MAX_FILE_BYTES", 50_000)
    model.save_pretrained(tmp_path / "ours")  # and the other way round
    assert {p.name for p in (tmp_path / "ours").iterdir()} == {"config.json", *ours}
    assert weights_equal(Model.from_pretrained(tmp_path / "ours"), peer)


@pytest.mark.parametrize("disk", [torch.float32, torch.bfloat16, torch.float16])
def test_sharded_and_any_dtype_on_disk(disk, folder, tmp_path):
    """Oracle: the weights of transformers' own model, rounded to the dtype on disk, from one file and from shards."""
    peer = load_peer(folder(CASES["Qwen3"]), disk)
    peer.save_pretrained(tmp_path / "one")
    peer.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 3
    for name in ("one", "many"):
        assert weights_equal(Model.from_pretrained(tmp_path / name), peer.float())


def test_saved_over_a_sharded_folder(folder, tmp_path):
    """A fine-tuned model saved into the folder it came from must not be read back as the old shards (transformers, too,
    reads model.safetensors first)."""
    load_peer(folder(QWEN2), torch.float32).save_pretrained(tmp_path, max_shard_size="20KB")
    model = Model.from_pretrained(tmp_path)
    with torch.no_grad():
        model.model.norm.weight += 1
    model.save_pretrained(tmp_path)
    assert weights_equal(Model.from_pretrained(tmp_path), model)
    assert weights_equal(load_peer(tmp_path, torch.float32), model)


def refusal(path):
    with pytest.raises(ValueError) as e:
        Model.from_pretrained(path)
    assert "\n" not in str(e.value)
    return str(e.value)


NORM, HEAD, EMBED = "model.layers.1.input_layernorm.weight", "lm_head.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize("edit,words", [
    (lambda t: t.pop(NORM), [NORM, "missing"]),
    (lambda t: (t.pop(NORM), t.pop(EMBED)), [EMBED, "1 more", "missing"]),
    (lambda t: t.pop(HEAD), [HEAD, "missing"]),
    (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(2)}),
     ["layers.2.mlp.up_proj.weight", "unexpected"]),
    (lambda t: t.update({"model.layers.0.self_attn.o_proj.bias": torch.ones(48)}), ["o_proj.bias", "unexpected"]),
    (lambda t: t.update({NORM: torch.ones(47)}), [NORM, "47", "48"]),
    (lambda t: t.update({NORM: torch.ones(48, 1)}), [NORM, "(48, 1)"]),
    (lambda t: t.update({NORM: torch.ones(48, dtype=torch.int64)}), [NORM, "I64"]),
])
def test_wrong_tensors_end_with_their_name(edit, words, tmp_path):
    """One line naming file and tensor."""
    model = small(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    state = dict(model.state_dict())
    edit(state)
    save_file(state, tmp_path / "model.safetensors")
    assert all(word in refusal(tmp_path) for word in ["model.safetensors", *words])


def test_wrong_files_end_with_their_name(tmp_path):
    """One line naming the file: not there, truncated, not JSON, not an object, a folder, not a folder."""
    path, weights, config = tmp_path / "m", tmp_path / "m" / "model.safetensors", tmp_path / "m" / "config.json"
    assert str(config) in refusal(path)
    small(dtype=torch.float32).save_pretrained(path)
    whole_file, text = weights.read_bytes(), config.read_text()
    for content in (whole_file[:-1], whole_file[:100], whole_file[:3], b"", b"{}" * 50):
        weights.write_bytes(content)
        assert str(weights) in refusal(path)
    weights.unlink()
    assert str(weights) in refusal(path)
    weights.mkdir()
    assert str(weights) in refusal(path)
    for content in (b"{", b"\xff", b"[]", b"null", b""):
        config.write_bytes(content)
        assert str(config) in refusal(path)
    config.write_text(text)
    assert "config.json" in refusal(config)


@pytest.mark.parametrize("text, said", [
    ('{"model": {"vocab": {"a": 0, "b": 99}}, "added_tokens": []}', "tokenizer.json has 100 tokens, but config.json's"),
    ('{"model": {"vocab": []}, "added_tokens": []}', "tokenizer.json: not a BPE tokenizer"),
    ('{"model": {"vocab": {"a": "b"}}, "added_tokens": []}', "tokenizer.json: not a BPE tokenizer"),
    ("{}", "tokenizer.json: not a BPE tokenizer"), ("[", "tokenizer.json:1: not valid JSON"),
])
def test_a_tokenizer_that_is_none_of_the_models_ends_with_its_name(text, said, tmp_path):
    Model.random(ModelConfig.from_dict(QWEN2)).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        Model.from_pretrained(tmp_path)


def test_wrong_shards_end_with_their_name(folder, tmp_path):
    """A shard that is not there, a tensor in two shards, an index that is none."""
    load_peer(folder(QWEN2), torch.float32).save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    first, second = sorted(tmp_path.glob("model-*.safetensors"))[:2]
    kept = load_file(first)
    first.unlink()
    assert str(first) in refusal(tmp_path)
    copied = next(iter(load_file(second)))
    save_file(kept | {copied: load_file(second)[copied]}, first)
    assert all(word in refusal(tmp_path) for word in (str(second), "second copy", copied))
    for content in ("{", "{}", '{"weight_map": 3}', '{"weight_map": {"x": 3}}'):
        index.write_text(content)
        assert str(index) in refusal(tmp_path)


def test_tied_checkpoint_with_a_copy_of_the_head(tmp_path):
    """Some tied checkpoints carry lm_head.weight too: an equal copy is accepted, a different one is another model."""
    model = small("Qwen2 tied", torch.float32)
    model.save_pretrained(tmp_path)
    state = model.state_dict()
    save_file(state | {HEAD: state[EMBED].clone()}, tmp_path / "model.safetensors")
    assert weights_equal(Model.from_pretrained(tmp_path), model)
    for head in (state[EMBED] + 1, state[EMBED][:-1].clone()):
        save_file(state | {HEAD: head}, tmp_path / "model.safetensors")
        assert HEAD in refusal(tmp_path) and "tie_word_embeddings" in refusal(tmp_path)


MEASURE = """
import sys, threading, torch
from model import Model
torch.set_num_threads(1)
small, path, dtype = sys.argv[1], sys.argv[2], getattr(torch, sys.argv[3])
def megabytes():
    status = dict(line.split(":") for line in open("/proc/self/status"))
    return [int(status[key].split()[0]) / 1024 for key in ("RssAnon", "VmRSS")]
Model.from_pretrained(small, dtype=dtype)  # torch imports 80 MB of Python when it first builds on the meta device
samples, done = [megabytes()], threading.Event()
def sample():
    while not done.wait(0.0005):
        samples.append(megabytes())
thread = threading.Thread(target=sample)
thread.start()
model = Model.from_pretrained(path, dtype=dtype)
total = sum(float(x.sum(dtype=torch.float32)) for x in model.parameters())  # touches every page
done.set(), thread.join()
weights = sum(x.nbytes for x in model.parameters()) / 2**20
print(*(max(column) - column[0] for column in zip(*samples)), weights, len(samples))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_needs_the_memory_once(dtype, tmp_path):
    """A 210 MB bfloat16 folder, loaded in a process of its own, memory sampled. What the process allocates is the model
    and about one tensor; with the mapped file's pages, which the system can drop at any time, it is the model and the
    file."""
    config = QWEN2 | dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                          vocab_size=2000)
    with torch.device("meta"):
        shapes = {name: x.shape for name, x in Model(ModelConfig.from_dict(config)).state_dict().items()}
    small(dtype=torch.float32).save_pretrained(tmp_path / "small")
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = {name: torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(state, tmp_path / "model.safetensors")
    run = subprocess.run([sys.executable, "-c", MEASURE, tmp_path / "small", tmp_path, dtype], capture_output=True,
                         text=True, cwd=Path(model_py.__file__).parent)
    assert run.returncode == 0, run.stderr
    allocated, resident, weights, n_samples = map(float, run.stdout.split())
    assert weights > 195 and n_samples > 20
    assert allocated < 1.15 * weights and resident < (1.15 if dtype == "bfloat16" else 1.65) * weights, run.stdout
    (tmp_path / "model.safetensors").unlink()  # pytest keeps the last folders


# ---- operations

@pytest.mark.parametrize("name", ["Qwen2 head_dim", "Qwen2 tied", "Qwen3 GQA 8"])
def test_flops_are_those_that_pytorch_counts(name, monkeypatch):
    """Oracle: its counter of matrix products, forward and backward, with the head's in one piece, made once. Attention
    is by hand: it computes padding and what a mask hides, too."""
    model = Model.random(ModelConfig.from_dict(CASES[name]))
    forest, scored_m = pack([(IDS[:9], [IDS[9:20], IDS[20:24]])]), torch.arange(9, 24)
    with monkeypatch.context() as m, FlopCounterMode(display=False) as counter:
        m.setattr(model_py, "attention", lambda q_nhc, *rest: q_nhc)
        m.setattr(model_py, "linear_logp", lambda *args: linear_logp_ref(*args[:4]))
        model(forest, scored_m)[0].sum().backward()
    assert counter.get_total_flops() == 3 * forward_flops(model.config, 24, 15) - unused_kv(model, 24)
    seen = [(i, j) for start, n, prefix in ((0, 9, 0), (9, 11, 9), (20, 4, 9)) for i in range(n)
            for j in range(prefix + i + 1)]
    assert tokens_seen(forest.segments_s3) == len(seen)
    config = model.config
    assert forward_flops(config, 24, 15, len(seen)) - forward_flops(config, 24, 15) == \
        4 * len(seen) * config.num_hidden_layers * config.num_attention_heads * config.head_dim


def unused_kv(model, n_tokens):
    """Backward passes of keys and values: without attention they have none."""
    config = model.config
    columns = 2 * config.num_key_value_heads * config.head_dim
    return 2 * 2 * n_tokens * config.hidden_size * columns * config.num_hidden_layers
