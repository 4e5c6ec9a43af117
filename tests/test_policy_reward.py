"""policy_reward.py and experiments/trl_reward.py. Oracles: judges with known preferences, whose rewards are worked out
by hand; the same rows in other batches; rank.py's scores of each group alone; the toy's own totals."""

import importlib.util
import random
import sys
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import policy_reward  # noqa: E402
from data import toy  # noqa: E402
from draw import Sampling  # noqa: E402
from experiments import trl_reward  # noqa: E402
from judge import Config, load_judge  # noqa: E402
from options import parse_config  # noqa: E402
from policy_reward import PolicyReward, compute_score  # noqa: E402
from rank import rank  # noqa: E402
from test_sample import make_folder  # noqa: E402


class FakeJudge:
    """Says what prefer(answer a, answer b) says; reads one character as one token. It answers in no order."""

    def __init__(self, prefer, context=None, max_new_tokens=10):
        self.prefer, self.asked = prefer, []
        self.sampling = Sampling(max_new_tokens=max_new_tokens)
        raw = {"max_position_embeddings": context} if context else {}
        self.sampler = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(raw=raw)))

    def encode(self, pair):
        return [0] * len(pair.prompt[0]["content"] + pair.answer_a + pair.answer_b)

    def judge(self, pairs, bar=None):
        self.asked += [(pair.prompt[-1]["content"], pair.answer_a, pair.answer_b) for pair in pairs]
        for i in random.Random(0).sample(range(len(pairs)), len(pairs)):
            yield i, {"verdict": self.prefer(pairs[i].answer_a, pairs[i].answer_b)}


def smaller(a, b):
    return "a" if int(a) < int(b) else "b"


def moody(a, b):
    """Verdicts that depend on both texts and their order, and are sometimes missing."""
    return ["a", "b", "a", "b", None][zlib.crc32(f"{a}|{b}".encode()) % 5]


# ---- groups


def test_the_table_at_the_top_of_the_file():
    lines = [line.split(None, 5) for line in policy_reward.__doc__.splitlines() if line[4:11] in ("sort 21", "say hi ")]
    rows = [(f"{a} {b}", "99" if completion == "hello" else completion, None if reward == "None" else float(reward))
            for a, b, completion, reward, *_ in lines]
    assert len(rows) == 5
    judge = FakeJudge(smaller)
    prompts, completions, rewards = zip(*rows)
    assert PolicyReward(judge)(list(prompts), list(completions)) == list(rewards) == [1.0, None, 0.0, -1.0, 1.0]
    assert Counter(tuple(sorted(answers)) for _, *answers in judge.asked) == {
        ("12", "15"): 1, ("12", "21"): 1, ("15", "21"): 1}, "equal completions are judged once"


@pytest.mark.parametrize("schedule", ["all", "circular", "swiss"])
@pytest.mark.parametrize("both_orders", [False, True])
def test_a_reward_depends_on_the_group_and_not_on_the_batch(schedule, both_orders):
    """Groups of 2 to 7, whole or interleaved, in any order, beside others or alone: the same rewards."""
    rng = random.Random(1)
    groups = {f"question {n}": [f"{n}/{rng.random():.3f}" for _ in range(n)] for n in range(2, 8)}
    groups["question 7"][3] = groups["question 7"][0]
    rows = [(prompt, completion) for prompt, group in groups.items() for completion in group]

    def rewards_of(rows):
        reward = PolicyReward(FakeJudge(moody), schedule, both_orders, seed=3)
        return dict(zip(rows, reward([prompt for prompt, _ in rows], [completion for _, completion in rows])))
    expected = rewards_of(rows)
    assert len(set(expected.values())) >= 4 and all(-1 <= value <= 1 for value in expected.values())
    for _ in range(5):
        assert rewards_of(rng.sample(rows, len(rows))) == expected
    for prompt in groups:
        alone = [row for row in rows if row[0] == prompt]
        assert rewards_of(alone).items() <= expected.items()


def test_another_seed_draws_other_places():
    rows = ["q"] * 6, [str(i) for i in range(6)]
    found = [tuple(PolicyReward(FakeJudge(moody), "circular", seed=seed)(*rows)) for seed in (0, 0, 1, 2, 3)]
    assert found[0] == found[1] and len(set(found)) > 1


def test_messages_and_texts_and_what_stands_before_the_question_tell_groups_apart():
    def chat(text, system=None):
        before = [{"role": "system", "content": system}] if system else []
        return before + [{"role": "user", "content": text}]
    prompts = [chat("q"), "q", chat("q", "be brief"), chat("q", "be long"), chat("q", "be brief")]
    completions = ["1", [{"role": "assistant", "content": "2", "tool_calls": None}], "3", "4", "5"]
    assert PolicyReward(FakeJudge(smaller))(prompts, completions) == [1.0, -1.0, 1.0, None, -1.0]


