# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Where tokens and temporaries are in memory, and what the kernels can take."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from ._ops import add_op_namespace_prefix


def unsupported(q: torch.Tensor, token_scale: torch.Tensor, W1: torch.Tensor) -> str | None:
    """Why the kernels cannot take these tensors, or None if they can."""
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"activations must be float16, bfloat16 or float32, got {q.dtype}"
    if W1.dtype != torch.float32:
        return f"the state must be float32, got {W1.dtype}"
    if q.shape[-1] not in (16, 32, 64, 128):
        return f"the head size must be 16, 32, 64 or 128, got {q.shape[-1]}"
    if W1.shape[-1] not in (q.shape[-1], 4 * q.shape[-1]):
        return f"an inner MLP must have 4 times the head size of hidden units, got {W1.shape[-1]}"
    if token_scale.shape[0] not in (16, 32, 64):
        return f"the mini-batch size must be 16, 32 or 64, got {token_scale.shape[0]}"
    return None


def same_layout(x: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`x` and `others` `[B, H, T, D]` in one dense layout with contiguous rows of D, that of `x` if it is one."""
    if x.stride(-1) != 1 or torch.empty_like(x, device="meta").stride() != x.stride():
        x = x.contiguous()
    return x, *(y if y.stride() == x.stride() else torch.empty_like(x).copy_(y) for y in others)


def new_tokens(x: torch.Tensor, starts: torch.Tensor | None, packed: bool) -> torch.Tensor:
    """Room for tensors such as `x` of all tokens, 0 where padding leaves it unwritten."""
    return torch.zeros_like(x) if starts is not None and not packed else torch.empty_like(x)


def strides(x: torch.Tensor, name: str) -> dict[str, int]:
    """The strides of tokens `[B, H, T, ...]` by the kernels' names of them."""
    return dict(zip((f"{name}_b", f"{name}_h", f"{name}_t"), x.stride()))


def token_sizes(q: torch.Tensor, token_scale: torch.Tensor, packed: bool) -> dict[str, int]:
    """Arguments of every kernel of a prefill, by name."""
    sizes = {"T": q.shape[2], "H": q.shape[1], "PACKED": packed, "M": token_scale.shape[0], "D": q.shape[3]}
    return sizes | strides(q, "stride")


def rows_of(
    attention_mask: torch.Tensor | None, cu_seqlens: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """First token of each row of the state and the token after its last one, or None where these are 0 and T."""
    if cu_seqlens is not None:
        return cu_seqlens[:-1], cu_seqlens[1:]
    if attention_mask is None:
        return None, None
    mask = attention_mask != 0
    starts = mask.int().argmax(1)
    return starts, starts + mask.sum(1)


def has_holes(attention_mask: torch.Tensor) -> torch.Tensor:
    """Whether padding stands between tokens of a row of `attention_mask` `[B, T]`."""
    mask = (attention_mask != 0).int()
    return (mask.diff(dim=1, prepend=mask.new_zeros(mask.shape[0], 1)) == 1).sum(1).max() > 1


def first_group(bound: int | torch.Tensor, row: int | torch.Tensor, mini_batch_size: int, group: int):
    """The first group (of `group` slots) of a row that has `bound` tokens in the rows before it, as in `span`."""
    return (bound + row * (mini_batch_size - 1)) // group + row


def number_of_groups(q: torch.Tensor, rows: int, mini_batch_size: int, group: int) -> int:
    """An upper bound on the groups (of `group` slots) of all rows, whatever their lengths."""
    return first_group(q.shape[0] * q.shape[2], rows, mini_batch_size, group)


def on_its_device(op: Callable) -> Callable:
    """Run `op` on the GPU of its first tensor: Triton launches on the current one, which autograd sets by itself."""

    @functools.wraps(op)
    def run(q, *args, **kwargs):
        with torch.cuda.device_of(q):
            return op(q, *args, **kwargs)

    return run


def tensor_op(outputs: int, mutates_args: tuple[str, ...] = (), **kwargs: Any) -> Callable:
    """`torch.library.custom_op` of a function of tensors (what has no type is one) that returns `outputs` of them."""

    def define(op):
        function = inspect.unwrap(op)
        tensors = dict.fromkeys(inspect.signature(function).parameters, torch.Tensor)
        function.__annotations__ = tensors | function.__annotations__ | {"return": tuple[(torch.Tensor,) * outputs]}
        name = add_op_namespace_prefix(function.__name__)
        return torch.library.custom_op(name, mutates_args=mutates_args, **kwargs)(op)

    return define
