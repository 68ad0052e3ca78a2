# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
The inner loop of Test-Time Training (TTT): TTT-Linear and TTT-MLP of arXiv 2407.04620, in plain PyTorch.

Notation: B rows, H heads, T tokens, D head size, F inner width of TTT-MLP (4 D), m mini-batch size.
"""

import warnings
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import ClassVar

import torch
from torch.utils.checkpoint import checkpoint


try:
    import ttt_kernels
except ImportError:  # also where Triton is missing
    ttt_kernels = None

LAYER_NORM_EPS = 1e-6  # as in ttt-lm-pytorch


@dataclass
class TTTState:
    """
    Memory of a TTT layer after any number of tokens: the inner model at the start of the current mini-batch, and the
    rows of that mini-batch ("pending") from which the model at any later token follows.

    Tensors are float32 (float64 if initialised so) whatever the dtype of the activations, rows not yet seen are 0.
    """

    pending_rows: ClassVar[tuple[str, ...]]

    position: torch.LongTensor  # [B], tokens of the current mini-batch seen so far, in [0, m)

    @property
    def batch_size(self) -> int:
        """Number of rows B."""
        return self.position.shape[0]

    @property
    def device(self) -> torch.device:
        """Device of the state."""
        return self.position.device

    def map(self, function) -> "TTTState":
        """The state with `function` applied to each of its tensors, all of which have B as first dimension."""
        return replace(self, **{field.name: function(getattr(self, field.name)) for field in fields(self)})

    def to(self, device: torch.device) -> "TTTState":
        """The state on `device`."""
        device = torch.device(device)
        if self.device == device:
            return self
        to_cpu = device.type == "cpu"  # where nobody would wait for the copy before reading it
        return self.map(lambda x: x.to(device, non_blocking=not to_cpu))

    def clone(self) -> "TTTState":
        """A copy that shares no memory with this state, nor among its rows."""
        return self.map(lambda x: x.clone(memory_format=torch.contiguous_format))

    def select(self, indices: torch.Tensor) -> "TTTState":
        """The rows `indices` (`[n]` integers or `[B]` booleans) of the batch."""
        indices = indices.to(self.device)
        return self.map(lambda x: x[indices])

    def repeat_interleave(self, repeats: int) -> "TTTState":
        """Each row `repeats` times, one after the other."""
        return self.map(lambda x: x.repeat_interleave(repeats, dim=0))

    def rewind(self, length: int | torch.LongTensor) -> "TTTState":
        """
        The state `length` tokens earlier: as many in every row, or `[B]`, as many as it says in each.

        Raises:
            ValueError: if `length` is negative, or neither an integer nor B of them.
            RuntimeError: if a row's current mini-batch is shorter, as the steps before it cannot be taken back.
        """
        length = torch.as_tensor(length, device=self.device)
        if not _holds_integers(length) or length.shape not in ((), self.position.shape):
            raise ValueError(
                f"`length` must be an integer or {self.batch_size} of them, got {length.dtype} of the shape "
                f"{tuple(length.shape)}."
            )
        lengths = length.expand_as(self.position)
        for row, (taken_back, position) in enumerate(zip(lengths.tolist(), self.position.tolist())):
            if taken_back < 0:
                raise ValueError(f"`length` must not be negative, got {taken_back}.")
            if taken_back > position:
                raise RuntimeError(
                    f"Cannot take back {taken_back} tokens of row {row}: only {position} came after the last step of "
                    "the TTT state, which is final."
                )
        position = self.position - lengths
        keep = torch.arange(self.k.shape[2], device=self.device) < position[:, None]  # [B, m]
        rows = {name: _keep(getattr(self, name), keep[:, None, :, None]) for name in self.pending_rows}
        return replace(self, position=position, **rows)


@dataclass
class TTTLinearState(TTTState):
    """State of TTT-Linear, f(x) = x W1 + b1."""

    pending_rows = ("k", "u1")

    W1: torch.Tensor  # [B, H, D, D]
    b1: torch.Tensor  # [B, H, 1, D]
    k: torch.Tensor  # [B, H, m, D], pending keys
    u1: torch.Tensor  # [B, H, m, D], pending lr * dl/dz1

    @classmethod
    def initial(cls, W1: torch.Tensor, b1: torch.Tensor, batch_size: int) -> "TTTLinearState":
        """The state before the first token, from the learned `W1` `[H, D, D]` and `b1` `[H, 1, D]`."""
        W1, b1 = _expand(W1, batch_size), _expand(b1, batch_size)
        no_rows = W1.new_zeros(*W1.shape[:2], 0, W1.shape[-1])
        return cls(position=_zero_position(W1), W1=W1, b1=b1, k=no_rows, u1=no_rows)


@dataclass
class TTTMLPState(TTTState):
    """State of TTT-MLP, f(x) = gelu(x W1 + b1) W2 + b2."""

    pending_rows = ("k", "u1", "x2", "u2")

    W1: torch.Tensor  # [B, H, D, F]
    b1: torch.Tensor  # [B, H, 1, F]
    W2: torch.Tensor  # [B, H, F, D]
    b2: torch.Tensor  # [B, H, 1, D]
    k: torch.Tensor  # [B, H, m, D], pending keys
    u1: torch.Tensor  # [B, H, m, F], pending lr * dl/dz1
    x2: torch.Tensor  # [B, H, m, F], pending gelu(z1)
    u2: torch.Tensor  # [B, H, m, D], pending lr * dl/dz2

    @classmethod
    def initial(
        cls, W1: torch.Tensor, b1: torch.Tensor, W2: torch.Tensor, b2: torch.Tensor, batch_size: int
    ) -> "TTTMLPState":
        """The state before the first token, from the learned parameters: those of the state without B."""
        W1, b1, W2, b2 = (_expand(x, batch_size) for x in (W1, b1, W2, b2))
        no_rows_d, no_rows_f = (W1.new_zeros(*W1.shape[:2], 0, width) for width in W1.shape[-2:])
        return cls(
            position=_zero_position(W1),
            W1=W1, b1=b1, W2=W2, b2=b2,
            k=no_rows_d, u1=no_rows_f, x2=no_rows_f, u2=no_rows_d,
        )  # fmt: skip


def _expand(parameter: torch.Tensor, batch_size: int) -> torch.Tensor:
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return parameter.to(dtype).unsqueeze(0).expand(batch_size, *parameter.shape)


def _zero_position(W1: torch.Tensor) -> torch.LongTensor:
    return torch.zeros(W1.shape[0], dtype=torch.long, device=W1.device)


def ttt_linear(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lr: torch.Tensor,
    token_scale: torch.Tensor,
    ln_weight: torch.Tensor,
    ln_bias: torch.Tensor,
    state: TTTLinearState,
    attention_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    checkpoint_group_size: int = 0,
    inplace: bool = False,
    backend: str = "auto",
) -> tuple[torch.Tensor, TTTLinearState]:
    """
    TTT-Linear over T more tokens (arXiv 2407.04620, dual form), equal to ttt-lm-pytorch wherever the calls are cut.

    Args:
        q, k, v: `[B, H, T, D]`, after normalisation and rotary embedding.
        lr: `[B, H, T]`, inner learning rate of each token, base_lr / D included.
        token_scale: `[m]`, scale by position in the mini-batch; its length is the mini-batch size.
        ln_weight, ln_bias: `[H, D]`, the inner LayerNorm.
        state: the state before these tokens, of B rows; it is not changed.
        attention_mask: `[B, T]`, of any dtype and on any device: 0 for padding, whatever else for a token. Padding
            changes no state, takes no place in a mini-batch, outputs 0 and has gradients of 0, whatever it holds.
        cu_seqlens: `[n + 1]` integers, bounds of n sequences packed in the one row of q, k, v, from 0 to T; `state`
            then has n rows. Its values are checked, for which one on a GPU is waited for, and one on the CPU is not.
        checkpoint_group_size: mini-batches per gradient checkpoint; 0 keeps all activations for the backward pass.
        inplace: allow the state's memory to be used for the new one, without gradients; saves a copy per token.
        backend: `"torch"`, `"triton"` (the package `ttt_kernels`), or `"auto"`: Triton for tensors on a GPU, where it
            takes their shape.

    Returns:
        The output q + LN(f(q)) `[B, H, T, D]` in the dtype of q, and the state after these tokens.

    Raises:
        ValueError: shapes that do not fit together, bounds that are none, or an unknown backend.
        RuntimeError: `backend="triton"` where it cannot run.
    """
    return _ttt(_linear_mini_batch, q, k, v, lr, token_scale, ln_weight, ln_bias, state, attention_mask, cu_seqlens,
                checkpoint_group_size, inplace, backend)  # fmt: skip


def ttt_mlp(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lr: torch.Tensor,
    token_scale: torch.Tensor,
    ln_weight: torch.Tensor,
    ln_bias: torch.Tensor,
    state: TTTMLPState,
    attention_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    checkpoint_group_size: int = 0,
    inplace: bool = False,
    backend: str = "auto",
) -> tuple[torch.Tensor, TTTMLPState]:
    """TTT-MLP over T more tokens; arguments, results and errors are those of [`ttt_linear`]."""
    return _ttt(_mlp_mini_batch, q, k, v, lr, token_scale, ln_weight, ln_bias, state, attention_mask, cu_seqlens,
                checkpoint_group_size, inplace, backend)  # fmt: skip


def key_repeats(
    k: torch.Tensor,
    state: TTTState,
    mini_batch_size: int,
    attention_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    How often the key of each token was there in its mini-batch so far, itself included: the sum of the squares of its
    positive cosines with those keys, 1 where it is like none before, and n at the n-th of keys that are all alike.

    Args:
        k: `[B, H, T, D]`, as [`ttt_linear`] takes it, with the `state` before these tokens, the mask and the bounds.
        mini_batch_size: m.

    Returns:
        `[B, H, T]` in the state's dtype, without gradients.
    """
    state = with_pending_rows(state, mini_batch_size)
    with torch.no_grad(), _no_autocast(k.device.type):
        k, pending = (torch.nn.functional.normalize(x.to(state.W1.dtype), dim=-1) for x in (k, state.k))
        if k.shape[2] == 1 and attention_mask is None and cu_seqlens is None:
            return 1 + (k @ pending.mT).clamp(min=0).square().sum(-1)
        row, rank, is_token, lengths = _rows_and_ranks(k, attention_mask, cu_seqlens)
        to_grid, from_grid, _ = _grid(k, row, rank, is_token, state.position, lengths, mini_batch_size)
        first, *others = (x.transpose(1, 2) for x in to_grid(k))
        keys = torch.stack([first + pending, *others], dim=1)  # [R, N, H, m, D]; either is 0 where the other is not
        repeats = (keys @ keys.mT).clamp(min=0).square().tril().sum(-1, keepdim=True)  # [R, N, H, m, 1]
        return from_grid(repeats.transpose(2, 3).flatten(1, 2)).squeeze(-1).clamp(min=1)


