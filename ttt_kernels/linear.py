# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""TTT-Linear as PyTorch ops: prefill with its gradient, and one step of decoding."""

import torch
import triton
from torch import Tensor

from . import linear_kernels as kernels
from .layout import new_tokens, number_of_groups, on_its_device, same_layout, strides, tensor_op, token_sizes


BLOCK = 64  # tokens of a program in the kernels over blocks of tokens
GROUP = 256  # slots between saved states


def _sizes(q, token_scale, position, packed):
    """Arguments that the kernels of a prefill share, by name."""
    sizes = token_sizes(q, token_scale, packed)
    groups = number_of_groups(q, position.shape[0], sizes["M"], GROUP)
    return sizes | {"groups": groups, "G": GROUP // sizes["M"]}


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
    state = (W1, b1, pending_k, pending_u1, position)
    state = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in state]
    u1 = _workspace(q, groups, GROUP, head_dim)
    W1_group = _workspace(q, groups, head_dim, head_dim)
    b1_group = _workspace(q, groups, head_dim, dtype=torch.float32)
    return new_tokens(q, starts, packed), *state, u1, W1_group, b1_group


@tensor_op(9)
@on_its_device
def linear_forward(q, k, v, lr, token_scale, ln_weight, ln_bias, W1, b1, pending_k, pending_u1, position,
                   starts: Tensor | None, ends: Tensor | None, packed: bool):  # fmt: skip
    """The output, the next state, and what the backward pass needs: u of each token, W1 and b1 of each group."""
    q, k, v = same_layout(q, k, v)
    lr = lr.contiguous()
    inputs = [x.contiguous() for x in (token_scale, ln_weight, ln_bias, W1, b1, pending_k, pending_u1, position)]
    scale, ln_weight, ln_bias, W1, b1, pending_k, pending_u1, position = inputs
    outputs = _allocate_forward(q, W1, b1, pending_k, pending_u1, position, starts, packed, scale)
    o, *state, u1, W1_group, b1_group = outputs
    sizes = _sizes(q, scale, position, packed)
    kernels.chain_forward[sizes["H"], position.shape[0]](
        k, v, lr, *inputs, starts, ends, u1, W1_group, b1_group, *state,
        **sizes, **strides(lr, "lr_stride"), **_launch(q),
    )  # fmt: skip
    kernels.outputs[sizes["groups"] * GROUP // BLOCK, sizes["H"]](
        q, k, scale, ln_weight, ln_bias, pending_k, position, starts, ends, u1, W1_group, b1_group, o,
        **sizes, **_block_sizes(position), **LAUNCH_BLOCKS,
    )  # fmt: skip
    return outputs


@linear_forward.register_fake
def _(q, k, v, lr, token_scale, ln_weight, ln_bias, W1, b1, pending_k, pending_u1, position, starts, ends, packed):
    (q,) = same_layout(q)
    return _allocate_forward(q, W1, b1, pending_k, pending_u1, position, starts, packed, token_scale)


def _allocate_backward(q, lr, token_scale, ln_weight, pending_k, starts, packed):
    rows, heads, _, head_dim = pending_k.shape
    return (
        *(new_tokens(x, starts, packed) for x in (q, q, q, lr)),
        torch.empty_like(token_scale), torch.empty_like(ln_weight), torch.empty_like(ln_weight),
        pending_k.new_empty(rows, heads, head_dim, head_dim), pending_k.new_empty(rows, heads, 1, head_dim),
        torch.zeros_like(pending_k), torch.zeros_like(pending_k),
    )  # fmt: skip


@tensor_op(11)
def linear_backward(do, dW1_out, db1_out, dpending_k_out, dpending_u1_out, q, k, v, lr, token_scale, ln_weight,
                    ln_bias, pending_k, position, starts: Tensor | None, ends: Tensor | None, u1, W1_group, b1_group,
                    packed: bool):  # fmt: skip
    """Gradients of `linear_forward` with respect to q, k, v, lr, token_scale, ln_weight, ln_bias and the state."""
    q, k, v, do = same_layout(q, k, v, do)
    lr = lr.contiguous()
    state_grads = [x.contiguous() for x in (dW1_out, db1_out, dpending_k_out, dpending_u1_out)]
    dW1_out, db1_out, dpending_k_out, dpending_u1_out = state_grads
    inputs = [x.contiguous() for x in (token_scale, ln_weight, ln_bias, pending_k, position)]
    scale, ln_weight, ln_bias, pending_k, position = inputs
    grads = _allocate_backward(q, lr, scale, ln_weight, pending_k, starts, packed)
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
        **sizes, **strides(lr, "lr_stride"), **_block_sizes(position), **LAUNCH_BLOCKS,
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
        **sizes, **strides(lr, "lr_stride"), **_block_sizes(position), **LAUNCH_BLOCKS,
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
    return _allocate_backward(q, lr, token_scale, ln_weight, pending_k, starts, packed)


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


@tensor_op(2, mutates_args=("W1", "b1", "pending_k", "pending_u1"))
@on_its_device
def linear_decode(q, k, v, lr, token_scale, ln_weight, ln_bias, W1, b1, pending_k, pending_u1, position,
                  attention_mask: Tensor | None):  # fmt: skip
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
