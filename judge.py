"""A pair in, a judgement out. On the command line: judge one pair, or a file of them; rank answers.

    python judge.py --model DIR --question "..." --answer-a "..." --answer-b "..."    streams the judgement
    python judge.py --model DIR --pairs pairs.jsonl --out judgements.jsonl            resumable: started again, goes on
    python judge.py --model DIR --question "..." --answers "..." "..." "..."          ranks 2 to 64 answers (rank.py)
    python judge.py --model DIR --rank questions.jsonl --out rankings.jsonl           resumable, too
    python judge.py --model DIR --question "..." --answer "..." --reference "..."     one answer (one_answer.py)
    load_judge(Config(model=DIR)).judge_one(question, answer_a, answer_b)             the first as a function

--rubric FILE tells the judge what to weigh by, where a pair has no rubric of its own.

A judgement record is what is kept of it: the pair's id, label and places, a hash of the prompt, each vote's text,
tokens, verdict and whether it was finished, and the majority's verdict. It can be scored again without the model.
"""

import json
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from data.pairs import (MOST_ANSWERS, NO_REFERENCE, SWAPPED, note_one_label, pair_of_texts, read_pairs,
                        read_questions, texts_of, with_rubric)
from draw import Sampling
from files import fail, one_line_errors, refuse_existing, write_records
from folder import check_context, check_folder
from judgements import JudgementFile, RecallingJudge, encode_all, judge_file, key_of, prompt_hash, refuse_others
from one_answer import answer_pairs, counts_in_words, in_words, with_outcomes
from options import check_at_least, check_between, check_choice, flag_of, parse_config, refuse_ranks
from prompt import Prompt, load_prompt, prompt_of, render
from rank import SCHEDULES, n_judgements, named_by_content, pair_of, places_of, rank_all, record_of, table
from reward import benchmark_verdict, majority, training_verdict
from sample import Sampler, check_model, check_options, check_prompts, load_model, sampling_of
from split import Split
from tokenizer import StreamDecoder, Tokenizer

# ---------------------------------------------------------------------------------------------------------- one pair


@dataclass(frozen=True)
class Judge:
    """A sampler with everything that turns a pair into a judgement record."""
    sampler: Sampler
    tokenizer: Tokenizer
    prompt: Prompt
    sampling: Sampling  # its n is the number of votes
    budgets: tuple[int, ...] = ()  # also record the verdict that each vote's first so many tokens hold
    verdict_of: Callable = benchmark_verdict  # of a vote's text
    rubric: str = ""  # what to weigh by, where a pair has none of its own

    def encode(self, pair):
        pair, = with_rubric([pair], self.rubric, say=False)
        return self.tokenizer.chat(render(self.prompt, pair))

    def judge(self, pairs, on_token=None, prompts=None, bar=None):
        """Yields (index, judgement record) as they are done; verdicts by the benchmarks' rule. prompts: the pairs'
        token ids, if they are known. bar: a tqdm that shows how it goes."""
        prompts = [self.encode(pair) for pair in pairs] if prompts is None else prompts
        for i, rollouts in self.sampler.stream(prompts, self.sampling, on_token, bar):
            yield i, self.record(pairs[i], prompts[i], [self.vote(rollout) for rollout in rollouts])

    def judge_one(self, question, answer_a, answer_b, on_token=None, rubric=""):
        """The judgement record of one question with two answers, all texts."""
        (_, record), = self.judge([pair_of_texts(question, answer_a, answer_b, rubric)], on_token)
        return record

    def vote(self, rollout):
        text = self.tokenizer.decode(rollout.ids)
        vote = {"text": text, "n_tokens": len(rollout.ids), "finished": rollout.finished,
                "verdict": self.verdict_of(text), "seconds": round(rollout.seconds, 3)}
        if self.budgets:
            vote["at"] = {str(n): self.verdict_of(self.tokenizer.decode(rollout.ids[:n])) for n in self.budgets}
        return vote

    def record(self, pair, prompt_ids, votes):
        record = {"id": pair.id, "prompt_hash": prompt_hash(prompt_ids), "n_prompt_tokens": len(prompt_ids),
                  "votes": votes, "verdict": majority([vote["verdict"] for vote in votes]), "winner": pair.winner,
                  "source": pair.source, "domain": pair.domain, "subset": pair.subset, "item": pair.item,
                  "seconds": max(vote["seconds"] for vote in votes)}
        return record | {"swapped": True} if pair.id.endswith(SWAPPED) else record