def use_kernels(module) -> None:
    """
    Use `module` for the backend `"triton"`, such as what the `kernels` library loads of a published `ttt_kernels`, in
    place of the installed package.
    """
    global ttt_kernels
    ttt_kernels = module


def _ttt(mini_batch, q, k, v, lr, token_scale, ln_weight, ln_bias, state, attention_mask, cu_seqlens,
         checkpoint_group_size, inplace, backend):  # fmt: skip
    _check(q, k, v, lr, token_scale, ln_weight, ln_bias, state, attention_mask, cu_seqlens)
    state = with_pending_rows(state, token_scale.shape[0])
    if q.shape[2] > 0 and _runs_on_kernels(backend, q, token_scale, state):
        tokens_and_parameters = q, k, v, lr, token_scale, ln_weight, ln_bias
        return _run_kernel(*tokens_and_parameters, state, attention_mask, cu_seqlens, inplace)
    scale = token_scale.to(state.W1.dtype)
    norm = ln_weight.to(scale), ln_bias.to(scale)
    if q.shape[2] == 0:
        return q.clone(), state
    with _no_autocast(q.device.type):  # in the state's dtype, whatever the rest of the model runs in
        if q.shape[2] == 1 and attention_mask is None and cu_seqlens is None:
            return _decode(mini_batch, q, k, v, lr, scale, norm, state, inplace and not torch.is_grad_enabled())
        return _prefill(mini_batch, q, k, v, lr, scale, norm, state, attention_mask, cu_seqlens, checkpoint_group_size)


