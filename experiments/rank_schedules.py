"""Which schedule finds the best of N answers, and for how many judgements?

Two measurements. First, real judges on the generated task: each held-out question gets eight answers of known merit
(answers_to), a judge writes its verdict on every pair in both orders once, and the schedules are replayed on these
verdicts with many seeds. Second, the sizes of RMB's best-of-n items and of larger ones, with a simulated judge, since
no strong judge is at hand here: each of its verdicts prefers the better answer with a stated probability, and its
errors are either

    by chance    each verdict of its own, so that the other order is a second opinion
    by place     on some pairs it always says A, or always B, whatever stands there

    python -m experiments.rank_schedules --model runs/demo/grpo/model runs/demo/distilled/model \
        --rmb ../shared/benchmarks/rmb/BoN_set --out runs/rank/schedules.json      two minutes on a CPU core

The best is found if it stands first; where it shares the first place with k - 1 others, 1/k of a time. Writes --out,
which docs/ranking_figure.py draws, and prints the table.
"""

import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from data import toy
from data.pairs import MOST_ANSWERS, Question, read_pairs
from files import one_line_errors, refuse_existing, write_whole
from intervals import wilson
from judge import Config as JudgeConfig, load_judge
from options import check_at_least, check_between, flag_of, parse_config, refuse_ranks
from rank import SCHEDULES, n_judgements, pair_of, rank_all


@dataclass(frozen=True)
class Config:
    model: tuple[str, ...] = ()  # folders of judges of the generated task, such as a demo's
    rmb: str | None = None  # RMB's BoN_set, of which the items' sizes are taken
    sizes: str = "16"  # numbers of answers beside RMB's for the simulated judge
    accuracies: str = "0.7,0.8,0.9"  # of the simulated judge's verdicts
    out: str = "runs/rank/schedules.json"  # file to write
    questions: int = 200  # of the generated task, and of each larger size
    repeats: int = 5  # seeds of the schedules on the same verdicts
    seed: int = 0  # of the questions, the simulated verdicts and the schedules

    def __post_init__(self):
        if not self.model and not self.rmb:
            raise ValueError("--model, judges of the generated task, or --rmb, a folder, is missing")
        if not all(2 <= size <= MOST_ANSWERS for size in numbers(self.sizes, int, "sizes")):
            raise ValueError(f"--sizes: {self.sizes!r}; a question has 2 to {MOST_ANSWERS} answers")
        if not all(0.5 <= accuracy <= 1 for accuracy in numbers(self.accuracies, float, "accuracies")):
            raise ValueError(f"--accuracies: {self.accuracies!r}; they are from 0.5 to 1")
        check_at_least(self, 2, "questions")
        check_between(self, 1, 1000, "repeats")
        check_between(self, 0, 2**40 - 1, "seed")


