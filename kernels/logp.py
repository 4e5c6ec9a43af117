"""`linear_logp`: log-probability and entropy of a token, straight from hidden states; `linear`: the product itself."""

import torch
import torch.nn.functional as F

from kernels.tiles import POINTWISE, check_launch, jit, tiling_of, tl, triton, wide

LOGIT_CHUNK = 2**24  # elements of the [N, columns] float32 blocks that linear_logp holds at once, two of 64 MB
GRADIENT_CHUNK = 2**27  # elements of the [N, columns] logit gradients, in the inputs' dtype, that the Triton path holds


class LinearLogpChunked(torch.autograd.Function):
    """z = hidden weight^T / temperature, a block of columns after the other. With M = max z, S = sum exp(z - M) and
    E = sum exp(z - M) (z - M) so far: logp = (z[target] - M) - log S, entropy = log S - E / S in the end. (Sums of one
    sign: lse - sum p z or z[target] - lse cancel in float32 where one token is nearly certain.)

    The backward pass recomputes each block's z: dz = grad (onehot(target) - softmax(z)) / temperature, dhidden = sum
    over blocks of dz weight, dweight = dz^T hidden: one whole product for the rows of a block. Blocks of rows instead
    would add up dweight, the largest array here, again and again.
    """

    @staticmethod
    def forward(ctx, hidden_nd, weight_vd, target_n, temperature):
        dtype, N = wide(hidden_nd.dtype), len(hidden_nd)
        max_n = hidden_nd.new_full((N,), torch.finfo(dtype).min, dtype=dtype)
        sum_n, moment_n, logit_n = (torch.zeros_like(max_n) for _ in range(3))
        for first, z_nv, other_nv in _column_blocks(hidden_nd, weight_vd, temperature, 2):
            within_n = target_n - first
            inside_n = (within_n >= 0) & (within_n < z_nv.shape[1])
            here_n = z_nv.gather(1, within_n.clamp(0, z_nv.shape[1] - 1)[:, None])[:, 0]
            logit_n = torch.where(inside_n, here_n, logit_n)
            new_max_n = torch.maximum(max_n, z_nv.amax(1))
            down_n, below_nv = max_n - new_max_n, z_nv.sub_(new_max_n[:, None])
            weight_nv = torch.exp(below_nv, out=other_nv)
            moment_n = down_n.exp() * (moment_n + sum_n * down_n)  # before sum_n: it is the old sum that moves down
            sum_n = down_n.exp() * sum_n + weight_nv.sum(1)
            moment_n += weight_nv.mul_(below_nv).sum(1)
            max_n = new_max_n
        log_sum_n = sum_n.log()
        entropy_n, lse_n = log_sum_n - moment_n / sum_n, max_n + log_sum_n
        ctx.save_for_backward(hidden_nd, weight_vd, target_n, max_n, log_sum_n)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy_n, lse_n)
        return (logit_n - max_n) - log_sum_n, entropy_n, lse_n

    @staticmethod
    def backward(ctx, grad_n, *_):
        hidden_nd, weight_vd, target_n, max_n, log_sum_n = ctx.saved_tensors
        grad_hidden_nd = torch.zeros_like(hidden_nd, dtype=grad_n.dtype) if ctx.needs_input_grad[0] else None
        grad_weight_vd = torch.empty_like(weight_vd) if ctx.needs_input_grad[1] else None
        scale_n1 = -(grad_n / ctx.temperature)[:, None]
        for first, z_nv in _column_blocks(hidden_nd, weight_vd, ctx.temperature, 1):
            last = first + z_nv.shape[1]
            dz_nv = z_nv.sub_(max_n[:, None]).sub_(log_sum_n[:, None]).exp_().mul_(scale_n1)
            rows = ((target_n >= first) & (target_n < last)).nonzero()[:, 0]
            dz_nv[rows, target_n[rows] - first] -= scale_n1[rows, 0]
            dz_nv = dz_nv.to(hidden_nd.dtype)
            if grad_hidden_nd is not None and grad_hidden_nd.dtype == dz_nv.dtype:
                grad_hidden_nd.addmm_(dz_nv, weight_vd[first:last])
            elif grad_hidden_nd is not None:
                grad_hidden_nd += dz_nv @ weight_vd[first:last]
            if grad_weight_vd is not None:
                torch.mm(dz_nv.t(), hidden_nd, out=grad_weight_vd[first:last])
        grad_hidden_nd = grad_hidden_nd.to(hidden_nd.dtype) if grad_hidden_nd is not None else None
        return grad_hidden_nd, grad_weight_vd, None, None


