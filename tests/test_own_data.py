"""docs/own-data.md, as it stands: its commands and snippets run in order, and what it promises is there. Oracle: the
page's own figures, with room for another processor's."""

import json
import re
import runpy
import shlex
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/own-data.md").read_text(encoding="utf-8")


def commands(page=PAGE):
    """What a page's indented blocks do: ("python", source) of a snippet, ("run", words) of a command."""
    blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", page, re.M)
    text = "\n".join(textwrap.dedent(block) for block in blocks).replace("\\\n", " ")
    for snippet, line in re.findall(r"^python - <<'END'\n(.*?)^END$|^(\S[^\n]*)$", text, re.M | re.S):
        yield ("python", snippet) if snippet else ("run", shlex.split(line, comments=True))


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """The folder that the page leaves."""
    here = tmp_path_factory.mktemp("own-data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.syspath_prepend(str(ROOT))
        for kind, what in commands():
            if kind == "python":
                exec(what, {})
            elif what[0] == "mkdir":
                Path(what[1]).mkdir()
            else:
                module = what[1] == "-m"
                patch.setattr(sys, "argv", what[2:] if module else what[1:])
                if module:
                    runpy.run_module(what[2], run_name="__main__", alter_sys=True)
                else:
                    runpy.run_path(str(ROOT / what[1]), run_name="__main__")
    return here / "mine"


def test_the_page_has_the_commands_of_every_step():
    ran = [what[1] for kind, what in commands() if kind == "run"]
    assert ran == ["mine", "evaluate.py", "distill.py", "grpo.py", "evaluate.py", "-m"]
    assert sum(kind == "python" for kind, _ in commands()) == 3


def test_held_out_pairs_are_judged_better_after_each_step(mine):
    """Measured on three seeds: 0 before, 60 to 77 % after the chains, 13 to 38 points more after GRPO."""
    def accuracy(folder):
        scores = json.loads((mine / folder / "scores.json").read_text())
        row, = (row for row in scores["rows"] if row["kind"] == "overall")
        assert row["n"] == 60
        return row["score"]
    before, chains, grpo = (accuracy(folder) for folder in ("before", "after/sft-model", "after/grpo-model"))
    assert before == 0 and chains > 0.5 and grpo >= chains + 0.05, (before, chains, grpo)

    steps = rows(mine / "grpo")
    accuracies = [row["accuracy"] for row in steps]
    assert sum(accuracies[-5:]) / 5 > sum(accuracies[:5]) / 5 + 0.05, accuracies
    assert all(row["n_skipped"] == 0 for row in [*steps, *rows(mine / "sft")])
    assert rows(mine / "sft")[-1]["loss"] < 0.05 and rows(mine / "sft")[-1]["eval_no_verdict"] < 0.1


def test_the_files_that_the_page_names_are_there(mine):
    trained, kept = ({json.dumps(json.loads(line), sort_keys=True) for line in (mine / name).read_text().splitlines()}
                     for name in ("train.jsonl", "heldout.jsonl"))
    assert len(trained) == 140 and len(kept) == 60 and not trained & kept
    assert len((mine / "chains.jsonl").read_text().splitlines()) == 20
    for name in ("sft/model/prompt.txt", "grpo/model/prompt.txt", "grpo/best/prompt.txt", "grpo/best/best.json"):
        assert (mine / name).is_file(), name
    assert (mine / "report.html").stat().st_size > 10_000
