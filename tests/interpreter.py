"""Triton's interpreter with bfloat16 and products as a GPU computes them, so that the tests need none.

The interpreter keeps bfloat16 as its bits, in uint16. As shipped (3.9) it multiplies these patterns as integers in
tl.dot and in arithmetic, and casts float32 to bfloat16 by cutting the lower bits off, where a GPU rounds to the
nearest, ties to even. Loads, stores, masks, tl.where and reshapes only move bits, and are right. Inside `mended()` this
process's interpreter widens such operands to float32, exactly, and rounds what is bfloat16 again; and the launchers of
kernels/, which refuse bfloat16 in the interpreter as it is shipped, let it pass. Sums and maxima of bfloat16 blocks
(tl.sum, tl.max) are not mended: no kernel here reduces anything but float32.

And tl.dot is numpy's matmul as shipped, whose library adds up a row in an order that may depend on the row's place in
the tile: so it does on processors without AVX-512 (OPENBLAS_CORETYPE=Haswell), and no kernel is batch-invariant there.
Inside `mended()` every element is summed first to last, as a tensor core has one order for all.
"""

import contextlib

import numpy as np
import pytest
import torch

import kernels

try:
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
except ImportError:  # no Triton for this platform: nothing to mend
    InterpreterBuilder = None


def widened(bits):
    """The float32 numbers whose upper 16 bits these are: every bfloat16 is one."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(x):
    """The bits of the nearest bfloat16. Half a unit of the last place is added, less one bit if that place is even, and
    the lower half cut off; the carry takes the largest numbers to infinity. NaN, which the carry could make infinite,
    stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    nearest = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), (bits >> 16) | 0x40, nearest).astype(np.uint16)


def is_bfloat16(handle):
    return handle.dtype.scalar == tl.bfloat16


def in_float32(handle):
    return TensorHandle(widened(handle.data), tl.float32) if is_bfloat16(handle) else handle


def in_bfloat16(handle):
    return TensorHandle(rounded(handle.data), tl.bfloat16)


def mended_methods():
    """name -> method of InterpreterBuilder."""
    shipped_cast = InterpreterBuilder.cast_impl
    shipped_binary, shipped_unary = InterpreterBuilder.binary_op, InterpreterBuilder.unary_op

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar == dst_type.scalar:
            return shipped_cast(self, src, dst_type)
        if dst_type.scalar == tl.bfloat16:
            return in_bfloat16(shipped_cast(self, src, tl.float32))
        return shipped_cast(self, in_float32(src), dst_type)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        """a b + d: the products in memory as [d, m, n], so that sum(0) adds whole tiles, one after the other."""
        a_dmn, b_dmn = in_float32(a).data.T[:, :, None], in_float32(b).data[:, None, :]
        product_dmn = np.multiply(a_dmn, b_dmn, dtype=d.data.dtype, order="C")
        return TensorHandle(product_dmn.sum(0) + d.data, d.dtype.scalar)

    def binary_op(self, lhs, rhs, op):
        if not is_bfloat16(lhs):
            return shipped_binary(self, lhs, rhs, op)
        out = shipped_binary(self, in_float32(lhs), in_float32(rhs), op)
        return in_bfloat16(out) if out.data.dtype == np.float32 else out  # a comparison's are bools

    def unary_op(self, arg, op):
        if not is_bfloat16(arg):
            return shipped_unary(self, arg, op)
        return in_bfloat16(shipped_unary(self, in_float32(arg), op))

    def get_bf16(self, value):
        """A constant beside a bfloat16; Triton before 3.9 asks for it, and its interpreter has none."""
        return in_bfloat16(TensorHandle(np.array([value], np.float32), tl.float32))

    return {"cast_impl": cast_impl, "create_dot": create_dot, "binary_op": binary_op, "unary_op": unary_op,
            "get_bf16": get_bf16}


@contextlib.contextmanager
def mended():
    """Inside, kernels run in bfloat16 too."""
    as_shipped = kernels.tiles.runs_triton

    def runs_triton(device, dtype):
        return as_shipped(device, torch.float16 if dtype == torch.bfloat16 else dtype)

    with pytest.MonkeyPatch.context() as patch:
        if InterpreterBuilder is not None:
            for name, method in mended_methods().items():
                patch.setattr(InterpreterBuilder, name, method, raising=False)
            patch.setattr(kernels.tiles, "runs_triton", runs_triton)
        yield
