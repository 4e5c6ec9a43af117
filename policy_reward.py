"""The judge as the reward of another policy: what it writes is compared, and earns (wins - losses) / comparisons.

    reward = PolicyReward(load_judge(Config(model=DIR)))        TRL: GRPOTrainer(reward_funcs=reward, ...)
    compute_score                                               veRL: the custom reward function in this file

A judge of pairs has no score for one completion. It is compared with the other completions of the same prompt, or with
a reference answer. Which completions belong together is told by what their prompts hold, never by places in the batch:
batches are shuffled, and groups may differ in size. Of a judge that counts well, all pairs compared:

    prompt    completion    reward
    sort 21   12               1.0    won against 15 and 21
    say hi    hello           None    the only one of its prompt: there is nothing to compare it with
    sort 21   15               0.0    won against 21, lost against 12
    sort 21   21              -1.0
    sort 21   12               1.0    equal to the first, and not judged again
"""

import hashlib
import inspect
import json
import sys
import typing
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent))  # veRL loads this file by its path, from elsewhere
from data.fields import Bad, at, clean, keys_of  # noqa: E402
from data.pairs import ROLES, Question  # noqa: E402
from judge import Config, Judge, load_judge  # noqa: E402
from options import has_type  # noqa: E402
from rank import MOST_ANSWERS, SCHEDULES, pair_of, rank_all  # noqa: E402

UNREADABLE = -1.0  # not 0 or None: to write more than the judge can read must not be a way out


@dataclass(frozen=True)
class PolicyReward:
    """A reward function as TRL calls it. The same rows earn the same rewards in any order and in any batch, as far as
    the rounding of the judge's arithmetic does not turn a verdict."""
    judge: Judge
    schedule: str = "all"  # who is compared with whom in a group, see rank.py
    both_orders: bool = False  # judge each comparison twice, with either completion as A; a win needs both
    reference: str | None = None  # a column of reference answers: compare with these, not with each other
    seed: int = 0  # of who meets whom, and who is A
    __name__ = "policy_reward"  # TRL logs it under this name

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule is {self.schedule!r}: give one of {', '.join(SCHEDULES)}")
        if self.context and self.judge.sampling.max_new_tokens >= self.context:
            raise ValueError(f"the judge can read {self.context} tokens, and max_new_tokens, which are for its "
                             f"judgement, is {self.judge.sampling.max_new_tokens}: give less, or nothing can be judged")

    @property
    def context(self):
        return self.judge.sampler.model.config.raw.get("max_position_embeddings")

    def __call__(self, prompts, completions, **columns):
        """A reward for each completion. It is None (TRL leaves such a row out) where there is nothing to judge by: for
        the only completion of a prompt, without a reference answer, or if the prompt is longer than the judge can read.

        prompts, completions: texts or lists of messages; columns: the dataset's, and what TRL adds.
        """
        rows = read_rows(prompts, completions, columns, self.reference)
        rewards, questions, members = [None] * len(rows), [], []
        for key, group in groups_of(rows, self.reference).items():
            prompt, reference = rows[group[0]].prompt, rows[group[0]].reference
            if not self.can_read(prompt, "", "" if reference is None else reference):
                continue
            readable = [i for i in group if self.can_compare(rows[i])]
            for i in set(group) - set(readable):
                rewards[i] = UNREADABLE
            if readable and (len(group) > 1 or reference is not None):
                questions.append(question_of(key, [rows[i] for i in readable]))
                members.append(readable)

        rankings = []
        for k, found in rank_all(self.judge, questions, self.schedule, self.both_orders, self.seed):
            rankings.append(found)
            for i in members[k]:
                rewards[i] = found.scores[questions[k].answers.index(rows[i].completion)]
        if "log_metric" in columns:  # of TRL
            for name, value in statistics(rankings, rewards).items():
                columns["log_metric"](f"judge/{name}", value)
        return rewards

    def can_compare(self, row):
        """Can the judge read the completion beside the reference; or beside a copy of itself, since of completions for
        which this holds any two can be read together?"""
        return self.can_read(row.prompt, row.completion, row.completion if row.reference is None else row.reference)

    def can_read(self, prompt, one, other):
        """Is there room for these two answers and a judgement of them?"""
        n_tokens = len(self.judge.encode(pair_of(Question("policy", prompt, [one, other]), 0, 1)))
        return not self.context or n_tokens + self.judge.sampling.max_new_tokens <= self.context


def groups_of(rows, reference):
    """{key: numbers of the rows that are compared}: those of one prompt, or, with references, all equal ones. The key
    is a hash of what they hold, by which rank.py draws."""
    groups = {}
    for i, row in enumerate(rows):
        if reference is None:
            content = [row.prompt]
        elif row.reference is None:
            continue
        else:
            content = [row.prompt, row.reference, row.completion]
        key = hashlib.blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()
        groups.setdefault(key, []).append(i)
    return groups


def question_of(key, rows):
    """What rank.py is asked: the different completions, in an order that is not the batch's, and the reference."""
    answers = [json.loads(answer) for answer in sorted({json.dumps(row.completion) for row in rows})]
    if len(answers) > MOST_ANSWERS:
        raise ValueError(f"a prompt has {len(answers)} different completions, of which {MOST_ANSWERS} can be compared "
                         "with each other: give a reference, or make groups smaller")
    return Question(key, rows[0].prompt, answers if rows[0].reference is None else [*answers, rows[0].reference])


