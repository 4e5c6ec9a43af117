"""A model and a run on disk, over several ranks: loaded into shards, saved in files that each rank writes its own of.

    model = load_sharded(folder, ranks, dtype, compute_dtype)       each rank reads the rows that are its own
    save_model(folder, model, ranks, add_files, dtype)              a Hugging Face folder; every rank writes its files
    checkpoints.save(step, model, optimizers, state, add_files)     the same and the moments, in the background
    restore(folder, model, optimizers)                              the moments again, on any number of ranks

The ranks write into one folder, so it must lie on a file system that all of them share. What is read is safetensors
and JSON; nothing is unpickled.
"""

import dataclasses
import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from common import MOMENTS, HostAdamW, full, host_memory, local, placed, shard
from files import parse_json, remove
from folder import checksum_of, load_weights, opened, split_files, write_tensors
from model import Model

# -------------------------------------------------------------------------------------------------------------- loading


def load_sharded(folder, ranks, dtype, compute_dtype):
    """A folder's model as common.shard leaves it, filled from slices of its files: no rank ever holds the whole."""
    model = shard(Model.on_meta(folder).to(dtype), ranks, compute_dtype)
    if isinstance(next(model.parameters()), DTensor):
        model.to_empty(device=ranks.device)  # memory for this rank's shards
    named = dict(model.named_parameters())

    def own_part(name, shape):
        first, n = own_rows(named[name])
        return (slice(first, first + n),)
    ranks.agree(lambda: load_weights(model, Path(folder), ranks.device, dtype, own_part))
    return model


def own_rows(x):
    """The first row that this rank holds of a tensor, and how many. FSDP2 splits axis 0; where the ranks do not divide
    it the last ones hold fewer rows, or none."""
    if not isinstance(x, DTensor):
        return 0, x.shape[0]
    chunk, = x.__create_chunk_list__()  # DTensor's own word for it, which torch.distributed.checkpoint asks, too
    return chunk.offsets[0], chunk.sizes[0]


# --------------------------------------------------------------------------------------------------------------- saving


@torch.no_grad()
def own_weights(model, ranks, dtype):
    """The weights' files that this rank writes, {file: {tensor: copy on the host}}, and what all files hold.

    Tensor after tensor is gathered, in the dtype of the file; who writes its file keeps it.
    """
    named = dict(model.named_parameters())
    files = split_files({name: x.numel() * dtype.itemsize for name, x in named.items()})
    own = {}
    for i, (file, names) in enumerate(files.items()):
        for name in names:
            whole = full(named[name].to(dtype))
            if i % ranks.world == ranks.rank:
                own.setdefault(file, {})[name] = whole.to("cpu", copy=True)
    return own, files


def own_moments(model, optimizers, ranks):
    """What this rank holds of the optimizers' state: {weight/slot: copy on the host}, {weight/slot: first row}."""
    name_of = {x: name for name, x in model.named_parameters()}
    moments, first_rows = {}, {}
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()  # HostAdamW's may still be on their way back
    for optimizer in optimizers:
        for weight, slots in optimizer.state.items():
            first, n = own_rows(weight)
            for key, value in slots.items():
                value, name = local(torch.as_tensor(value)), f"{name_of[weight]}/{key}"
                if value.ndim and n:
                    first_rows[name] = str(first)
                if n if value.ndim else ranks.main:  # a count of steps is the same on all
                    moments[name] = value.to("cpu", copy=True)
    return dict(sorted(moments.items())), dict(sorted(first_rows.items()))  # equal runs leave equal files


def write_together(folder, ranks, write_own, finish):
    """A folder that all ranks write. write_own(temporary) writes a rank's files and returns {file: checksum}; then rank
    0 adds the rest by finish(temporary, checksums of all) and gives the folder its name.

    So a folder that has its name is whole. If one rank fails, all raise its error, and what was there before stays.
    """
    folder, temporary, old = Path(folder), Path(f"{folder}.tmp"), Path(f"{folder}.old")

    def begin():
        if ranks.main:
            remove(temporary)  # of a process that was killed
            temporary.mkdir(parents=True)

    def end():
        if not ranks.main:
            return
        for file in checksums:
            if not (temporary / file).exists():
                raise ValueError(f"{temporary / file}: another rank has written it, and rank 0 does not see it: --out "
                                 "must be on a file system that all ranks share")
        finish(temporary, checksums)
        remove(old)
        if folder.exists():  # an older one makes room, and goes only when the new one is there
            os.replace(folder, old)
        os.replace(temporary, folder)
        remove(old)
    try:
        ranks.agree(begin)
        checksums = {}
        for written in ranks.agree(lambda: write_own(temporary)):
            checksums |= written
        ranks.agree(end)
    finally:
        if ranks.main:
            remove(temporary)


