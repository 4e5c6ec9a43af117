"""Stage 2, reinforcement learning with a verifiable reward (RM-R1, arXiv 2505.02387) by GRPO (arXiv 2402.03300).

For a pair with label l the policy writes G judgements o_1..o_G and is paid by their verdicts alone:

    (1)  r_g = +1 if verdict(o_g) = l else -1
    (2)  A_g = (r_g - mean(r)) / (std(r) + 1e-6)        over the pair's G judgements, unbiased std
    (3)  ratio_gt = p(o_gt) / p_old(o_gt)               p_old: the policy that wrote the judgement
    (4)  kl_gt = ref/p - log(ref/p) - 1                 the "k3" estimate of KL(policy || distilled model); GRPO eq. 4
    (5)  loss = - sum_gt [ min(ratio A, clip(ratio, 1-e, 1+e) A) - beta kl ] / tokens

The sums in (5) run over all judgement tokens of a mini-batch, over all ranks and micro-batches, and so does `tokens`. A
group's prompt goes through the model once for all the judgements that are packed with it, not G times (model.Forest).

A name's last letters are its axes: reward_pg has P pairs (their prompts) x G judgements of each, logp_m has M scored
tokens, m running through all judgements of a micro-batch. A *step* is P pairs and their rollouts (sampled judgements);
each of its *mini-batches* is one optimizer step; a *micro-batch* is what one rank runs through the model at once.

Departures from the paper and its released code:
  1. p_old is the sampler's own log-probability, since sampler and trainer are one model. They differ by rounding, which
     `mismatch` logs every step: 3e-5 nats at most in float32, up to 0.06 in bfloat16; exactly 0 with --batch-invariant
     (shown in the tests' interpreter so far). Stacks with two engines recompute it.
  2. The loss averages over the tokens of the whole mini-batch; the released code averages per micro-batch and then over
     those, the paper writes a mean per judgement.
  3. A judgement that was cut off earns -1 whatever its last characters spell, and so does one whose verdict stands
     inside a quotation (reward.py has both rules). The end-of-turn token's text does not count among the 80 characters
     that are searched.
  4. Weight decay spares norms and biases.
  5. On the generated task only: groups whose rewards are all equal have no gradient from (2) and are left out of the
     update, with their KL term; their tokens stay in the denominator (--skip-zero-spread). And the learning rate falls
     along a cosine (--final-lr-frac); the paper keeps it constant.

The options' defaults are the paper's for 7B. Without --model and --data it trains "the embedded default"
(--recipe toy): a generated task, data/toy.py, and a tiny model that distill.py trains first if it is not there, all
under runs/toy. Then the same on eight GPUs with data of one's own, and a run that was interrupted:

    python grpo.py
    torchrun --nproc_per_node 8 grpo.py --model DISTILLED --data pairs.jsonl --out runs/grpo
    torchrun --nproc_per_node 8 grpo.py --out runs/grpo --resume
"""

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

from batch import Rollout
from checkpoint import load_sharded, restore, save_model
from common import (Tally, flops_utilization, init_ranks, interleave, is_finite, learning_rate, make_optimizers,
                    micro_batches, optimizer_step)
from data.pairs import Pair, note_one_label, read_pairs, without_equal_answers
from draw import Sampling
from ending import Interrupted, asked_to_stop, leave_if_asked, together
from files import one_line_errors
from folder import check_context, check_folder
from judge import HeldOut
from model import Forest, forward_flops, pack, tokens_seen
from options import (check_at_least, check_between, check_sampler_ranks, check_training, parse_config, rates_of,
                     saved_options)
from plan import Work, check_fits
from plan_table import report
from prompt import load_prompt, prompt_of, prompt_path, prompt_to_keep, render
from reward import reward, training_verdict
from run import MAX_SKIPPED, NO_MATTER, ROUNDING, Run
from sample import Sampler, check_room, filled_copy, make_split, model_impl
from tokenizer import Tokenizer


