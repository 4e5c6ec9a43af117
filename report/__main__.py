"""The page of what lies in some folders, to be opened in a browser.

    python -m report runs/eval                                  # an evaluation: runs/eval/report.html
    python -m report runs/demo-s0 --out demo.html               # all that lies in a folder: evaluations, training runs
    python -m report runs/eval-7b runs/eval-14b runs/grpo       # several, side by side
    python -m report runs/data/chains.jsonl                     # the quality of chains, as data/quality.py counts it
"""

from dataclasses import dataclass
from pathlib import Path

from options import parse_config
from files import one_line_errors, refuse_closed
from report import build, find, write
from report.build import INDEX


@dataclass(frozen=True)
class Config:
    runs: tuple[str, ...]  # folders of evaluations, training runs or chains, folders that hold such, or .jsonl files
    out: str | None = None  # the page to write; without it, report.html in the first folder. An older page is replaced


def check_out(out):
    """Only a page of this program may be replaced."""
    if out.is_dir():
        raise ValueError(f"{out}: is a folder; --out is the file to write, such as {out / 'report.html'}")
    if not out.parent.is_dir():
        raise ValueError(f"{out.parent}: no such folder; make it, or choose another --out")
    refuse_closed(out.parent)
    if out.exists() and INDEX.encode() not in out.read_bytes():
        raise ValueError(f"{out}: is there and is not a page of this program; choose another --out")


def main(cfg):
    found = find(cfg.runs)
    first = Path(cfg.runs[0])
    out = Path(cfg.out) if cfg.out else (first if first.is_dir() else first.parent) / "report.html"
    check_out(out)
    page = build(found)
    write(page, out)
    counted = {"judgement": len(page.rows), "model": len(page.models), "training run": len(page.runs),
               "file": len(found["chains"])}
    judged, models, runs, files = (f"{n} {name}{'' if n == 1 else 's'}" for name, n in counted.items())
    chains = f", {files} of chains" if found["chains"] else ""
    print(f"{out}: {judged} of {models}, {runs}{chains}, {out.stat().st_size / 1e6:.1f} MB; open it in a browser")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_config(Config))