def numbers(text, kind, name):
    """[16, 64] of "16,64"."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{flag_of(name)}: {text!r} is not a list of numbers with commas between") from None


@dataclass(frozen=True)
class Verdicts:
    """A judge whose verdicts are known: {pair's id: "a", "b" or None}."""
    by_id: dict

    def judge(self, pairs, bar=None):
        for i, pair in enumerate(pairs):
            yield i, {"verdict": self.by_id[pair.id]}


# -------------------------------------------------------------------------------------------------- real judgements


def answers_to(domain, facts, rng):
    """Eight different answers, the best one first.

    chat: each keeps other wanted words, so that their totals are 7, 6, ... 0. reasoning: the solution, and seven others
    that are wrong in one place or more.
    """
    if domain == "reasoning":
        answers = [toy.join(facts[1])]
        while len(answers) < 8:
            _, wrong = toy.answers(domain, facts, rng)
            answers += [wrong] if wrong not in answers else []
        return answers
    answers = []
    for kept in range(7, -1, -1):
        words = [word if weight & kept else rng.choice([other for other in pool if other != word])
                 for (weight, word), pool in zip(facts, (toy.OPEN, toy.SAY, toy.CLOSE))]
        answers.append(" ".join(words))
    return answers


def toy_questions(n, seed):
    """n held-out Questions, their answers shuffled, and the place of each one's best answer."""
    rng = random.Random(f"{seed} rank")
    questions, best = [], []
    while len(questions) < n:
        text = toy.question(rng)
        if toy.split_of(text) != "heldout":
            continue
        domain, facts = toy.read_question(text)
        answers = answers_to(domain, facts, rng)
        first = answers[0]
        rng.shuffle(answers)
        questions.append(Question(f"{domain}/{len(questions)}", [{"role": "user", "content": text}], answers))
        best.append(answers.index(first))
    return questions, best


def judge_pairs(folder, questions):
    """The Verdicts of the judge in a folder on all pairs in both orders, and its tokens a judgement."""
    judge = load_judge(JudgeConfig(model=folder, max_new_tokens=96, n_slots=256))
    pairs = [pair_of(question, i, j) for question in questions for i in range(8) for j in range(8) if i != j]
    records = [record for _, record in judge.judge(pairs)]
    n_tokens = sum(record["votes"][0]["n_tokens"] for record in records)
    return Verdicts({record["id"]: record["verdict"] for record in records}), n_tokens / len(records)


# -------------------------------------------------------------------------------------------------- simulated ones


def rmb_sizes(folder):
    """The number of answers of each best-of-n item: its losers and the best."""
    losers = Counter(pair.item for pair in read_pairs(folder) if pair.item)
    return [1 + n for n in losers.values()]


def simulated(sizes, accuracy, by_place, seed):
    """Questions of these sizes, answer 0 being the best, 1 the second and so on; and a simulated judge's Verdicts."""
    rng = random.Random(f"{seed} {accuracy} {by_place}")
    questions = [Question(str(k), [], [str(i) for i in range(n)]) for k, n in enumerate(sizes)]
    verdicts = {}
    for question in questions:
        for j in range(len(question.answers)):
            for i in range(j):
                first, second = pair_of(question, i, j).id, pair_of(question, j, i).id
                if by_place:  # then on twice as many pairs as it errs on: half of what it says there is right
                    blind = rng.random() < 2 * (1 - accuracy)
                    verdicts[first], verdicts[second] = [rng.choice("ab")] * 2 if blind else "ab"
                else:
                    verdicts[first] = "a" if rng.random() < accuracy else "b"
                    verdicts[second] = "b" if rng.random() < accuracy else "a"
    return questions, Verdicts(verdicts)


# ------------------------------------------------------------------------------------------------------- schedules


def share_found(ranking, best):
    """1 if the answer `best` stands first alone, 1/k if it shares the first place with k - 1 others, else 0."""
    top = max(ranking.scores)
    return 1 / ranking.scores.count(top) if ranking.scores[best] == top else 0.0


def measure(name, questions, best, verdicts, repeats, seed):
    """A row of each schedule, with one order and both: judgements a question, and how often the best is found."""
    rows = []
    for schedule in SCHEDULES:
        for both_orders in (False, True):
            shares = []
            for repeat in range(repeats):
                for i, ranking in rank_all(verdicts, questions, schedule, both_orders, seed + repeat):
                    shares.append(share_found(ranking, best[i]))
            found, n = sum(shares) / len(shares), len(questions)  # repeats are of the same questions: worth no more
            low, high = wilson(found * n, n)
            judgements = sum(n_judgements(question, schedule, both_orders) for question in questions) / n
            rows.append({"task": name, "schedule": schedule, "both_orders": both_orders, "questions": n,
                         "judgements": round(judgements, 2), "found": found, "low": low, "high": high})
    return rows


def measure_judge(folder, cfg):
    questions, best = toy_questions(cfg.questions, cfg.seed)
    verdicts, tokens = judge_pairs(folder, questions)
    name = Path(folder).parent.name if Path(folder).name == "model" else Path(folder).name
    rows = []
    for domain in ("reasoning", "chat"):
        mine = [i for i, question in enumerate(questions) if question.id.startswith(domain)]
        rows += measure(f"{name}: {domain}", [questions[i] for i in mine], [best[i] for i in mine], verdicts,
                        cfg.repeats, cfg.seed)
    right = [(verdicts.by_id[pair_of(question, b, j).id] == "a") + (verdicts.by_id[pair_of(question, j, b).id] == "b")
             for question, b in zip(questions, best) for j in range(8) if j != b]  # in 0, 1 or 2 orders
    print(f"{name}: {tokens:.1f} tokens a judgement; where the best answer is one of the two, "
          f"{50 * sum(right) / len(right):.1f} % are right, {100 * right.count(2) / len(right):.1f} % in both orders")
    return rows


def table(rows):
    lines = [f"{'':48}{'judgements':>11}{'best found, % (95 %)':>24}"]
    for row in rows:
        name = f"{row['task']:28}{row['schedule']:9}{'both orders' if row['both_orders'] else ''}"
        found = f"{100 * row['found']:.1f} ({100 * row['low']:.1f}-{100 * row['high']:.1f})"
        lines.append(f"{name:48}{row['judgements']:11.1f}{found:>24}")
    return "\n".join(lines)


def main(cfg):
    refuse_ranks("rank_schedules.py")
    refuse_existing(cfg.out)
    rows = []
    for folder in cfg.model:
        rows += measure_judge(folder, cfg)
    sizes = {"RMB": rmb_sizes(cfg.rmb)} if cfg.rmb else {}
    sizes |= {str(size): [size] * cfg.questions for size in numbers(cfg.sizes, int, "sizes")}
    for name, its_sizes in sizes.items():
        for accuracy in numbers(cfg.accuracies, float, "accuracies"):
            for by_place in (False, True):
                questions, verdicts = simulated(its_sizes, accuracy, by_place, cfg.seed)
                errors = "place" if by_place else "chance"
                repeats = cfg.repeats if name == "RMB" else 1
                rows += measure(f"{name}, {accuracy:g}, by {errors}", questions, [0] * len(questions), verdicts,
                                repeats, cfg.seed)
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    write_whole(cfg.out, json.dumps(rows, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    with one_line_errors():
        main(parse_config(Config))
