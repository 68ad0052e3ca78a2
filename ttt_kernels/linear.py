# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""TTT-Linear as PyTorch ops: prefill with its gradient, and one step of decoding."""

import torch
import triton
from torch import Tensor

from . import linear_kernels as kernels
from ._ops import add_op_namespace_prefix
from .layout import number_of_groups, on_its_device, same_layout


BLOCK = 64  # tokens of a program in the kernels over blocks of tokens
GROUP = 256  # slots between saved states


def _sizes(q, token_scale, position, packed):
    """Arguments that the kernels over blocks of tokens share, by name."""
    rows, mini_batch_size = position.shape[0], token_scale.shape[0]
    return {
        "T": q.shape[2],
        "H": q.shape[1],
        "groups": number_of_groups(q, rows, mini_batch_size, GROUP),
        "stride_b": q.stride(0),
        "stride_h": q.stride(1),
        "stride_t": q.stride(2),
        "PACKED": packed,
        "M": mini_batch_size,
        "G": GROUP // mini_batch_size,
        "D": q.shape[3],
    }


def _chain_sizes(lr):
    """Arguments that the kernels over rows share besides."""
    return dict(zip(("lr_stride_b", "lr_stride_h", "lr_stride_t"), lr.stride()))


def _block_sizes(position):
    """Arguments that the kernels over blocks of tokens share besides."""
    rows = position.shape[0]
    return {"BLOCK": BLOCK, "R": rows, "R_BLOCK": triton.next_power_of_2(rows)}


def _launch(q):
    """One stage: more of them in flight cost registers, whose spills then take longer than the loads (measured)."""
    return {"num_warps": 8 if q.shape[3] == 128 else 4, "num_stages": 1}


LAUNCH_BLOCKS = {"num_warps": 4, "num_stages": 1}


def _workspace(q, groups, *shape, dtype=None):
    """A temporary of one entry per slot, or per group if `shape` says so."""
    return q.new_empty(q.shape[1], groups, *shape, dtype=dtype or q.dtype)


def _allocate_forward(q, W1, b1, pending_k, pending_u1, position, starts, packed, token_scale):
    groups, head_dim = number_of_groups(q, position.shape[0], token_scale.shape[0], GROUP), q.shape[3]
    o = torch.zeros_like(q) if starts is not None and not packed else torch.empty_like(q)
    state = (W1, b1, pending_k, pending_u1, position)
    state = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in state]
    u1 = _workspace(q, groups, GROUP, head_dim)
    W1_group = _workspace(q, groups, head_dim, head_dim)
    b1_group = _workspace(q, groups, head_dim, dtype=torch.float32)
    return o, *state, u1, W1_group, b1_group