@dataclass(frozen=True)
class Config:
    model: str | None = None  # Hugging Face folder: the policy's start, and the frozen reference
    data: str | None = None  # labelled pairs, in any format that data/pairs.py reads
    prompt: str | None = None  # name in data/prompts or a file; without it, the prompt that the model was trained with
    out: str = "runs/grpo"  # run folder; the trained model is left in its model/
    skip_bad: bool = False  # drop unreadable pairs and those of two equal answers, and count them
    n_prompts: int = 1024  # pairs per step, all ranks together (P)
    mini_prompts: int = 128  # pairs per optimizer step; n_prompts / mini_prompts updates follow each rollout
    group_size: int = 7  # judgements per pair (G)
    steps: int = 0  # rollout steps; 0 = one pass over the data
    temperature: float = 1.0  # of the rollouts, and of every log-probability
    max_prompt_tokens: int = 4096  # pairs with longer prompts are dropped and counted
    max_new_tokens: int = 8192  # longest judgement
    clip: float = 0.2  # e in (5)
    kl_coef: float = 1e-3  # beta in (5)
    skip_zero_spread: bool = False  # leave groups with equal rewards out of the update (see departure 5)
    lr: float = 1e-6  # AdamW, after the warm-up; 7B's
    warmup_steps: int = 0  # rollout steps of linear warm-up
    final_lr_frac: float = 1.0  # a cosine ends at this share of lr; 1 = constant
    beta1: float = 0.9  # AdamW
    beta2: float = 0.999  # AdamW
    weight_decay: float = 0.01  # of matrices and embeddings
    max_norm: float = 1.0  # gradient clipping
    dtype: str = "bfloat16"  # of the computation, float32 or bfloat16; master weights and moments are float32
    gradient_checkpointing: bool = True  # recompute blocks in the backward pass: less memory, a third more time
    offload: bool = False  # AdamW's moments, 8 bytes a parameter, wait on the host; on one GPU so does the reference
    batch_invariant: bool = False  # one order for every sum: mismatch becomes exactly 0; slower, needs a GPU
    micro_tokens: int = 12288  # packed tokens that one rank runs through the model at once
    n_slots: int = 256  # judgements that one rank writes at once, as far as their keys and values fit kv_gb
    kv_gb: float = 0.0  # GB of keys and values of what is written at once; 0 = what is free
    eager: bool = False  # on a GPU, write without CUDA graphs: slower, to look for a fault
    sampler_ranks: int = 1  # so many GPUs of a node write together, a part of the model on each: 1, 2, 4 or 8
    eval_data: str | None = None  # pairs to judge every eval_every steps
    eval_pairs: int = 200  # how many of them
    eval_every: int = 10  # steps between evaluations; the last step always evaluates; 0 = only then
    save_every: int = 10  # steps between checkpoints, 0 = none
    keep: int = 2  # of the checkpoints, so many of the newest stay; 0 = all
    keep_best: bool = False  # keep the model with the best eval_accuracy in best/, too
    n_samples: int = 2  # rollouts decoded into samples.jsonl each step
    seed: int = 1  # of the data order and the rollouts
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
        check_sampler_ranks(self, self.batch_invariant)
        check_between(self, 1e-3, 100, "temperature")
        check_between(self, 2, 1024, "group_size")  # a judgement is measured against its siblings
        check_at_least(self, 1, "n_prompts", "mini_prompts", "max_new_tokens", "max_prompt_tokens", "n_slots")
        check_at_least(self, 0, "steps", "clip", "kl_coef", "warmup_steps", "kv_gb")
        if self.n_prompts % self.mini_prompts:
            raise ValueError(f"--n-prompts {self.n_prompts} must be a multiple of --mini-prompts {self.mini_prompts}")


