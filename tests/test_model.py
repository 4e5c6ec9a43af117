"""Oracles: transformers' Qwen2 and Qwen3 on the same folder, as they are and with their float32 islands lifted to float64;
each sequence of a forest computed alone; hand-worked tables. Wrong folders and configs must end in one line with the name."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import model as model_py
from model import Forest, Model, ModelConfig, copy_tokenizer, pack

torch.set_num_threads(1)

QWEN2 = dict(model_type="qwen2", architectures=["Qwen2ForCausalLM"], vocab_size=97, hidden_size=48, intermediate_size=80,
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
    "yarn of the whole context": QWEN2 | dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1000.0, "factor": 2.0}),
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
    """Weights at which nothing can be dropped unseen: norms far from 1, biases far from 0, attention far from uniform."""
    rng = torch.Generator().manual_seed(seed)
    for name, x in module.named_parameters():
        noise = torch.randn(x.shape, generator=rng)
        x.data.copy_(1 + 0.3 * noise if "norm" in name else noise * (0.5 if x.ndim == 1 else 1.5 / math.sqrt(x.shape[1])))
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


# ------------------------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("case", CASES)
def test_parity_with_transformers(case, folder, lift):
    """Oracle: transformers on the same folder, logits and every parameter's gradient. Float32 against its float32; float64
    against its float64 as it is (1e-6) and with its float32 islands lifted (1e-10)."""
    path = folder(CASES[case])
    ours64, as_it_is = of_ours(path, torch.float64), of_peer(path, torch.float64)
    ours32, peer32 = of_ours(path, torch.float32), of_peer(path, torch.float32)
    lift()
    lifted = of_peer(path, torch.float64)
    for ours, peer, limit in ((ours64, as_it_is, 1e-6), (ours32, peer32, 1e-5), (ours64, lifted, 1e-10)):
        assert ours.keys() == peer.keys()
        errors = {name: error(ours[name], peer[name]) for name in peer}
        assert max(errors.values()) < limit, (limit, max(errors, key=errors.get), max(errors.values()))
        assert ours["logits"].dtype == peer["logits"].dtype