@torch.library.custom_op(add_op_namespace_prefix("linear_forward"), mutates_args=())
@on_its_device
def linear_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    token_scale: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    W1: Tensor,
    b1: Tensor,
    pending_k: Tensor,
    pending_u1: Tensor,
    position: Tensor,
    starts: Tensor | None,
    ends: Tensor | None,
    packed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output, the next state, and what the backward pass needs: u of each token, W1 and b1 of each group."""
    q, k, v = same_layout(q, k, v)
    lr = lr.contiguous()
    inputs = [x.contiguous() for x in (token_scale, ln_weight, ln_bias, W1, b1, pending_k, pending_u1, position)]
    scale, ln_weight, ln_bias, W1, b1, pending_k, pending_u1, position = inputs
    outputs = _allocate_forward(q, W1, b1, pending_k, pending_u1, position, starts, packed, scale)
    o, *state, u1, W1_group, b1_group = outputs
    sizes = _sizes(q, scale, position, packed)
    kernels.chain_forward[sizes["H"], position.shape[0]](
        k, v, lr, *inputs, starts, ends, u1, W1_group, b1_group, *state, **sizes, **_chain_sizes(lr), **_launch(q)
    )
    kernels.outputs[sizes["groups"] * GROUP // BLOCK, sizes["H"]](
        q, k, scale, ln_weight, ln_bias, pending_k, position, starts, ends, u1, W1_group, b1_group, o,
        **sizes, **_block_sizes(position), **LAUNCH_BLOCKS,
    )  # fmt: skip
    return outputs


@linear_forward.register_fake
def _(q, k, v, lr, token_scale, ln_weight, ln_bias, W1, b1, pending_k, pending_u1, position, starts, ends, packed):
    (q,) = same_layout(q)
    return _allocate_forward(q, W1, b1, pending_k, pending_u1, position, starts, packed, token_scale)


def _allocate_backward(q, lr, ln_weight, W1_group, pending_k, starts, packed, token_scale):
    like = torch.zeros_like if starts is not None and not packed else torch.empty_like
    (rows, heads, _, head_dim), state = pending_k.shape, torch.zeros_like(pending_k)
    return (
        like(q), like(q), like(q), like(lr),
        torch.empty_like(token_scale), torch.empty_like(ln_weight), torch.empty_like(ln_weight),
        pending_k.new_empty(rows, heads, head_dim, head_dim), pending_k.new_empty(rows, heads, 1, head_dim),
        state, torch.zeros_like(state),
    )  # fmt: skip


@torch.library.custom_op(add_op_namespace_prefix("linear_backward"), mutates_args=())
def linear_backward(
    do: Tensor,
    dW1_out: Tensor,
    db1_out: Tensor,
    dpending_k_out: Tensor,
    dpending_u1_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    token_scale: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    pending_k: Tensor,
    position: Tensor,
    starts: Tensor | None,
    ends: Tensor | None,
    u1: Tensor,
    W1_group: Tensor,
    b1_group: Tensor,
    packed: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `linear_forward` with respect to q, k, v, lr, token_scale, ln_weight, ln_bias and the state."""
    q, k, v, do = same_layout(q, k, v, do)
    lr = lr.contiguous()
    state_grads = [x.contiguous() for x in (dW1_out, db1_out, dpending_k_out, dpending_u1_out)]
    dW1_out, db1_out, dpending_k_out, dpending_u1_out = state_grads
    inputs = [x.contiguous() for x in (token_scale, ln_weight, ln_bias, pending_k, position)]
    scale, ln_weight, ln_bias, pending_k, position = inputs
    grads = _allocate_backward(q, lr, ln_weight, W1_group, pending_k, starts, packed, scale)
    dq, dk, dv, dlr, dscale, dln_weight, dln_bias, dW1, db1, dpending_k, dpending_u1 = grads
    sizes = _sizes(q, scale, position, packed)
    groups, heads, head_dim = sizes["groups"], sizes["H"], sizes["D"]
    dz_q, x, g, dz = (_workspace(q, groups, GROUP, head_dim) for _ in range(4))
    du1 = _workspace(q, groups, GROUP, head_dim, dtype=torch.float32)  # float32: its rounding is dlr's largest error
    db_q = _workspace(q, groups, sizes["G"], head_dim, dtype=torch.float32)
    statistics = _workspace(q, groups, GROUP, 5, dtype=torch.float32)
    dW1_group, db1_group = torch.empty_like(W1_group), torch.empty_like(b1_group)
    blocks = groups * GROUP // BLOCK
    dscale_parts = scale.new_zeros(blocks, heads, BLOCK)
    dlast_scale_parts = scale.new_zeros(blocks, heads)
    dln_parts = scale.new_zeros(2, blocks, heads, 2, head_dim)

    kernels.before_chain_backward[blocks, heads](
        q, k, v, lr, *inputs, starts, ends, u1, W1_group, b1_group, do, dpending_u1_out,
        dz_q, db_q, du1, x, g, statistics, dscale_parts, dln_parts[0],
        **sizes, **_chain_sizes(lr), **_block_sizes(position), **LAUNCH_BLOCKS,
    )  # fmt: skip
    kernels.chain_backward[heads, position.shape[0]](
        q, k, scale, ln_weight, pending_k, position, starts, ends, dz_q, db_q, du1, x, g, statistics, dW1_out, db1_out,
        dz, dW1_group, db1_group, dW1, db1, dpending_u1,
        **sizes, **_launch(q),
    )  # fmt: skip
    kernels.after_chain_backward[blocks, heads](
        q, k, v, lr, *inputs, starts, ends, u1, W1_group, do,
        dz_q, x, statistics, dz, du1, dW1_group, db1_group, dpending_k_out,
        dq, dk, dv, dlr, dpending_k, dlast_scale_parts, dln_parts[1],
        **sizes, **_chain_sizes(lr), **_block_sizes(position), **LAUNCH_BLOCKS,
    )  # fmt: skip
    dscale.copy_(dscale_parts.view(-1, scale.shape[0]).sum(0))
    dscale[-1] += dlast_scale_parts.sum()
    dln_weight.copy_(dln_parts[..., 0, :].sum((0, 1)))
    dln_bias.copy_(dln_parts[..., 1, :].sum((0, 1)))
    return grads


