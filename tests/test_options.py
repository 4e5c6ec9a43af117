"""options.py. Oracle: option lists and the values that they must give, worked by hand."""

import json
import math
import re
from dataclasses import asdict, dataclass

import pytest

from options import check_at_least, check_between, check_choice, parse_config


@dataclass(frozen=True)
class Options:
    n_steps: int = 3  # how many, 50% of them useful
    lr: float = 1e-3  # peak
    data: str | None = None  # a path
    name: str = "run"  # a name
    fast: bool = False  # hurry
    safe: bool = True  # take care
    resume: bool = False  # go on

    def __post_init__(self):
        if self.n_steps < 0:
            raise ValueError(f"--n-steps must be at least 0,\ngot {self.n_steps}")


@dataclass(frozen=True)
class Undocumented:
    a: int = 1  # fine
    b: int = 2


RECIPES = {"big": {"n_steps": 100, "fast": True}, "none": {"data": None}}


def test_options_default_to_the_fields_own_values():
    assert parse_config(Options, argv=[]) == Options()
    assert parse_config(Options, RECIPES, argv=[]) == Options()


def test_options_have_the_types_of_their_fields():
    got = parse_config(Options,
                       argv=["--n-steps", "7", "--lr", "2e-4", "--data", "5", "--name=x y", "--fast", "--no-safe"])
    assert got == Options(7, 2e-4, "5", "x y", True, False)
    assert [type(value) for value in asdict(got).values()] == [int, float, str, str, bool, bool, bool]


def test_an_empty_value_is_none_where_none_is_allowed():
    assert parse_config(Options, argv=["--data", ""]) == Options(data=None)
    assert parse_config(Options, {"full": {"data": "x"}}, ["--data", "", "--recipe", "full"]).data is None


@dataclass(frozen=True)
class Sources:
    runs: tuple[str, ...]  # a field without a default
    n: int = 1  # a number
    from_: tuple[str, ...] = ("x",)  # a name that is a word of Python's


def test_fields_of_several_values_and_without_a_default(capsys):
    assert parse_config(Sources, argv=["a", "b"]) == Sources(("a", "b"))
    assert parse_config(Sources, argv=["--from", "c", "d", "--n", "2", "--", "a"]) == Sources(("a",), 2, ("c", "d"))
    for argv, wanted in (([], "required: RUNS"), (["a", "--from"], "--from: expected at least one")):
        with pytest.raises(SystemExit) as e:
            parse_config(Sources, argv=argv)
        assert e.value.code == 2 and wanted in capsys.readouterr().err


def test_a_flag_wins_over_its_recipe_wherever_it_stands():
    assert parse_config(Options, RECIPES, ["--recipe", "big"]) == Options(n_steps=100, fast=True)
    assert parse_config(Options, RECIPES, ["--n-steps", "5", "--recipe", "big"]) == Options(n_steps=5, fast=True)
    assert parse_config(Options, RECIPES, ["--recipe", "big", "--n-steps", "3", "--no-fast"]) == Options(n_steps=3)


