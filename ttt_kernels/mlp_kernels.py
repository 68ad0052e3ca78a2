# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
Triton kernels of TTT-MLP.

The inner model of D 128 (512 KB) does not fit into a multiprocessor, but a quarter of its hidden units does: the chain
of states is a launch per mini-batch, with a program for every row, head and D of the F = 4 D hidden units. What passes
between the units, a sum over them, passes from one launch to the next. The outputs are left to programs that run in
parallel over the mini-batches; the chain leaves them its model at each mini-batch, in the dtype of the tokens, in a
ring of S slots.

The backward pass saves nothing but the model at each group of G mini-batches, and walks through a group again to have
the model at each of them.
"""

import triton
import triton.language as tl

from .common import EPS, dot, layer_norm, load_rows, matrix, reach, row_means, span, store_rows


@triton.jit
def gelu(x):
    """gelu (tanh form) and its derivative."""
    t = 1.5957691216057308 * x * (1 + 0.044715 * x * x)
    dt = 1.5957691216057308 * (1 + 0.134145 * x * x)
    s = tl.sigmoid(t)
    return x * s, s + x * dt * s * (1 - s)


@triton.jit
def gelu_second_derivative(x):
    t = 1.5957691216057308 * x * (1 + 0.044715 * x * x)
    dt = 1.5957691216057308 * (1 + 0.134145 * x * x)
    s = tl.sigmoid(t)
    ds = dt * s * (1 - s)
    return 2 * ds + x * (1.5957691216057308 * 0.26829 * x * s * (1 - s) + dt * ds * (1 - 2 * s))


@triton.jit
def tile(rows, stride: tl.constexpr, first, columns: tl.constexpr):
    """Offsets of `columns` numbers from `first` in each of `rows`."""
    return rows[:, None] * stride + first + tl.arange(0, columns)[None, :]


@triton.jit
def hidden(k, W1, b1, pending_x2, slots, is_pending, f, M: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
           BLOCK: tl.constexpr):  # fmt: skip
    """Block f of a mini-batch's hidden units: z1, x2 = gelu(z1) or the pending row, gelu'(z1), and the block of W1."""
    W = tl.load(W1 + tile(tl.arange(0, D), F, f, BLOCK))
    b = tl.load(b1 + f + tl.arange(0, BLOCK))
    z1 = dot(k, W.to(k.dtype), tl.zeros([M, BLOCK], tl.float32)) + b[None, :]
    x2, derivative = gelu(z1)
    pending = tl.load(pending_x2 + tile(slots, F, f, BLOCK), mask=is_pending[:, None], other=0.0)
    return z1, tl.where(is_pending[:, None], pending, x2), derivative, W, b


@triton.jit
def output_grad(z2, target, w, bias, D: tl.constexpr):
    """LN(z2), 1 / its standard deviation, e = (LN(z2) w + bias - target) w and its means, and g2."""
    x, rstd = layer_norm(z2, D)
    e = (x * w + bias - target) * w
    mean_e, mean_ex = tl.sum(e, axis=1) / D, tl.sum(e * x, axis=1) / D
    return x, rstd, e, mean_e, mean_ex, rstd[:, None] * (e - mean_e[:, None] - mean_ex[:, None] * x)


@triton.jit(do_not_specialize=["n"])
def chain_step(
    n, k, v, lr, scale, ln_weight, ln_bias, pending_k, pending_u1, pending_x2, pending_u2, position, starts, ends,
    W1, b1, W2, b2, pending_k_out, pending_u1_out, pending_x2_out, pending_u2_out, position_out,
    W1_group, b1_group, W2_group, b2_group, z1, z2, u1, x2, u2, W1_slot, b1_slot, W2_slot, b2_slot,
    T, H, groups, stride_b, stride_h, stride_t, lr_stride_b, lr_stride_h, lr_stride_t,
    FIRST: tl.constexpr, PACKED: tl.constexpr, SAVE: tl.constexpr, M: tl.constexpr, G: tl.constexpr,
    S: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """
    For D of the F hidden units: end mini-batch n - 1 with an update of W1, b1, W2, b2 in place, and begin mini-batch n
    with these units' part of its z2, which the next launch adds up.
    """
    block, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first, taken, end, group = span(row, position, starts, ends, T, PACKED, M, G * M)
    count = tl.cdiv(end, M)
    if n > count:
        return
    token = row * (1 - PACKED) * stride_b + head * stride_h + (first - taken).to(tl.int64) * stride_t
    k += token
    state = row * H + head
    f = block * D
    d, m = tl.arange(0, D), tl.arange(0, M)
    rows_d, rows_f = matrix(M, D), tile(m, F, f, D)
    W1 += state * D * F + tile(d, F, f, D)
    b1 += state * F + f + d
    W2 += state * F * D + f * D + matrix(D, D)
    pending_k += state * M * D
    pending_x2 += state * M * F
    z1 += state * 2 * M * F + rows_f
    z2 += state * 8 * M * D + rows_d
    is_last = n == count
    slot = state * S + n % S
    saved = group + head.to(tl.int64) * groups + n // G
    saves = (n % G == 0) & (n < count)

    if FIRST:
        W_1, b_1, b_2 = tl.load(W1), tl.load(b1), tl.load(b2 + state * D + d)
        zeros = tl.zeros([M, D], tl.float32)
        if is_last:
            tl.store(pending_u1_out + state * M * F + rows_f, zeros)
            tl.store(pending_x2_out + state * M * F + rows_f, zeros)
            if block == 0:
                tl.store(pending_k_out + state * M * D + rows_d, zeros)
                tl.store(pending_u2_out + state * M * D + rows_d, zeros)
    else:
        before = state * S + (n - 1) % S
        slots = (n - 1) * M + m
        is_pending = (slots < taken)[:, None]
        valid = (slots >= taken) & (slots < end)
        kept = ((slots < end) & (n * M > end))[:, None]  # the last mini-batch, not complete
        learned = tl.where(n * M > end, 0.0, -tl.load(scale + M - 1))
        k_n = load_rows(k, stride_t, slots, valid, D)
        if n == 1:
            k_n += tl.load(pending_k + rows_d, mask=is_pending, other=0.0).to(k_n.dtype)
        target = load_rows(v + token, stride_t, slots, valid, D).to(tl.float32) - k_n.to(tl.float32)
        lr += row * (1 - PACKED) * lr_stride_b + head * lr_stride_h + (first - taken).to(tl.int64) * lr_stride_t
        lr_n = tl.load(lr + slots * lr_stride_t, mask=valid, other=0.0).to(tl.float32)
        w, bias = tl.load(ln_weight + head * D + d)[None, :], tl.load(ln_bias + head * D + d)[None, :]
        b_2 = tl.load(b2_slot + before * D + d)
        parts = z2 + (n - 1) % 2 * 4 * M * D
        z = tl.load(parts) + tl.load(parts + M * D) + tl.load(parts + 2 * M * D) + tl.load(parts + 3 * M * D)
        x, rstd, e, mean_e, mean_ex, g2 = output_grad(z + b_2[None, :], target, w, bias, D)
        W_2 = tl.load(W2_slot + before * F * D + f * D + matrix(D, D))
        h = dot(g2.to(k_n.dtype), tl.trans(W_2), tl.zeros([M, D], tl.float32))
        u_2 = lr_n[:, None] * g2
        if n == 1:
            u_2 += tl.load(pending_u2 + state * M * D + rows_d, mask=is_pending, other=0.0)
        if block == 0:
            tl.store(u2 + before * M * D + rows_d, u_2.to(u2.dtype.element_ty))
            if is_last:
                tl.store(pending_u2_out + state * M * D + rows_d, tl.where(kept, u_2, 0.0))
                tl.store(pending_k_out + state * M * D + rows_d, tl.where(kept, k_n.to(tl.float32), 0.0))
        u_2 *= learned
        b_2 += tl.sum(u_2, axis=0)
        u_2 = u_2.to(k_n.dtype)
        x_2, derivative = gelu(tl.load(z1 + (n - 1) % 2 * M * F))
        if n == 1:
            x_2 = tl.where(is_pending, tl.load(pending_x2 + rows_f, mask=is_pending, other=0.0), x_2)
        if is_last:
            tl.store(pending_x2_out + state * M * F + rows_f, tl.where(kept, x_2, 0.0))
        x_2 = x_2.to(k_n.dtype)
        tl.store(x2 + before * M * F + rows_f, x_2)
        u_1 = lr_n[:, None] * h * derivative
        if n == 1:
            u_1 += tl.load(pending_u1 + state * M * F + rows_f, mask=is_pending, other=0.0)
        if is_last:
            tl.store(pending_u1_out + state * M * F + rows_f, tl.where(kept, u_1, 0.0))
        tl.store(u1 + before * M * F + rows_f, u_1.to(u1.dtype.element_ty))
        u_1 *= learned
        b_1 = tl.load(b1) + tl.sum(u_1, axis=0)
        W_1 = dot(tl.trans(k_n), u_1.to(k_n.dtype), tl.load(W1))
        tl.debug_barrier()  # all have read what is now written
        tl.store(W1, W_1)
        tl.store(b1, b_1)
    if SAVE:
        if saves:
            tl.store(W1_group + saved * D * F + tile(d, F, f, D), W_1)
            tl.store(b1_group + saved * F + f + d, b_1)
    tl.store(W1_slot + slot * D * F + tile(d, F, f, D), W_1.to(W1_slot.dtype.element_ty))
    tl.store(b1_slot + slot * F + f + d, b_1)

    slots = n * M + m
    k_n = load_rows(k, stride_t, slots, (slots >= taken) & (slots < end), D)
    if FIRST:
        k_n += load_rows(pending_k, D, slots, slots < taken, D).to(k_n.dtype)
    z_1 = dot(k_n, W_1.to(k_n.dtype), tl.zeros([M, D], tl.float32)) + b_1[None, :]
    tl.store(z1 + n % 2 * M * F, z_1)
    x2_n, _ = gelu(z_1)
    if FIRST:
        is_pending = (slots < taken)[:, None]
        x2_n = tl.where(is_pending, tl.load(pending_x2 + rows_f, mask=is_pending, other=0.0), x2_n)
        W_2 = tl.load(W2)
    else:
        W_2 = dot(tl.trans(x_2), u_2, tl.load(W2))
        tl.debug_barrier()  # all have read what is now written
        tl.store(W2, W_2)
    if SAVE:
        if saves:
            tl.store(W2_group + saved * F * D + f * D + matrix(D, D), W_2)
    tl.store(W2_slot + slot * F * D + f * D + matrix(D, D), W_2.to(W2_slot.dtype.element_ty))
    z_2 = dot(x2_n.to(k_n.dtype), W_2.to(k_n.dtype), tl.zeros([M, D], tl.float32))
    tl.store(z2 + (n % 2 * 4 + block) * M * D, z_2)
    if block == 0:
        tl.store(b2_slot + slot * D + d, b_2)
        if SAVE:
            if saves:
                tl.store(b2_group + saved * D + d, b_2)
        if is_last:
            tl.store(b2 + state * D + d, b_2)
            if head == 0:
                tl.store(position_out + row, (end % M).to(tl.int64))


@triton.jit(do_not_specialize=["first_n"])
def outputs(
    first_n, q, k, scale, ln_weight, ln_bias, pending_k, position, starts, ends, o, u1, x2, u2,
    W1_slot, b1_slot, W2_slot, b2_slot, T, H, stride_b, stride_h, stride_t,
    PACKED: tl.constexpr, M: tl.constexpr, S: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the tokens of one mini-batch read, from the model before it and what the chain has left of it."""
    n, head, row = first_n + tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first, taken, end, _ = span(row, position, starts, ends, T, PACKED, M, M)
    if n * M >= end:
        return
    token = row * (1 - PACKED) * stride_b + head * stride_h + (first - taken).to(tl.int64) * stride_t
    state = row * H + head
    slot = state * S + n % S
    W1_slot += slot * D * F
    b1_slot += slot * F
    W2_slot += slot * F * D
    u1 += slot * M * F
    x2 += slot * M * F
    d, m = tl.arange(0, D), tl.arange(0, M)
    slots = n * M + m
    valid = (slots >= taken) & (slots < end)
    q_n = load_rows(q + token, stride_t, slots, valid, D)
    k_n = load_rows(k + token, stride_t, slots, valid, D)
    k_n += load_rows(pending_k + state * M * D, D, slots, slots < taken, D).to(k_n.dtype)

    reached = reach(scale, slots, slots, M)
    attention = dot(q_n, tl.trans(k_n), tl.zeros([M, M], tl.float32)) + 1
    attention = (-attention * reached).to(k_n.dtype)
    attention_2 = tl.zeros([M, M], tl.float32)
    y2 = tl.zeros([M, D], tl.float32) + tl.load(b2_slot + slot * D + d)[None, :]
    for f in range(0, F, BLOCK):
        units = tile(m, F, f, BLOCK)
        y1 = tl.zeros([M, BLOCK], tl.float32) + tl.load(b1_slot + f + tl.arange(0, BLOCK))[None, :]
        y1 = dot(q_n, tl.load(W1_slot + tile(d, F, f, BLOCK)), y1)
        x2_q, derivative = gelu(dot(attention, tl.load(u1 + units), y1))
        x2_q = x2_q.to(k_n.dtype)
        y2 = dot(x2_q, tl.load(W2_slot + f * D + matrix(BLOCK, D)), y2)
        attention_2 = dot(x2_q, tl.trans(tl.load(x2 + units)), attention_2)
    attention_2 = (-(attention_2 + 1) * reached).to(k_n.dtype)
    x, _ = layer_norm(dot(attention_2, tl.load(u2 + slot * M * D + matrix(M, D)), y2), D)
    x *= tl.load(ln_weight + head * D + d)[None, :]
    x += tl.load(ln_bias + head * D + d)[None, :]
    store_rows(o + token, stride_t, slots, valid, q_n.to(tl.float32) + x, D)