@linear_backward.register_fake
def _(do, dW1_out, db1_out, dpending_k_out, dpending_u1_out, q, k, v, lr, token_scale, ln_weight, ln_bias, pending_k,
      position, starts, ends, u1, W1_group, b1_group, packed):  # fmt: skip
    (q,) = same_layout(q)
    lr, ln_weight, pending_k = lr.contiguous(), ln_weight.contiguous(), pending_k.contiguous()
    return _allocate_backward(q, lr, ln_weight, W1_group, pending_k, starts, packed, token_scale)


def _setup_context(ctx, inputs, output):
    q, k, v, lr, token_scale, ln_weight, ln_bias, _, _, pending_k, _, position, starts, ends, packed = inputs
    o, *state, u1, W1_group, b1_group = output
    ctx.save_for_backward(
        q, k, v, lr, token_scale, ln_weight, ln_bias, pending_k, position, starts, ends, u1, W1_group, b1_group
    )
    ctx.packed = packed
    ctx.shapes = [x.shape for x in (o, *state[:4])]
    ctx.mark_non_differentiable(state[4], u1, W1_group, b1_group)
    ctx.set_materialize_grads(False)


def _backward(ctx, *grads):
    saved = ctx.saved_tensors
    q, pending_k = saved[0], saved[7]
    like = (q, *[pending_k] * 4)
    grads = [x.new_zeros(shape) if g is None else g for g, x, shape in zip(grads, like, ctx.shapes)]
    grads = linear_backward(*grads, *saved, ctx.packed)
    return *grads, None, None, None, None


linear_forward.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op(
    add_op_namespace_prefix("linear_decode"), mutates_args=("W1", "b1", "pending_k", "pending_u1")
)
@on_its_device
def linear_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    token_scale: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    W1: Tensor,
    b1: Tensor,
    pending_k: Tensor,
    pending_u1: Tensor,
    position: Tensor,
    attention_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The output and the next position; the rest of the state is updated in place."""
    q, k, v = same_layout(q, k, v)
    o, position_out = torch.empty_like(q), torch.empty_like(position)
    kernels.decode[(q.shape[1], q.shape[0])](
        q, k, v, lr, attention_mask, token_scale, ln_weight, ln_bias, W1, b1, pending_k, pending_u1, position,
        o, position_out, q.shape[1], q.stride(0), q.stride(1), lr.stride(0), lr.stride(1),
        M=token_scale.shape[0], D=q.shape[3], num_warps=8,
    )  # fmt: skip
    return o, position_out


@linear_decode.register_fake
def _(q, k, v, lr, token_scale, ln_weight, ln_bias, W1, b1, pending_k, pending_u1, position, attention_mask):
    (q,) = same_layout(q)
    return torch.empty_like(q), torch.empty_like(position)