def _column_blocks(hidden_nd, weight_vd, temperature, n_blocks):
    """(first column, its block of logits z at the temperature, n_blocks - 1 empty ones like it), LOGIT_CHUNK elements.

    The blocks are allocated once: on a CPU fresh memory of this size costs more (page faults) than the softmax in it.
    """
    N, V = len(hidden_nd), len(weight_vd)
    step = max(1, min(V, LOGIT_CHUNK // max(N, 1)))
    memory = hidden_nd.new_empty(n_blocks, N * step, dtype=wide(hidden_nd.dtype))
    for first in range(0, V, step):
        weight_bd = weight_vd[first:first + step]
        z_nb, *others = (x[:N * len(weight_bd)].view(N, len(weight_bd)) for x in memory)
        if z_nb.dtype == hidden_nd.dtype:
            torch.mm(hidden_nd, weight_bd.t(), out=z_nb)
        else:
            z_nb.copy_(logits_ref(hidden_nd, weight_bd))
        yield first, z_nb.div_(temperature), *others


def logits_ref(hidden_nd, weight_vd):
    """hidden weight^T, float32 or wider: on a GPU bfloat16 products are not rounded to bfloat16 on the way."""
    if hidden_nd.is_cuda and wide(hidden_nd.dtype) != hidden_nd.dtype:
        return torch.mm(hidden_nd, weight_vd.t(), out_dtype=torch.float32)
    return F.linear(hidden_nd, weight_vd).to(wide(hidden_nd.dtype))


@jit
def _product_tile(x_ptr, w_ptr, row_n, col_v, N, V, D, stride_xn, stride_wv, BLOCK_N: tl.constexpr,
                  BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):
    """A [BLOCK_N, BLOCK_V] float32 tile of x w^T, summed over D in steps of BLOCK_D, first to last.

    Rows and columns beyond N and V repeat the last one instead of being masked: they are not stored. (No test on a CPU
    can tell: a read beyond the end that is thrown away is silent there, and a fault on a GPU.)
    """
    d = tl.arange(0, BLOCK_D)
    x_ptr += tl.minimum(row_n, N - 1).to(tl.int64)[:, None] * stride_xn + d[None, :]
    w_ptr += tl.minimum(col_v, V - 1).to(tl.int64)[:, None] * stride_wv + d[None, :]
    acc_nv = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for first in range(0, D, BLOCK_D):
        x_nd = tl.load(x_ptr, mask=(d < D - first)[None, :], other=0.0)
        w_vd = tl.load(w_ptr, mask=(d < D - first)[None, :], other=0.0)
        acc_nv = tl.dot(x_nd, w_vd.T, acc_nv, input_precision="ieee")  # float32 inputs stay float32, not TF32
        x_ptr += BLOCK_D
        w_ptr += BLOCK_D
    return acc_nv


@jit
def _tile_of(pid, n_row_tiles, n_col_tiles, GROUP: tl.constexpr):
    """Program -> (row tile, column tile): GROUP row tiles walk together through all columns, so both stay in L2."""
    first = pid // (GROUP * n_col_tiles) * GROUP
    n_rows = tl.minimum(n_row_tiles - first, GROUP)
    within = pid % (GROUP * n_col_tiles)
    return first + within % n_rows, within // n_rows


@jit
def _logp_fwd_kernel(hidden_ptr, weight_ptr, target_ptr, max_ptr, sum_ptr, moment_ptr, logit_ptr, N, V, D, stride_hn,
                     stride_wv, inverse_temperature, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
                     BLOCK_D: tl.constexpr, GROUP: tl.constexpr):
    """One tile of logits z, reduced on the spot:  max z,  sum exp(z - max),  sum exp(z - max) (z - max),  z[target]."""
    n_col_tiles = tl.cdiv(V, BLOCK_V)
    row_tile, col_tile = _tile_of(tl.program_id(0), tl.cdiv(N, BLOCK_N), n_col_tiles, GROUP)
    row_n = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    col_v = col_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    z_nv = _product_tile(hidden_ptr, weight_ptr, row_n, col_v, N, V, D, stride_hn, stride_wv, BLOCK_N, BLOCK_V, BLOCK_D)
    z_nv *= inverse_temperature
    target_n = tl.load(target_ptr + row_n, mask=row_n < N, other=-1)
    logit_n = tl.sum(tl.where(col_v[None, :] == target_n[:, None], z_nv, 0.0), 1)
    tl.store(logit_ptr + row_n, logit_n, mask=(target_n >= col_tile * BLOCK_V) & (target_n < (col_tile + 1) * BLOCK_V))
    z_nv = tl.where((col_v < V)[None, :], z_nv, float("-inf"))
    max_n = tl.max(z_nv, 1)
    below_nv = tl.maximum(z_nv - max_n[:, None], -1e4)  # exp of it is zero already, and zero times it is not NaN
    weight_nv = tl.exp(below_nv)
    part_n = col_tile.to(tl.int64) * N + row_n
    tl.store(max_ptr + part_n, max_n, mask=row_n < N)
    tl.store(sum_ptr + part_n, tl.sum(weight_nv, 1), mask=row_n < N)
    tl.store(moment_ptr + part_n, tl.sum(weight_nv * below_nv, 1), mask=row_n < N)


@jit
def _logp_merge_kernel(max_ptr, sum_ptr, moment_ptr, logit_ptr, logp_ptr, entropy_ptr, N, n_tiles,
                       BLOCK_N: tl.constexpr):
    """The tiles of a row, first to last, under their common maximum M: S = sum exp(z - M), E = sum exp(z - M) (z - M),

    logp = (z[target] - M) - log S,  entropy = log S - E / S: sums of one sign, so that nothing cancels where one token
    is nearly certain. M and log S are left in the first tile's place, for the backward pass.
    """
    row_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    real_n = row_n < N
    max_n = tl.load(max_ptr + row_n, mask=real_n, other=0.0)
    sum_n = tl.load(sum_ptr + row_n, mask=real_n, other=1.0)
    moment_n = tl.load(moment_ptr + row_n, mask=real_n, other=0.0)
    for tile in range(1, n_tiles):
        part_n = tl.full([BLOCK_N], tile, tl.int64) * N + row_n
        tile_max_n = tl.load(max_ptr + part_n, mask=real_n, other=0.0)
        tile_sum_n = tl.load(sum_ptr + part_n, mask=real_n, other=1.0)
        tile_moment_n = tl.load(moment_ptr + part_n, mask=real_n, other=0.0)
        new_max_n = tl.maximum(max_n, tile_max_n)
        down_n, tile_down_n = max_n - new_max_n, tile_max_n - new_max_n
        keep_n, tile_keep_n = tl.exp(down_n), tl.exp(tile_down_n)
        moment_n = keep_n * (moment_n + sum_n * down_n) + tile_keep_n * (tile_moment_n + tile_sum_n * tile_down_n)
        sum_n = keep_n * sum_n + tile_keep_n * tile_sum_n
        max_n = new_max_n
    log_sum_n = tl.log(sum_n)
    logit_n = tl.load(logit_ptr + row_n, mask=real_n, other=0.0)
    tl.store(logp_ptr + row_n, (logit_n - max_n) - log_sum_n, mask=real_n)
    tl.store(entropy_ptr + row_n, log_sum_n - moment_n / sum_n, mask=real_n)
    tl.store(max_ptr + row_n, max_n, mask=real_n)
    tl.store(sum_ptr + row_n, log_sum_n, mask=real_n)


@jit
def _logp_bwd_kernel(hidden_ptr, weight_ptr, target_ptr, max_ptr, log_sum_ptr, grad_ptr, grad_logit_ptr, N, V, D,
                     first_col, n_cols, stride_hn, stride_wv, inverse_temperature, BLOCK_N: tl.constexpr,
                     BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr):
    """grad_logit = grad (onehot(target) - softmax(z)) / temperature for the columns from first_col on; z recomputed."""
    row_tile, col_tile = _tile_of(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(n_cols, BLOCK_V), GROUP)
    row_n = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    within_v = col_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    col_v = first_col + within_v
    z_nv = _product_tile(hidden_ptr, weight_ptr, row_n, col_v, N, V, D, stride_hn, stride_wv, BLOCK_N, BLOCK_V, BLOCK_D)
    z_nv *= inverse_temperature
    real_n = row_n < N
    target_n = tl.load(target_ptr + row_n, mask=real_n, other=-1)
    max_n = tl.load(max_ptr + row_n, mask=real_n, other=float("inf"))  # no exp of large rubbish
    log_sum_n = tl.load(log_sum_ptr + row_n, mask=real_n, other=0.0)
    grad_n = tl.load(grad_ptr + row_n, mask=real_n, other=0.0)
    p_nv = tl.exp((z_nv - max_n[:, None]) - log_sum_n[:, None])
    hit_nv = tl.where(col_v[None, :] == target_n[:, None], 1.0, 0.0)
    grad_nv = (hit_nv - p_nv) * (grad_n * inverse_temperature)[:, None]
    tl.store(grad_logit_ptr + row_n.to(tl.int64)[:, None] * n_cols + within_v[None, :],
             grad_nv.to(grad_logit_ptr.dtype.element_ty), mask=real_n[:, None] & (within_v < n_cols)[None, :])


class LinearLogpTriton(torch.autograd.Function):
    """The forward pass keeps four numbers per row and vocabulary tile; the backward pass recomputes the logits of
    GRADIENT_CHUNK / N columns at a time. A chunk of columns, not of rows: so each row of the weight's gradient is one
    whole product over N, and no float32 copy of it is summed up."""

    @staticmethod
    def forward(ctx, hidden_nd, weight_vd, target_n, temperature, invariant):
        hidden_nd, weight_vd = (x if x.stride(1) == 1 else x.contiguous() for x in (hidden_nd, weight_vd))
        target_n = target_n.contiguous()
        check_launch(hidden_nd, weight_vd)
        (N, D), V = hidden_nd.shape, len(weight_vd)
        tiling, options = tiling_of("linear_invariant" if invariant else "logp", 0, hidden_nd)
        n_tiles = triton.cdiv(V, tiling["BLOCK_V"])
        part_xtn = hidden_nd.new_empty(3, n_tiles, N, dtype=torch.float32)
        logit_n, logp_n, entropy_n = (torch.empty_like(part_xtn[0, 0]) for _ in range(3))
        if N:
            _logp_fwd_kernel[triton.cdiv(N, tiling["BLOCK_N"]) * n_tiles,](
                hidden_nd, weight_vd, target_n, *part_xtn, logit_n, N, V, D, hidden_nd.stride(0), weight_vd.stride(0),
                1 / temperature, **tiling, **options)
            _logp_merge_kernel[triton.cdiv(N, 64),](*part_xtn, logit_n, logp_n, entropy_n, N, n_tiles, 64, num_warps=2,
                                                    **POINTWISE)
        max_n, log_sum_n = part_xtn[:2, 0].clone()
        ctx.save_for_backward(hidden_nd, weight_vd, target_n, max_n, log_sum_n)
        ctx.temperature = temperature
        lse_n = max_n + log_sum_n
        ctx.mark_non_differentiable(entropy_n, lse_n)
        return logp_n, entropy_n, lse_n

    @staticmethod
    def backward(ctx, grad_n, *_):
        hidden_nd, weight_vd, target_n, max_n, log_sum_n = ctx.saved_tensors
        (N, D), V = hidden_nd.shape, len(weight_vd)
        tiling, options = tiling_of("logp", 0, hidden_nd)
        step = max(tiling["BLOCK_V"], min(V, GRADIENT_CHUNK // max(N, 1) // tiling["BLOCK_V"] * tiling["BLOCK_V"]))
        grad_n, block = grad_n.contiguous(), hidden_nd.new_empty(N * step)
        grad_hidden_nd = torch.zeros_like(hidden_nd, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        new = torch.empty_like if N else torch.zeros_like  # without rows the loop writes nothing
        grad_weight_vd = new(weight_vd) if ctx.needs_input_grad[1] else None
        for first in range(0, V if N else 0, step):
            n_cols = min(step, V - first)
            grad_nv = block[:N * n_cols].view(N, n_cols)
            n_programs = triton.cdiv(N, tiling["BLOCK_N"]) * triton.cdiv(n_cols, tiling["BLOCK_V"])
            _logp_bwd_kernel[n_programs,](
                hidden_nd, weight_vd, target_n, max_n, log_sum_n, grad_n, grad_nv, N, V, D, first, n_cols,
                hidden_nd.stride(0), weight_vd.stride(0), 1 / ctx.temperature, **tiling, **options)
            if grad_hidden_nd is not None:
                grad_hidden_nd += grad_nv @ weight_vd[first:first + n_cols]
            if grad_weight_vd is not None:
                torch.mm(grad_nv.t(), hidden_nd, out=grad_weight_vd[first:first + n_cols])
        return None if grad_hidden_nd is None else grad_hidden_nd.to(hidden_nd.dtype), grad_weight_vd, None, None, None


@jit
def _linear_kernel(x_ptr, weight_ptr, bias_ptr, out_ptr, N, V, D, stride_xn, stride_wv, BLOCK_N: tl.constexpr,
                   BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, BIAS: tl.constexpr):
    """out = x weight^T + bias, one tile."""
    row_tile, col_tile = _tile_of(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(V, BLOCK_V), GROUP)
    row_n = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    col_v = col_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    out_nv = _product_tile(x_ptr, weight_ptr, row_n, col_v, N, V, D, stride_xn, stride_wv, BLOCK_N, BLOCK_V, BLOCK_D)
    if BIAS:
        out_nv += tl.load(bias_ptr + col_v, mask=col_v < V, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + row_n.to(tl.int64)[:, None] * V + col_v[None, :], out_nv.to(out_ptr.dtype.element_ty),
             mask=(row_n < N)[:, None] & (col_v < V)[None, :])


def launch_linear(x_nd, weight_vd, bias_v, dtype):
    check_launch(x_nd, weight_vd, *([] if bias_v is None else [bias_v]))
    (N, D), V = x_nd.shape, len(weight_vd)
    tiling, options = tiling_of("linear_invariant", 0, x_nd)
    out_nv = x_nd.new_empty(N, V, dtype=dtype)
    if N:
        _linear_kernel[triton.cdiv(N, tiling["BLOCK_N"]) * triton.cdiv(V, tiling["BLOCK_V"]),](
            x_nd, weight_vd, bias_v, out_nv, N, V, D, x_nd.stride(0), weight_vd.stride(0), BIAS=bias_v is not None,
            **tiling, **options)
    return out_nv


class LinearInvariant(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_nd, weight_vd, bias_v):
        x_nd = x_nd if x_nd.stride(1) == 1 else x_nd.contiguous()
        ctx.save_for_backward(x_nd, weight_vd)
        return launch_linear(x_nd, weight_vd, bias_v, x_nd.dtype)

    @staticmethod
    def backward(ctx, grad_nv):
        x_nd, weight_vd = ctx.saved_tensors
        grad_x_nd = grad_nv @ weight_vd if ctx.needs_input_grad[0] else None
        grad_weight_vd = grad_nv.t() @ x_nd if ctx.needs_input_grad[1] else None
        return grad_x_nd, grad_weight_vd, grad_nv.sum(0) if ctx.needs_input_grad[2] else None
