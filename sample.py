"""Prompts in, rollouts out: continuous batching over a cache in pages. On the command line: texts in, completions out.

    python sample.py --model DIR --text "Which is larger, 9.9 or 9.11?"          streams the completion
    python sample.py --model DIR --texts FILE --out FILE --n 4                    JSON lines in, JSON lines out
    Sampler(model).generate([ids, ids], Sampling(n=7, stop=tokenizer.stop_ids))   a list of 7 rollouts for each prompt

The sampler runs the trainer's own model code (Model.run) with a cache for attention, so its log-probabilities are the
trainer's up to rounding. A prompt is computed once for its n rollouts. A rollout's random numbers come from (seed, the
prompt's tokens, sample index, token index) and nothing else: so the same rollout comes out alone or in any batch, up to
rounding (which with --batch-invariant does not depend on the batch either).
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from batch import Batch
from common import full
from draw import Sampling
from files import NotJson, append, one_line_errors, parse_json, refuse_existing, write_records
from folder import check_folder, read_json
from kernels import runs_triton
from model import Model, ModelConfig
from options import check_at_least, check_between, check_choice, parse_config, refuse_ranks
from pages import PAGE_SIZE, affordable
from split import Split
from tokenizer import StreamDecoder, Tokenizer

# ---------------------------------------------------------------------------------------------------------- sampler


class Sampler:
    def __init__(self, model, n_slots=256, kv_gb=0.0, prefill_tokens=16384, page_size=PAGE_SIZE, graphs=True):
        """n_slots rollouts are written at once, as far as their keys and values fit kv_gb (10^9 bytes; 0: what is
        free); prompts are computed in packs of about prefill_tokens. graphs: on a GPU, run steps as CUDA graphs. model
        may come later, and go: see filled_copy."""
        self.model, self.n_slots, self.kv_gb, self.prefill_tokens = model, n_slots, kv_gb, prefill_tokens
        self.page_size, self.graphs, self.announced = page_size, graphs, False
        self.reset_stats()

    def generate(self, prompts, sampling, on_token=None, bar=None):
        """For each prompt (a list of token ids) its rollouts, in order."""
        groups = dict(self.stream(prompts, sampling, on_token, bar))
        return [groups[i] for i in range(len(groups))]

    @torch.inference_mode()
    def stream(self, prompts, sampling, on_token=None, bar=None):
        """Yields (index of the prompt, its n rollouts) as groups finish. on_token(prompt index, sample index, token id)
        is told of every token as it is drawn; bar, a tqdm, shows how it goes.

        Continuous batching: slots that become free are taken by waiting rollouts while the others go on.
        """
        check_prompts(prompts, self.model)
        if not prompts:
            return
        batch = Batch(self.model, prompts, sampling, self.n_slots, self.kv_gb, self.prefill_tokens, self.page_size,
                      self.graphs, on_token)
        if bar is not None and not self.announced:
            bar.write(f"keys and values: room for {batch.pool.n_tokens:,} tokens, {batch.pool.gb:.3g} GB; "
                      f"{batch.n_slots} slots", file=sys.stderr)
            self.announced = True
        shown = 0.0
        while batch.waiting or batch.slots:
            began = time.perf_counter()
            if batch.worth_admitting():
                self.n_prefilled += batch.admit()
                self.prefill_s += time.perf_counter() - began
            else:
                self.n_decoded += batch.step()
                self.decode_s += time.perf_counter() - began
            if bar is not None and began > shown + 0.5:
                bar.set_postfix(self.progress(batch))
                shown = began
            yield from batch.take_finished()
        self.n_put_back += batch.n_put_back

    def reset_stats(self):
        self.prefill_s, self.decode_s = 0.0, 0.0
        self.n_prefilled, self.n_decoded, self.n_put_back = 0, 0, 0

    def stats(self):
        """{prefill_s, decode_s, prefill_tok_s, decode_tok_s} since the last reset_stats."""
        return {"prefill_s": self.prefill_s, "decode_s": self.decode_s,
                "prefill_tok_s": self.n_prefilled / max(self.prefill_s, 1e-9),
                "decode_tok_s": self.n_decoded / max(self.decode_s, 1e-9)}

    def progress(self, batch):
        stats = self.stats()
        n_pages = len(batch.pool.free_x)
        return {"prefill_tok_s": f"{stats['prefill_tok_s']:.0f}", "decode_tok_s": f"{stats['decode_tok_s']:.0f}",
                "writing": len(batch.slots), "waiting": len(batch.waiting),
                "done": len(batch.prompts) * batch.sampling.n - len(batch.slots) - len(batch.waiting),
                "put_back": batch.n_put_back, "cache": f"{1 - batch.pool.n_free / n_pages:.0%}"}


def check_room(config, split, dtype, device, kv_gb, prompts, max_new_tokens):
    """Before hours of work: ValueError if --kv-gb could not hold the longest of these prompts with its rollout."""
    longest = max(map(len, prompts), default=0)
    affordable(split.config(config), split, dtype, device, kv_gb, longest, max_new_tokens, PAGE_SIZE)


def check_prompts(prompts, model):
    """ValueError unless each prompt is a list (or array) of one or more ids that the model has and can read."""
    n_vocab, context = model.n_vocab, model.config.raw.get("max_position_embeddings")
    if not hasattr(prompts, "__len__"):
        raise ValueError(f"prompts is {prompts!r:.40}: give a list of prompts, each the list of its token ids")
    for i, ids in enumerate(prompts):
        array = None if isinstance(ids, str) else np.asarray(ids)
        if array is None or array.ndim != 1 or array.dtype.kind not in "iu" or not len(array):
            raise ValueError(f"prompt {i} is {ids!r:.40}: give a list of prompts, each the list of its token ids, as "
                             "tokenizer.chat(messages) makes it")
        if array.min() < 0 or array.max() >= n_vocab:
            raise ValueError(f"prompt {i} has the token id {array.max() if array.min() >= 0 else array.min()}; the "
                             f"model's ids are 0 to {n_vocab - 1}")
        if context and len(ids) >= context:
            raise ValueError(f"prompt {i} has {len(ids)} tokens; the model can read {context}, its reply included")


def model_impl(batch_invariant, device, dtype):
    """Model.impl as --batch-invariant wants it; ValueError where its kernels cannot run."""
    if batch_invariant and not runs_triton(device, dtype):
        raise ValueError(f"--batch-invariant: its kernels are Triton's, which do not run {str(dtype)[6:]} on {device}; "
                         "use a GPU, or float32 with TRITON_INTERPRET=1 in the environment (slow: for tiny models)")
    return "invariant" if batch_invariant else None


def make_split(ranks, *folders):
    """This rank's Split among those that sample as one (--sampler-ranks). ValueError, before any weights are read, if
    the model in one of the folders does not divide so."""
    n = ranks.together
    for folder in folders:
        file = Path(folder, "config.json")
        Split(0, n).config(ModelConfig.from_dict(read_json(file), file), file)
    return Split(ranks.rank % n, n, dist.new_subgroups(n)[0]) if n > 1 else Split()


@torch.no_grad()
def filled_copy(model, dtype, split=Split()):
    """The policy as a sampler wants it: the model itself if it is whole, else a copy of it, or of this rank's part, in
    memory of its own, which is free again when nobody holds the copy. Called on every rank at once."""
    weights = dict(model.named_parameters())
    if split.n == 1 and not any(isinstance(x, DTensor) for x in weights.values()):
        return model
    with torch.device("meta"):
        copy = Model(model.config, split).to(dtype)  # before it takes memory: in float32 it would be twice as much
    device = next(model.parameters()).device
    copy = copy.to_empty(device=device).requires_grad_(False).fuse()
    copy.n_vocab, copy.impl, copy.name = model.n_vocab, model.impl, model.name
    for name, x in copy.named_parameters():
        whole = full(weights[name].to(dtype))  # cast before it is gathered: half the traffic
        x.copy_(whole[split.part(name, whole.shape)])
    return copy


def load_model(folder, device="auto", dtype="auto", batch_invariant=False, split=Split()):
    """A model to sample from, or this rank's part of it, and its tokenizer. auto: the GPU if there is one; bfloat16
    there, float32 elsewhere."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this PyTorch sees no GPU")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    dtype = getattr(torch, dtype)
    impl = model_impl(batch_invariant, device, dtype)
    check_folder(folder)
    tokenizer = Tokenizer(folder)
    model = Model.from_pretrained(folder, device, dtype, split).requires_grad_(False)
    model.impl = impl
    return model.fuse(), tokenizer