def test_a_judge_that_likes_a_place_pays_nothing_in_both_orders():
    metrics = {}
    reward = PolicyReward(FakeJudge(lambda a, b: "a"), both_orders=True)
    assert reward(["q"] * 4, list("1234"), log_metric=metrics.__setitem__, trainer_state=None,
                  completion_ids=[[1]] * 4) == [0.0] * 4
    assert metrics == {"judge/judgements": 12, "judge/frac_no_verdict": 0, "judge/orders_contradict": 6,
                       "judge/frac_none": 0}
    assert reward.__name__ == "policy_reward" and PolicyReward.__name__ == "PolicyReward"
    assert reward(["q"] * 3, ["1"] * 3) == [0.0] * 3, "all equal: nobody is better"
    assert reward([], []) == []


def test_with_references_each_is_compared_with_its_own():
    judge = FakeJudge(smaller)
    reward = PolicyReward(judge, both_orders=True, reference="solution")
    prompts, completions = ["p", "p", "p", "q", "q", "p"], ["1", "5", "9", "1", "2", "1"]
    solutions = ["5", "5", "5", None, "1", "0"]
    assert reward(prompts, completions, solution=solutions) == [1.0, 0.0, -1.0, None, -1.0, -1.0]
    assert len(judge.asked) == 2 * 4, "a completion equal to its reference is not judged"
    biased = PolicyReward(FakeJudge(lambda a, b: "a"), reference="solution")
    found = biased(["p"] * 400, [str(i) for i in range(400)], solution=["x"] * 400)
    assert 150 < found.count(1.0) < 250 and found.count(1.0) + found.count(-1.0) == 400, "places are drawn evenly"


def test_what_the_judge_cannot_read():
    """Room for 30 characters beside the judgement's 10. A completion that could not stand beside its own copy loses."""
    judge = FakeJudge(smaller, context=40)
    reward = PolicyReward(judge)
    prompts = ["p" * 20] * 3 + ["p" * 31] * 2
    assert reward(prompts, ["12345", "12346", "123456", "1", "2"]) == [1.0, -1.0, -1.0, None, None]
    assert len(judge.asked) == 1
    assert reward(["p"] * 2, ["1", "2" * 15]) == [0.0, -1.0]
    reward = PolicyReward(judge, reference="right")
    assert reward(["p" * 20] * 3, ["1" * 9, "1" * 10, "1"], right=["1", "1", "1" * 11]) == [-1.0, -1.0, None]


SURROGATE = "\ud83d"


@pytest.mark.parametrize("arguments, words", [
    ((["q"], ["1", "2"]), "prompts: need a list, one element for each completion"),
    (("q", ["1"]), "prompts: need a list"),
    ((["q"], 3), "completions: need a list"),
    ((["q", 3], ["1", "2"]), "prompts[1]: need a text or a list of messages, got 3"),
    ((["q", "q"], ["1", None]), "completions[1]: need a text or a list of messages, got None"),
    ((["q"], [[{"role": "user", "content": "x"}]]), "completions[0]: an answer must begin and end"),
    ((["q"], [[{"role": "assistant", "content": None}]]), "completions[0]: the judge can be shown texts of"),
    (([[{"role": "tool", "content": "x"}]], ["1"]), "prompts[0]: the judge can be shown texts of"),
    (([["x"]], ["1"]), "prompts[0]: need messages of the form"),
    ((["q"], [SURROGATE]), 'completions[0]: "the text" holds a lone surrogate'),
    ((["q"] * 65, [str(i) for i in range(65)]), "a prompt has 65 different completions, of which 64 can be compared"),
])
def test_bad_input_is_told_in_one_line(arguments, words):
    with pytest.raises(ValueError) as e:
        PolicyReward(FakeJudge(smaller))(*arguments)
    assert str(e.value).startswith(words) and "\n" not in str(e.value)


def test_bad_settings_are_told_in_one_line():
    with pytest.raises(ValueError, match="^schedule is 'knockout': give one of all, circular, swiss$"):
        PolicyReward(FakeJudge(smaller), "knockout")
    with pytest.raises(ValueError, match="the judge can read 10 tokens, and max_new_tokens, .* is 10: give less"):
        PolicyReward(FakeJudge(smaller, context=10))
    with pytest.raises(ValueError, match='no column "right", where the reference answers should be .found "left"'):
        PolicyReward(FakeJudge(smaller), reference="right")(["q"], ["1"], left=["2"])
    with pytest.raises(ValueError, match="right: need a list, one element for each completion"):
        PolicyReward(FakeJudge(smaller), reference="right")(["q"], ["1"], right=[])


