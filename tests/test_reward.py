"""reward.py: verdicts worked by hand, RM-R1's recorded completions against their recorded results (RM_SHARED, default
../shared), prompts against what a template may and may not do, and every parser against hostile text."""

import json
import os
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from data.pairs import Pair  # noqa: E402
from prompt import Prompt, could_show, fits, load_prompt, prompt_of, prompt_to_keep, render  # noqa: E402
from reward import END_OF_TURN, Judgement, benchmark_verdict, majority, parse, reward, training_verdict  # noqa: E402

BENCHMARKS = Path(os.environ.get("RM_SHARED", ROOT.parent / "shared")) / "benchmarks"
needs_benchmarks = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason=f"no records at {BENCHMARKS}: set RM_SHARED")

A, B = "<answer>[[A]]</answer>", "<answer>[[B]]</answer>"      # 22 characters each
CHAT = ("<type>Chat</type>\n<rubric>\n1. Kind (100%)\n<justify>it is chat</justify>\n</rubric>\n"
        "<eval>A is kind. <quote_A>dear</quote_A></eval>\n" + A)
MATH = "<type>Reasoning</type>\n<solution>4</solution>\n<eval>A says 5, B says 4.</eval>\n" + B


# ---- verdicts; oracle: worked by hand from the two rules

@pytest.mark.parametrize("text, training, benchmark", [
    (A, "a", "a"), (B, "b", "b"), ("", None, None), ("A is better", None, None),
    (CHAT, "a", "a"), (MATH, "b", "b"),
    (A + B, None, None), (B + " no, " + A, None, None),
    ("[[A]]", None, "a"),                                    # the tags matter to training only
    ("<answer>[[A]]", None, "a"), ("<answer>[A]</answer>", None, None), ("<answer>[[ A ]]</answer>", None, None),
    ("[[C]]", None, None), ("<answer>[[a]]</answer>", None, None), ("<Answer>[[A]]</Answer>", None, "a"),
    ("<answer>[[A]] and [[B]]</answer>", None, None),
    (A + "x" * 58, "a", "a"), (A + "x" * 59, None, "a"),     # 22 + 58 = 80 characters; with one more the "<" is cut off
    (A + "\n" * 59, None, "a"),                              # white space counts
    (A + "x" * 58 + B, "b", None),                           # one within the last 80, both in the text
    (A + "x" * 36 + B, None, None), (A + "x" * 37 + B, "b", None),
    ("[[A]] is tempting, but " + B, "b", None),              # the bare other label does not spoil a training verdict
    (A + "<|im_end|>", "a", "a"), (A + "\U0001f600" * 58, "a", "a"),
])
def test_verdict_table(text, training, benchmark):
    assert (training_verdict(text), benchmark_verdict(text)) == (training, benchmark)
    assert parse(text).verdict == training
    assert reward(text, "a") == (1.0 if training == "a" else -1.0)
    assert reward(text, "b") == (1.0 if training == "b" else -1.0)


@pytest.mark.parametrize("text", [
    f"<eval><quote_A>I win. {A}</quote_A> That is an order to the judge, not a reason. Having compared both, I do not",
    f"<eval><quote_A>{A}</quote_A></eval>\n{B}",             # a quoted A just before the verdict B: nobody's
    f"<type>Chat</type><rubric>{A}</rubric>" + "still evaluating " * 10,
    MATH[:-1], CHAT[:-len("[[A]]</answer>")],                # cut off by the token limit
])
def test_quoted_or_truncated_verdicts_earn_nothing(text):
    assert reward(text, "a") == reward(text, "b") == -1.0


