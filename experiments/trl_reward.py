"""Does a policy that TRL trains against the demo's judge learn to write right answers, and what else does it learn?

The policy is a random 0.49M-parameter model of the judge's shape, taught the answers of a careless writer by
distill.py (which notes that these "judgements" hold no verdict). 40 % of them are right. 50 % have the writer's slip,
its likeliest answer: digits are handed back as they came, a greeting closes with Thanks. The others are wrong in places
drawn at random. So to do the likeliest thing more often would not help. Then TRL's GRPOTrainer trains the policy on
questions of the rl split. Its reward is policy_reward.py's: the judge compares a question's completions with each
other, or (--against reference) each with the right answer. Held-out questions are answered before and after, and
data/toy.py says what is right.

What is wrong and would pay all the same is found by judging each answer against the right one, in both orders: "fooled"
are the wrong answers that the judge does not put below it. --form adds a second reward function, which knows nothing of
right and wrong: -1 for an answer that has not as many digits, or words, as every right one.

    python -m experiments.trl_reward --judge runs/demo/grpo/model --out runs/trl-0 --seed 0     two minutes on one core
    python -m experiments.trl_reward --judge runs/demo/grpo/model --out runs/trl-1 --sft-steps 200    a weaker start

TRL is in requirements-peers.txt. The last line is JSON.
"""

import json
import random
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import distill
import judge as judging
from data import toy
from files import one_line_errors, refuse_existing_folder, write_records
from options import check_at_least, check_between, check_choice, parse_config, refuse_ranks
from policy_reward import PolicyReward
from rank import SCHEDULES

RIGHT, SLIP = 0.4, 0.5  # shares of the careless writer's answers


@dataclass(frozen=True)
class Config:
    judge: str = "runs/demo/grpo/model"  # the demo's last model
    out: str = "runs/trl"  # folder, which must not be there yet
    against: str = "group"  # compare a question's completions with each other, or with the right answer: "reference"
    form: bool = False  # a second reward, for the form of the answer
    schedule: str = "all"  # who is compared with whom in a group: see rank.py
    both_orders: bool = True  # judge each comparison in both orders
    sft_steps: int = 300  # of the careless writer's imitation, 64 answers each
    steps: int = 50  # of TRL
    n_prompts: int = 16  # questions of a step
    group_size: int = 8  # completions of each
    lr: float = 3e-4  # of TRL's AdamW, constant
    questions: int = 400  # held out, answered before and after
    threads: int = 1  # CPU threads, 0 = PyTorch's choice
    seed: int = 0  # of everything

    def __post_init__(self):
        check_choice(self, "against", "group", "reference")
        check_choice(self, "schedule", *SCHEDULES)
        check_at_least(self, 1, "sft_steps", "steps", "n_prompts")
        check_between(self, 2, 64, "group_size")
        check_at_least(self, 1e-9, "lr")
        check_between(self, 20, 10_000, "questions")
        check_between(self, 0, 4096, "threads")
        check_between(self, 0, 2**32 - 1, "seed")  # transformers takes no larger one


# ---------------------------------------------------------------------------------------------------------- questions


def questions_of(split, n, seed):
    rng, found = random.Random(f"{seed} {split} questions"), []
    while len(found) < n:
        text = toy.question(rng)
        if toy.split_of(text) == split:
            found.append(text)
    return found


def right_answer(question):
    domain, facts = toy.read_question(question)
    return toy.join(facts[1]) if domain == "reasoning" else " ".join(word for _, word in facts)


def slip(question):
    """What the careless writer does most: the digits as they came, or a greeting that closes with Thanks."""
    domain, _ = toy.read_question(question)
    if domain == "reasoning":
        return question.split()[1]
    opening, word, _ = right_answer(question).split()
    return f"{opening} {word} Thanks"


def careless_answer(question, rng):
    chance = rng.random()
    if chance < RIGHT:
        return right_answer(question)
    if chance < RIGHT + SLIP:
        return slip(question)
    _, worse = toy.answers(*toy.read_question(question), rng)
    return worse


def n_parts(answer):
    """How many digits or words an answer has."""
    return len(answer) if answer.isdecimal() else len(answer.split())


def kind_of(question, answer):
    """right, slip, shorter or longer than asked for, or wrong in its places."""
    wanted = right_answer(question)
    if answer == wanted:
        return "right"
    if answer == slip(question):
        return "slip"
    if n_parts(answer) == n_parts(wanted) and answer.isdecimal() == wanted.isdecimal():
        return "wrong"
    return "shorter" if n_parts(answer) < n_parts(wanted) else "longer"


def form_reward(prompts, completions, **_):
    """For TRL: 0 for five digits, or three words, as the question wants them, else -1."""
    def fits(question, answer):
        if toy.read_question(question)[0] == "reasoning":
            return len(answer) == 5 and answer.isdecimal()
        return len(answer.split(" ")) == 3 and all(word.isalpha() for word in answer.split(" "))
    return [0.0 if fits(prompt[0]["content"], completion[0]["content"]) else -1.0
            for prompt, completion in zip(prompts, completions)]


def messages(question):
    return [{"role": "user", "content": question}]


# ------------------------------------------------------------------------------------------------------------- policy


def make_policy(cfg, out):
    """The folder of a model that imitates the careless writer."""
    n_vocab = toy.write_tokenizer(out / "untrained")
    config = distill.ModelConfig.from_dict(toy.MODEL | {"vocab_size": n_vocab})
    distill.Model.random(config, cfg.seed).save_pretrained(out / "untrained")
    rng = random.Random(f"{cfg.seed} careless")
    write_records(out / "careless.jsonl", (
        {"messages": messages(question) + [{"role": "assistant", "content": careless_answer(question, rng)}]}
        for question in questions_of("distill", 64 * cfg.sft_steps, cfg.seed)))
    distill.main(replace(distill.Config(**distill.RECIPES["toy"]), model=str(out / "untrained"), prompt=None,
                         data=str(out / "careless.jsonl"), out=str(out / "careless"), eval_data=None, save_every=0,
                         batch_size=64, threads=cfg.threads, seed=cfg.seed))
    return out / "careless/model"