# ---- veRL


def objects(*values):
    array = np.empty(len(values), object)
    array[:] = values
    return array


def test_verl_hands_over_arrays(monkeypatch):
    made = []

    def load(cfg):
        made.append(cfg)
        return FakeJudge(smaller)
    monkeypatch.setattr(policy_reward, "load_judge", load)
    policy_reward.loaded.cache_clear()
    messages = objects({"role": "user", "content": "q"})  # as Parquet gives a list of structs
    infos = objects({"prompt": messages, "index": 0}, {"prompt": "other"}, {"prompt": messages}, {"prompt": "q"})
    batch = dict(data_sources=objects(*"xxxx"), solution_strs=["3", "9", "1", "2"], extra_infos=infos,
                 ground_truths=["2", "9", None, "2"], judge={"model": "DIR", "max_new_tokens": 7})
    assert compute_score(**batch) == [-1.0, 0.0, 1.0, 0.0]
    assert compute_score(**batch, against_truth=True) == [-1.0, 0.0, 0.0, 0.0]
    assert compute_score(**batch, schedule="swiss", both_orders=True) == [-1.0, 0.0, 1.0, 0.0]
    assert compute_score(**batch) == [-1.0, 0.0, 1.0, 0.0]
    assert made == [Config(model="DIR", max_new_tokens=7)] * 3, "each is loaded once"
    for infos, words in (([None] * 4, "(found None)"), (objects(*[{"index": 0}] * 4), '(found "index")')):
        with pytest.raises(ValueError, match=r'^extra_infos\[0\]: no "prompt" ') as e:
            compute_score(**batch | {"extra_infos": infos})
        assert words in str(e.value) and "\n" not in str(e.value)
    policy_reward.loaded.cache_clear()


@pytest.mark.parametrize("options, words", [
    ({"modle": "DIR"}, "judge.modle: is no option of a judge, which has model, prompt, votes"),
    ({"model": "DIR", "question": "x"}, "judge.question: is no option of a judge"),
    ({"model": "DIR", "max_new_tokens": "7"}, "judge.max_new_tokens: is '7', need int"),
    ({"model": "DIR", "votes": True}, "judge.votes: is True, need int"),
    ({"model": ["DIR"]}, "judge.model: is ['DIR'], need str | None"),
    ({"model": "DIR", "temperature": -1}, "--temperature must be "),
    ({"votes": 1}, "--model is missing"),
])
def test_verl_options_are_checked_before_the_judge_is_loaded(monkeypatch, options, words):
    monkeypatch.setattr(policy_reward, "load_judge", None)
    with pytest.raises(ValueError) as e:
        compute_score(objects("x"), objects("1"), [None], objects({"prompt": "q"}), options)
    assert str(e.value).startswith(words) and "\n" not in str(e.value)


