"""Stage 1, distillation: supervised fine-tuning on an oracle's judgements (RM-R1, arXiv 2505.02387).

For a batch of chains (prompt x, judgement j):    loss = - sum log p(j_t | x, j_<t) / (judgement tokens of the batch)

Only the judgement's tokens and the end-of-turn token count. Sequences are packed without padding, and the token count
that divides the loss is the whole batch's, over all ranks and micro-batches.

Departures from the paper and its released code:
  1. The assistant header belongs to the prompt and is not trained on (the released code trains on it).
  2. The learning rate follows the paper for every size (the released scripts use the 7B value throughout).
  3. Norm weights and biases are never decayed.
  4. Embedded default only: the blocks' matrices are trained with Muon (--recipe toy); the paper's sizes use AdamW.

The options' defaults are the paper's for 7B. Without --model and --data it trains "the embedded default"
(--recipe toy): a generated task and a tiny model, data/toy.py, all under runs/toy. Then the same with data of one's
own, on one GPU and on four, and a run that was interrupted:

    python distill.py
    python distill.py --model DIR --data chains.jsonl --prompt instruct --out runs/distill
    torchrun --nproc_per_node 4 distill.py --model DIR --data chains.jsonl --prompt instruct --out runs/distill
    torchrun --nproc_per_node 4 distill.py --out runs/distill --resume
"""

import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import load_sharded, restore, save_model
from common import (Tally, flops_utilization, init_ranks, interleave, is_finite, learning_rate, make_optimizers,
                    micro_batches, optimizer_step)
from data import toy
from data.pairs import read_chains, without_equal_answers
from ending import asked_to_stop, together
from files import one_line_errors
from folder import check_context, check_folder
from judge import HeldOut, note_verdicts
from model import Model, ModelConfig, forward_flops, pack, tokens_seen
from options import (check_at_least, check_between, check_choice, check_sampler_ranks, check_training, parse_config,
                     rates_of)
from plan import Work, check_fits
from plan_table import report
from prompt import load_prompt, prompt_path, prompt_to_keep, render
from run import MAX_SKIPPED, NO_MATTER, Run
from sample import Sampler, check_room, filled_copy, make_split
from tokenizer import Tokenizer


@dataclass(frozen=True)
class Config:
    model: str | None = None  # Hugging Face folder to start from
    data: str | None = None  # chains: pairs with a "judgement", or {"messages": [...]} rows
    prompt: str | None = None  # prompt in data/prompts (instruct, reasoning, direct, toy), or a file of your own
    out: str = "runs/distill"  # run folder; the trained model is left in its model/
    answer_only: bool = False  # train on the bare verdict instead of the chain: the baseline without reasoning
    skip_bad: bool = False  # drop unreadable chains and those of two equal answers, and count them
    batch_size: int = 128  # chains per optimizer step, all ranks together
    epochs: int = 1  # passes over the data
    max_steps: int = 0  # stop after so many optimizer steps, 0 = after the epochs
    max_length: int = 12288  # tokens of prompt and judgement; longer chains are dropped and counted
    micro_tokens: int = 12288  # packed tokens that one rank runs through the model at once
    optimizer: str = "adamw"  # adamw, or muon for the blocks' matrices and adamw for the rest
    lr: float = 5e-6  # peak; 7B's
    warmup_frac: float = 0.03  # share of the steps that warm up
    final_lr_frac: float = 0.1  # the cosine ends at this share of lr
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    weight_decay: float = 0.0  # of matrices and embeddings
    max_norm: float = 1.0  # gradient clipping
    dtype: str = "bfloat16"  # of the computation, float32 or bfloat16; master weights and moments are float32
    gradient_checkpointing: bool = True  # recompute blocks in the backward pass: less memory, a third more time
    offload: bool = False  # AdamW's moments, 8 bytes a parameter, stay in the host's memory between optimizer steps
    eval_data: str | None = None  # pairs to judge every eval_every steps
    eval_pairs: int = 200  # how many of them
    eval_every: int = 0  # steps between evaluations; the last step always evaluates; 0 = only then
    eval_tokens: int = 8192  # longest judgement in an evaluation
    n_slots: int = 256  # judgements that one rank writes at once there, as far as their keys and values fit kv_gb
    kv_gb: float = 0.0  # GB of keys and values of what is written at once; 0 = what is free
    eager: bool = False  # on a GPU, write without CUDA graphs: slower, to look for a fault
    sampler_ranks: int = 1  # so many GPUs of a node write together, a part of the model on each: 1, 2, 4 or 8
    n_samples: int = 4  # judgements of an evaluation that samples.jsonl keeps
    save_every: int = 20  # steps between checkpoints, 0 = none
    keep: int = 2  # of the checkpoints, so many of the newest stay; 0 = all
    keep_best: bool = False  # keep the model with the best eval_accuracy in best/, too
    seed: int = 42  # of the data order
    plan: bool = False  # print what the run takes of memory and time, and end; --model needs a config.json only
    gpus: int = 0  # of the plan; 0 = as many as torchrun has started
    gpu_gb: float = 0.0  # memory of each, in 10^9 bytes; 0 = what is free there, in a plan 80
    rates: str = "400 2.5 300 40"  # of the plan's seconds: TFLOP/s, memory TB/s, GB/s of NVLink and of the host link
    threads: int = 0  # CPU threads, 0 = PyTorch's choice
    wandb: str | None = None  # log to this project of Weights & Biases, too (needs the package wandb)
    tensorboard: bool = False  # log for TensorBoard, too (needs the package tensorboard)
    resume: bool = False  # continue the run in --out from its newest checkpoint, with its own options

    def __post_init__(self):
        check_training(self)
        check_sampler_ranks(self)
        check_at_least(self, 2, "max_length")  # a token of the prompt, one of the judgement
        check_at_least(self, 1, "batch_size", "epochs", "eval_tokens", "n_slots")
        check_at_least(self, 0, "max_steps", "kv_gb")
        check_between(self, 0, 1, "warmup_frac")
        check_choice(self, "optimizer", "adamw", "muon")
        if self.offload and self.optimizer != "adamw":
            raise ValueError("--offload keeps AdamW's moments on the host; leave it out, or take --optimizer adamw")


