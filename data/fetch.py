"""Downloads models, data sets and prompts; converts parquet files to JSON lines that data/pairs.py reads.

    python data/fetch.py Qwen/Qwen2.5-7B-Instruct          a model: the folder runs/data/Qwen/Qwen2.5-7B-Instruct
    python data/fetch.py rm-r1-distill-sft rm-r1-rlvr      runs/data/rm-r1-distill-sft.jsonl, runs/data/rm-r1-rlvr.jsonl
    python data/fetch.py reward-bench --files DIR_OR_FILE  converts what is already here: no network

    name                   comes from                                what it gives
    rm-r1-distill-sft      gaotang/RM-R1-Distill-SFT                 OUT/NAME.jsonl, chains for distill.py
    rm-r1-rlvr             gaotang/RM-R1-after-Distill-RLVR          OUT/NAME.jsonl, pairs for grpo.py, as are the next:
    rm-r1-reasoning-rlvr   gaotang/RM-R1-Reasoning-RLVR
    math-step-dpo          xinlai/Math-Step-DPO-10K
    code-preference-pairs  Vezora/Code-Preference-Pairs              (the Hub's own parquet copy of it)
    skywork-80k            Skywork/Skywork-Reward-Preference-80K-v0.2
    reward-bench           allenai/reward-bench, split "filtered"    OUT/NAME.jsonl for evaluate.py --rewardbench
    reward-bench-2         allenai/reward-bench-2 (ODC-BY)           OUT/NAME.jsonl for --rewardbench2
    judgebench             ScalerLab/JudgeBench (MIT)                OUT/NAME/data/, both files, for --judgebench
    rm-bench               github.com/THU-KEG/RM-Bench               OUT/NAME/data/total_dataset.json for --rmbench
    rmb                    github.com/Zhou-Zoey/RMB-Reward-...       OUT/NAME/RMB_dataset/ for --rmb
    rm-r1-prompts          github.com/RM-R1-UIUC/RM-R1               OUT/rm-r1-instruct.txt, OUT/rm-r1-reasoning.txt:
                                                                     the released models' own prompts, for --prompt
    ORG/MODEL              a model of the Hub                        OUT/ORG/MODEL/: config, tokenizer, safetensors

OUT/NAME/ keeps the files under their own paths, and fetched.json: repository, commit, sizes, checksums. Every file is
compared with the checksum that its host lists. Started again, it downloads what is not there whole, and goes on in the
middle of a file. Nothing pickled is ever downloaded, and nothing that was downloaded is run: the prompts stand in a
file of Python, which is parsed (--file takes a copy of it that is here already). The environment variable HF_TOKEN
opens gated repositories, HF_ENDPOINT names a mirror of the Hub. Tested against servers that play the two hosts; nobody
has run it on the real ones yet.
"""

import argparse
import hashlib
import http.client
import json
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from urllib.parse import quote

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script, only data/ itself would be searched
from files import NotJson, argument_parser, json_line, one_line_errors, parse_json  # noqa: E402
from files import refuse_file, whole, write_whole  # noqa: E402
from data import pairs  # noqa: E402
from data.rm_r1_prompts import write_prompts  # noqa: E402

GITHUB_API, GITHUB_RAW = "https://api.github.com", "https://raw.githubusercontent.com"
TIMEOUT_S, PAUSES_S = 60, (1, 4, 15)       # silence that ends an attempt; waits before the next one
MAY_PASS = (408, 429, 500, 502, 503, 504)  # HTTP statuses


@dataclass(frozen=True)
class Source:
    host: str                     # "datasets" or "models" of the Hugging Face Hub, or "github"
    repo: str
    patterns: tuple[str, ...]     # of the paths to download, * matches / too; the first must match something
    keys: dict | None = None      # of the records to write: each one's parquet column, or "COLUMN + COLUMN" to join
    domain: str = ""
    chains: bool = False          # the records are chains, not pairs
    prompts: bool = False         # the one file is Python, and write_prompts takes the prompts out of it
    revision: str = "main"


