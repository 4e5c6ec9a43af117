"""`linear_logp`: log-probability and entropy of a token, straight from hidden states; `linear`: the product itself."""

import torch
import torch.nn.functional as F

from kernels.tiles import POINTWISE, check_launch, jit, product_tiling, tl, triton, wide

ONEDNN_ELEMENTS = 2**18  # weights of more than these go to oneDNN, see linear_ref
LOGIT_CHUNK = 2**24  # elements of the [N, columns] float32 blocks that linear_logp holds at once, two of 64 MB
GRADIENT_CHUNK = 2**27  # elements of the [N, columns] logit gradients, in the inputs' dtype, that the Triton path holds


def linear_logp_ref(hidden_nd, weight_vd, target_n, temperature=1.0):
    """logp = log softmax(hidden weight^T / temperature)[target];  entropy = -sum_v p_v log p_v, without gradient."""
    logp_nv = torch.log_softmax((hidden_nd @ weight_vd.t()).to(wide(hidden_nd.dtype)) / temperature, 1)
    entropy_n = -(logp_nv.exp() * logp_nv).sum(1).detach()
    return logp_nv.gather(1, target_n[:, None])[:, 0], entropy_n


class LinearLogpChunked(torch.autograd.Function):
    """linear_logp_ref without its [N, V] arrays, in PyTorch: the logits z are made in blocks of columns, twice.

    Forward, an online softmax over the blocks keeps max = max z, sum = sum exp(z - max) and moment = sum exp(z - max)
    (z - max). In the end logp = (z[target] - max) - log sum and entropy = log sum - moment / sum: sums of one sign,
    where lse - sum p z or z[target] - lse would cancel in float32 if one token is nearly certain.

    Two logits, ln 3 and 0: max = ln 3, sum = 4/3, moment = -(ln 3)/3; the first one's logp = ln(3/4), the entropy =
    ln(4/3) + (ln 3)/4.

    Backward, dz = grad (onehot(target) - softmax(z)) / temperature, dhidden = sum over blocks of dz weight, dweight =
    dz^T hidden: one whole product for the rows of a block. Blocks of rows instead would add up dweight, the largest
    array here, again and again.
    """

    @staticmethod
    def forward(ctx, hidden_nd, weight_vd, target_n, temperature):
        N, dtype = len(hidden_nd), wide(hidden_nd.dtype)
        max_n = hidden_nd.new_full((N,), torch.finfo(dtype).min, dtype=dtype)
        sum_n, moment_n, logit_n = (torch.zeros_like(max_n) for _ in range(3))
        for first, z_nv, spare_nv in _logit_blocks(hidden_nd, weight_vd, temperature, n_blocks=2):
            within_n = target_n - first  # z[target] is in one block; clamped for the others, whose find is not used
            inside_n = (within_n >= 0) & (within_n < z_nv.shape[1])
            target_z_n = z_nv.gather(1, within_n.clamp(0, z_nv.shape[1] - 1)[:, None])[:, 0]
            logit_n = torch.where(inside_n, target_z_n, logit_n)
            new_max_n = torch.maximum(max_n, z_nv.amax(1))
            down_n = max_n - new_max_n  # what the maximum's growth takes off every z - max so far
            keep_n = down_n.exp()
            below_nv = z_nv.sub_(new_max_n[:, None])  # in place, from here on: z is not needed any more
            weight_nv = torch.exp(below_nv, out=spare_nv)
            # sum exp(z - max + down) (z - max + down) = exp(down) (moment + sum down), of the old sum: before sum_n
            moment_n = keep_n * (moment_n + sum_n * down_n)
            sum_n = keep_n * sum_n + weight_nv.sum(1)
            moment_n += weight_nv.mul_(below_nv).sum(1)
            max_n = new_max_n
        log_sum_n = sum_n.log()
        entropy_n = log_sum_n - moment_n / sum_n
        ctx.save_for_backward(hidden_nd, weight_vd, target_n, max_n, log_sum_n)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy_n)
        return (logit_n - max_n) - log_sum_n, entropy_n

    @staticmethod
    def backward(ctx, grad_n, _grad_entropy_n):
        hidden_nd, weight_vd, target_n, max_n, log_sum_n = ctx.saved_tensors
        # grad_n's dtype is wide: thousands of blocks are not added up in bfloat16
        grad_hidden_nd = torch.zeros_like(hidden_nd, dtype=grad_n.dtype) if ctx.needs_input_grad[0] else None
        grad_weight_vd = torch.empty_like(weight_vd) if ctx.needs_input_grad[1] else None
        scale_n1 = -(grad_n / ctx.temperature)[:, None]  # dz = scale (softmax(z) - onehot(target))
        for first, z_nv in _logit_blocks(hidden_nd, weight_vd, ctx.temperature, n_blocks=1):
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


