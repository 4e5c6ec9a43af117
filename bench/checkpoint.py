"""Checkpoints of this repository against torch.distributed.checkpoint: seconds and memory of saving and loading.

    torchrun --nproc_per_node 2 -m bench.checkpoint --millions 100
    torchrun --nproc_per_node 2 -m bench.checkpoint --millions 100 --only ours   # its memory, undisturbed

A random model of so many parameters in float32, sharded over the ranks, with AdamW's two moments: 12 bytes a parameter.
Each way saves it and loads it into a model and an optimizer of zeros, which must then be equal bit for bit. *wait* is
how long the training loop stands still; *whole*, until the checkpoint is whole; *host*, the peak of memory that a rank
allocates above what it had (RssAnon: mapped pages of files do not count; memory that an earlier turn has left is used
again, so the first turn counts, with --only). Files come from the system's cache.

ours           checkpoint.py, a checksum of every file checked before it is loaded
dcp            torch.distributed.checkpoint, its default writer; its .metadata is a pickle, which is read by unpickling
dcp async      the same in the background
dcp hf         its HuggingFaceStorageWriter, a file a rank, no consolidation: safetensors without pickles
"""

import argparse
import shutil
import threading
import time
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from checkpoint import Checkpoints, check_whole, load_sharded, local, restore
from common import init_ranks, make_optimizers, shard
from files import remove
from model import Model, ModelConfig


class Peak:
    """`with Peak() as peak`: then peak.gb is the most that this process has allocated meanwhile, peak.s the seconds."""

    def __enter__(self):
        self.first = self.most = self.now()
        self.done, self.began = threading.Event(), time.perf_counter()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.s = time.perf_counter() - self.began
        self.done.set()
        self.thread.join()
        self.gb = (self.most - self.first) / 1e6

    def now(self):
        text = Path("/proc/self/status").read_text()
        return int(text.split("RssAnon:")[1].split()[0])  # kB

    def watch(self):
        while not self.done.wait(0.002):
            self.most = max(self.most, self.now())


def config_of(millions):
    """12 layers; their width gives about so many parameters."""
    width = round((millions * 1e6 / 12 / 16) ** 0.5 / 64) * 64
    return ModelConfig.from_dict(dict(
        model_type="qwen2", architectures=["Qwen2ForCausalLM"], vocab_size=8000, hidden_size=width,
        intermediate_size=4 * width, num_hidden_layers=12, num_attention_heads=width // 64, rms_norm_eps=1e-6,
        tie_word_embeddings=True))


def with_moments(model, fill):
    """AdamW for the model, its moments made by fill(weight)."""
    optimizer, = make_optimizers(model, "adamw", 1e-3, (0.9, 0.95), 0.1)
    for weight in model.parameters():
        optimizer.state[weight] = {"step": torch.tensor(3.0), "exp_avg": fill(weight), "exp_avg_sq": fill(weight)}
    return optimizer


def tensors_of(model, optimizer):
    """{name: DTensor} of weights and moments, as torch.distributed.checkpoint takes it."""
    out = {name: x.detach() for name, x in model.named_parameters()}
    for name, x in model.named_parameters():
        out |= {f"{name}/{key}": value for key, value in optimizer.state[x].items()}
    return out


def ours(folder, ranks, model, optimizer):
    checkpoints = Checkpoints(folder, 0, ranks)
    checkpoints.save(1, model, [optimizer], {}, lambda path: None)
    return checkpoints.wait


def dcp_plain(folder, ranks, model, optimizer):
    dcp.save(tensors_of(model, optimizer), checkpoint_id=folder)
    return ranks.barrier


def dcp_async(folder, ranks, model, optimizer):
    return dcp.async_save(tensors_of(model, optimizer), checkpoint_id=folder).result


def dcp_hf(folder, ranks, model, optimizer):
    dcp.save(tensors_of(model, optimizer), storage_writer=HuggingFaceStorageWriter(folder, save_distributed=True))
    return ranks.barrier


def load_ours(folder, ranks):
    check_whole(folder / "step-1", ranks)
    model = load_sharded(folder / "step-1", ranks, torch.float32, torch.float32)
    optimizer, = make_optimizers(model, "adamw", 1e-3, (0.9, 0.95), 0.1)
    restore(folder / "step-1", model, [optimizer])
    return model, optimizer


def load_dcp(folder, ranks, config, reader=None):
    with torch.device("meta"):
        model = Model(config)
    model = shard(model, ranks, torch.float32).to_empty(device=ranks.device)
    optimizer = with_moments(model, torch.empty_like)
    tensors = tensors_of(model, optimizer)
    dcp.load(tensors, checkpoint_id=folder, storage_reader=reader)
    for name, x in model.named_parameters():
        optimizer.state[x]["step"] = tensors[f"{name}/step"]
    return model, optimizer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, default=100, help="parameters of the model")
    parser.add_argument("--folder", default="runs/bench-checkpoint", help="where to write; removed at the end")
    parser.add_argument("--repeat", type=int, default=3, help="times that each way is taken; the first is printed, too")
    parser.add_argument("--only", help="one of the ways")
    args = parser.parse_args()
    ranks, config, home = init_ranks(1), config_of(args.millions), Path(args.folder)
    model = shard(Model.random(config), ranks, torch.float32)
    torch.manual_seed(ranks.rank)
    optimizer = with_moments(model, torch.rand_like)
    gb = sum(x.numel() for x in model.parameters()) * 12 / 1e9
    if ranks.main:
        print(f"{gb:.2f} GB over {ranks.world} ranks\n{'':10} {'wait':>6} {'whole':>6} {'host':>6}   "
              f"{'load':>6} {'host':>6}   (s, s, GB a rank; s, GB)")
    ways = {"ours": (ours, lambda folder: load_ours(folder, ranks)),
            "dcp": (dcp_plain, lambda folder: load_dcp(folder, ranks, config)),
            "dcp async": (dcp_async, lambda folder: load_dcp(folder, ranks, config)),
            "dcp hf": (dcp_hf, lambda folder: load_dcp(folder, ranks, config, HuggingFaceStorageReader(folder)))}
    for name in [name for _ in range(args.repeat) for name in ways if args.only in (None, name)]:
        save, load = ways[name]
        ranks.barrier()
        if ranks.main:
            remove(home)
            home.mkdir(parents=True)
        ranks.barrier()
        with Peak() as saving:
            began = time.perf_counter()
            wait = save(home, ranks, model, optimizer)
            wait_s = time.perf_counter() - began
            wait()
        ranks.barrier()
        with Peak() as loading:
            again = load(home)
        for key, x in tensors_of(model, optimizer).items():
            assert torch.equal(local(x), local(tensors_of(*again)[key])), key
        del again
        if ranks.main:
            print(f"{name:10} {wait_s:6.2f} {saving.s:6.2f} {saving.gb:6.2f}   {loading.s:6.2f} {loading.gb:6.2f}",
                  flush=True)
    ranks.barrier()
    if ranks.main:
        shutil.rmtree(home)


if __name__ == "__main__":
    main()
