"""The server against the sampler on the same work in one file: judgements a second, and whether they are the same.

    python -m bench.serve --model runs/demo/grpo/model --pairs runs/demo/data/heldout.jsonl
    python -m bench.serve --shape 25m --pairs runs/demo/data/heldout.jsonl      random weights, judgements of 64 tokens

The server is a process of its own; 64 clients, each a thread here with a connection that it keeps, send it one pair
after the other, until all are judged. The file's side is Judge.judge with as many slots. The two take turns. --stream:
the clients have the same prompts completed by /v1/chat/completions, streamed. JSON line last.
"""

import argparse
import http.client
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from pathlib import Path

import torch

from bench.twins import SHAPES, geometry
from data import toy
from data.pairs import read_pairs, to_json
from judge import Config, load_judge
from model import Model, ModelConfig
from prompt import prompt_path, render


def random_folder(folder, shape):
    """A model of random weights that reads the toy task."""
    n_vocab = toy.write_tokenizer(folder)
    raw = geometry(*SHAPES[shape]).raw | {"vocab_size": n_vocab, "max_position_embeddings": 1024}
    Model.random(ModelConfig.from_dict(raw)).save_pretrained(folder)
    (folder / "prompt.txt").write_text(prompt_path("toy").read_text())


class Service:
    """serve.py in a process of its own."""

    def __init__(self, args, folder):
        command = [sys.executable, "serve.py", "--model", str(folder), "--port", "0", "--threads", str(args.threads),
                   "--n-slots", str(args.slots), "--max-new-tokens", str(args.new)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.port = int(re.search(r":(\d+): ", self.process.stdout.readline())[1])

    def end(self):
        self.process.terminate()
        assert self.process.wait() == 0


def ask_all(port, path, bodies, n_clients):
    """The replies' bodies, in order; each client asks for whatever is next."""
    coming, replies, faults = deque(enumerate(bodies)), [None] * len(bodies), []

    def client():
        connection = http.client.HTTPConnection("127.0.0.1", port)
        while coming:
            try:
                i, body = coming.popleft()
            except IndexError:  # another was faster
                break
            connection.request("POST", path, body)
            reply = connection.getresponse()
            replies[i] = reply.read()
            if reply.status != 200:
                faults.append(replies[i])
    threads = [threading.Thread(target=client) for _ in range(n_clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults, faults[0]
    return replies


def text_of(reply, streamed):
    if not streamed:
        return json.loads(reply)["votes"][0]["text"]
    chunks = [json.loads(line[6:]) for line in reply.decode().splitlines() if line.startswith("data: {")]
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="a judge's folder; or ...")
    parser.add_argument("--shape", choices=SHAPES, help="... random weights of this shape")
    parser.add_argument("--pairs", required=True)
    parser.add_argument("--stream", action="store_true")
    for name, default in dict(clients=64, slots=64, n=640, new=64, threads=1, runs=5).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.model or temporary)
        if args.shape:
            random_folder(folder, args.shape)
        judge = load_judge(Config(model=str(folder), threads=args.threads, n_slots=args.slots, temperature=1.0,
                                  max_new_tokens=args.new))
        pairs = read_pairs(args.pairs)
        pairs = (pairs * -(-args.n // len(pairs)))[:args.n]
        prompts = [judge.encode(pair) for pair in pairs]
        path = "/v1/chat/completions" if args.stream else "/judge"
        if args.stream:
            bodies = [{"messages": render(judge.prompt, pair), "stream": True, "temperature": 1} for pair in pairs]
        else:
            bodies = [to_json(pair) | {"temperature": 1} for pair in pairs]
        bodies = [json.dumps(body) for body in bodies]
        service, seconds = Service(args, folder), {"file": [], "served": []}
        try:
            for run in range(args.runs + 1):  # the first warms up
                began = time.perf_counter()
                records = dict(judge.judge(pairs, prompts=prompts))
                middle = time.perf_counter()
                replies = ask_all(service.port, path, bodies, args.clients)
                if run:
                    seconds["file"].append(middle - began)
                    seconds["served"].append(time.perf_counter() - middle)
                    print(f"run {run}: file {middle - began:.2f} s, served {seconds['served'][-1]:.2f} s", flush=True)
        finally:
            service.end()
    votes = [records[i]["votes"][0] for i in range(args.n)]
    same = sum(vote["text"] == text_of(reply, args.stream) for vote, reply in zip(votes, replies))
    n_tokens = sum(vote["n_tokens"] for vote in votes)
    rate = {side: n_tokens / statistics.median(times) for side, times in seconds.items()}
    row = {"bench": "serve", "device": "cuda" if torch.cuda.is_available() else "cpu", "threads": args.threads,
           "model": args.shape or args.model, "streamed": args.stream,
           "work": f"{args.n} judgements, {n_tokens} tokens, {args.clients} clients, {args.slots} slots", "same": same,
           "ours": round(rate["served"], 1), "peer": round(rate["file"], 1),
           "ratio": round(rate["served"] / rate["file"], 3),
           "ratios": [round(f / s, 3) for f, s in zip(seconds["file"], seconds["served"])]}
    print(json.dumps(row))


if __name__ == "__main__":
    main()
