"""The report page: how long a browser takes to open it and to react, with texts of a real evaluation's size.

    python -m bench.report --judgements 10000
    python -m bench.report --judgements 41000 --runs 3

A judgement has about 4 KB and its pair as much, in words drawn at random from 4,000 made-up ones, which deflate no
better than English does. Measured in headless Chromium (playwright; both must be installed), from a new browser
each time: "open" from the start of navigation until the list and the first judgement are on the screen; then keys and
filters, each until the page has shown the change; then a search through all texts for a word that only the last
judgement has. There is no peer; the last line is JSON, medians over the runs.
"""

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from report import build, find, write

OPENED = """() => document.querySelector("#permalink") && document.querySelectorAll("a.row").length > 5 &&
    performance.now()"""
REACT = """async action => {
    const shown = () => document.querySelector("#permalink").textContent + document.querySelector("#count").textContent;
    const began = performance.now(), before = shown();
    document.querySelector(action).click();
    while (shown() === before)
        await new Promise(requestAnimationFrame);
    await new Promise(requestAnimationFrame);
    return performance.now() - began; }"""


def make(folder, n, rng):
    """An evaluation of n judgements in the folder."""
    letters = "etaoinshrdlucmfwypvbgk"
    words = ["".join(rng.choices(letters, weights=range(len(letters), 0, -1), k=rng.randint(2, 9)))
             for _ in range(4000)]
    weights = [1 / (k + 10) for k in range(len(words))]

    def text(size):
        return " ".join(rng.choices(words, weights, k=size // 6))
    with open(folder / "pairs.jsonl", "w") as pairs, open(folder / "judgements.jsonl", "w") as judgements:
        for i in range(n):
            source = rng.choice(["reward-bench", "rm-bench", "rmb"])
            a, b, winner, verdict = text(1800), text(1800), rng.choice("ab"), rng.choice(["a", "a", "b", "b", None])
            about = {"id": f"{source}/{i}", "winner": winner, "source": source, "domain": f"section {i % 4}",
                     "subset": f"subset {i % 23}", "item": str(i)}
            pairs.write(json.dumps({**about, "prompt": [{"role": "user", "content": text(400)}], "answer_a": a,
                                    "answer_b": b}) + "\n")
            answer = f"\n</eval>\n<answer>[[{verdict.upper()}]]</answer>" if verdict else ""
            judgement = (f"<type>Chat</type>\n<rubric>\n1. {text(30)} (60%): {text(150)}\n"
                         f"2. {text(30)} (40%): {text(150)}\n<justify>{text(400)}</justify>\n</rubric>\n"
                         f"<eval>\n{text(1400)}\n<quote_A>{a[50:200]}</quote_A>\n{text(800)}\n"
                         f"<quote_B>{b[90:200]}</quote_B>\n{text(700)}{' zyzzyva' if i == n - 1 else ''}{answer}")
            vote = {"text": judgement, "n_tokens": len(judgement) // 5, "finished": bool(answer), "verdict": verdict,
                    "seconds": 9.5}
            judgements.write(json.dumps({**about, "prompt_hash": f"{i:016x}", "n_prompt_tokens": 900, "votes": [vote],
                                         "verdict": verdict, "seconds": 9.5}) + "\n")


def measure(playwright, executable, file):
    """One visit: seconds to open, milliseconds of the reactions, seconds of the search, megabytes of script memory."""
    browser = playwright.chromium.launch(executable_path=executable,
                                         args=["--no-sandbox", "--enable-precise-memory-info"])
    page = browser.new_page(viewport={"width": 1366, "height": 768})
    page.set_default_timeout(120_000)
    page.goto(f"file://{file}#view=read", wait_until="commit")
    row = {"open_s": page.wait_for_function(OPENED).json_value() / 1000}
    page.wait_for_load_state("load")
    row["loaded_s"] = page.evaluate("performance.timing.loadEventEnd - performance.timing.navigationStart") / 1000
    row["next_ms"] = statistics.median(page.evaluate(REACT, "#next") for _ in range(20))
    row["filter_ms"] = statistics.median(page.evaluate(REACT, button)
                                         for button in ("[data-is=wrong]", "[data-is=wrong]") * 5)
    began = time.perf_counter()
    page.fill("#q", "ZYZZYVA")
    frames = page.evaluate("""async () => { let worst = 0, last = performance.now();
        while (!/searched/.test(document.querySelector("#progress").textContent)) {
            await new Promise(requestAnimationFrame);
            worst = Math.max(worst, performance.now() - last);
            last = performance.now(); }
        return worst; }""")
    assert page.locator("#count b").text_content() == "1", "the search has not found the one judgement"
    row |= {"search_s": time.perf_counter() - began, "search_worst_frame_ms": frames,
            "script_mb": page.evaluate("performance.memory.usedJSHeapSize") / 1e6}
    browser.close()
    return row


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judgements", type=int, default=10_000)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        sys.exit("error: bench.report needs playwright: pip install playwright")
    executable = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if executable is None:
        sys.exit("error: no chromium, chromium-browser or google-chrome on PATH: install one")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, args.judgements, random.Random(0))
        raw_mb = sum(f.stat().st_size for f in folder.glob("*.jsonl")) / 1e6
        began = time.perf_counter()
        write(build(find([name])), folder / "report.html")
        build_s, page_mb = time.perf_counter() - began, (folder / "report.html").stat().st_size / 1e6
        with sync_playwright() as playwright:
            runs = [measure(playwright, executable, folder / "report.html") for _ in range(args.runs)]
    medians = {key: statistics.median(r[key] for r in runs) for key in runs[0]}
    print(f"{args.judgements} judgements, {raw_mb:.0f} MB of JSON lines -> {page_mb:.0f} MB page in {build_s:.1f} s")
    for key, value in medians.items():
        low, high = min(r[key] for r in runs), max(r[key] for r in runs)
        print(f"{key:24}{value:10.2f}   ({low:.2f} to {high:.2f} over {args.runs} runs)")
    row = {"bench": "report", "device": "cpu", "work": f"{args.judgements} judgements", "raw_mb": raw_mb,
           "page_mb": page_mb, "build_s": build_s, **medians}
    print(json.dumps({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}))