INSTRUCT = {"prompt": "instruct"}
RECIPES = {  # what differs from the defaults
    "qwen2.5-7b": INSTRUCT, "qwen2.5-7b-one-gpu": INSTRUCT | {"offload": True},
    "qwen2.5-14b": INSTRUCT | {"lr": 3e-6, "sampler_ranks": 2},
    "qwen2.5-32b": INSTRUCT | {"lr": 2e-6, "sampler_ranks": 4, "offload": True},  # to fit 8 GPUs of 80 GB
    "toy": dict(model="runs/toy/untrained", data="runs/toy/data/distill.jsonl", prompt="toy", out="runs/toy/distill",
                batch_size=32, max_length=1024, micro_tokens=16384, optimizer="muon", lr=5e-3, warmup_frac=0.08,
                final_lr_frac=0.05, weight_decay=0.1, dtype="float32", gradient_checkpointing=False,
                eval_data="runs/toy/data/heldout.jsonl", eval_tokens=128, save_every=200, seed=0),
}
SCHEDULE = "its learning rates are those of a run of the new length"
MAY_CHANGE = NO_MATTER | {"eval_tokens": "", "n_slots": "", "kv_gb": "", "eager": "", "sampler_ranks": "",
                          "epochs": SCHEDULE, "max_steps": SCHEDULE}  # on --resume, and what then


@dataclass(frozen=True)
class Example:
    """Prompt and judgement as one sequence; tokens from n_prompt on are trained on."""
    ids: np.ndarray  # int32: every rank has all examples
    n_prompt: int

    @property
    def n_scored(self):
        return len(self.ids) - self.n_prompt


def encode_chain(chain, prompt, tokenizer, answer_only):
    """prompt ids (with the assistant header), then the judgement's, then end of turn."""
    text = f"<answer>[[{chain.pair.winner.upper()}]]</answer>" if answer_only else chain.judgement
    prompt_ids = tokenizer.chat(render(prompt, chain.pair))
    ids = prompt_ids + tokenizer.encode_reply(text) + [tokenizer.end_of_turn]
    return Example(np.array(ids, np.int32), len(prompt_ids))


def read_examples(cfg, tokenizer, ranks):
    """The chains of cfg.data as Examples, without those that are too long; and their pairs. Every rank tokenizes its
    share of them."""
    chains = without_equal_answers(read_chains(cfg.data, cfg.skip_bad), cfg.data, cfg.skip_bad, ranks.main)
    if cfg.answer_only and any(chain.pair.winner is None for chain in chains):
        raise ValueError(f"{cfg.data}: --answer-only needs a winner in every row; add it")
    if ranks.main:
        note_verdicts(chains, cfg.data, cfg.answer_only)
    prompt = load_prompt(cfg.prompt) if cfg.prompt else None

    def tokenize():
        mine = chains[ranks.rank::ranks.world]
        with tqdm(mine, "tokenize", leave=False, disable=not ranks.main) as bar:  # closed before an error is printed
            return [encode_chain(chain, prompt, tokenizer, cfg.answer_only) for chain in bar]
    examples = interleave(ranks.agree(tokenize))
    kept = [e for e in examples if len(e.ids) <= cfg.max_length]
    if not kept:
        raise ValueError(f"{cfg.data}: all {len(examples)} chains are longer than --max-length {cfg.max_length}: raise "
                         "it")
    if ranks.main and len(kept) < len(examples):
        print(f"dropped {len(examples) - len(kept)} of {len(examples)} chains longer than {cfg.max_length} tokens")
    return kept, [chain.pair for chain in chains]


