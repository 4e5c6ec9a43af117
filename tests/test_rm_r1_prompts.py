"""data/rm_r1_prompts.py, and prompt files that are kept to the byte. Oracle: a made-up file of Python in the form of
RM-R1's is run here, and its constants filled by str.format, with dialogues laid out by hand from the raw records
(SCORING.md, section 1); the made-up texts have all that could go wrong with them."""

import functools
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.records import read_benchmark  # noqa: E402
from data import toy  # noqa: E402
from data.rm_r1_prompts import SYSTEM, read_constants, template, write_prompts  # noqa: E402
from judgements import prompt_hash  # noqa: E402
from model import Model, ModelConfig  # noqa: E402
from prompt import Prompt, could_show, load_prompt, prompt_file, render  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402
import evaluate  # noqa: E402

SHARED = Path(os.environ.get("RM_SHARED", ROOT.parent / "shared")) / "benchmarks"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no records at {SHARED}: set RM_SHARED")

# The traps: blank lines first and last, blanks at ends of lines, a continued line, adjacent strings, +, names of other
# constants, braces single and doubled, percent signs, letters that are not ASCII, \r, lines like our section headers.
SOURCE = r'''# coding: utf-8
import vllm_that_is_not_installed
raise SystemExit("whoever runs this file has lost")
UNUSED = f"{1 + 1}" % ()
RULES = """
1. Be fair (100%). 
2. [[A]] or {[[B]]}\
, never both: "äöü" \u2028 \d
"""
TAIL: str = 'one' "two" r"\n" + RULES
RM_R1_INSTRUCT_SYSTEM_PROMPT = ("\n\n[system]\n \\[user]\n[user] \n" + (RULES + "{{kept}} %s\r\n") + TAIL) + "\n\n"
RM_R1_SINGLE_TURN_INSTRUCT_USER_PROMPT = """
[Client Question]
{question}

[user multi-turn]
{{"json": {{}}}} 50%% \\
{answer_a}{answer_b}{question} """
RM_R1_MULTI_TURN_INSTRUCT_USER_PROMPT = "{conversation_1}\n\n" "{conversation_2}\n"
RM_R1_SINGLE_TURN_REASONING_USER_PROMPT = 'Ü: {question}\r\nA {answer_a}\n' + "B {answer_b}" + """\
"""
RM_R1_MULTI_TURN_REASONING_USER_PROMPT = """

[Start of A]
{conversation_1}
[End of A]\t
{conversation_2} }}{{

"""
'''
END_OF_HEAD = SOURCE.index("RULES")


@functools.cache
def constants():
    """What Python makes of the source's constants."""
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")      # of \\d
        exec(compile(SOURCE[END_OF_HEAD:], "made up", "exec"), found)
    return found


@pytest.fixture(scope="module", params=["\n", "\r\n"], ids=["LF", "CRLF"])
def written(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "generative.py").write_bytes(SOURCE.replace("\n", request.param).encode())
    return write_prompts(folder / "generative.py", folder)


def dialogue(messages, answer, letter):
    lines = [("User: " if m["role"] == "user" else f"Chatbot {letter}: ") + m["content"] for m in messages]
    return "\n".join([*lines, f"Chatbot {letter}: {answer}"])


def shown(kind, question, a, b):
    """The messages of RM-R1's runs: question is a text or, of a conversation, its messages."""
    made, turns = constants(), "SINGLE" if isinstance(question, str) else "MULTI"
    form = made[f"RM_R1_{turns}_TURN_{kind}_USER_PROMPT"].format
    if isinstance(question, str):
        user = form(question=question, answer_a=a, answer_b=b)
    else:
        user = form(conversation_1=dialogue(question, a, "A"), conversation_2=dialogue(question, b, "B"))
    system = [{"role": "system", "content": made[SYSTEM]}] if kind == "INSTRUCT" else []
    return [*system, {"role": "user", "content": user}]