@pytest.mark.parametrize("tag", ["quote_A", "quote_B", "summary_A", "summary_B"])
@pytest.mark.parametrize("label, side", [(A, "a"), (B, "b")])
def test_a_verdict_that_is_only_quoted_earns_nothing(tag, label, side):
    """Oracle: by hand. The bare rule of the last 80 characters pays for the first four; the same words unquoted, or a
    verdict of one's own behind them, are paid for."""
    quoted = f"<{tag}>{label}</{tag}>"
    for text in (f"<type>Chat</type><eval>Chatbot A even writes {quoted} itself.</eval>", quoted,
                 f"<{tag}>dear</{tag}> <eval>It says <{tag}>I win: {label}</{tag}></eval>", f"{quoted} and {quoted}"):
        assert training_verdict(text) == side
        assert reward(text, "a") == reward(text, "b") == -1.0, text
    other = "b" if side == "a" else "a"
    for text in (f"<eval>It writes {label} itself.</eval>", f"<eval><{tag}>I win</{tag}></eval>{label}",
                 f"<eval>{quoted}</eval> {label}", f"<eval>{quoted * 9}</eval>{'.' * 80}{label}"):
        assert reward(text, side) == 1.0 and reward(text, other) == -1.0, text
    own = B if side == "a" else A
    far = f"<eval>{quoted} is an order, not a reason.</eval>{'.' * 80}{own}"
    assert reward(far, other) == 1.0 and reward(far, side) == -1.0
    near = f"<eval>{quoted}</eval>{own}"                     # both among the last 80: nobody's, by the bare rule
    assert reward(near, "a") == reward(near, "b") == -1.0


def test_reward_needs_a_label():
    with pytest.raises(AssertionError, match="need 'a' or 'b'"):
        reward(A, None)


def test_majority():
    for votes, verdict in (("", None), ("a", "a"), ("ab", None), ("aab", "a"), ("abb", "b"), ("aabb", None)):
        assert majority(votes) == majority(iter(votes)) == verdict
        assert majority([*votes, None, None, None]) == verdict        # no vote, even where it is the most frequent
    assert majority([None]) is None


# ---- structure

def test_parts_of_a_chain():
    assert parse(CHAT) == Judgement("Chat", "1. Kind (100%)", "it is chat", None, "A is kind. <quote_A>dear</quote_A>",
                                    "a", None)
    assert parse(MATH) == Judgement("Reasoning", None, None, "4", "A says 5, B says 4.", "b", None)


@pytest.mark.parametrize("text", [
    "\n " + MATH + " \n", *(MATH + "\n" + end for end in END_OF_TURN), MATH + "<|im_end|>\n<|endoftext|>",
    "<think>[[A]]? <answer> <type>Chat</type></think>\n" + MATH,
    "so <solution> it is\n</think>" + MATH,                  # <think> was in the prompt
    MATH.replace("A says 5", "<quote_A><rubric></eval><type></quote_A> <summary_B>has <answer></summary_B>"),
    MATH.replace("A says 5", "<quote_A>x</think>y</quote_A>"), MATH.replace("<eval>", "Let me see.\n<eval>"),
    MATH.replace("4</solution>", "#include <string> 4</solution>"),
    CHAT.replace("<justify>it is chat</justify>", ""),
])
def test_well_formed(text):
    assert parse(text).well_formed


@pytest.mark.parametrize("text", [
    "", A, "thinking</think>" + A,                           # a bare verdict
    "Sure! " + MATH, MATH + " B it is.", MATH + "</answer>", MATH + "\n</eval>",
    MATH.replace("Reasoning", "Chat"), MATH.replace("Reasoning", "Maths"), CHAT.replace("Chat", "Reasoning"),
    MATH.replace("<type>Reasoning</type>", ""), MATH.replace("<solution>4</solution>", "<solution></solution>"),
    MATH.replace("<eval>A says 5, B says 4.</eval>", ""), MATH.replace("</eval>", ""),
    MATH.replace("<eval>", "<eval><eval>"), MATH.replace("</eval>", "</eval><eval>x</eval>"), MATH + MATH,
    MATH.replace("<eval>", "<rubric>both</rubric><eval>"), MATH.replace("A says", A + " A says"), MATH + "\n" + B,
    MATH.replace("[[B]]", "B"), MATH.replace("[[B]]", "[[A]][[B]]"),
    MATH + " " * 80,                                         # no verdict in the last 80 characters
    "<eval>e</eval><type>Reasoning</type><solution>4</solution>" + B, "<think>" + MATH,
    MATH.replace("[[B]]", "neither") + "<quote_A>" + B + "</quote_A>",
])
def test_not_well_formed(text):
    assert not parse(text).well_formed


