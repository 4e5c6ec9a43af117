"""The picture in the README: accuracy and length of the judgements over the steps of a GRPO run, as an SVG.

    python docs/figure.py runs/demo/grpo --start runs/demo/judgements/distilled-greedy --out docs/grpo.svg

Two panels over the same steps, from the run's metrics.jsonl. Thin line: the step's rollouts (sampled, on training
pairs). Thick line with dots: the held-out pairs (greedy), at the steps that evaluated; at step 0, the judgements of the
run's starting model in --start on as many of the same pairs. The colours follow the reader's light or dark setting. The
background is drawn too: the text stays legible where the page and the browser disagree on that setting.
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script, only docs/ itself would be searched
from data.fields import at, need  # noqa: E402
from files import argument_parser, one_line_errors, refuse_closed, write_whole  # noqa: E402
from report.read import lines, read_object  # noqa: E402

WIDTH, HEIGHT = 840, 330
LEFT, RIGHT, TOP, BOTTOM, GAP = 48, 16, 78, 52, 64  # margins; GAP lies between the panels
PANEL = (WIDTH - LEFT - GAP - RIGHT) / 2
# keys of the rollouts and of the held-out pairs in metrics.jsonl, factor, title
PANELS = (("accuracy", "eval_accuracy", 100, "accuracy, % of verdicts that are right"),
          ("judgement_tok", "eval_tokens", 1, "length of a judgement, tokens"))
STYLE = """
  text { font: 14px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
  .title { font-weight: 600 }
  .paper { fill: #ffffff }
  .grid { stroke: #d1d9e0 }
  .rollouts { stroke: #bc4c00; stroke-width: 1.5; fill: none }
  .held-out { stroke: #0969da; stroke-width: 3; fill: none }
  circle { fill: #0969da }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc }
    .paper { fill: #0d1117 }
    .grid { stroke: #3d444d }
    .rollouts { stroke: #f0883e }
    .held-out { stroke: #58a6ff }
    circle { fill: #58a6ff }
  }
"""


def ticks(low, high, at_most=6):
    """Round numbers from low to the first at or above high: ticks(0, 54) is [0, 10, 20, 30, 40, 50, 60]."""
    rough = (high - low) / at_most
    scale = 10 ** math.floor(math.log10(rough))
    step = next(scale * factor for factor in (1, 2, 5, 10) if scale * factor >= rough)
    return [round(low + i * step, 6) for i in range(math.ceil((high - low) / step - 1e-9) + 1)]


def panel(left, title, rollouts, held_out, steps, levels):
    """The SVG elements of one panel; both curves are lists of (step, value), steps and levels the axes' ticks."""
    def x(step):
        return left + PANEL * step / steps[-1]

    def y(value):
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - levels[0]) / (levels[-1] - levels[0])

    def line(name, curve):
        points = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in curve)
        return f'<polyline class="{name}" points="{points}"/>'
    out = [f'<text class="title" x="{left}" y="{TOP - 16}">{title}</text>']
    for level in levels:
        out.append(f'<line class="grid" x1="{left}" x2="{left + PANEL}" y1="{y(level):.1f}" y2="{y(level):.1f}"/>')
        out.append(f'<text class="y" x="{left - 8}" y="{y(level) + 5:.1f}" text-anchor="end">{level:g}</text>')
    for step in steps:
        out.append(f'<text class="x" x="{x(step):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{step:g}</text>')
    out.append(f'<text x="{left + PANEL / 2}" y="{HEIGHT - 10}" text-anchor="middle">GRPO steps</text>')
    out += [line("held-out", held_out), line("rollouts", rollouts)]
    return out + [f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="5"/>' for step, value in held_out]


def figure(rows, start=None):
    """The SVG of the rows of a metrics.jsonl; start is a row of the held-out keys for step 0, or None."""
    steps = ticks(0, rows[-1]["step"])
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
           ' role="img">',
           "<title>Accuracy and length of the judgements over the steps of GRPO</title>", f"<style>{STYLE}</style>",
           f'<rect class="paper" width="{WIDTH}" height="{HEIGHT}"/>',
           f'<path class="rollouts" d="M{LEFT} 20h28"/>',
           f'<text x="{LEFT + 36}" y="25">rollouts of the step (sampled, training pairs)</text>',
           f'<path class="held-out" d="M{LEFT + 400} 20h28"/>',
           f'<text x="{LEFT + 436}" y="25">held-out pairs (greedy)</text>']
    for i, (key, held_out_key, factor, title) in enumerate(PANELS):
        rollouts = [(row["step"], factor * row[key]) for row in rows]
        evaluated = [row for row in ([start] if start else []) + rows if held_out_key in row]
        held_out = [(row["step"], factor * row[held_out_key]) for row in evaluated]
        values = [value for _, value in rollouts + held_out]
        levels = ticks(0, max(values))
        if key == "accuracy":  # half of the verdicts are right by chance: the lower half of the axis is mostly empty
            levels = ticks(50 if min(values) >= 50 else 0, 100)
        out += [f'<g id="{key}">', *panel(LEFT + i * (PANEL + GAP), title, rollouts, held_out, steps, levels), "</g>"]
    return "\n".join([*out, "</svg>", ""])


def read_rows(path, *keys):
    """The objects of a JSON lines file, each with numbers at these keys; ValueError names the line that is none."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; name the folder of a grpo.py run, and for --start that of judgements")
    rows = []
    for place, row in lines(path):
        with at(place):
            for key in keys:
                need(row, key, int, float)
        rows.append(row)
    return rows


def start_row(judged, n_pairs):
    """What grpo.py would have logged for the first n_pairs of these judgements, had it evaluated at step 0."""
    records = read_rows(judged / "judgements.jsonl")[:n_pairs]
    if not records:
        raise ValueError(f"{judged}: --start has no judgements; name the folder of an evaluation that is done")
    try:
        return {"step": 0, "eval_accuracy": sum(r["verdict"] == r["winner"] for r in records) / len(records),
                "eval_tokens": sum(r["votes"][0]["n_tokens"] for r in records) / len(records)}
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"{judged / 'judgements.jsonl'}: not all of its lines are judgements; name another "
                         "--start") from None


def main(run, start, out):
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"{out}: --out is a file to write, such as figure.svg, in a folder that is there")
    if out.exists() and b"<svg" not in out.read_bytes()[:100]:
        raise ValueError(f"{out}: is there and is no SVG; choose another --out")
    refuse_closed(out.parent)
    rows = read_rows(run / "metrics.jsonl", "step")
    if not rows or "eval_accuracy" not in rows[-1]:
        raise ValueError(f"{run}: holds no finished grpo.py run with --eval-data; name another folder")
    rows = read_rows(run / "metrics.jsonl", "step", "accuracy", "judgement_tok")
    options = read_object(run / "config.json").get("options")
    if start and (not isinstance(options, dict) or "eval_pairs" not in options):
        raise ValueError(f"{run / 'config.json'}: has no --eval-pairs of a grpo.py run, to which --start is cut")
    write_whole(out, figure(rows, start and start_row(start, options["eval_pairs"])))


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("run", type=Path, help="folder of a grpo.py run")
    parser.add_argument("--start", type=Path, help="folder with the starting model's judgements of the same pairs")
    parser.add_argument("--out", type=Path, default="docs/grpo.svg", help="the SVG to write")
    with one_line_errors():
        main(**vars(parser.parse_args()))
