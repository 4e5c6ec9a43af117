"""checkpoint.py. Oracles: the whole model's weights and moments, kept beside a checkpoint by another way; torch's own
optimizers, continued in memory; the files that lie there afterwards."""

import json
import resource
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
import folder as folder_module
from checkpoint import (Checkpoints, check_whole, load_sharded, local, numbered, own_rows, read_state, restore,
                        save_model)
from common import Ranks, full, make_optimizers
from model import Model, ModelConfig
from ranks import on_ranks
from test_common import train

ALONE = Ranks(0, 1, torch.device("cpu"))
# sizes that neither two nor three ranks divide; with two rows of its key/value biases, one of three ranks holds none
ODD = dict(model_type="qwen3", architectures=["Qwen3ForCausalLM"], vocab_size=41, hidden_size=10, intermediate_size=7,
           num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=2, rms_norm_eps=1e-6,
           tie_word_embeddings=True, attention_bias=True)


def small_model(seed=0):
    """Every parameter random, the norms too."""
    model = Model.random(ModelConfig.from_dict(ODD), seed)
    rng = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for x in model.parameters():
            x += torch.randn(x.shape, generator=rng)
    return model


def optimizers_of(model, name):
    return make_optimizers(model, name, 1e-2, (0.9, 0.95), 0.1)


def save(folder, step, model, optimizers, keep=0, ranks=ALONE, add_files=lambda path: None, state=None):
    checkpoints = Checkpoints(folder, keep, ranks)
    checkpoints.save(step, model, optimizers, state or {}, add_files)
    checkpoints.wait()
    return Path(folder) / f"step-{step}"


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


# ---- one process

@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_checkpoint_continues_bit_for_bit(name, tmp_path):
    """Oracle: the same five steps without a checkpoint between. The copy is of the moment: while it is being written
    the next step is made."""
    whole = small_model()
    optimizers = optimizers_of(whole, name)
    train(whole, optimizers, range(3))
    go_on, checkpoints = threading.Event(), Checkpoints(tmp_path, 0, ALONE)

    def add_files(path):
        assert go_on.wait(10)
        (path / "extra.txt").write_text("x")
    checkpoints.save(3, whole, optimizers, {"skipped_in_a_row": 1}, add_files)
    norms = train(whole, optimizers, range(3, 6))
    assert names(tmp_path) == ["step-3.tmp"]
    go_on.set()
    checkpoints.wait()
    folder = tmp_path / "step-3"
    moments_file = "optimizer-00001-of-00001.safetensors"
    assert names(folder) == ["config.json", "extra.txt", "model.safetensors", moments_file, "state.json"]
    state = json.loads((folder / "state.json").read_text())
    assert state["step"] == 3 and set(state["files"]) == set(names(folder)) - {"state.json"}
    moments = load_file(folder / moments_file)
    for weight, _ in whole.named_parameters():
        keys = {key.rsplit("/", 1)[1] for key in moments if key.rsplit("/", 1)[0] == weight}
        is_muon = name == "muon" and "_proj.weight" in weight
        assert keys == ({"momentum_buffer"} if is_muon else {"exp_avg", "exp_avg_sq", "step"}), weight

    check_whole(folder, ALONE)
    again = load_sharded(folder, ALONE, torch.float32, torch.float32)
    optimizers = optimizers_of(again, name)
    assert restore(folder, again, optimizers) == (3, 1)
    assert train(again, optimizers, range(3, 6)) == norms
    for (weight, x), y in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(x, y), weight


def test_a_checkpoint_before_any_update(tmp_path):
    model = small_model()
    optimizers = optimizers_of(model, "muon")
    assert restore(save(tmp_path, 1, model, optimizers), model, optimizers) == (1, 0)
    assert all(not optimizer.state for optimizer in optimizers)


def test_a_moment_comes_back_to_the_place_that_it_has(tmp_path):
    """As in pinned memory of the host, which an optimizer has made before: filled, not replaced."""
    model = small_model()
    optimizers = optimizers_of(model, "adamw")
    train(model, optimizers, range(2))
    folder = save(tmp_path, 2, model, optimizers)
    again = optimizers_of(model, "adamw")
    weight = model.model.norm.weight
    place = again[0].state[weight]["exp_avg"] = torch.zeros(10)
    restore(folder, model, again)
    assert again[0].state[weight]["exp_avg"] is place and torch.equal(place, optimizers[0].state[weight]["exp_avg"])


def test_a_checkpoint_of_an_earlier_version_goes_on(tmp_path):
    """Whole moments in optimizer.safetensors, and a state.json without checksums."""
    model = small_model()
    optimizers = optimizers_of(model, "adamw")
    train(model, optimizers, range(2))
    folder = save(tmp_path, 2, model, optimizers)
    moments = load_file(folder / "optimizer-00001-of-00001.safetensors")
    (folder / "optimizer-00001-of-00001.safetensors").unlink()
    save_file(moments, folder / "optimizer.safetensors")
    (folder / "state.json").write_text('{"step": 2}')
    check_whole(folder, ALONE)
    again = optimizers_of(model, "adamw")
    assert restore(folder, model, again) == (2, 0)
    for x, slots in optimizers[0].state.items():
        assert all(torch.equal(value, again[0].state[x][key]) for key, value in slots.items())


