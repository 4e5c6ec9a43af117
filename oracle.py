"""Makes the chains that distillation learns from: an oracle judges labelled pairs, and what is right is kept.

Pass 1: a teacher judges each pair without its label; up to --samples times, until a judgement is kept.
Pass 2: for the rest, a second teacher is shown the right verdict and what the first one wrote (data/prompts/oracle);
up to --attempts times.

A judgement is kept if its verdict is the label (reward.reward), by the rule of the benchmarks too, so that no other
label stands in it; if it is a whole chain of rubrics (reward.parse: well_formed); if it was not cut off; and, in
pass 2, if nothing in it tells of the hint (traces.py). Of several samples the FIRST that can be kept is: the shortest
would teach to leave out the checks.

    python oracle.py --data pairs.jsonl --endpoint https://HOST/v1 --teacher NAME --out runs/oracle   ($ORACLE_KEY)
    python oracle.py --data pairs.jsonl --teacher MODEL_FOLDER --samples 8 --attempts 0 --out runs/oracle
    python distill.py --model DIR --data runs/oracle/chains.jsonl --prompt instruct --out runs/distill

Every answer is in OUT/answers.jsonl as soon as it has come. The same command goes on after an interruption, and asks
only what has no answer; OUT/chains.jsonl, in the order of the pairs, is the same however often that was. It holds pairs
with their judgement, to be shown by the prompt of pass 1. OUT/report.json: pass rates, lengths, A and B, costs.

Departures from the paper and its released code:
  1. Pass 2 is checked, as pass 1 is (there, what the second teacher wrote was taken unread).
  2. The verdict is read by the rules of training and of the benchmarks (there: the last 100 characters).
"""

import fcntl
import hashlib
import json
import os
import re
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from data.fields import Bad, need, need_object
from data.pairs import Chain, Pair, note_one_label, read_pairs, to_json, without_equal_answers
from files import (NotJson, check_settings, json_line, one_line_errors, parse_json, refuse_file, write_records,
                   write_whole)
from options import check_at_least, check_between, check_choice, parse_config, refuse_ranks
from prompt import PROMPTS, Prompt, load_prompt, prompt_of, prompt_path, render
from reward import END_OF_TURN, after_thinking, benchmark_verdict, parse, reward, training_verdict
from teachers import Endpoint, Failure, Local, Question, Reply, check_key, check_url
from traces import trace_of

HINT = PROMPTS / "oracle" / "hint.txt"