def statistics(rankings, rewards):
    """What to watch while a policy learns from a judge."""
    records = [record for found in rankings for _, _, record in found.judgements]
    n_judgements = max(len(records), 1)
    return {"judgements": len(records),
            "frac_no_verdict": sum(record["verdict"] is None for record in records) / n_judgements,
            "orders_contradict": sum(len(found.inconsistent["orders"]) for found in rankings),
            "frac_none": rewards.count(None) / max(len(rewards), 1)}


# ---- what trainers hand over


@dataclass(frozen=True)
class Row:
    """A completion and what it answers."""
    prompt: list[dict]
    completion: str | list[dict]
    reference: str | list[dict] | None


def read_rows(prompts, completions, columns, reference):
    """The Rows of a batch. ValueError names the first value that is no text or conversation."""
    given = {"completions": completions, "prompts": prompts}
    if reference is not None:
        if reference not in columns:
            raise ValueError(f'no column "{reference}", where the reference answers should be (found '
                             f"{keys_of(columns)})")
        given[reference] = columns[reference]
    for name, values in given.items():
        if not isinstance(values, (list, tuple, np.ndarray)) or len(values) != len(completions):
            raise ValueError(f"{name}: need a list, one element for each completion, got {values!r:.60}")
    rows = []
    for i in range(len(completions)):
        with at(f"prompts[{i}]"):
            prompt = read_prompt(prompts[i])
        with at(f"completions[{i}]"):
            completion = read_answer(completions[i])
        with at(f"{reference}[{i}]"):
            wanted = None if reference is None or columns[reference][i] is None else read_answer(columns[reference][i])
        rows.append(Row(prompt, completion, wanted))
    return rows


def read_prompt(value):
    """A prompt's messages; a text is the user's."""
    if isinstance(value, str):
        return [{"role": "user", "content": clean(value, "the text")}]
    return read_messages(value)


def read_answer(value):
    """A text, also of one message; or the messages of an answer in several turns."""
    if isinstance(value, str):
        return clean(value, "the text")
    messages = read_messages(value)
    if messages[0]["role"] != "assistant" or messages[-1]["role"] != "assistant":
        raise Bad("an answer must begin and end with a message of the assistant")
    return messages[0]["content"] if len(messages) == 1 else messages


def read_messages(value):
    """[{"role", "content"}], other fields left out. Files of Parquet give arrays for lists."""
    value = value.tolist() if isinstance(value, np.ndarray) else value
    if not isinstance(value, list) or not value:
        raise Bad(f"need a text or a list of messages, got {value!r:.60}")
    for message in value:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise Bad(f'need messages of the form {{"role", "content"}}, got {message!r:.60}')
        if message["role"] not in ROLES or not isinstance(message["content"], str):
            raise Bad(f"the judge can be shown texts of {', '.join(ROLES)} only, got {message!r:.60}")
    return [{"role": message["role"], "content": clean(message["content"], "content")} for message in value]


# ---- veRL


JUDGE_OPTIONS = ("model", "prompt", "votes", "temperature", "top_p", "top_k", "max_new_tokens", "n_slots", "kv_gb",
                 "eager", "seed", "device", "dtype", "threads", "batch_invariant", "rubric")  # that load_judge reads


def judge_config(options):
    """The judge.Config with these options; ValueError names the first that is none, or that has another type."""
    types = typing.get_type_hints(Config)
    for name, value in options.items():
        if name not in JUDGE_OPTIONS:
            raise ValueError(f"judge.{name}: is no option of a judge, which has {', '.join(JUDGE_OPTIONS)}")
        if not has_type(value, types[name]):
            raise ValueError(f"judge.{name}: is {value!r:.60}, need {inspect.formatannotation(types[name])}")
    return Config(**options)


@cache
def loaded(cfg, **how):
    """The reward with the judge of a judge.Config; loaded once in a process."""
    return PolicyReward(load_judge(cfg), **how)


def compute_score(data_sources, solution_strs, ground_truths, extra_infos, judge, schedule="all", both_orders=False,
                  against_truth=False, prompt_key="prompt", seed=0):
    """A reward for each solution, as veRL's reward manager "batch" asks for them; 0.0 where PolicyReward says None.

    What follows extra_infos comes from reward_kwargs in veRL's configuration. judge: JUDGE_OPTIONS, such as model and
    max_new_tokens; against_truth: compare with the ground truths, not within a prompt's group; prompt_key: where in
    extra_info the prompt stands, as text or messages (veRL hands over no other).
    """
    reward = loaded(judge_config(judge), schedule=schedule, both_orders=both_orders, seed=seed,
                    reference="ground_truths" if against_truth else None)
    prompts = []
    for i, info in enumerate(extra_infos):
        if not isinstance(info, dict) or prompt_key not in info:
            found = keys_of(info) if isinstance(info, dict) else info
            raise ValueError(f'extra_infos[{i}]: no "{prompt_key}" (found {found}): write the prompt there when the '
                             "data are made, or name its key by reward_kwargs.prompt_key")
        prompts.append(info[prompt_key])
    rewards = reward(prompts, solution_strs, ground_truths=ground_truths)
    return [0.0 if value is None else value for value in rewards]
