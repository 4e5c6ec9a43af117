"""A decode step is one that a CUDA graph can hold. Oracle: fake tensors, which have shapes and no values, so that
whoever reads one, or makes a shape of one, is an error; the list of operations and launches of two steps of different
rollouts, which must be the same; addresses. The controls put such mistakes into the step."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import model as model_py  # noqa: E402
from batch import Batch  # noqa: E402
from bench import gpu  # noqa: E402
from bench.fake import no_kernels  # noqa: E402
from common import leave_ranks  # noqa: E402
from draw import Sampling  # noqa: E402
from kernels.tiles import launch  # noqa: E402
from model import Model, ModelConfig  # noqa: E402
from sample import filled_copy  # noqa: E402
from split import Split  # noqa: E402

QWEN2 = dict(model_type="qwen2", vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
QWEN3 = QWEN2 | dict(model_type="qwen3", num_attention_heads=6, head_dim=8, tie_word_embeddings=False)
N_SLOTS = 5
SAMPLINGS = {"plain": {}, "greedy": dict(temperature=0.0), "cut": dict(temperature=0.7, top_k=5, top_p=0.9)}


def started(raw, sampling, n_steps, split=Split()):
    """A Batch in which 5 slots have written n_steps tokens, of 3 prompts in pages of 4, with the PyTorch path."""
    model = filled_copy(Model.random(ModelConfig.from_dict(raw)), torch.float32, split).requires_grad_(False).fuse()
    prompts = [[7] * 9, [1], list(range(40))]
    batch = Batch(model, prompts, Sampling(n=3, max_new_tokens=64, **SAMPLINGS[sampling]), N_SLOTS, page_size=4)
    with torch.no_grad():
        batch.admit()
        for _ in range(n_steps):
            batch.step()
    return batch


class Operations(TorchDispatchMode):
    """Lists what is called, by name, with the shapes of tensors and all numbers."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        arguments = torch.utils._pytree.tree_leaves((args, kwargs or {}))
        self.calls.append((str(function), *[tuple(x.shape) if isinstance(x, torch.Tensor) else x for x in arguments]))
        return function(*args, **kwargs or {})


def trace(batch, impl):
    """(operations, launches) of a step, everything that it reads being fake."""
    fakes = FakeTensorMode()
    batch.model.impl = impl
    batch.inputs.device = {name: fakes.from_tensor(x) for name, x in batch.inputs.device.items()}
    batch.pool.k, batch.pool.v = ([fakes.from_tensor(x) for x in memory] for memory in (batch.pool.k, batch.pool.v))
    batch.out_2b = fakes.from_tensor(batch.out_2b)
    for module in batch.model.modules():
        for name, x in module._parameters.items():
            module._parameters[name] = None if x is None else fakes.from_tensor(x)
    for block in batch.model.model.layers:
        block.self_attn.fused = tuple(x if x is None else fakes.from_tensor(x) for x in block.self_attn.fused)
        block.mlp.fused = fakes.from_tensor(block.mlp.fused)
    model_py._on_device.cache_clear()  # it would remember real tensors before, and fake ones afterwards
    try:
        with torch.no_grad(), no_kernels() as launches, fakes, Operations() as operations:
            batch.compute_step(N_SLOTS, whole=True)
    finally:
        model_py._on_device.cache_clear()
    return operations.calls, launches


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("impl", ["torch", "triton", "invariant"])
def test_a_step_reads_no_value(impl, sampling):
    operations, launches = trace(started(QWEN2, sampling, 2), impl)
    assert len(operations) > 30 and bool(launches) == (impl != "torch")


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("raw", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])
def test_a_split_step_reads_no_value(raw, impl):
    """One rank of two, in a process group that passes nothing on. Oracle: two sums a layer, of all slots' rows, and the
    draw of the first rank last; the same after 1 and 30 steps."""
    leave_ranks()  # of another test's run
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        traces = [trace(started(raw, "plain", n, Split(1, 2, dist.group.WORLD)), impl) for n in (1, 30)]
    finally:
        leave_ranks()
    for operations, launches in traces:
        assert bool(launches) == (impl == "triton")
        passed = [(name, shape) for name, shape, *_ in operations if name.startswith("c10d")]
        assert passed == [("c10d.allreduce_.default", (N_SLOTS, 32))] * 4 + [("c10d.broadcast_.default", (2, N_SLOTS))]
    names = [[name for name, *_ in operations] for operations, _ in traces]
    assert names[0] == names[1] and traces[0][1] == traces[1][1]