TRAIN, RM_R1 = ("data/train-*.parquet",), {"context_messages": "context_messages", "winner": "winner"}
SOURCES = {
    "rm-r1-distill-sft": Source("datasets", "gaotang/RM-R1-Distill-SFT", TRAIN, RM_R1, chains=True),
    "rm-r1-rlvr": Source("datasets", "gaotang/RM-R1-after-Distill-RLVR", TRAIN, RM_R1),
    "rm-r1-reasoning-rlvr": Source("datasets", "gaotang/RM-R1-Reasoning-RLVR", TRAIN, RM_R1),
    "math-step-dpo": Source("datasets", "xinlai/Math-Step-DPO-10K", TRAIN,
                            {"prompt": "prompt", "chosen": "initial_reason_steps + full_chosen",
                             "rejected": "initial_reason_steps + full_rejected"}, "math"),
    "code-preference-pairs": Source("datasets", "Vezora/Code-Preference-Pairs", ("default/train/*.parquet",),
                                    {"prompt": "input", "chosen": "accepted", "rejected": "rejected"}, "code",
                                    revision="refs/convert/parquet"),
    "skywork-80k": Source("datasets", "Skywork/Skywork-Reward-Preference-80K-v0.2", TRAIN,
                          {"source": "source", "chosen": "chosen", "rejected": "rejected"}, "chat"),
    "reward-bench": Source("datasets", "allenai/reward-bench", ("data/filtered-*.parquet",),
                           {key: key for key in ("prompt", "chosen", "rejected", "subset", "id")}),
    "reward-bench-2": Source("datasets", "allenai/reward-bench-2", ("data/test-*.parquet",),
                             {key: key for key in ("prompt", "chosen", "rejected", "num_correct", "subset", "id")}),
    "judgebench": Source("datasets", "ScalerLab/JudgeBench", ("data/gpt-*.jsonl", "data/claude-*.jsonl")),
    "rm-bench": Source("github", "THU-KEG/RM-Bench", ("data/total_dataset.json",),
                       revision="73c52d7b27b361621361ec959ac6c0eb9bb7a689"),
    "rmb": Source("github", "Zhou-Zoey/RMB-Reward-Model-Benchmark", ("RMB_dataset/*.json",),
                  revision="2be3180857f2190b7ffa929d43190835627f1f4d"),
    "rm-r1-prompts": Source("github", "RM-R1-UIUC/RM-R1", ("eval/reward-bench/rewardbench/generative.py",),
                            prompts=True, revision="d4c2542f0608e019074b9b2322fe6502e6ab7ab0")}
MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*.json",
               "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template.*")


def source_of(name):
    if name in SOURCES:
        return SOURCES[name]
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII):
        raise ValueError(f"{name!r} is neither ORG/MODEL nor one of {', '.join(SOURCES)}")
    return Source("models", name, MODEL_FILES)


def parse_options(argv=None):
    """The options of the command line; what makes no sense ends the program with one line and status 2."""
    parser = argument_parser(__doc__)
    parser.add_argument("what", nargs="+", metavar="WHAT", help="names from the table above, or models as ORG/MODEL")
    parser.add_argument("--out", default="runs/data", help="folder for what is fetched and converted "
                        "(default: %(default)s)")
    parser.add_argument("--revision", help="commit, tag or branch of the one thing named; default: as in SOURCES")
    parser.add_argument("--files", "--file", help="a parquet file, or a folder of them, to convert instead of "
                        "downloading the one set named; of rm-r1-prompts the file generative.py")
    parser.add_argument("--skip-bad", action=argparse.BooleanOptionalAction, default=False,
                        help="skip unusable rows and count them, instead of stopping at the first")
    options = parser.parse_args(argv)
    try:
        sources = [source_of(name) for name in options.what]
    except ValueError as e:
        parser.error(str(e))
    for name in ("out", "revision", "files"):
        if getattr(options, name) is not None and not getattr(options, name).strip():
            parser.error(f"--{name} is empty: give a value, or leave the option out")
    if len(sources) > 1 and (options.revision or options.files):
        parser.error("--revision and --files are about one thing: name only that")
    if options.files and options.revision:
        parser.error("--files converts what is here; --revision is about what to download")
    if options.files and not sources[0].keys and not sources[0].prompts:
        parser.error(f"--files: {options.what[0]} is not converted, its files are used as they are")
    return options


