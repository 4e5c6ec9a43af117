"""The mended interpreter (interpreter.py) against PyTorch's bfloat16, on all kinds of values; the shipped one is wrong.
"""

import os

import pytest
import torch

from interpreter import mended

triton = pytest.importorskip("triton")
tl = triton.language
pytestmark = [pytest.mark.skipif(os.environ["RM_TEST_DEVICE"] == "cuda", reason="kernels are compiled there"),
              pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
              pytest.mark.filterwarnings("ignore::RuntimeWarning:interpreter")]

BF16, F32, F16 = torch.bfloat16, torch.float32, torch.float16
BLOCK = 2**16
ALL = torch.arange(-2**15, 2**15).to(torch.int16).view(BF16)  # every bfloat16 there is
# subnormal to huge
KINDS = torch.tensor([0.0, -0.0, 1.0, -1.0, 1.0078125, 3.140625, -255.0, 0.333984375, 9.2e-41, -4.6e-39, 1.18e-38,
                      1e-20, 3.39e38, -3.39e38, 1e30, float("inf"), -float("inf"), float("nan")]).to(BF16)


@triton.jit
def cast_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < n).to(out_ptr.dtype.element_ty), mask=i < n)


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr):
    m, n, d = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, D)
    a, b = tl.load(a_ptr + m * D + d[None, :]), tl.load(b_ptr + d[:, None] * N + n)
    acc = tl.zeros([M, N], tl.float32)
    tl.store(out_ptr + m * N + n, tl.dot(a, b, acc, input_precision="ieee"))


@triton.jit
def arithmetic_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """x + y, x - y, x y, max, min, -x, x < y ? x : y, one row of out each."""
    i = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + i, mask=i < n, other=0.0), tl.load(y_ptr + i, mask=i < n, other=0.0)
    tl.store(out_ptr + i, x + y, mask=i < n)
    tl.store(out_ptr + n + i, x - y, mask=i < n)
    tl.store(out_ptr + 2 * n + i, x * y, mask=i < n)
    tl.store(out_ptr + 3 * n + i, tl.maximum(x, y), mask=i < n)
    tl.store(out_ptr + 4 * n + i, tl.minimum(x, y), mask=i < n)
    tl.store(out_ptr + 5 * n + i, -x, mask=i < n)
    tl.store(out_ptr + 6 * n + i, tl.where(x < y, x, y), mask=i < n)


def cast(x, dtype):
    out = torch.empty(x.shape, dtype=dtype)
    cast_kernel[triton.cdiv(x.numel(), BLOCK),](x.contiguous(), out, x.numel(), BLOCK)
    return out


def dot(a, b):
    out = torch.empty(len(a), b.shape[1])
    dot_kernel[1,](a.contiguous(), b.contiguous(), out, *out.shape, a.shape[1])
    return out


def arithmetic(x, y):
    out = torch.empty(7, len(x), dtype=BF16)
    arithmetic_kernel[1,](x, y, out, len(x), triton.next_power_of_2(len(x)))
    return out


def same(x, y):
    """Equal, signs of zeros included; NaN where NaN is."""
    return x.dtype == y.dtype and bool((x.isnan() == y.isnan()).all()) and torch.equal(
        x.nan_to_num(7.0, float("inf"), -float("inf")), y.nan_to_num(7.0, float("inf"), -float("inf"))) and torch.equal(
        x.signbit() & ~x.isnan(), y.signbit() & ~y.isnan())


@pytest.mark.parametrize("lower", [0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], ids=hex)
def test_float32_rounds_to_nearest_even(lower):
    """Oracle: PyTorch. Every bfloat16, with nothing, next to nothing, half (a tie) and nearly all of a last place more:
    subnormal numbers, those that overflow to infinity and all NaN are among them."""
    x = ((ALL.view(torch.int16).int() << 16) | lower).view(F32)
    with mended():
        assert same(cast(x, BF16), x.to(BF16))


@pytest.mark.parametrize("dtype", [F32, F16, torch.float64], ids=str)
def test_bfloat16_widens(dtype):
    """Oracle: PyTorch, for every bfloat16."""
    with mended():
        assert same(cast(ALL, dtype), ALL.to(dtype))


