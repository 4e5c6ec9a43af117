"""oracle.py among faults, killed and resumed, at length: more records and more kills than test_oracle.py has time for.

    python tests/oracle_faults.py                       200 records, 20 kills: a minute
    python tests/oracle_faults.py --records 50 --kills 5 --seed 3

The run is killed with SIGKILL when answers.jsonl holds a drawn number of lines; after every other kill its last line is
cut in half, too, as a kill in the middle of a write would leave it. Asserted, against the server's log and its table of
what must become of each record: no question that has an answer on disk is asked again, no answer is lost, nothing bad
is kept, and chains.jsonl is, byte for byte, that of a run that nothing interrupted. The last line is JSON.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from files import write_records  # noqa: E402
from oracle_server import FAULTS, Server, expected, rows, seeded_faults  # noqa: E402


def begin(folder, name, url):
    """oracle.py in a process of its own."""
    command = [sys.executable, ROOT / "oracle.py", "--data", folder / "pairs.jsonl", "--out", folder / name]
    command += ["--teacher", "t", "--endpoint", url, "--timeout", "0.3", "--backoff", "0.01", "--concurrency", "16"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=os.environ | {"TQDM_DISABLE": "1", "ORACLE_KEY": "sk-of-the-test"})


def ends(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output


def answered(file):
    """{(item, pass)} of the whole lines of answers.jsonl."""
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    records = [json.loads(line) for line in lines]
    return {(int(record["id"].removeprefix("pair/")), record["pass"]) for record in records}


def killed_and_resumed(folder, n, n_kills, seed):
    """Does what the top says, with n records; returns what was counted."""
    rng = random.Random(seed)
    write_records(folder / "pairs.jsonl", rows(n))
    file, n_halved = folder / "killed/answers.jsonl", 0
    with Server(seeded_faults(seed), stall=0.5) as server:
        ends(begin(folder, "whole", server.url))
        n_answers = len(answered(folder / "whole/answers.jsonl"))
        n_whole = server.begun = len(server.asked)  # the second run meets every fault again
        points = sorted(rng.sample(range(1, n_answers - 2), n_kills))
        for i, point in enumerate(points):
            before, n_before = answered(file), len(server.asked)
            process = begin(folder, "killed", server.url)
            while len(answered(file)) < point and process.poll() is None:
                time.sleep(0.002)
            process.kill()
            process.communicate()
            again = before & {asked[:2] for asked in server.asked[n_before:]}
            assert not again, f"asked again, though answered on disk: {again}"
            assert before <= answered(file), "answers were lost"
            content = file.read_bytes()
            if content and i % 2 == 0:
                last = content.rstrip(b"\n").rfind(b"\n") + 1
                file.write_bytes(content[:rng.randrange(last + 1, len(content))])
                n_halved += 1
            time.sleep(0.02)  # what the killed process had sent is still to arrive
        before, n_before = answered(file), len(server.asked)
        ends(begin(folder, "killed", server.url))
        assert not before & {asked[:2] for asked in server.asked[n_before:]}
        n_asked = len(server.asked) - n_whole
    assert answered(file) == answered(folder / "whole/answers.jsonl")
    whole, killed = ((folder / name / "chains.jsonl").read_bytes() for name in ("whole", "killed"))
    assert whole == killed, "the interrupted run's chains are not the other's"
    kept = [(c["id"], c["pass"], c["judgement"]) for c in map(json.loads, whole.decode().splitlines())]
    assert kept == expected(n), "what is kept is not what the table says"
    for path in folder.rglob("*.json*"):
        assert b"sk-of-the-test" not in path.read_bytes(), path
    faults = Counter(fault for _, _, fault, *_ in server.asked if fault in FAULTS)
    return {"records": n, "kills": len(points), "halved": n_halved, "kept": len(kept), "answers": n_answers,
            "requests_whole": n_whole, "requests_killed": n_asked, "faults": sum(faults.values()),
            "kinds_of_faults": len(faults)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=200)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began = time.time()
    with tempfile.TemporaryDirectory() as name:
        counted = killed_and_resumed(Path(name), args.records, args.kills, args.seed)
    print(json.dumps(counted | {"seed": args.seed, "seconds": round(time.time() - began, 1)}))