# ---- network

class _Passing(ValueError):
    """What may be gone at the next attempt."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Sends the token to the Hub alone, not to the storage that the Hub redirects to."""

    def redirect_request(self, request, *args):
        new = super().redirect_request(request, *args)
        if new and (new.type, new.host) != (request.type, request.host):
            new.headers.pop("Authorization", None)
        return new


def hub():
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if not re.match("https?://.", endpoint):
        raise ValueError(f"HF_ENDPOINT is {endpoint!r}: unset it, or set it to a mirror's https://...")
    return endpoint.rstrip("/")


def chunks(url, start=0):
    """(response, offset, bytes) of what is at url, from the byte `start` on if the server can, else from 0."""
    request = urllib.request.Request(url, headers={"User-Agent": "fetch.py"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    token = os.environ.get("HF_TOKEN", "").strip()
    if not token.isascii():
        raise ValueError("HF_TOKEN has characters that no token has: copy it again")
    if token and url.startswith(hub() + "/"):
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.build_opener(_Redirects).open(request, timeout=TIMEOUT_S) as response:
            offset = start if response.status == 206 else 0
            while chunk := response.read(1 << 20):
                yield response, offset, chunk
                offset += len(chunk)
            if response.length:            # read(n) says nothing about an early end
                raise _Passing(f"{url}: the connection ended {response.length} bytes early: start again to go on")
    except urllib.error.HTTPError as e:
        kind = _Passing if e.code in MAY_PASS else ValueError
        raise kind(f"{url}: HTTP {e.code}, {_advice(e.code, url)}") from None
    except (OSError, http.client.HTTPException) as e:
        reason = getattr(e, "reason", None) or e
        raise _Passing(f"{url}: no answer ({reason}): check the network (behind a proxy, set https_proxy), then "
                       "start again") from None


def _advice(code, url):
    if code in (401, 403) and url.startswith(hub() + "/"):
        return ("no such repository, or a closed one: check the name; if its page asks for consent, give it, and set "
                "HF_TOKEN to a token of your account")
    if code in (403, 429):
        return "refused, perhaps after too many requests: wait an hour and start again"
    if code == 404:
        return "not found: check the name and --revision"
    return "the server failed: start again later"


def patiently(action, progress=lambda: None):
    """action(), tried again after each of PAUSES_S while it fails in passing; from the first, if progress() moved."""
    failures = 0
    reached = progress()
    while True:
        try:
            return action()
        except _Passing:
            if progress() != reached:
                failures = 0
                reached = progress()
            if failures == len(PAUSES_S):
                raise
        time.sleep(PAUSES_S[failures])
        failures += 1


def get_json(url):
    """(value, address of the next page or None)"""
    def attempt():
        body, links = b"", ""
        for response, _, chunk in chunks(url):
            body += chunk
            links = response.headers.get("Link", "")
        return body, re.search(r'<([^>]+)>; *rel="next"', links)
    body, following = patiently(attempt)
    try:
        return parse_json(body), following and following[1]
    except NotJson:
        raise ValueError(f"{url}: the answer is not JSON: is a proxy or HF_ENDPOINT in the way?") from None


# ---- files

@dataclass(frozen=True)
class Remote:
    path: str
    url: str
    size: int
    checksum: str    # sha256 of the content, or git's sha1 of "blob SIZE\0" and the content: their lengths tell


def listing(source, revision):
    """(commit, [Remote]) of the source's files at a revision."""
    commit, remotes = github_listing(source, revision) if source.host == "github" else hub_listing(source, revision)
    remotes = [remote for remote in remotes if any(fnmatchcase(remote.path, pattern) for pattern in source.patterns)]
    if not any(fnmatchcase(remote.path, source.patterns[0]) for remote in remotes):
        raise ValueError(f"{source.repo} at {commit}: it has no {source.patterns[0]}: check the name and --revision"
                         + (" (pickled weights are never fetched)" if source.host == "models" else ""))
    for remote in remotes:
        if remote.path.startswith("/") or ".." in remote.path.split("/"):
            raise ValueError(f"{source.repo} at {commit}: the path {remote.path!r} leads out of its folder: do not "
                             "use it")
    return commit, sorted(remotes, key=lambda remote: remote.path)


def github_listing(source, revision):
    """(commit, [Remote]) of all files in a repository of GitHub's."""
    api = f"{GITHUB_API}/repos/{source.repo}"
    commit = commit_of(f"{api}/commits", revision)
    tree, _ = get_json(f"{api}/git/trees/{commit}?recursive=1")
    if tree["truncated"]:
        raise ValueError(f"{source.repo} at {commit}: too many files for one answer of GitHub's: clone it instead")
    base = f"{GITHUB_RAW}/{source.repo}/{commit}"
    return commit, [Remote(entry["path"], f"{base}/{quote(entry['path'])}", entry["size"], entry["sha"])
                    for entry in tree["tree"] if entry["type"] == "blob"]


def hub_listing(source, revision):
    """(commit, [Remote]) of all files of a data set of the Hub's, or of those at the top of a model: other formats of
    it may lie below."""
    api = f"{hub()}/api/{source.host}/{source.repo}"
    commit = commit_of(f"{api}/revision", revision)
    if source.host == "datasets":
        page, base = f"{api}/tree/{commit}?recursive=1", f"{hub()}/datasets/{source.repo}/resolve/{commit}"
    else:
        page, base = f"{api}/tree/{commit}", f"{hub()}/{source.repo}/resolve/{commit}"
    remotes = []
    while page:
        answer, page = get_json(page)
        for entry in answer:
            if entry["type"] == "file":
                checksum = entry["lfs"]["oid"] if "lfs" in entry and entry["lfs"] else entry["oid"]
                remotes.append(Remote(entry["path"], f"{base}/{quote(entry['path'])}", entry["size"], checksum))
    return commit, remotes


def commit_of(url, revision):
    """The commit that a revision is, by what the host says at url/REVISION; a whole commit is itself."""
    if re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    answer, _ = get_json(f"{url}/{quote(revision, safe='')}")
    return answer["sha"]


def checksum_of(path, like):
    """The checksum of a file, of the kind that `like` is."""
    state = hashlib.sha256() if len(like) == 64 else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            state.update(chunk)
    return state.hexdigest()


def download(remote, path, bar):
    """Puts a file at path, unless it is there whole; what an interrupted run left beside it is gone on with."""
    if path.is_file() and path.stat().st_size == remote.size and checksum_of(path, remote.checksum) == remote.checksum:
        bar.update(remote.size)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{remote.checksum[:12]}.part")  # never goes on with another revision's bytes
    part.touch()
    bar.update(part.stat().st_size)

    def attempt():
        with open(part, "r+b") as file:
            have = file.seek(0, os.SEEK_END)
            if have >= remote.size:
                return
            for _, offset, chunk in chunks(remote.url, have):
                if offset != file.tell():  # the server began anew
                    bar.update(offset - file.tell())
                    file.seek(offset)
                    file.truncate()
                file.write(chunk)
                bar.update(len(chunk))
    patiently(attempt, lambda: part.stat().st_size)
    if checksum_of(part, remote.checksum) != remote.checksum:
        part.unlink()
        raise ValueError(f"{remote.url}: what came has not the checksum that its host lists ({remote.checksum}): "
                         "removed it; start again, and if it stays so, look for a proxy that alters files")
    os.replace(part, path)


def fetch(source, revision, folder):
    """Downloads a source into the folder; returns its commit and files."""
    commit, remotes = listing(source, revision)
    total = sum(remote.size for remote in remotes)
    with tqdm(total=total, desc=source.repo, unit="B", unit_scale=True, dynamic_ncols=True) as bar:
        for remote in remotes:
            download(remote, folder / remote.path, bar)
    record = {"host": source.host, "repo": source.repo, "revision": revision, "commit": commit,
              "files": {remote.path: {"size": remote.size, "checksum": remote.checksum} for remote in remotes}}
    write_whole(folder / "fetched.json", json.dumps(record, indent=1))
    return commit, [folder / remote.path for remote in remotes]


# ---- conversion

def import_pyarrow():
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError("converting parquet needs pyarrow: pip install pyarrow") from None
    return pyarrow


def local_files(source, path):
    names = [PurePosixPath(pattern).name for pattern in source.patterns]
    if Path(path).is_file():
        return [Path(path)]
    found = sorted(file for name in names for file in Path(path).rglob(name))
    if not found:
        raise ValueError(f"{path}: no file, and no folder with {' or '.join(names)} in it: check the path")
    return found


def rows(file, columns):
    """The dicts of those columns of a parquet file, decoded a few hundred at a time."""
    pyarrow = import_pyarrow()
    try:
        with pyarrow.parquet.ParquetFile(file, pre_buffer=False) as parquet:  # True, the default, holds it whole
            names = parquet.schema_arrow.names
            if missing := [column for column in columns if column not in names]:
                raise ValueError(f"{file}: no column {', '.join(missing)} (it has {', '.join(names[:20])}): "
                                 "is it a file of another data set?")
            for batch in parquet.iter_batches(256, columns=columns):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as e:
        raise ValueError(f"{file}: cannot be read as parquet ({e}): download it again") from None


def line_of(name, source, row, number):
    """A row as a line that data/pairs.py will read; ValueError or TypeError if it would not."""
    for column, value in row.items():
        if value is None:
            raise ValueError(f'"{column}" is null')
    record = {"id": f"{name}/{number}", "source": name}
    if source.domain:
        record["domain"] = source.domain
    for key, text in source.keys.items():
        columns = text.split(" + ")
        record[key] = "".join(row[column] for column in columns) if len(columns) > 1 else row[text]
    line = json_line(record)
    read = pairs.chains_in if source.chains else pairs.pairs_in
    read(record, pairs.Place(Path(f"{name}.jsonl"), "", Counter()))
    return line


def convert(name, files, path, skip_bad=False):
    """Writes the rows of parquet files as JSON lines; returns their number. A row is named by its file and its number
    in it, from 1; its id by its number in all files, whatever is skipped."""
    source, number, n_bad = SOURCES[name], 0, 0
    columns = sorted({column for text in source.keys.values() for column in text.split(" + ")})
    for file in files:
        next(rows(file, columns), None)  # none of them is another kind of file: told before the first is converted
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as temporary:
        with open(temporary, "w", encoding="utf-8", newline="\n") as lines:
            for file in files:
                for row_number, row in enumerate(tqdm(rows(file, columns), desc=name, unit="row"), 1):
                    number += 1
                    try:
                        lines.write(line_of(name, source, row, number))
                    except (ValueError, TypeError) as bad:    # TypeError: bytes where texts belong
                        if not skip_bad:
                            raise ValueError(f"{file}, row {row_number}: {bad}; --skip-bad leaves it out") from None
                        n_bad += 1
                        tqdm.write(f"{file}, row {row_number}: skipped: {bad}", file=sys.stderr)
        if n_bad == number:
            raise ValueError(f"{files[0]}: no usable rows among {number}")
    if n_bad:
        print(f"{path}: skipped {n_bad} bad rows of {number}", file=sys.stderr)
    return number - n_bad


def main(what, out, revision=None, files=None, skip_bad=False):
    refuse_file(out)
    for name in what:
        source = source_of(name)
        folder, path = Path(out, name), Path(out, f"{name}.jsonl")
        if source.keys:
            import_pyarrow()               # before hours of downloading
        if files:
            found = local_files(source, files)
        else:
            commit, found = fetch(source, revision or source.revision, folder)
            print(f"{folder}: {len(found)} files of {source.repo} at {commit}")
        if source.keys:
            n = convert(name, found, path, skip_bad)
            of_lists = "num_correct" in source.keys  # several pairs a row
            print(f"{path}: {n} {'chains' if source.chains else 'rows' if of_lists else 'pairs'}")
        if source.prompts:
            for path in write_prompts(found[0], out):
                print(f"{path}: a prompt, for --prompt")


if __name__ == "__main__":
    with one_line_errors():
        main(**vars(parse_options()))