# ------------------------------------------------------------------------------------------- inside a training loop


class HeldOut:
    """The evaluation inside a training loop: greedy judgements of some pairs, shared out over the ranks."""

    def __init__(self, path, n_pairs, prompt, max_new_tokens, tokenizer, ranks):
        """prompt: a Prompt, or None where every pair is ready-made."""
        self.all_pairs = [pair for pair in read_pairs(path) if pair.winner is not None][:n_pairs]
        if not self.all_pairs:
            raise ValueError(f"{path}: no labelled pairs to evaluate on")
        self.pairs = ranks.share(self.all_pairs)  # this rank's
        self.prompts = [tokenizer.chat(render(prompt, pair)) for pair in self.pairs]
        self.sampling = Sampling(max_new_tokens=max_new_tokens, temperature=0.0, stop=tokenizer.stop_ids)
        self.prompt, self.tokenizer, self.ranks = prompt, tokenizer, ranks

    def check(self, model, trained):
        """Before training on these pairs: is what is held out really so, and can the model read it?"""
        check_context(model, [len(ids) for ids in self.prompts], "prompts of --eval-data", self.ranks.main)
        seen = {contents(pair) for pair in trained}
        n_seen = sum(contents(pair) in seen for pair in self.all_pairs)
        if n_seen and self.ranks.main:
            print(f"note: {n_seen} of {len(self.all_pairs)} pairs of --eval-data are trained on, too: eval_accuracy "
                  "will not be that of pairs held out; take them out of --data")

    def judge(self, sampler, bar=None):
        """({"eval_accuracy", "eval_accuracy_DOMAIN", "eval_no_verdict", "eval_tokens", "eval_s"}, the records)."""
        began = time.perf_counter()
        judge = Judge(sampler, self.tokenizer, self.prompt, self.sampling)
        mine = [record for _, record in judge.judge(self.pairs, prompts=self.prompts, bar=bar)]
        records = [record for share in self.ranks.gather_shares(mine) for record in share]
        metrics = {"eval_accuracy": accuracy(records)}
        for domain in sorted({record["domain"] for record in records if record["domain"]}):
            metrics[f"eval_accuracy_{domain}"] = accuracy([r for r in records if r["domain"] == domain])
        votes = [record["votes"][0] for record in records]
        metrics["eval_no_verdict"] = sum(vote["verdict"] is None for vote in votes) / len(votes)
        metrics["eval_tokens"] = sum(vote["n_tokens"] for vote in votes) / len(votes)
        return metrics | {"eval_s": time.perf_counter() - began}, records


def note_verdicts(chains, path, answer_only):
    """Says of what is going to be learned that it holds no verdict, contradicts its label, or is one letter."""
    labels = [chain.pair.winner for chain in chains]
    if not answer_only:
        verdicts = [training_verdict(chain.judgement) for chain in chains]
        n_against = sum(None not in pair and pair[0] != pair[1] for pair in zip(verdicts, labels))
        if None in verdicts or n_against:
            print(f"note: {path}: of {len(chains)} judgements {verdicts.count(None)} do not end in a verdict such as "
                  f"<answer>[[A]]</answer>, {n_against} in another than the label; they are learned as they are")
        labels = verdicts
    note_one_label(labels, path)


def contents(pair):
    """What a pair holds, whichever answer is A."""
    answers = sorted(json.dumps(answer) for answer in (pair.answer_a, pair.answer_b))
    return json.dumps([pair.prompt, answers, pair.rendered, pair.rubric])