THINKER = {"prompt": "reasoning"}
OF_14B, OF_32B = {"sampler_ranks": 2}, {"sampler_ranks": 4, "offload": True}  # to fit 8 GPUs of 80 GB: docs/memory.md
RECIPES = {  # what differs from the defaults
    "qwen2.5-7b": {}, "deepseek-distill-7b": THINKER, "qwen2.5-7b-one-gpu": {"offload": True},
    "qwen2.5-14b": OF_14B | {"lr": 7e-7}, "deepseek-distill-14b": THINKER | OF_14B,
    "qwen2.5-32b": OF_32B | {"lr": 5e-7}, "deepseek-distill-32b": THINKER | OF_32B | {"lr": 8e-7},
    "toy": dict(model="runs/toy/distill/model", data="runs/toy/data/rl.jsonl", out="runs/toy/grpo", n_prompts=64,
                mini_prompts=32, steps=22, max_prompt_tokens=1024, max_new_tokens=64, skip_zero_spread=True, lr=3e-4,
                warmup_steps=1, final_lr_frac=0.05, beta2=0.99, weight_decay=0.0, dtype="float32",
                gradient_checkpointing=False, micro_tokens=16384, n_slots=448,
                eval_data="runs/toy/data/heldout.jsonl", save_every=20, seed=0),
}
MAY_CHANGE = NO_MATTER | {  # on --resume, and what then
    "steps": "with a --final-lr-frac below 1, its learning rates are those of a run of the new length",
    **dict.fromkeys(("n_slots", "kv_gb", "eager", "sampler_ranks"), f"without --batch-invariant {ROUNDING}"),
}


@dataclass(frozen=True)
class Group:
    """A pair's prompt, its G rollouts, and what they earned. Every rank has all of a step's: so ids are int32 arrays,
    logps float32, 8 bytes a token in place of 68, and texts are not kept."""
    pair: Pair
    prompt_ids: np.ndarray
    rollouts: list[Rollout]
    verdicts: list[str | None]  # "a" or "b"
    reward_g: torch.Tensor
    advantage_g: torch.Tensor

    @property
    def has_spread(self):
        return bool(self.reward_g.max() > self.reward_g.min())


def advantages(reward_pg):
    """(2): (r - mean) / (unbiased std + 1e-6) in each row; a row of equal rewards gets zeros.

    A judgement is measured against its siblings, not against a learned value: of 7 judgements with 2 right, the mean is
    -0.43 and the std 0.98, so the right ones get +1.46 and the wrong ones -0.59. The rarer success is worth more.
    """
    mean_p1 = reward_pg.mean(1, keepdim=True)
    std_p1 = reward_pg.std(1, keepdim=True)
    return (reward_pg - mean_p1) / (std_p1 + 1e-6)


def token_losses(logp_m, old_logp_m, ref_logp_m, advantage_m, clip, kl_coef):
    """(3) to (5) for each token: loss_m, kl_m, and clipped_m: 1 where the clip took the gradient away."""
    # 1 in the first update after a rollout; then the policy moves away from the one that wrote the tokens
    ratio_m = (logp_m - old_logp_m).exp()
    clipped_ratio_m = ratio_m.clamp(1 - clip, 1 + clip)
    # The minimum is the pessimist's. With e = 0.2 and A > 0 a ratio above 1.2 earns no more and has no gradient, but
    # one below 0.8 still pulls back up; with A < 0 the other way round.
    surrogate_m = torch.minimum(ratio_m * advantage_m, clipped_ratio_m * advantage_m)
    clipped_m = (clipped_ratio_m * advantage_m < ratio_m * advantage_m).to(logp_m.dtype)
    # k3: never negative, and its mean over the policy's own tokens is KL(policy || reference), in value. For
    # log(ref/p) = -0.1 it is e^-0.1 + 0.1 - 1 = 0.0048, where the plain difference 0.1 would be noise of either sign.
    # (Its gradient, 1 - ref/p times that of log p, is another matter: in the mean that of KL(reference || policy).)
    log_ref_ratio_m = ref_logp_m - logp_m
    kl_m = log_ref_ratio_m.exp() - log_ref_ratio_m - 1
    return kl_coef * kl_m - surrogate_m, kl_m, clipped_m