def save_model(folder, model, ranks, add_files, dtype=None):
    """Writes an ordinary Hugging Face folder; add_files(folder) puts the tokenizer and the rest beside the weights."""
    dtype = dtype or next(model.parameters()).dtype
    own, files = own_weights(model, ranks, dtype)

    def write_own(temporary):
        return {file: write_tensors(temporary / file, tensors) for file, tensors in own.items()}

    def finish(temporary, checksums):
        model.save_config(temporary, dtype, files)
        add_files(temporary)
    write_together(folder, ranks, write_own, finish)


class Checkpoints:
    """A run's checkpoints/step-N/: everything that it needs to go on. Each is a model folder of the float32 masters,
    optimizer-RANK-of-RANKS.safetensors with the rows of the moments that the rank held, and state.json.

    They are written in the background, one at a time. Until it is written a checkpoint is also in the host's memory:
    12 bytes a parameter, over all ranks. There is no random state to save: data order and rollouts are functions of
    the run's seed and the step.
    """

    def __init__(self, folder, keep, ranks):
        """keep: how many of the newest stay, 0 = all."""
        self.folder, self.keep, self.ranks = Path(folder), keep, ranks
        # the thread's collectives must not meet the loop's: they have a group of their own
        group = dist.new_group(backend="gloo", timeout=timedelta(hours=4)) if ranks.world > 1 else None
        self.thread_ranks = dataclasses.replace(ranks, device=torch.device("cpu"), group=group)
        self.thread, self.saving = ThreadPoolExecutor(1), None

    def save(self, step, model, optimizers, state, add_files):
        """Copies weights and moments, and returns while step-N is written; `state` is a dict for state.json."""
        self.wait()
        weights, files = own_weights(model, self.ranks, torch.float32)
        moments, first_rows = own_moments(model, optimizers, self.ranks)
        moments_file = f"optimizer-{self.ranks.rank + 1:05}-of-{self.ranks.world:05}.safetensors"

        def write_own(temporary):
            checksums = {file: write_tensors(temporary / file, tensors) for file, tensors in weights.items()}
            return checksums | {moments_file: write_tensors(temporary / moments_file, moments, first_rows)}

        def finish(temporary, checksums):
            model.save_config(temporary, torch.float32, files)
            add_files(temporary)
            for file in sorted(temporary.iterdir()):
                if file.name not in checksums:
                    checksums[file.name] = checksum_of(file)
            write_state(temporary, {"step": step, **state, "files": checksums})

        def write():
            write_together(self.folder / f"step-{step}", self.thread_ranks, write_own, finish)
            if self.ranks.main:
                self.remove_old()
        self.saving = self.thread.submit(write)

    def wait(self):
        """Until the last checkpoint is whole; raises what kept it from that."""
        if self.saving:
            saving, self.saving = self.saving, None
            saving.result()

    def check(self):
        """Once a step: if a checkpoint could not be written the run ends, on all ranks, in the same step."""
        failed = self.saving and self.saving.done() and self.saving.exception()
        if self.saving and any(self.ranks.gather(bool(failed))):
            self.wait()

    def remove_old(self):
        """All but the newest few, and what a killed process left. Each loses its name first: half of one is none."""
        found = numbered(self.folder)
        for folder in found[:-self.keep] if self.keep else []:
            os.replace(folder, f"{folder}.old")
        for left in [*self.folder.glob("step-*.old"), *self.folder.glob("step-*.tmp")]:
            remove(left)


# ------------------------------------------------------------------------------------------------------------- resuming