def accuracy(records):
    """The share whose verdict is the label; no verdict is wrong."""
    return sum(record["verdict"] == record["winner"] for record in records) / len(records)


# ------------------------------------------------------------------------------------------------------ command line


@dataclass(frozen=True)
class Config:
    model: str | None = None  # Hugging Face folder of the judge
    prompt: str | None = None  # name in data/prompts or a file; without it, the prompt that the model was trained with
    question: str | None = None  # judge one pair: the question ...
    answer_a: str | None = None  # ... the first answer ...
    answer_b: str | None = None  # ... and the second
    answer: str | None = None  # or judge one answer to the question, in both orders, against ...
    reference: str | None = None  # ... this one
    question_file: str | None = None  # read the question from a file
    answer_a_file: str | None = None  # read the first answer from a file
    answer_b_file: str | None = None  # read the second answer from a file
    answer_file: str | None = None  # read the one answer from a file
    reference_file: str | None = None  # read its reference from a file
    rubric: str | None = None  # a file: what to weigh by, where a pair has no rubric of its own
    pairs: str | None = None  # judge a file or folder of pairs, in any format that data/pairs.py reads ...
    answers: tuple[str, ...] = ()  # rank these answers to --question, 2 to 64 ...
    answer_files: tuple[str, ...] = ()  # ... or the ones in these files
    rank: str | None = None  # rank the answers of a file of questions: {"id", "prompt", "answers": [...]} a line
    schedule: str = "all"  # of a ranking: all pairs, circular (as many as answers), or swiss (N/2 log2 N, adaptive)
    both_orders: bool = False  # of a ranking: judge a pair in both orders, and count a win only if they agree
    out: str | None = None  # ... into this file (JSON lines) of judgements, or of rankings; also for --answer
    limit: int = 0  # only the first so many pairs or questions, 0 = all
    skip_bad: bool = False  # skip unreadable records and count them, instead of stopping before any work
    votes: int = 1  # judgements per pair; the verdict is their majority
    temperature: float = 0.0  # 0 takes the likeliest token; votes need more
    top_p: float = 1.0  # sample from the smallest set of likeliest tokens with this probability
    top_k: int = 0  # sample from so many likeliest tokens, 0 = all
    max_new_tokens: int = 8192  # longest judgement
    n_slots: int = 64  # judgements written at once, as far as their keys and values fit kv_gb
    kv_gb: float = 0.0  # GB of keys and values of what is written at once; 0 = what is free
    eager: bool = False  # on a GPU, write without CUDA graphs: slower, to look for a fault
    seed: int = 0  # of the sampling, and of the A/B order where a source has chosen and rejected
    device: str = "auto"  # cpu, cuda, or auto
    dtype: str = "auto"  # float32, bfloat16, or auto: bfloat16 on a GPU
    threads: int = 0  # CPU threads, 0 = PyTorch's choice
    batch_invariant: bool = False  # a judgement's bits do not depend on what is judged beside it; slower, needs a GPU

    def __post_init__(self):
        check_judging(self)
        check_model(self)
        if self.pairs and self.rank:
            raise ValueError("--pairs and --rank are both given; judge pairs or rank answers")
        file = "--rank" if self.rank else "--pairs"
        for name in TEXTS:
            if getattr(self, name) is not None and getattr(self, name + "_file") is not None:
                raise ValueError(f"{flag_of(name)} and its -file are both given; give one")
            if (self.pairs or self.rank) and is_given(self, name):
                raise ValueError(f"{file} and {flag_of(name)} are both given; judge a file or one pair")
            if (self.answers or self.answer_files) and name != "question" and is_given(self, name):
                raise ValueError(f"{flag_of(name)} is one of a pair to judge; give all answers to rank as --answers")
        one = is_given(self, "answer")
        if one and not is_given(self, "reference"):
            raise ValueError(f"--answer needs --reference: {NO_REFERENCE}")
        if is_given(self, "reference") and (not one or is_given(self, "answer_a") or is_given(self, "answer_b")):
            raise ValueError("--reference goes with --answer, the one answer to compare with it, and with no other" +
                             ("" if one else "; --answer is missing or empty"))
        if bool(self.pairs or self.rank) != bool(self.out) and not one:
            raise ValueError("--pairs or --rank, the file to judge, and --out, the file to write, need each other")
        if not (self.pairs or self.rank) and (self.limit or self.skip_bad):
            raise ValueError("--limit and --skip-bad are about the records of --pairs or --rank, a file to judge")
        check_ranking(self)