def _logit_blocks(hidden_nd, weight_vd, temperature, n_blocks):
    """(first column, its block of logits z at the temperature, n_blocks - 1 spare ones), of LOGIT_CHUNK elements.

    The blocks are allocated once: on a CPU fresh memory of this size costs more (page faults) than the softmax in it.
    """
    N, V = len(hidden_nd), len(weight_vd)
    step = max(1, min(V, LOGIT_CHUNK // max(N, 1)))
    memory = hidden_nd.new_empty(n_blocks, N * step, dtype=wide(hidden_nd.dtype))
    for first in range(0, V, step):
        block_vd = weight_vd[first:first + step]
        z_nv, *spare = (x[:N * len(block_vd)].view(N, len(block_vd)) for x in memory)  # the last one is narrower
        if z_nv.dtype == hidden_nd.dtype:
            torch.mm(hidden_nd, block_vd.t(), out=z_nv)
        else:  # half precision: the product arrives in memory of its own
            z_nv.copy_(logits_ref(hidden_nd, block_vd))
        yield first, z_nv.div_(temperature), *spare


def logits_ref(hidden_nd, weight_vd):
    """hidden weight^T, float32 or wider."""
    if hidden_nd.is_cuda and wide(hidden_nd.dtype) != hidden_nd.dtype:  # not rounded to bfloat16 on the way
        return torch.mm(hidden_nd, weight_vd.t(), out_dtype=torch.float32)
    return linear_ref(hidden_nd, weight_vd, None).to(wide(hidden_nd.dtype))


def linear_ref(x_nd, weight_vd, bias_v):
    """x weight^T + bias. Without gradient, in float32 on a CPU, large weights go to oneDNN, by an operation that PyTorch
    has for its compiler: F.linear takes MKL's product, which on an AMD processor needs two to four times as long for a
    decode step's few rows (Intel's were not measured). Small ones do not: oneDNN prepares a product of each new number
    of rows, which takes a millisecond."""
    if weight_vd.is_mkldnn or suits_onednn(weight_vd) and not torch.is_grad_enabled():
        return torch.ops.mkldnn._linear_pointwise(x_nd, weight_vd, bias_v, "none", [], "")
    return F.linear(x_nd, weight_vd, bias_v)


def pack_weight_ref(weight_vd):
    """The weight in oneDNN's own order, in which a step of 7 rows reads a head in half of the time; None where oneDNN
    does not multiply it."""
    return torch.ops.mkldnn._reorder_linear_weight(weight_vd.detach()) if suits_onednn(weight_vd) else None


def suits_onednn(weight_vd):
    return (weight_vd.dtype == torch.float32 and weight_vd.device.type == "cpu" and weight_vd.numel() > ONEDNN_ELEMENTS
            and torch.backends.mkldnn.is_available())


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
    """Program -> (row tile, column tile): GROUP row tiles walk together through all columns, so both stay in L2.

    3 row tiles and 2 column tiles at GROUP 2: (0, 0) (1, 0) (0, 1) (1, 1), then the row tile left over, (2, 0) (2, 1).
    """
    first = pid // (GROUP * n_col_tiles) * GROUP  # the group's first row tile
    n_rows = tl.minimum(n_row_tiles - first, GROUP)  # the last group may be smaller
    within = pid % (GROUP * n_col_tiles)
    return first + within % n_rows, within // n_rows


# N is another in every batch: Triton would compile the kernel anew for 1, for multiples of 16, and for the rest
@jit(do_not_specialize=["N"])
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
    # every tile sums z at the target's column, which one alone of a row's tiles has: that one writes
    logit_n = tl.sum(tl.where(col_v[None, :] == target_n[:, None], z_nv, 0.0), 1)
    tl.store(logit_ptr + row_n, logit_n, mask=(target_n >= col_tile * BLOCK_V) & (target_n < (col_tile + 1) * BLOCK_V))
    z_nv = tl.where((col_v < V)[None, :], z_nv, float("-inf"))  # the product repeats the last column there
    max_n = tl.max(z_nv, 1)
    below_nv = tl.maximum(z_nv - max_n[:, None], -1e4)  # exp of it is zero already, and zero times it is not NaN
    weight_nv = tl.exp(below_nv)
    part_n = col_tile.to(tl.int64) * N + row_n  # [tiles, N], so that the merge reads rows side by side
    tl.store(max_ptr + part_n, max_n, mask=row_n < N)
    tl.store(sum_ptr + part_n, tl.sum(weight_nv, 1), mask=row_n < N)
    tl.store(moment_ptr + part_n, tl.sum(weight_nv * below_nv, 1), mask=row_n < N)


@jit(do_not_specialize=["N"])
def _logp_merge_kernel(max_ptr, sum_ptr, moment_ptr, logit_ptr, logp_ptr, entropy_ptr, N, n_tiles,
                       BLOCK_N: tl.constexpr):
    """max, sum and moment of a row's tiles, first to last, under their common maximum; then as in LinearLogpChunked

    logp = (z[target] - max) - log sum,  entropy = log sum - moment / sum. max and log sum are left in the first tile's
    place, for the backward pass.
    """
    row_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    real_n = row_n < N
    max_n = tl.load(max_ptr + row_n, mask=real_n, other=0.0)
    sum_n = tl.load(sum_ptr + row_n, mask=real_n, other=1.0)
    moment_n = tl.load(moment_ptr + row_n, mask=real_n, other=0.0)
    for tile in range(1, n_tiles):  # as in LinearLogpChunked, but both sides may have to come down
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


@jit(do_not_specialize=["N"])
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
        blocks, options = product_tiling("linear_invariant" if invariant else "logp", hidden_nd)
        n_col_tiles = triton.cdiv(V, blocks["BLOCK_V"])
        # three tensors, not parts of one: where these begin would depend on N, and Triton compiles for that, too
        max_tn, sum_tn, moment_tn = (hidden_nd.new_empty(n_col_tiles, N, dtype=torch.float32) for _ in range(3))
        logit_n, logp_n, entropy_n = (torch.empty_like(max_tn[0]) for _ in range(3))
        if N:
            _logp_fwd_kernel[triton.cdiv(N, blocks["BLOCK_N"]) * n_col_tiles,](
                hidden_nd, weight_vd, target_n, max_tn, sum_tn, moment_tn, logit_n, N, V, D, hidden_nd.stride(0),
                weight_vd.stride(0), 1 / temperature, **blocks, **options)
            _logp_merge_kernel[triton.cdiv(N, 64),](max_tn, sum_tn, moment_tn, logit_n, logp_n, entropy_n, N,
                                                    n_col_tiles, 64, num_warps=2, **POINTWISE)
        # where the merge left the whole row's; copies, so that the other tiles' memory is freed
        max_n, log_sum_n = max_tn[0].clone(), sum_tn[0].clone()
        ctx.save_for_backward(hidden_nd, weight_vd, target_n, max_n, log_sum_n)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy_n)
        return logp_n, entropy_n

    @staticmethod
    def backward(ctx, grad_n, _grad_entropy_n):
        hidden_nd, weight_vd, target_n, max_n, log_sum_n = ctx.saved_tensors
        (N, D), V = hidden_nd.shape, len(weight_vd)
        grad_n = grad_n.contiguous()
        blocks, options = product_tiling("logp", hidden_nd)  # the faster one: gradients need not agree with a sampler
        BLOCK_N, BLOCK_V = blocks["BLOCK_N"], blocks["BLOCK_V"]
        step = GRADIENT_CHUNK // max(N, 1) // BLOCK_V * BLOCK_V  # whole tiles, and one at least
        step = max(BLOCK_V, min(V, step))
        chunk = hidden_nd.new_empty(N * step)
        grad_hidden_nd = torch.zeros_like(hidden_nd, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        new = torch.empty_like if N else torch.zeros_like  # without rows the loop writes nothing
        grad_weight_vd = new(weight_vd) if ctx.needs_input_grad[1] else None
        for first in range(0, V if N else 0, step):
            n_cols = min(step, V - first)
            dz_nv = chunk[:N * n_cols].view(N, n_cols)
            _logp_bwd_kernel[triton.cdiv(N, BLOCK_N) * triton.cdiv(n_cols, BLOCK_V),](
                hidden_nd, weight_vd, target_n, max_n, log_sum_n, grad_n, dz_nv, N, V, D, first, n_cols,
                hidden_nd.stride(0), weight_vd.stride(0), 1 / ctx.temperature, **blocks, **options)
            if grad_hidden_nd is not None:
                grad_hidden_nd += dz_nv @ weight_vd[first:first + n_cols]
            if grad_weight_vd is not None:
                torch.mm(dz_nv.t(), hidden_nd, out=grad_weight_vd[first:first + n_cols])
        grad_hidden_nd = grad_hidden_nd.to(hidden_nd.dtype) if grad_hidden_nd is not None else None
        return grad_hidden_nd, grad_weight_vd, None, None, None


@jit(do_not_specialize=["N"])
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
    """x weight^T + bias, D summed first to last, in dtype."""
    check_launch(x_nd, weight_vd, bias_v)
    (N, D), V = x_nd.shape, len(weight_vd)
    blocks, options = product_tiling("linear_invariant", x_nd)
    out_nv = x_nd.new_empty(N, V, dtype=dtype)
    if N:
        _linear_kernel[triton.cdiv(N, blocks["BLOCK_N"]) * triton.cdiv(V, blocks["BLOCK_V"]),](
            x_nd, weight_vd, bias_v, out_nv, N, V, D, x_nd.stride(0), weight_vd.stride(0), BIAS=bias_v is not None,
            **blocks, **options)
    return out_nv


class LinearInvariant(torch.autograd.Function):
    """Gradients are PyTorch's: only the forward pass must agree between sampler and trainer."""

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
