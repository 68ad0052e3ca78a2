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

from .common import EPS, dot, layer_norm, load_keys, load_rows, matrix, reach, row_means, slot_0, span, store_rows


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
def sum_parts(parts, stride: tl.constexpr, count: tl.constexpr):
    """The sum of what `count` programs have left, `stride` numbers apart."""
    total = tl.load(parts)
    for i in tl.static_range(1, count):
        total += tl.load(parts + i * stride)
    return total


@triton.jit
def output_grad(z2, target, w, bias, D: tl.constexpr):
    """LN(z2), 1 / its standard deviation, e = (LN(z2) w + bias - target) w and its means, and g2."""
    x, rstd = layer_norm(z2, D)
    e = (x * w + bias - target) * w
    mean_e, mean_ex = tl.sum(e, axis=1) / D, tl.sum(e * x, axis=1) / D
    return x, rstd, e, mean_e, mean_ex, rstd[:, None] * (e - mean_e[:, None] - mean_ex[:, None] * x)


@triton.jit(do_not_specialize=["n", "T", "groups", "S"])
def chain_step(
    n, k, v, lr, scale, ln_weight, ln_bias, pending_k, pending_u1, pending_x2, pending_u2, position, starts, ends,
    W1, b1, W2, b2, pending_k_out, pending_u1_out, pending_x2_out, pending_u2_out, position_out,
    W1_group, b1_group, W2_group, b2_group, z2_parts, z1, u1, x2, u2, W1_slot, b1_slot, W2_slot, b2_slot, h, z2,
    T, H, S, groups, stride_b, stride_h, stride_t, lr_stride_b, lr_stride_h, lr_stride_t,
    FIRST: tl.constexpr, PACKED: tl.constexpr, SAVE: tl.constexpr, M: tl.constexpr, G: tl.constexpr,
    D: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """
    For D of the F hidden units: end mini-batch n - 1 with an update of W1, b1, W2, b2 in place, and begin mini-batch n
    with these units' part of its z2, which the next launch adds up. `h` and `z2` are for the backward pass.
    """
    BLOCKS: tl.constexpr = F // D
    block, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first, taken, end, group = span(row, position, starts, ends, T, PACKED, M, G * M)
    count = tl.cdiv(end, M)
    if n > count:
        return
    token = slot_0(row, head, first, taken, stride_b, stride_h, stride_t, PACKED)
    k += token
    state = row * H + head
    f = block * D
    d, m = tl.arange(0, D), tl.arange(0, M)
    rows_d, rows_f = matrix(M, D), tile(m, F, f, D)
    W1_tile, W2_tile = tile(d, F, f, D), f * D + matrix(D, D)
    W1 += state * D * F + W1_tile
    b1 += state * F + f + d
    W2 += state * F * D + W2_tile
    pending_k += state * M * D
    pending_x2 += state * M * F
    z2_parts += state * 2 * BLOCKS * M * D + rows_d
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
        kept = ((slots < end) & (slots >= end // M * M))[:, None]  # the last mini-batch, not complete
        complete = n * M <= end  # else this is the last launch for the row, and no model is stored
        last_scale = tl.load(scale + M - 1)
        k_n = load_rows(k, stride_t, slots, valid, D)
        if n == 1:
            k_n += tl.load(pending_k + rows_d, mask=is_pending, other=0.0).to(k_n.dtype)
        target = load_rows(v + token, stride_t, slots, valid, D).to(tl.float32) - k_n.to(tl.float32)
        lr += slot_0(row, head, first, taken, lr_stride_b, lr_stride_h, lr_stride_t, PACKED)
        lr_n = tl.load(lr + slots * lr_stride_t, mask=valid, other=0.0).to(tl.float32)
        w, bias = tl.load(ln_weight + head * D + d)[None, :], tl.load(ln_bias + head * D + d)[None, :]
        b_2 = tl.load(b2_slot + before * D + d)
        z = sum_parts(z2_parts + (n - 1) % 2 * BLOCKS * M * D, M * D, BLOCKS) + b_2[None, :]
        if z2 is not None:
            if block == 0:
                tl.store(z2 + before * M * D + rows_d, z)
        x, rstd, e, mean_e, mean_ex, g2 = output_grad(z, target, w, bias, D)
        W_2 = tl.load(W2_slot + before * F * D + W2_tile)
        h_n = dot(g2.to(k_n.dtype), tl.trans(W_2), tl.zeros([M, D], tl.float32))
        if h is not None:
            tl.store(h + before * M * F + rows_f, h_n)
        u_2 = lr_n[:, None] * g2
        if n == 1:
            u_2 += tl.load(pending_u2 + state * M * D + rows_d, mask=is_pending, other=0.0)
        if block == 0:
            tl.store(u2 + before * M * D + rows_d, u_2.to(u2.dtype.element_ty))
            if is_last:
                tl.store(pending_u2_out + state * M * D + rows_d, tl.where(kept, u_2, 0.0))
                tl.store(pending_k_out + state * M * D + rows_d, tl.where(kept, k_n.to(tl.float32), 0.0))
        u_2 *= -last_scale
        b_2 += tl.where(complete, tl.sum(u_2, axis=0), 0.0)
        u_2 = u_2.to(k_n.dtype)
        x_2, derivative = gelu(tl.load(z1 + before * M * F + rows_f))
        if n == 1:
            x_2 = tl.where(is_pending, tl.load(pending_x2 + rows_f, mask=is_pending, other=0.0), x_2)
        if is_last:
            tl.store(pending_x2_out + state * M * F + rows_f, tl.where(kept, x_2, 0.0))
        x_2 = x_2.to(k_n.dtype)
        tl.store(x2 + before * M * F + rows_f, x_2)
        u_1 = lr_n[:, None] * h_n * derivative
        if n == 1:
            u_1 += tl.load(pending_u1 + state * M * F + rows_f, mask=is_pending, other=0.0)
        if is_last:
            tl.store(pending_u1_out + state * M * F + rows_f, tl.where(kept, u_1, 0.0))
        tl.store(u1 + before * M * F + rows_f, u_1.to(u1.dtype.element_ty))
        u_1 *= -last_scale
        b_1 = tl.load(b1) + tl.sum(u_1, axis=0)
        W_1 = dot(tl.trans(k_n), u_1.to(k_n.dtype), tl.load(W1))
        tl.debug_barrier()  # all have read what is now written
        if complete:
            tl.store(W1, W_1)
            tl.store(b1, b_1)
    if SAVE:
        if saves:
            tl.store(W1_group + saved * D * F + W1_tile, W_1)
            tl.store(b1_group + saved * F + f + d, b_1)
    tl.store(W1_slot + slot * D * F + W1_tile, W_1.to(W1_slot.dtype.element_ty))
    tl.store(b1_slot + slot * F + f + d, b_1)

    slots = n * M + m
    k_n = load_rows(k, stride_t, slots, (slots >= taken) & (slots < end), D)
    if FIRST:
        k_n += load_rows(pending_k, D, slots, slots < taken, D).to(k_n.dtype)
    z_1 = dot(k_n, W_1.to(k_n.dtype), tl.zeros([M, D], tl.float32)) + b_1[None, :]
    tl.store(z1 + slot * M * F + rows_f, z_1)
    x2_n, _ = gelu(z_1)
    if FIRST:
        is_pending = (slots < taken)[:, None]
        x2_n = tl.where(is_pending, tl.load(pending_x2 + rows_f, mask=is_pending, other=0.0), x2_n)
        W_2 = tl.load(W2)
    else:
        W_2 = dot(tl.trans(x_2), u_2, tl.load(W2))
        tl.debug_barrier()  # all have read what is now written
        if complete:
            tl.store(W2, W_2)
    if SAVE:
        if saves:
            tl.store(W2_group + saved * F * D + W2_tile, W_2)
    tl.store(W2_slot + slot * F * D + W2_tile, W_2.to(W2_slot.dtype.element_ty))
    z_2 = dot(x2_n.to(k_n.dtype), W_2.to(k_n.dtype), tl.zeros([M, D], tl.float32))
    tl.store(z2_parts + (n % 2 * BLOCKS + block) * M * D, z_2)
    if block == 0:
        tl.store(b2_slot + slot * D + d, b_2)
        if SAVE:
            if saves:
                tl.store(b2_group + saved * D + d, b_2)
        if is_last:
            if not FIRST:
                tl.store(b2 + state * D + d, b_2)
            if head == 0:
                tl.store(position_out + row, (end % M).to(tl.int64))


@triton.jit(do_not_specialize=["first_n", "T", "S"])
def outputs(
    first_n, q, k, scale, ln_weight, ln_bias, pending_k, position, starts, ends, o, u1, x2, u2,
    W1_slot, b1_slot, W2_slot, b2_slot, T, H, S, stride_b, stride_h, stride_t,
    PACKED: tl.constexpr, M: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the tokens of one mini-batch read, from the model before it and what the chain has left of it."""
    n, head, row = first_n + tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first, taken, end, _ = span(row, position, starts, ends, T, PACKED, M, M)
    if n * M >= end:
        return
    token = slot_0(row, head, first, taken, stride_b, stride_h, stride_t, PACKED)
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
    k_n = load_keys(k + token, stride_t, pending_k + state * M * D, slots, taken, end, D)

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


@triton.jit(do_not_specialize=["first_n", "T", "S"])
def outputs_backward(
    first_n, do, q, k, scale, ln_weight, pending_k, position, starts, ends, u1, x2, u2,
    W1_slot, b1_slot, W2_slot, b2_slot, x2_q, dy1, dy2, du1, dx2, du2, dq, dk_parts, dscale, dln,
    T, H, S, stride_b, stride_h, stride_t,
    PACKED: tl.constexpr, M: tl.constexpr, G: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """From the gradient of the outputs of one mini-batch to those of its queries, and of all that they have read."""
    BLOCKS: tl.constexpr = F // D
    n, head, row = first_n + tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first, taken, end, _ = span(row, position, starts, ends, T, PACKED, M, M)
    if n * M >= end:
        return
    token = slot_0(row, head, first, taken, stride_b, stride_h, stride_t, PACKED)
    state = row * H + head
    slot = state * S + n % S
    W1_slot += slot * D * F
    b1_slot += slot * F
    W2_slot += slot * F * D
    u1 += slot * M * F
    x2 += slot * M * F
    d, m = tl.arange(0, D), tl.arange(0, M)
    rows_d = slot * M * D + matrix(M, D)
    slots = n * M + m
    valid = (slots >= taken) & (slots < end)
    q_n = load_rows(q + token, stride_t, slots, valid, D)
    k_n = load_keys(k + token, stride_t, pending_k + state * M * D, slots, taken, end, D)
    w = tl.load(ln_weight + head * D + d)[None, :]
    u2_n = tl.load(u2 + rows_d)

    s = tl.load(scale + m)[:, None]
    causal = (m[None, :] <= m[:, None]).to(tl.float32)
    attention = ((dot(q_n, tl.trans(k_n), tl.zeros([M, M], tl.float32)) + 1) * causal).to(k_n.dtype)
    attention_2 = tl.zeros([M, M], tl.float32)
    y2 = tl.zeros([M, D], tl.float32) + tl.load(b2_slot + slot * D + d)[None, :]
    for f in range(0, F, BLOCK):
        units = tile(m, F, f, BLOCK)
        y1 = tl.zeros([M, BLOCK], tl.float32) + tl.load(b1_slot + f + tl.arange(0, BLOCK))[None, :]
        y1 = dot(q_n, tl.load(W1_slot + tile(d, F, f, BLOCK)), y1)
        y1 -= s * dot(attention, tl.load(u1 + units), tl.zeros([M, BLOCK], tl.float32))
        x2_f, derivative = gelu(y1)
        x2_f = x2_f.to(k_n.dtype)
        y2 = dot(x2_f, tl.load(W2_slot + f * D + matrix(BLOCK, D)), y2)
        attention_2 = dot(x2_f, tl.trans(tl.load(x2 + units)), attention_2)
    attention_2 = ((attention_2 + 1) * causal).to(k_n.dtype)
    read = dot(attention_2, u2_n, tl.zeros([M, D], tl.float32))
    x, rstd = layer_norm(y2 - s * read, D)

    do_n = load_rows(do + token, stride_t, slots, valid, D).to(tl.float32)
    part = ((row * H + head) * G + tl.program_id(0)) * 2 * D + d
    tl.store(dln + part, tl.sum(do_n * x, axis=0))
    tl.store(dln + part + D, tl.sum(do_n, axis=0))
    dy = do_n * w
    dy -= (tl.sum(dy, axis=1) / D)[:, None] + x * (tl.sum(dy * x, axis=1) / D)[:, None]
    dy *= rstd[:, None]
    dscale_n = -tl.sum(dy * read, axis=1)
    dy2_n = dy.to(k_n.dtype)
    tl.store(dy2 + rows_d, dy2_n)
    sdy = (-s * dy).to(k_n.dtype)
    tl.store(du2 + rows_d, dot(tl.trans(attention_2), sdy, tl.zeros([M, D], tl.float32)))
    dattention_2 = (dot(sdy, tl.trans(u2_n), tl.zeros([M, M], tl.float32)) * causal).to(k_n.dtype)
    dattention = tl.zeros([M, M], tl.float32)
    dq_n = do_n
    for f in range(0, F, BLOCK):
        units = tile(m, F, f, BLOCK)
        W_1, u1_f = tl.load(W1_slot + tile(d, F, f, BLOCK)), tl.load(u1 + units)
        y1 = tl.zeros([M, BLOCK], tl.float32) + tl.load(b1_slot + f + tl.arange(0, BLOCK))[None, :]
        read_1 = dot(attention, u1_f, tl.zeros([M, BLOCK], tl.float32))
        x2_f, derivative = gelu(dot(q_n, W_1, y1) - s * read_1)
        x2_f = x2_f.to(k_n.dtype)
        tl.store(x2_q + slot * M * F + units, x2_f)
        dx2_f = dot(dy2_n, tl.trans(tl.load(W2_slot + f * D + matrix(BLOCK, D))), tl.zeros([M, BLOCK], tl.float32))
        dy1_f = dot(dattention_2, tl.load(x2 + units), dx2_f) * derivative
        dscale_n -= tl.sum(dy1_f * read_1, axis=1)
        sdy1 = (-s * dy1_f).to(k_n.dtype)
        dattention = dot(sdy1, tl.trans(u1_f), dattention)
        tl.store(du1 + slot * M * F + units, dot(tl.trans(attention), sdy1, tl.zeros([M, BLOCK], tl.float32)))
        tl.store(dx2 + slot * M * F + units, dot(tl.trans(dattention_2), x2_f, tl.zeros([M, BLOCK], tl.float32)))
        dy1_f = dy1_f.to(k_n.dtype)
        tl.store(dy1 + slot * M * F + units, dy1_f)
        dq_n = dot(dy1_f, tl.trans(W_1), dq_n)
    dattention = (dattention * causal).to(k_n.dtype)
    store_rows(dq + token, stride_t, slots, valid, dot(dattention, k_n, dq_n), D)
    dk = dot(tl.trans(dattention), q_n, tl.zeros([M, D], tl.float32))
    tl.store(dk_parts + (slot * (BLOCKS + 1) + BLOCKS) * M * D + matrix(M, D), dk)
    tl.store(dscale + (state * G + tl.program_id(0)) * M + m, dscale_n)


@triton.jit
def output_grad_backward(dg, x, rstd, e, mean_e, mean_ex, w, D: tl.constexpr):
    """From the gradient of g2 to those of z2 and of e, as `output_grad` has them."""
    w2 = w * w
    mean, mean_x, mean_g, mean_w, mean_wx = row_means(dg, dg * x, dg * e, w2 * dg, w2 * dg * x, D)
    mean_w2, mean_w2x, mean_w2xx = tl.sum(w2, axis=1) / D, tl.sum(w2 * x, axis=1) / D, tl.sum(w2 * x * x, axis=1) / D
    mean_g -= mean_e * mean + mean_ex * mean_x
    mean_w -= mean_w2 * mean + mean_w2x * mean_x
    mean_wx -= mean_w2x * mean + mean_w2xx * mean_x
    de = dg - mean[:, None] - mean_x[:, None] * x
    dz = w2 * de - mean_ex[:, None] * dg - mean_x[:, None] * e
    dz -= (mean_w - mean_ex * mean - mean_e * mean_x)[:, None]
    dz -= (mean_wx - 2 * mean_ex * mean_x + mean_g)[:, None] * x
    return dz * (rstd * rstd)[:, None], de * rstd[:, None]


@triton.jit(do_not_specialize=["n", "first_n", "T", "S"])
def chain_step_backward(
    n, first_n, q, k, v, lr, scale, ln_weight, ln_bias, pending_k, position, starts, ends,
    dpending_u1_out, dpending_x2_out, dpending_u2_out, z1, u1, x2, u2, W1_slot, W2_slot, h, z2,
    x2_q, dy1, dy2, du1, dx2, du2, dg2_parts, dg2, dh, carried, taught, dk_parts, row_parts,
    dW1, db1, dW2, db2, db2_slot, dpending_u1, dpending_x2,
    T, H, S, stride_b, stride_h, stride_t, lr_stride_b, lr_stride_h, lr_stride_t,
    PACKED: tl.constexpr, M: tl.constexpr, G: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """
    For D of the F hidden units, from the last mini-batch to the first: end mini-batch n + 1 with an update of the
    gradients dW1, db1, dW2, db2 in place, to those of the model before it, and begin mini-batch n with these units'
    part of its dg2, which the next launch adds up.
    """
    BLOCKS: tl.constexpr = F // D
    block, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first, taken, end, _ = span(row, position, starts, ends, T, PACKED, M, M)
    count = tl.cdiv(end, M)
    if n >= count:
        return
    token = slot_0(row, head, first, taken, stride_b, stride_h, stride_t, PACKED)
    q += token
    k += token
    v += token
    lr += slot_0(row, head, first, taken, lr_stride_b, lr_stride_h, lr_stride_t, PACKED)
    state = row * H + head
    f = block * D
    d, m = tl.arange(0, D), tl.arange(0, M)
    rows_d, rows_f = matrix(M, D), tile(m, F, f, D)
    W1_tile, W2_tile = tile(d, F, f, D), f * D + matrix(D, D)
    dW1 += state * D * F
    db1 += state * F + f + d
    dW2 += state * F * D
    db2 += (state * BLOCKS + block) * D + d
    dg2_parts += state * 2 * BLOCKS * M * D + rows_d
    dh += state * 2 * M * F + rows_f
    carried += state * 2 * M * F + rows_f
    pending_rows_d, pending_rows_f = state * M * D + rows_d, state * M * F + rows_f
    last_scale = tl.load(scale + M - 1)
    zeros = tl.zeros([M, D], tl.float32)

    if n + 1 < tl.minimum(count, first_n + G):
        after = n + 1
        slot = state * S + after % S
        slots = after * M + m
        valid = (slots >= taken) & (slots < end)
        learned = tl.where(after * M + M > end, 0.0, -last_scale)
        k_n = load_rows(k, stride_t, slots, valid, D)
        if after == 0:
            k_n += tl.load(pending_k + pending_rows_d, mask=(slots < taken)[:, None], other=0.0).to(k_n.dtype)
        target = load_rows(v, stride_t, slots, valid, D).to(tl.float32) - k_n.to(tl.float32)
        lr_n = tl.load(lr + slots * lr_stride_t, mask=valid, other=0.0).to(tl.float32)
        w, bias = tl.load(ln_weight + head * D + d)[None, :], tl.load(ln_bias + head * D + d)[None, :]
        x, rstd, e, mean_e, mean_ex, g2 = output_grad(tl.load(z2 + slot * M * D + rows_d), target, w, bias, D)
        db_2 = tl.load(db2)
        dg = tl.load(du2 + slot * M * D + rows_d) + learned * db_2[None, :]
        if after * M + M > end:
            dg += tl.load(dpending_u2_out + pending_rows_d, mask=(slots < end)[:, None], other=0.0)
        dg *= lr_n[:, None]
        dg += sum_parts(dg2_parts + after % 2 * BLOCKS * M * D, M * D, BLOCKS)
        dz, de = output_grad_backward(dg, x, rstd, e, mean_e, mean_ex, w, D)
        if block == 0:
            tl.store(dg2 + slot * M * D + rows_d, dg)
        dy = tl.load(dy2 + slot * M * D + rows_d)
        dz_2 = dz.to(k_n.dtype)
        dW_2 = dot(tl.trans(tl.load(x2 + slot * M * F + rows_f)), dz_2, tl.load(dW2 + W2_tile))
        dW_2 = dot(tl.trans(tl.load(dh + after % 2 * M * F)), g2.to(k_n.dtype), dW_2)
        dW_2 = dot(tl.trans(tl.load(x2_q + slot * M * F + rows_f)), dy, dW_2)
        tl.debug_barrier()  # all have read what is now written
        tl.store(dW2 + W2_tile, dW_2)
        tl.store(db2, db_2 + tl.sum(dz + dy.to(tl.float32), axis=0))

        dx2_n = dot(dz_2, tl.trans(tl.load(W2_slot + slot * F * D + W2_tile)), zeros)
        x_2, derivative = gelu(tl.load(z1 + slot * M * F + rows_f))
        dz = tl.load(carried + after % 2 * M * F) + dx2_n * derivative
        dz_1 = tl.where(valid[:, None], dz, 0.0).to(k_n.dtype)
        dy = tl.load(dy1 + slot * M * F + rows_f)
        dW_1 = tl.load(dW1 + W1_tile)
        dk = dot(tl.load(u1 + slot * M * F + rows_f), tl.trans(dW_1.to(k_n.dtype)), zeros) * learned
        dk = dot(dz_1, tl.trans(tl.load(W1_slot + slot * D * F + W1_tile)), dk)
        tl.store(dk_parts + (slot * (BLOCKS + 1) + block) * M * D + rows_d, dk)
        dW_1 = dot(tl.trans(k_n), dz_1, dW_1)
        dW_1 = dot(tl.trans(load_rows(q, stride_t, slots, valid, D)), dy, dW_1)
        db_1 = tl.load(db1) + tl.sum(dz_1.to(tl.float32) + dy.to(tl.float32), axis=0)
        tl.debug_barrier()
        tl.store(dW1 + W1_tile, dW_1)
        tl.store(db1, db_1)
        tl.debug_barrier()  # for the loads below

    if n >= first_n:
        slot = state * S + n % S
        slots = n * M + m
        valid = (slots >= taken) & (slots < end)
        is_pending = (slots < taken)[:, None]
        kept = ((slots < end) & (slots >= end // M * M))[:, None]
        learned = tl.where(n * M + M > end, 0.0, -last_scale)
        k_n = load_rows(k, stride_t, slots, valid, D)
        if n == 0:
            k_n += tl.load(pending_k + pending_rows_d, mask=is_pending, other=0.0).to(k_n.dtype)
        lr_n = tl.load(lr + slots * lr_stride_t, mask=valid, other=0.0).to(tl.float32)
        if block == 0:
            tl.store(db2_slot + slot * D + d, tl.load(db2))
        taught_1 = dot(k_n, tl.load(dW1 + W1_tile).to(k_n.dtype), zeros) + tl.load(db1)[None, :]
        u_1 = tl.load(u1 + slot * M * F + rows_f).to(tl.float32)
        tl.store(row_parts + ((slot * BLOCKS + block) * 2 + 1) * M + m, tl.sum(u_1 * taught_1, axis=1))
        du_1 = tl.load(du1 + slot * M * F + rows_f) + learned * taught_1
        if n * M + M > end:
            du_1 += tl.load(dpending_u1_out + pending_rows_f, mask=kept, other=0.0)
        if n == 0:
            tl.store(dpending_u1 + pending_rows_f, du_1, mask=is_pending)
        z_1 = tl.load(z1 + slot * M * F + rows_f)
        h_n = tl.load(h + slot * M * F + rows_f)
        x_2, derivative = gelu(z_1)
        tl.store(row_parts + (slot * BLOCKS + block) * 2 * M + m, tl.sum(du_1 * h_n * derivative, axis=1))
        dg_1 = lr_n[:, None] * du_1
        dh_n = (dg_1 * derivative).to(k_n.dtype)
        tl.store(dh + n % 2 * M * F, dh_n)
        carried_n = dg_1 * h_n * gelu_second_derivative(z_1)

        dW_2 = tl.load(dW2 + W2_tile).to(k_n.dtype)
        dx2_n = dot(tl.load(u2 + slot * M * D + rows_d), tl.trans(dW_2), zeros) * learned
        dx2_n += tl.load(dx2 + slot * M * F + rows_f)
        if n * M + M > end:
            dx2_n += tl.load(dpending_x2_out + pending_rows_f, mask=kept, other=0.0)
        if n == 0:
            tl.store(dpending_x2 + pending_rows_f, dx2_n, mask=is_pending)
        tl.store(carried + n % 2 * M * F, carried_n + dx2_n * derivative)
        taught_2 = dot(tl.load(x2 + slot * M * F + rows_f), dW_2, zeros)
        tl.store(taught + (slot * BLOCKS + block) * M * D + rows_d, taught_2)
        dg = dot(dh_n, tl.load(W2_slot + slot * F * D + W2_tile), (learned * lr_n)[:, None] * taught_2)
        tl.store(dg2_parts + (n % 2 * BLOCKS + block) * M * D, dg)


@triton.jit(do_not_specialize=["first_n", "T", "S"])
def tokens_backward(
    first_n, k, v, lr, scale, ln_weight, ln_bias, pending_k, position, starts, ends, dpending_k_out, dpending_u2_out,
    u2, z2, du2, dg2, taught, dk_parts, row_parts, db2_slot, dk, dv, dlr, dpending_k, dpending_u2, dscale, dln,
    T, H, S, stride_b, stride_h, stride_t, lr_stride_b, lr_stride_h, lr_stride_t,
    PACKED: tl.constexpr, M: tl.constexpr, G: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """What is left when the chain has passed a mini-batch: the gradients of its keys, values and learning rates."""
    BLOCKS: tl.constexpr = F // D
    n, head, row = first_n + tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first, taken, end, _ = span(row, position, starts, ends, T, PACKED, M, M)
    if n * M >= end:
        return
    token = slot_0(row, head, first, taken, stride_b, stride_h, stride_t, PACKED)
    lr_token = slot_0(row, head, first, taken, lr_stride_b, lr_stride_h, lr_stride_t, PACKED)
    state = row * H + head
    slot = state * S + n % S
    d, m = tl.arange(0, D), tl.arange(0, M)
    rows_d = slot * M * D + matrix(M, D)
    slots = n * M + m
    is_pending = slots < taken
    valid = (slots >= taken) & (slots < end)
    kept = (slots < end) & (slots >= end // M * M)
    k_n = load_keys(k + token, stride_t, pending_k + state * M * D, slots, taken, end, D).to(tl.float32)
    target = load_rows(v + token, stride_t, slots, valid, D).to(tl.float32) - k_n
    w, bias = tl.load(ln_weight + head * D + d)[None, :], tl.load(ln_bias + head * D + d)[None, :]
    x, rstd, e, mean_e, mean_ex, g2 = output_grad(tl.load(z2 + rows_d), target, w, bias, D)
    dz, de = output_grad_backward(tl.load(dg2 + rows_d), x, rstd, e, mean_e, mean_ex, w, D)

    part = ((row * H + head) * G + tl.program_id(0)) * 2 * D + d
    tl.store(dln + part, tl.sum(de * (2 * w * x + bias - target), axis=0))
    de *= w
    tl.store(dln + part + D, tl.sum(de, axis=0))
    store_rows(dv + token, stride_t, slots, valid, -de, D)

    taught_n = tl.zeros([M, D], tl.float32) + tl.load(db2_slot + slot * D + d)[None, :]
    dk_n = de + tl.load(dk_parts + (slot * (BLOCKS + 1) + BLOCKS) * M * D + matrix(M, D))
    dlr_n, dlast_scale = tl.zeros([M], tl.float32), tl.zeros([M], tl.float32)
    for block in tl.static_range(BLOCKS):
        taught_n += tl.load(taught + (slot * BLOCKS + block) * M * D + matrix(M, D))
        dk_n += tl.load(dk_parts + (slot * (BLOCKS + 1) + block) * M * D + matrix(M, D))
        dlr_n += tl.load(row_parts + (slot * BLOCKS + block) * 2 * M + m)
        dlast_scale += tl.load(row_parts + ((slot * BLOCKS + block) * 2 + 1) * M + m)
    dlast_scale += tl.sum(tl.load(u2 + rows_d).to(tl.float32) * taught_n, axis=1)
    complete = n * M + M <= end
    du2_n = tl.load(du2 + rows_d) - tl.where(complete, tl.load(scale + M - 1), 0.0) * taught_n
    du2_n += load_rows(dpending_u2_out + state * M * D, D, m, kept, D)
    store_rows(dpending_u2 + state * M * D, D, slots, is_pending, du2_n, D)
    dlr_n += tl.sum(du2_n * g2, axis=1)
    tl.store(dlr + lr_token + slots * lr_stride_t, dlr_n.to(dlr.dtype.element_ty), mask=valid)
    dlast = tl.where(complete, -tl.sum(dlast_scale, axis=0), 0.0)
    tl.store(dscale + (state * G + tl.program_id(0)) * M + m, tl.where(m == M - 1, dlast, 0.0))
    dk_n += load_rows(dpending_k_out + state * M * D, D, m, kept, D)
    store_rows(dk + token, stride_t, slots, valid, dk_n, D)
    store_rows(dpending_k + state * M * D, D, slots, is_pending, dk_n, D)


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
    token = row * stride_b + head.to(tl.int64) * stride_h + d
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
        dtype = q.dtype.element_ty  # as in a prefill
        keys_t = tl.trans(tl.load(pending_k + matrix(M, D)).to(dtype))
        for f in range(0, F, BLOCK):
            rows = tile(m, F, f, BLOCK)
            u1s = tl.load(pending_u1 + rows) * -last_scale
            b_1 = tl.load(b1 + f + units) + tl.sum(u1s, axis=0)
            W1_f = W1 + tile(d, F, f, BLOCK)
            W_1 = dot(keys_t, u1s.to(dtype), tl.load(W1_f))
            tl.debug_barrier()  # all have read what is now written
            tl.store(W1_f, W_1)
            tl.store(b1 + f + units, b_1)
            tl.store(pending_u1 + rows, tl.zeros([M, BLOCK], tl.float32))
        u2s = tl.load(pending_u2 + matrix(M, D)) * -last_scale
        tl.store(b2, b + tl.sum(u2s, axis=0))
        for f in range(0, F, BLOCK):
            rows = tile(m, F, f, BLOCK)
            W2_f = W2 + f * D + matrix(BLOCK, D)
            W_2 = dot(tl.trans(tl.load(pending_x2 + rows).to(dtype)), u2s.to(dtype), tl.load(W2_f))
            tl.debug_barrier()
            tl.store(W2_f, W_2)
            tl.store(pending_x2 + rows, tl.zeros([M, BLOCK], tl.float32))
        tl.store(pending_k + matrix(M, D), tl.zeros([M, D], tl.float32))
        tl.store(pending_u2 + matrix(M, D), tl.zeros([M, D], tl.float32))
