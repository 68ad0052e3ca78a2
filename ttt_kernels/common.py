# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""What the kernels of TTT-Linear and TTT-MLP share: where a row's tokens are, products, LayerNorm."""

import triton
import triton.language as tl


EPS = tl.constexpr(1e-6)  # of the inner LayerNorm, as in ttt-lm-pytorch
INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b, acc):
    """acc + a @ b, with float32 operands in 3 tf32 products, which keeps float32's precision."""
    if INTERPRET:  # its product takes bfloat16 for integers
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc, input_precision="tf32x3")


@triton.jit
def span(row, position, starts, ends, T, PACKED: tl.constexpr, M: tl.constexpr, C: tl.constexpr):
    """
    Of one row of the state: its first token, the slots of the first mini-batch taken before it, the slot after its
    last token, and the first of its groups (C slots each), which leaves room for all groups of the rows before.
    """
    taken = tl.load(position + row).to(tl.int32)
    first = 0
    end = taken + T
    if starts is not None:
        first = tl.load(starts + row).to(tl.int32)
        end = taken + tl.load(ends + row).to(tl.int32) - first
    bound = row * T
    if PACKED:
        bound = first
    return first, taken, end, (bound + row * (M - 1)) // C + row


@triton.jit
def slot_0(row, head, first, taken, stride_b, stride_h, stride_t, PACKED: tl.constexpr):
    """Offset of the first slot of a row and head, which is `taken` slots before its first token."""
    return row * (1 - PACKED) * stride_b + head.to(tl.int64) * stride_h + (first - taken).to(tl.int64) * stride_t


@triton.jit
def row_of_group(group, starts, T, R, PACKED: tl.constexpr, M: tl.constexpr, C: tl.constexpr, R_BLOCK: tl.constexpr):
    """The row that a group belongs to: the inverse of `span`."""
    rows = tl.arange(0, R_BLOCK)
    bound = rows * T
    if PACKED:
        bound = tl.load(starts + rows, mask=rows < R, other=0).to(tl.int32)
    first_group = (bound + rows * (M - 1)) // C + rows
    return tl.sum(((first_group <= group) & (rows < R)).to(tl.int32), axis=0) - 1


@triton.jit
def load_rows(x, stride, rows, valid, D: tl.constexpr):
    """The rows of D numbers at `rows`, 0 where not `valid`."""
    pointers = x + rows[:, None].to(tl.int64) * stride + tl.arange(0, D)[None, :]
    return tl.load(pointers, mask=valid[:, None], other=0.0)


@triton.jit
def load_keys(k, stride, pending_k, slots, taken, end, D: tl.constexpr):
    """The keys at `slots`: pending ones before slot `taken`, those of tokens from there to `end`, 0 behind."""
    keys = load_rows(k, stride, slots, (slots >= taken) & (slots < end), D)
    return keys + load_rows(pending_k, D, slots, slots < taken, D).to(keys.dtype)


@triton.jit
def store_rows(x, stride, rows, valid, value, D: tl.constexpr):
    """Store `value` as the rows of D numbers at `rows` where `valid`."""
    pointers = x + rows[:, None].to(tl.int64) * stride + tl.arange(0, D)[None, :]
    tl.store(pointers, value.to(x.dtype.element_ty), mask=valid[:, None])


@triton.jit
def matrix(rows: tl.constexpr, columns: tl.constexpr):
    """Offsets of a contiguous matrix."""
    return tl.arange(0, rows)[:, None] * columns + tl.arange(0, columns)[None, :]


@triton.jit
def reach(scale, slots_i, slots_j, M: tl.constexpr):
    """How far u_j has moved the model that token i meets: s_i in its mini-batch, s_{m-1} from an earlier one, or 0."""
    same = slots_i[:, None] // M == slots_j[None, :] // M
    s = tl.where(same, tl.load(scale + slots_i % M)[:, None], tl.load(scale + M - 1))
    return tl.where(slots_j[None, :] <= slots_i[:, None], s, 0.0)


@triton.jit
def earlier(slots_i, slots_j, M: tl.constexpr):
    """Whether j is in an earlier mini-batch than i."""
    return slots_j[None, :] // M < slots_i[:, None] // M


@triton.jit
def add_5(a, b, c, d, e, f, g, h, i, j):
    return a + f, b + g, c + h, d + i, e + j


@triton.jit
def row_means(a, b, c, d, e, D: tl.constexpr):
    """Means over the rows of five matrices, with one exchange between the warps of a row instead of five."""
    if INTERPRET:  # slow there
        a, b, c, d, e = tl.sum(a, 1), tl.sum(b, 1), tl.sum(c, 1), tl.sum(d, 1), tl.sum(e, 1)
    else:
        a, b, c, d, e = tl.reduce((a, b, c, d, e), 1, add_5)
    return a / D, b / D, c / D, d / D, e / D


@triton.jit
def inner_grad(z, c, w, lr, D: tl.constexpr):
    """
    lr * d/dz 1/2 || LN(z) - target ||^2 for z of mean 0, with c = (bias - target) * w.

    With e = (LN(z) w + bias - target) w, all sums over a row are taken at once, so that a step of the chain waits for
    one reduction only.
    """
    wwz = w * w * z
    var, mean_wwz, mean_wwzz, mean_c, mean_cz = row_means(z * z, wwz, wwz * z, c, c * z, D)
    rstd = tl.rsqrt(var + EPS)
    mean_e = rstd * mean_wwz + mean_c
    mean_ex = rstd * (rstd * mean_wwzz + mean_cz)
    scale = lr * rstd
    return (scale * rstd)[:, None] * (wwz - mean_ex[:, None] * z) + scale[:, None] * (c - mean_e[:, None])


@triton.jit
def layer_norm(z, D: tl.constexpr):
    """LN(z) without weight and bias, and 1 / its standard deviation."""
    z -= (tl.sum(z, axis=1) / D)[:, None]
    rstd = tl.rsqrt(tl.sum(z * z, axis=1) / D + EPS)
    return z * rstd[:, None], rstd