def _no_autocast(device_type):
    # not where it is off anyway, as it would be in the compiled graph
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _runs_on_kernels(backend, q, token_scale, state) -> bool:
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"`backend` must be 'auto', 'torch' or 'triton', got {backend!r}.")
    if backend == "torch" or (backend == "auto" and not q.is_cuda):
        return False
    if ttt_kernels is None:
        reason = "the package `ttt_kernels` or Triton is not installed"
    else:
        reason = ttt_kernels.unsupported(q, token_scale, state.W1)
    if reason is not None and backend == "triton":
        raise RuntimeError(f"`backend='triton'` cannot run: {reason}.")
    if reason is not None:
        warnings.warn(f"TTT runs in PyTorch, which is slower than its Triton kernels: {reason}.", stacklevel=1)
    return reason is None


def _run_kernel(q, k, v, lr, token_scale, ln_weight, ln_bias, state, attention_mask, cu_seqlens, inplace):
    name = "ttt_mlp" if isinstance(state, TTTMLPState) else "ttt_linear"
    names = [field.name for field in fields(state) if field.name != "position"] + ["position"]
    arguments = q, k, v, lr, token_scale, ln_weight, ln_bias
    if q.shape[2] > 1 or cu_seqlens is not None or torch.is_grad_enabled():
        tensors = [getattr(state, field) for field in names]
        o, tensors = getattr(ttt_kernels, name)(*arguments, *tensors, attention_mask, cu_seqlens)
        return o, replace(state, **dict(zip(names, tensors)))
    state = state.map(torch.Tensor.contiguous) if inplace else state.clone()
    tensors = [getattr(state, field) for field in names]
    o, position = getattr(ttt_kernels, f"{name}_decode")(*arguments, *tensors, attention_mask)
    return o, replace(state, position=position)