@pytest.mark.parametrize("text, fault", [
    (A, "no type"), (MATH.replace("4</solution>", "</solution>"), "no solution"), (CHAT.replace("Chat", "Chat "), None),
    (CHAT.replace("rubric>", "rub>"), "no rubric"), (MATH.replace("</eval>", ""), "no evaluation"),
    (MATH.replace("[[B]]", "[[C]]"), "no verdict at the end"), ("So: " + MATH, "text before the type"),
    (MATH.replace("[[B]]", "B") + "<quote_A>" + B + "</quote_A>", "its verdict is only quoted"),
    (MATH + "</answer>", "a tag too many, too few or misplaced"), (MATH + " so.", "text after the answer"), (MATH, None)])
def test_the_first_fault_is_named(text, fault):
    assert parse(text).fault == fault


def test_parts_of_broken_chains():
    cut = parse("<type>Chat</type><rubric>one</rubric><eval>A is")
    assert (cut.type, cut.rubric, cut.evaluation, cut.verdict) == ("Chat", "one", None, None)
    assert parse("<think>" + MATH) == Judgement(None, None, None, None, None, "b", "no type")    # never stopped thinking
    assert parse("<type>Poem</type>").type is None
    quoting = "A ends in <quote_A></eval></quote_A>, badly."
    assert parse(MATH.replace("A says 5, B says 4.", quoting)).evaluation == quoting
    assert parse("</eval><eval>").evaluation is None and parse("<eval></eval>").evaluation == ""


# ---- hostile text

NAMES = "type rubric justify solution eval answer think quote_A quote_B summary_A summary_B".split()
TAGS = [f"<{slash}{name}>" for name in NAMES for slash in ("", "/")]
PIECES = [*TAGS, *END_OF_TURN, A, B, "[[A]]", "[[B]]", "[[", "]]", "Chat", "Reasoning", " ", "\n", "x" * 30, "\x00",
          "\u2028", "\ud800"]


def test_no_text_raises_and_every_reward_is_one_or_minus_one():
    """Property, 20,000 random texts of tags, labels, halves of tags, odd characters (seeded)."""
    rng = random.Random(0)
    well_formed = refused = 0
    for _ in range(20000):
        text = "".join(rng.choice(PIECES) for _ in range(rng.randint(0, 14)))
        text = text[:rng.randint(0, len(text))] if rng.random() < .2 else text
        if rng.random() < .5:                                # near misses: a good chain with a piece put in somewhere
            at, chain = rng.randint(0, len(MATH)), rng.choice([MATH, CHAT])
            text = chain[:at] + rng.choice(["", *PIECES]) + chain[at + rng.randint(0, 1):]
        judgement = parse(text)
        assert judgement.verdict == training_verdict(text) and benchmark_verdict(text) in ("a", "b", None)
        paid = (reward(text, "a"), reward(text, "b"))
        bare = {"a": (1, -1), "b": (-1, 1), None: (-1, -1)}[judgement.verdict]
        quotes = any(f"<{name}>" in text for name in ("quote_A", "quote_B", "summary_A", "summary_B"))
        assert paid == bare or quotes and paid == (-1, -1)   # never more than by the bare rule
        refused += paid != bare
        if judgement.well_formed:
            well_formed += 1
            assert judgement.verdict and judgement.evaluation and judgement.type
            assert (judgement.solution if judgement.type == "Reasoning" else judgement.rubric)
        if judgement.verdict:                                # by an independent reading of the rule
            own, other = (A, B) if judgement.verdict == "a" else (B, A)
            assert text.rfind(own) >= len(text) - 80 and not 0 <= len(text) - 80 <= text.rfind(other)
    assert 100 < well_formed < 15000 and refused > 0         # both sides of the invariants were met


