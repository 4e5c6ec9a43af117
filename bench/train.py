"""A training step, ours against TRL's trainers: equal weights, sequences and optimizer, run alternately.

    python -m bench.train --what sft --model 25m --threads 2       an SFT batch: sequences of prompt + new tokens
    python -m bench.train --what update --model 25m --threads 2    a GRPO update, of rollouts that both are given
    python -m bench.train --what step --model 25m --threads 2      a GRPO step: rollouts, rewards, reference, update
    python -m bench.train --what step --uneven                     lengths drawn from 16 to 2 x new: the same for both

TRL (requirements-peers.txt, see there) drives its own loop: its time is that from the end of one optimizer step to the
end of the next, in its `train()`, with fetching and collating; ours runs between two of its steps. It runs as it is
meant to: sdpa, no checkpointing, its own optimizer; SFT packed by bfd at micro-batch 1, at the packing length that is
fastest, GRPO at the micro-batch that is; beta above 0 and use_bias_correction_kl=False, which is our loss. The first
step is left out. Of an update its generation and reference pass are left out, ours too. Random weights stop nowhere, so
rollouts are ended at given lengths (see bench/rollout.py). The unit is tokens of the sequences (sft) or of the rollouts
(update, step) a second. Of the first step the SFT losses, and the gradient norms of sft and update, must agree.

Memory: the peak of a process that makes two steps; beside it what the process had before it read the model.
"""

import gc
import json
import math
import os
import tempfile
import time

import torch

import batch
import grpo
from bench.rollout import Ended, make_lengths
from bench.twins import SHAPES, geometry, load, matrix_rate, measure_side, options, peak_bytes, report
from common import Ranks, Tally, make_optimizers, micro_batches, optimizer_step
from data.pairs import Pair
from distill import Example, sft_loss
from model import Model, forward_flops, tokens_seen
from sample import Sampler, filled_copy
from split import Split

LR, KL_COEF = 1e-6, 1e-3
ALONE = Ranks(0, 1, torch.device("cpu"))


class Words:
    """A tokenizer for random ids: token 17 is the word w17."""
    stop_ids = frozenset()

    def decode(self, ids, skip_control=True):
        return " ".join([f"w{i}" for i in ids])


class Work:
    """Prompts, and for each the lengths and tokens of its rollouts."""

    def __init__(self, args):
        rng = torch.Generator().manual_seed(0)
        n_vocab = SHAPES[args.model][-1]

        def ids(n):
            return torch.randint(2, n_vocab, (n,), generator=rng).tolist()
        self.lengths = make_lengths(args, rng).tolist()
        self.prompts = [ids(args.prompt) for _ in range(args.prompts)]
        self.replies = [[ids(n) for n in group] for group in self.lengths]
        self.sequences = [(prompt, reply) for prompt, group in zip(self.prompts, self.replies) for reply in group]
        self.n_drawn = sum(map(sum, self.lengths))
        self.n_all = self.n_drawn + args.samples * args.prompts * args.prompt

    def flops(self, config, what):
        """Of what ours computes: forward and backward, and in a step the rollouts and the reference before it."""
        if what == "sft":
            segments = [(0, len(prompt) + len(reply), -1) for prompt, reply in self.sequences]
        else:
            segments = []
            for prompt, group in zip(self.prompts, self.lengths):
                parent = len(segments)
                segments += [(0, len(prompt), -1)] + [(0, n, parent) for n in group]
        n_tokens = sum(n for _, n, _ in segments)
        once = forward_flops(config, n_tokens, self.n_drawn, tokens_seen(torch.tensor(segments)))
        return {"sft": 3, "update": 3, "step": 5}[what] * once


# --------------------------------------------------------------------------------------------------------------- ours


def make_ours(args, work, folder):
    """A function that makes one step; it returns the loss and the gradient's norm, and the seconds to leave out."""
    model = load("ours", args, folder)
    model.gradient_checkpointing = False
    optimizers = make_optimizers(model, "adamw", LR, (0.9, 0.999), 0.0)
    if args.what == "sft":
        return lambda: sft_step(args, work, model, optimizers)
    cfg = grpo.Config(model="-", data="-", n_prompts=args.prompts, mini_prompts=args.prompts, group_size=args.samples,
                      max_new_tokens=max(map(max, work.lengths)), kl_coef=KL_COEF, dtype=args.dtype,
                      micro_tokens=args.micro_tokens, lr=LR)
    sampler = Sampler(None, args.prompts * args.samples, prefill_tokens=args.micro_tokens)
    batch.Batch.reason_to_end = lambda self, slot, _: (
        "length" if len(slot.rollout.ids) == work.lengths[slot.prompt][slot.sample] else None)
    pairs = [Pair(str(i), [], "", "", "a", "", "") for i in range(args.prompts)]
    prompts = {pair.id: grpo.np.array(ids, grpo.np.int32) for pair, ids in zip(pairs, work.prompts)}
    reference = load("ours", args, folder).requires_grad_(False)
    grpo.reward = lambda text, winner, finished: reward(text)
    written = fixed(work) if args.what == "update" else sampler
    steps = iter(range(10**6))

    def step():
        began = time.perf_counter()
        sampler.model = filled_copy(model, model.head_vd.dtype, Split()) if args.what == "step" else None
        groups = grpo.rollout(cfg, written, Words(), pairs, prompts, next(steps), ALONE)
        sampler.model = None
        mini_batch = grpo.make_mini_batch(cfg, ALONE, groups)
        grpo.score(reference, [mini_batch], 1.0, ALONE.device)
        left_out = 0.0
        if args.what == "update":
            for micro in mini_batch.micros:  # as the policy that wrote them found them, or nearly: lr is small
                micro.old_logp_m = micro.ref_logp_m
            left_out = time.perf_counter() - began
        loss, _ = grpo.accumulate_gradients(cfg, ALONE, model, mini_batch, Tally(), fresh=True)
        return loss, optimizer_step(model, optimizers, LR, 1.0, loss), left_out
    return step


