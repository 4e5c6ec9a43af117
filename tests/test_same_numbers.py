"""However the work is laid out, a run's numbers are those of one rank that computes all at once, up to rounding: any
number of ranks, micro-batches of any size, AdamW's moments on the host, a sampler split over ranks."""

import math
from dataclasses import replace

import pytest

import distill
import grpo
import test_distill
import test_grpo
from data import toy
from model import Model
from ranks import on_ranks
from test_grpo import made  # noqa: F401

LAYOUTS = {  # ranks, and what else differs
    "one sequence at a time": (1, dict(micro_tokens=1)),
    "moments on the host": (1, dict(offload=True)),
    "2 ranks": (2, dict(micro_tokens=60)),
    "2 ranks that sample as one": (2, dict(sampler_ranks=2, offload=True)),
    "3 ranks": (3, dict()),
    "3 ranks, one sequence at a time": (3, dict(micro_tokens=1, offload=True)),
}


def configs(made, folder):  # noqa: F811
    """The same run in both loops, short of chaos: a hundred times the rounding would still be small after it."""
    chains = test_distill.write_rows(folder / "chains.jsonl", toy.make("distill", 14, seed=3))
    heldout = dict(eval_data=str(made / "heldout.jsonl"), eval_every=2, gradient_checkpointing=False)
    sft = distill.Config(model=str(made / "distilled/model"), data=str(chains), prompt="toy", batch_size=4, max_steps=4,
                         epochs=2, max_length=200, eval_tokens=4, lr=1e-3, dtype="float32", save_every=0, seed=7,
                         threads=1, micro_tokens=10_000, **heldout)
    rl = replace(test_grpo.config(made, "", n_prompts=3, mini_prompts=3, skip_zero_spread=False, lr=1e-3, steps=3,
                                  micro_tokens=10_000), **heldout)
    return {"distill": (distill, sft), "grpo": (grpo, rl)}


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):  # noqa: F811
    """Both runs on one rank, all at once."""
    folder = tmp_path_factory.mktemp("whole")
    for name, (script, cfg) in configs(made, folder).items():
        script.main(replace(cfg, out=str(folder / name)))
    return folder


def distance(x, y):
    return math.hypot(*(float((x[name] - y[name]).norm()) for name in x))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_does_not_change_the_numbers(layout, made, whole, tmp_path):  # noqa: F811
    n_ranks, changes = LAYOUTS[layout]
    runs = [(script, replace(cfg, out=str(tmp_path / name), **changes))
            for name, (script, cfg) in configs(made, tmp_path).items()]

    def train(_):
        for script, cfg in runs:
            script.main(cfg)
    on_ranks(n_ranks, train, changes.get("sampler_ranks", 1)) if n_ranks > 1 else train(None)
    for script, cfg in runs:
        name = script.__name__
        rows, wanted = test_grpo.metrics(tmp_path / name), test_grpo.metrics(whole / name)
        assert len(rows) == len(wanted) > 2
        for row, other in zip(rows, wanted):
            assert row == pytest.approx(other, rel=1e-4, abs=1e-5), name
        start, x, y = (Model.from_pretrained(path).state_dict() for path in
                       (cfg.model, whole / name / "model", tmp_path / name / "model"))
        # Adam divides by the gradient's own size: where that is rounding, a step of either sign is right, and no single
        # number need agree. Of gradients off by e of their norm, a share e is so small: sqrt(e) of the way, e = 1e-5
        assert distance(x, y) < math.sqrt(1e-5) * distance(x, start), name
