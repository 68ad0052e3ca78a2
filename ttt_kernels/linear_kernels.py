# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
Triton kernels of TTT-Linear.

What is sequential, the chain of states, is one program per row and head that keeps W in registers and steps through
the mini-batches; it leaves every token's u = lr * dl/dz and W at each group of G mini-batches. What is left is
parallel over blocks of tokens: the model that a token meets is the group's W less what the group's tokens before it
have added, which has the form of attention. The backward pass has the same three parts: before, chain, after.

A token's slot is its place among the mini-batches of its row, the pending tokens of the initial state included.
Temporaries stand by slot: [H, groups * C, ...] with C = G * m slots in a group.

W is kept with the mean over its columns taken off, which no update changes as a LayerNorm's gradient has mean 0: the
mean of z need then not be computed.
"""

import triton
import triton.language as tl

from .common import (
    EPS,
    dot,
    earlier,
    inner_grad,
    layer_norm,
    load_keys,
    load_rows,
    matrix,
    reach,
    row_means,
    row_of_group,
    slot_0,
    span,
    store_rows,
)


@triton.jit(do_not_specialize=["T", "groups"])
def chain_forward(
    k, v, lr, scale, ln_weight, ln_bias, W1, b1, pending_k, pending_u1, position, starts, ends,
    u1, W1_group, b1_group, W1_out, b1_out, pending_k_out, pending_u1_out, position_out,
    T, H, groups, stride_b, stride_h, stride_t, lr_stride_b, lr_stride_h, lr_stride_t,
    PACKED: tl.constexpr, M: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first, taken, end, group = span(row, position, starts, ends, T, PACKED, M, G * M)
    token = slot_0(row, head, first, taken, stride_b, stride_h, stride_t, PACKED)
    k += token
    v += token
    lr += slot_0(row, head, first, taken, lr_stride_b, lr_stride_h, lr_stride_t, PACKED)
    u1 += (head.to(tl.int64) * groups + group) * G * M * D
    W1_group += (head.to(tl.int64) * groups + group) * D * D
    b1_group += (head.to(tl.int64) * groups + group) * D
    state = row * H + head
    d = tl.arange(0, D)
    slots = tl.arange(0, M)
    w = tl.load(ln_weight + head * D + d)[None, :]
    bias = tl.load(ln_bias + head * D + d)[None, :]
    last_scale = tl.load(scale + M - 1)

    W = tl.load(W1 + state * D * D + matrix(D, D))
    b = tl.load(b1 + state * D + d)
    W_mean, b_mean = tl.sum(W, axis=1) / D, tl.sum(b, axis=0) / D
    W -= W_mean[:, None]
    b -= b_mean

    # The first mini-batch, to which the pending rows belong.
    tl.store(W1_group + matrix(D, D), W.to(W1_group.dtype.element_ty))
    tl.store(b1_group + d, b)
    valid = (slots >= taken) & (slots < end)
    k_n = load_keys(k, stride_t, pending_k + state * M * D, slots, taken, end, D)
    c = (bias - load_rows(v, stride_t, slots, valid, D).to(tl.float32) + k_n.to(tl.float32)) * w
    lr_n = tl.load(lr + slots * lr_stride_t, mask=valid, other=0.0).to(tl.float32)
    z = dot(k_n, W.to(k_n.dtype), tl.zeros([M, D], tl.float32) + b[None, :])
    u = inner_grad(z, c, w, lr_n, D) + load_rows(pending_u1 + state * M * D, D, slots, slots < taken, D)
    store_rows(u1, D, slots, slots < end, u, D)
    complete = end >= M
    step = u * -last_scale
    W = dot(tl.trans(k_n), step.to(k_n.dtype), W)
    b += tl.sum(step, axis=0)
    mean, mean_of_b = tl.sum(W, axis=1) / D, tl.sum(b, axis=0) / D  # not 0 if the caller's pending rows have means
    W -= mean[:, None]
    b -= mean_of_b
    W_mean += mean
    b_mean += mean_of_b
    tl.store(pending_k_out + state * M * D + matrix(M, D), tl.where(complete, 0.0, k_n.to(tl.float32)))
    tl.store(pending_u1_out + state * M * D + matrix(M, D), tl.where(complete, 0.0, u))

    # The model takes a step at the start of the next turn: a product that led to another one within a turn would be
    # laid out over the rows alone, of which there are too few for 8 warps.
    step = tl.zeros([M, D], k_n.dtype)
    tokens = slots[:, None] * stride_t + d[None, :]
    lr_tokens = slots * lr_stride_t
    stride_n = tl.full([], M, tl.int64) * stride_t
    for n in tl.range(1, end // M, disable_licm=True):
        before = tl.maximum(n - 1, 1) * stride_n
        now = n * stride_n
        v_n = tl.load(v + now + tokens)
        k_n = tl.load(k + now + tokens)
        lr_n = tl.load(lr + n * M * lr_stride_t + lr_tokens).to(tl.float32)
        W = dot(tl.trans(tl.load(k + before + tokens)), step, W)
        if n % G == 0:
            tl.store(W1_group + (n // G) * D * D + matrix(D, D), W.to(W1_group.dtype.element_ty))
            tl.store(b1_group + (n // G) * D + d, b)
        z = dot(k_n, W.to(k_n.dtype), tl.zeros([M, D], tl.float32) + b[None, :])
        c = (k_n.to(tl.float32) - v_n.to(tl.float32)) * w + bias * w
        u = inner_grad(z, c, w, lr_n, D)
        tl.store(u1 + n * M * D + matrix(M, D), u.to(u1.dtype.element_ty))
        u *= -last_scale
        b += tl.sum(u, axis=0)
        step = u.to(k_n.dtype)
    rows = end // M * M - M + slots
    W = dot(tl.trans(load_rows(k, stride_t, rows, rows >= M, D)), step, W)

    if (end >= M) & (end % M != 0):  # the last mini-batch, not yet complete
        n = end // M
        if n % G == 0:
            tl.store(W1_group + (n // G) * D * D + matrix(D, D), W.to(W1_group.dtype.element_ty))
            tl.store(b1_group + (n // G) * D + d, b)
        valid = n * M + slots < end
        k_n = load_rows(k, stride_t, n * M + slots, valid, D)
        v_n = load_rows(v, stride_t, n * M + slots, valid, D)
        c = (bias - v_n.to(tl.float32) + k_n.to(tl.float32)) * w
        lr_n = tl.load(lr + (n * M + slots) * lr_stride_t, mask=valid, other=0.0).to(tl.float32)
        u = inner_grad(dot(k_n, W.to(k_n.dtype), tl.zeros([M, D], tl.float32) + b[None, :]), c, w, lr_n, D)
        store_rows(u1, D, n * M + slots, valid, u, D)
        tl.store(pending_k_out + state * M * D + matrix(M, D), k_n.to(tl.float32))
        tl.store(pending_u1_out + state * M * D + matrix(M, D), u)

    W += W_mean[:, None]
    b += b_mean
    if not complete:  # no step after all; not a step of 0, which a NaN among the pending rows would not be
        W, b = tl.load(W1 + state * D * D + matrix(D, D)), tl.load(b1 + state * D + d)
    tl.store(W1_out + state * D * D + matrix(D, D), W)
    tl.store(b1_out + state * D + d, b)
    if head == 0:
        tl.store(position_out + row, (end % M).to(tl.int64))


@triton.jit(do_not_specialize=["T", "R", "groups"])
def outputs(
    q, k, scale, ln_weight, ln_bias, pending_k, position, starts, ends, u1, W1_group, b1_group, o,
    T, H, R, groups, stride_b, stride_h, stride_t,
    PACKED: tl.constexpr, M: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    R_BLOCK: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    group, block = tl.program_id(0) // (G * M // BLOCK), tl.program_id(0) % (G * M // BLOCK)
    row = row_of_group(group, starts, T, R, PACKED, M, G * M, R_BLOCK).to(tl.int64)
    first, taken, end, first_group = span(row, position, starts, ends, T, PACKED, M, G * M)
    slot = (group - first_group) * G * M
    token = slot_0(row, head, first, taken, stride_b, stride_h, stride_t, PACKED)
    q += token
    k += token
    o += token
    pending_k += (row * H + head) * M * D
    u1 += (head.to(tl.int64) * groups + first_group) * G * M * D
    W1_group += (head.to(tl.int64) * groups + group) * D * D
    b1_group += (head.to(tl.int64) * groups + group) * D
    d = tl.arange(0, D)
    slots = slot + block * BLOCK + tl.arange(0, BLOCK)

    # Nothing is left unwritten in what the chain returns.
    if slot + block * BLOCK + BLOCK > end:
        store_rows(u1, D, slots, slots >= end, tl.zeros([BLOCK, D], tl.float32), D)
        if (block == 0) & (slot >= end) & (slot > 0):
            tl.store(W1_group + matrix(D, D), tl.zeros([D, D], W1_group.dtype.element_ty))
            tl.store(b1_group + d, tl.zeros([D], tl.float32))
    if slot + block * BLOCK >= end:
        return
    valid = (slots >= taken) & (slots < end)
    q_i = load_rows(q, stride_t, slots, valid, D)
    z = tl.zeros([BLOCK, D], tl.float32) + tl.load(b1_group + d)[None, :]
    z = dot(q_i, tl.load(W1_group + matrix(D, D)), z)
    for j in range(0, block + 1):
        slots_j = slot + j * BLOCK + tl.arange(0, BLOCK)
        k_j = load_keys(k, stride_t, pending_k, slots_j, taken, end, D)
        u_j = load_rows(u1, D, slots_j, slots_j < end, D)
        attention = dot(q_i, tl.trans(k_j), tl.zeros([BLOCK, BLOCK], tl.float32)) + 1
        attention *= -reach(scale, slots, slots_j, M)
        z = dot(attention.to(u_j.dtype), u_j, z)
    x, _ = layer_norm(z, D)
    x = q_i.to(tl.float32) + x * tl.load(ln_weight + head * D + d)[None, :] + tl.load(ln_bias + head * D + d)[None, :]
    store_rows(o, stride_t, slots, valid, x, D)


@triton.jit(do_not_specialize=["T", "R", "groups"])
def before_chain_backward(
    q, k, v, lr, scale, ln_weight, ln_bias, pending_k, position, starts, ends, u1, W1_group, b1_group,
    do, dpending_u1_out,
    dz_q, db_q, du1, x, g, statistics, dscale, dln,
    T, H, R, groups, stride_b, stride_h, stride_t, lr_stride_b, lr_stride_h, lr_stride_t,
    PACKED: tl.constexpr, M: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    R_BLOCK: tl.constexpr,
):  # fmt: skip
    """
    The gradient of each token's read z_q and its sum over each mini-batch; du1, the part of it that goes to the u of
    the same mini-batch; and what the chain needs of each inner gradient u = lr / std g: x = LN(z), g, which is
    e = (LN(z) w + bias - target) w less its projections on 1 and x, and 5 numbers per token. All slots of a block are
    written, so that the chain need not mask what it loads.
    """
    head = tl.program_id(1)
    group, block = tl.program_id(0) // (G * M // BLOCK), tl.program_id(0) % (G * M // BLOCK)
    row = row_of_group(group, starts, T, R, PACKED, M, G * M, R_BLOCK).to(tl.int64)
    first, taken, end, first_group = span(row, position, starts, ends, T, PACKED, M, G * M)
    slot = (group - first_group) * G * M
    if slot + block * BLOCK >= end:
        return
    token = slot_0(row, head, first, taken, stride_b, stride_h, stride_t, PACKED)
    q += token
    k += token
    v += token
    do += token
    pending_k += (row * H + head) * M * D
    workspace = (head.to(tl.int64) * groups + first_group) * G * M
    u1 += workspace * D
    W1_group += (head.to(tl.int64) * groups + group) * D * D
    b1_group += (head.to(tl.int64) * groups + group) * D
    d = tl.arange(0, D)
    w = tl.load(ln_weight + head * D + d)[None, :]
    bias = tl.load(ln_bias + head * D + d)[None, :]

    slots = slot + block * BLOCK + tl.arange(0, BLOCK)
    valid = (slots >= taken) & (slots < end)
    q_i = load_rows(q, stride_t, slots, valid, D)
    k_i = load_keys(k, stride_t, pending_k, slots, taken, end, D)
    b = tl.zeros([BLOCK, D], tl.float32) + tl.load(b1_group + d)[None, :]
    z_q = dot(q_i, tl.load(W1_group + matrix(D, D)), b)
    for j in range(0, block + 1):
        slots_j = slot + j * BLOCK + tl.arange(0, BLOCK)
        k_j = load_keys(k, stride_t, pending_k, slots_j, taken, end, D)
        u_j = load_rows(u1, D, slots_j, slots_j < end, D)
        attention = dot(q_i, tl.trans(k_j), tl.zeros([BLOCK, BLOCK], tl.float32)) + 1
        z_q = dot((-attention * reach(scale, slots, slots_j, M)).to(u_j.dtype), u_j, z_q)

    x_q, rstd = layer_norm(z_q, D)
    do_i = load_rows(do, stride_t, slots, valid, D).to(tl.float32)
    part = (tl.program_id(0) * H + head).to(tl.int64)
    tl.store(dln + part * 2 * D + d, tl.sum(do_i * x_q, axis=0))
    tl.store(dln + part * 2 * D + D + d, tl.sum(do_i, axis=0))
    do_i *= w
    dz_i = do_i - (tl.sum(do_i, axis=1) / D)[:, None] - x_q * (tl.sum(do_i * x_q, axis=1) / D)[:, None]
    dz_i *= rstd[:, None]
    rows = tl.arange(0, BLOCK)[:, None] * D + d[None, :]
    own = (workspace + slot + block * BLOCK) * D
    tl.store(dz_q + own + rows, dz_i.to(dz_q.dtype.element_ty))
    mini_batches = slot // M + block * (BLOCK // M) + tl.arange(0, BLOCK // M)
    db_i = tl.sum(tl.reshape(dz_i, [BLOCK // M, M, D]), axis=1)
    tl.store(db_q + workspace // M * D + mini_batches[:, None] * D + d[None, :], db_i)

    u_i = load_rows(u1, D, slots, slots < end, D)
    attention = dot(q_i, tl.trans(k_i), tl.zeros([BLOCK, BLOCK], tl.float32)) + 1
    same = (slots[:, None] // M == slots[None, :] // M) & (slots[None, :] <= slots[:, None])
    attention = tl.where(same, attention, 0.0)
    read = dot(attention.to(u_i.dtype), u_i, tl.zeros([BLOCK, D], tl.float32))
    tl.store(dscale + part * BLOCK + tl.arange(0, BLOCK), -tl.sum(read * dz_i, axis=1))
    attention *= -tl.load(scale + slots % M)[:, None]
    kept = (slots // M * M + M > end) & (slots < end)
    du = load_rows(dpending_u1_out + (row * H + head) * M * D, D, slots % M, kept, D)
    du = dot(tl.trans(attention.to(q_i.dtype)), dz_i.to(q_i.dtype), du)
    tl.store(du1 + own + rows, du.to(du1.dtype.element_ty))

    z = dot(k_i, tl.load(W1_group + matrix(D, D)), tl.zeros([BLOCK, D], tl.float32) + tl.load(b1_group + d)[None, :])
    last_scale = tl.load(scale + M - 1)
    for j in range(0, block + 1):
        slots_j = slot + j * BLOCK + tl.arange(0, BLOCK)
        k_j = load_keys(k, stride_t, pending_k, slots_j, taken, end, D)
        u_j = load_rows(u1, D, slots_j, slots_j < end, D)
        attention = dot(k_i, tl.trans(k_j), tl.zeros([BLOCK, BLOCK], tl.float32)) + 1
        attention = tl.where(earlier(slots, slots_j, M), -last_scale * attention, 0.0)
        z = dot(attention.to(u_j.dtype), u_j, z)
    x_i, rstd = layer_norm(z, D)
    w2 = w * w
    v_i = load_rows(v, stride_t, slots, valid, D).to(tl.float32)
    e_i = w2 * x_i + (bias - v_i + k_i.to(tl.float32)) * w
    mean_ex = tl.sum(e_i * x_i, axis=1) / D
    g_i = e_i - (tl.sum(e_i, axis=1) / D)[:, None] - mean_ex[:, None] * x_i
    tl.store(x + own + rows, x_i.to(x.dtype.element_ty))
    tl.store(g + own + rows, g_i.to(g.dtype.element_ty))
    lr += slot_0(row, head, first, taken, lr_stride_b, lr_stride_h, lr_stride_t, PACKED)
    lr_i = tl.load(lr + slots * lr_stride_t, mask=valid, other=0.0).to(tl.float32)
    statistics += (workspace + slots) * 5
    tl.store(statistics, lr_i * rstd * rstd)
    tl.store(statistics + 1, mean_ex)
    tl.store(statistics + 2, tl.sum(w2 * x_i, axis=1) / D)
    tl.store(statistics + 3, tl.sum(w2 * x_i * x_i, axis=1) / D)
    tl.store(statistics + 4, rstd)


@triton.jit
def inner_grad_backward(du, x, g, statistics, w2, mean_w2, D: tl.constexpr):
    """Gradient of u = `inner_grad` with respect to z, and with respect to e but for the factor lr / std."""
    mean, mean_x, mean_g, mean_w, mean_wx = row_means(du, du * x, du * g, w2 * du, w2 * du * x, D)
    scale, mean_ex = tl.load(statistics), tl.load(statistics + 1)
    mean_w2x, mean_w2xx = tl.load(statistics + 2), tl.load(statistics + 3)
    mean_dx = mean_w - (mean_w2 + mean_ex) * mean - mean_w2x * mean_x
    mean_dxx = mean_wx - mean_w2x * mean - (mean_w2xx + mean_ex) * mean_x + mean_g
    de = du - mean[:, None] - mean_x[:, None] * x
    dz = w2 * de - mean_dx[:, None] - mean_ex[:, None] * du - mean_x[:, None] * g - mean_dxx[:, None] * x
    return scale[:, None] * dz, de


@triton.jit
def add_mini_batch(dW, db_rows, k, q, dz, dz_q, db_q):
    """The gradient of the model before a mini-batch, from that after it and those of the mini-batch's z and z_q."""
    dW = dot(tl.trans(k), dz, dW)
    dW = dot(tl.trans(q), dz_q, dW)
    ones = tl.full([dz.shape[0], dz.shape[0]], 1, dz.dtype)
    return dW, dot(ones, dz, db_rows + db_q[None, :])


