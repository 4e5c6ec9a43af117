"""The operations of kernels/ against PyTorch, Liger-Kernel and QuACK where installed, and the machine's own limits.

    python -m bench.kernels --only attention --shape 7b   a GPU: bfloat16; all operations at 0.5b, 7b, 32b by default
    python -m bench.kernels --threads 2                   a CPU: the PyTorch paths in float32, time and peak memory
    TRITON_INTERPRET=1 python -m bench.kernels --dry      toy sizes on a CPU: that every row runs; its figures are idle

Ours and the peers take turns and must compute the same: a peer whose results or gradients differ is listed, not raced.
`ratio` is the fastest peer's time over ours (medians; in brackets the range over turns), `share` our rate over what was
measured here: torch.mm of 8192^3 (CPU: 1024^3) for TFLOP/s, a copy of 2 GiB (CPU: 128 MiB), read + write, for GB/s. The
work counted is the result's: visible pairs, every byte once, 2 N V D forward and 6 in all; recomputing earns nothing.

GPU: CUDA events behind a pause in which the host gets ahead, L2 flushed; GB are the most that the call ever held, less
its results (the gradients). CPU (Linux): a turn is a process of its own that repeats the call for 2 s; GB are its peak
resident size less that with the inputs in place, so new gradients count, on both sides.
"""

import argparse
import functools
import json
import multiprocessing
import re
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # else, run as a script, `import kernels` finds this file
import kernels  # noqa: E402

try:
    from liger_kernel import ops as liger
except ImportError:
    liger = None
try:
    import quack
    from quack.linear_cross_entropy import chunked_linear_cross_entropy, linear_cross_entropy_func
except ImportError:
    quack = None
try:
    from triton.errors import TritonError
except ImportError:
    TritonError = RuntimeError

SHAPES = {"0.5b": (896, 14, 2, 64, 4864), "7b": (3584, 28, 4, 128, 18944), "32b": (5120, 40, 8, 128, 27648),
          "toy": (64, 4, 2, 16, 96)}  # Qwen2.5: D, H, K, C, F
EPS = 1e-6
PAGE = 64  # tokens of a page of the decoding caches


@dataclass(frozen=True)
class Setting:
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    impl: str | None = None
    invariant: str = "invariant"
    apart: bool = False  # each turn in a process of its own
    threads: int = 1
    runs: int = 10
    tolerance: float = 0.03  # relative Frobenius error between ours and a peer
    V: int = 151936
    tokens: tuple = (4096, 16384)  # of linear_logp
    rows: int = 16384  # of the pointwise operations
    forests: tuple = ((8, 0, 2048, 0), (4, 0, 4096, 0), (1, 0, 16384, 0), (2, 7, 2048, 512))  # see `forest`
    caches: tuple = ((1, 32768), (64, 4096))  # slots, positions
    groups: tuple = ((8, 7, 2048, 512),)  # prompts, slots of each, lengths
    backends: tuple = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION")

    def random(self, *shape):
        return torch.randn(shape, device=self.device, dtype=self.dtype).requires_grad_()


CPU = Setting("cpu", torch.float32, "torch", "torch", True, 1, 3, 1e-4, tokens=(4096,), forests=((1, 7, 2048, 512),),
              caches=(), groups=((2, 7, 2048, 512),), backends=("FLASH_ATTENTION",))
DRY = replace(CPU, apart=False, runs=1, V=300, tokens=(40,), rows=40, backends=Setting.backends,
              forests=((2, 0, 48, 0), (1, 0, 33, 0), (2, 7, 20, 5)), caches=((1, 130), (3, 70)),
              groups=((2, 3, 20, 5),))
DRY = replace(DRY, impl="triton", invariant="invariant") if kernels.INTERPRETED else DRY