def check_ranking(cfg):
    """The options of ranking answers."""
    check_choice(cfg, "schedule", *SCHEDULES)
    if cfg.answers and cfg.answer_files:
        raise ValueError("--answers and --answer-files are both given; give one")
    answers = cfg.answers or cfg.answer_files
    if answers and (cfg.pairs or cfg.rank):
        raise ValueError(f"{'--rank' if cfg.rank else '--pairs'} and answers to rank are both given; give one")
    if answers and not 2 <= len(answers) <= MOST_ANSWERS:
        raise ValueError(f"answers to rank: {len(answers)} given, it takes 2 to {MOST_ANSWERS}")
    if (cfg.both_orders or cfg.schedule != "all") and not (cfg.rank or answers):
        raise ValueError("--schedule and --both-orders are about answers to rank: --rank FILE, or --question with "
                         "--answers")


TEXTS = ("question", "answer_a", "answer_b", "answer", "reference")  # options that have a twin, NAME_file


def is_given(cfg, name):
    return getattr(cfg, name) is not None or getattr(cfg, name + "_file") is not None


def check_judging(cfg):
    """The options of judging, this script's or evaluate.py's."""
    check_options(cfg)
    check_between(cfg, 1, 1024, "votes")
    check_at_least(cfg, 0, "limit")
    if cfg.votes > 1 and cfg.temperature == 0:
        raise ValueError("--votes above 1 needs a --temperature above 0: greedy votes are all the same")


def load_judge(cfg, budgets=(), split=Split()):
    """The Judge that a script's options describe (this script's Config or evaluate.py's)."""
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    rubric, prompt = rubric_of(cfg), prompt_for(cfg.model, cfg.prompt, cfg.rubric)
    model, tokenizer = load_model(cfg.model, cfg.device, cfg.dtype, cfg.batch_invariant, split)
    sampling = sampling_of(cfg, cfg.votes, tokenizer)
    return Judge(Sampler(model, cfg.n_slots, cfg.kv_gb, graphs=not cfg.eager), tokenizer, prompt, sampling, budgets,
                 rubric=rubric)


def prompt_for(folder, given, rubric=None):
    """The Prompt with which the model in a folder is asked; ValueError if it is no model's, or nothing says how, or
    there is a --rubric that it cannot show."""
    check_folder(folder)
    prompt = prompt_of(folder, given)
    if prompt is None:
        raise ValueError(f"{folder}: has no prompt.txt, so --prompt must say how to ask it: instruct, reasoning, "
                         "direct or a file")
    prompt = load_prompt(prompt)
    if rubric and prompt.rubric is None:
        raise ValueError(f"prompt {prompt.name} has no section [rubric], which --rubric needs: add it, the top of "
                         "prompt.py tells the format, or give another --prompt")
    return prompt


def judge_settings(cfg, judge):
    """What a judgements file depends on: it may only be continued with the same."""
    settings = {"model": str(Path(cfg.model).resolve()), "weights": weights_in(cfg.model),
                "prompt": asdict(judge.prompt),
                "dtype": str(judge.sampler.model.head_vd.dtype).removeprefix("torch.")}
    for name in ("votes", "temperature", "top_p", "top_k", "max_new_tokens", "seed", "batch_invariant"):
        settings[name] = getattr(cfg, name)
    if cfg.rubric:
        settings["rubric"] = rubric_of(cfg)
    return settings | {"budgets": list(judge.budgets)} if judge.budgets else settings