@triton.jit(do_not_specialize=["T", "groups"])
def chain_backward(
    q, k, scale, ln_weight, pending_k, position, starts, ends, dz_q, db_q, du1, x, g, statistics, dW1_out, db1_out,
    dz, dW1_group, db1_group, dW1, db1, dpending_u1,
    T, H, groups, stride_b, stride_h, stride_t,
    PACKED: tl.constexpr, M: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """
    The chain of the gradients of the states, from the last mini-batch to the first.

    It writes de over du1: a row's de takes a mean over all of the row's du1, which has then been read.
    """
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first, taken, end, group = span(row, position, starts, ends, T, PACKED, M, G * M)
    token = slot_0(row, head, first, taken, stride_b, stride_h, stride_t, PACKED)
    q += token
    k += token
    workspace = (head.to(tl.int64) * groups + group) * G
    dz_q += workspace * M * D
    db_q += workspace * D
    du1 += workspace * M * D
    x += workspace * M * D
    g += workspace * M * D
    dz += workspace * M * D
    statistics += workspace * M * 5
    dW1_group += (head.to(tl.int64) * groups + group) * D * D
    db1_group += (head.to(tl.int64) * groups + group) * D
    state = row * H + head
    d = tl.arange(0, D)
    slots = tl.arange(0, M)
    w = tl.load(ln_weight + head * D + d)[None, :]
    w2 = w * w
    mean_w2 = tl.sum(w2, axis=1) / D
    last_scale = tl.load(scale + M - 1)
    last = tl.cdiv(end, M) - 1

    dW = tl.load(dW1_out + state * D * D + matrix(D, D))
    db_rows = tl.zeros([M, D], tl.float32) + tl.load(db1_out + state * D + d)[None, :]
    dz_n = tl.zeros([M, D], k.dtype.element_ty)
    db_pointers = tl.arange(0, M)[:, None] * 0 + d[None, :]
    first_row = (tl.arange(0, M) == 0)[:, None]
    for i in tl.range(0, last + 1, disable_licm=True):
        n = last - i
        at = n * M * D + matrix(M, D)
        du = tl.load(du1 + at)
        x_n = tl.load(x + at).to(tl.float32)
        g_n = tl.load(g + at).to(tl.float32)
        now = n * M + slots
        k_n = load_rows(k, stride_t, now, (now >= taken) & (now < end), D)
        if n == 0:
            k_n += load_rows(pending_k + state * M * D, D, slots, slots < taken, D).to(k_n.dtype)

        # The gradient that the mini-batch after this one has left; at the start of the turn as in `chain_forward`.
        after = now + M
        k_after = load_rows(k, stride_t, after, after < end, D)
        q_after = load_rows(q, stride_t, after, after < end, D)
        dz_q_n = load_rows(dz_q, D, after, after < end, D)
        db_q_n = tl.load(db_q + (n + 1) * D + d, mask=d < (last - n) * D, other=0.0)
        dW, db_rows = add_mini_batch(dW, db_rows, k_after, q_after, dz_n, dz_q_n, db_q_n)
        dW_n = dW.to(k_n.dtype)
        if (n % G == G - 1) | (n == last):
            tl.store(dW1_group + (n // G) * D * D + matrix(D, D), dW_n)
            tl.store(db1_group + (n // G) * D + db_pointers, db_rows, mask=first_row)

        complete = (n * M + M <= end).to(tl.float32)
        du -= last_scale * complete * (dot(k_n, dW_n, tl.zeros([M, D], tl.float32)) + db_rows)
        if n == 0:
            store_rows(dpending_u1 + state * M * D, D, slots, slots < taken, du, D)
        dz_i, de_i = inner_grad_backward(du, x_n, g_n, statistics + now * 5, w2, mean_w2, D)
        dz_n = dz_i.to(k_n.dtype)
        tl.store(dz + at, dz_n)
        tl.store(du1 + at, de_i)
    valid = (slots >= taken) & (slots < end)
    k_n = load_rows(k, stride_t, slots, valid, D)
    q_n = load_rows(q, stride_t, slots, valid, D)
    dz_q_n = load_rows(dz_q, D, slots, slots < end, D)
    db_q_n = tl.load(db_q + d, mask=d < end * D, other=0.0)
    dW, db_rows = add_mini_batch(dW, db_rows, k_n, q_n, dz_n, dz_q_n, db_q_n)
    tl.store(dW1 + state * D * D + matrix(D, D), dW)
    tl.store(db1 + state * D + db_pointers, db_rows, mask=first_row)


@triton.jit(do_not_specialize=["T", "R", "groups"])
def after_chain_backward(
    q, k, v, lr, scale, ln_weight, ln_bias, pending_k, position, starts, ends, u1, W1_group, do,
    dz_q, x, statistics, dz, de, dW1_group, db1_group, dpending_k_out,
    dq, dk, dv, dlr, dpending_k, dlast_scale, dln,
    T, H, R, groups, stride_b, stride_h, stride_t, lr_stride_b, lr_stride_h, lr_stride_t,
    PACKED: tl.constexpr, M: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    R_BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of the tokens, from those of their reads and of the group's states."""
    head = tl.program_id(1)
    group, block = tl.program_id(0) // (G * M // BLOCK), tl.program_id(0) % (G * M // BLOCK)
    row = row_of_group(group, starts, T, R, PACKED, M, G * M, R_BLOCK).to(tl.int64)
    first, taken, end, first_group = span(row, position, starts, ends, T, PACKED, M, G * M)
    slot = (group - first_group) * G * M
    if slot + block * BLOCK >= end:
        return
    token = slot_0(row, head, first, taken, stride_b, stride_h, stride_t, PACKED)
    q += token
    k += token
    pending_k += (row * H + head) * M * D
    workspace = (head.to(tl.int64) * groups + first_group) * G * M
    u1 += workspace * D
    dz_q += workspace * D
    dz += workspace * D
    W1_group += (head.to(tl.int64) * groups + group) * D * D
    dW1_group += (head.to(tl.int64) * groups + group) * D * D
    db1_group += (head.to(tl.int64) * groups + group) * D
    d = tl.arange(0, D)
    part = (tl.program_id(0) * H + head).to(tl.int64)

    slots = slot + block * BLOCK + tl.arange(0, BLOCK)
    exists = slots < end
    valid = (slots >= taken) & exists
    k_i = load_keys(k, stride_t, pending_k, slots, taken, end, D)

    w = tl.load(ln_weight + head * D + d)[None, :]
    bias = tl.load(ln_bias + head * D + d)[None, :]
    x_i = load_rows(x + workspace * D, D, slots, exists, D).to(tl.float32) * w
    r_i = x_i + bias - load_rows(v + token, stride_t, slots, valid, D).to(tl.float32) + k_i.to(tl.float32)
    de_i = load_rows(de + workspace * D, D, slots, exists, D)
    rstd = tl.load(statistics + (workspace + slots) * 5 + 4, mask=exists, other=0.0)
    lr_token = slot_0(row, head, first, taken, lr_stride_b, lr_stride_h, lr_stride_t, PACKED)
    lr_i = tl.load(lr + lr_token + slots * lr_stride_t, mask=valid, other=0.0).to(tl.float32)
    dlr_i = rstd * tl.sum(de_i * w * r_i, axis=1)
    tl.store(dlr + lr_token + slots * lr_stride_t, dlr_i.to(dlr.dtype.element_ty), mask=valid)
    de_i *= (lr_i * rstd)[:, None]
    tl.store(dln + part * 2 * D + d, tl.sum(de_i * (x_i + r_i), axis=0))
    de_i *= w
    tl.store(dln + part * 2 * D + D + d, tl.sum(de_i, axis=0))
    store_rows(dv + token, stride_t, slots, valid, -de_i, D)

    u_i = load_rows(u1, D, slots, exists, D)
    dz_q_i = load_rows(dz_q, D, slots, exists, D)
    dz_i = load_rows(dz, D, slots, exists, D)
    W = tl.trans(tl.load(W1_group + matrix(D, D)))
    dW = tl.trans(tl.load(dW1_group + matrix(D, D)))
    dq_i = dot(dz_q_i, W, load_rows(do + token, stride_t, slots, valid, D).to(tl.float32))
    dk_i = dot(dz_i, W, de_i)
    zeros = tl.zeros([BLOCK, BLOCK], tl.float32)
    last_scale = tl.load(scale + M - 1)
    for j in range(0, block + 1):  # what the model had learned before token i
        slots_j = slot + j * BLOCK + tl.arange(0, BLOCK)
        k_j = load_keys(k, stride_t, pending_k, slots_j, taken, end, D)
        u_j = tl.trans(load_rows(u1, D, slots_j, slots_j < end, D))
        attention = dot(dz_q_i, u_j, zeros) * -reach(scale, slots, slots_j, M)
        dq_i = dot(attention.to(k_j.dtype), k_j, dq_i)
        attention = tl.where(earlier(slots, slots_j, M), dot(dz_i, u_j, zeros) * -last_scale, 0.0)
        dk_i = dot(attention.to(k_j.dtype), k_j, dk_i)
    store_rows(dq + token, stride_t, slots, valid, dq_i, D)

    # What token i has taught: to its own mini-batch ...
    q_i = load_rows(q, stride_t, slots, valid, D)
    attention = dot(u_i, tl.trans(dz_q_i), zeros) * -tl.trans(reach(scale, slots, slots, M))
    attention = tl.where(slots[:, None] // M == slots[None, :] // M, attention, 0.0)
    dk_i = dot(attention.to(q_i.dtype), q_i, dk_i)
    # ... and to those after it, as the gradient [dW; db] of the model after it, times u_i.
    taught = dot(u_i, dW, tl.zeros([BLOCK, D], tl.float32))
    taught_bias = tl.sum(u_i.to(tl.float32) * tl.load(db1_group + d)[None, :], axis=1)
    for j in range(block, G * M // BLOCK):
        slots_j = slot + j * BLOCK + tl.arange(0, BLOCK)
        valid_j = (slots_j >= taken) & (slots_j < end)
        later = tl.trans(earlier(slots_j, slots, M))
        q_j = load_rows(q, stride_t, slots_j, valid_j, D)
        attention = dot(u_i, tl.trans(load_rows(dz_q, D, slots_j, slots_j < end, D)), zeros)
        attention = tl.where(later, attention, 0.0)
        taught = dot(attention.to(q_j.dtype), q_j, taught)
        taught_bias += tl.sum(attention, axis=1)
        k_j = load_rows(k, stride_t, slots_j, valid_j, D)
        attention = dot(u_i, tl.trans(load_rows(dz, D, slots_j, slots_j < end, D)), zeros)
        attention = tl.where(later, attention, 0.0)
        taught = dot(attention.to(k_j.dtype), k_j, taught)
        taught_bias += tl.sum(attention, axis=1)
    complete = (slots // M * M + M <= end).to(tl.float32)
    taught_scale = tl.sum(taught * k_i.to(tl.float32), axis=1) + taught_bias
    tl.store(dlast_scale + part, -tl.sum(taught_scale * complete, axis=0))
    dk_i -= (last_scale * complete)[:, None] * taught

    position_i = slots % M
    state = (row * H + head) * M * D
    kept = exists & (complete == 0)
    dk_i += load_rows(dpending_k_out + state, D, position_i, kept, D)
    store_rows(dk + token, stride_t, slots, valid, dk_i, D)
    store_rows(dpending_k + state, D, slots, slots < taken, dk_i, D)


@triton.jit
def decode(
    q, k, v, lr, mask, scale, ln_weight, ln_bias, W1, b1, pending_k, pending_u1, position, o, position_out,
    H, stride_b, stride_h, lr_stride_b, lr_stride_h,
    M: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One token of one row and head; the state is updated in place, but for the position, which other heads read."""
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    state = row * H + head
    d = tl.arange(0, D)
    token = row * stride_b + head.to(tl.int64) * stride_h + d
    taken = tl.load(position + row).to(tl.int32)
    if mask is not None:
        if tl.load(mask + row) == 0:
            tl.store(o + token, tl.zeros([D], o.dtype.element_ty))
            if head == 0:
                tl.store(position_out + row, taken.to(tl.int64))
            return
    W1 += state * D * D
    b1 += state * D
    pending_k += state * M * D
    pending_u1 += state * M * D
    slots = tl.arange(0, M)
    seen = (slots < taken)[:, None]
    W = tl.load(W1 + matrix(D, D))
    keys = tl.load(pending_k + matrix(M, D), mask=seen, other=0.0)
    us = tl.load(pending_u1 + matrix(M, D), mask=seen, other=0.0)
    b = tl.load(b1 + d)
    w = tl.load(ln_weight + head * D + d)
    bias = tl.load(ln_bias + head * D + d)
    q_t = tl.load(q + token).to(tl.float32)
    k_t = tl.load(k + token).to(tl.float32)
    v_t = tl.load(v + token).to(tl.float32)
    lr_t = tl.load(lr + row * lr_stride_b + head * lr_stride_h).to(tl.float32)

    z = tl.sum(tl.reshape(k_t, [D, 1]) * W, axis=0) + b
    z -= tl.sum(z, axis=0) / D
    rstd = tl.rsqrt(tl.sum(z * z, axis=0) / D + EPS)
    x = z * rstd
    e = (w * x + bias - v_t + k_t) * w
    u = lr_t * rstd * (e - tl.sum(e, axis=0) / D - x * (tl.sum(e * x, axis=0) / D))

    attention = tl.sum(keys * q_t[None, :], axis=1) + 1
    read = tl.sum(attention[:, None] * us, axis=0) + (tl.sum(q_t * k_t, axis=0) + 1) * u
    z = tl.sum(tl.reshape(q_t, [D, 1]) * W, axis=0) + b - tl.load(scale + taken) * read
    z -= tl.sum(z, axis=0) / D
    x = z * tl.rsqrt(tl.sum(z * z, axis=0) / D + EPS)
    tl.store(o + token, (q_t + x * w + bias).to(o.dtype.element_ty))

    if taken == M - 1:
        keys = tl.where(slots[:, None] == taken, k_t[None, :], keys)
        us = tl.where(slots[:, None] == taken, u[None, :], us) * -tl.load(scale + M - 1)
        dtype = q.dtype.element_ty  # as in a prefill
        tl.store(W1 + matrix(D, D), dot(tl.trans(keys.to(dtype)), us.to(dtype), W))
        tl.store(b1 + d, b + tl.sum(us, axis=0))
        tl.store(pending_k + matrix(M, D), tl.zeros([M, D], tl.float32))
        tl.store(pending_u1 + matrix(M, D), tl.zeros([M, D], tl.float32))
    else:
        tl.store(pending_k + taken * D + d, k_t)
        tl.store(pending_u1 + taken * D + d, u)
    if head == 0:
        tl.store(position_out + row, ((taken + 1) % M).to(tl.int64))