def read_prompts(cfg, tokenizer, prompt, ranks):
    """The labelled pairs of cfg.data whose prompts are short enough, and {pair id: prompt ids}. Every rank tokenizes
    its share of them."""
    read = read_pairs(cfg.data, skip_bad=cfg.skip_bad)
    labelled = [pair for pair in read if pair.winner is not None]
    labelled = without_equal_answers(labelled, cfg.data, cfg.skip_bad, ranks.main)

    def tokenize():
        mine = labelled[ranks.rank::ranks.world]
        with tqdm(mine, "tokenize", leave=False, disable=not ranks.main) as bar:  # closed before an error is printed
            return [np.array(tokenizer.chat(render(prompt, pair)), np.int32) for pair in bar]
    prompts = {pair.id: ids for pair, ids in zip(labelled, interleave(ranks.agree(tokenize)))}
    pairs = [pair for pair in labelled if len(prompts[pair.id]) <= cfg.max_prompt_tokens]
    if ranks.main and len(pairs) < len(labelled):
        print(f"dropped {len(labelled) - len(pairs)} of {len(labelled)} pairs with over {cfg.max_prompt_tokens} "
              "prompt tokens")
    if len(pairs) < cfg.n_prompts:
        raise ValueError(f"{cfg.data}: {len(pairs)} usable pairs are fewer than --n-prompts {cfg.n_prompts}: of "
                         f"{len(read)}, {len(labelled)} have a winner, {len(pairs)} of them a prompt within "
                         "--max-prompt-tokens; give more pairs, or a smaller --n-prompts")
    if ranks.main:
        note_one_label([pair.winner for pair in pairs], cfg.data)
    return pairs, prompts


def steps_pairs(pairs, step, n_prompts, seed):
    """The pairs of a step: (seed, pass) fixes the order of a pass over the data; its last partial batch is dropped."""
    per_pass = len(pairs) // n_prompts
    data_pass, place = divmod(step, per_pass)
    order = np.random.default_rng((seed, data_pass)).permutation(len(pairs))
    return [pairs[i] for i in order[place * n_prompts:(place + 1) * n_prompts]]


def rollout(cfg, sampler, tokenizer, pairs, prompts, step, ranks, bar=None):
    """The step's groups in the pairs' order. Every rank samples its share of the pairs, reads what it has written and
    pays for it; all get all groups. None if a rank was asked to stop meanwhile."""
    # the seed counts the steps: a pair that comes again in a later pass must not get the same random numbers
    sampling = Sampling(cfg.group_size, cfg.max_new_tokens, cfg.temperature, stop=tokenizer.stop_ids,
                        seed=1_000_003 * cfg.seed + step)
    mine = ranks.share(pairs)
    # ranks that sample as one wait for each other in every step: none may leave alone
    look = leave_if_asked if ranks.together == 1 else None
    try:
        written = sampler.generate([prompts[pair.id].tolist() for pair in mine], sampling, look, bar)
    except Interrupted:
        written = []
    if any(ranks.gather(asked_to_stop())):
        return None
    share = []
    for pair, rollouts in zip(mine, written):
        texts = [tokenizer.decode(r.ids) for r in rollouts]
        verdicts = [training_verdict(text) for text in texts]
        rewards = [reward(text, pair.winner, r.finished) for text, r in zip(texts, rollouts)]
        arrays = [replace(r, ids=np.array(r.ids, np.int32), logps=np.array(r.logps, np.float32)) for r in rollouts]
        share.append((arrays, verdicts, rewards))

    rollouts, verdicts, rewards = zip(*interleave(ranks.gather_shares(share)))
    reward_pg = torch.tensor(rewards)
    advantage_pg = advantages(reward_pg)
    return [Group(pair, prompts[pair.id], rollouts[i], verdicts[i], reward_pg[i], advantage_pg[i])
            for i, pair in enumerate(pairs)]


def trees(groups, max_tokens):
    """Cuts groups into trees of at most max_tokens: (group, the indices of the rollouts in it).

    A tree is a prompt and the rollouts packed with it: the whole group, or, if that is too long, a part of it with the
    prompt again. A rollout that is too long by itself is a tree all the same.
    """
    out = []
    for group in groups:
        part, room = [], max_tokens - len(group.prompt_ids)
        for g, r in enumerate(group.rollouts):
            if part and len(r.ids) > room:
                out.append((group, part))
                part, room = [], max_tokens - len(group.prompt_ids)
            part.append(g)
            room -= len(r.ids)
        out.append((group, part))
    return out


def n_tree_tokens(tree):
    group, part = tree
    return len(group.prompt_ids) + sum(len(group.rollouts[g].ids) for g in part)