def weights_in(folder):
    """What tells that a model's files are still the same: name, bytes and time of each."""
    files = sorted(Path(folder).glob("*.safetensors"))
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def rubric_of(cfg):
    return text_of_file(cfg.rubric, "--rubric") if cfg.rubric else ""


def texts_from_options(cfg, names=("question", "answer_a", "answer_b")):
    """The texts of these options, each of which may come from a file."""
    def text(name):
        if file := getattr(cfg, name + "_file"):
            return text_of_file(file, f"{flag_of(name)}-file")
        if getattr(cfg, name) is None:
            fail(f"{flag_of(name)} is missing: give a question and two answers, or --pairs FILE --out FILE")
        return getattr(cfg, name)
    return [text(name) for name in names]


def first_pairs(pairs, limit):
    """The first `limit` pairs, all if it is 0; and one more if it is the last one's other order."""
    if not 0 < limit < len(pairs):
        return pairs
    return pairs[:limit + (pairs[limit].id == pairs[limit - 1].id + SWAPPED)]


def text_of_file(file, flag):
    try:
        content = Path(file).read_text(encoding="utf-8-sig").removesuffix("\n")  # that ends its last line
    except UnicodeDecodeError as e:
        raise ValueError(f"{file}: byte {e.start} is not UTF-8: convert the file") from None
    if not content.strip():
        raise ValueError(f"{file}: is empty; {flag} is a file with the text")
    return content


def judge_pairs(cfg):
    """--pairs FILE --out FILE."""
    refuse_existing(cfg.out)
    pairs = read_pairs(cfg.pairs, cfg.seed, cfg.skip_bad)
    pairs = with_rubric(first_pairs(pairs, cfg.limit), rubric_of(cfg))
    judge = load_judge(cfg)
    settings = judge_settings(cfg, judge) | {"pairs": str(Path(cfg.pairs).resolve())}
    records = judge_file(judge, encode_all(judge, pairs, cfg.skip_bad), cfg.out, settings)
    n_none = sum(record["verdict"] is None for record in records)
    print(f"{len(records)} pairs judged, {n_none} without a verdict: {cfg.out}")
    if counts := counts_in_words(records):
        print(counts)


def show_one(cfg):
    """A question and two answers."""
    texts = texts_from_options(cfg)
    show_judging(load_judge(cfg), pair_of_texts(*texts))


def show_answer(cfg):
    """A question, one answer and a reference."""
    texts = texts_from_options(cfg, ["question", "answer", "reference"])
    if cfg.out:
        refuse_existing(cfg.out)
    judge, pairs, records = load_judge(cfg), answer_pairs(*texts), []
    check_prompts([judge.encode(pair) for pair in pairs], judge.sampler.model)  # both, before the first is shown
    for pair in pairs:
        print("reference as A, answer as B:" if records else "answer as A, reference as B:")
        records.append(show_judging(judge, pair))
        print()
    records = with_outcomes(records)
    if cfg.out:
        write_records(cfg.out, records)
    print(f"the answer is {in_words(records)}")


def show_judging(judge, pair):
    """Judges a pair; the first vote is shown as it is written. Returns the judgement record."""
    stream = StreamDecoder(judge.tokenizer)

    def show(_, sample, token):
        if sample == 0:
            print(stream.push(token), end="", flush=True)
    (_, record), = judge.judge([pair], show)
    print(stream.flush())
    verdict = record["verdict"].upper() if record["verdict"] else "none"
    counted = ""
    if judge.sampling.n > 1:
        verdicts = [vote["verdict"] for vote in record["votes"]]
        counted = f" (A {verdicts.count('a')}, B {verdicts.count('b')}, none {verdicts.count(None)})"
    n_tokens = sum(vote["n_tokens"] for vote in record["votes"])
    print(f"verdict: {verdict}{counted}, {n_tokens} tokens in {record['seconds']:.1f} s")
    return record