@pytest.mark.parametrize("impl", ["triton", "invariant"])
@pytest.mark.parametrize("raw", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])
def test_steps_of_other_rollouts_are_the_same_launches(raw, impl):
    """After 1 and 30 steps: other lengths, eight pages more a slot. A graph of the first is one of the second."""
    first, later = (trace(started(raw, "plain", n), impl) for n in (1, 30))
    assert first[0] == later[0] and first[1] == later[1] and len(first[1]) > 10


def test_what_a_step_reads_and_writes_stays_where_it_is():
    """A graph replays with its addresses: over new pages, ended rollouts and others in their slots."""
    def addresses(batch):
        tensors = [*batch.inputs.device.values(), *batch.pool.k, *batch.pool.v, batch.out_2b]
        return [x.data_ptr() for x in tensors]
    batch = started(QWEN2, "plain", 1)
    before, seen = addresses(batch), set()
    with torch.no_grad():
        while batch.waiting or batch.slots:
            batch.admit() if batch.fits() else batch.step()
            seen |= {(slot.prompt, slot.sample) for slot in batch.slots}
    assert len(seen) == 9 and addresses(batch) == before


def branches(x):
    if x.sum() > 0:
        x = x + 1


MISTAKES = {
    "tolist": (lambda x: x.tolist(), DataDependentOutputException),
    "item": (lambda x: x.max().item(), DataDependentOutputException),
    "a branch": (branches, DataDependentOutputException),
    "nonzero": (lambda x: x.nonzero(), DynamicOutputShapeException),
    "a boolean index": (lambda x: x[x > 0], DynamicOutputShapeException),
    "unique": (lambda x: x.unique(), DynamicOutputShapeException),
}


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_step_that_looks_is_found(mistake, impl, monkeypatch):
    """The control: each of them, put into the middle of the step, on what the model has computed."""
    batch, draw, (look, error) = started(QWEN2, "plain", 1), Batch.draw, MISTAKES[mistake]

    def looks(self, hidden_ad, *rest):
        look(hidden_ad)
        return draw(self, hidden_ad, *rest)
    monkeypatch.setattr(Batch, "draw", looks)
    with pytest.raises(error):
        trace(batch, impl)


def test_a_step_with_a_number_of_the_host_is_found(monkeypatch):
    """The control of the same launches: a number that the host has counted, which a graph would replay."""
    batches, draw = [started(QWEN2, "plain", n) for n in (1, 30)], Batch.draw
    monkeypatch.setattr(Batch, "draw", lambda self, *rest: draw(self, *rest) + self.inputs.own_pages)
    first, later = (trace(batch, "triton")[0] for batch in batches)
    assert first != later and len(first) == len(later)


class Compiler:
    """A kernel, as Triton has them: kernel[grid](...) launches, and returns what was compiled for such arguments, which
    launches others like these as compiled[grid](...)."""

    def __init__(self):
        self.asked, self.again = [], []

    def __getitem__(self, grid):
        def run(*args, **options):
            self.asked.append((grid, *args))
            return Compiled(self)
        return run


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *args: self.kernel.again.append((grid, *args))


