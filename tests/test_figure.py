"""docs/figure.py, read back: the axes' own labels turn the points of the SVG into numbers again. Oracle: the metrics
that they were drawn from."""

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from docs.figure import WIDTH, HEIGHT, figure, start_row, ticks

ROOT = Path(__file__).resolve().parent.parent
SVG = "{http://www.w3.org/2000/svg}"


def rows(accuracy, tokens):
    """A metrics.jsonl of 20 steps that evaluates every 10."""
    steps = [{"step": step, "accuracy": accuracy + 0.01 * step, "judgement_tok": tokens + step}
             for step in range(1, 21)]
    for row in steps[9::10]:
        row |= {"eval_accuracy": accuracy + 0.02 * row["step"], "eval_tokens": tokens + 1.5 * row["step"]}
    return steps


def to_numbers(group):
    """A function from SVG coordinates to what the panel's axes say there."""
    def axis(name, at, shift):
        labels = [t for t in group.iter(f"{SVG}text") if t.get("class") == name]
        return np.polyfit([float(t.get(at)) - shift for t in labels], [float(t.text) for t in labels], 1)
    x_line, y_line = axis("x", "x", 0), axis("y", "y", 5)  # a label's base line is 5 below its grid line
    return lambda x, y: (np.polyval(x_line, float(x)), np.polyval(y_line, float(y)))


def curves(group):
    """(rollouts, held-out pairs, dots) of a panel, each a list of (step, value)."""
    number = to_numbers(group)
    lines = {line.get("class"): [number(*point.split(",")) for point in line.get("points").split()]
             for line in group.iter(f"{SVG}polyline")}
    return lines["rollouts"], lines["held-out"], [number(c.get("cx"), c.get("cy")) for c in group.iter(f"{SVG}circle")]


@pytest.mark.parametrize("accuracy, tokens, lowest", [(0.6, 36, 50), (0.1, 700, 0)])
def test_points_are_where_the_axes_say(accuracy, tokens, lowest):
    steps = rows(accuracy, tokens)
    start = {"step": 0, "eval_accuracy": accuracy - 0.05, "eval_tokens": tokens - 7}
    root = ElementTree.fromstring(figure(steps, start))
    for key, held_out_key, factor in (("accuracy", "eval_accuracy", 100), ("judgement_tok", "eval_tokens", 1)):
        group, = (g for g in root.iter(f"{SVG}g") if g.get("id") == key)
        rollouts, held_out, dots = curves(group)
        by_hand = [(row["step"], factor * row[key]) for row in steps]
        evaluated = [(row["step"], factor * row[held_out_key]) for row in (start, steps[9], steps[19])]
        one_pixel = {"rtol": 0, "atol": 0.004 * max(value for _, value in by_hand + evaluated)}
        np.testing.assert_allclose(rollouts, by_hand, **one_pixel)
        np.testing.assert_allclose(held_out, evaluated, **one_pixel)
        assert dots == held_out
        least = min(float(t.text) for t in group.iter(f"{SVG}text") if t.get("class") == "y")
        assert least == (lowest if key == "accuracy" else 0)
        for x, y in re.findall(r"([\d.]+),([\d.]+)", ElementTree.tostring(group, encoding="unicode")):
            assert 0 <= float(x) <= WIDTH and 0 <= float(y) <= HEIGHT


def test_ticks_by_hand():
    assert ticks(0, 54) == [0, 10, 20, 30, 40, 50, 60]
    assert ticks(50, 100) == [50, 60, 70, 80, 90, 100]
    assert ticks(0, 3) == [0, 0.5, 1, 1.5, 2, 2.5, 3]
    assert ticks(0, 1000) == [0, 200, 400, 600, 800, 1000]


def test_step_0_counts_the_first_pairs(tmp_path):
    votes = [("a", "a", 10), ("a", "b", 20), (None, "b", 30), ("b", "b", 99)]
    (tmp_path / "judgements.jsonl").write_text("".join(
        json.dumps({"verdict": verdict, "winner": winner, "votes": [{"n_tokens": n}]}) + "\n"
        for verdict, winner, n in votes))
    assert start_row(tmp_path, 3) == {"step": 0, "eval_accuracy": 1 / 3, "eval_tokens": 20}


def test_the_command_writes_the_file_and_names_what_is_missing(tmp_path):
    def run(*argv):
        return subprocess.run([sys.executable, "docs/figure.py", *map(str, argv)], cwd=ROOT, capture_output=True,
                              text=True)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(0.6, 36)))
    (tmp_path / "config.json").write_text('{"options": {"eval_pairs": 4}}')
    done = run(tmp_path, "--out", tmp_path / "figure.svg")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "figure.svg").read_text() == figure(rows(0.6, 36))
    done = run(tmp_path / "nowhere", "--out", tmp_path / "other.svg")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}/nowhere/metrics.jsonl: no such file; name the folder")
    assert not (tmp_path / "other.svg").exists()
