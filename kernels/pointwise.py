"""What stands between the matrix products: `rms_norm`, `add_rms_norm`, `rope`, `swiglu`."""

import functools

import torch
import torch.nn.functional as functional

from kernels.tiles import POINTWISE, check_launch, jit, launch, tl, triton, wide


def add_rms_norm_ref(x_nd, delta_nd, weight_d, eps):
    """sum = x + delta;  normed = weight sum / sqrt(mean(sum^2) + eps), the division in float32 or wider."""
    sum_nd = x_nd if delta_nd is None else x_nd + delta_nd
    wide_nd = sum_nd.to(wide(sum_nd.dtype))
    unit_nd = wide_nd * torch.rsqrt(wide_nd.square().mean(-1, keepdim=True) + eps)
    return sum_nd, weight_d * unit_nd.to(sum_nd.dtype)  # rounded before the weight, as in Hugging Face's models


@jit
def _rms_norm_fwd_kernel(x_ptr, delta_ptr, weight_ptr, sum_ptr, out_ptr, rstd_ptr, D, eps, ADD: tl.constexpr,
                         BLOCK_D: tl.constexpr):
    """rstd = 1 / sqrt(mean(x^2) + eps);  out = weight x rstd, one row; with ADD, x + delta takes x's place."""
    # a program holds a row: it is read once, for the mean and for what the mean divides
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    x_d = tl.load(x_ptr + row * D + d, mask=d < D, other=0.0)
    if ADD:
        x_d = (x_d.to(tl.float32) + tl.load(delta_ptr + row * D + d, mask=d < D, other=0.0)).to(x_d.dtype)
        tl.store(sum_ptr + row * D + d, x_d, mask=d < D)
    x_d = x_d.to(tl.float32)  # after the sum was rounded: the norm is of the residual stream as it is stored
    rstd = tl.rsqrt(tl.sum(x_d * x_d, 0) / D + eps)
    out_d = tl.load(weight_ptr + d, mask=d < D, other=0.0) * (x_d * rstd)
    tl.store(out_ptr + row * D + d, out_d.to(out_ptr.dtype.element_ty), mask=d < D)
    tl.store(rstd_ptr + row, rstd)  # 4 bytes a row spare the backward pass a sum