def test_a_saved_folder_is_whole_or_not_there(tmp_path):
    """A save that dies leaves what was there before; the next one clears its remains."""
    model, folder = small_model(), tmp_path / "step-2"
    save_model(folder, model, ALONE, lambda path: (path / "old.txt").touch())

    def dies(path):
        (path / "junk.txt").touch()
        raise OSError("disk full")
    with pytest.raises(OSError):
        save_model(folder, small_model(1), ALONE, dies)
    assert (folder / "old.txt").exists() and names(tmp_path) == ["step-2"]
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), Model.from_pretrained(folder).parameters()))
    save_model(folder, small_model(1), ALONE, lambda path: None, torch.bfloat16)
    assert names(folder) == ["config.json", "model.safetensors"] and names(tmp_path) == ["step-2"]
    assert {x.dtype for x in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert {x.dtype for x in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("keep, left", [(0, [1, 2, 9, 10]), (1, [10]), (2, [9, 10]), (5, [1, 2, 9, 10])])
def test_the_newest_checkpoints_stay(keep, left, tmp_path):
    """And what killed processes left goes, of this run's checkpoints alone."""
    model = small_model()
    for name in ("step-1", "step-2", "step-9", "step-4.old", "step-5.tmp", "step-9.bad", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").touch()
    save(tmp_path, 10, model, optimizers_of(model, "adamw"), keep)
    assert names(tmp_path) == sorted([*(f"step-{n}" for n in left), "step-9.bad", "other"])
    assert numbered(tmp_path) == [tmp_path / f"step-{n}" for n in left] and numbered(tmp_path / "none") == []


def test_a_removal_that_is_interrupted_leaves_no_checkpoint(tmp_path, monkeypatch):
    """Killed between the first removed file and the last, what is left is none that --resume would take."""
    model = small_model()
    optimizers = optimizers_of(model, "adamw")
    save(tmp_path, 1, model, optimizers)

    def dies(path):
        if path.name == "step-1.old":
            (path / "model.safetensors").unlink()
            raise OSError("killed")
    monkeypatch.setattr(checkpoint, "remove", dies)
    with pytest.raises(OSError, match="killed"):
        save(tmp_path, 2, model, optimizers, keep=1)
    assert numbered(tmp_path) == [tmp_path / "step-2"] and names(tmp_path) == ["step-1.old", "step-2"]
    monkeypatch.undo()
    save(tmp_path, 3, model, optimizers, keep=1)
    assert names(tmp_path) == ["step-3"]


@pytest.fixture
def full_disk():
    """No file may grow beyond 10 kB, as if the disk were full then."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_named_and_costs_nothing_that_is_there(tmp_path, full_disk):
    """In the background: the next check, and the next save, says so; the checkpoint before stays, whole."""
    model = small_model()
    optimizers = optimizers_of(model, "adamw")
    save(tmp_path, 1, model, optimizers, keep=1)  # 7 kB of weights, no moments yet
    train(model, optimizers, range(1))  # 14 kB of moments
    checkpoints = Checkpoints(tmp_path, 1, ALONE)
    checkpoints.save(2, model, optimizers, {}, lambda path: None)
    with pytest.raises(OSError) as e:
        for _ in range(1000):
            checkpoints.check()
            threading.Event().wait(0.01)
    assert e.value.filename == f"{tmp_path}/step-2.tmp/optimizer-00001-of-00001.safetensors" and e.value.strerror
    assert names(tmp_path) == ["step-1"]
    check_whole(tmp_path / "step-1", ALONE)


def test_every_damage_is_named(tmp_path):
    """Oracle: each file in turn, with one bit changed in each of its places (of a large one: of 40), or cut."""
    model = small_model()
    optimizers = optimizers_of(model, "adamw")
    train(model, optimizers, range(1))
    folder = save(tmp_path, 1, model, optimizers, add_files=lambda path: (path / "tokenizer.json").write_text("{}"))
    rng = torch.Generator().manual_seed(0)
    for file in sorted(folder.iterdir()):
        whole = file.read_bytes()
        places = range(len(whole)) if len(whole) <= 40 else torch.randint(len(whole), (40,), generator=rng).tolist()
        flipped = [whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1:] for i in places]
        for content in (*flipped, whole[:-1], whole[:len(whole) // 2], b"", whole + b"\0"):
            file.write_bytes(content)
            with pytest.raises(ValueError, match=f"^{file}: is damaged"):
                check_whole(folder, ALONE)
        file.unlink()
        with pytest.raises(ValueError, match=f"^{file}: (no such file|is damaged)"):
            check_whole(folder, ALONE)
        file.write_bytes(whole)
    check_whole(folder, ALONE)


# ---- several ranks

def state_of(model, optimizers):
    """{name: whole tensor} of all weights and moments."""
    found = {name: full(x.detach()) for name, x in model.named_parameters()}
    for name, x in model.named_parameters():
        for optimizer in optimizers:
            found |= {f"{name}/{key}": full(value) for key, value in optimizer.state.get(x, {}).items()}
    return found


def equal(x, y):
    return x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x)


def load_and_save(ranks, tmp_path, before, oracles):
    """What each rank does: goes on from the checkpoint that `before` ranks have written, and writes it again."""
    folder_module.MAX_FILE_BYTES = 1500  # several files, and more than there are ranks
    for name, oracle in oracles.items():
        old = tmp_path / name / str(before) / "step-3"
        check_whole(old, ranks)
        model = load_sharded(old, ranks, torch.float32, torch.float32)
        optimizers = optimizers_of(model, name)
        assert restore(old, model, optimizers) == (3, 2)
        assert equal(state_of(model, optimizers), oracle)
        for x in model.parameters():
            first, n = own_rows(x)
            assert torch.equal(local(x), full(x.detach())[first:first + n])
        save(tmp_path / name / str(ranks.world), 3, model, optimizers, ranks=ranks, state={"skipped_in_a_row": 2})
    reference = load_sharded(old, ranks, torch.bfloat16, torch.bfloat16).requires_grad_(False)
    assert equal(state_of(reference, []), {name: oracle[name].bfloat16() for name, _ in model.named_parameters()})
    save_model(tmp_path / f"bfloat16-{ranks.world}", model, ranks, lambda path: None, torch.bfloat16)
    if ranks.world == 2:
        one_rank_fails(ranks, tmp_path, old, model, optimizers)


def one_rank_fails(ranks, tmp_path, old, model, optimizers):
    """The disk is full for rank 1 alone; the copy of the head that it reads is another; the file that it checks is
    damaged. Both end."""
    checkpoints, limits = Checkpoints(tmp_path / "full", 0, ranks), resource.getrlimit(resource.RLIMIT_FSIZE)
    if not ranks.main:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    checkpoints.save(4, model, optimizers, {}, lambda path: None)
    with pytest.raises(OSError) as e:
        while True:
            checkpoints.check()
    assert e.value.filename.startswith(f"{tmp_path}/full/step-4.tmp/model-00002-of-")
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    ranks.barrier()
    assert names(tmp_path / "full") == []

    damaged = tmp_path / "damaged"
    if ranks.main:
        shutil.copytree(old, damaged)
        second = sorted(read_state(damaged)["files"])[1]
        (damaged / second).write_bytes(b"")
        tied, folder_module.MAX_FILE_BYTES = tmp_path / "tied", 10**6
        small_model().save_pretrained(tied)
        head = small_model().model.embed_tokens.weight.detach().clone()
        head[-1] += 1  # a row of rank 1
        save_file({"lm_head.weight": head} | load_file(tied / "model.safetensors"), tied / "model.safetensors")
    ranks.barrier()
    with pytest.raises(ValueError, match="/damaged/.*: is damaged"):
        check_whole(damaged, ranks)
    with pytest.raises(ValueError, match="/tied: tie_word_embeddings is true, but lm_head.weight is not"):
        load_sharded(tmp_path / "tied", ranks, torch.float32, torch.float32)


def test_any_number_of_ranks_goes_on_from_any_other(tmp_path):
    """One process saves, two load that and save, three load that and save, one loads both. Oracle: the weights and
    moments of the first process, bit for bit."""
    oracles = {}
    for name in ("adamw", "muon"):
        model = small_model()
        optimizers = optimizers_of(model, name)
        train(model, optimizers, range(3))
        save(tmp_path / name / "1", 3, model, optimizers, state={"skipped_in_a_row": 2})
        oracles[name] = state_of(model, optimizers)
    on_ranks(2, lambda ranks: load_and_save(ranks, tmp_path, 1, oracles))
    on_ranks(3, lambda ranks: load_and_save(ranks, tmp_path, 2, oracles))
    assert not list(tmp_path.rglob("*.tmp"))
    for world in (2, 3):
        for name, oracle in oracles.items():
            folder = tmp_path / name / str(world) / "step-3"
            assert [name for name in names(folder) if name.startswith("optimizer")] == \
                [f"optimizer-{rank:05}-of-{world:05}.safetensors" for rank in range(1, world + 1)]
            assert len(list(folder.glob("model-*.safetensors"))) > world
            model = load_sharded(folder, ALONE, torch.float32, torch.float32)
            optimizers = optimizers_of(model, name)
            restore(folder, model, optimizers)
            assert equal(state_of(model, optimizers), oracle)
    transformers = pytest.importorskip("transformers")
    for world in (2, 3):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"bfloat16-{world}").state_dict()
        for name, x in model.named_parameters():
            assert torch.equal(theirs[name], x.bfloat16()), name