# ------------------------------------------------------------------------------------------------------ command line


@dataclass(frozen=True)
class Config:
    model: str | None = None  # Hugging Face folder
    text: str | None = None  # a user's message to answer ...
    texts: str | None = None  # ... or a file of JSON lines, {"text": ...} or {"messages": [{"role", "content"}, ...]}
    out: str | None = None  # with --texts: the file to write, the same lines with their "completions"
    n: int = 1  # completions of each text
    max_new_tokens: int = 1024  # longest completion
    temperature: float = 1.0  # 0 takes the likeliest token
    top_p: float = 1.0  # sample from the smallest set of likeliest tokens with this probability
    top_k: int = 0  # sample from so many likeliest tokens, 0 = all
    n_slots: int = 64  # completions written at once, as far as their keys and values fit kv_gb
    kv_gb: float = 0.0  # GB of keys and values of what is written at once; 0 = what is free
    eager: bool = False  # on a GPU, write without CUDA graphs: slower, to look for a fault
    seed: int = 0  # of the sampling
    device: str = "auto"  # cpu, cuda, or auto
    dtype: str = "auto"  # float32, bfloat16, or auto: bfloat16 on a GPU
    threads: int = 0  # CPU threads, 0 = PyTorch's choice
    batch_invariant: bool = False  # a completion's bits do not depend on its neighbours; slower, needs a GPU

    def __post_init__(self):
        check_options(self)
        check_model(self)
        check_between(self, 1, 1024, "n")
        if self.n > 1 and self.temperature == 0:
            raise ValueError("--n above 1 needs a --temperature above 0: greedy completions are all the same")
        if (self.text is None) == (self.texts is None) or bool(self.texts) != bool(self.out):
            raise ValueError("give either --text, or --texts FILE and --out FILE")