@dataclass
class Micro:
    """A micro-batch: one rank's trees as a forest, and of each of its M scored tokens, all on the CPU, what the loss
    needs. A rank that has no trees left computes one all the same, at weight 0: the others wait for its share of the
    collectives."""
    forest: Forest
    scored_m: torch.Tensor     # where the rollouts' tokens are; the prompts' have no loss
    old_logp_m: torch.Tensor
    advantage_m: torch.Tensor  # a rollout's, for all its tokens
    weight: float
    ref_logp_m: torch.Tensor | None = None  # the reference's, see score


@dataclass(frozen=True)
class MiniBatch:
    """The pairs of one optimizer step: this rank's micro-batches, and numbers that are the same on all ranks."""
    micros: list[Micro]
    n_tokens: int  # of all its rollouts: the loss's denominator
    n_packed: int  # that go through the model, prompts included


def make_micro(trees, weight):
    """trees: one rank's, as `trees` cuts them."""
    # a prompt's segment, then its responses'; only the responses' tokens are scored
    forest = pack([(group.prompt_ids, [group.rollouts[g].ids for g in part]) for group, part in trees])
    responses = [(start, length) for start, length, parent in forest.segments_s3.tolist() if parent >= 0]
    scored_m = torch.cat([torch.arange(start, start + length) for start, length in responses])
    old_logps, advantage_parts = [], []  # in the same order: tree by tree, rollout by rollout
    for group, part in trees:
        for g in part:
            old_logps.append(torch.from_numpy(group.rollouts[g].logps))
            advantage_parts.append(group.advantage_g[g].expand(len(group.rollouts[g].ids)))
    return Micro(forest, scored_m, torch.cat(old_logps), torch.cat(advantage_parts), weight)


def make_mini_batch(cfg, ranks, groups):
    # The one denominator: of all ranks and micro-batches, skipped groups too. Divided per micro-batch instead, a token
    # of a micro-batch with 100 tokens would weigh ten times as much as one of a micro-batch with 1,000.
    n_tokens = sum(len(r.ids) for group in groups for r in group.rollouts)
    trained = [group for group in groups if group.has_spread or not cfg.skip_zero_spread]
    items = trees(trained, cfg.micro_tokens)
    sizes = [n_tree_tokens(item) for item in items]
    micros = []
    for shares in micro_batches(sizes, cfg.micro_tokens, ranks.world):
        mine = [items[i] for i in shares[ranks.rank]]
        micros.append(make_micro(mine or items[:1], 1.0 if mine else 0.0))
    return MiniBatch(micros, n_tokens, sum(sizes))


def training_flops(config, micros):
    """Floating-point operations of these micro-batches' forward and backward passes; what is computed a second time, or
    at weight 0, does not count."""
    return sum(micro.weight * 3 * forward_flops(config, len(micro.forest.tokens_n), len(micro.scored_m),
                                                tokens_seen(micro.forest.segments_s3)) for micro in micros)


def score(reference, mini_batches, temperature, device):
    """Fills in what the frozen reference thinks of every rollout; once a step, since neither changes within it."""
    for mini_batch in mini_batches:
        for micro in mini_batch.micros:
            with torch.no_grad():
                ref_logp_m, _ = reference(micro.forest.to(device), micro.scored_m.to(device), temperature)
            micro.ref_logp_m = ref_logp_m.cpu()
    if isinstance(reference, FSDPModule):
        reference.reshard()  # its root would stay whole, for a backward pass that does not come


