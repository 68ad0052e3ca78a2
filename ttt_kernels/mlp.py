# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""TTT-MLP as PyTorch ops: prefill with its gradient, and one step of decoding."""

import torch
import triton
from torch import Tensor

from . import mlp_kernels as kernels
from .layout import (
    first_group,
    new_tokens,
    number_of_groups,
    on_its_device,
    same_layout,
    strides,
    tensor_op,
    token_sizes,
)


BLOCK = 32  # hidden units at a time
GROUP = 8  # mini-batches between saved states
PROGRAMS = 512  # of the outputs in one launch: enough to fill a GPU, few enough for the models that they read


def _sizes(q, token_scale, packed):
    """Arguments that the kernels of a prefill share, by name."""
    return token_sizes(q, token_scale, packed) | {"F": 4 * q.shape[3]}


def _chain_sizes(lr):
    """Arguments that the kernels that read learning rates share besides."""
    return {"G": GROUP, **strides(lr, "lr_stride"), "num_warps": 8, "num_stages": 1}


LAUNCH_OUTPUTS = {"BLOCK": BLOCK, "num_warps": 4, "num_stages": 1}  # 8 warps would do the same products twice


def _mini_batches(q, token_scale, starts, ends, packed):
    """Of the longest row at most: where its tokens begin anywhere in a mini-batch."""
    longest = int((ends - starts).max()) if packed else q.shape[2]
    return triton.cdiv(longest + token_scale.shape[0] - 1, token_scale.shape[0])