def rank_one(cfg):
    """--question TEXT --answers TEXT TEXT ..."""
    question, = texts_from_options(cfg, ["question"])
    answers = list(cfg.answers) or [text_of_file(file, "--answer-files") for file in cfg.answer_files]
    question = named_by_content([{"role": "user", "content": question}], answers)
    judge = load_judge(cfg)
    check_prompts([judge.encode(pair) for pair in longest_pairs(judge, question)], judge.sampler.model)
    (_, found), = rank_all(judge, [question], cfg.schedule, cfg.both_orders, cfg.seed)
    record = record_of(question, found)
    print(table(found, answers))
    print(f"{record['n_judgements']} judgements, {record['n_tokens']} tokens")


def rank_file(cfg):
    """--rank FILE --out FILE."""
    refuse_existing(cfg.out)
    questions = read_questions(cfg.rank, cfg.skip_bad)
    questions = with_rubric(questions[:cfg.limit] if cfg.limit else questions, rubric_of(cfg))
    judge = load_judge(cfg)
    settings = judge_settings(cfg, judge) | {"questions": str(Path(cfg.rank).resolve()), "schedule": cfg.schedule,
                                             "both_orders": cfg.both_orders}
    longest = [pair for question in questions for pair in longest_pairs(judge, question)]
    kept = {pair.item for pair, _ in encode_all(judge, longest, cfg.skip_bad)}
    questions = [question for question in questions if question.id in kept]
    file = JudgementFile(cfg.out, settings)
    refuse_others(file.partial, file.done, keys_among(judge, questions, file.done))
    total = sum(n_judgements(question, cfg.schedule, cfg.both_orders) for question in questions)
    records = {}
    try:
        with tqdm(total=total, desc="rank", unit="judgement") as bar:
            recalling = RecallingJudge(judge, file)
            for i, found in rank_all(recalling, questions, cfg.schedule, cfg.both_orders, cfg.seed, bar):
                records[i] = record_of(questions[i], found)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{len(file.done)} of {total} judgements are made, and kept in {file.partial}; the "
                                "same command goes on") from None
    file.finish([records[i] for i in range(len(questions))])
    print(f"{len(questions)} questions ranked by {total} judgements: {cfg.out}")


def longest_pairs(judge, question):
    """Pairs of a question's answers: if the prompt can show them, and the model can read them, then also all others.

    They are the two longest; and the longest conversation with the longest other, since that shows the prompt twice.
    """
    places = places_of(question.answers)
    different = [places.index(k) for k in range(1 + max(places))]  # equal ones are not compared
    different = different if len(different) > 1 else [0, 1]
    texts = {k: texts_of(question.answers[k]) for k in different}
    by_length = sorted(different, key=lambda k: sum(len(judge.tokenizer.encode(text)) for text in texts[k]))
    pairs = [(by_length[-2], by_length[-1])]
    if talks := [k for k in by_length if len(texts[k]) > 1]:
        pairs.append(([k for k in by_length if k != talks[-1]][-1], talks[-1]))
    return [pair_of(question, i, j) for i, j in dict.fromkeys(pairs)]


def keys_among(judge, questions, keys):
    """Those of these keys of judgements that are of pairs of these questions, as they read now."""
    by_id, found = {question.id: question for question in questions}, set()
    for name, _ in keys:
        match = re.fullmatch(r"(.*)/(\d+)-(\d+)", name, re.DOTALL)
        if match and match[1] in by_id and max(int(match[2]), int(match[3])) < len(by_id[match[1]].answers):
            pair = pair_of(by_id[match[1]], int(match[2]), int(match[3]))
            found.add(key_of(pair, judge.encode(pair)))
    return found


def main(cfg):
    refuse_ranks("judge.py")  # evaluate.py shares pairs out
    if cfg.pairs:
        judge_pairs(cfg)
    elif cfg.rank:
        rank_file(cfg)
    elif cfg.answers or cfg.answer_files:
        rank_one(cfg)
    elif is_given(cfg, "answer"):
        show_answer(cfg)
    else:
        show_one(cfg)


if __name__ == "__main__":
    with one_line_errors():
        main(parse_config(Config))