def accumulate_gradients(cfg, ranks, model, mini_batch, tally, fresh):
    """Backward passes of (5) over a mini-batch; returns the loss of all ranks, and each micro-batch's largest mismatch.

    `fresh`: no optimizer step since the rollouts, so that sampler and trainer differ by rounding only; the mismatch is
    logged of such mini-batches alone.
    """
    total, mismatches = torch.zeros((), device=ranks.device), []
    for micro in mini_batch.micros:
        old_logp_m, advantage_m = micro.old_logp_m.to(ranks.device), micro.advantage_m.to(ranks.device)
        logp_m, entropy_m = model(micro.forest.to(ranks.device), micro.scored_m.to(ranks.device), cfg.temperature)
        # without a reference its place is taken by the policy itself: no distance, no gradient
        ref_logp_m = logp_m.detach() if micro.ref_logp_m is None else micro.ref_logp_m.to(ranks.device)
        loss_m, kl_m, clipped_m = token_losses(logp_m, old_logp_m, ref_logp_m, advantage_m, cfg.clip, cfg.kl_coef)
        loss = micro.weight * loss_m.sum()
        (loss / mini_batch.n_tokens).backward()
        total += loss.detach() / mini_batch.n_tokens
        n_mine = len(logp_m) if micro.weight else 0
        tally.add("loss", loss, 0)
        tally.add("entropy", micro.weight * entropy_m.sum(), n_mine)
        tally.add("clip_frac", micro.weight * clipped_m.sum(), n_mine)
        if micro.ref_logp_m is not None:
            tally.add("kl", micro.weight * kl_m.detach().sum(), n_mine)
        if fresh and micro.weight:
            mismatch_m = (logp_m - old_logp_m).detach().abs()  # rounding: nothing has been updated since the rollouts
            tally.add("mismatch", mismatch_m.sum(), n_mine)
            mismatches.append(float(mismatch_m.max()))
    return float(ranks.sum(total)), mismatches


def update(cfg, ranks, model, optimizers, mini_batches, lr, n_in_a_row):
    """An optimizer step for each mini-batch. After the first the policy is no longer the one that wrote the rollouts:
    that is what the ratio and the clip are for.

    n_in_a_row steps have been skipped before; at MAX_SKIPPED no more are tried. Returns what to log, how many pairs
    were tried, and the new n_in_a_row.
    """
    began, tally = time.perf_counter(), Tally()
    for name in ("loss", "entropy", "kl", "clip_frac", "mismatch"):
        tally.add(name, 0.0, 0)  # null in the log if no group is trained on
    norms, mismatches = [], []  # of each optimizer step; of each micro-batch before the first of them
    n_tried, n_trained, n_skipped, flops = 0, 0, 0, 0.0
    for mini_batch in mini_batches:
        n_tried += cfg.mini_prompts
        # the count of the loss, once; its sum follows from every micro-batch
        tally.add("loss", 0.0, mini_batch.n_tokens if ranks.main else 0)
        if not mini_batch.micros:  # no group has anything to say: no optimizer step
            continue
        loss, mini_mismatches = accumulate_gradients(cfg, ranks, model, mini_batch, tally, fresh=not norms)
        n_trained += mini_batch.n_packed
        flops += training_flops(model.config, mini_batch.micros)
        mismatches += mini_mismatches
        norm = optimizer_step(model, optimizers, lr, cfg.max_norm, loss)
        if math.isfinite(norm):
            norms.append(norm)
            n_in_a_row = 0
        else:
            n_skipped += 1
            n_in_a_row += 1  # over steps, too
        if n_in_a_row == MAX_SKIPPED:
            break
    seconds = time.perf_counter() - began
    flops = float(ranks.sum(torch.tensor(flops, dtype=torch.float64, device=ranks.device)))
    metrics = {**tally.means(ranks), "mismatch_max": max(ranks.gather(max(mismatches, default=0.0))),
               "grad_norm": sum(norms) / len(norms) if norms else 0.0, "n_updates": len(norms), "n_skipped": n_skipped,
               "update_s": seconds, "update_tok_s": n_trained / seconds,
               "update_mfu": flops_utilization(flops, seconds, ranks)}
    return metrics, n_tried, n_in_a_row


def rollout_metrics(groups):
    """What the step's judgements earned, and their kind."""
    rewards = torch.stack([group.reward_g for group in groups])
    rollouts = [r for group in groups for r in group.rollouts]
    verdicts = [verdict for group in groups for verdict in group.verdicts]
    return {
        "reward": rewards.mean().item(), "accuracy": (rewards > 0).float().mean().item(),
        "frac_no_verdict": verdicts.count(None) / len(verdicts),
        "frac_unfinished": sum(not r.finished for r in rollouts) / len(rollouts),
        "frac_zero_spread": sum(not group.has_spread for group in groups) / len(groups),
        "judgement_tok": sum(len(r.ids) for r in rollouts) / len(rollouts),
    }