def raw_pairs(folder):
    """{id: (question, chosen, rejected)} of the files that `release` or RM_SHARED have, by the records' own fields."""
    found = {}
    for file in sorted(folder.rglob("*.json*")):
        text = file.read_text(encoding="utf-8")
        for row in json.loads(text) if file.suffix == ".json" else map(json.loads, text.splitlines()):
            if "subset" in row and "chosen_model" in row:
                found[f"{row['subset']}/{row['id']}"] = row["prompt"], row["chosen"], row["rejected"]
            elif "conversation_input" in row:
                talk = row["conversation_input"]
                question = talk[0]["content"] if len(talk) == 1 else talk
                if "pair_uid" in row:
                    found[row["pair_uid"]] = question, row["chosen"]["answer"], row["reject"]["answer"]
                for k, loser in enumerate(row.get("loser_list", ())):
                    found[f"{row['bon_uid']}/{k}"] = question, row["bon_best"]["answer"], loser["answer"]
            elif isinstance(row["chosen"], list):
                domain = str(row["id"]).split("/")[0] if "/" in str(row["id"]) else file.name.split("_")[0]
                for i in range(3):
                    for j in range(3):
                        number = str(row["id"]).split("/")[-1]
                        found[f"{domain}/{number}/{i}{j}"] = row["prompt"], row["chosen"][i], row["rejected"][j]
    return found


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """A few records of each benchmark, in its own form."""
    folder = tmp_path_factory.mktemp("release")
    rows = [{"prompt": f"q{i} {{answer_a}} {{}}", "chosen": "good\r\n", "rejected": f" bad {i}\n", "chosen_model": "m",
             "subset": "hep-go", "id": i} for i in range(5)]
    (folder / "filtered.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = [{"id": f"chat/{i}", "domain": "chat", "prompt": "Ü {question} %s", "chosen": ["a", "{b}", "c\n"],
              "rejected": ["d", "e", "\\1"]} for i in range(2)]
    (folder / "total_dataset.json").write_text(json.dumps(items))
    for kind in ("Pairwise_set", "BoN_set"):
        file = folder / "rmb" / kind / "Helpfulness" / "Code.json"
        file.parent.mkdir(parents=True)
        answers = [{"llm_name": "m", "answer": x} for x in ("{conversation_2}", "21", "User: 22")]
        turns = [{"role": role, "content": f"{role} says\n", "language": "en"} for role in ("user", "assistant") * 3]
        file.write_text(json.dumps([{"conversation_input": turns[:n], "category_path": f"{kind}/Helpfulness/Code"} | (
            {"pair_uid": f"p{n}", "chosen": answers[0], "reject": answers[1]} if kind[0] == "P" else
            {"bon_uid": f"b{n}", "bon_best": answers[0], "loser_list": answers[1:]}) for n in (1, 3, 5)]))
    return folder


def check_rendering(pairs, raw, written):
    for kind, path in zip(("INSTRUCT", "REASONING"), written):
        prompt = load_prompt(path)
        for pair in pairs:
            question, chosen, rejected = raw[pair.id]
            a, b = (chosen, rejected) if pair.winner == "a" else (rejected, chosen)
            assert render(prompt, pair) == shown(kind, question, a, b), pair.id
    assert {len(pair.prompt) for pair in pairs} == {1, 3, 5} and {pair.winner for pair in pairs} == {"a", "b"}


SETS = {"reward-bench": "filtered.jsonl", "rm-bench": "total_dataset.json", "rmb": "rmb"}


def test_every_pair_of_the_benchmarks_is_rendered_to_the_byte(release, written):
    raw = raw_pairs(release)
    pairs = [pair for source, name in SETS.items() for pair in
             read_benchmark(release / name, source, order="published")]
    assert {pair.id for pair in pairs} == set(raw)
    check_rendering(pairs, raw, written)


@needs_shared
def test_real_pairs_are_rendered_to_the_byte(written):
    raw = raw_pairs(SHARED / "rmb") | raw_pairs(SHARED / "rm_bench")
    pairs = [*read_benchmark(SHARED / "rmb", "rmb", order="published"),
             *read_benchmark(SHARED / "rm_bench", "rm-bench", order="published")]
    assert len(pairs) == len(raw) == 760 + 4 * 540
    check_rendering(pairs, raw, written)