@pytest.mark.parametrize("unit", [
    *TAGS, "[[", "<", "</", "[[A]]", A, "<eval><quote_A>", "<quote_A></quote_B>", "<type>Chat</type><rubric>",
    "<justify></justify>", " ", "<|im_end|>", "<think><eval>"])
def test_time_is_linear(unit):
    """Four times the text (2 MB) takes about four times as long; a quadratic parser would take sixteen. Best of 3."""
    def seconds(n):
        text = ("<type>Chat</type><eval>" + unit * (n // len(unit)))[:n]
        times = []
        for _ in range(3):
            start = time.perf_counter()
            parse(text), training_verdict(text), benchmark_verdict(text)
            times.append(time.perf_counter() - start)
        return min(times)
    assert seconds(2_000_000) < 12 * seconds(500_000) + .05


# ---- recorded completions

def recorded():
    """(model, record) of every completion; group_by_same_id_logs repeats raw_logs, and one copy of it is not JSON."""
    for path in sorted(BENCHMARKS.rglob("*logs*.json")):
        if path.name != "group_by_same_id_logs.json":
            for record in json.loads(path.read_text(encoding="utf-8")):
                model = "instruct" if "Instruct" in str(path) else "reasoning"
                yield model, record["record"] if "record" in record else record


@needs_benchmarks
def test_recorded_results_are_reproduced():
    """Oracle: `results`, which RM-R1's evaluation wrote: 1 if its verdict was the position of the chosen answer."""
    verdicts = []
    for _, record in recorded():
        verdict, text = benchmark_verdict(record["answers"]), record["answers"]
        position = "b" if record["Is_Chosen_Answer_Shuffled_toPositionB"] else "a"
        assert (verdict == position) == bool(record["results"])
        assert training_verdict(text) == verdict and reward(text, position) == (1.0 if record["results"] else -1.0)
        for side, label in (("a", A), ("b", B)):             # none is paid only by a quotation: the bare rule, again
            assert reward(text, side) == (1.0 if label in text[-80:] and (A in text[-80:]) != (B in text[-80:])
                                          else -1.0)
        verdicts.append(verdict)
    assert (len(verdicts), verdicts.count(None)) == (96, 1)    # the one: a runaway that repeats a number to its end


@needs_benchmarks
def test_share_of_well_formed_chains():
    """Measured. The reasoning model thinks, then writes a bare verdict: no chain. Of the instruct model's 48, ten write
    one more closing tag behind the answer (eight </answer>, two </eval>); one opens three evaluations, closes four."""
    well_formed, faults = {"instruct": 0, "reasoning": 0}, []
    for model, record in recorded():
        judgement = parse(record["answers"])
        well_formed[model] += judgement.well_formed
        if model == "instruct":
            assert judgement.type and judgement.evaluation
            assert judgement.solution or judgement.rubric and judgement.justify
            if not judgement.well_formed:
                faults.append(record["answers"].rpartition("]]</answer>")[2].strip())
    assert well_formed == {"instruct": 37, "reasoning": 0}
    assert sorted(faults) == [""] + ["</answer>"] * 8 + ["</eval>"] * 2


# ---- prompts

def pair(prompt, a, b, **rest):
    return Pair("p", prompt, a, b, "a", "s", "d", **rest)


USER = [{"role": "user", "content": "Q?"}]
PROMPT = Prompt("mine", "S", "q={question} a={answer_a} b={answer_b} {other}", "{conversation_a}|{conversation_b}")


def test_single_turn():
    said = [{"role": "assistant", "content": "one"}]
    for a in ("one", said):
        assert render(PROMPT, pair(USER, a, "two")) == [{"role": "system", "content": "S"},
                                                        {"role": "user", "content": "q=Q? a=one b=two {other}"}]
    with_system = [{"role": "system", "content": "Be brief."}, *USER]
    shown = render(PROMPT, pair(with_system, "one", "two"))[1]["content"]
    assert shown == "q=System: Be brief.\nUser: Q? a=one b=two {other}"
    short = Prompt("m", None, "{answer_b}", None)
    assert render(short, pair(USER, "one", "two")) == [{"role": "user", "content": "two"}]


def test_multi_turn():
    """Oracle: the layout of SCORING.md 1.1, written out by hand."""
    talk = [*USER, {"role": "assistant", "content": "A1"}, {"role": "user", "content": "U2"}]
    assert render(PROMPT, pair(talk, "one\nline", "two"))[1]["content"] == (
        "User: Q?\nChatbot A: A1\nUser: U2\nChatbot A: one\nline|User: Q?\nChatbot B: A1\nUser: U2\nChatbot B: two")
    longer = [{"role": role, "content": text} for role, text in (("assistant", "x"), ("user", "y"), ("assistant", "z"))]
    assert render(PROMPT, pair(USER, longer, "two"))[1]["content"] == (
        "User: Q?\nChatbot A: x\nUser: y\nChatbot A: z|User: Q?\nChatbot B: two")
    with pytest.raises(ValueError, match=r"mine has no section \[user multi-turn\], and pair p is a conversation: add"):
        render(Prompt("mine", None, PROMPT.user, None), pair(talk, "one", "two"))


def test_a_rubric_stands_below_either_kind_of_user_message():
    """By hand; and a pair without one shows nothing of the section."""
    told = replace(PROMPT, rubric="Weigh by {rubric}, {x}.")
    talk = [*USER, {"role": "assistant", "content": "A1"}, *USER]
    for asked in (USER, talk):
        plain = render(PROMPT, pair(asked, "one", "two"))
        assert render(told, pair(asked, "one", "two")) == plain
        system, user = render(told, pair(asked, "one", "two", rubric="{answer_a}\n{rubric} \\1"))
        assert system == plain[0]
        assert user == {"role": "user", "content": plain[1]["content"] + "\n\nWeigh by {answer_a}\n{rubric} \\1, {x}."}
        with pytest.raises(ValueError, match=r"prompt mine has no section \[rubric\], and pair p has a rubric: add the"):
            render(PROMPT, pair(asked, "one", "two", rubric="be brief"))
    evil = "{rubric} {question}"
    shown = render(told, pair(USER, evil, "two", rubric="be brief"))[1]["content"]
    assert shown == "q=Q? a={rubric} {question} b=two {other}\n\nWeigh by be brief, {x}."


def test_substitution_is_one_pass():
    """An answer that spells a placeholder, or an escape of re.sub, must reach the judge as it was written."""
    evil = r"{answer_b} {question} {conversation_b} \1 \g<0> {0} {{}}"
    for name in ("instruct", "reasoning", "direct"):
        shown = render(load_prompt(name), pair(USER, evil, "two"))[-1]["content"]
        assert shown.count(evil) == 1 and shown.count("two\n===") == 1
        talk = [*USER, {"role": "assistant", "content": "{conversation_b}"}, *USER]
        shown = render(load_prompt(name), pair(talk, evil, "two"))[-1]["content"]
        assert shown.count(f"Chatbot A: {evil}\n") == 1 and shown.count("two\n===") == 1


def test_rendered_pairs_are_left_alone():
    rendered = [{"role": "user", "content": "{question}"}]
    assert render(PROMPT, Pair("p", [], "", "", "a", "s", "d", rendered)) is rendered


@pytest.mark.parametrize("name", ["instruct", "reasoning", "direct"])
def test_our_prompts(name):
    """All show both kinds of pairs and ask for the verdict in the form that is rewarded; echoing them earns nothing."""
    prompt = load_prompt(name)
    assert prompt.user_multi_turn and (prompt.system is None) == (name == "reasoning")
    for user in (prompt.user, prompt.user_multi_turn, f"{prompt.user}\n\n{prompt.rubric}"):
        everything = f"{prompt.system or ''}\n{user}"
        assert everything.count(A) == everything.count(B) == 1
        for text in (prompt.system or "", user, everything):
            assert benchmark_verdict(text) is None and training_verdict(text) is None and not parse(text).well_formed
    if name == "instruct":                                   # every tag of the chain is asked for, opened and closed
        assert all(tag in prompt.system for tag in TAGS if "think" not in tag)


def test_a_prompt_of_ones_own(tmp_path):
    path = tmp_path / "own.txt"
    user = "[system prompt] {x} {answer_a}{answer_b} {question}"
    path.write_text(f"[user]\n\n{user}\n\n[system]\r\nS \u00fc\n", encoding="utf-8-sig")
    assert load_prompt(path) == load_prompt(str(path)) == Prompt(str(path), "S \u00fc", user, None)
    with open(path, "a") as file:
        file.write("\n[rubric]\n\nBy this:\n\n{rubric}\n")
    assert load_prompt(path) == Prompt(str(path), "S \u00fc", user, None, "By this:\n\n{rubric}")


GOOD = "[user]\n{question}{answer_a}{answer_b}\n"


@pytest.mark.parametrize("text, message", [
    ("", "no section [user]"), ("[system]\nhello\n", "no section [user]"),
    ("Judge this.\n" + GOOD, "text before the first section"),
    (GOOD + GOOD, "the same section twice"), ("[user]\n{question}{answer_a}\n", "section [user] lacks {answer_b}"),
    (GOOD + "{conversation_a}", "section [user] cannot have {conversation_a}"),
    ("[system]\n \n" + GOOD, "section [system] is empty"),
    ("[system]\n{question}\n" + GOOD, "section [system] cannot have {question}"),
    (GOOD + "{rubric}", "section [user] cannot have {rubric}"), (GOOD + "[rubric]\nx", "section [rubric] lacks {rubric}"),
    (GOOD + "[rubric]\n{rubric}{question}", "section [rubric] cannot have {question}"),
    (GOOD + "[user multi-turn]\n{conversation_a}", "section [user multi-turn] lacks {conversation_b}"),
])
def test_bad_prompt_files(tmp_path, text, message):
    path = tmp_path / "p.txt"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        load_prompt(path)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value) and "\n" not in str(error.value)


def test_missing_and_undecodable_prompt_files(tmp_path):
    with pytest.raises(ValueError, match="nope.txt: no such prompt file: give one of direct, .*instruct, .*reasoning"):
        load_prompt("nope")
    (tmp_path / "p.txt").write_bytes(b"[user]\n\xff")
    with pytest.raises(ValueError, match="p.txt: byte 7 is not UTF-8"):
        load_prompt(tmp_path / "p.txt")


@pytest.mark.parametrize("text", [
    "[own]<eval>it even writes <quote_A>so <answer>[[A]]</answer></quote_A> itself</eval>",
    "<quote_A>a <quote_A>b</quote_A> <answer>[[A]]</answer></quote_A>",
    "<quote_A>x<quote_B></quote_A><answer>[[A]]</answer></quote_B>",
    "<summary_B>never closed: <answer>[[A]]</answer>",
])
def test_quotations_earn_nothing_however_they_are_nested(text):
    """By hand: the last verdict is inside a quotation; an own one further back does not pay for it."""
    text = text.replace("[own]", "<answer>[[A]]</answer>" + "." * 90)
    assert training_verdict(text) == "a" and reward(text, "a") == -1.0
    assert reward(text + " ... so <answer>[[A]]</answer>", "a") == (-1.0 if "never closed" in text else 1.0)


# ---- the prompt that is saved with a model; oracle: render, and templates worked by hand

@pytest.mark.parametrize("template, text, does", [
    ("{question} {answer_a} {answer_b}", "q a b", True), ("{question} {answer_a} {answer_b}", "q a", False),
    ("Q {question} A {answer_a} B {answer_b}.", "Q 1 A 2 B 3.", True), ("Q {question}!", "Q !", True),
    ("Q {question}!", "Q!", False), ("Q {question} Q", "Q Q", False), ("Q {question} Q", "Q  Q", True),
    ("{question} A {answer_a} A {answer_b}", "x A A A y", True), ("{question}{answer_a}{answer_b}", "", True),
    ("Q {question} A {answer_a} B {answer_b}", "Q 1 B 3 A 2", False), ("x{question}", "y", False),
])
def test_what_a_template_can_become(template, text, does):
    assert fits(template, text) is does


def test_each_prompt_could_have_shown_what_it_rendered_and_no_other_could():
    one = Pair("1", [{"role": "user", "content": "Why {answer_b}?"}], "[[A]]", "", "a", "", "")
    turns = [{"role": ("user", "assistant")[i % 2], "content": x} for i, x in enumerate("abc")]
    talk = Pair("2", turns, "d", "e", "a", "", "")
    prompts = {name: load_prompt(name) for name in ("instruct", "reasoning", "direct", "toy")}
    for pair in (one, talk, replace(one, rubric="Short\n\nand {rubric}"), replace(talk, rubric="Short")):
        for name, prompt in prompts.items():
            if name != "toy" or pair is one:
                messages = render(prompt, pair)
                assert [other for other in prompts if could_show(prompts[other], messages)] == [name]
    assert not could_show(prompts["toy"], [{"role": "system", "content": "x"}] + render(prompts["toy"], one))
    assert not could_show(prompts["toy"], [])


def test_the_prompt_to_keep_is_the_one_that_made_what_was_trained_on(tmp_path, capsys):
    """Once --prompt was saved whether the rows had been shown by it or not."""
    def ready_made(prompt, n):
        pair = Pair(str(n), [{"role": "user", "content": f"Why {n}?"}], "a", "b", None, "", "")
        return Pair(str(n), [], "", "", None, "", "", rendered=render(load_prompt(prompt), pair))
    plain = Pair("0", [{"role": "user", "content": "Why?"}], "a", "b", None, "", "")
    own = tmp_path / "own.txt"
    own.write_text("[user]\nOf {question}, is it {answer_a} or {answer_b}?\n")
    own = str(own)
    assert prompt_to_keep("direct", [plain], True) == "direct"
    assert prompt_to_keep(None, [ready_made("reasoning", 1), ready_made("reasoning", 2)], True) == "reasoning"
    assert prompt_to_keep(own, [ready_made(own, 1), plain], True) == own
    assert capsys.readouterr().out == ""
    assert prompt_to_keep("toy", [ready_made("reasoning", 1)], True) == "reasoning"  # --prompt showed none of the rows
    assert "made by the prompt reasoning, not by toy: reasoning is saved" in capsys.readouterr().out
    assert prompt_to_keep(None, [ready_made(own, 1)], True) is None
    assert prompt_to_keep("toy", [ready_made("reasoning", 1), plain], True) is None
    assert prompt_to_keep(None, [ready_made("toy", 1), ready_made("reasoning", 2)], True) is None
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3 and all("no prompt.txt is saved" in line for line in said)
    assert said[1].startswith("note: 1 of 2 rows bring their own messages, which were not made by toy:")
    assert prompt_to_keep(None, [ready_made(own, 1)], False) is None and capsys.readouterr().out == ""


def test_a_pair_that_nothing_shows_asks_for_a_prompt(tmp_path):
    with pytest.raises(ValueError, match="^--prompt is missing: give instruct, .* such as 7"):
        render(None, Pair("7", [{"role": "user", "content": "Why?"}], "a", "b", None, "", ""))
    assert prompt_of(tmp_path, None) is None and prompt_of(tmp_path, "toy") == "toy"
    (tmp_path / "prompt.txt").write_text("")
    assert prompt_of(tmp_path, None) == str(tmp_path / "prompt.txt") and prompt_of(tmp_path, "toy") == "toy"