def sample_row(step, group, g, tokenizer):
    """Rollout g of a group as samples.jsonl keeps it."""
    return {"step": step, "id": group.pair.id, "prompt": tokenizer.decode(group.prompt_ids, skip_control=False),
            "judgement": tokenizer.decode(group.rollouts[g].ids), "winner": group.pair.winner,
            "verdict": group.verdicts[g],
            "reward": group.reward_g[g].item(), "advantage": group.advantage_g[g].item()}


def work_of(cfg):
    """What of the options the plan asks for."""
    return Work(micro_tokens=cfg.micro_tokens, longest=cfg.max_prompt_tokens + cfg.max_new_tokens,
                dtype=getattr(torch, cfg.dtype), checkpointing=cfg.gradient_checkpointing, offload=cfg.offload,
                reference=cfg.kl_coef > 0, sequences=cfg.n_prompts, updates=cfg.n_prompts // cfg.mini_prompts,
                group_size=cfg.group_size, prompt_tokens=cfg.max_prompt_tokens, new_tokens=cfg.max_new_tokens,
                n_slots=cfg.n_slots, kv_gb=cfg.kv_gb, sampler_ranks=cfg.sampler_ranks)


def main(cfg):
    if cfg.plan:
        print(report(cfg.model, work_of(cfg), cfg.gpus, cfg.gpu_gb, rates_of(cfg)))
        return
    ranks, dtype = init_ranks(cfg.threads, cfg.sampler_ranks), getattr(torch, cfg.dtype)
    impl = model_impl(cfg.batch_invariant, ranks.device, dtype)
    run = Run(cfg, ranks, MAY_CHANGE)
    if cfg.model == RECIPES["toy"]["model"] and not Path(cfg.model).exists():  # the task begins with its first stage
        import distill
        options = distill.RECIPES["toy"] | {"threads": cfg.threads}
        if Path(options["out"], "config.json").exists():  # it was begun: it goes on with its own
            options = saved_options(distill.Config, options["out"]) | {"resume": True}
        distill.main(distill.Config(**options))
    check_folder(cfg.model)
    split = make_split(ranks, cfg.model)
    check_fits(cfg.model, work_of(cfg), ranks, cfg.gpu_gb)
    tokenizer = Tokenizer(cfg.model)
    prompt_name = prompt_of(cfg.model, cfg.prompt)
    prompt = load_prompt(prompt_name) if prompt_name else None
    pairs, prompts = read_prompts(cfg, tokenizer, prompt, ranks)
    kept_prompt = prompt_to_keep(prompt_name, pairs, ranks.main)
    prompt_text = prompt_path(kept_prompt).read_bytes() if kept_prompt else b""  # now: the file may change meanwhile
    n_steps = cfg.steps or len(pairs) // cfg.n_prompts
    if cfg.warmup_steps >= n_steps and ranks.main:
        print(f"note: --warmup-steps {cfg.warmup_steps} is the whole run of {n_steps} steps: --lr is hardly reached")
    held_out = None
    if cfg.eval_data:
        asked = kept_prompt or prompt_name  # as it is trained
        held_out = HeldOut(cfg.eval_data, cfg.eval_pairs, asked and load_prompt(asked), cfg.max_new_tokens, tokenizer,
                           ranks)

    model = load_sharded(run.weights(), ranks, torch.float32, dtype)
    model.name, model.impl, model.gradient_checkpointing = f"{cfg.out}, its policy", impl, cfg.gradient_checkpointing
    check_context(model, [len(prompts[pair.id]) for pair in pairs], "prompts (see --max-prompt-tokens)", ranks.main)
    if held_out:
        held_out.check(model, pairs)
    reference = None
    waiting = "cpu" if cfg.offload and ranks.world == 1 else ranks.device  # one GPU has no room for it all the time
    if cfg.kl_coef:
        reference = load_sharded(cfg.model, ranks, dtype, dtype).requires_grad_(False).to(waiting)
        reference.impl = impl
    optimizers = make_optimizers(model, "adamw", cfg.lr, (cfg.beta1, cfg.beta2), cfg.weight_decay, cfg.offload)
    first_step, n_in_a_row = restore(run.checkpoint, model, optimizers) if run.checkpoint else (0, 0)
    run.begin(first_step, n_steps)
    sampler = Sampler(None, cfg.n_slots, cfg.kv_gb, cfg.micro_tokens, graphs=not cfg.eager)

    to_read = [*prompts.values(), *(held_out.prompts if held_out else [])]
    check_room(model.config, split, dtype, ranks.device, cfg.kv_gb, to_read, cfg.max_new_tokens)

    def add_files(folder):
        tokenizer.save(folder)
        if kept_prompt:
            (folder / "prompt.txt").write_bytes(prompt_text)  # it will be asked as it was trained

    probe = pack([(prompts[pairs[0].id], [])], ranks.device)
    bar = tqdm(range(first_step, n_steps), "grpo", initial=first_step, total=n_steps, disable=not ranks.main)
    for step in bar:
        # 1. rollouts: the current policy writes G judgements of each pair, and their verdicts are paid
        began = time.perf_counter()
        sampler.model = filled_copy(model, dtype, split)
        sampler.reset_stats()
        step_pairs = steps_pairs(pairs, step, cfg.n_prompts, cfg.seed)
        groups = rollout(cfg, sampler, tokenizer, step_pairs, prompts, step, ranks, bar)
        sampler.model = None  # the copy is let go: the updates need its memory
        if groups is None:  # the weights are the last step's: this one is made again on --resume
            run.leave(step, model, optimizers, {"skipped_in_a_row": n_in_a_row}, add_files)
            return
        rollout_s = time.perf_counter() - began

        # 2. score: the reference reads all of them
        began = time.perf_counter()
        mini_batches = [make_mini_batch(cfg, ranks, groups[first:first + cfg.mini_prompts])
                        for first in range(0, cfg.n_prompts, cfg.mini_prompts)]
        if reference:
            reference.to(ranks.device)
            score(reference, mini_batches, cfg.temperature, ranks.device)
            reference.to(waiting)
        score_s = time.perf_counter() - began

        # 3. updates: one optimizer step per mini-batch
        lr = learning_rate(step, n_steps, cfg.lr, cfg.warmup_steps, cfg.final_lr_frac)
        updated, n_tried, n_in_a_row = update(cfg, ranks, model, optimizers, mini_batches, lr, n_in_a_row)

        # 4. log, evaluate, save
        done = step + 1
        row = {"step": done, **rollout_metrics(groups), **updated, "lr": lr, "rollout_s": rollout_s, "score_s": score_s,
               **sampler.stats()}
        evaluates = held_out and (done == n_steps or cfg.eval_every and done % cfg.eval_every == 0)
        saves = done == n_steps or cfg.save_every and done % cfg.save_every == 0
        dead = (evaluates or saves) and not is_finite(model, probe)
        if evaluates and not dead:
            sampler.model = filled_copy(model, dtype, split)
            scores, _ = held_out.judge(sampler, bar)
            sampler.model = None
            row |= scores
        run.row("metrics.jsonl", row)
        for group in groups[:cfg.n_samples]:
            run.row("samples.jsonl", sample_row(done, group, step % cfg.group_size, tokenizer))
        bar.set_postfix(accuracy=f"{row['accuracy']:.2f}", tokens=f"{row['judgement_tok']:.0f}",
                        kl=f"{row['kl'] or 0:.3f}", prefill=f"{row['prefill_tok_s']:.0f}/s",
                        decode=f"{row['decode_tok_s']:.0f}/s")
        run.checkpoints.check()
        if n_in_a_row == MAX_SKIPPED:
            last = groups[n_tried - cfg.mini_prompts:n_tried]
            run.stop(f"loss or gradient were not finite in {n_in_a_row} optimizer steps in a row",
                     [sample_row(done, group, g, tokenizer) for group in last for g in range(cfg.group_size)])
        if dead:
            run.stop("its policy gives no finite log-probabilities or gradient any more")

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