@jit(do_not_specialize=["N"])
def _rms_norm_bwd_kernel(x_ptr, weight_ptr, rstd_ptr, grad_ptr, grad_sum_ptr, grad_x_ptr, part_ptr, N, D,
                         ADD: tl.constexpr, BLOCK_D: tl.constexpr):
    """With h = x rstd:  grad_x = rstd (weight grad - h mean(weight grad h)) (+ grad_sum);  grad_weight = sum_n grad h.

    Program i of I takes rows i, i + I, i + 2 I .. and leaves its part of grad_weight, a row of `part`, which PyTorch
    sums: rows added up with atomics would have no fixed order.
    """
    d = tl.arange(0, BLOCK_D)
    weight_d = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    part_d = tl.zeros([BLOCK_D], tl.float32)
    for r in range(tl.program_id(0), N, tl.num_programs(0)):
        row = tl.cast(r, tl.int64)
        h_d = tl.load(x_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32) * tl.load(rstd_ptr + row)
        grad_d = tl.load(grad_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        part_d += grad_d * h_d
        grad_d *= weight_d
        grad_x_d = (grad_d - h_d * (tl.sum(grad_d * h_d, 0) / D)) * tl.load(rstd_ptr + row)
        if ADD:
            grad_x_d += tl.load(grad_sum_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + row * D + d, grad_x_d.to(grad_x_ptr.dtype.element_ty), mask=d < D)
    tl.store(part_ptr + tl.program_id(0) * D + d, part_d, mask=d < D)


def launch_add_rms_norm(x_nd, delta_nd, weight_d, eps):
    """sum_nd (x itself where delta is None), its norm, and rstd_n for the backward pass."""
    N, D = x_nd.shape
    x_nd = x_nd.contiguous()
    delta_nd = None if delta_nd is None else delta_nd.contiguous()
    check_launch(x_nd, weight_d, delta_nd)
    sum_nd = x_nd if delta_nd is None else torch.empty_like(x_nd)
    out_nd = torch.empty_like(x_nd)
    rstd_n = x_nd.new_empty(N, dtype=torch.float32)
    if N:
        BLOCK_D, options = _norm_options(D)
        launch(_rms_norm_fwd_kernel, (N, 1, 1), (x_nd, delta_nd, weight_d, sum_nd, out_nd, rstd_n),
               (D, eps, delta_nd is not None, BLOCK_D), options)
    return sum_nd, out_nd, rstd_n


class AddRmsNormTriton(torch.autograd.Function):
    """add_rms_norm, or rms_norm where delta is None: then the normed rows alone."""

    @staticmethod
    def forward(ctx, x_nd, delta_nd, weight_d, eps):
        ctx.add = delta_nd is not None
        sum_nd, out_nd, rstd_n = launch_add_rms_norm(x_nd, delta_nd, weight_d, eps)
        ctx.save_for_backward(sum_nd, weight_d, rstd_n)
        return (sum_nd, out_nd) if ctx.add else out_nd

    @staticmethod
    def backward(ctx, *grads):
        sum_nd, weight_d, rstd_n = ctx.saved_tensors
        N, D = sum_nd.shape
        grad_out_nd = grads[-1].contiguous()
        grad_sum_nd = grads[0].contiguous() if ctx.add else None
        grad_x_nd = torch.empty_like(sum_nd)
        n_programs = min(N, 1024)  # enough for any GPU; more would leave more parts to sum
        part_id = rstd_n.new_empty(n_programs, D)
        if N:
            BLOCK_D, options = _norm_options(D)
            _rms_norm_bwd_kernel[n_programs,](sum_nd, weight_d, rstd_n, grad_out_nd, grad_sum_nd, grad_x_nd, part_id, N,
                                              D, ctx.add, BLOCK_D, **options)
        # x and delta enter as a sum: their gradients are the same tensor
        return grad_x_nd, grad_x_nd if ctx.add else None, part_id.sum(0).to(weight_d.dtype), None


@functools.lru_cache  # here and below: next_power_of_2 costs the host as much as half a launch
def _norm_options(D):
    """A row is a block; a warp for 512 channels, 16 at most."""
    BLOCK_D = triton.next_power_of_2(D)
    return BLOCK_D, {"num_warps": min(max(BLOCK_D // 512, 1), 16)} | POINTWISE


def rope_ref(x_nhc, cos_nc, sin_nc, weight_c=None, eps=0.0):
    """rms_norm over the channels of a head, if there is a weight; then channel pairs (i, i + C/2), Hugging Face's
    half-split layout, rotate by their token's angle."""
    if weight_c is not None:
        x_nhc = add_rms_norm_ref(x_nhc, None, weight_c, eps)[1]
    a, b = x_nhc.chunk(2, dim=-1)
    cos, sin = cos_nc[:, None], sin_nc[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x_nhc.dtype)


@jit
def _rope_fwd_kernel(x_ptr, cos_ptr, sin_ptr, weight_ptr, out_ptr, eps, stride_xn, stride_xh, H: tl.constexpr,
                     HALF: tl.constexpr, NORM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr):
    """(a, b) -> (a cos - b sin, b cos + a sin) for the two halves of the channels of a token's heads."""
    row = tl.program_id(0).to(tl.int64)
    h, c = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_C)
    real_hc = (h < H)[:, None] & (c < HALF)[None, :]  # blocks are powers of two: 28 heads are 32 rows
    x_hc = x_ptr + row * stride_xn + h[:, None] * stride_xh + c[None, :]
    a_hc = tl.load(x_hc, mask=real_hc, other=0.0).to(tl.float32)
    b_hc = tl.load(x_hc + HALF, mask=real_hc, other=0.0).to(tl.float32)
    if NORM:
        rstd_h = tl.rsqrt((tl.sum(a_hc * a_hc, 1) + tl.sum(b_hc * b_hc, 1)) / (2 * HALF) + eps)
        a_hc *= rstd_h[:, None] * tl.load(weight_ptr + c, mask=c < HALF, other=0.0).to(tl.float32)[None, :]
        b_hc *= rstd_h[:, None] * tl.load(weight_ptr + HALF + c, mask=c < HALF, other=0.0).to(tl.float32)[None, :]
    cos_c = tl.load(cos_ptr + row * HALF + c, mask=c < HALF, other=0.0)[None, :]
    sin_c = tl.load(sin_ptr + row * HALF + c, mask=c < HALF, other=0.0)[None, :]
    out_hc = out_ptr + (row * H + h)[:, None] * (2 * HALF) + c[None, :]
    tl.store(out_hc, (a_hc * cos_c - b_hc * sin_c).to(out_ptr.dtype.element_ty), mask=real_hc)
    tl.store(out_hc + HALF, (b_hc * cos_c + a_hc * sin_c).to(out_ptr.dtype.element_ty), mask=real_hc)


@jit(do_not_specialize=["N"])
def _rope_bwd_kernel(x_ptr, cos_ptr, sin_ptr, weight_ptr, grad_ptr, grad_x_ptr, part_ptr, N, eps, stride_xn, stride_xh,
                     H: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, BLOCK_H: tl.constexpr,
                     BLOCK_C: tl.constexpr):
    """The gradient is rotated back by the same angle; then, with NORM, through the norm as in _rms_norm_bwd_kernel."""
    h, c = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_C)
    real_hc = (h < H)[:, None] & (c < HALF)[None, :]
    part_a_c, part_b_c = tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32)
    for r in range(tl.program_id(0), N, tl.num_programs(0)):
        row = tl.cast(r, tl.int64)
        grad_hc = grad_ptr + (row * H + h)[:, None] * (2 * HALF) + c[None, :]
        turned_a_hc = tl.load(grad_hc, mask=real_hc, other=0.0).to(tl.float32)
        turned_b_hc = tl.load(grad_hc + HALF, mask=real_hc, other=0.0).to(tl.float32)
        cos_c = tl.load(cos_ptr + row * HALF + c, mask=c < HALF, other=0.0)[None, :]
        sin_c = tl.load(sin_ptr + row * HALF + c, mask=c < HALF, other=0.0)[None, :]
        grad_a_hc = turned_a_hc * cos_c + turned_b_hc * sin_c
        grad_b_hc = turned_b_hc * cos_c - turned_a_hc * sin_c
        if NORM:
            x_hc = x_ptr + row * stride_xn + h[:, None] * stride_xh + c[None, :]
            a_hc = tl.load(x_hc, mask=real_hc, other=0.0).to(tl.float32)
            b_hc = tl.load(x_hc + HALF, mask=real_hc, other=0.0).to(tl.float32)
            rstd_h = tl.rsqrt((tl.sum(a_hc * a_hc, 1) + tl.sum(b_hc * b_hc, 1)) / (2 * HALF) + eps)
            a_hc *= rstd_h[:, None]
            b_hc *= rstd_h[:, None]
            part_a_c += tl.sum(grad_a_hc * a_hc, 0)  # the weight's gradient, before the weight multiplies
            part_b_c += tl.sum(grad_b_hc * b_hc, 0)
            grad_a_hc *= tl.load(weight_ptr + c, mask=c < HALF, other=0.0).to(tl.float32)[None, :]
            grad_b_hc *= tl.load(weight_ptr + HALF + c, mask=c < HALF, other=0.0).to(tl.float32)[None, :]
            mean_h = (tl.sum(grad_a_hc * a_hc, 1) + tl.sum(grad_b_hc * b_hc, 1)) / (2 * HALF)
            grad_a_hc = (grad_a_hc - a_hc * mean_h[:, None]) * rstd_h[:, None]
            grad_b_hc = (grad_b_hc - b_hc * mean_h[:, None]) * rstd_h[:, None]
        grad_x_hc = grad_x_ptr + (row * H + h)[:, None] * (2 * HALF) + c[None, :]
        tl.store(grad_x_hc, grad_a_hc.to(grad_x_ptr.dtype.element_ty), mask=real_hc)
        tl.store(grad_x_hc + HALF, grad_b_hc.to(grad_x_ptr.dtype.element_ty), mask=real_hc)
    if NORM:
        tl.store(part_ptr + tl.program_id(0) * (2 * HALF) + c, part_a_c, mask=c < HALF)
        tl.store(part_ptr + tl.program_id(0) * (2 * HALF) + HALF + c, part_b_c, mask=c < HALF)


def launch_rope(x_nhc, cos_nc, sin_nc, weight_c, eps):
    """x may be heads of a wider product: any strides but the channels'."""
    check_launch(x_nhc, weight_c)
    assert cos_nc.dtype == sin_nc.dtype == torch.float32 and cos_nc.is_contiguous() and sin_nc.is_contiguous()
    N, H, C = x_nhc.shape
    out_nhc = x_nhc.new_empty(N, H, C)
    if N:
        stride_n, stride_h, _ = x_nhc.stride()
        launch(_rope_fwd_kernel, (N, 1, 1), (x_nhc, cos_nc, sin_nc, weight_c, out_nhc),
               (eps, stride_n, stride_h, *_rope_sizes(H, C, weight_c is not None)), POINTWISE)
    return out_nhc


@functools.lru_cache
def _rope_sizes(H, C, normed):
    """H, HALF, NORM, BLOCK_H and BLOCK_C: a token's heads are a block."""
    return H, C // 2, normed, triton.next_power_of_2(H), triton.next_power_of_2(C // 2)


class RopeTriton(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_nhc, cos_nc, sin_nc, weight_c, eps):
        x_nhc = x_nhc if x_nhc.stride(2) == 1 else x_nhc.contiguous()
        ctx.strides, ctx.eps = x_nhc.stride()[:2], eps
        # without a norm the gradient does not depend on x: nothing of it is kept
        ctx.save_for_backward(None if weight_c is None else x_nhc, cos_nc, sin_nc, weight_c)
        return launch_rope(x_nhc, cos_nc, sin_nc, weight_c, eps)

    @staticmethod
    def backward(ctx, grad_nhc):
        x_nhc, cos_nc, sin_nc, weight_c = ctx.saved_tensors
        N, H, C = grad_nhc.shape
        grad_nhc = grad_nhc.contiguous()
        grad_x_nhc = torch.empty_like(grad_nhc)
        n_programs = min(N, 1024)
        part_ic = None if weight_c is None else cos_nc.new_empty(n_programs, C)
        if N:
            _rope_bwd_kernel[n_programs,](x_nhc, cos_nc, sin_nc, weight_c, grad_nhc, grad_x_nhc, part_ic, N, ctx.eps,
                                          *ctx.strides, *_rope_sizes(H, C, weight_c is not None), **POINTWISE)
        grad_weight_c = None if weight_c is None else part_ic.sum(0).to(weight_c.dtype)
        return grad_x_nhc, None, None, grad_weight_c, None


def swiglu_ref(gate_nf, up_nf):
    """silu(gate) up, with silu(x) = x sigmoid(x)."""
    return functional.silu(gate_nf) * up_nf


@jit
def _swiglu_fwd_kernel(gate_ptr, up_ptr, out_ptr, stride_gate, stride_up, F, BLOCK: tl.constexpr):
    """out = gate sigmoid(gate) up, a block of a row. Rows of gate and up may be parts of one product's."""
    row, f = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = f < F
    gate = tl.load(gate_ptr + row * stride_gate + f, mask=real, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up + f, mask=real, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * F + f, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=real)


@jit
def _swiglu_bwd_kernel(gate_ptr, up_ptr, grad_ptr, grad_gate_ptr, grad_up_ptr, stride_gate, stride_up, F,
                       BLOCK: tl.constexpr):
    """With s = sigmoid(gate):  grad_up = grad gate s;  grad_gate = grad up s (1 + gate (1 - s))."""
    row, f = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = f < F
    gate = tl.load(gate_ptr + row * stride_gate + f, mask=real, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up + f, mask=real, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * F + f, mask=real, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)  # silu = gate s, and s' = s (1 - s): silu' = s + gate s (1 - s)
    grad_up, grad_gate = grad * gate * s, grad * up * s * (1 + gate * (1 - s))
    tl.store(grad_up_ptr + row * F + f, grad_up.to(grad_up_ptr.dtype.element_ty), mask=real)
    tl.store(grad_gate_ptr + row * F + f, grad_gate.to(grad_gate_ptr.dtype.element_ty), mask=real)


SWIGLU_BLOCK = 1024


def launch_swiglu(gate_nf, up_nf):
    """gate and up may be columns of one product."""
    check_launch(gate_nf, up_nf)
    N, F = gate_nf.shape
    out_nf = gate_nf.new_empty(N, F)
    if N:
        launch(_swiglu_fwd_kernel, _swiglu_grid(N, F), (gate_nf, up_nf, out_nf),
               (gate_nf.stride(0), up_nf.stride(0), F, SWIGLU_BLOCK), POINTWISE)
    return out_nf


def _swiglu_grid(N, F):
    return N, -(-F // SWIGLU_BLOCK), 1


class SwigluTriton(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_nf, up_nf):
        ctx.save_for_backward(gate_nf, up_nf)
        return launch_swiglu(gate_nf, up_nf)

    @staticmethod
    def backward(ctx, grad_nf):
        gate_nf, up_nf = ctx.saved_tensors
        N, F = grad_nf.shape
        grad_nf = grad_nf.contiguous()
        grad_gate_nf, grad_up_nf = grad_nf.new_empty(N, F), grad_nf.new_empty(N, F)
        if N:
            _swiglu_bwd_kernel[_swiglu_grid(N, F)](gate_nf, up_nf, grad_nf, grad_gate_nf, grad_up_nf, gate_nf.stride(0),
                                                   up_nf.stride(0), F, SWIGLU_BLOCK, **POINTWISE)
        return grad_gate_nf, grad_up_nf
