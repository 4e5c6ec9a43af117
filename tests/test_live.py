"""live.py: requests that come and go. Oracles: Sampler.generate with the same Sampling, one prompt at a time, in
float64; the pages, and what is kept of requests, counted from outside."""

import sys
import threading
import time
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from draw import Sampling  # noqa: E402
from live import Asked, Busy, Engine, Live, StopTexts  # noqa: E402
from sample import Sampler  # noqa: E402
from test_batch import Buckets, gb  # noqa: E402
from test_sample import ONE_LAYER, PROMPTS, QWEN3, tiny  # noqa: E402

KEPT = "prompts", "keys", "asked", "stops", "groups", "n_left", "pages", "hidden", "slots", "waiting", "finished"


def assert_empty(batch):
    """As if nobody had ever been there."""
    assert {name: len(getattr(batch, name)) for name in KEPT} == dict.fromkeys(KEPT, 0)
    assert batch.pool.n_free == batch.pool.free_x.sum() == len(batch.pool.free_x) - 1


def request(ids, sampling):
    return Asked(ids, sampling, (), SimpleQueue())


def some_sampling(rng):
    """Settings that differ in everything."""
    temperature = float(rng.choice([0.0, 0.7, 1.0]))
    return Sampling(n=1 if temperature == 0 else int(rng.integers(1, 5)), max_new_tokens=int(rng.integers(20, 41)),
                    temperature=temperature, top_p=float(rng.choice([0.8, 1.0])), top_k=int(rng.choice([0, 5])),
                    stop=frozenset({17}), seed=int(rng.integers(-2**63, 2**63)))


def written(asked):
    return [(rollout.ids, rollout.reason) for rollout in asked.rollouts]


def alone(model, asked):
    group, = Sampler(model).generate([asked.ids], asked.sampling)
    return [(rollout.ids, rollout.reason) for rollout in group]


@pytest.mark.parametrize("n_pages, buckets", [(0, False), (28, False), (0, True)], ids=["room", "little", "buckets"])
def test_whoever_comes_and_goes_each_gets_what_it_gets_alone(n_pages, buckets, monkeypatch):
    """30 requests join at random moments, and some leave before they are done; with 28 pages rollouts are put back.
    Buckets: as on a GPU, where a CUDA graph holds a step."""
    model, rng = tiny(QWEN3, torch.float64), np.random.default_rng(0)
    if buckets:
        monkeypatch.setattr("batch.Graphs", Buckets)
        monkeypatch.setattr(Live, "wants_graphs", lambda self: True)
    batch = Live(model, None, 6, gb(model, n_pages, 4), 60, 40, page_size=4)
    assert n_pages or len(batch.pool.free_x) == 1 + 6 * (15 + 10)  # a prompt of 60, a reply of 40 for every slot
    coming, present, done, n_left = [request(PROMPTS[i % 8], some_sampling(rng)) for i in range(30)], [], [], 0
    while coming or batch.slots or batch.waiting:
        if coming and rng.random() < 0.4:
            asked = coming.pop()
            batch.join(asked)
            present.append(asked)
        if present and rng.random() < 0.06:
            asked = present.pop(int(rng.integers(len(present))))
            batch.cancel(asked.number)
            n_left += 1
        if batch.worth_admitting():
            batch.admit()
        elif batch.slots:
            batch.step()
        for asked in batch.take_done():
            present.remove(asked)
            done.append(asked)
    assert len(done) + n_left == 30 and n_left > 3 and (batch.n_put_back > 3) == (n_pages > 0)
    for asked in done:
        assert written(asked) == alone(model, asked)
    assert_empty(batch)


def test_thousands_of_requests_leave_nothing_behind():
    model, rng = tiny(ONE_LAYER), np.random.default_rng(1)
    batch = Live(model, None, 32, 0.0, 20, 4)
    for number in range(3000):
        batch.join(request([int(rng.integers(12))] * 3, Sampling(int(rng.integers(1, 3)), 3)))
        if number % 7 == 0:
            batch.cancel(number)
        if number % 32 == 31:
            while batch.waiting or batch.slots:
                batch.admit() if batch.worth_admitting() else batch.step()
                batch.take_done()
    while batch.waiting or batch.slots:
        batch.admit() if batch.worth_admitting() else batch.step()
        batch.take_done()
    assert_empty(batch)


# ---- the engine


@pytest.fixture
def engine():
    model = tiny(QWEN3, torch.float64)
    engine = Engine(Live(model, None, 4, 0.0, 60, 40), max_waiting=4)
    engine.model = model
    yield engine
    engine.end()


def test_many_threads_ask_at_once(engine):
    """Each waits for room, asks, and gets its own; the counts of the engine are those of the answers."""
    rng, found, lock = np.random.default_rng(2), [], threading.Lock()

    def client(settings):
        for ids, sampling in settings:
            while True:
                try:
                    with engine.room(sampling.n):
                        asked = engine.ask(ids, sampling)
                        assert asked.box.get(timeout=60) is asked
                    break
                except Busy:
                    time.sleep(0.002)
            with lock:
                found.append(asked)
    work = [[(PROMPTS[int(rng.integers(8))], some_sampling(rng)) for _ in range(2)] for _ in range(8)]
    threads = [threading.Thread(target=client, args=(settings,)) for settings in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == engine.n_done == 16 and engine.n_taken == 0
    assert engine.n_written == sum(len(ids) for asked in found for ids, _ in written(asked))
    assert engine.n_written == engine.n_decoded + sum(asked.sampling.n for asked in found)  # the first: with the prompt
    for asked in found:
        assert written(asked) == alone(engine.model, asked)
    assert_empty(engine.batch)


def test_room_is_what_is_written_and_what_waits(engine):
    with engine.room(5), engine.room(3):
        with pytest.raises(Busy), engine.room(1):
            pass
    with engine.room(8):
        pass


def test_what_breaks_the_sampler_is_told(engine):
    """Its thread ends, and whoever waits can see why."""
    for weight in engine.model.parameters():
        weight.fill_(float("nan"))
    asked = engine.ask([1, 2], Sampling(1, 3))
    engine.thread.join(30)
    assert "not finite" in str(engine.failed) and not asked.done


def test_stop_texts_are_found_across_tokens():
    class Letters:
        """A token is a character."""
        def _bytes(self, token, skip_control):
            return bytes([token])
    stops = StopTexts(Letters(), ("ab", "xyz"))
    found = [stops.push(token) for token in "aaxyab".encode()]
    assert found == [False] * 5 + [True]
    stops = StopTexts(Letters(), ("\u00e9",))  # two bytes
    assert [stops.push(token) for token in "e\u00e9".encode()] == [False, False, True]