@dataclass
class Side:
    """One way to do the work: function(*inputs), and the gradient that its backward pass begins with."""
    function: object
    inputs: list
    grad: object = None
    view: object = lambda results, backward: results  # results or gradients in ours' layout

    def call(self, backward):
        if backward:
            return torch.autograd.grad(self.function(*self.inputs), self.inputs, self.grad)
        with torch.no_grad():
            results = self.function(*(x.detach() for x in self.inputs))
        return results if isinstance(results, tuple) else (results,)


@dataclass
class Case:
    op: str
    work: str
    unit: str
    amounts: tuple  # forward; forward and backward, or None: what is not raced
    ours: Side
    peers: dict
    goals: tuple = ({}, {})  # by row field: at least so much; fields of memory: at most


# ------------------------------------------------------------------------------------------------------- the operations


def forest(P, G, T, R):
    """segments_s3 of P prompts of T tokens with G replies of R each; index_bt, the tokens of each whole sequence."""
    segments, rows, first = [], [], 0
    for _ in range(P):
        parent, prompt = len(segments), list(range(first, first + T))
        segments += [(first, T, -1)] + [(first + T + g * R, R, parent) for g in range(G)]
        rows += [prompt + list(range(first + T + g * R, first + T + g * R + R)) for g in range(max(G, 1))]
        first += T + G * R
    return torch.tensor(segments), torch.tensor(rows)