def _check(q, k, v, lr, token_scale, ln_weight, ln_bias, state, attention_mask, cu_seqlens):
    batch_size, num_heads, length, head_dim = q.shape
    rows = batch_size if cu_seqlens is None else cu_seqlens.numel() - 1
    expected = {
        "k": (k, q.shape),
        "v": (v, q.shape),
        "lr": (lr, (batch_size, num_heads, length)),
        "token_scale": (token_scale, (token_scale.numel(),)),
        "ln_weight": (ln_weight, (num_heads, head_dim)),
        "ln_bias": (ln_bias, (num_heads, head_dim)),
        "state.W1": (state.W1, (rows, num_heads, head_dim, state.W1.shape[-1])),
    }
    if attention_mask is not None:
        expected["attention_mask"] = (attention_mask, (batch_size, length))
    if cu_seqlens is not None:
        if batch_size != 1 or attention_mask is not None:
            raise ValueError("`cu_seqlens` needs a batch of one row and no `attention_mask`.")
        _check_bounds(cu_seqlens, length)
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f"`{name}` must have the shape {tuple(shape)}, got {tuple(tensor.shape)}.")


def _check_bounds(cu_seqlens, length):
    if cu_seqlens.ndim != 1 or not cu_seqlens.numel() or not _holds_integers(cu_seqlens):
        raise ValueError(
            f"`cu_seqlens` must be integers of the shape (n + 1,), got {cu_seqlens.dtype} of the shape "
            f"{tuple(cu_seqlens.shape)}."
        )
    if torch.compiler.is_compiling():
        return  # values are not known yet
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != length:
        raise ValueError(f"`cu_seqlens` must go from 0 to T = {length}, got {bounds[0]} to {bounds[-1]}.")
    for i in range(1, len(bounds)):
        if bounds[i] < bounds[i - 1]:
            raise ValueError(f"`cu_seqlens` must not decrease, got {bounds[i - 1]} and then {bounds[i]} at index {i}.")


def _holds_integers(x):
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def with_pending_rows(state: TTTState, mini_batch_size: int) -> TTTState:
    """`state` with room for m pending rows, which [`TTTLinearState.initial`] cannot know."""
    if state.k.shape[2] == mini_batch_size:
        return state
    if state.k.shape[2] != 0:
        raise ValueError(f"`token_scale` must have the length {state.k.shape[2]} of the state's mini-batch.")
    rows = {name: getattr(state, name) for name in state.pending_rows}  # [B, H, 0, d]
    rows = {name: x.new_zeros(*x.shape[:2], mini_batch_size, x.shape[3]) for name, x in rows.items()}
    return replace(state, **rows)