def test_evaluate_asks_with_them(release, written, tmp_path, capsys):
    """The prompt hash of every judgement is that of the tokens of what RM-R1 showed."""
    n_vocab = toy.write_tokenizer(tmp_path / "model")
    config = toy.MODEL | dict(vocab_size=n_vocab, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                              num_attention_heads=1, num_key_value_heads=1, head_dim=16)
    Model.random(ModelConfig.from_dict(config)).save_pretrained(tmp_path / "model")
    tokenizer, raw = Tokenizer(tmp_path / "model"), raw_pairs(release)
    for kind, path in zip(("INSTRUCT", "REASONING"), written):
        out = tmp_path / kind
        evaluate.main(evaluate.Config(
            model=(str(tmp_path / "model"),), prompt=str(path), order="published", out=str(out), max_new_tokens=1,
            rewardbench=str(release / SETS["reward-bench"]), rmbench=str(release / SETS["rm-bench"]),
            rmb=str(release / SETS["rmb"]), threads=1))
        records = [json.loads(line) for line in (out / "judgements.jsonl").read_text().splitlines()]
        assert {record["id"] for record in records} == set(raw)
        for record in records:
            question, chosen, rejected = raw[record["id"]]
            a, b = (chosen, rejected) if record["winner"] == "a" else (rejected, chosen)
            assert record["prompt_hash"] == prompt_hash(tokenizer.chat(shown(kind, question, a, b)))


def test_what_is_written_could_have_shown_what_it_shows(written):
    """A model that trains on RM-R1's ready-made rows is saved with the prompt that made them."""
    instruct, reasoning = map(load_prompt, written)
    made = shown("INSTRUCT", "q", "a", "b"), shown("REASONING", [{"role": "user", "content": "q"}], "a", "b")
    assert [could_show(p, messages) for p in (instruct, reasoning) for messages in made] == [True, False, False, True]


# ---- what is refused

GOOD = "".join(f'{name} = "{text}"\n' for name, text in {
    SYSTEM: "S", **{f"RM_R1_SINGLE_TURN_{kind}_USER_PROMPT": "{question}{answer_a}{answer_b}" for kind in
                    ("INSTRUCT", "REASONING")},
    **{f"RM_R1_MULTI_TURN_{kind}_USER_PROMPT": "{conversation_1}{conversation_2}" for kind in
       ("INSTRUCT", "REASONING")}}.items())


@pytest.mark.parametrize("line, fault", [
    (f'{SYSTEM} = f"a{{1}}"', f":1: {SYSTEM} is made with an f-string"),
    (f'{SYSTEM} = ("a"\n  "b" f"{{1}}")', ":1: .* is made with an f-string"),
    (f'{SYSTEM} = "a".strip()', "is made with a call"), (f'{SYSTEM} = "a" % ()', "an operator that is not +"),
    (f'{SYSTEM} = "a" + ("b" * 2)', "an operator that is not +"),
    (f'{SYSTEM} = b"a"', r"what is no string \(Constant\)"), (f'{SYSTEM} = "a", "b"', r"what is no string \(Tuple\)"),
    (f'{SYSTEM} = "a" + LATER\nLATER = "b"', f":1: {SYSTEM} is made with a name that no line above sets"),
    (f'{SYSTEM} = {SYSTEM} + "b"', "a name that no line above sets"),
    (f'X = open("x")\n{SYSTEM} = "a" + X', ":1: .*X is made with|:1: X is made with a call"),
    (f'{SYSTEM} = "a"\n{SYSTEM} = "b"', f":2: {SYSTEM} is not set once"),
    (f'{SYSTEM} = "a"\n{SYSTEM} += "b"', f":2: {SYSTEM} is not set once"),
    (f'if True:\n    {SYSTEM} = "a"', f":2: {SYSTEM} is not set once, by {SYSTEM} = ... at the top"),
    (f'{SYSTEM}, B = "a", "b"', f":1: {SYSTEM} is not set once"),
    (f"def {SYSTEM}(): pass", f"no {SYSTEM}: give RM-R1's generative.py"),
    (f"{SYSTEM}: str", f"{SYSTEM} is not set once"),
    (f'{SYSTEM} = "\\ud83d"', "holds a lone surrogate"), (f'{SYSTEM} = " "', "is blank or has a field"),
    (f'{SYSTEM} = "{{question}}"', "is blank or has a field"),
    (f"{SYSTEM} = ", ":1: not Python"), (f"{SYSTEM} = 'a'\0", "not Python"),
    (f"{SYSTEM} = {'(' * 5000}", "not Python"), (f"{SYSTEM} = {'+'.join(['x'] * 20_000)}", "not Python|a sum of too")])