def test_other_dtypes_become_bfloat16_and_back():
    """Oracle: PyTorch. Every float16; integers around every tie of 8 bits, and booleans."""
    integers = torch.cat([torch.arange(-2000, 2000), torch.tensor([65535, -65536, 2**24, 2**30 + 2**21])])
    with mended():
        half = torch.arange(-2**15, 2**15).to(torch.int16).view(F16)
        assert same(cast(half, BF16), half.to(BF16))
        for dtype in (torch.int32, torch.int64):
            assert same(cast(integers.to(dtype), BF16), integers.to(dtype).to(BF16))
            finite = ALL[ALL.float().abs() < 2**30]
            assert torch.equal(cast(finite, dtype), finite.to(dtype))
        assert same(cast(torch.tensor([True, False]), BF16), torch.tensor([1.0, 0.0], dtype=BF16))


def test_dot_of_every_kind():
    """Oracle: PyTorch's products in float32, where a product of two bfloat16 is exact. One product for each element, of
    all kinds of values, subnormal and huge, infinite and NaN; the rest of the sum is zeros."""
    a, b = torch.zeros(32, 16, dtype=BF16), torch.zeros(16, 32, dtype=BF16)
    a[:len(KINDS), 3], b[3, :len(KINDS)] = KINDS, KINDS
    with mended():
        assert same(dot(a, b), a[:, 3:4].float() * b[3:4].float() + 0.0)


def test_dot_of_sums():
    """Oracle: the sum in float64, exact: integers below 2^7 add up to less than 2^24."""
    a, b = (torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(i)) for i, shape in
            enumerate([(16, 64), (64, 32)]))
    with mended():
        assert torch.equal(dot(a.to(BF16), b.to(BF16)), (a @ b).float())


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_dot_has_one_order(dtype):
    """Oracle: a plain loop in float32, first product to last, bit for bit; wherever a row or column lies in its tile.
    A library's order may depend on the processor and on the place."""
    a, b = (torch.randn(*shape, generator=torch.Generator().manual_seed(i)).to(dtype) for i, shape in
            enumerate([(16, 64), (64, 32)]))
    total = torch.zeros(16, 32)
    for d in range(64):
        total += a[:, d:d + 1].float() * b[d].float()
    with mended():
        assert same(dot(a, b), total) and same(dot(b.t(), a.t()), total.t())


def test_arithmetic_rounds_once():
    """Oracle: PyTorch's bfloat16, of every pair of kinds and of 4,000 random bit patterns. (PyTorch's maximum of NaN is
    NaN, Triton's is the other number.)"""
    bits = torch.randint(-2**15, 2**15, (2, 4000), generator=torch.Generator().manual_seed(0)).to(torch.int16)
    pairs = torch.cat([torch.cartesian_prod(KINDS.float(), KINDS.float()).t().to(BF16), bits.view(BF16)], 1)
    x, y = pairs.contiguous()
    with mended():
        total, difference, product, larger, smaller, negative, chosen = arithmetic(x, y)
    assert same(total, x + y) and same(difference, x - y) and same(product, x * y)
    assert same(negative[x != 0], -x[x != 0])  # Triton before 3.9 computes 0 - x, which is +0 for a zero
    assert same(chosen, torch.where(x < y, x, y))
    real = ~(x.isnan() | y.isnan()) & (x != y)  # of two zeros either will do
    assert same(larger[real], x.maximum(y)[real]) and same(smaller[real], x.minimum(y)[real])


def test_the_shipped_interpreter_is_wrong():
    """The control, for the day when it is mended at its source: then interpreter.py can go."""
    x = torch.tensor([1.0 + 2**-8 + 2**-9] * 256).view(16, 16)
    assert not same(cast(x, BF16), x.to(BF16))
    one = torch.ones(16, 16, dtype=BF16)
    assert not torch.equal(dot(one, one), one.float() @ one.float())
    assert not same(arithmetic(one[0], one[0])[0], one[0] + one[0])
    with mended():
        assert same(cast(x, BF16), x.to(BF16)) and torch.equal(dot(one, one), one.float() @ one.float())