@pytest.mark.parametrize("argv, named", [
    (["--unknown", "1"], "--unknown"), (["--n-step", "5"], "--n-step"), (["--n-steps", "many"], "--n-steps"),
    (["--n-steps", "1.5"], "--n-steps"),
    (["--lr", "1e"], "--lr"), (["--n-steps"], "--n-steps"), (["--fast", "yes"], "yes"), (["word"], "word"),
    (["--n_steps", "5"], "--n_steps"), (["--name="], "--name is empty: give a value, or leave the option out"),
    (["--name", " "], "--name is empty"),
    (["--recipe", "small"], "small"), (["--n-steps", "-1"], "must be at least 0, got -1"),
])
def test_a_wrong_flag_ends_with_one_line_that_names_it_and_status_2(argv, named, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_config(Options, RECIPES, argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and named in err, err


def test_help_tells_each_fields_comment_and_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_config(Options, RECIPES, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert "how many, 50% of them useful (default: 3)" in text and "--no-safe" in text and "--recipe" in text


def test_an_undocumented_field_is_the_programmers_mistake():
    with pytest.raises(AssertionError, match="^b needs a trailing comment"):
        parse_config(Undocumented, argv=[])


# ---- the embedded default, and --resume

@dataclass(frozen=True)
class Training:
    model: str | None = None  # a folder
    data: str | None = None  # a file
    lr: float = 1e-3  # peak
    out: str = "runs/x"  # the run's folder
    resume: bool = False  # go on


TOY = {"toy": {"model": "m", "data": "d", "lr": 0.5, "out": "runs/toy"}, "big": {"lr": 0.1}}


def test_the_embedded_recipe_is_taken_when_neither_model_nor_data_is_given():
    def parse(*argv):
        return parse_config(Training, TOY, argv, embedded="toy")
    assert parse() == Training("m", "d", 0.5, "runs/toy")
    assert parse("--lr", "2") == Training("m", "d", 2.0, "runs/toy")
    assert parse("--data", "mine") == Training(None, "mine") and parse("--model", "m") == Training("m")
    assert parse("--recipe", "big") == Training(lr=0.1)
    assert parse("--recipe", "toy", "--data", "mine") == Training("m", "mine", 0.5, "runs/toy")


def test_resume_takes_the_options_of_the_run(tmp_path, capsys):
    """They need not be repeated; those that are given win, and run.Run says which of them may."""
    out = tmp_path / "moved"
    out.mkdir()
    saved = asdict(Training("mine", "pairs", 1, str(tmp_path / "elsewhere")))  # 1: what JSON makes of 1.0
    (out / "config.json").write_text(json.dumps({"options": saved}))

    def parse(*argv):
        return parse_config(Training, TOY, argv, embedded="toy")
    assert parse("--out", str(out), "--resume") == Training("mine", "pairs", 1, str(out), True)
    assert parse("--out", str(out), "--resume", "--lr", "3") == Training("mine", "pairs", 3.0, str(out), True)
    assert parse("--recipe", "big", "--out", str(out), "--resume").lr == 0.1

    for text in ("", "[]", "{}", '{"options": {}, "resumed": 5}',
                 '{"options": 5}', '{"options": {"lr": "fast"}}', '{"options": {"lr": true}}',
                 '{"options": {"rate": 1}}', '{"options": {"model": 3}}', '{"options": {"resume": null}}'):
        (out / "config.json").write_text(text)
        with pytest.raises(SystemExit):
            parse("--out", str(out), "--resume")
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"{out}/config.json: is not the config.json of a run" in error, text
    with pytest.raises(SystemExit):
        parse("--out", str(tmp_path / "none"), "--resume")
    assert f"--resume: {tmp_path}/none/config.json is not there" in capsys.readouterr().err


# ---- checks

@pytest.mark.parametrize("value", [-1, -0.001, float("inf"), float("nan")])
def test_what_must_be_at_least(value):
    check_at_least(Training(lr=0), 0, "lr")
    check_at_least(Training(lr=2**40), 0, "lr")
    with pytest.raises(ValueError, match=f"^--lr must be at most {2**40}, got {2**40 + 1}$"):
        check_at_least(Training(lr=2**40 + 1), 0, "lr")
    wanted = "at least 0" if math.isfinite(value) else "at least 0 and finite"
    with pytest.raises(ValueError, match=re.escape(f"--lr must be {wanted}, got {value}")):
        check_at_least(Training(lr=value), 0, "lr")


def test_what_must_lie_between_and_choices():
    check_between(Training(lr=1.0), 0, 1, "lr")
    for value in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=re.escape(f"--lr must be from 0 to 1, got {value}")):
            check_between(Training(lr=value), 0, 1, "lr")
    check_choice(Training(model="a"), "model", "a", "b")
    with pytest.raises(ValueError, match="^--model is a or b, got 'c'$"):
        check_choice(Training(model="c"), "model", "a", "b")