def batch_of_step(step, n, batch_size, seed):
    """Indices of a step's examples: (seed, epoch) fixes each epoch's permutation; its last batch may be short."""
    per_epoch = -(-n // batch_size)
    epoch, place = divmod(step, per_epoch)
    return np.random.default_rng((seed, epoch)).permutation(n)[place * batch_size:(place + 1) * batch_size]


def sft_loss(model, examples, device):
    """Sums over the examples' judgement tokens: of -log p, and of the entropy in nats."""
    # Example: prompts of 3 and 2 tokens, judgements of 2 and 1: packed p p p j j | p p j, scored are 3, 4 and 7.
    # The model knows that token 3 is predicted from token 2: nothing is shifted here.
    forest = pack([(e.ids, []) for e in examples], device)
    scored = []
    for start, e in zip(forest.segments_s3[:, 0].tolist(), examples):
        scored += range(start + e.n_prompt, start + len(e.ids))
    logp_m, entropy_m = model(forest, torch.tensor(scored, device=device))
    return -logp_m.sum(), entropy_m.sum()


def make_embedded_default(folder, seed=0):
    """The generated task and the tiny untrained model: folder/data and folder/untrained."""
    toy.write_data(folder / "data", seed)
    n_vocab = toy.write_tokenizer(folder / "untrained")
    Model.random(ModelConfig.from_dict(toy.MODEL | {"vocab_size": n_vocab}), seed).save_pretrained(folder / "untrained")
    shutil.copyfile(prompt_path("toy"), folder / "untrained" / "prompt.txt")


def work_of(cfg):
    """What of the options the plan asks for."""
    prompt_tokens, new_tokens = (max(cfg.max_length - cfg.eval_tokens, 1), cfg.eval_tokens) if cfg.eval_data else (0, 0)
    return Work(micro_tokens=cfg.micro_tokens, longest=cfg.max_length, dtype=getattr(torch, cfg.dtype),
                checkpointing=cfg.gradient_checkpointing, offload=cfg.offload, reference=False,
                sequences=cfg.batch_size, updates=1, group_size=1, prompt_tokens=prompt_tokens, new_tokens=new_tokens,
                n_slots=cfg.n_slots, kv_gb=cfg.kv_gb, sampler_ranks=cfg.sampler_ranks, evaluated=cfg.eval_pairs)


def main(cfg):
    if cfg.plan:
        print(report(cfg.model, work_of(cfg), cfg.gpus, cfg.gpu_gb, rates_of(cfg)))
        return
    ranks = init_ranks(cfg.threads, cfg.sampler_ranks)
    run = Run(cfg, ranks, MAY_CHANGE)
    if ranks.main:
        if cfg.model == RECIPES["toy"]["model"] and not Path(cfg.model, "prompt.txt").exists():  # it is written last
            make_embedded_default(Path(cfg.model).parent)
    ranks.barrier()
    check_folder(cfg.model)
    split = make_split(ranks, cfg.model)
    check_fits(cfg.model, work_of(cfg), ranks, cfg.gpu_gb)
    tokenizer, dtype = Tokenizer(cfg.model), getattr(torch, cfg.dtype)
    examples, pairs = read_examples(cfg, tokenizer, ranks)
    kept_prompt = prompt_to_keep(cfg.prompt, pairs, ranks.main)
    prompt_text = prompt_path(kept_prompt).read_bytes() if kept_prompt else b""  # now: the file may change meanwhile
    n_steps = cfg.epochs * -(-len(examples) // cfg.batch_size)
    n_steps = min(n_steps, cfg.max_steps) if cfg.max_steps else n_steps
    held_out = None
    if cfg.eval_data:
        asked = kept_prompt or cfg.prompt  # as it is trained
        held_out = HeldOut(cfg.eval_data, cfg.eval_pairs, asked and load_prompt(asked), cfg.eval_tokens, tokenizer,
                           ranks)

    model = load_sharded(run.weights(), ranks, torch.float32, dtype)
    model.gradient_checkpointing = cfg.gradient_checkpointing
    check_context(model, [len(e.ids) for e in examples], "chains (see --max-length)", ranks.main)
    if held_out:
        held_out.check(model, pairs)
        check_room(model.config, split, dtype, ranks.device, cfg.kv_gb, held_out.prompts, cfg.eval_tokens)
    optimizers = make_optimizers(model, cfg.optimizer, cfg.lr, (cfg.beta1, cfg.beta2), cfg.weight_decay,
                                 cfg.offload)
    first_step, n_in_a_row = restore(run.checkpoint, model, optimizers) if run.checkpoint else (0, 0)
    probe = pack([(examples[0].ids, [])], ranks.device)
    if not is_finite(model, probe):
        raise ValueError(f"{run.checkpoint or cfg.model}: its log-probabilities are not finite: take other weights")
    run.begin(first_step, n_steps)
    sampler = Sampler(None, cfg.n_slots, cfg.kv_gb, cfg.micro_tokens, graphs=not cfg.eager)

    def add_files(folder):
        tokenizer.save(folder)
        if kept_prompt:
            (folder / "prompt.txt").write_bytes(prompt_text)  # it will be asked as it was trained

    bar = tqdm(range(first_step, n_steps), "answer-only" if cfg.answer_only else "distill", initial=first_step,
               total=n_steps, disable=not ranks.main)
    for step in bar:
        began = time.perf_counter()
        batch = [examples[i] for i in batch_of_step(step, len(examples), cfg.batch_size, cfg.seed)]
        # The one denominator, of all ranks and micro-batches: every token weighs the same wherever it was computed
        n_tokens = sum(e.n_scored for e in batch)
        tally = Tally()
        for shares in micro_batches([len(e.ids) for e in batch], cfg.micro_tokens, ranks.world):
            mine = [batch[i] for i in shares[ranks.rank]]
            # a rank without examples still runs one, at weight zero: the others wait for its share of the collectives
            weight = 1.0 if mine else 0.0
            nll, entropy = sft_loss(model, mine or batch[:1], ranks.device)
            (weight * nll / n_tokens).backward()
            n_mine = sum(e.n_scored for e in mine)
            tally.add("loss", weight * nll, n_mine)
            tally.add("entropy", weight * entropy, n_mine)

        means = tally.means(ranks)
        lr = learning_rate(step, n_steps, cfg.lr, round(cfg.warmup_frac * n_steps), cfg.final_lr_frac)
        norm = optimizer_step(model, optimizers, lr, cfg.max_norm, means["loss"])
        n_in_a_row = 0 if math.isfinite(norm) else n_in_a_row + 1  # skipped

        done, seconds = step + 1, time.perf_counter() - began
        sizes = [len(e.ids) for e in batch]
        n_seen = tokens_seen(torch.tensor([(0, n, -1) for n in sizes]))
        flops = 3 * forward_flops(model.config, sum(sizes), n_tokens, n_seen)  # forward and backward
        row = {"step": done, **means, "lr": lr, "grad_norm": norm, "n_skipped": int(n_in_a_row > 0),
               "n_tokens": n_tokens, "step_s": seconds, "train_tok_s": sum(sizes) / seconds,
               "train_mfu": flops_utilization(flops, seconds, ranks)}
        evaluates = held_out and (done == n_steps or cfg.eval_every and done % cfg.eval_every == 0)
        saves = done == n_steps or cfg.save_every and done % cfg.save_every == 0
        dead = (evaluates or saves) and not is_finite(model, probe)
        if evaluates and not dead:
            sampler.model = filled_copy(model, dtype, split)
            scores, records = held_out.judge(sampler, bar)
            sampler.model = None  # the copy is let go: the training needs its memory
            row |= scores
            for record in records[:cfg.n_samples]:
                run.row("samples.jsonl", {"step": done, **record})
        run.row("metrics.jsonl", row)
        bar.set_postfix(loss=f"{means['loss']:.3f}", tok_s=f"{row['train_tok_s']:.0f}")
        run.checkpoints.check()
        if n_in_a_row == MAX_SKIPPED:
            run.stop(f"loss or gradient were not finite in {n_in_a_row} steps in a row",
                     [{"step": done, "prompt": tokenizer.decode(e.ids[:e.n_prompt], skip_control=False),
                       "judgement": tokenizer.decode(e.ids[e.n_prompt:], skip_control=False)} for e in batch])
        if dead:
            run.stop("its model gives no finite log-probabilities or gradient any more")

        run.keep_if_best(row, model, add_files, dtype)
        if done < n_steps and any(ranks.gather(asked_to_stop())):
            run.leave(done, model, optimizers, {"skipped_in_a_row": n_in_a_row}, add_files)
            return
        if saves and cfg.save_every:
            run.checkpoints.save(done, model, optimizers, {"skipped_in_a_row": n_in_a_row}, add_files)
    run.checkpoints.wait()
    save_model(run.folder / "model", model, ranks, add_files, dtype)
    run.close()


if __name__ == "__main__":
    with one_line_errors(), together(until_saved=True):
        main(parse_config(Config, RECIPES, embedded="toy"))