def sft_step(args, work, model, optimizers):
    """As distill.main makes one."""
    examples = [Example(prompt + reply, len(prompt)) for prompt, reply in work.sequences]
    n_tokens, tally = sum(e.n_scored for e in examples), Tally()
    for [share] in micro_batches([len(e.ids) for e in examples], args.micro_tokens, 1):
        nll, entropy = sft_loss(model, [examples[i] for i in share], ALONE.device)
        (nll / n_tokens).backward()
        tally.add("loss", nll, sum(examples[i].n_scored for i in share))
        tally.add("entropy", entropy, sum(examples[i].n_scored for i in share))
    loss = tally.means(ALONE)["loss"]
    return loss, optimizer_step(model, optimizers, LR, 1.0, loss), 0.0


def fixed(work):
    """A sampler that writes the given replies."""
    class Fixed:
        def generate(self, prompts, sampling, *_):
            return [[batch.Rollout(ids, [-10.0] * len(ids), "stop") for ids in group] for group in work.replies]
    return Fixed()


def reward(text):
    """Of either sign, half and half, whatever was written."""
    return 1.0 if sum(map(ord, text)) % 2 else -1.0


# --------------------------------------------------------------------------------------------------------------- TRL


def make_trainer(args, work, folder, size, n_steps, between):
    """A trainer of n_steps optimizer steps that calls between(seconds, its log) after each. size: the packing length,
    or the rows of a micro-batch."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        began, left_out = None, 0.0

        def on_train_begin(self, *_, **__):
            Clock.began = time.perf_counter()

        def on_log(self, _, state, control, **__):  # after each step: logging_steps is 1
            if "grad_norm" in state.log_history[-1]:
                between(time.perf_counter() - Clock.began - Clock.left_out, state.log_history[-1])
                Clock.began, Clock.left_out = time.perf_counter(), 0.0
    common = dict(output_dir=str(folder) + "/trl", max_steps=n_steps, learning_rate=LR, lr_scheduler_type="constant",
                  warmup_steps=0, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, bf16=False,
                  gradient_checkpointing=False, max_grad_norm=1.0, weight_decay=0.0, seed=0, disable_tqdm=True,
                  dataloader_pin_memory=False, model_init_kwargs={"dtype": args.dtype, "attn_implementation": "sdpa"})
    if args.what == "sft":
        rows = [{"input_ids": prompt + reply, "labels": [-100] * len(prompt) + reply}
                for prompt, reply in work.sequences]
        n_rows = n_packed_rows([len(row["input_ids"]) for row in rows], size)
        config = SFTConfig(packing=True, packing_strategy="bfd", max_length=size, per_device_train_batch_size=1,
                           gradient_accumulation_steps=n_rows, **common)
        trainer = SFTTrainer(folder, config, train_dataset=Dataset.from_list(rows), processing_class=words(args))
        assert len(trainer.train_dataset) == n_rows, (len(trainer.train_dataset), n_rows)
        trainer.add_callback(Clock())
        return trainer
    n_rollouts = args.prompts * args.samples
    config = GRPOConfig(per_device_train_batch_size=size, gradient_accumulation_steps=n_rollouts // size,
                        num_generations=args.samples, max_completion_length=max(map(max, work.lengths)),
                        beta=KL_COEF, use_bias_correction_kl=False, temperature=1.0, shuffle_dataset=False, **common)
    rows = [{"prompt": Words().decode(ids)} for ids in work.prompts]
    trainer = GRPOTrainer(folder, lambda completions, **_: [reward(text) for text in completions], config,
                          train_dataset=Dataset.from_list(rows), processing_class=words(args))
    trainer.add_callback(Clock())
    lengths = [n for group in work.lengths for n in group]
    trainer.eos_token_ids = [-1]  # random weights may write the end: a rollout ends where it is told to
    trainer.generation_config.eos_token_id = None
    generate, scored = trainer.model.generate, trainer._generate_and_score_completions
    turn = trainer._generate_single_turn

    def generate_to_length(**how):
        n_before = how["input_ids"].shape[1]
        return generate(stopping_criteria=[Ended(n_before, torch.tensor(lengths))], **how)

    def one_turn(prompt_ids, *rest):
        if args.what == "update":
            return [list(ids) for group in work.replies for ids in group], None
        completion_ids, logps = turn(prompt_ids, *rest)
        return [ids[:n] for ids, n in zip(completion_ids, lengths, strict=True)], logps

    def timed(inputs):
        began = time.perf_counter()
        out = scored(inputs)
        if args.what == "update":
            Clock.left_out += time.perf_counter() - began
        return out
    trainer.model.generate, trainer._generate_single_turn = generate_to_length, one_turn
    trainer._generate_and_score_completions = timed
    return trainer


def n_packed_rows(lengths, size):
    """How many rows best-fit decreasing fills."""
    rooms = []
    for n in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= n]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else size) - n)
    return len(rooms)


def words(args):
    """The same tokenizer for transformers."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast
    vocabulary = {f"w{i}": i for i in range(2, SHAPES[args.model][-1])} | {"<pad>": 0, "<end>": 1}
    spelled = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    spelled.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=spelled, pad_token="<pad>", eos_token="<end>")