def _decode(mini_batch, q, k, v, lr, scale, norm, state, inplace):
    """One token per row: a mini-batch of one row instead of m."""
    position = state.position + 1
    complete = position == scale.shape[0]
    rows = (x.to(scale.dtype) for x in (q, k, v, lr.unsqueeze(-1)))
    reach = scale[state.position].view(-1, 1, 1, 1)  # rows not yet seen are 0, and need no other
    if inplace and not torch.compiler.is_compiling() and _is_ours(state.k):
        state = replace(state, **{name: getattr(state, name).contiguous() for name in state.pending_rows})
        place = partial(_write, slot=state.position)
    else:
        here = state.position[:, None] == torch.arange(scale.shape[0], device=q.device)  # [B, m]
        place = partial(_place, here=here)
    o, state = mini_batch(*rows, place, reach, scale[-1], norm, state, complete, has_pending=True)
    return o.to(q.dtype), replace(state, position=position % scale.shape[0])


def _is_ours(x):
    """Whether `x` may be written to."""
    return torch.is_inference_mode_enabled() or not x.is_inference()


def _prefill(mini_batch, q, k, v, lr, scale, norm, state, attention_mask, cu_seqlens, checkpoint_group_size):
    """Any number of tokens: they are laid out on a grid of mini-batches, where each row starts at its position."""
    mini_batch_size = scale.shape[0]
    row, rank, is_token, lengths = _rows_and_ranks(q, attention_mask, cu_seqlens)  # [B * T] three times, [R]
    begin, end = state.position, state.position + lengths  # [R]
    to_grid, from_grid, num_mini_batches = _grid(q, row, rank, is_token, begin, lengths, mini_batch_size)
    grids = [to_grid(x) for x in (q, k, v, lr.unsqueeze(-1))]
    slot = torch.arange(mini_batch_size, device=q.device)[None]  # [1, m]
    reach = _reach(slot, scale)

    def scan(first, last, state):
        outputs = []
        # before the first mini-batch, and where rows ended in one of an earlier group
        has_pending = _any(begin != 0 if first == 0 else end < first * mini_batch_size)
        for n in range(first, last):
            rows = (grid[n].transpose(1, 2).to(scale.dtype) for grid in grids)  # [R, H, m, d]
            slot_n = n * mini_batch_size + slot
            here = (slot_n >= begin[:, None]) & (slot_n < end[:, None])  # [R, m]
            complete = (n + 1) * mini_batch_size <= end  # [R]
            place = partial(_place, here=here)
            o, state = mini_batch(*rows, place, reach, scale[-1], norm, state, complete, has_pending)
            outputs.append(o.to(q.dtype).transpose(1, 2))  # [R, m, H, D]
            has_pending = _any(~complete)
        return torch.cat(outputs, dim=1), state

    group_size = checkpoint_group_size if torch.is_grad_enabled() else 0
    if not group_size:
        o, state = scan(0, num_mini_batches, state)
    else:
        outputs = []
        for first in range(0, num_mini_batches, group_size):
            last = min(first + group_size, num_mini_batches)
            o, state = checkpoint(scan, first, last, state, use_reentrant=False)
            outputs.append(o)
        o = torch.cat(outputs, dim=1)
    pending = {name: getattr(state, name).contiguous() for name in state.pending_rows}
    return from_grid(o), replace(state, position=end % mini_batch_size, **pending)


def _rows_and_ranks(q, attention_mask, cu_seqlens):
    """
    For each of the B * T tokens its row of the state, its rank in it, and whether it is a token (None: all are) and no
    padding, whose rank means nothing; and the rows' lengths.
    """
    batch_size, _, length, _ = q.shape
    token = torch.arange(length, device=q.device)
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(token).contiguous()
        row = torch.searchsorted(cu_seqlens, token, right=True) - 1
        return row, token - cu_seqlens[row], None, cu_seqlens.diff()
    row = torch.arange(batch_size, device=q.device).repeat_interleave(length)
    if attention_mask is None:
        return row, token.repeat(batch_size), None, torch.full((batch_size,), length, device=q.device)
    mask = attention_mask.to(q.device) != 0
    return row, (mask.cumsum(1) - 1).flatten(), mask.flatten(), mask.sum(1)