@triton.jit
def decode(
    q, k, v, lr, mask, scale, ln_weight, ln_bias, W1, b1, W2, b2, pending_k, pending_u1, pending_x2, pending_u2,
    position, o, position_out, y1, H, stride_b, stride_h, lr_stride_b, lr_stride_h,
    M: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token of one row and head; the state is updated in place, but for the position, which other heads read."""
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    state = row * H + head
    d, m, units = tl.arange(0, D), tl.arange(0, M), tl.arange(0, BLOCK)
    token = row * stride_b + head * stride_h + d
    taken = tl.load(position + row).to(tl.int32)
    if mask is not None:
        if tl.load(mask + row) == 0:
            tl.store(o + token, tl.zeros([D], o.dtype.element_ty))
            if head == 0:
                tl.store(position_out + row, taken.to(tl.int64))
            return
    W1 += state * D * F
    b1 += state * F
    W2 += state * F * D
    b2 += state * D + d
    pending_k += state * M * D
    pending_u1 += state * M * F
    pending_x2 += state * M * F
    pending_u2 += state * M * D
    y1 += state * 2 * F
    seen = (m < taken)[:, None]
    q_t = tl.load(q + token).to(tl.float32)
    k_t = tl.load(k + token).to(tl.float32)
    v_t = tl.load(v + token).to(tl.float32)
    lr_t = tl.load(lr + row * lr_stride_b + head * lr_stride_h).to(tl.float32)
    w, bias, b = tl.load(ln_weight + head * D + d), tl.load(ln_bias + head * D + d), tl.load(b2)
    scale_t = tl.load(scale + taken)
    keys = tl.load(pending_k + matrix(M, D), mask=seen, other=0.0)
    attention = -scale_t * (tl.sum(keys * q_t[None, :], axis=1) + 1)

    # What the hidden units are for the key, and for the query but for this token's own u1.
    z2 = tl.zeros([BLOCK, D], tl.float32)
    for f in tl.range(0, F, BLOCK, num_stages=3):
        W_1, b_1 = tl.load(W1 + tile(d, F, f, BLOCK)), tl.load(b1 + f + units)
        z1 = tl.sum(tl.reshape(k_t, [D, 1]) * W_1, axis=0) + b_1
        us = tl.load(pending_u1 + tile(m, F, f, BLOCK), mask=seen, other=0.0)
        z1_q = tl.sum(tl.reshape(q_t, [D, 1]) * W_1, axis=0) + b_1 + tl.sum(attention[:, None] * us, axis=0)
        tl.store(y1 + f + units, z1)
        tl.store(y1 + F + f + units, z1_q)
        x2, derivative = gelu(z1)
        z2 += tl.reshape(x2, [BLOCK, 1]) * tl.load(W2 + f * D + matrix(BLOCK, D))
    z = tl.sum(z2, axis=0) + b
    z -= tl.sum(z, axis=0) / D
    rstd = tl.rsqrt(tl.sum(z * z, axis=0) / D + EPS)
    x = z * rstd
    e = (w * x + bias - v_t + k_t) * w
    g2 = rstd * (e - tl.sum(e, axis=0) / D - x * (tl.sum(e * x, axis=0) / D))
    u2 = lr_t * g2
    own = -scale_t * (tl.sum(q_t * k_t, axis=0) + 1)
    tl.debug_barrier()  # y1 is written

    y2 = tl.zeros([BLOCK, D], tl.float32)
    attention_2, own_2 = tl.zeros([M], tl.float32), 0.0
    for f in tl.range(0, F, BLOCK, num_stages=3):
        W_2 = tl.load(W2 + f * D + matrix(BLOCK, D))
        x2, derivative = gelu(tl.load(y1 + f + units))
        u1 = lr_t * derivative * tl.sum(W_2 * g2[None, :], axis=1)
        x2_q, derivative_q = gelu(tl.load(y1 + F + f + units) + own * u1)
        y2 += tl.reshape(x2_q, [BLOCK, 1]) * W_2
        x2s = tl.load(pending_x2 + tile(m, F, f, BLOCK), mask=seen, other=0.0)
        attention_2 += tl.sum(x2s * x2_q[None, :], axis=1)
        own_2 += tl.sum(x2_q * x2, axis=0)
        tl.store(pending_u1 + taken * F + f + units, u1)
        tl.store(pending_x2 + taken * F + f + units, x2)
    u2s = tl.load(pending_u2 + matrix(M, D), mask=seen, other=0.0)
    read = tl.sum((attention_2 + 1)[:, None] * u2s, axis=0) + (own_2 + 1) * u2
    z = tl.sum(y2, axis=0) + b - scale_t * read
    z -= tl.sum(z, axis=0) / D
    x = z * tl.rsqrt(tl.sum(z * z, axis=0) / D + EPS)
    tl.store(o + token, (q_t + x * w + bias).to(o.dtype.element_ty))
    tl.store(pending_k + taken * D + d, k_t)
    tl.store(pending_u2 + taken * D + d, u2)
    if head == 0:
        tl.store(position_out + row, ((taken + 1) % M).to(tl.int64))

    if taken == M - 1:
        tl.debug_barrier()  # the pending rows are written
        last_scale = tl.load(scale + M - 1)
        keys_t = tl.trans(tl.load(pending_k + matrix(M, D)))
        for f in range(0, F, BLOCK):
            rows = tile(m, F, f, BLOCK)
            u1s = tl.load(pending_u1 + rows) * -last_scale
            b_1 = tl.load(b1 + f + units) + tl.sum(u1s, axis=0)
            W1_f = W1 + tile(d, F, f, BLOCK)
            W_1 = dot(keys_t, u1s, tl.load(W1_f))
            tl.debug_barrier()  # all have read what is now written
            tl.store(W1_f, W_1)
            tl.store(b1 + f + units, b_1)
            tl.store(pending_u1 + rows, tl.zeros([M, BLOCK], tl.float32))
        u2s = tl.load(pending_u2 + matrix(M, D)) * -last_scale
        tl.store(b2, b + tl.sum(u2s, axis=0))
        for f in range(0, F, BLOCK):
            rows = tile(m, F, f, BLOCK)
            W2_f = W2 + f * D + matrix(BLOCK, D)
            W_2 = dot(tl.trans(tl.load(pending_x2 + rows)), u2s, tl.load(W2_f))
            tl.debug_barrier()
            tl.store(W2_f, W_2)
            tl.store(pending_x2 + rows, tl.zeros([M, BLOCK], tl.float32))
        tl.store(pending_k + matrix(M, D), tl.zeros([M, D], tl.float32))
        tl.store(pending_u2 + matrix(M, D), tl.zeros([M, D], tl.float32))


@triton.jit
def backward(
    do, dpending_k_out, dpending_u1_out, dpending_x2_out, dpending_u2_out,
    q, k, v, lr, scale, ln_weight, ln_bias, pending_k, pending_u1, pending_x2, pending_u2, position, starts, ends,
    W1_group, b1_group, W2_group, b2_group, W1, b1, W2, b2, scratch,
    dq, dk, dv, dlr, dscale, dln, dW1, db1, dW2, db2, dpending_k, dpending_u1, dpending_x2, dpending_u2,
    T, H, groups, stride_b, stride_h, stride_t, lr_stride_b, lr_stride_h, lr_stride_t,
    PACKED: tl.constexpr, M: tl.constexpr, G: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """
    W1, b1, W2 and b2 hold the models of one group, one after each mini-batch. dW1, db1, dW2 and db2 hold the gradient
    of the last model, and at the end that of the first one. `scratch` keeps 4 matrices [M, F] between passes.
    """
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first, taken, end, group = span(row, position, starts, ends, T, PACKED, M, G * M)
    token = row * (1 - PACKED) * stride_b + head * stride_h + (first - taken).to(tl.int64) * stride_t
    lr_token = row * (1 - PACKED) * lr_stride_b + head * lr_stride_h + (first - taken).to(tl.int64) * lr_stride_t
    q += token
    k += token
    v += token
    do += token
    dq += token
    dk += token
    dv += token
    lr += lr_token
    dlr += lr_token
    state = row * H + head
    W1 += state * (G + 1) * D * F
    b1 += state * (G + 1) * F
    W2 += state * (G + 1) * D * F
    b2 += state * (G + 1) * D
    dW1 += state * D * F
    db1 += state * F
    dW2 += state * D * F
    db2 += state * D
    scratch += state * 4 * M * F
    pending_k += state * M * D
    pending_u1 += state * M * F
    pending_x2 += state * M * F
    pending_u2 += state * M * D
    dpending_k_out += state * M * D
    dpending_u1_out += state * M * F
    dpending_x2_out += state * M * F
    dpending_u2_out += state * M * D
    dpending_k += state * M * D
    dpending_u1 += state * M * F
    dpending_x2 += state * M * F
    dpending_u2 += state * M * D
    group += head.to(tl.int64) * groups
    d, m, units = tl.arange(0, D), tl.arange(0, M), tl.arange(0, BLOCK)
    w = tl.load(ln_weight + head * D + d)[None, :]
    bias = tl.load(ln_bias + head * D + d)[None, :]
    mean_w2 = tl.sum(w * w, axis=1) / D
    last_scale = tl.load(scale + M - 1)
    mini_batches = tl.cdiv(end, M)
    zeros_d, zeros_f = tl.zeros([M, D], tl.float32), tl.zeros([M, BLOCK], tl.float32)
    dscale_m, dlast_scale = tl.zeros([M], tl.float32), tl.zeros([M], tl.float32)
    dln_weight, dln_bias = tl.zeros([D], tl.float32), tl.zeros([D], tl.float32)

    for g in range(0, tl.cdiv(mini_batches, G)):
        first_n = (tl.cdiv(mini_batches, G) - 1 - g) * G
        last_n = tl.minimum(first_n + G, mini_batches) - 1
        saved = group + first_n // G
        for f in range(0, F, BLOCK):
            W1_tile, W2_tile = tile(d, F, f, BLOCK), (f + units)[:, None] * D + d[None, :]
            tl.store(W1 + W1_tile, tl.load(W1_group + saved * D * F + W1_tile))
            tl.store(W2 + W2_tile, tl.load(W2_group + saved * D * F + W2_tile))
            tl.store(b1 + f + units, tl.load(b1_group + saved * F + f + units))
        tl.store(b2 + d, tl.load(b2_group + saved * D + d))
        tl.debug_barrier()

        for n in range(first_n, last_n):  # the models of the group, again
            i = n - first_n
            slots = n * M + m
            is_pending = slots < taken
            valid = (slots >= taken) & (slots < end)
            k_n = load_rows(k, stride_t, slots, valid, D)
            k_n += load_rows(pending_k, D, slots, is_pending, D).to(k_n.dtype)
            target = load_rows(v, stride_t, slots, valid, D).to(tl.float32) - k_n.to(tl.float32)
            lr_n = tl.load(lr + slots * lr_stride_t, mask=valid, other=0.0).to(tl.float32)
            b = tl.load(b2 + i * D + d)
            z2 = zeros_d + b[None, :]
            for f in range(0, F, BLOCK):
                z1, x2, derivative, W_1, b1_f = hidden(
                    k_n, W1 + i * D * F, b1 + i * F, pending_x2, slots, is_pending, f, M, D, F, BLOCK
                )
                W_2 = tl.load(W2 + i * D * F + (f + units)[:, None] * D + d[None, :])
                z2 = dot(x2.to(k_n.dtype), W_2.to(k_n.dtype), z2)
            x, rstd, e, mean_e, mean_ex, g2 = output_grad(z2, target, w, bias, D)
            u2 = lr_n[:, None] * g2 + load_rows(pending_u2, D, slots, is_pending, D)
            for f in range(0, F, BLOCK):
                z1, x2, derivative, W_1, b1_f = hidden(
                    k_n, W1 + i * D * F, b1 + i * F, pending_x2, slots, is_pending, f, M, D, F, BLOCK
                )
                W2_tile = (f + units)[:, None] * D + d[None, :]
                W_2 = tl.load(W2 + i * D * F + W2_tile)
                h = dot(g2.to(k_n.dtype), tl.trans(W_2.to(k_n.dtype)), zeros_f)
                u1 = lr_n[:, None] * h * derivative
                u1 += tl.load(pending_u1 + tile(slots, F, f, BLOCK), mask=is_pending[:, None], other=0.0)
                u1 *= -last_scale
                W_1 = dot(tl.trans(k_n), u1.to(k_n.dtype), W_1)
                tl.store(W1 + (i + 1) * D * F + tile(d, F, f, BLOCK), W_1)
                tl.store(b1 + (i + 1) * F + f + units, b1_f + tl.sum(u1, axis=0))
                W_2 = dot(tl.trans(x2.to(k_n.dtype)), (u2 * -last_scale).to(k_n.dtype), W_2)
                tl.store(W2 + (i + 1) * D * F + W2_tile, W_2)
            tl.store(b2 + (i + 1) * D + d, b - last_scale * tl.sum(u2, axis=0))
            tl.debug_barrier()

        for j in range(0, last_n - first_n + 1):
            n = last_n - j
            i = n - first_n
            W1_n, b1_n, W2_n = W1 + i * D * F, b1 + i * F, W2 + i * D * F
            slots = n * M + m
            is_pending = slots < taken
            exists = slots < end
            valid = (slots >= taken) & exists
            kept = exists & (slots >= end // M * M)  # pending at the end
            complete = (n * M + M <= end).to(tl.float32)
            k_n = load_rows(k, stride_t, slots, valid, D)
            k_n += load_rows(pending_k, D, slots, is_pending, D).to(k_n.dtype)
            q_n = load_rows(q, stride_t, slots, valid, D)
            target = load_rows(v, stride_t, slots, valid, D).to(tl.float32) - k_n.to(tl.float32)
            lr_n = tl.load(lr + slots * lr_stride_t, mask=valid, other=0.0).to(tl.float32)
            b = tl.load(b2 + i * D + d)

            # The forward pass.
            z2 = zeros_d + b[None, :]
            for f in range(0, F, BLOCK):
                z1, x2, derivative, W_1, b1_f = hidden(
                    k_n, W1_n, b1_n, pending_x2, slots, is_pending, f, M, D, F, BLOCK
                )
                W_2 = tl.load(W2_n + (f + units)[:, None] * D + d[None, :])
                z2 = dot(x2.to(k_n.dtype), W_2.to(k_n.dtype), z2)
            x, rstd, e, mean_e, mean_ex, g2 = output_grad(z2, target, w, bias, D)
            u2 = lr_n[:, None] * g2 + load_rows(pending_u2, D, slots, is_pending, D)
            g2_k, u2_k = g2.to(k_n.dtype), u2.to(k_n.dtype)
            reached = reach(scale, slots, slots, M)
            causal = tl.where(m[None, :] <= m[:, None], 1.0, 0.0)
            attention = (dot(q_n, tl.trans(k_n), tl.zeros([M, M], tl.float32)) + 1) * causal
            attention_s = (-attention * tl.load(scale + m)[:, None]).to(k_n.dtype)
            attention_2 = tl.zeros([M, M], tl.float32)
            y2 = zeros_d + b[None, :]
            for f in range(0, F, BLOCK):
                z1, x2, derivative, W_1, b1_f = hidden(
                    k_n, W1_n, b1_n, pending_x2, slots, is_pending, f, M, D, F, BLOCK
                )
                W_2 = tl.load(W2_n + (f + units)[:, None] * D + d[None, :]).to(k_n.dtype)
                u1 = lr_n[:, None] * dot(g2_k, tl.trans(W_2), zeros_f) * derivative
                u1 += tl.load(pending_u1 + tile(slots, F, f, BLOCK), mask=is_pending[:, None], other=0.0)
                y1 = dot(q_n, W_1.to(k_n.dtype), zeros_f) + b1_f[None, :]
                x2_q, _ = gelu(dot(attention_s, u1.to(k_n.dtype), y1))
                y2 = dot(x2_q.to(k_n.dtype), W_2, y2)
                attention_2 = dot(x2_q.to(k_n.dtype), tl.trans(x2.to(k_n.dtype)), attention_2)
            attention_2 = (attention_2 + 1) * causal
            attention_2s = (-attention_2 * tl.load(scale + m)[:, None]).to(k_n.dtype)
            x_q, rstd_q = layer_norm(dot(attention_2s, u2_k, y2), D)

            # Gradients of the read of W2, down to the hidden units.
            do_n = load_rows(do, stride_t, slots, valid, D).to(tl.float32)
            dln_weight += tl.sum(do_n * x_q, axis=0)
            dln_bias += tl.sum(do_n, axis=0)
            dy2 = do_n * w
            dy2 -= (tl.sum(dy2, axis=1) / D)[:, None] + x_q * (tl.sum(dy2 * x_q, axis=1) / D)[:, None]
            dy2 = (dy2 * rstd_q[:, None]).to(k_n.dtype)
            du2 = dot(tl.trans(attention_2s), dy2, load_rows(dpending_u2_out, D, m, kept, D))
            dattention_2 = dot(dy2, tl.trans(u2_k), tl.zeros([M, M], tl.float32))
            dscale_m -= tl.sum(dattention_2 * attention_2, axis=1)
            dattention_2 = (-dattention_2 * reached).to(k_n.dtype)
            dattention = tl.zeros([M, M], tl.float32)
            taught = zeros_d + tl.load(db2 + d)[None, :]  # x2 dW2 + db2
            dg2, dq_n, dk_n = zeros_d, do_n, load_rows(dpending_k_out, D, m, kept, D)
            dlr_n = tl.zeros([M], tl.float32)
            for f in range(0, F, BLOCK):
                z1, x2, derivative, W_1, b1_f = hidden(
                    k_n, W1_n, b1_n, pending_x2, slots, is_pending, f, M, D, F, BLOCK
                )
                W1_tile, W2_tile, rows = (
                    tile(d, F, f, BLOCK),
                    (f + units)[:, None] * D + d[None, :],
                    tile(m, F, f, BLOCK),
                )
                W_1, W_2 = W_1.to(k_n.dtype), tl.load(W2_n + W2_tile).to(k_n.dtype)
                dW_1, dW_2 = tl.load(dW1 + W1_tile).to(k_n.dtype), tl.load(dW2 + W2_tile).to(k_n.dtype)
                h = dot(g2_k, tl.trans(W_2), zeros_f)
                u1 = lr_n[:, None] * h * derivative
                u1 += tl.load(pending_u1 + tile(slots, F, f, BLOCK), mask=is_pending[:, None], other=0.0)
                y1 = dot(q_n, W_1, zeros_f) + b1_f[None, :]
                x2_q, derivative_q = gelu(dot(attention_s, u1.to(k_n.dtype), y1))
                dx2_q = dot(dattention_2, x2.to(k_n.dtype), dot(dy2, tl.trans(W_2), zeros_f))
                dy1 = (dx2_q * derivative_q).to(k_n.dtype)
                dq_n = dot(dy1, tl.trans(W_1), dq_n)
                dattention = dot(dy1, tl.trans(u1.to(k_n.dtype)), dattention)
                taught = dot(x2.to(k_n.dtype), dW_2, taught)
                taught_1 = dot(k_n, dW_1, zeros_f) + tl.load(db1 + f + units)[None, :]
                dlast_scale -= tl.sum(u1 * taught_1, axis=1) * complete
                du1 = dot(tl.trans(attention_s), dy1, -last_scale * complete * taught_1)
                du1 += tl.load(dpending_u1_out + rows, mask=kept[:, None], other=0.0)
                tl.store(dpending_u1 + rows, du1, mask=is_pending[:, None])
                dlr_n += tl.sum(du1 * h * derivative, axis=1)
                dg1 = lr_n[:, None] * du1
                dh = dg1 * derivative
                dg2 = dot(dh.to(k_n.dtype), W_2, dg2)
                dx2 = dot(tl.trans(dattention_2), x2_q.to(k_n.dtype), zeros_f)
                dx2 -= last_scale * complete * dot(u2_k, tl.trans(dW_2), zeros_f)
                dx2 += tl.load(dpending_x2_out + rows, mask=kept[:, None], other=0.0)
                tl.store(scratch + rows, dy1.to(tl.float32))
                tl.store(scratch + M * F + rows, dh)
                tl.store(scratch + 2 * M * F + rows, dx2)
                tl.store(scratch + 3 * M * F + rows, dg1 * h * gelu_second_derivative(z1))
                dk_n = dot((-last_scale * complete * u1).to(k_n.dtype), tl.trans(dW_1), dk_n)
            dscale_m -= tl.sum(dattention * attention, axis=1)
            dattention = (-dattention * reached).to(k_n.dtype)
            dq_n = dot(dattention, k_n, dq_n)
            dk_n = dot(tl.trans(dattention), q_n, dk_n)
            store_rows(dq, stride_t, slots, valid, dq_n, D)

            # Through the inner gradient at the output.
            dlast_scale -= tl.sum(u2 * taught, axis=1) * complete
            du2 -= last_scale * complete * taught
            store_rows(dpending_u2, D, slots, is_pending, du2, D)
            dlr_n += tl.sum(du2 * g2, axis=1)
            tl.store(dlr + slots * lr_stride_t, dlr_n.to(dlr.dtype.element_ty), mask=valid)
            dg2 += lr_n[:, None] * du2
            mean, mean_x, mean_g, mean_w, mean_wx = row_means(dg2, dg2 * x, dg2 * e, w * w * dg2, w * w * dg2 * x, D)
            mean_w2x, mean_w2xx = tl.sum(w * w * x, axis=1) / D, tl.sum(w * w * x * x, axis=1) / D
            mean_g -= mean_e * mean + mean_ex * mean_x
            mean_w -= mean_w2 * mean + mean_w2x * mean_x
            mean_wx -= mean_w2x * mean + mean_w2xx * mean_x
            de = dg2 - mean[:, None] - mean_x[:, None] * x
            dz2 = w * w * de - mean_ex[:, None] * dg2 - mean_x[:, None] * e
            dz2 -= (mean_w - mean_ex * mean - mean_e * mean_x)[:, None]
            dz2 -= (mean_wx - 2 * mean_ex * mean_x + mean_g)[:, None] * x
            dz2 *= (rstd * rstd)[:, None]
            de *= rstd[:, None]
            dln_weight += tl.sum(de * (2 * w * x + bias - target), axis=0)
            de *= w
            dln_bias += tl.sum(de, axis=0)
            store_rows(dv, stride_t, slots, valid, -de, D)
            dk_n += de
            tl.store(db2 + d, tl.load(db2 + d) + tl.sum(dz2 + dy2.to(tl.float32), axis=0))
            dz2 = dz2.to(k_n.dtype)
            tl.debug_barrier()

            # Through the hidden units, and to the model before this mini-batch.
            for f in range(0, F, BLOCK):
                z1, x2, derivative, W_1, b1_f = hidden(
                    k_n, W1_n, b1_n, pending_x2, slots, is_pending, f, M, D, F, BLOCK
                )
                W1_tile, W2_tile, rows = (
                    tile(d, F, f, BLOCK),
                    (f + units)[:, None] * D + d[None, :],
                    tile(m, F, f, BLOCK),
                )
                W_2 = tl.load(W2_n + W2_tile).to(k_n.dtype)
                u1 = lr_n[:, None] * dot(g2_k, tl.trans(W_2), zeros_f) * derivative
                u1 += tl.load(pending_u1 + tile(slots, F, f, BLOCK), mask=is_pending[:, None], other=0.0)
                y1 = dot(q_n, W_1.to(k_n.dtype), zeros_f) + b1_f[None, :]
                x2_q, _ = gelu(dot(attention_s, u1.to(k_n.dtype), y1))
                dy1 = tl.load(scratch + rows).to(k_n.dtype)
                dh = tl.load(scratch + M * F + rows).to(k_n.dtype)
                dx2 = dot(dz2, tl.trans(W_2), tl.load(scratch + 2 * M * F + rows))
                tl.store(dpending_x2 + rows, dx2, mask=is_pending[:, None])
                dz1 = tl.load(scratch + 3 * M * F + rows) + dx2 * derivative
                dz1 = tl.where(valid[:, None], dz1, 0.0).to(k_n.dtype)
                dk_n = dot(dz1, tl.trans(W_1.to(k_n.dtype)), dk_n)
                dW_1 = dot(tl.trans(k_n), dz1, tl.load(dW1 + W1_tile))
                dW_1 = dot(tl.trans(q_n), dy1, dW_1)
                dW_2 = dot(tl.trans(x2.to(k_n.dtype)), dz2, tl.load(dW2 + W2_tile))
                dW_2 = dot(tl.trans(dh), g2_k, dW_2)
                dW_2 = dot(tl.trans(x2_q.to(k_n.dtype)), dy2, dW_2)
                db = tl.load(db1 + f + units) + tl.sum(dz1.to(tl.float32) + dy1.to(tl.float32), axis=0)
                tl.debug_barrier()  # all have read what is now written
                tl.store(dW1 + W1_tile, dW_1)
                tl.store(dW2 + W2_tile, dW_2)
                tl.store(db1 + f + units, db)
            store_rows(dk, stride_t, slots, valid, dk_n, D)
            store_rows(dpending_k, D, slots, is_pending, dk_n, D)
            tl.debug_barrier()

    tl.store(dscale + state * M + m, dscale_m + tl.where(m == M - 1, tl.sum(dlast_scale, axis=0), 0.0))
    tl.store(dln + state * 2 * D + d, dln_weight)
    tl.store(dln + state * 2 * D + D + d, dln_bias)