def check_model(cfg):
    if not cfg.model:
        raise ValueError("--model is missing: a Hugging Face folder, such as the model/ that a run has left")


def check_options(cfg):
    """The options that every script which samples has; ValueError names the one that cannot be."""
    check_at_least(cfg, 1, "max_new_tokens", "n_slots")
    check_at_least(cfg, 0, "top_k", "kv_gb")
    if cfg.temperature != 0:  # 0 takes the likeliest token
        check_between(cfg, 1e-3, 100, "temperature")
    if not 0 < cfg.top_p <= 1:
        raise ValueError(f"--top-p must be above 0 and at most 1, got {cfg.top_p}")
    if cfg.temperature == 0 and (cfg.top_p < 1 or cfg.top_k):
        raise ValueError("--top-p and --top-k draw among the likeliest tokens: they need a --temperature above 0")
    check_between(cfg, 0, 4096, "threads")
    check_between(cfg, 0, 2**63 - 1, "seed")
    check_choice(cfg, "dtype", "auto", "float32", "bfloat16")
    check_choice(cfg, "device", "auto", "cpu", "cuda")


def sampling_of(cfg, n, tokenizer):
    """The Sampling that a script's options describe (this one's Config, judge.py's or evaluate.py's)."""
    return Sampling(n=n, max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature, top_p=cfg.top_p,
                    top_k=cfg.top_k, stop=tokenizer.stop_ids, seed=cfg.seed)


def read_texts(path, tokenizer):
    """(the object, its prompt's ids) of every line of a file of texts."""
    rows = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = parse_json(line)
                messages = row["messages"] if "messages" in row else [{"role": "user", "content": row["text"]}]
                rows.append((row, tokenizer.chat(messages)))
            except NotJson as e:
                raise ValueError(f'{path}:{number}: {e.fault}; each line is an object like {{"text": "..."}}') from None
            except (KeyError, TypeError):
                raise ValueError(f'{path}:{number}: is not {{"text": "..."}} or {{"messages": [...]}}') from None
            except ValueError as e:
                raise ValueError(f"{path}:{number}: {e}") from None
    if not rows:
        raise ValueError(f"{path}: is empty; give a line of JSON for each text")
    return rows


def main(cfg):
    refuse_ranks("sample.py")
    if cfg.out:
        refuse_existing(cfg.out)
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    model, tokenizer = load_model(cfg.model, cfg.device, cfg.dtype, cfg.batch_invariant)
    sampler = Sampler(model, cfg.n_slots, cfg.kv_gb, graphs=not cfg.eager)
    sampling = sampling_of(cfg, cfg.n, tokenizer)
    if cfg.texts:
        complete_file(cfg, sampler, sampling, tokenizer)
        return
    stream = StreamDecoder(tokenizer)

    def show(_, sample, token):  # the first completion is shown as it is written
        if sample == 0:
            print(stream.push(token), end="", flush=True)
    rollouts, = sampler.generate([tokenizer.chat([{"role": "user", "content": cfg.text}])], sampling, show)
    print(stream.flush())
    for rollout in rollouts[1:]:
        print("----", tokenizer.decode(rollout.ids), sep="\n")


def complete_file(cfg, sampler, sampling, tokenizer):
    """--texts FILE --out FILE. In OUT.partial as they are done, and in order when all are."""
    partial = Path(f"{cfg.out}.partial")
    if partial.exists():
        raise ValueError(f"{partial}: is what an interrupted run has finished; move it away, or choose another --out")
    rows = read_texts(cfg.texts, tokenizer)
    done = {}
    try:
        with tqdm(total=len(rows), desc="complete", unit="text") as bar:
            for i, rollouts in sampler.stream([ids for _, ids in rows], sampling, bar=bar):
                done[i] = rows[i][0] | {"completions": [completion(r, tokenizer) for r in rollouts]}
                append(partial, done[i])
                bar.update()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{len(done)} of {len(rows)} texts are done"
                                + (f", and kept in {partial}" if done else "")) from None
    write_records(cfg.out, [done[i] for i in range(len(rows))])
    partial.unlink()
    print(f"{len(rows)} texts, {cfg.n} completions each: {cfg.out}")


def completion(rollout, tokenizer):
    return {"text": tokenizer.decode(rollout.ids), "n_tokens": len(rollout.ids), "finished": rollout.finished,
            "logp": sum(rollout.logps)}


if __name__ == "__main__":
    with one_line_errors():
        main(parse_config(Config))