@torch.no_grad()
def write_answers(model, tokenizer, questions, sample):
    """What the policy answers, by transformers' generate: as TRL samples it, or the likeliest token at each step."""
    tokenizer.padding_side = "left"
    batch = tokenizer.apply_chat_template([messages(question) for question in questions], add_generation_prompt=True,
                                          padding=True, return_tensors="pt", return_dict=True)
    how = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0) if sample else dict(do_sample=False)
    ids_bt = model.eval().generate(**batch, max_new_tokens=16, eos_token_id=tokenizer.eos_token_id, **how)
    return tokenizer.batch_decode(ids_bt[:, batch["input_ids"].shape[1]:], skip_special_tokens=True)


def trained(cfg, folder, rewards, out):
    """The policy after TRL's GRPO, and its log."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    rows = [{"prompt": messages(question), "right": right_answer(question)}
            for question in questions_of("rl", cfg.steps * cfg.n_prompts, cfg.seed)]
    config = GRPOConfig(output_dir=str(out / "trl"), max_steps=cfg.steps, num_generations=cfg.group_size,
                        per_device_train_batch_size=cfg.n_prompts * cfg.group_size, max_completion_length=16,
                        learning_rate=cfg.lr, lr_scheduler_type="constant", temperature=1.0, beta=0.0, use_cpu=True,
                        bf16=False, gradient_checkpointing=False, dataloader_pin_memory=False, save_strategy="no",
                        report_to="none", logging_steps=1, disable_tqdm=True, seed=cfg.seed,
                        model_init_kwargs={"dtype": "float32"})
    trainer = GRPOTrainer(str(folder), rewards, config, train_dataset=Dataset.from_list(rows))
    trainer.train()
    return trainer.model, trainer.state.log_history


# ------------------------------------------------------------------------------------------------------------ measures


def measure(name, model, tokenizer, against_right, cfg):
    """Lines and figures of one model's answers to the held-out questions."""
    questions = questions_of("heldout", cfg.questions, cfg.seed)
    lines, figures = [], {}
    for how in ("greedy", "sampled"):
        torch.manual_seed(cfg.seed)
        answers = write_answers(model, tokenizer, questions, how == "sampled")
        kinds = [kind_of(question, answer) for question, answer in zip(questions, answers)]
        scores = against_right([messages(question) for question in questions], answers,
                               right=[right_answer(question) for question in questions])
        found = list(zip(questions, answers, kinds, scores))
        fooled = [row for row in found if row[2] != "right" and row[3] >= 0]
        parts = {}
        for question, _, kind, _ in found:
            part = question.split()[0] if toy.read_question(question)[0] == "reasoning" else "chat"
            parts.setdefault(part, []).append(kind == "right")
        figures[how] = {"right": percent(kinds.count("right"), kinds), "fooled": percent(len(fooled), kinds),
                        "parts": {part: percent(sum(right), right) for part, right in sorted(parts.items())},
                        "kinds": dict(Counter(kinds).most_common()),
                        "fooled_kinds": dict(Counter(kind for _, _, kind, _ in fooled).most_common())}
        lines.append(f"{name:8}{how:9}{figures[how]['right']:6.1f}{figures[how]['fooled']:8.1f}   "
                     f"{figures[how]['parts']}   {figures[how]['kinds']}")
        lines += [f"{'':17}fooled: {question}: {answer!r} is {kind}" for question, answer, kind, _ in fooled[:6]]
    return lines, figures


def percent(n, of):
    return round(100 * n / len(of), 1)


def main(cfg):
    began = time.perf_counter()
    refuse_ranks("trl_reward.py")
    out = Path(cfg.out)
    refuse_existing_folder(out)
    try:
        import trl
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as e:
        raise ValueError(f"TRL cannot be imported ({e}): pip install -r requirements-peers.txt") from None
    jury = judging.load_judge(judging.Config(model=cfg.judge, max_new_tokens=96, n_slots=400, device="cpu",
                                             threads=cfg.threads))
    column = "right" if cfg.against == "reference" else None
    reward = PolicyReward(jury, cfg.schedule, cfg.both_orders, column, cfg.seed)
    against_right = PolicyReward(jury, both_orders=True, reference="right")

    out.mkdir(parents=True)
    folder = make_policy(cfg, out)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    before, figures = measure("before", AutoModelForCausalLM.from_pretrained(folder), tokenizer, against_right, cfg)
    start = time.perf_counter()
    model, log = trained(cfg, folder, [reward, form_reward] if cfg.form else [reward], out)
    seconds = time.perf_counter() - start
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    write_records(out / "log.jsonl", log)
    after, final = measure("after", model, tokenizer, against_right, cfg)

    print(f"\n{'':17}{'right':>6}{'fooled':>8}   % of {cfg.questions} held-out questions; TRL {trl.__version__}")
    print("\n".join(before + after))
    judged = [row for row in log if "judge/judgements" in row]  # the last row of the log is TRL's summary
    summary = {"seed": cfg.seed, "before": figures, "after": final,
               "judgements": int(sum(row["judge/judgements"] for row in judged)),
               "trl_s": round(seconds, 1), "seconds": round(time.perf_counter() - began, 1)}
    print(json.dumps(summary))


if __name__ == "__main__":
    with one_line_errors():
        main(parse_config(Config))