def test_what_is_not_made_of_strings_is_named(tmp_path, line, fault):
    file = tmp_path / "generative.py"
    file.write_bytes((line + "\n" + GOOD.split("\n", 1)[1]).encode())
    with pytest.raises(ValueError, match=fault) as e:
        write_prompts(file, tmp_path / "out")
    assert str(e.value).startswith(f"{file}") and "\n" not in str(e.value)
    assert not (tmp_path / "out").exists()


def test_all_that_is_missing_is_named_at_once(tmp_path):
    file = tmp_path / "generative.py"
    file.write_text("A = 'b'\n")
    with pytest.raises(ValueError, match="no X, Y: give RM-R1's generative.py"):
        read_constants(file, ["A", "X", "Y"])
    assert read_constants(file, ["A"]) == {"A": "b"}


FIELDS = {"question": "question", "conversation_1": "conversation_a"}


@pytest.mark.parametrize("text, fault", [
    ("{question}", "x lacks the field conversation_1"), ("{question}{conversation_1}{other}", "has the field {other}"),
    ("{question!r}{conversation_1}", "or a format beside it"), ("{question:>9}{conversation_1}", "or a format"),
    ("{}{conversation_1}", "has the field {}"), ("{question", "is no text for str.format"),
    ("} {question}{conversation_1}", "is no text for str.format"),
    ("{question}{conversation_1}{{answer_a}}", "spells one of our placeholders")])
def test_user_prompts_that_str_format_would_fill_otherwise(text, fault):
    with pytest.raises(ValueError, match=fault):
        template("x", text, FIELDS)
    assert template("x", "{{{question}}} {conversation_1}}}{{", FIELDS) == "{{question}} {conversation_a}}{"


def test_the_length_of_the_system_prompt_is_compared(tmp_path, capsys):
    """2,871 characters in the revision of the published scores."""
    file = tmp_path / "generative.py"
    file.write_text(GOOD)
    write_prompts(file, tmp_path)
    assert f"{SYSTEM} has 1 characters, not 2871" in capsys.readouterr().out
    file.write_text(GOOD.replace('"S"', f'"{"S" * 2871}"'))
    write_prompts(file, tmp_path)
    assert capsys.readouterr().out == ""


# ---- prompt files kept to the byte

@pytest.mark.parametrize("text", ["a", "\na\n\n", "[user]\n\\[user]\n\\\\", "[exact]\n\\", "\r\n[system]\r\na\r", " \t",
                                  "[user multi-turn] \t\n[User]\n [user]", "[rubric]", "\u2028\x0c[user]\x85\u00e4\U0001f600"])
def test_a_written_prompt_is_read_back_to_the_byte(tmp_path, text):
    path = tmp_path / "p.txt"
    for system in (None, text) if text.strip() else (None,):
        for several in (None, f"{text}{{conversation_a}}{text}{{conversation_b}}{text}"):
            for rubric in (None, f"{text}{{rubric}}{text}"):
                prompt = Prompt(str(path), system, f"{text}{{question}}{text}{{answer_a}}{{answer_b}}{text}", several,
                                rubric)
                path.write_bytes(prompt_file(prompt).encode())
                assert load_prompt(path) == prompt


def test_exact_files_by_hand_and_older_files_as_before(tmp_path):
    path, body = tmp_path / "p.txt", "\n\n{question} {answer_a} {answer_b}\n\n"
    path.write_bytes(f"[exact]\n[system]\n\nS\\\n\\[user]\n\n[user]\n{body}".encode())
    assert load_prompt(path) == Prompt(str(path), "\nS\\\n[user]\n", body[:-1], None)
    path.write_bytes(f"[system]\n\nS\\\n\\[user]\n\n[user]\n{body}".encode())
    assert load_prompt(path) == Prompt(str(path), "S\\\n\\[user]", body.strip("\n"), None)
    path.write_bytes(f"\n[exact]\n[user]\n{body}".encode())
    with pytest.raises(ValueError, match="text before the first section"):
        load_prompt(path)


def test_command_line(tmp_path):
    file = tmp_path / "generative.py"
    file.write_text(GOOD)
    command = [sys.executable, "data/fetch.py", "rm-r1-prompts", "--out", str(tmp_path), "--file"]
    done = subprocess.run([*command, str(file)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert load_prompt(tmp_path / "rm-r1-reasoning.txt").user_multi_turn == "{conversation_a}{conversation_b}"
    file.write_text("RM_R1 = 1")
    done = subprocess.run([*command, str(file)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith(f"error: {file}: no RM_R1_")
