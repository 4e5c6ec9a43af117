"""bench/train.py, our side of it. Oracles: by hand, and what untrained weights must give."""

import math
import sys

import pytest

import batch
import grpo
from bench import train
from bench.twins import SHAPES, geometry, options
from model import Model


@pytest.fixture
def given(monkeypatch, tmp_path):
    """(options, work, folder) of one prompt of 20 tokens with 3 rollouts of 8, for a model of 48 columns."""
    monkeypatch.setitem(SHAPES, "tiny", (2, 48, 4, 2, 64, 300))
    monkeypatch.setattr(batch.Batch, "reason_to_end", batch.Batch.reason_to_end)
    monkeypatch.setattr(grpo, "reward", grpo.reward)
    monkeypatch.setattr(sys, "argv", ["train"])
    args = options("uneven", what=("sft", "update", "step"), prompts=1, samples=3, prompt=20, new=8,
                   **{"micro-tokens": 60, "size": 0})
    Model.random(geometry(*SHAPES["tiny"])).save_pretrained(tmp_path)
    return args, train.Work(args), tmp_path


def test_rows_of_best_fit_decreasing_by_hand():
    """7 and 3 fill a row of 10, 6 and 4 another; 5 begins a third, into which 4 more goes."""
    assert train.n_packed_rows([3, 7, 4, 6], 10) == 2
    assert train.n_packed_rows([3, 7, 4, 6, 5, 4], 10) == 3
    assert train.n_packed_rows([10, 10], 10) == 2


def test_one_step_of_each_kind(given):
    """Untrained weights are near ln V nats a token; of a fresh update the advantages, and so the loss, add up to 0; a
    step begins with rollouts of the lengths that were asked for."""
    args, work, folder = given
    for what in ("sft", "update", "step"):
        args.what = what
        loss, norm, left_out = train.make_ours(args, work, folder)()
        assert loss == pytest.approx(math.log(300) if what == "sft" else 0.0, abs=0.1), what
        assert norm > 0 and (left_out > 0) == (what == "update")
    assert work.n_drawn == 24 and work.n_all == 84
    tree = 2 * 44 * 2 * (2 * 48 * 6 * 12 + 3 * 48 * 64) + 4 * (210 + 3 * (160 + 36)) * 2 * 48 + 2 * 24 * 48 * 300
    assert work.flops(geometry(*SHAPES["tiny"]), "update") == 3 * tree
