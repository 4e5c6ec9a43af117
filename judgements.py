"""Judgements on disk: files that are written as judgements come, and gone on with after an interruption.

    records = judge_file(judge, encode_all(judge, pairs), "judgements.jsonl", settings)

Everything that is judged is known by its pair's id and the hash of its prompt's tokens: a file from which a judgement
is taken over was made of the same texts, by the same settings.
"""

import json
import sys
from array import array
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from common import Ranks
from draw import prompt_key
from files import append, check_settings, refuse_existing, write_records, write_whole
from one_answer import with_outcomes


def prompt_hash(ids):
    """prompt_key as it stands in judgement files."""
    return f"{prompt_key(ids):016x}"


class JudgementFile:
    """Judgements on disk, one JSON line a pair. Written to OUT.partial as they come, put in order and renamed when
    whole.

    OUT.partial begins with the settings that made it; started again with the same ones it goes on, with others it
    refuses. Several ranks write OUT.partial.RANK each, which the next one to open OUT.partial takes in.
    """

    def __init__(self, out, settings):
        self.out, self.partial = Path(out), Path(f"{out}.partial")
        refuse_existing(self.out)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        shares = [f for f in self.out.parent.glob("*.partial.*") if f.stem == self.partial.name and f.suffix != ".tmp"]
        self.done = {}
        lines = [json.dumps(settings).encode()]
        for file in [self.partial, *shares] if self.partial.exists() else shares:
            # up to the last line break: an interrupted run may have left half a line
            first, *rest = file.read_bytes().rpartition(b"\n")[0].split(b"\n")
            if first:
                check_settings(file, first, settings)
            self.done |= judged(file, rest, 2)
            lines += rest
        write_whole(self.partial, b"\n".join(lines) + b"\n")
        for file in shares:
            file.unlink()

    def add(self, record):
        self.done[record["id"], record["prompt_hash"]] = record
        append(self.partial, record)

    def finish(self, records):
        """Writes these records under the final name."""
        write_records(self.out, records)
        self.partial.unlink()


def judged(file, lines, first=1):
    """{(id, prompt hash): record} of judgement lines; `first` is the number of the first one."""
    done = {}
    for number, line in enumerate(lines, first):
        try:
            record = json.loads(line)
            done[record["id"], record["prompt_hash"]] = record
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{file}:{number}: is no judgement; without this line its pair would be judged again, or "
                             "choose another --out") from None
    return done


def refuse_others(file, judged, wanted):
    """Before judgements are lost because what they judged is not among what to judge now; both (id, prompt hash)."""
    if others := [name for name, key in judged if (name, key) not in wanted]:
        raise ValueError(f"{file}: holds {len(others)} judgements of pairs that are not given now, or not with these "
                         f"texts in this order, such as {others[0]}: give those too, or choose another --out")


def encode_all(judge, pairs, skip_bad=False, quiet=False):
    """[(pair, its prompt's ids)] of the pairs that the prompt can show and the model can read.

    Another one (a conversation, say) stops the job before it begins, or is skipped and counted, with all pairs of its
    item: a best-of-n item that lacks its hardest pair would be scored too well.
    """
    context = judge.sampler.model.config.raw.get("max_position_embeddings")
    encoded, bad_items = [], set()
    for pair in tqdm(pairs, "read", unit="pair", disable=quiet or len(pairs) < 1000):
        try:
            ids = array("i", judge.encode(pair))  # a list of integers takes nine times as much
            if context and len(ids) >= context:
                raise ValueError(f"pair {pair.id}: its prompt has {len(ids)} tokens, the model can read {context}")
            encoded.append((pair, ids))
        except ValueError as e:
            if not skip_bad:
                raise ValueError(f"{e}; or --skip-bad leaves such pairs out") from None
            bad_items.add(pair.item)
            print(f"skipped: {e}", file=sys.stderr)
    encoded = [(pair, ids) for pair, ids in encoded if not (pair.item and pair.item in bad_items)]
    if not encoded:
        raise ValueError(f"none of the {len(pairs)} pairs can be judged: each is skipped for the reason above")
    if len(encoded) < len(pairs):
        print(f"skipped {len(pairs) - len(encoded)} of {len(pairs)} pairs", file=sys.stderr)
    return encoded


def key_of(pair, ids):
    return pair.id, prompt_hash(ids)


ALONE = Ranks(0, 1, torch.device("cpu"))


def judge_file(judge, encoded, out, settings, ranks=ALONE, begin=lambda: None):
    """Judges the pairs of encode_all that OUT.partial does not hold yet; returns all records in the pairs' order (on
    rank 0, [] elsewhere). begin() is called on rank 0 once it is sure that OUT.partial may be gone on with.
    """
    keys = [key_of(pair, ids) for pair, ids in encoded]
    file = JudgementFile(out, settings) if ranks.main else None
    if ranks.main:
        refuse_others(file.partial, file.done, set(keys))
        begin()
    done = ranks.gather(set(file.done) if ranks.main else None)[0]  # rank 0's
    todo = ranks.share([item for item, key in zip(encoded, keys) if key not in done])
    n_done = len(ranks.share(keys)) - len(todo)
    share = Path(f"{out}.partial.{ranks.rank}")
    if ranks.world > 1 and ranks.first:
        share.write_text(json.dumps(settings) + "\n", encoding="utf-8")
    bar = tqdm(total=n_done + len(todo), initial=n_done, desc="judge", unit="pair", disable=not ranks.main)
    n_now = 0
    try:
        for _, record in judge.judge([pair for pair, _ in todo], prompts=[ids for _, ids in todo], bar=bar):
            if ranks.world == 1:
                file.add(record)
            elif ranks.first:
                append(share, record)
            bar.update()
            n_now += 1
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{n_done + n_now} of {n_done + len(todo)} pairs are judged, and kept in "
                                f"{file.partial if ranks.world == 1 else share}; the same command goes on") from None
    finally:
        bar.close()
    ranks.barrier()
    if not ranks.main:
        return []
    if ranks.world > 1:
        file = JudgementFile(out, settings)  # opened again, it takes the other ranks' shares in
    # the labels may have been corrected since an interrupted run
    records = [file.done[key] | {"winner": pair.winner} for (pair, _), key in zip(encoded, keys)]
    records = with_outcomes(records)
    file.finish(records)
    return records


@dataclass(frozen=True)
class RecallingJudge:
    """A Judge that keeps each judgement in a file, and does not make again what it finds there."""
    inner: object  # the Judge
    file: JudgementFile

    def judge(self, pairs, bar=None):
        prompts = [array("i", self.inner.encode(pair)) for pair in pairs]
        todo = []
        for i, key in enumerate(map(key_of, pairs, prompts)):
            if key in self.file.done:
                yield i, self.file.done[key]
            else:
                todo.append(i)
        new = self.inner.judge([pairs[i] for i in todo], prompts=[prompts[i] for i in todo], bar=bar)
        for k, record in new:
            self.file.add(record)
            yield todo[k], record
