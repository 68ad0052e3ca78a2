# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""TTT-MLP as PyTorch ops: prefill with its gradient, and one step of decoding."""

import torch
import triton
from torch import Tensor

from . import mlp_kernels as kernels
from ._ops import add_op_namespace_prefix
from .layout import number_of_groups, same_layout


BLOCK = 64  # hidden units at a time
GROUP = 8  # mini-batches between saved states
PROGRAMS = 512  # of the outputs in one launch: enough to fill a GPU, few enough for the models that they read


def _sizes(q, token_scale, packed):
    """Arguments that the kernels of a prefill share, by name."""
    return {
        "T": q.shape[2],
        "H": q.shape[1],
        **dict(zip(("stride_b", "stride_h", "stride_t"), q.stride())),
        "PACKED": packed,
        "M": token_scale.shape[0],
        "D": q.shape[3],
        "F": 4 * q.shape[3],
        "num_warps": 8 if q.shape[3] >= 64 else 4,
        "num_stages": 1,
    }


def _chain_sizes(q, lr, token_scale, W1):
    """Arguments that the kernels over rows share besides."""
    lr_strides = dict(zip(("lr_stride_b", "lr_stride_h", "lr_stride_t"), lr.stride()))
    return {"groups": _groups(q, W1, token_scale), "G": GROUP, **lr_strides}


def _groups(q, W1, token_scale):
    return number_of_groups(q, W1.shape[0], token_scale.shape[0], GROUP * token_scale.shape[0])


def _allocate_groups(q, state, token_scale, save):
    groups = _groups(q, state[0], token_scale) if save else 0
    return [x.new_zeros(x.shape[1], groups, *x.shape[2:]) for x in state]