def test_verl_loads_the_file_by_its_path(monkeypatch):
    """Under another name, from another folder: the files beside it are found all the same."""
    monkeypatch.setattr(sys, "path", [place for place in sys.path if Path(place).resolve() != ROOT])
    spec = importlib.util.spec_from_file_location("custom_module", ROOT / "policy_reward.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "custom_module", module)
    spec.loader.exec_module(module)
    assert callable(module.compute_score) and sys.path[-1] == str(ROOT)


# ---- a real judge, and TRL


def test_a_real_judge_gives_the_scores_of_rank(tmp_path):
    """A random model's verdicts: each group's rewards are rank's scores of its answers in the order of their texts."""
    judge = load_judge(Config(model=str(make_folder(tmp_path)), max_new_tokens=24, temperature=2.0, votes=5, threads=1,
                              n_slots=20))
    rows = [(row["prompt"], answer) for row in toy.make("rl", 3, 0)
            for answer in (row["answer_a"], row["answer_b"], "x")]
    prompts, completions = zip(*rows)
    reward = PolicyReward(judge)
    found = reward(list(prompts), list(completions))
    back = reward(list(prompts)[::-1], list(completions)[::-1])[::-1]
    assert found == back
    for i in (0, 3, 6):
        keys = policy_reward.groups_of(policy_reward.read_rows(prompts[i:i + 3], completions[i:i + 3], {}, None), None)
        answers = sorted(completions[i:i + 3], key=lambda text: f'"{text}"')
        question = policy_reward.Question(*keys, prompts[i], answers)
        (_, alone), = policy_reward.rank_all(judge, [question])
        assert [alone.scores[answers.index(text)] for text in completions[i:i + 3]] == found[i:i + 3]
    assert rank(judge, prompts[0], list(completions[:3])).comparisons == [2, 2, 2]


def test_trl_trains_with_it(tmp_path):
    """Two steps of TRL's GRPOTrainer: the rewards that it logs are those of the completions that it logs."""
    pytest.importorskip("trl", reason="needs requirements-peers.txt")
    from transformers import AutoTokenizer
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    n_vocab = toy.write_tokenizer(tmp_path)
    shape = trl_reward.distill.ModelConfig.from_dict(toy.MODEL | {"vocab_size": n_vocab, "num_hidden_layers": 1})
    trl_reward.distill.Model.random(shape, 0).save_pretrained(tmp_path)
    seen = []

    class Recorded(PolicyReward):
        def __call__(self, prompts, completions, **columns):
            rewards = super().__call__(prompts, completions, **columns)
            seen.append((prompts, completions, rewards))
            return rewards
    judge = FakeJudge(lambda a, b: "a" if len(a) < len(b) else "b")
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in ("sort 21345", "flip 12345", "step 54321")]
    config = GRPOConfig(output_dir=str(tmp_path / "out"), max_steps=2, num_generations=4, max_completion_length=4,
                        per_device_train_batch_size=8, use_cpu=True, bf16=False, report_to="none", logging_steps=1,
                        save_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
                        dataloader_pin_memory=False)
    trainer = GRPOTrainer(str(tmp_path), Recorded(judge, both_orders=True), config,
                          train_dataset=Dataset.from_list(rows),
                          processing_class=AutoTokenizer.from_pretrained(tmp_path))
    trainer.train()
    logged = [row for row in trainer.state.log_history if "reward" in row]
    assert len(logged) == len(seen) == 2
    for row, (prompts, completions, rewards) in zip(logged, seen):
        assert len(rewards) == 8 and len({prompt[0]["content"] for prompt in prompts}) == 2
        mean = sum(rewards) / 8
        assert row["rewards/policy_reward/mean"] == pytest.approx(mean, abs=1e-4) and row["judge/judgements"] > 0
        for prompt in prompts:  # by hand: shorter than how many of its group, less longer than how many
            mine = [(c[0]["content"], r) for p, c, r in zip(prompts, completions, rewards) if p == prompt]
            texts = {text for text, _ in mine}
            for text, value in mine:
                wins = sum(len(text) < len(other) for other in texts) - sum(len(text) > len(other) for other in texts)
                assert value == pytest.approx(wins / max(len(texts) - 1, 1))


# ---- the experiment


def test_the_careless_writer_and_the_kinds_of_answers():
    """Shares of 2,000 answers, by the toy's own totals and solutions; the slip is never right."""
    rng, kinds = random.Random(0), Counter()
    for question in trl_reward.questions_of("distill", 2000, 0):
        assert toy.split_of(question) == "distill"
        domain, facts = toy.read_question(question)
        answer = trl_reward.careless_answer(question, rng)
        kind = trl_reward.kind_of(question, answer)
        kinds[kind] += 1
        right = answer == toy.join(facts[1]) if domain == "reasoning" else toy.total(facts, answer) == 7
        assert right == (kind == "right")
        message = [[{"role": "assistant", "content": answer}]]
        assert trl_reward.form_reward([trl_reward.messages(question)], message) == [0.0]
    assert 0.37 < kinds["right"] / 2000 < 0.45 and 0.44 < kinds["slip"] / 2000 < 0.52
    assert sum(kinds.values()) == kinds["right"] + kinds["slip"] + kinds["wrong"]
    digits, chat = "sort 40718", "May open Hello Must say silver Should close Peace"
    for question, answer, kind, form in (
            (digits, "01478", "right", 0), (digits, "40718", "slip", 0), (digits, "01479", "wrong", 0),
            (digits, "0147", "shorter", -1), (digits, "", "shorter", -1), (digits, "014788", "longer", -1),
            (digits, "Hello", "shorter", -1), (chat, "Hello silver Peace", "right", 0),
            (chat, "Hello silver Thanks", "slip", 0), (chat, "Hello silver Peace Peace", "longer", -1),
            (chat, "Hello silver", "shorter", -1), (chat, "Hello  Peace", "shorter", -1)):
        assert trl_reward.kind_of(question, answer) == kind, (question, answer)
        message = [[{"role": "assistant", "content": answer}]]
        assert trl_reward.form_reward([trl_reward.messages(question)], message) == [form], (question, answer)


def test_the_experiment_says_what_it_lacks(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ValueError, match="TRL cannot be imported .*: pip install -r requirements-peers.txt"):
        trl_reward.main(trl_reward.Config(out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        parse_config(trl_reward.Config, argv=["--against", "nobody"])
    assert capsys.readouterr().err.count("\n") == 1