def numbered(folder):
    """The step-N folders of a run's checkpoints, the newest last."""
    found = [path for path in Path(folder).glob("step-*") if path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def write_state(folder, state):
    """state.json, with a checksum of itself: one wrong digit of it would be another step."""
    state = state | {"checksum": zlib.crc32(json.dumps(state).encode())}
    (folder / "state.json").write_text(json.dumps(state))


def read_state(folder):
    """ValueError if state.json is not as it was written."""
    file = folder / "state.json"
    try:
        state = parse_json(file.read_bytes())
    except (OSError, ValueError) as e:
        raise ValueError(f"{file}: is damaged ({e})") from None
    if not isinstance(state, dict) or type(state.get("step")) is not int or state["step"] < 0:
        raise ValueError(f"{file}: is damaged (it has no step)")
    rest = {key: value for key, value in state.items() if key != "checksum"}
    if "files" in state and state.get("checksum") != zlib.crc32(json.dumps(rest).encode()):  # earlier runs have neither
        raise ValueError(f"{file}: is damaged (its checksum is another)")
    return state


def check_whole(folder, ranks):
    """ValueError names a file of a checkpoint that is not as it was written. The ranks share the files."""
    def check():
        checksums = read_state(folder).get("files", {})
        for file in sorted(checksums)[ranks.rank::ranks.world]:
            if not (folder / file).is_file():
                raise ValueError(f"{folder / file}: no such file")
            if checksum_of(folder / file) != checksums[file]:
                raise ValueError(f"{folder / file}: is damaged (its checksum is another than state.json has)")
    ranks.agree(check)


@torch.no_grad()
def restore(folder, model, optimizers):
    """Fills the optimizers from a checkpoint of any number of ranks; returns the steps done, and how many optimizer
    steps in a row had been skipped. load_sharded loads the weights from the same folder.

    ValueError if what is there is of another model or optimizer.
    """
    pieces = {}  # weight/slot -> [(first row, slice of a file)], by rows
    for path in sorted(folder.glob("optimizer*.safetensors")):
        file = opened(path)
        first_rows = file.metadata() or {}
        for name in file.keys():
            pieces.setdefault(name, []).append((int(first_rows.get(name, 0)), file.get_slice(name)))
    wanted = {}  # weight/slot -> its optimizer, the weight, the slot
    named = dict(model.named_parameters())
    name_of = {x: name for name, x in named.items()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for weight in group["params"]:
                for key in MOMENTS[type(optimizer)]:
                    wanted[f"{name_of[weight]}/{key}"] = (optimizer, group, weight, key)
    shapes = {name: [] if key == "step" else list(weight.shape) for name, (_, _, weight, key) in wanted.items()}
    found = {name: joined_shape(parts) for name, parts in pieces.items()}
    wrong = sorted(name for name in shapes | found if shapes.get(name) != found.get(name))
    if found and wrong:  # none at all: no step was made before it
        raise ValueError(f"{folder}: its optimizer's files are not of this model and optimizer, see {wrong[0]}; with "
                         "the folder moved away, --resume takes the checkpoint before")
    for name in found:
        optimizer, group, weight, key = wanted[name]
        slots = optimizer.state[weight]
        if key not in slots:
            if key == "step":
                slots[key] = torch.zeros((), device=weight.device if group["fused"] else "cpu")
            elif isinstance(optimizer, HostAdamW):
                slots[key] = placed(weight, host_memory(local(weight)))
            else:
                slots[key] = torch.zeros_like(weight)
        fill(local(slots[key]), own_rows(weight)[0], pieces[name])
    state = read_state(folder)
    return state["step"], state.get("skipped_in_a_row", 0)


def joined_shape(parts):
    """The shape of a moment whose pieces lie one behind the other, without a gap; else None."""
    parts.sort(key=lambda part: part[0])
    shapes = [piece.get_shape() for _, piece in parts]
    if not shapes[0]:
        return []
    n_rows = 0
    for (first, _), shape in zip(parts, shapes):
        if first != n_rows:
            return None
        n_rows += shape[0]
    return [n_rows, *shapes[0][1:]]


def fill(rows, first, parts):
    """Copies into `rows`, which begin at row `first` of the whole tensor, what the pieces of it hold."""
    if not rows.ndim:
        rows.copy_(parts[0][1][()])
        return
    for part_first, piece in parts:
        start = max(first, part_first)
        end = min(first + len(rows), part_first + piece.get_shape()[0])
        if start < end:
            rows[start - first:end - first] = piece[start - part_first:end - part_first]