@dataclass(frozen=True)
class Config:
    data: str | None = None  # labelled pairs, in any format that data/pairs.py reads
    out: str = "runs/oracle"  # folder for answers, chains and report; the same command goes on with what is there
    teacher: str | None = None  # name of the model at --endpoint; without --endpoint a Hugging Face folder
    endpoint: str | None = None  # address of an API like OpenAI's, such as https://host/v1
    key_env: str = "ORACLE_KEY"  # environment variable with the endpoint's key, if it wants one
    body: str | None = None  # JSON object put into every request; null takes a field out: {"max_tokens": null}
    price_in: float = 0.0  # of a million prompt tokens, in any currency
    price_out: float = 0.0  # of a million tokens that the teacher writes
    teacher2: str | None = None  # of pass 2; this and the following are pass 1's where they are not given
    endpoint2: str | None = None  # of pass 2
    key_env2: str | None = None  # of pass 2; another endpoint is not sent pass 1's key
    body2: str | None = None  # of pass 2
    price_in2: float | None = None  # of pass 2
    price_out2: float | None = None  # of pass 2
    prompt: str | None = None  # name in data/prompts or a file; without it a local teacher's own, or instruct
    samples: int = 1  # judgements of a pair in pass 1 at most; the first that can be kept is
    attempts: int = 1  # the same in pass 2; 0 = no pass 2
    temperature: float = 1.0  # 0 takes the likeliest token
    max_new_tokens: int = 8192  # longest judgement; one that is cut off is not kept
    limit: int = 0  # only the first so many pairs, 0 = all
    skip_bad: bool = False  # drop unreadable pairs and those of two equal answers, and count them
    concurrency: int = 8  # requests under way at once
    timeout: float = 600.0  # seconds until a request is taken for lost; it may be paid for all the same
    retries: int = 8  # further tries after an answer such as 429 or 500, a time-out, a broken connection
    backoff: float = 1.0  # seconds before the first of them; doubled each time, up to 60, and varied by half
    n_slots: int = 64  # local teacher: judgements written at once, as far as their keys and values fit kv_gb
    kv_gb: float = 0.0  # local teacher: GB of keys and values of what is written at once; 0 = what is free
    device: str = "auto"  # local teacher: cpu, cuda, or auto
    dtype: str = "auto"  # local teacher: float32, bfloat16, or auto: bfloat16 on a GPU
    seed: int = 0  # of a local teacher's samples, the waiting times, and the A/B order of chosen and rejected

    def __post_init__(self):
        for name in ("data", "teacher"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing: --data, the labelled pairs, and --teacher, who judges them")
        for url in (self.endpoint, self.endpoint2):
            if url:
                check_url(url)
        if self.endpoint2 and not self.teacher2:
            raise ValueError("--endpoint2 needs --teacher2, the name of a model there")
        if self.prompt in ("reasoning", "direct"):
            raise ValueError(f"--prompt {self.prompt} asks for a verdict, not for a chain: nothing could be kept")
        for text in (self.body, self.body2):
            read_body(text)
        if self.body and not self.endpoint:
            raise ValueError("--body is put into requests: it needs an --endpoint")
        check_between(self, 1, 1024, "samples", "concurrency")
        check_between(self, 0, 1024, "attempts", "retries")
        check_at_least(self, 1, "max_new_tokens", "n_slots")
        check_at_least(self, 0, "limit", "kv_gb", "backoff")
        check_at_least(self, 0, *[f"price_{x}" for x in ("in", "out", "in2", "out2") if getattr(self, f"price_{x}")])
        check_at_least(self, 1e-3, "timeout")
        if self.temperature != 0:
            check_between(self, 1e-3, 100, "temperature")
        elif self.samples > 1 or self.attempts > 1:
            raise ValueError("--samples and --attempts above 1 need a --temperature above 0: greedy judgements are all "
                             "the same")
        check_between(self, 0, 2**40 - 1, "seed")
        check_choice(self, "dtype", "auto", "float32", "bfloat16")
        check_choice(self, "device", "auto", "cpu", "cuda")


def read_body(text):
    """The fields of --body."""
    try:
        return need_object(parse_json((text or "{}").encode()))
    except ValueError:
        raise ValueError(f'--body: {text} is not a JSON object such as {{"top_p": 0.9}}') from None


# ---- what is asked and kept


@dataclass(frozen=True)
class Recipe:
    """What the questions depend on, beside the pair."""
    prompt: Prompt
    hint: str
    plan: list[tuple[int, int]]  # (pass, number of the try), in the order in which they are made


@dataclass(frozen=True)
class Standing:
    """How far a pair is: what was tried, and either a chain, or what to ask next, or neither: then it is dropped."""
    pair: Pair
    tries: list  # (Question, Reply or Failure, why it is not kept or None)
    chain: str | None = None
    question: Question | None = None


def follow(pair, recipe, answers):
    """The Standing of a pair; answers: {key: Reply or Failure} of all questions asked so far."""
    shown, tries, draft = render(recipe.prompt, pair), [], None
    for pass_, number in recipe.plan:
        messages = shown if pass_ == 1 else with_hint(shown, recipe.hint, pair.winner, draft)
        key = hashlib.sha256(json.dumps([pair.id, pass_, number, messages]).encode()).hexdigest()[:32]
        question = Question(key, pair.id, pass_, number, messages)
        if key not in answers:
            return Standing(pair, tries, question=question)
        answer = answers[key]
        if isinstance(answer, Failure):  # it would be refused again
            return Standing(pair, [*tries, (question, answer, "refused")])
        chain = after_thinking(answer.text).strip()
        fault = fault_of(chain, answer.finished, pair.winner)
        if fault is None and pass_ == 2:
            trace = trace_of(chain, recipe.hint, "\n".join(message["content"] for message in shown))
            fault = trace and f"trace of the hint, {trace.partition(':')[0]}"
        tries.append((question, answer, fault))
        if fault is None:
            return Standing(pair, tries, chain=chain)
        draft = chain if draft is None else draft
    return Standing(pair, tries)


def with_hint(messages, hint, winner, draft):
    """The messages of pass 2: the hint stands behind what the user says."""
    parts = {"verdict": winner.upper(), "chain": draft}
    # in one pass: a draft may spell {verdict}
    filled = re.sub(r"\{(verdict|chain)\}", lambda match: parts[match[1]], hint)
    return [*messages[:-1], {"role": "user", "content": f"{messages[-1]['content']}\n\n{filled.strip()}"}]


def fault_of(chain, finished, winner):
    """Why a chain is not one to learn from, or None; but for traces of the hint."""
    if not finished:
        return "cut off"
    if training_verdict(chain) is None:
        return "no verdict"
    if reward(chain, winner) < 0:
        return "wrong verdict"
    if benchmark_verdict(chain) != winner:
        return "both labels"
    if not parse(chain).well_formed or any(token in chain for token in END_OF_TURN):
        return "malformed"
    return None


# ---- on disk


class Answers:
    """What the teachers answered: a JSON line each, on disk as soon as it is known."""

    def __init__(self, file):
        """file: open to read and to append."""
        self.file, self.found, self.n_by_pass = file, {}, Counter()  # found: {question's key: Reply or Failure}
        file.seek(0)
        lines = file.read().split(b"\n")[:-1]
        file.truncate(sum(len(line) + 1 for line in lines))  # a killed run may have left half a line
        for number, line in enumerate(lines, 1):
            try:
                record = need_object(parse_json(line))
                self.n_by_pass[need(record, "pass", int)] += 1
                self.found.setdefault(need(record, "key", str), answer_in(record))
            except (Bad, NotJson) as e:
                raise ValueError(f"{file.name}:{number}: is no answer ({e}); take the line out, and its question is "
                                 "asked again, or choose another --out") from None

    def add(self, question, answer):
        self.found[question.key] = answer
        self.n_by_pass[question.pass_] += 1
        record = {"key": question.key, "id": question.id, "pass": question.pass_, "try": question.number}
        record |= {"refused": answer.reason} if isinstance(answer, Failure) else asdict(answer)
        self.file.write(json_line(record).encode())
        self.file.flush()


def answer_in(record):
    if "refused" in record:
        return Failure(need(record, "refused", str), "skip")
    n_prompt, n_tokens = (need(record, name, int, type(None)) for name in ("prompt_tokens", "tokens"))
    return Reply(need(record, "text", str), need(record, "finished", bool), n_prompt, n_tokens,
                 need(record, "seconds", float, int))


@contextmanager
def open_folder(out, settings):
    """The Answers of the run in a folder, begun or gone on with; ValueError if it is another's."""
    refuse_file(out)
    beside, path = out / "settings.json", out / "answers.jsonl"
    if out.exists() and any(out.iterdir()) and not beside.exists():
        raise ValueError(f"{out}: is there and no oracle run's; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # two would pay for everything twice
        except OSError:
            raise ValueError(f"{path}: another oracle.py writes it; wait for it, or choose another --out") from None
        answers = Answers(file)
        if answers.found:
            check_settings(beside, beside.read_bytes(), settings)
        write_whole(beside, json.dumps(settings, indent=2))
        yield answers


# ---- the report


def report_of(standings, cfg):
    """Pass rates, lengths and balance, over all pairs and by domain and source; what was dropped and why; costs."""
    rows = [row_of("all", standings)]
    for kind in ("domain", "source"):
        for name in sorted({getattr(s.pair, kind) for s in standings}):
            rows.append(row_of(f"{kind} {name or '(none)'}", [s for s in standings if getattr(s.pair, kind) == name]))
    dropped = Counter(s.tries[-1][2] if s.question is None else "no answer" for s in standings if s.chain is None)
    passes = []
    for pass_ in (1, 2):
        tries = [(answer, fault) for s in standings for question, answer, fault in s.tries if question.pass_ == pass_]
        replies = [answer for answer, _ in tries if isinstance(answer, Reply)]
        n_prompt = sum(reply.prompt_tokens or 0 for reply in replies)
        n_written = sum(reply.tokens or 0 for reply in replies)
        cost = n_prompt * option(cfg, "price_in", pass_) + n_written * option(cfg, "price_out", pass_)
        faults = Counter(fault or "none, kept" for _, fault in tries)
        passes.append({"pass": pass_, "teacher": option(cfg, "teacher", pass_), "answers": len(tries),
                       "prompt_tokens": n_prompt, "tokens": n_written, "cost": round(cost / 1e6, 4),
                       "without_usage": sum(None in (reply.prompt_tokens, reply.tokens) for reply in replies),
                       "faults": dict(sorted(faults.items()))})
    return {"rows": rows, "passes": passes, "dropped": dict(sorted(dropped.items()))}


def row_of(name, standings):
    kept = [s for s in standings if s.chain is not None]
    at_once = [s.tries[0][2] for s in standings if s.tries]  # the first answers' faults
    n_right = sum(fault in (None, "malformed", "both labels") for fault in at_once)
    tokens = [s.tries[-1][1].tokens for s in kept if s.tries[-1][1].tokens is not None]
    n = Counter(s.tries[-1][0].pass_ for s in kept)
    return {"name": name, "pairs": len(standings), "right_at_once": n_right, "kept_1": n[1], "kept_2": n[2],
            "kept": len(kept), "label_a": sum(s.pair.winner == "a" for s in standings),
            "kept_a": sum(s.pair.winner == "a" for s in kept),
            "mean_tokens": round(sum(tokens) / len(tokens), 1) if tokens else None,
            "mean_characters": round(sum(len(s.chain) for s in kept) / len(kept), 1) if kept else None}


def show(report):
    """Prints report.json as tables."""
    def percent(part, whole):
        return f"{100 * part / whole:8.1f}" if whole else f"{'-':>8}"

    print("\n% of the pairs; right: the first answer's verdict is the label; A: labels that are A, of all pairs and of "
          "the kept.\ntokens (as the teacher counts them), chars: means of the kept\n")
    titles = ("pairs", "right", "kept 1", "kept 2", "kept", "A", "A kept", "tokens", "chars")
    print(" " * 24 + "".join(f"{title:>8}" for title in titles))
    for row in report["rows"]:
        shares = [percent(row[name], row["pairs"]) for name in ("right_at_once", "kept_1", "kept_2", "kept", "label_a")]
        print(f"{row['name'][:23]:24}{row['pairs']:8}" + "".join(shares) + percent(row["kept_a"], row["kept"]) +
              f"{row['mean_tokens'] or '-':>8}{row['mean_characters'] or '-':>8}")
    print()
    for row in report["passes"]:
        unknown = f" ({row['without_usage']} answers without counts)" if row["without_usage"] else ""
        print(f"pass {row['pass']}, {row['teacher']}: {row['answers']} answers, {row['prompt_tokens']:,} tokens read, "
              f"{row['tokens']:,} written{unknown}, cost {row['cost']:,}; faults: {listed(row['faults'])}")
    print(f"dropped: {listed(report['dropped'])}")


def listed(counts):
    return ", ".join(f"{name} {n}" for name, n in counts.items()) or "none"


# ---- main


def read_labelled(cfg):
    """The pairs to judge: those that have a label."""
    pairs = without_equal_answers(read_pairs(cfg.data, cfg.seed, cfg.skip_bad), cfg.data, cfg.skip_bad, say=True)
    labelled = [pair for pair in pairs if pair.winner is not None]
    if not labelled:
        raise ValueError(f"{cfg.data}: no pair has a winner, and without one nobody knows which judgement is right")
    if len(labelled) < len(pairs):
        print(f"{cfg.data}: {len(pairs) - len(labelled)} of {len(pairs)} pairs have no winner and are left out")
    note_one_label([pair.winner for pair in labelled], cfg.data)
    return labelled[:cfg.limit] if cfg.limit else labelled


def option(cfg, name, pass_):
    """An option of a pass: one of pass 2 that is not given is pass 1's."""
    second = getattr(cfg, name + "2")
    return second if pass_ == 2 and second is not None else getattr(cfg, name)


def fields_of(cfg, pass_):
    """What every request of a pass holds beside the messages."""
    fields = {"model": option(cfg, "teacher", pass_), "max_tokens": cfg.max_new_tokens, "temperature": cfg.temperature}
    fields |= read_body(option(cfg, "body", pass_))
    return {name: value for name, value in fields.items() if value is not None}


def settings_of(cfg, recipe, prompt_text):
    """What the answers depend on: only with the same ones are they gone on with."""
    settings = {"data": str(Path(cfg.data).resolve()), "samples": cfg.samples, "attempts": cfg.attempts,
                "seed": cfg.seed, "prompt": hashlib.sha256(prompt_text).hexdigest()[:16],
                "hint": hashlib.sha256(recipe.hint.encode()).hexdigest()[:16]}
    for pass_ in sorted({pass_ for pass_, _ in recipe.plan}):
        fields, endpoint = fields_of(cfg, pass_), option(cfg, "endpoint", pass_)
        if endpoint:
            fields |= {"endpoint": check_url(endpoint)}
        else:
            from judge import weights_in  # here, since it takes PyTorch with it
            fields |= {"model": str(Path(fields["model"]).resolve()), "weights": weights_in(fields["model"])}
        settings[f"teacher of pass {pass_}"] = fields
    return settings


def teacher_of(cfg, pass_):
    fields, endpoint, variable = fields_of(cfg, pass_), option(cfg, "endpoint", pass_), cfg.key_env
    if not endpoint:
        sampling = {"max_new_tokens": cfg.max_new_tokens, "temperature": cfg.temperature, "seed": cfg.seed}
        return Local(fields["model"], cfg.device, cfg.dtype, cfg.n_slots, cfg.kv_gb, sampling)
    if pass_ == 2 and (cfg.key_env2 or endpoint != cfg.endpoint):  # a key is for one host
        variable = cfg.key_env2
    key = check_key(os.environ.get(variable), variable) if variable else None
    if key and endpoint.startswith("http://") and not re.match(r"http://(localhost|127\.|\[::1\])", endpoint):
        print(f"note: {check_url(endpoint)} is sent the key without encryption")
    return Endpoint(endpoint, key, fields, cfg.concurrency, cfg.timeout, cfg.retries, cfg.backoff, cfg.seed)


def ask_round(questions, pairs, teacher, recipe, answers):
    """Asks questions of one try, each of another pair; returns the keys of those that got no answer."""
    pair_of, unanswered, n = {pair.id: pair for pair in pairs}, {}, Counter()
    title = f"pass {questions[0].pass_}, try {questions[0].number + 1}"
    bar = tqdm(total=len(questions), desc=title, unit="pair")

    def keep(question, answer):
        if isinstance(answer, Failure) and answer.then != "skip":
            unanswered[question.key] = answer.reason
        else:
            answers.add(question, answer)
            n["kept"] += follow(pair_of[question.id], recipe, answers.found).chain is not None
            n["tokens"] += getattr(answer, "tokens", None) or 0
        bar.set_postfix(kept=n["kept"], retries=teacher.n_retries, tokens=n["tokens"], refresh=False)
        bar.update()
    try:
        teacher.ask_all(questions, keep)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{len(answers.found)} answers are kept in {answers.file.name}; the same command goes "
                                "on") from None
    finally:
        bar.close()
    if unanswered:
        print(f"note: {title}: {len(unanswered)} of {len(questions)} got no answer, the last: "
              f"{[*unanswered.values()][-1]}; the same command asks them again")
    return set(unanswered)


def main(cfg):
    began = time.perf_counter()
    refuse_ranks("oracle.py")
    pairs, out = read_labelled(cfg), Path(cfg.out)
    prompt = cfg.prompt or (None if cfg.endpoint else prompt_of(cfg.teacher, None)) or "instruct"
    plan = [(1, number) for number in range(cfg.samples)] + [(2, number) for number in range(cfg.attempts)]
    recipe = Recipe(load_prompt(prompt), HINT.read_text(encoding="utf-8"), plan)
    for pair in pairs:
        render(recipe.prompt, pair)  # a pair that the prompt cannot show is told before anything is asked
    teachers = {pass_: teacher_of(cfg, pass_) for pass_ in {pass_ for pass_, _ in plan}}
    unanswered = set()  # in this session
    with open_folder(out, settings_of(cfg, recipe, prompt_path(prompt).read_bytes())) as answers:
        for pass_, teacher in teachers.items():
            teacher.spoke = answers.n_by_pass[pass_] > 0
        while True:
            standings = [follow(pair, recipe, answers.found) for pair in pairs]
            waiting = [s.question for s in standings if s.question and s.question.key not in unanswered]
            if not waiting:
                break
            stage = min((question.pass_, question.number) for question in waiting)
            questions = [question for question in waiting if (question.pass_, question.number) == stage]
            unanswered |= ask_round(questions, pairs, teachers[stage[0]], recipe, answers)

    chains = []
    for s in standings:
        if s.chain is not None:
            question = s.tries[-1][0]
            made = {"pass": question.pass_, "try": question.number, "teacher": option(cfg, "teacher", question.pass_)}
            chains.append(to_json(Chain(s.pair, s.chain)) | made)
    write_records(out / "chains.jsonl", chains)
    n_retries = sum(teacher.n_retries for teacher in teachers.values())
    session = {"seconds": round(time.perf_counter() - began, 1), "retries": n_retries}
    report = report_of(standings, cfg) | {"session": session}
    write_whole(out / "report.json", json.dumps(report, indent=2))
    show(report)
    print(f"{len(chains)} of {len(pairs)} pairs have a chain: {out / 'chains.jsonl'}")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_config(Config))