def test_a_launch_is_looked_up_once_for_its_like():
    """Oracle: whom Triton is asked about. The same dtypes, numbers and options, on any memory and grid, once; anything
    else that a kernel is compiled for, again; a tensor that begins off a multiple of 16 bytes, always."""
    kernel, x, y = Compiler(), torch.zeros(64), torch.ones(64)
    launch(kernel, (4, 1, 1), (x, None, y), (64, 1e-6), {"num_warps": 1})
    launch(kernel, (5, 1, 1), (y[8:], None, x), (64, 1e-6), {"num_warps": 1})
    assert len(kernel.asked) == len(kernel.again) == 1
    grid, *rest = kernel.again[0]
    assert grid == (5, 1, 1) and rest[0].data_ptr() == y[8:].data_ptr() and rest[1:] == [None, x, 64, 1e-6]
    others = [((x.half(), None, y), (64, 1e-6), {"num_warps": 1}), ((x, y, y), (64, 1e-6), {"num_warps": 1}),
              ((x, None, y.half()), (64, 1e-6), {"num_warps": 1}), ((x, None, y), (48, 1e-6), {"num_warps": 1}),
              ((x, None, y), (64, 1e-6), {"num_warps": 2}), ((x.to("meta"), None, y), (64, 1e-6), {"num_warps": 1})]
    for n, other in enumerate(others):
        launch(kernel, (4, 1, 1), *other)
        assert len(kernel.asked) == 2 + n
    for tensors in ((x[1:], None, y), (x, None, y[4:]), (x[1:], None, y)):
        launch(kernel, (4, 1, 1), tensors, (64, 1e-6), {"num_warps": 1})
    assert len(kernel.asked) == 1 + len(others) + 3 and len(kernel.again) == 1


def test_the_gpu_benchmark_runs_at_toy_size(monkeypatch, capsys):
    """Its rows hang together, and it measures what it says. Oracle: the bytes of a step, counted by hand: 2 layers of
    width 64 with 4 and 2 heads of 16 channels, an MLP of 96, and a head of 512 rows, in float32."""
    seen = []
    bytes_read = gpu.bytes_read
    monkeypatch.setattr(gpu, "bytes_read", lambda batch: seen.append((batch, bytes_read(batch))) or seen[-1][1])
    lengths = []
    monkeypatch.setattr(gpu, "ms_a_step", lambda batch, n, measure=gpu.ms_a_step: (
        lengths.append([len(slot.rollout.ids) for slot in batch.slots]), measure(batch, n))[1])
    monkeypatch.setattr(sys, "argv", ["gpu", "--part", "decode", "--toy", "--peers"])
    gpu.main()
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["decode"]["steps"]
    assert [(row["slots"], row["graphs"]) for row in rows] == [(4, False), (9, False)]
    layer = (64 + 2 * 32) * 64 + (64 + 2 * 32) + 64 * 64 + 3 * 96 * 64 + 2 * 64  # q, k, v; biases; o; MLP; norms
    for (batch, n_bytes), before, row in zip(seen, lengths, rows):
        n_prompts = -(-row["slots"] // 7)
        n_tokens = 20 * n_prompts + sum(before)  # a prompt's keys once for its group
        assert n_bytes == 4 * (2 * layer + 64 + 512 * 64 + n_tokens * 2 * 2 * 2 * 16)
        assert all(8 <= n <= 12 for n in before) and len(before) == row["slots"]
        after = [len(slot.rollout.ids) for slot in batch.slots]
        assert after == [n + gpu.WARM_UP + 3 for n in before]
        assert abs(row["ratio"] - row["ms"] / row["bound_ms"]) < 0.1 * row["ratio"]


def test_the_gpu_benchmark_makes_a_step_at_toy_size(monkeypatch, capsys):
    """A row a phase, and what it says of the update. Oracle: 2 prompts of 20 tokens, each once for its 7 rollouts of 6,
    are 124 tokens. What the other parts start is looked at, and not run."""
    started = []

    def run(command, seconds, **environment):
        started.append((command[0], seconds))
        return "..\n12 passed in 3s\n" if command[0] == "pytest" else 'a table\n{"bench": "kernels", "rows": []}\n'
    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(sys, "argv", ["gpu", "--part", "tests", "kernels", "step", "--toy"])
    gpu.main()
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert results["tests"] == {"line": "12 passed in 3s"} and results["kernels"]["bench"] == "kernels"
    assert [command for command, _ in started] == ["pytest", "bench.kernels"]
    rollout, score, update = results["step"]["phases"]
    assert [row["phase"] for row in (rollout, score, update)] == ["rollout", "score", "update"]
    assert update["tok_s"] == pytest.approx(2 * (20 + 7 * 6) / update["s"], rel=0.05)
    assert update["mismatch"] < 1e-4 and update["norm"] > 0 and update["mfu"] is None
