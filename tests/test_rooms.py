"""The rooms of the house: who may import whom. Oracle: the table below, against the import statements in the files."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("benchmarks", "data", "experiments", "kernels", "report")  # packages; inside them imports are free

# Each may import what stands in its row, and nothing else of ours.
MAY_IMPORT = {
    "files": "",
    "reward": "",
    "intervals": "",
    "prompt": "",
    "kernels": "",
    "split": "",
    "options": "files",
    "tracking": "files",
    "tokenizer": "files",
    "folder": "files",
    "data": "files options prompt reward tokenizer",
    "ending": "files",
    "common": "ending files options",
    "model": "files folder kernels split",
    "checkpoint": "common files folder model",
    "run": "checkpoint files options tracking",
    "draw": "",
    "pages": "kernels",
    "plan": "folder model pages split",
    "plan_table": "model options pages plan split",
    "batch": "draw kernels model pages",
    "sample": "batch common draw files folder kernels model options pages split tokenizer",
    "rank": "data intervals",
    "one_answer": "data rank",
    "judgements": "common draw files one_answer",
    "judge": "data draw files folder judgements one_answer options prompt rank reward sample split tokenizer",
    "policy_reward": "data judge options rank",
    "distill": "checkpoint common data ending files folder judge model options plan plan_table prompt run sample tokenizer",
    # distill: stage 1 of the generated task
    "grpo": "batch checkpoint common data distill draw ending files folder judge model options plan plan_table prompt "
            "reward run sample tokenizer",
    "web": "",
    "live": "batch draw pages tokenizer",
    "serve": "data draw ending files judge live options rank reward sample tokenizer web",
    "benchmarks": "data intervals prompt reward",
    "evaluate": "benchmarks common data ending files folder judge judgements options sample",
    "report": "benchmarks data files options reward",
    "traces": "",
    "teachers": "data draw files folder sample",
    "oracle": "data files judge options prompt reward teachers traces",
    # demo: how it judges
    "experiments": "data demo distill files intervals judge options oracle policy_reward rank",
    "demo": "data distill draw evaluate files grpo judge options prompt sample",
}


def room_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0]


def imports():
    """{room: {room that it imports: "file:line" of the first place}}, imports inside functions too."""
    found = {name: {} for name in MAY_IMPORT}
    for path in sorted(ROOT.glob("*.py")) + [file for room in ROOMS for file in sorted((ROOT / room).glob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
                names = [node.module]
            for name in names:
                other = name.split(".")[0]
                if other in MAY_IMPORT and other != room_of(path):
                    found[room_of(path)].setdefault(other, f"{path.name}:{node.lineno}")
    return found


def test_every_file_has_a_room():
    assert {path.stem for path in ROOT.glob("*.py")} | set(ROOMS) == set(MAY_IMPORT)


def test_imports_are_those_of_the_table():
    for room, others in imports().items():
        allowed = set(MAY_IMPORT[room].split())
        strangers = {other: place for other, place in others.items() if other not in allowed}
        assert not strangers, f"{room} imports {strangers}"
        assert allowed == set(others), f"{room} no longer imports {allowed - set(others)}: take it out of the table"


def test_imports_point_one_way():
    """No circle: rooms can be put in an order in which each imports only what came before."""
    graph, order = {room: set(others) for room, others in imports().items()}, []
    while ready := [room for room in graph if room not in order and graph[room] <= set(order)]:
        order += ready
    assert set(order) == set(graph), f"a circle among {sorted(set(graph) - set(order))}"


def test_a_training_loop_holds_no_benchmark_and_no_page():
    graph, closure = imports(), {"grpo"}
    while more := {other for room in closure for other in graph[room]} - closure:
        closure |= more
    assert closure == {"grpo", "distill", "judge", "sample", "batch", "draw", "pages", "model", "kernels", "tokenizer",
                       "reward", "data", "common", "checkpoint", "ending", "run", "options", "tracking", "prompt",
                       "folder", "files", "split", "plan", "plan_table", "judgements", "rank", "one_answer", "intervals"}


def test_readme_counts_the_lines_as_they_are():
    """Its table of what to read, and the list below it, to a tenth: who plans an afternoon by it is not misled."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text[text.index("## The order to read"):text.index("## The method")]
    counted = re.findall(r"`([a-z/.]+)`(?: \| | \()([\d,]+)", section)
    assert {name for name, _ in counted} >= {"grpo.py", "batch.py", "kernels/", "judge.py", "report/", "data/"}
    for name, count in counted:
        path = ROOT / name
        files = [path] if path.is_file() else [f for f in path.iterdir() if f.suffix in (".py", ".js", ".css", ".html")]
        lines = sum(len(f.read_text(encoding="utf-8").splitlines()) for f in files)
        assert abs(lines - int(count.replace(",", ""))) <= lines / 10, f"{name}: README says {count}, it has {lines}"