@torch.library.custom_op(add_op_namespace_prefix("mlp_forward"), mutates_args=())
def mlp_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    token_scale: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    W1: Tensor,
    b1: Tensor,
    W2: Tensor,
    b2: Tensor,
    pending_k: Tensor,
    pending_u1: Tensor,
    pending_x2: Tensor,
    pending_u2: Tensor,
    position: Tensor,
    starts: Tensor | None,
    ends: Tensor | None,
    packed: bool,
    save: bool,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:
    """The output, the next state, and, if `save`, the model at the start of each group for the backward pass."""
    q, k, v = same_layout(q, k, v)
    lr = lr.contiguous()
    parameters = [x.contiguous() for x in (token_scale, ln_weight, ln_bias)]
    pending = [x.contiguous() for x in (pending_k, pending_u1, pending_x2, pending_u2)]
    position = position.contiguous()
    o = torch.zeros_like(q) if starts is not None and not packed else torch.empty_like(q)
    model = [x.clone(memory_format=torch.contiguous_format) for x in (W1, b1, W2, b2)]
    pending_out = [torch.empty_like(x) for x in pending]
    position_out = torch.empty_like(position)
    groups = _allocate_groups(q, model, token_scale, save)

    (rows, heads, m, F), D = pending_u1.shape, q.shape[3]
    mini_batches = triton.cdiv(q.shape[2] + m - 1, m)  # of a row at most
    together = max(1, min(PROGRAMS // (rows * heads), mini_batches))
    slots = together + 1  # the chain is one mini-batch ahead of the outputs
    z1, z2 = W1.new_empty(rows, heads, 2, m, F), W1.new_empty(rows, heads, 2, F // D, m, D)
    left = [q.new_empty(rows, heads, slots, m, width) for width in (F, F, D)]
    dtypes = (q.dtype, W1.dtype, q.dtype, W1.dtype)
    models = [x.new_empty(rows, heads, slots, *x.shape[2:], dtype=dtype) for x, dtype in zip(model, dtypes)]
    sizes, chain_sizes = _sizes(q, token_scale, packed), _chain_sizes(q, lr, token_scale, W1)
    done = 0
    for n in range(mini_batches + 1):
        kernels.chain_step[F // D, heads, rows](
            n, k, v, lr, *parameters, *pending, position, starts, ends, *model, *pending_out, position_out,
            *groups, z1, z2, *left, *models, FIRST=n == 0, SAVE=save, S=slots, **sizes, **chain_sizes,
        )  # fmt: skip
        if n - done == together or n == mini_batches > done:
            kernels.outputs[n - done, heads, rows](
                done, q, k, *parameters, pending[0], position, starts, ends, o, *left, *models,
                S=slots, BLOCK=min(BLOCK, F), **sizes,
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


@torch.library.custom_op(add_op_namespace_prefix("mlp_backward"), mutates_args=())
def mlp_backward(
    grads: list[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    token_scale: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    pending_k: Tensor,
    pending_u1: Tensor,
    pending_x2: Tensor,
    pending_u2: Tensor,
    position: Tensor,
    starts: Tensor | None,
    ends: Tensor | None,
    W1_group: Tensor,
    b1_group: Tensor,
    W2_group: Tensor,
    b2_group: Tensor,
    packed: bool,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
    Tensor,
]:  # fmt: skip
    """Gradients of `mlp_forward` with respect to its first 15 inputs, from those of its first 9 outputs."""
    q, k, v, do = same_layout(q, k, v, grads[0])
    lr = lr.contiguous()
    parameters = [x.contiguous() for x in (token_scale, ln_weight, ln_bias)]
    pending = [x.contiguous() for x in (pending_k, pending_u1, pending_x2, pending_u2)]
    dmodel = [x.clone(memory_format=torch.contiguous_format) for x in grads[1:5]]
    dpending_out = [x.contiguous() for x in grads[5:9]]
    dpending = [torch.zeros_like(x) for x in pending]
    like = torch.zeros_like if starts is not None and not packed else torch.empty_like
    dtokens = [like(q), like(q), like(q), like(lr)]
    rows, heads, m, width = pending_u1.shape
    head_dim = q.shape[3]
    states = [x.new_empty(rows, heads, GROUP + 1, *x.shape[2:]) for x in (W1_group, b1_group, W2_group, b2_group)]
    scratch = pending_u1.new_empty(rows, heads, 4, m, width)
    dscale, dln = pending_u1.new_empty(rows, heads, m), pending_u1.new_empty(rows, heads, 2, head_dim)
    kernels.backward[heads, rows](
        do, *dpending_out, q, k, v, lr, *parameters, *pending, position.contiguous(), starts, ends,
        W1_group, b1_group, W2_group, b2_group, *states, scratch, *dtokens, dscale, dln, *dmodel, *dpending,
        **_sizes(q, token_scale, packed), **_chain_sizes(q, lr, token_scale, dmodel[0]), BLOCK=BLOCK,
    )  # fmt: skip
    dln = dln.sum(0)
    return *dtokens, dscale.sum((0, 1)), dln[:, 0].clone(), dln[:, 1].clone(), *dmodel, *dpending


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


@torch.library.custom_op(
    add_op_namespace_prefix("mlp_decode"),
    mutates_args=("W1", "b1", "W2", "b2", "pending_k", "pending_u1", "pending_x2", "pending_u2"),
)
def mlp_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    token_scale: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    W1: Tensor,
    b1: Tensor,
    W2: Tensor,
    b2: Tensor,
    pending_k: Tensor,
    pending_u1: Tensor,
    pending_x2: Tensor,
    pending_u2: Tensor,
    position: Tensor,
    attention_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The output and the next position; the rest of the state is updated in place."""
    q, k, v = same_layout(q, k, v)
    o, position_out = torch.empty_like(q), torch.empty_like(position)
    y1 = W1.new_empty(q.shape[0], q.shape[1], 2, W1.shape[3])
    kernels.decode[q.shape[1], q.shape[0]](
        q, k, v, lr, attention_mask, token_scale, ln_weight, ln_bias, W1, b1, W2, b2,
        pending_k, pending_u1, pending_x2, pending_u2, position, o, position_out, y1,
        q.shape[1], *q.stride()[:2], *lr.stride()[:2],
        M=token_scale.shape[0], D=q.shape[3], F=W1.shape[3], BLOCK=BLOCK // 2, num_warps=8,
    )  # fmt: skip
    return o, position_out


@mlp_decode.register_fake
def _(q, k, v, lr, token_scale, ln_weight, ln_bias, W1, b1, W2, b2, pending_k, pending_u1, pending_x2, pending_u2,
      position, attention_mask):  # fmt: skip
    (q,) = same_layout(q)
    return torch.empty_like(q), torch.empty_like(position)