def sdpa_sides(setting, inputs, grad, view, causal):
    """scaled_dot_product_attention by every backend, with the key/value heads shared or repeated."""
    def side(backend, repeat):
        def function(q_bhtc, k_bktc, v_bktc):
            if repeat:
                k_bktc, v_bktc = (x.repeat_interleave(q_bhtc.shape[1] // x.shape[1], 1) for x in (k_bktc, v_bktc))
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return F.scaled_dot_product_attention(q_bhtc, k_bktc, v_bktc, is_causal=causal, enable_gqa=not repeat)
        return Side(function, inputs, grad, view)
    return {backend.split("_")[0].lower() + " repeated" * repeat: side(backend, repeat)
            for backend in setting.backends for repeat in (0, 1)}


def attention(setting, shape):
    """Plain causal batches where no prompt has replies; else groups, which the peer runs as whole sequences."""
    _, H, K, C, _ = SHAPES[shape]
    for P, G, T, R in setting.forests:
        segments_s3, index_bt = forest(P, G, T, R)
        N = int(segments_s3[:, 1].sum())
        q, k, v, grad_nhc = (setting.random(N, heads, C) for heads in (H, K, K, H))
        grad_nhc = grad_nhc.detach()
        own_bt = torch.ones_like(index_bt)  # a prompt's gradient begins in one of its rows only
        own_bt[torch.arange(len(own_bt)) % max(G, 1) > 0, :T] = 0

        def packed(results, backward):  # [B, heads, T, C] -> [N, heads, C]; copies of a token: gradients add up
            place = index_bt.flatten().to(setting.device)
            rows = [x.transpose(1, 2).flatten(0, 1).float() for x in results]
            add = torch.Tensor.index_add if backward else torch.Tensor.index_copy
            return [add(x.new_zeros(N, *x.shape[1:]), 0, place, x) for x in rows]

        def dense(q_nhc, k_nkc, v_nkc):  # one [N, N] score matrix per head
            k_hnc, v_hnc = (x.repeat_interleave(H // K, 1).transpose(0, 1) for x in (k_nkc, v_nkc))
            score_hnn = (q_nhc.transpose(0, 1) @ k_hnc.mT * C**-0.5).masked_fill(hidden_nn, -torch.inf)
            return (score_hnn.softmax(-1) @ v_hnc).transpose(0, 1)

        ours = Side(lambda q, k, v: kernels.attention(q, k, v, segments_s3, setting.impl), [q, k, v], grad_nhc)
        whole = [x.detach()[index_bt].transpose(1, 2).requires_grad_() for x in (q, k, v)]
        grad_bhtc = (grad_nhc[index_bt] * own_bt[..., None, None].to(grad_nhc)).transpose(1, 2)
        peers = sdpa_sides(setting, whole, grad_bhtc, packed, True)
        if setting.apart:
            hidden_nn = torch.ones(N, N, dtype=torch.bool)
            for row_t in index_bt:
                hidden_nn[row_t[:, None], row_t] = torch.ones(len(row_t), len(row_t)).triu(1).bool()
            peers["dense mask"] = Side(dense, [q, k, v], grad_nhc)
        pairs = P * (T * (T + 1) / 2 + G * (R * T + R * (R + 1) / 2))
        flop = 4 * C * H * pairs / 1e12
        work = f"{P} x {T}" if G == 0 else f"{P} x ({T} + {G} x {R})"
        goal = {} if setting.apart else {"ratio": 2.5 if G else 1.0}
        yield Case("attention", work, "TFLOP/s", (flop, 3.5 * flop), ours, peers, (goal, goal))


def decode(setting, shape):
    _, H, K, C, _ = SHAPES[shape]
    size = torch.finfo(setting.dtype).bits / 8 * 2 * K * C / 1e9  # GB of a position: key and value

    def ours(q, own, shared, slot_pg):
        pool, tables = paged(own, shared, slot_pg.to(setting.device))
        return Side(lambda q_bhc: kernels.decode_attention(q_bhc, *pool, tables, setting.impl), [q])

    def theirs(q, k, v):
        return sdpa_sides(setting, [q[:, :, None], k, v], None, lambda out, backward: [out[0][:, :, 0]], False)

    # a prompt of one position that no slot continues
    nobodys = [setting.random(1, K, 1, C).detach() for _ in "kv"], torch.tensor([[-1]])
    for B, T in setting.caches:
        q, k, v = setting.random(B, H, C), setting.random(B, K, T, C), setting.random(B, K, T, C)
        amounts = B * T * size, None
        yield Case("decode", f"{B} x {T}", "GB/s", amounts, ours(q, (k.detach(), v.detach()), *nobodys),
                   theirs(q, k, v), ({"share": .8}, {}))
    for P, G, T, R in setting.groups:  # the peers hold a copy of the prompt for each slot
        q = setting.random(P * G, H, C)
        own, prompts = ([setting.random(n, K, t, C).detach() for _ in "kv"] for n, t in ((P * G, R), (P, T)))
        copied = [torch.cat([p.repeat_interleave(G, 0), x], 2) for p, x in zip(prompts, own)]
        slot_pg = torch.arange(P * G).view(P, G)
        work, amounts = f"{P} x ({T} + {G} x {R})", (P * (T + G * R) * size, None)
        yield Case("decode", work, "GB/s", amounts, ours(q, own, prompts, slot_pg),
                   {"ours one by one": ours(q, copied, *nobodys)}, ({} if setting.apart else {"ratio": 3}, {}))
        yield Case("decode", work, "GB/s", amounts, ours(q, own, prompts, slot_pg), theirs(q, *copied))


def paged(own, shared, slot_pg):
    """The keys and values of each slot, two of [B, K, T, C], and of each prompt, two of [P, K, U, C], in pages of 64 in
    random order: k_xkic and v_xkic, and their Tables."""
    pools, page_tables, owners, firsts, lengths = [], [], [], [], []
    for k_bktc, v_bktc in (own, shared):
        B, _, T, _ = k_bktc.shape
        n_pages = -(-T // PAGE)
        order = torch.randperm(B * n_pages, device=k_bktc.device)  # page n of item b lies in place order[b n_pages + n]
        kept = order.argsort()
        pools.append([F.pad(x, (0, 0, 0, n_pages * PAGE - T)).unflatten(2, (n_pages, PAGE)).transpose(1, 2)
                      .flatten(0, 1)[kept] for x in (k_bktc, v_bktc)])
        page_tables.append(order.view(B, n_pages).int())
        owners.append(kept // n_pages)
        firsts.append(kept % n_pages * PAGE)
        lengths.append(torch.full((B,), T, device=k_bktc.device))
    n_own, n_shared = map(len, owners)
    place_b = torch.full((len(lengths[0]),), -1, device=slot_pg.device)
    members = slot_pg.flatten()
    taken = (members >= 0).nonzero()[:, 0]
    place_b[members[taken]] = taken
    tables = kernels.Tables(page_tables[0], lengths[0], page_tables[1] + n_own, lengths[1], slot_pg, place_b,
                            torch.cat(owners), torch.cat(firsts), n_own, n_shared, PAGE)
    return [torch.cat(pool) for pool in zip(*pools)], tables


def linear_logp(setting, shape):
    D, V = SHAPES[shape][0], setting.V
    for N in setting.tokens:
        weight_vd = (setting.random(V, D).detach() * D**-0.5).requires_grad_()
        inputs, target_n = [setting.random(N, D), weight_vd], torch.randint(V, (N,), device=setting.device)
        minus_n = -torch.ones(N, device=setting.device)

        def naive(hidden_nd, weight_vd):
            return (hidden_nd @ weight_vd.t()).float().log_softmax(1).gather(1, target_n[:, None])[:, 0]

        def fused(hidden_nd, weight_vd):  # the sum is its fast path: gradients are made in the forward pass
            sums = torch.is_grad_enabled()
            loss = liger.LigerFusedLinearCrossEntropyFunction.apply(
                hidden_nd, weight_vd, target_n, None, None, -100, 0.0, 0.0, "sum" if sums else "none")[0]
            return loss if sums else -loss

        def chunked(hidden_nd, weight_vd):  # made for sums; token by token only with all logits
            if torch.is_grad_enabled():
                return chunked_linear_cross_entropy(hidden_nd, weight_vd, target_n, reduction="sum")
            return -linear_cross_entropy_func(hidden_nd, weight_vd, None, target_n, reduction="none")

        ours = Side(lambda h, w: kernels.linear_logp(h, w, target_n, impl=setting.impl)[0], inputs, minus_n)
        peers = {"naive": Side(naive, inputs, minus_n)}
        if liger and not setting.apart:
            peers["liger"] = Side(fused, inputs, torch.ones((), device=setting.device))
        if quack and not setting.apart:
            peers["quack"] = Side(chunked, inputs, torch.ones((), device=setting.device))
        memory = {"ours_gb": 1}
        goals = ({"ratio": 1, "of_peer_gb": .1},) * 2 if setting.apart else ({"share": .85, **memory}, memory)
        flop = 2 * N * V * D / 1e12
        amounts = None if setting.apart else flop, 3 * flop
        yield Case("linear_logp", f"{N} x {V}", "TFLOP/s", amounts, ours, peers, goals)


def pointwise(setting, shape):
    D, H, K, C, F_ = SHAPES[shape]
    N, impl = setting.rows, setting.impl
    if setting.apart:  # there ours is the reference itself
        return
    angle = torch.rand(N, C // 2, device=setting.device) * 6
    cos, sin = angle.cos(), angle.sin()
    whole = [torch.cat([x, x], 1)[None] for x in (cos, sin)]

    def rotate(q, k):  # [N, heads, C] <-> [1, heads, N, C]
        out = liger.LigerRopeFunction.apply(q[None].transpose(1, 2), k[None].transpose(1, 2), *whole)
        return tuple(x[0].transpose(0, 1) for x in out)

    x, delta, weight, head = (setting.random(*s) for s in ((N, D), (N, D), (D,), (C,)))
    q, k, gate, up = (setting.random(*s) for s in ((N, H, C), (N, K, C), (N, F_), (N, F_)))
    nd, nc, nf = N * D, N * (H + K) * C, N * F_  # elements; (2, 5): each moves twice forward, 5 times in all
    for op, function, reference, inputs, n, n_moves, by_liger, by_quack in (
            ("rms_norm", lambda x, w: kernels.rms_norm(x, w, EPS, impl),
             lambda x, w: kernels.add_rms_norm_ref(x, None, w, EPS)[1], [x, weight], nd, (2, 5),
             lambda x, w: liger.LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", False),
             lambda x, w: quack.rmsnorm(x, w, eps=EPS)),
            ("add_rms_norm", lambda x, d, w: kernels.add_rms_norm(x, d, w, EPS, impl),
             lambda x, d, w: kernels.add_rms_norm_ref(x, d, w, EPS), [x, delta, weight], nd, (4, 8), None,
             lambda x, d, w: quack.rmsnorm(x, w, residual=d, eps=EPS, prenorm=True)[::-1]),
            ("rope", lambda q, k: tuple(kernels.rope(x, cos, sin, impl=impl) for x in (q, k)),
             lambda q, k: tuple(kernels.rope_ref(x, cos, sin) for x in (q, k)), [q, k], nc, (2, 4), rotate, None),
            ("norm + rope", lambda q, k, w: tuple(kernels.rope(x, cos, sin, w, EPS, impl) for x in (q, k)),
             lambda q, k, w: tuple(kernels.rope_ref(x, cos, sin, w, EPS) for x in (q, k)), [q, k, head], nc, (2, 5),
             None, None),
            ("swiglu", lambda a, b: kernels.swiglu(a, b, impl), kernels.swiglu_ref, [gate, up], nf, (3, 8),
             lambda a, b: liger.LigerSiLUMulFunction.apply(a, b), None)):
        with torch.no_grad():
            results = reference(*inputs)
        grad = tuple(map(torch.randn_like, results)) if isinstance(results, tuple) else torch.randn_like(results)
        torch._dynamo.reset()
        compiled = torch.compile(reference, dynamic=False)
        peers = {"eager": Side(reference, inputs, grad), "compiled": Side(compiled, inputs, grad)}
        if liger and by_liger:  # clones: Liger works in place
            own = [t.detach().clone().requires_grad_() for t in inputs]
            own_grad = tuple(map(torch.clone, grad)) if isinstance(grad, tuple) else grad.clone()
            peers["liger"] = Side(by_liger, own, own_grad)
        if quack and by_quack:
            peers["quack"] = Side(by_quack, inputs, grad)
        size = n * torch.finfo(setting.dtype).bits / 8e9
        yield Case(op, f"{N} rows", "GB/s", tuple(n * size for n in n_moves), Side(function, inputs, grad), peers)


def invariant(setting, shape):
    """What impl="invariant" costs: here impl=None is the peer."""
    if setting.apart:
        return
    D, F_ = SHAPES[shape][0], SHAPES[shape][4]
    fixed = replace(setting, forests=setting.forests[1:2], caches=setting.caches[1:2], groups=(),
                    tokens=setting.tokens[-1:])
    for build in (attention, decode, linear_logp):
        cases = []
        for impl in (setting.invariant, setting.impl):
            torch.manual_seed(1)
            cases.append(next(build(replace(fixed, impl=impl), shape)))
        yield replace(cases[0], op="invariant " + cases[0].op, peers={"impl=None": cases[1].ours},
                      amounts=(cases[0].amounts[0], None), goals=({}, {}))
    N = setting.rows
    inputs = [setting.random(N, D), setting.random(F_, D)]
    fixed_order = Side(lambda x, w: kernels.linear(x, w, impl=setting.invariant), inputs)
    yield Case("invariant linear", f"{N} x {D} x {F_}", "TFLOP/s", (2 * N * D * F_ / 1e12, None), fixed_order,
               {"impl=None": Side(F.linear, inputs)})


# ------------------------------------------------------------------------------------------------------ the measurement


@functools.cache
def flush_buffer():
    return torch.empty(2**28, dtype=torch.uint8, device="cuda")


def on_gpu(call):
    """One call: (results, seconds, GB)."""
    start, end, flush = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True), flush_buffer()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda._sleep(4_000_000)  # 2 ms
    flush.zero_()
    start.record()
    results = call()
    end.record()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()  # results are held at either time
    return results, start.elapsed_time(end) / 1e3, extra / 1e9


def on_cpu(call, at_least):
    """Calls for so many seconds: (the last's results, median seconds, the first's GB)."""
    def resident(field):
        return int(re.search(field + r":\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9

    torch.ones(256, 256) @ torch.ones(256, 256)  # the library's own buffers
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, gb, seconds, results = resident("VmRSS"), None, [], None
    while sum(seconds) < at_least or not seconds:
        results, began = None, time.perf_counter()
        results = call()
        seconds.append(time.perf_counter() - began)
        gb = resident("VmHWM") - before if gb is None else gb
    return results, statistics.median(seconds), gb


def turn(setting, side, backward):
    """(seconds, GB, up to a million elements of each result: copies, as Liger writes into its inputs)."""
    call = functools.partial(side.call, backward)
    results, seconds, gb = on_gpu(call) if setting.device == "cuda" else on_cpu(call, 2 if setting.apart else 0)
    sample = [x.flatten()[::-(-x.numel() // 2**20)].float().cpu().clone() for x in side.view(results, backward)]
    return seconds, gb, sample


def turn_apart(setting, op, shape, number, name, backward):
    """A turn in a young process, which makes the case anew."""
    torch.set_num_threads(setting.threads)
    torch.manual_seed(0)
    case = next(islice(OPS[op](setting, shape), number, None))
    return turn(setting, {"ours": case.ours, **case.peers}[name], backward)


def measure(setting, op, shape, number, case, backward):
    """{side: its turns}, or why there are none. In one process the first two turns warm up, see `report`."""
    sides = {"ours": case.ours, **case.peers}
    found = {name: [] for name in sides}
    for _ in range(setting.runs + (0 if setting.apart else 2)):
        for name in (name for name in sides if not isinstance(found[name], str)):
            try:
                if setting.apart:
                    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                        found[name] += [pool.submit(turn_apart, setting, op, shape, number, name, backward).result()]
                else:
                    found[name] += [turn(setting, sides[name], backward)]
            except (RuntimeError, AssertionError, TritonError) as error:  # no memory, no such backend, does not compile
                found[name] = f"{type(error).__name__}: {error}".splitlines()[0][:90]
    return found


def report(setting, shape, case, backward, found, limits):
    """Compares the results; prints and returns one row, whose "ours" is None where nothing could be raced."""
    ours, amount, median = found["ours"], case.amounts[backward], {}
    for name, got in found.items():
        if not isinstance(got, str) and not isinstance(ours, str):
            errors = [float((a - b).norm() / b.norm()) for a, b in zip(ours[0][2], got[0][2], strict=True)]
            if all(error < setting.tolerance for error in errors):  # NaN is not
                found[name] = got[-setting.runs:]
                median[name] = statistics.median(seconds for seconds, _, _ in found[name])
            else:
                found[name] = "differs by " + ", ".join(f"{error:.1e}" for error in errors)
    row = {"op": case.op + (" fwd+bwd" if backward else " fwd"), "model": shape, "work": case.work, "unit": case.unit,
           "ours": None, "peer": None, "ratio": None}
    best = min(median.keys() - {"ours"}, key=median.get, default=None)
    if best is None:
        print(f"{row['op']:26} {shape:4} {case.work:22} FAILED", {n: g for n, g in found.items() if isinstance(g, str)})
        return row
    turns = [theirs[0] / own[0] for own, theirs in zip(found["ours"], found[best])]
    ours_gb, peer_gb = (max(gb for _, gb, _ in found[name]) for name in ("ours", best))
    row |= {"ours": amount / median["ours"], "peer": amount / median[best], "ratio": median[best] / median["ours"],
            "ratio_low": min(turns), "ratio_high": max(turns), "share": amount / median["ours"] / limits[case.unit],
            "ours_s": median["ours"], "peer_s": median[best], "ours_gb": ours_gb, "peer_gb": peer_gb, "peer_is": best,
            "of_peer_gb": ours_gb / peer_gb if peer_gb else None,
            "peers": {n: amount / median[n] if n in median else got for n, got in found.items() if n != "ours"}}
    notes = [f"{n}: {got}" for n, got in row["peers"].items() if isinstance(got, str)]
    for field, goal in case.goals[backward].items():
        at_most = field.endswith("gb")
        met = row[field] <= goal if at_most else row[field] >= goal
        notes.insert(0, f"{field} {'at most' if at_most else 'at least'} {goal}: {'met' if met else 'MISSED'}")
    print(f"{row['op']:26} {shape:4} {case.work:22} {row['ours']:9.4g} {row['peer']:9.4g} {case.unit:8} "
          f"{row['ratio']:5.2f} ({min(turns):.2f}-{max(turns):.2f}) {row['share']:6.0%} {ours_gb:8.3f} {peer_gb:8.3f} ",
          "; ".join([best, *notes]), flush=True)
    return row | {"notes": notes}


def ceilings(setting):
    """What this machine does of each unit at most."""
    n, m = (8192, 2**30) if setting.device == "cuda" else (1024, 2**26)
    a, b = (setting.random(n, n).detach() for _ in range(2))
    x = torch.ones(m, dtype=torch.bfloat16, device=setting.device)
    y = torch.empty_like(x)
    product, copy = (statistics.median(turn(replace(setting, apart=False), Side(lambda: f(), []), False)[0]
                                       for _ in range(20)) for f in (lambda: a @ b, lambda: y.copy_(x)))
    return {"TFLOP/s": 2 * n**3 / product / 1e12, "GB/s": 4 * m / copy / 1e9}


OPS = {f.__name__: f for f in (attention, decode, linear_logp, pointwise, invariant)}


def rounded(x):
    """Four digits of every float in a record."""
    if isinstance(x, float):
        return float(f"{x:.4g}")
    return {k: rounded(v) for k, v in x.items()} if isinstance(x, dict) else x


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--shape", nargs="+", choices=SHAPES, help="0.5b alone on a CPU")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--runs", type=int, help="turns of each side: 10 on a GPU, 3 on a CPU")
    parser.add_argument("--tokens", type=int, nargs="+", help="of linear_logp")
    parser.add_argument("--vocabulary", type=int, help="of linear_logp")
    parser.add_argument("--dry", action="store_true", help="toy sizes on a CPU")
    args = parser.parse_args()
    setting = DRY if args.dry else Setting() if torch.cuda.is_available() else CPU
    setting = replace(setting, threads=args.threads, runs=args.runs or setting.runs, V=args.vocabulary or setting.V,
                      tokens=tuple(args.tokens or setting.tokens))
    torch.set_num_threads(args.threads)
    device, limits, rows = torch.cuda.get_device_name() if setting.device == "cuda" else "cpu", ceilings(setting), []
    print(f"{device}, torch {torch.__version__}, Liger-Kernel: {'yes' if liger else 'no'}, "
          f"QuACK: {'yes' if quack else 'no'}, limits: {rounded(limits)}")
    print(f"{'':54} {'ours':>9} {'peer':>9} {'':8} ratio    range     share  ours GB  peer GB  peer; goals; not raced")
    for shape in args.shape or (["toy"] if args.dry else ["0.5b"] if setting.apart else ["0.5b", "7b", "32b"]):
        for op in args.only:
            torch.manual_seed(0)
            for number, case in enumerate(OPS[op](setting, shape)):
                for backward in (b for b in (False, True) if case.amounts[b] is not None):
                    found = measure(setting, op, shape, number, case, backward)
                    rows.append(report(setting, shape, case, backward, found, limits))
    head = next((row for row in rows if row["op"] == "linear_logp fwd+bwd"), rows[0] if rows else {})
    print(json.dumps({"bench": "kernels", "device": device, "threads": args.threads, "dtype": str(setting.dtype)[6:],
                      "limits": rounded(limits), **rounded(head), "rows": list(map(rounded, rows))}))
    sys.exit(any(row["ours"] is None for row in rows))


if __name__ == "__main__":
    main()