def sizes(args, work):
    """What TRL may do best with."""
    if args.what == "sft":
        longest = max(len(prompt) + len(reply) for prompt, reply in work.sequences)
        return [longest, 2 * longest]
    n = args.prompts * args.samples
    return [rows for rows in (1, args.samples, 2 * args.samples) if n % rows == 0]


def best_size(args, work, folder):
    """The size at which TRL's second of two steps is fastest."""
    seconds = {}
    for size in sizes(args, work):
        times = []
        make_trainer(args, work, folder, size, 2, lambda s, log: times.append(s)).train()
        seconds[size] = times[-1]
        gc.collect()
        print(f"TRL, {'packed to' if args.what == 'sft' else 'rows'} {size}: {times[-1]:.2f} s", flush=True)
    return min(seconds, key=seconds.get)


# ------------------------------------------------------------------------------------------------------------- both


def run_side(args, work, before):
    """In its own process: two steps, and the peak."""
    if args.side == "ours":
        step = make_ours(args, work, args.folder)
        step(), step()
    else:
        make_trainer(args, work, args.folder, args.size, 2, lambda s, log: None).train()
    print(json.dumps({"gb": round(peak_bytes() / 1e9, 3), "before_gb": round(before / 1e9, 3)}))


def main():
    args = options("uneven", what=("sft", "update", "step"), prompts=1, samples=7, prompt=512, new=128,
                   **{"micro-tokens": 1408, "size": 0})
    os.environ["HF_HUB_OFFLINE"] = "1"
    work, config = Work(args), geometry(*SHAPES[args.model])
    if args.side:
        if args.side == "peer":
            from trl import GRPOTrainer, SFTTrainer  # noqa: F401: what it takes to be loaded is not the work's
        return run_side(args, work, peak_bytes())
    seconds, matrix_rates, first = {"ours": [], "peer": []}, [], {}
    with tempfile.TemporaryDirectory() as folder:
        Model.random(config, dtype=getattr(torch, args.dtype)).save_pretrained(folder)
        args.size = args.size or best_size(args, work, folder)
        gb = {side: measure_side(side, folder, "--size", str(args.size)) for side in seconds}
        step = make_ours(args, work, folder)

        def between(peer_s, log):
            began = time.perf_counter()
            loss, norm, left_out = step()
            first.setdefault("ours", (loss, norm))
            first.setdefault("peer", (log["loss"], log["grad_norm"]))
            seconds["ours"].append(time.perf_counter() - began - left_out)
            seconds["peer"].append(peer_s)
            matrix_rates.append(matrix_rate(args))
            print(f"ours {seconds['ours'][-1]:.2f} s, TRL {peer_s:.2f} s", flush=True)
        make_trainer(args, work, folder, args.size, args.runs + 1, between).train()
    (loss, norm), (peer_loss, peer_norm) = first["ours"], first["peer"]
    print(f"first step: loss {loss:.6f} and {peer_loss:.6f}, gradient norm {norm:.6f} and {peer_norm:.6f}")
    if args.what == "sft":
        assert abs(loss - peer_loss) < 1e-4, (loss, peer_loss)
    if args.what != "step":
        assert math.isclose(norm, peer_norm, rel_tol=1e-2), (norm, peer_norm)
    length = f"16 to {2 * args.new}" if args.uneven else args.new
    work_name = f"{args.prompts} x {args.samples}, {args.prompt} + {length} tokens"
    units = work.n_all if args.what == "sft" else work.n_drawn
    seconds = {side: s[1:] for side, s in seconds.items()}
    before = {f"{side}_before_gb": gb[side]["before_gb"] for side in gb}
    report(f"train {args.what}", args, work_name, units, seconds, gb, matrix_rates, work.flops(config, args.what),
           peer_size=args.size, **before)


if __name__ == "__main__":
    main()