def _grid(q, row, rank, is_token, begin, lengths, mini_batch_size):
    """
    The layout of B * T tokens as N mini-batches: a function from `[B, H, T, d]` to N tensors `[R, m, H, d]`, which are
    0 where no token is, one from outputs `[R, N * m, H, d]` back to `[B, H, T, d]`, 0 at padding, and N.
    """
    batch_size, num_heads, length, _ = q.shape
    rows = begin.shape[0]
    # the number of mini-batches must not depend on data where that would break the compiled graph
    longest = length + mini_batch_size - 1 if torch.compiler.is_compiling() else int((begin + lengths).max())
    num_mini_batches = max(-(-longest // mini_batch_size), 1)
    num_slots = num_mini_batches * mini_batch_size

    # Rows of T tokens that need no more than T slots fill them all, in order.
    if rows == batch_size and length == num_slots and _all(lengths == length):
        return (
            lambda x: x.transpose(1, 2).unflatten(1, (num_mini_batches, mini_batch_size)).unbind(1),
            lambda o: o.transpose(1, 2),
            num_mini_batches,
        )

    index = row * num_slots + begin[row] + rank  # [B * T]
    if is_token is not None:
        index = torch.where(is_token, index, rows * num_slots)  # padding goes into a last row, and is read from one

    def to_grid(x):
        x = x.transpose(1, 2).reshape(batch_size * length, num_heads, -1)
        grid = x.new_zeros(rows * num_slots + 1, *x.shape[1:]).index_copy(0, index, x)
        return grid[:-1].view(rows, num_mini_batches, mini_batch_size, *x.shape[1:]).unbind(1)

    def from_grid(o):
        o = o.flatten(0, 1)  # [R * N * m, H, d]
        if is_token is not None:
            o = torch.nn.functional.pad(o, (0, 0, 0, 0, 0, 1))
        return o.index_select(0, index).view(batch_size, length, *o.shape[1:]).transpose(1, 2)

    return to_grid, from_grid, num_mini_batches


# A mini-batch of the inner loop, of r new rows: m in a prefill, 1 in a decode. `place` puts them among the m pending
# ones. Rows without a token are 0, with lr 0. `complete` [B] says which rows of the batch have their mini-batch filled
# by it, and step on to the next; `has_pending`, whether the state's pending rows are other than 0. `reach`
# [B, 1, r, m], or what expands to it, is s_i where j <= i; where j > i it is 0 or there are no rows yet. `step` is s
# of the last position.


def _linear_mini_batch(q, k, v, lr, place, reach, step, norm, state, complete, has_pending):
    ln_weight, ln_bias = (x.unsqueeze(1) for x in norm)  # [H, 1, D]
    z1 = _affine(k, state.W1, state.b1)  # [B, H, r, D]
    u1 = lr * _layer_norm_l2_grad(z1, v, k, ln_weight, ln_bias)
    if has_pending:
        k, u1 = place((k, u1), (state.k, state.u1))  # [B, H, m, D]
    z1 = _stepped_affine(q, state.W1, state.b1, k, u1, reach)
    o = _residual_layer_norm(q, z1, ln_weight, ln_bias)

    if not _any(complete):
        return o, replace(state, k=k, u1=u1)
    (done_k, done_u1), (k, u1) = _split((k, u1), complete)
    W1, b1 = _descend(state.W1, state.b1, done_k, done_u1, step)
    return o, replace(state, W1=W1, b1=b1, k=k, u1=u1)


def _mlp_mini_batch(q, k, v, lr, place, reach, step, norm, state, complete, has_pending):
    ln_weight, ln_bias = (x.unsqueeze(1) for x in norm)  # [H, 1, D]
    z1 = _affine(k, state.W1, state.b1)  # [B, H, r, F]
    x2 = _gelu(z1)
    z2 = _affine(x2, state.W2, state.b2)  # [B, H, r, D]
    grad2 = _layer_norm_l2_grad(z2, v, k, ln_weight, ln_bias)
    u1 = lr * _gelu_grad(grad2 @ state.W2.mT, z1)
    u2 = lr * grad2
    if has_pending or not _all(complete):  # x2 is gelu(b1) where no token is
        k, u1, x2, u2 = place((k, u1, x2, u2), (state.k, state.u1, state.x2, state.u2))  # [B, H, m, D or F]
    q2 = _gelu(_stepped_affine(q, state.W1, state.b1, k, u1, reach))  # [B, H, r, F]
    z2 = _stepped_affine(q2, state.W2, state.b2, x2, u2, reach)
    o = _residual_layer_norm(q, z2, ln_weight, ln_bias)

    if not _any(complete):
        return o, replace(state, k=k, u1=u1, x2=x2, u2=u2)
    (done_k, done_u1, done_x2, done_u2), (k, u1, x2, u2) = _split((k, u1, x2, u2), complete)
    W1, b1 = _descend(state.W1, state.b1, done_k, done_u1, step)
    W2, b2 = _descend(state.W2, state.b2, done_x2, done_u2, step)
    return o, replace(state, W1=W1, b1=b1, W2=W2, b2=b2, k=k, u1=u1, x2=x2, u2=u2)


# A branch on data cannot be compiled. Both ways of the branches below give the same, one with less work.


def _any(flags):
    return torch.compiler.is_compiling() or bool(flags.any())


def _all(flags):
    return not torch.compiler.is_compiling() and bool(flags.all())


def _keep(x, flags):
    """`x` where `flags` say so, else 0: not a product, as a NaN times 0 is one."""
    return x.masked_fill(~flags, 0)


def _place(rows, pending, here):
    """Each of `rows` [B, H, r, d] at its positions `here` among the m of its `pending`."""
    return tuple(torch.where(here[:, None, :, None], *pair) for pair in zip(rows, pending))


def _write(rows, pending, slot):
    """The same of one row each, at its `slot` [B], in the memory of `pending`."""
    for x, whole in zip(rows, pending):
        write_column(whole, slot, x)
    return pending


def write_column(whole: torch.Tensor, columns: torch.LongTensor, x: torch.Tensor) -> None:
    """Writes `x` `[B, H, 1, D]` into `whole` `[B, H, L, D]` at the column of each row, or at one for all `[1]`."""
    if len(columns) == 1:
        whole.index_copy_(2, columns, x)
    else:
        whole.scatter_(2, columns[:, None, None, None].expand_as(x), x)


def _reach(slot, scale):
    earlier = torch.arange(scale.shape[0], device=slot.device) <= slot[..., None]
    return (scale[slot][..., None] * earlier).unsqueeze(1)


def _split(rows, complete):
    """Each of `rows` [B, H, m, d] where mini-batches are complete, and where they stay pending, 0 elsewhere."""
    if _all(complete):
        return rows, tuple(x.new_zeros(1).expand(x.shape) for x in rows)
    complete = complete[:, None, None, None]
    return tuple(_keep(x, complete) for x in rows), tuple(_keep(x, ~complete) for x in rows)


def _baddbmm(x, a, b, alpha=1):
    """x + alpha * a @ b over [B, H, ...], in one pass."""
    shape = (*a.shape[:-1], b.shape[-1])
    return torch.baddbmm(x.flatten(0, 1), a.flatten(0, 1), b.flatten(0, 1), alpha=alpha).view(shape)


def _affine(x, W, b):
    return _baddbmm(b, x, W)


def _stepped_affine(x, W, b, keys, u, reach):
    """x under the inner layer as each row of x finds it, after the steps of all rows before."""
    z = _affine(x, W, b)
    weights = torch.addcmul(reach, x @ keys.mT, reach)
    z.flatten(0, 1).baddbmm_(weights.flatten(0, 1), u.flatten(0, 1), alpha=-1)  # z is ours, so that it may be changed
    return z


def _descend(W, b, keys, u, step):
    """The inner layer after the step of a mini-batch."""
    u = step * u
    return _baddbmm(W, keys.mT, u, alpha=-1), b - u.sum(2, keepdim=True)


def _residual_layer_norm(x, z, weight, bias):
    return torch.addcmul(x + bias, torch.native_layer_norm(z, (z.shape[-1],), None, None, LAYER_NORM_EPS)[0], weight)


def _layer_norm_l2_grad(z, v, k, weight, bias):
    """d/dz of 1/2 || LN(z) - (v - k) ||^2."""
    shape = (z.shape[-1],)
    normalized, mean, rstd = torch.native_layer_norm(z, shape, None, None, LAYER_NORM_EPS)
    error = torch.addcmul(torch.addcmul(weight * bias, k - v, weight), normalized, weight * weight)
    return torch.ops.aten.native_layer_norm_backward(error, z, shape, mean, rstd, None, None, (True, False, False))[0]


def _gelu(x):
    return torch.nn.functional.gelu(x, approximate="tanh")


def _gelu_grad(grad, x):
    return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")


__all__ = ["TTTLinearState", "TTTMLPState", "ttt_linear", "ttt_mlp", "use_kernels"]
