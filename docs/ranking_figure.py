"""The picture in docs/ranking.md: how often each schedule finds the best answer, over the judgements that it takes.

    python docs/ranking_figure.py runs/rank/schedules.json --out docs/ranking.svg

Four of the tasks that experiments/rank_schedules.py measured (PANELS), a panel each. A schedule is a line from one
judgement a pair (filled) to both orders (hollow); the bars are 95% intervals.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script, only docs/ itself would be searched
from data.fields import at, need  # noqa: E402
from docs.figure import STYLE, ticks  # noqa: E402
from files import argument_parser, one_line_errors, parse_json, refuse_closed, write_whole  # noqa: E402

WIDTH, HEIGHT = 840, 560
LEFT, TOP, ACROSS, DOWN = 52, 76, 420, 244  # of the first panel, and from one to the next
PANEL_WIDTH, PANEL_HEIGHT = 352, 166
PANELS = (("grpo: reasoning", "digits, 8 answers, the demo's last model"),
          ("grpo: chat", "greetings, 8 answers, the demo's last model"),
          ("RMB, 0.8, by chance", "RMB's sizes, simulated: 80 %, errs by chance"),
          ("RMB, 0.8, by place", "RMB's sizes, simulated: 80 %, errs by place"))
SCHEDULES = ("all", "circular", "swiss")
COLOURS = STYLE + """
  .all { stroke: #0969da } .circular { stroke: #bc4c00 } .swiss { stroke: #1a7f37 }
  g.all circle { fill: #0969da } g.circular circle { fill: #bc4c00 } g.swiss circle { fill: #1a7f37 }
  g circle.both { fill: #ffffff }
  .bar { stroke-width: 1.5 }
  .line, circle { stroke-width: 2 }
  @media (prefers-color-scheme: dark) {
    .all { stroke: #58a6ff } .circular { stroke: #f0883e } .swiss { stroke: #3fb950 }
    g.all circle { fill: #58a6ff } g.circular circle { fill: #f0883e } g.swiss circle { fill: #3fb950 }
    g circle.both { fill: #0d1117 }
  }
"""


def panel(left, top, title, rows):
    """The SVG elements of one task's rows."""
    steps = ticks(0, max(row["judgements"] for row in rows))
    levels = ticks(0, 100)

    def x(judgements):
        return round(left + PANEL_WIDTH * judgements / steps[-1], 1)

    def y(share):
        return round(top + PANEL_HEIGHT * (1 - share), 1)
    out = [f'<text class="title" x="{left}" y="{top - 14}">{title}</text>']
    for level in levels:
        at_y = y(level / 100)
        out.append(f'<line class="grid" x1="{left}" x2="{left + PANEL_WIDTH}" y1="{at_y}" y2="{at_y}"/>')
        out.append(f'<text class="y" x="{left - 8}" y="{at_y + 5:.1f}" text-anchor="end">{level:g}</text>')
    for step in steps:
        out.append(f'<text class="x" x="{x(step)}" y="{top + PANEL_HEIGHT + 20}" text-anchor="middle">{step:g}</text>')
    for schedule in SCHEDULES:
        one, both = sorted((row for row in rows if row["schedule"] == schedule), key=lambda row: row["both_orders"])
        out.append(f'<g class="{schedule}">')
        for row in (one, both):
            out.append(f'<path class="bar" d="M{x(row["judgements"])} {y(row["low"])}V{y(row["high"])}"/>')
        out.append(f'<path class="line" d="M{x(one["judgements"])} {y(one["found"])}'
                   f'L{x(both["judgements"])} {y(both["found"])}"/>')
        for row, kind in ((one, "one"), (both, "both")):
            out.append(f'<circle class="{kind}" cx="{x(row["judgements"])}" cy="{y(row["found"])}" r="5"/>')
        out.append("</g>")
    return out


def figure(rows):
    """The SVG of the rows of schedules.json; ValueError if a panel's six are not among them."""
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
           ' role="img">',
           "<title>How often each schedule finds the best answer, over the judgements that it takes</title>",
           f"<style>{COLOURS}</style>", f'<rect class="paper" width="{WIDTH}" height="{HEIGHT}"/>']
    for i, schedule in enumerate(SCHEDULES):
        place = LEFT + 110 * i
        out.append(f'<g class="{schedule}"><path class="line" d="M{place} 22h28"/></g>')
        out.append(f'<text x="{place + 36}" y="27">{schedule}</text>')
    out.append(f'<g class="all"><circle cx="{LEFT + 380}" cy="22" r="5"/><circle class="both" cx="{LEFT + 570}" '
               'cy="22" r="5"/></g>')
    out.append(f'<text x="{LEFT + 394}" y="27">one judgement a pair</text>')
    out.append(f'<text x="{LEFT + 584}" y="27">both orders</text>')
    for i, (task, title) in enumerate(PANELS):
        mine = [row for row in rows if row["task"] == task]
        if len(mine) != 2 * len(SCHEDULES):
            raise ValueError(f"{len(mine)} rows are of the task {task!r}, not 6: measure judges in folders named grpo "
                             "(or grpo/model), and --rmb, with 0.8 among --accuracies")
        left, top = LEFT + i % 2 * ACROSS, TOP + i // 2 * DOWN
        out += [f'<g id="panel-{i}">', *panel(left, top, title, mine), "</g>"]
    out.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 12}" text-anchor="middle">judgements a question; upwards: the best '
               "answer is found, %</text>")
    return "\n".join([*out, "</svg>", ""])


def main(measured, out):
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"{out}: --out is a file to write, such as figure.svg, in a folder that is there")
    refuse_closed(out.parent)
    rows = parse_json(measured.read_bytes())
    with at(measured):
        for row in rows:
            for key in ("judgements", "found", "low", "high"):
                need(row, key, int, float)
    write_whole(out, figure(rows))


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("measured", type=Path, help="what experiments/rank_schedules.py has written")
    parser.add_argument("--out", type=Path, default="docs/ranking.svg", help="the SVG to write")
    with one_line_errors():
        main(**vars(parser.parse_args()))
