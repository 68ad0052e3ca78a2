# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
Triton kernels for the inner loop of Test-Time Training: TTT-Linear and TTT-MLP of arXiv 2407.04620.

Plain tensors in and out; the package needs torch and Triton only.
"""

import torch
from torch import Tensor

from .layout import has_holes, rows_of, unsupported
from .linear import linear_decode, linear_forward
from .mlp import mlp_decode, mlp_forward


def ttt_linear(
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
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """
    TTT-Linear over T more tokens (arXiv 2407.04620, dual form), with gradients for all but `position`.

    Args:
        q, k, v: `[B, H, T, D]`, float16, bfloat16 or float32; D 16, 32, 64 or 128.
        lr: `[B, H, T]`, inner learning rate of each token, base_lr / D included.
        token_scale: `[m]`, scale by position in the mini-batch; m 16, 32 or 64.
        ln_weight, ln_bias: `[H, D]`, the inner LayerNorm.
        W1, b1: float32 `[R, H, D, D]` and `[R, H, 1, D]`, the inner model of each of R rows at the start of its
            mini-batch. R is B, or the number of packed sequences.
        pending_k, pending_u1: float32 `[R, H, m, D]`, the mini-batch's keys so far and their lr * dl/dz, then 0.
        position: int64 `[R]`, the number of pending rows, below m.
        attention_mask: `[B, T]`, 0 for padding, which changes no state, outputs 0 and has gradients of 0.
        cu_seqlens: `[R + 1]` integers, bounds of R sequences packed in the one row of q, k, v: from 0 to T, and not
            decreasing, which is not checked, as that would wait for the GPU.

    Returns:
        The output q + LN(f(q)), and the state (W1, b1, pending_k, pending_u1, position) after these tokens.

    Raises:
        ValueError: tensors that the kernels cannot take.
    """
    return _prefill(linear_forward, q, k, v, lr, token_scale, ln_weight, ln_bias,
                    (W1, b1, pending_k, pending_u1, position), attention_mask, cu_seqlens)  # fmt: skip


def ttt_linear_decode(
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
    attention_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """
    [`ttt_linear`] of one token per row without gradients, in one launch. `W1`, `b1`, `pending_k` and `pending_u1`, all
    contiguous, are updated in place; the output and the next position are returned.
    """
    return _decode(linear_decode, q, k, v, lr, token_scale, ln_weight, ln_bias,
                   (W1, b1, pending_k, pending_u1, position), attention_mask)  # fmt: skip


def ttt_mlp(
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
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """
    TTT-MLP over T more tokens: as [`ttt_linear`], with the inner model W1 `[R, H, D, 4 D]`, b1 `[R, H, 1, 4 D]`,
    W2 `[R, H, 4 D, D]`, b2 `[R, H, 1, D]`, and four pending rows per token: its key `[R, H, m, D]`, lr * dl/dz1 and
    gelu(z1) `[R, H, m, 4 D]`, lr * dl/dz2 `[R, H, m, D]`.
    """
    state = (W1, b1, W2, b2, pending_k, pending_u1, pending_x2, pending_u2, position)
    tensors = (q, k, v, lr, token_scale, ln_weight, ln_bias, *state)
    save = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return _prefill(mlp_forward, q, k, v, lr, token_scale, ln_weight, ln_bias, state, attention_mask, cu_seqlens, save)


def ttt_mlp_decode(
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
    attention_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """[`ttt_mlp`] of one token per row, as [`ttt_linear_decode`]."""
    state = (W1, b1, W2, b2, pending_k, pending_u1, pending_x2, pending_u2, position)
    return _decode(mlp_decode, q, k, v, lr, token_scale, ln_weight, ln_bias, state, attention_mask)


def _check(q, token_scale, state):
    reason = unsupported(q, token_scale, state[0])
    if reason is not None:
        raise ValueError(f"The TTT kernels cannot run: {reason}.")


def _prefill(op, q, k, v, lr, token_scale, ln_weight, ln_bias, state, attention_mask, cu_seqlens, *options):
    _check(q, token_scale, state)
    parameters = [x.float() for x in (token_scale, ln_weight, ln_bias)]
    attention_mask, cu_seqlens = (
        x if x is None else x.to(q.device, non_blocking=q.is_cuda).contiguous() for x in (attention_mask, cu_seqlens)
    )
    tokens, order = (q, k, v, lr), None
    if attention_mask is not None and (torch.compiler.is_compiling() or has_holes(attention_mask)):
        # The kernels take runs of tokens: bring each row's together at its start, and back afterwards.
        order = (attention_mask == 0).int().argsort(dim=1, stable=True)  # [B, T]
        attention_mask = attention_mask.gather(1, order)
        tokens = [_gather(x, order) for x in tokens]
    starts, ends = rows_of(attention_mask, cu_seqlens)
    o, *rest = op(*tokens, *parameters, *state, starts, ends, cu_seqlens is not None, *options)
    if order is not None:
        o = _gather(o, order.argsort(dim=1))
    return o, tuple(rest[: len(state)])


def _gather(x, order):
    index = order[:, None] if x.dim() == 3 else order[:, None, :, None]
    return x.gather(2, index.expand(x.shape))


def _decode(op, q, k, v, lr, token_scale, ln_weight, ln_bias, state, attention_mask):
    _check(q, token_scale, state)
    if q.shape[2] != 1 or not all(x.is_contiguous() for x in state):
        raise ValueError("The TTT decode kernels need one token per row and a contiguous state.")
    parameters = [x.float().contiguous() for x in (token_scale, ln_weight, ln_bias)]
    if attention_mask is not None:
        attention_mask = attention_mask.to(q.device).contiguous()
    return op(q, k, v, lr, *parameters, *state, attention_mask)


__all__ = ["ttt_linear", "ttt_linear_decode", "ttt_mlp", "ttt_mlp_decode", "unsupported"]