def _workspace(q, model, m, slots):
    """What the chain hands on: the parts of z2 to its next launch, the rest (z1; u1, x2, u2; the models) by slot."""
    (rows, heads, D, F), dtypes = model[0].shape, (q.dtype, model[1].dtype) * 2
    z2_parts = model[0].new_empty(rows, heads, 2, F // D, m, D)
    z1 = model[0].new_empty(rows, heads, slots, m, F)
    left = [q.new_empty(rows, heads, slots, m, width) for width in (F, F, D)]
    models = [x.new_empty(rows, heads, slots, *x.shape[2:], dtype=dtype) for x, dtype in zip(model, dtypes)]
    return z2_parts, z1, left, models


def _allocate_groups(q, state, token_scale, save):
    m = token_scale.shape[0]
    groups = number_of_groups(q, state[0].shape[0], m, GROUP * m) if save else 0
    return [x.new_zeros(x.shape[1], groups, *x.shape[2:]) for x in state]


@tensor_op(14, tags=(torch.Tag.cudagraph_unsafe,))
@on_its_device
def mlp_forward(q, k, v, lr, token_scale, ln_weight, ln_bias, W1, b1, W2, b2, pending_k, pending_u1, pending_x2,
                pending_u2, position, starts: Tensor | None, ends: Tensor | None, packed: bool,
                save: bool):  # fmt: skip
    """The output, the next state, and, if `save`, the model at the start of each group for the backward pass."""
    q, k, v = same_layout(q, k, v)
    lr = lr.contiguous()
    parameters = [x.contiguous() for x in (token_scale, ln_weight, ln_bias)]
    pending = [x.contiguous() for x in (pending_k, pending_u1, pending_x2, pending_u2)]
    position = position.contiguous()
    o = new_tokens(q, starts, packed)
    model = [x.clone(memory_format=torch.contiguous_format) for x in (W1, b1, W2, b2)]
    pending_out = [torch.empty_like(x) for x in pending]
    position_out = torch.empty_like(position)
    groups = _allocate_groups(q, model, token_scale, save)

    (rows, heads, m, F), D = pending_u1.shape, q.shape[3]
    mini_batches = _mini_batches(q, token_scale, starts, ends, packed)
    together = max(1, min(PROGRAMS // (rows * heads), mini_batches))
    slots = together + 1  # the chain is one mini-batch ahead of the outputs
    z2_parts, z1, left, models = _workspace(q, model, m, slots)
    sizes, chain_sizes = _sizes(q, token_scale, packed), _chain_sizes(lr)
    done = 0
    for n in range(mini_batches + 1):
        kernels.chain_step[F // D, heads, rows](
            n, k, v, lr, *parameters, *pending, position, starts, ends, *model, *pending_out, position_out,
            *groups, z2_parts, z1, *left, *models, None, None,
            groups=groups[0].shape[1], FIRST=n == 0, SAVE=save, S=slots, **sizes, **chain_sizes,
        )  # fmt: skip
        if n - done == together or n == mini_batches > done:
            kernels.outputs[n - done, heads, rows](
                done, q, k, *parameters, pending[0], position, starts, ends, o, *left, *models,
                S=slots, **sizes, **LAUNCH_OUTPUTS,
            )  # fmt: skip
            done = n
    return o, *model, *pending_out, position_out, *groups


@mlp_forward.register_fake
def _(q, k, v, lr, token_scale, ln_weight, ln_bias, W1, b1, W2, b2, pending_k, pending_u1, pending_x2, pending_u2,
      position, starts, ends, packed, save):  # fmt: skip
    (q,) = same_layout(q)
    state = (W1, b1, W2, b2, pending_k, pending_u1, pending_x2, pending_u2, position)
    state = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in state]
    return torch.empty_like(q), *state, *_allocate_groups(q, state[:4], token_scale, save)


@tensor_op(15, tags=(torch.Tag.cudagraph_unsafe,))
def mlp_backward(grads: list[Tensor], q, k, v, lr, token_scale, ln_weight, ln_bias, pending_k, pending_u1, pending_x2,
                 pending_u2, position, starts: Tensor | None, ends: Tensor | None, W1_group, b1_group, W2_group,
                 b2_group, packed: bool):  # fmt: skip
    """Gradients of `mlp_forward` with respect to its first 15 inputs, from those of its first 9 outputs."""
    q, k, v, do = same_layout(q, k, v, grads[0])
    lr = lr.contiguous()
    scale, ln_weight, ln_bias, position = (x.contiguous() for x in (token_scale, ln_weight, ln_bias, position))
    pending = [x.contiguous() for x in (pending_k, pending_u1, pending_x2, pending_u2)]
    dmodel = [x.clone(memory_format=torch.contiguous_format) for x in grads[1:5]]
    dpending_out = [x.contiguous() for x in grads[5:9]]
    dpending = [torch.zeros_like(x) for x in pending]
    dtokens = [new_tokens(x, starts, packed) for x in (q, q, q, lr)]
    (rows, heads, m, F), D = pending_u1.shape, q.shape[3]
    dq, dk, dv, dlr = dtokens
    dpending_k, dpending_u1, dpending_x2, dpending_u2 = dpending
    dW1, db1, dW2, db2 = dmodel
    db2_parts = db2.expand(-1, -1, F // D, -1).contiguous()

    mini_batches = _mini_batches(q, scale, starts, ends, packed)
    slots = min(GROUP, mini_batches) + 1
    groups = (W1_group, b1_group, W2_group, b2_group)
    row = torch.arange(rows, device=q.device)
    begins = first_group(starts if packed else row * q.shape[2], row, m, GROUP * m)
    again = [torch.empty_like(x) for x in (*pending, position)]  # the state at the end, known already
    by_slot = (rows, heads, slots)
    z2_parts, z1, left, models = _workspace(q, dmodel, m, slots)
    u1, x2, u2 = left
    h, du1, dx2 = (dW1.new_empty(*by_slot, m, F) for _ in range(3))
    z2, du2, dg2 = (dW1.new_empty(*by_slot, m, D) for _ in range(3))
    x2_q, dy1 = q.new_empty(*by_slot, m, F), q.new_empty(*by_slot, m, F)
    dy2 = q.new_empty(*by_slot, m, D)
    dg2_parts, carried = torch.empty_like(z2_parts), dW1.new_empty(rows, heads, 2, m, F)
    dh = q.new_empty(rows, heads, 2, m, F)
    taught, dk_parts = dW1.new_empty(*by_slot, F // D, m, D), dW1.new_empty(*by_slot, F // D + 1, m, D)
    row_parts, db2_slot = dW1.new_empty(*by_slot, F // D, 2, m), dW1.new_empty(*by_slot, D)
    dscale, dln = torch.zeros_like(scale), scale.new_zeros(heads, 2, D)
    sizes, chain_sizes = _sizes(q, scale, packed), _chain_sizes(lr)
    for first in reversed(range(0, mini_batches, GROUP)):
        last = min(first + GROUP, mini_batches)
        number = (begins + first // GROUP).clamp(max=W1_group.shape[1] - 1)
        model = [x[:, number].transpose(0, 1).contiguous() for x in groups]
        for n in range(first, last + 1):
            kernels.chain_step[F // D, heads, rows](
                n, k, v, lr, scale, ln_weight, ln_bias, *pending, position, starts, ends, *model, *again,
                *groups, z2_parts, z1, *left, *models, h, z2,
                groups=0, FIRST=n == first, SAVE=False, S=slots, **sizes, **chain_sizes,
            )  # fmt: skip
        dscale_parts = scale.new_zeros(2, rows, heads, GROUP, m)
        dln_parts = scale.new_zeros(2, rows, heads, GROUP, 2, D)
        kernels.outputs_backward[last - first, heads, rows](
            first, do, q, k, scale, ln_weight, pending[0], position, starts, ends, *left, *models,
            x2_q, dy1, dy2, du1, dx2, du2, dq, dk_parts, dscale_parts[0], dln_parts[0],
            G=GROUP, S=slots, **sizes, **LAUNCH_OUTPUTS,
        )  # fmt: skip
        for n in reversed(range(first - 1, last)):
            kernels.chain_step_backward[F // D, heads, rows](
                n, first, q, k, v, lr, scale, ln_weight, ln_bias, pending[0], position, starts, ends,
                *dpending_out[1:], z1, *left, models[0], models[2], h, z2,
                x2_q, dy1, dy2, du1, dx2, du2, dg2_parts, dg2, dh, carried, taught, dk_parts, row_parts,
                dW1, db1, dW2, db2_parts, db2_slot, dpending_u1, dpending_x2, S=slots, **sizes, **chain_sizes,
            )  # fmt: skip
        kernels.tokens_backward[last - first, heads, rows](
            first, k, v, lr, scale, ln_weight, ln_bias, pending[0], position, starts, ends,
            dpending_out[0], dpending_out[3], u2, z2, du2, dg2, taught, dk_parts, row_parts, db2_slot,
            dk, dv, dlr, dpending_k, dpending_u2, dscale_parts[1], dln_parts[1], S=slots, **sizes, **chain_sizes,
        )  # fmt: skip
        dscale += dscale_parts.sum((0, 1, 2, 3))
        dln += dln_parts.sum((0, 1, 3))
    db2 = db2_parts[:, :, :1].clone()
    return *dtokens, dscale, dln[:, 0].clone(), dln[:, 1].clone(), dW1, db1, dW2, db2, *dpending


@mlp_backward.register_fake
def _(grads, q, k, v, lr, token_scale, ln_weight, ln_bias, pending_k, pending_u1, pending_x2, pending_u2, position,
      starts, ends, W1_group, b1_group, W2_group, b2_group, packed):  # fmt: skip
    (q,) = same_layout(q)
    others = (lr, token_scale, ln_weight, ln_bias, *grads[1:5], pending_k, pending_u1, pending_x2, pending_u2)
    others = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in others]
    return *(torch.empty_like(q) for _ in range(3)), *others


def _setup_context(ctx, inputs, output):
    tokens, pending = inputs[:7], inputs[11:18]  # with position, starts, ends
    ctx.save_for_backward(*tokens, *pending, *output[10:])
    ctx.packed, ctx.save = inputs[18:]
    ctx.outputs = [(x.shape, x.dtype) for x in output[:9]]
    ctx.mark_non_differentiable(*output[9:])
    ctx.set_materialize_grads(False)


def _backward(ctx, *grads):
    if not ctx.save:
        raise RuntimeError("`mlp_forward` needs `save=True` for its gradient.")
    saved = ctx.saved_tensors
    grads = [
        saved[0].new_zeros(shape, dtype=dtype) if g is None else g for g, (shape, dtype) in zip(grads, ctx.outputs)
    ]
    return *mlp_backward(grads, *saved, ctx.packed), None, None, None, None, None


mlp_forward.register_autograd(_backward, setup_context=_setup_context)


@tensor_op(2, mutates_args=("W1", "b1", "W2", "b2", "pending_k", "pending_u1", "pending_x2", "pending_u2"))
@on_its_device
def mlp_decode(q, k, v, lr, token_scale, ln_weight, ln_bias, W1, b1, W2, b2, pending_k, pending_u1, pending_x2,
               pending_u2, position, attention_mask: Tensor | None):  # fmt: skip
    """The output and the next position; the rest of the state is updated in place."""
    q, k, v = same_layout(q, k, v)
    o, position_out = torch.empty_like(q), torch.empty_like(position)
    y1 = W1.new_empty(q.shape[0], q.shape[1], 2, W1.shape[3])
    kernels.decode[q.shape[1], q.shape[0]](
        q, k, v, lr, attention_mask, token_scale, ln_weight, ln_bias, W1, b1, W2, b2,
        pending_k, pending_u1, pending_x2, pending_u2, position, o, position_out, y1,
        q.shape[1], *q.stride()[:2], *lr.stride()[:2],
        M=token_scale.shape[0], D=q.shape[3], F=W1.shape[3], BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    return o, position_out


@mlp_decode.register_fake
def _(q, k, v, lr, token_scale, ln_weight, ln_bias, W1, b1, W2, b2, pending_k, pending_u1, pending_x2, pending_u2,
      position, attention_mask):  # fmt: skip
    (q,) = same_layout(q)
    return torch.empty_like(q), torch.empty_like(position)
