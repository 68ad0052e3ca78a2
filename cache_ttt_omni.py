# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Layers for Transformers' caches that hold the state of TTT, and windowed attention with sinks."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, StaticLayer

from .configuration_ttt_omni import SLIDING_LAYER_TYPES
from .ops_ttt_omni import TTTLinearState, TTTMLPState, TTTState, write_column


# Transformers' linear-attention layers could hold TTT's tensors, but neither repeat nor select them along the batch,
# and read them back only after a convolution state was written. No class here sets `_layer_type`, which would replace
# a layer for every model in the process: `add_ttt_layers` puts them where a model of this package needs them.

# A token's place is its index among the tokens of its sequence (padding is no token: -1), plus the index of its
# sequence in a packed row shifted by this. Places grow along a row, and those of two sequences are never near.
SEQUENCE_SHIFT = 40
COLUMNS_OF_ROOM = 256  # for tokens to come; their memory is moved as seldom


class OwnedTensorsMixin:
    """All that a cache layer holds, as tensors whose first dimension is the batch: `names`, and the state of TTT."""

    names: tuple[str, ...] = ("keys", "values")
    ttt_state: TTTState | None = None  # before the first token, and where there is no TTT
    columns_without_padding: int = 0  # how many of the last columns hold a token in every row
    record_past: bool = False  # whether `crop` may go back further than the state alone can
    earlier: tuple[TTTState, int] | None = None  # the state before the last step, and the tokens since
    is_state_saved: bool = False  # for a backward pass, as far as is known

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the layer holds, by name; nothing before the first token."""
        tensors = {name: getattr(self, name) for name in self.names if getattr(self, name) is not None}
        state = {} if self.ttt_state is None else vars(self.ttt_state)
        return tensors | {f"ttt.{name}": x for name, x in state.items()}

    def load(self, tensors: dict[str, torch.Tensor], length: int) -> None:
        """Take over what `tensors` of such a layer held after `length` tokens."""
        if self.names:
            self.lazy_initialization(tensors["keys"], tensors["values"])
        for name in self.names:
            setattr(self, name, tensors[name])
        state = {name.removeprefix("ttt."): x for name, x in tensors.items() if name.startswith("ttt.")}
        if state:
            self.ttt_state = (TTTMLPState if "W2" in state else TTTLinearState)(**state)
        if hasattr(self, "cumulative_length"):
            self.cumulative_length = length

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace each tensor by what `function` makes of it."""
        for name in self.names:
            if getattr(self, name) is not None:
                setattr(self, name, function(getattr(self, name)))
        if self.ttt_state is not None:
            self.ttt_state = self.ttt_state.map(function)
        if self.earlier is not None:
            self.earlier = self.earlier[0].map(function), self.earlier[1]

    def update_ttt_state(
        self,
        state: TTTState,
        token_mask: torch.Tensor | None,
        length: int,
        earlier: tuple[TTTState, int] | None = None,
    ) -> None:
        """
        Store the state after `length` more columns, which hold tokens where `token_mask` `[B, length]` is true; and if
        it made a step in them, the `earlier` one before the last step, with the number of tokens since.
        """
        self.ttt_state = state
        if earlier is None and self.earlier is not None:
            earlier = self.earlier[0], self.earlier[1] + length
        self.earlier = earlier
        if token_mask is not None:
            last_tokens = int(token_mask.flip(1).cumprod(1).sum(1).min())
            self.columns_without_padding *= last_tokens == length
            length = last_tokens
        self.columns_without_padding += length

    def activate_past_recording(self) -> None:
        """From now on, `crop` can take back what came since the last `crop`: as Transformers' caches have it."""
        self.record_past = True

    def forget_past(self) -> None:
        """Ends that."""
        self.record_past, self.earlier = False, None

    def crop(self, tokens_to_remove: int) -> None:
        """
        Forget the last columns (`tokens_to_remove` is negative, as elsewhere in Transformers).

        Raises:
            RuntimeError: if there is TTT, and that would go back past the start of a row's current mini-batch, or of
                the one before it where the past is recorded, or to padding. Other layers of the cache may have been
                cropped by then: it is of no more use.
        """
        state, columns = self._state_before(abs(tokens_to_remove)), abs(tokens_to_remove)
        super().crop(tokens_to_remove)
        self.ttt_state, self.earlier = state, None
        self.columns_without_padding -= columns

    def _state_before(self, columns: int) -> TTTState | None:
        """The state of TTT, if there is one, so many columns ago."""
        if self.ttt_state is None or columns == 0:
            return self.ttt_state
        if columns > self.columns_without_padding:
            raise RuntimeError(
                f"Cannot take back {columns} columns: only the last {self.columns_without_padding} are known to "
                "hold a token in every row."
            )
        if self.earlier is not None and columns >= self.earlier[1]:
            state, since = self.earlier
            return state.rewind(columns - since)
        return self.ttt_state.rewind(columns)

    def reset(self) -> None:
        super().reset()
        self.ttt_state = self.earlier = None
        self.columns_without_padding = 0

    def offload(self) -> None:
        self.map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized:
            self.map(lambda x: x.to(self.device, non_blocking=True))

    def detach(self) -> None:
        """Cut all off from the autograd graph, as for truncated backpropagation through time."""
        self.map(torch.Tensor.detach)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.map(lambda x: x[indices.to(x.device)])


@dataclass
class Room:
    """Memory for keys and values `[B, H, L, D]`, of which the first `used` columns are never written to again."""

    keys: torch.Tensor
    values: torch.Tensor
    used: int


class FullAttentionLayer(OwnedTensorsMixin, DynamicLayer):
    """
    Keys and values of all tokens. Without gradients they are views of memory that has room for the next ones, which
    only the first of several snapshots takes.
    """

    room: Room | None = None

    def update(self, key_states, value_states, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            self.room = None
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        if start > 0 and self.keys.shape[:2] != key_states.shape[:2]:
            raise ValueError(
                f"The cache has {len(self.keys)} rows with {self.keys.shape[1]} heads, and the new tokens "
                f"{len(key_states)} with {key_states.shape[1]}."
            )
        if not self._has_room(start, end):
            self.room = Room(*(_with_room(x, end) for x in (key_states, value_states)), start)
            if start > 0:
                self.room.keys[:, :, :start].copy_(self.keys)
                self.room.values[:, :, :start].copy_(self.values)
        self.room.keys[:, :, start:end].copy_(key_states)
        self.room.values[:, :, start:end].copy_(value_states)
        self.room.used = end
        self.keys, self.values = self.room.keys[:, :, :end], self.room.values[:, :, :end]
        return self.keys, self.values

    def _has_room(self, start: int, end: int) -> bool:
        """Whether keys and values are those of the room, and nobody has written behind them."""
        room = self.room
        return (
            room is not None
            and room.used == start
            and room.keys.shape[2] >= end
            and all(
                held.data_ptr() == whole.data_ptr() and held.stride() == whole.stride() and len(held) == len(whole)
                for held, whole in ((self.keys, room.keys), (self.values, room.values))
            )
            and (torch.is_inference_mode_enabled() or not room.keys.is_inference())
        )

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().map(function)
        self.room = None

    def reset(self) -> None:
        super().reset()
        self.room = None


def _with_room(x: torch.Tensor, length: int) -> torch.Tensor:
    """Memory for `length` columns and some more, of the kind of `x` `[B, H, T, D]`."""
    return x.new_empty(*x.shape[:2], length + COLUMNS_OF_ROOM, x.shape[3])


@dataclass
class WindowStep:
    """Where one more token of each row goes in a [`WindowRing`], and what it sees: the same in all layers."""

    columns: torch.LongTensor  # [B], or [1] where it is the same in all rows
    lengths: torch.LongTensor  # [B], tokens of each row, this one included
    fewest: int  # of them, as far as the host knows
    seen: int  # columns that some row sees, from the first on
    visible: torch.BoolTensor | None  # [B, 1, 1, seen], `None` where each row sees all of them
    sink_rotation: tuple[torch.Tensor, torch.Tensor] | None  # [B, 1, 1, D] twice, `None` where sinks stay as they are


@dataclass
class WindowRing:
    """
    A window to which tokens come one by one, written in place: first the sinks, then, at its index modulo the window's
    size, each of the last `sliding_window` tokens. So each row sees the first columns, in any order, and once its
    window is full, all of them but the last one, which takes padding.
    """

    keys: torch.Tensor  # [B, H, attention_sinks + sliding_window + 1, D], the sinks turned as the last token sees them
    values: torch.Tensor  # of the same shape
    sinks: torch.Tensor  # [B, H, attention_sinks, D], their keys as they were
    turned_sinks: torch.Tensor  # the same a quarter of a turn later, so that any rotation is a sum of the two
    lengths: torch.LongTensor  # [B], tokens of each row
    fewest: int  # of them, as far as the host knows
    is_shared: bool = False  # with a snapshot

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: x for name, x in vars(self).items() if isinstance(x, torch.Tensor)}

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "WindowRing":
        return replace(self, **{name: function(x) for name, x in self.tensors.items()})

    def write(self, keys: torch.Tensor, values: torch.Tensor, step: WindowStep) -> None:
        """One token of each row, `[B, H, 1, D]` twice."""
        write_column(self.keys, step.columns, keys)
        write_column(self.values, step.columns, values)
        if step.sink_rotation is not None:
            cos, sin = step.sink_rotation
            turned = torch.addcmul(self.sinks * cos, self.turned_sinks, sin)
            self.keys[:, :, : self.sinks.shape[2]].copy_(turned)
        self.lengths, self.fewest = step.lengths, step.fewest


class SlidingWindowLayer(OwnedTensorsMixin, DynamicLayer):
    """
    Keys and values of each row's last `sliding_window - 1` and first `attention_sinks` tokens: in the order of their
    columns, or where tokens come one by one, in a [`WindowRing`].
    """

    names = ("keys", "values", "places")
    past: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None  # all since the last `crop`, where recorded
    ring: WindowRing | None = None  # in the place of keys, values and places

    def __init__(self, sliding_window: int, attention_sinks: int):
        super().__init__()
        self.sliding_window = sliding_window
        self.attention_sinks = attention_sinks
        self.cumulative_length = 0
        self.places: torch.LongTensor | None = None  # [B, L], -1 where a column holds no token

    @property
    def capacity(self) -> int:
        """The number of tokens of a row that are kept."""
        return self.attention_sinks + self.sliding_window - 1

    def tensors(self) -> dict[str, torch.Tensor]:
        unrolled = {} if self.ring is None else dict(zip(self.names, self._unrolled()))
        return unrolled | super().tensors()

    def load(self, tensors: dict[str, torch.Tensor], length: int) -> None:
        super().load(tensors, length)
        self.ring = None

    def update_window(
        self, keys: torch.Tensor, values: torch.Tensor, places: torch.LongTensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.LongTensor]:
        """
        Append T tokens, and evict what no later token can see.

        Args:
            keys, values: `[B, H, T, D]`.
            places: `[B, T]`, the place of each token.

        Returns:
            Keys, values and places of all that these tokens can see, themselves included: `[B, H, L + T, D]` twice
            and `[B, L + T]`.
        """
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self.keys, self.values, self.places = keys[:, :, :0], values[:, :, :0], places[:, :0]
        if self.ring is not None:
            (self.keys, self.values, self.places), self.ring = self._unrolled(), None
        self.cumulative_length += keys.shape[2]
        if self.record_past:
            past = (self.keys, self.values, self.places) if self.past is None else self.past
            self.past = tuple(
                torch.cat(pair, dim=1 + (pair[0].ndim > 2)) for pair in zip(past, (keys, values, places))
            )
        keys, values = torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)
        places = torch.cat([self.places, places], dim=1)
        self.keys, self.values, self.places = self._evict(keys, values, places)
        return keys, values, places

    def _evict(self, keys, values, places):
        surplus = places.shape[1] - self.capacity
        if surplus <= 0:
            return keys, values, places
        newest = places.amax(1, keepdim=True)
        first = newest >> SEQUENCE_SHIFT << SEQUENCE_SHIFT
        keep = (places >= first) & (
            (places < first + self.attention_sinks) | (places > newest - self.sliding_window + 1)
        )
        columns = keep.to(torch.int8).argsort(dim=1, stable=True)[:, surplus:]  # [B, capacity]
        places = torch.where(keep, places, -1).gather(1, columns)
        return _take_columns(keys, columns), _take_columns(values, columns), places

    def plan_step(
        self,
        places: torch.LongTensor,
        may_be_padding: bool,
        rotate: Callable[[torch.LongTensor], tuple[torch.Tensor, torch.Tensor]],
    ) -> WindowStep | None:
        """
        Where one more token of each row goes, in this layer and all like it, and what it sees. `None` where it has to
        be appended by `update_window`: to a window without all of its sinks, to one whose past is recorded, and where
        a backward pass may need what would be overwritten.

        Args:
            places: `[B, 1]`, of the tokens.
            may_be_padding: whether some of them may be none.
            rotate: makes of distances `[B, 1]` their rotations, `[B, 1, D]` twice.
        """
        if torch.is_grad_enabled() or self.record_past or not self.is_initialized:
            return None
        is_compiling = torch.compiler.is_compiling()
        if self.ring is None and (is_compiling or not self.roll()):
            return None
        if not is_compiling and self.ring.keys.is_inference() and not torch.is_inference_mode_enabled():
            return None
        sinks, window = self.attention_sinks, self.sliding_window
        size, fewest = sinks + window, self.ring.fewest + (not may_be_padding)
        columns = torch.where(places < sinks, places, sinks + (places - sinks) % window)
        lengths = places + 1
        if may_be_padding:
            is_token = places >= 0
            columns = torch.where(is_token, columns, size)  # the last one
            lengths = torch.where(is_token, lengths, self.ring.lengths[:, None])
        if is_compiling:  # where what depends on the length would be compiled for each
            seen, is_even, is_full, is_far = size, False, False, True
        else:
            seen = min(self.cumulative_length + 1, size)
            is_even, is_full = fewest == self.cumulative_length + 1, fewest >= size
            is_far = self.cumulative_length > self.capacity
        visible = None
        if not (is_even or is_full):
            visible = torch.arange(seen, device=places.device) < lengths  # [B, seen]
            visible = (visible | (places < 0))[:, None, None]  # padding sees something, or its softmax would be NaN
        sink_rotation = None
        if is_far and sinks:
            sink_rotation = tuple(x[:, None] for x in rotate((places - self.capacity).clamp(min=0)))
        return WindowStep(columns[: 1 if is_even else None, 0], lengths[:, 0], fewest, seen, visible, sink_rotation)

    def update_step(
        self, keys: torch.Tensor, values: torch.Tensor, step: WindowStep
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Writes one token of each row, `[B, H, 1, D]` twice, as `plan_step` has it.

        Returns:
            Keys and values of what these tokens see, `[B, H, seen, D]` twice.
        """
        if self.ring is None:
            self.roll()
        if self.ring.is_shared:
            self.ring = replace(self.ring.map(torch.clone), is_shared=False)
        self.ring.write(keys, values, step)
        self.cumulative_length += 1
        return self.ring.keys[:, :, : step.seen], self.ring.values[:, :, : step.seen]

    @property
    def row_lengths(self) -> torch.LongTensor:
        """The number of tokens of each row, `[B]`."""
        return self.places.amax(1) + 1 if self.ring is None else self.ring.lengths

    def roll(self) -> bool:
        """Makes a ring of the columns, unless a row lacks sinks, or tokens in between as no model leaves it."""
        if self.ring is not None or self.places is None or self.places.shape[1] == 0:
            return self.ring is not None
        lengths = self.row_lengths
        fewest, sinks, size = int(lengths.min()), self.attention_sinks, self.attention_sinks + self.sliding_window
        held = (self.places >= 0).sum(1)
        if fewest < max(sinks, 1) or int(self.places.max()) >> SEQUENCE_SHIFT:
            return False
        if not torch.equal(held, lengths.clamp(max=self.capacity)):
            return False
        columns = torch.where(self.places < sinks, self.places, sinks + (self.places - sinks) % self.sliding_window)
        columns = torch.where(self.places < 0, size, columns)  # [B, L]
        count = self.places.shape[1]
        source = torch.full((len(columns), size + 1), count, device=columns.device)
        source.scatter_(1, columns, torch.arange(count, device=columns.device).expand_as(columns))
        source[:, size] = count  # a column of zeros, as all others without a token
        keys, values = (
            _take_columns(torch.nn.functional.pad(x, (0, 0, 0, 1)), source) for x in (self.keys, self.values)
        )
        turned = keys[:, :, :sinks]
        half = turned.shape[-1] // 2
        turned = torch.cat([-turned[..., half:], turned[..., :half]], dim=-1)
        self.ring = WindowRing(keys, values, keys[:, :, :sinks].clone(), turned, lengths, fewest)
        self.keys = self.values = self.places = None
        return True

    def _unrolled(self) -> tuple[torch.Tensor, torch.Tensor, torch.LongTensor]:
        """Keys, values and places of the ring in the order of columns, those without a token first."""
        ring, sinks = self.ring, self.attention_sinks
        count = min(self.cumulative_length, self.capacity)
        held = ring.lengths.clamp(max=self.capacity)[:, None]  # [B, 1]
        places = torch.arange(count, device=held.device) - (count - held)  # [B, count]
        places = torch.where(places < sinks, places, places + ring.lengths[:, None] - held).clamp(min=-1)
        columns = torch.where(places < sinks, places, sinks + (places - sinks) % self.sliding_window).clamp(min=0)
        keys = torch.cat([ring.sinks, ring.keys[:, :, sinks:]], dim=2)
        is_token = (places >= 0)[:, None, :, None]
        keys, values = (_take_columns(x, columns).masked_fill(~is_token, 0) for x in (keys, ring.values))
        return keys, values, places

    def update(self, *args, **kwargs):
        raise NotImplementedError("A window with sinks needs each token's place: call `update_window`.")

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_max_length(self) -> int:
        return self.attention_sinks + self.sliding_window

    @property
    def is_croppable(self) -> bool:
        """Whether what came since the last `crop` can be taken back."""
        return self.record_past

    def forget_past(self) -> None:
        super().forget_past()
        self.past = None

    def prefetch(self) -> None:
        held = self.keys if self.ring is None else self.ring.keys
        if held is not None and held.device != self.device:
            super().prefetch()

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().map(function)
        self.past = None if self.past is None else tuple(map(function, self.past))
        self.ring = None if self.ring is None else self.ring.map(function)

    def crop(self, tokens_to_remove: int) -> None:
        state, columns = self._state_before(abs(tokens_to_remove)), abs(tokens_to_remove)
        if columns > 0:
            length = -1 if self.past is None else self.past[2].shape[1] - columns
            if length < 0:
                raise RuntimeError("A window cannot be cropped: the tokens that it would need again are gone.")
            keys, values, places = self.past
            self.keys, self.values, self.places = self._evict(
                keys[:, :, :length], values[:, :, :length], places[:, :length]
            )
            self.cumulative_length -= columns
            self.columns_without_padding -= columns
        self.ttt_state, self.earlier, self.past = state, None, None

    def reset(self) -> None:
        super().reset()
        self.places = self.past = self.ring = None


def _take_columns(x: torch.Tensor, columns: torch.LongTensor) -> torch.Tensor:
    """Of `[B, H, L, D]` each row's `columns` `[B, C]`: row by row of D, which is far quicker than `gather`."""
    batch_size, num_heads, length, _ = x.shape
    first = torch.arange(batch_size * num_heads, device=x.device).view(batch_size, num_heads, 1) * length
    return x.flatten(0, 2).index_select(0, (first + columns[:, None]).flatten()).unflatten(0, (*x.shape[:2], -1))


class TTTLayer(OwnedTensorsMixin, DynamicLayer):
    """Cache of a `linear_attention` layer: the state of TTT, without keys and values."""

    names = ()

    def __init__(self):
        super().__init__()
        self.cumulative_length = 0

    @property
    def is_croppable(self) -> bool:
        """Further than the current mini-batch."""
        return self.record_past

    def update(self, *args, **kwargs):
        raise NotImplementedError("A layer without attention has no keys and values.")

    def update_ttt_state(self, state: TTTState, token_mask: torch.Tensor | None, length: int, earlier=None) -> None:
        super().update_ttt_state(state, token_mask, length, earlier)
        self.cumulative_length += length

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.cumulative_length -= abs(tokens_to_remove)


class TTTAndFullAttentionLayer(FullAttentionLayer):
    """Cache of a `hybrid` layer."""

    @property
    def is_croppable(self) -> bool:
        """Further than the current mini-batch."""
        return self.record_past


class TTTAndStaticFullAttentionLayer(OwnedTensorsMixin, StaticLayer):
    """Cache of a `hybrid` layer whose keys and values take a buffer of fixed length."""

    is_compileable = is_croppable = False


class TTTAndSlidingWindowLayer(SlidingWindowLayer):
    """Cache of a `hybrid_sliding` layer."""


LAYER_CLASSES = {
    "full_attention": FullAttentionLayer,
    "linear_attention": TTTLayer,
    "hybrid": TTTAndFullAttentionLayer,
    "hybrid_sliding": TTTAndSlidingWindowLayer,
    "sliding_attention": SlidingWindowLayer,
}


def add_ttt_layers(cache: Cache, config: PreTrainedConfig) -> None:
    """
    Give `cache` the layers of this module wherever `config.layer_types` asks for them.

    Raises:
        TypeError: if it is no cache of Transformers.
        ValueError: if it was already used by a model with other layers.
    """
    if not isinstance(getattr(cache, "layers", None), list):
        raise TypeError(
            f"`cache` must be a cache of Transformers, such as `DynamicCache()`, got {type(cache).__name__}."
        )
    cache.layers += [DynamicLayer() for _ in range(len(cache.layers), config.num_hidden_layers)]
    if len(cache.layers) > config.num_hidden_layers:
        raise ValueError(
            f"The cache has {len(cache.layers)} layers and the model {config.num_hidden_layers}: start from an empty "
            "`DynamicCache`."
        )
    for index, layer_type in enumerate(config.layer_types):
        cache.layers[index] = _layer_for(layer_type, cache.layers[index], index, config)


def has_fixed_size(cache: Cache) -> bool:
    """Whether all layers are windows or the state of TTT."""
    return all(isinstance(layer, (SlidingWindowLayer, TTTLayer)) for layer in cache.layers)


def snapshot(cache: Cache) -> Cache:
    """
    `cache` as it is now, to come back to after it went on. Of its tensors only the state of TTT, whose size is fixed,
    is copied: keys and values are never overwritten, but for a ring's, which whoever writes to it first makes its own.
    """
    layers = [copy.copy(layer) for layer in cache.layers]
    for layer, original in zip(layers, cache.layers):
        if getattr(layer, "ttt_state", None) is not None:
            layer.ttt_state = layer.ttt_state.clone()
        if getattr(layer, "ring", None) is not None:
            original.ring.is_shared = True
            layer.ring = copy.copy(original.ring)
    return Cache(layers=layers)


class BatchedCache(Cache):
    """
    The caches of B conversations, each as long as it is, as one that goes on by the same number of tokens in each.
    Columns of padding stand before the tokens of those that are shorter than the longest.

    Args:
        caches: of one row each; they are left as they are.
        config: of the layers that fill them.

    Raises:
        ValueError: if a cache has more than one row, or as [`add_ttt_layers`].
    """

    def __init__(self, caches: list[Cache], config: PreTrainedConfig):
        for cache in caches:
            add_ttt_layers(cache, config)
        lengths = [cache.get_seq_length() for cache in caches]
        self.padding = [max(lengths) - length for length in lengths]  # columns of each row
        super().__init__(layers=[_join(layers, max(lengths)) for layers in zip(*(cache.layers for cache in caches))])

    def get_seq_length(self, layer_idx: int = 0) -> torch.LongTensor:
        """The number of tokens of each row, `[B, 1]`."""
        columns = self.layers[layer_idx].get_seq_length()
        return torch.tensor([[columns - padding] for padding in self.padding])

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """The number of columns."""
        return self.layers[layer_idx].get_seq_length()

    def attention_mask(self, length: int, device: torch.device) -> torch.BoolTensor:
        """`[B, columns + length]`, false for padding, where each row goes on by `length` tokens."""
        columns = torch.arange(self.get_query_offset() + length, device=device)
        return columns >= torch.tensor(self.padding, device=device)[:, None]

    def split(self) -> list[Cache]:
        """The caches of the rows, which share no memory."""
        rows = []
        for row, (padding, length) in enumerate(zip(self.padding, self.get_seq_length().flatten().tolist())):
            rows.append(Cache(layers=[_row(layer, row, padding, length) for layer in self.layers]))
        return rows


def _join(layers: tuple[OwnedTensorsMixin, ...], length: int) -> OwnedTensorsMixin:
    """The layers of several caches, of one row each, as one of `length` columns."""
    joined, rows = _empty(layers[0]), [layer.tensors() for layer in layers]
    filled = next((tensors for tensors in rows if tensors), None)
    if filled is None:
        return joined
    tensors = {}
    for name, x in filled.items():
        if x.shape[0] != 1:
            raise ValueError(f"A cache of one conversation has one row, got {x.shape[0]}.")
        if name.startswith("ttt."):
            tensors[name] = torch.cat([row[name] for row in rows])
        else:
            axis = 1 if name == "places" else 2
            parts = [row.get(name, x.narrow(axis, 0, 0)) for row in rows]
            columns = max(part.shape[axis] for part in parts)
            tensors[name] = torch.cat([_pad(part, axis, columns, -1 if name == "places" else 0) for part in parts])
    joined.load(tensors, length)
    return joined


def _pad(x: torch.Tensor, axis: int, columns: int, value: int) -> torch.Tensor:
    padding = [0, 0] * (x.ndim - axis - 1) + [columns - x.shape[axis], 0]
    return torch.nn.functional.pad(x, padding, value=value)


def _row(layer: OwnedTensorsMixin, row: int, padding: int, length: int) -> OwnedTensorsMixin:
    """One row of a layer of several, without its columns of padding."""
    single, tensors = _empty(layer), {name: x[row : row + 1] for name, x in layer.tensors().items()}
    if "places" in tensors:
        kept = tensors["places"][0] >= 0
        tensors |= {"keys": tensors["keys"][:, :, kept], "values": tensors["values"][:, :, kept]}
        tensors["places"] = tensors["places"][:, kept]
    elif "keys" in tensors:
        tensors |= {name: tensors[name][:, :, padding:] for name in ("keys", "values")}
    if tensors:
        single.load({name: x.clone() for name, x in tensors.items()}, length)
        single.columns_without_padding = length
    return single


def _empty(layer: OwnedTensorsMixin) -> OwnedTensorsMixin:
    """A layer of the same kind that holds nothing."""
    if not isinstance(layer, tuple(LAYER_CLASSES.values())):
        raise ValueError(
            f"A {type(layer).__name__} cannot be one of several rows: start from an empty `DynamicCache`."
        )
    layer = copy.copy(layer)
    layer.keys = layer.values = None  # which are another layer's, too, and not to be zeroed
    layer.is_initialized = False
    layer.reset()
    layer.forget_past()
    return layer


def _layer_for(layer_type: str, layer, index: int, config: PreTrainedConfig):
    """The cache layer of a layer of the model in the place of `layer`, or that itself if it will do."""
    layer_class, kwargs = LAYER_CLASSES[layer_type], {}
    is_static = isinstance(layer, StaticLayer)
    if layer_type == "hybrid" and is_static:
        layer_class, kwargs = TTTAndStaticFullAttentionLayer, {"max_cache_len": layer.max_cache_len}
    elif layer_type in SLIDING_LAYER_TYPES:
        kwargs = {"sliding_window": config.sliding_window, "attention_sinks": config.attention_sinks}
    if type(layer) is layer_class:
        return layer
    new_layer = layer_class(**kwargs)
    if layer_type == "full_attention":
        if type(layer) is DynamicLayer:
            vars(new_layer).update(vars(layer))
            return new_layer
        is_ours = isinstance(layer, OwnedTensorsMixin)
        if is_static or (isinstance(layer, DynamicLayer) and not layer.is_sliding and not is_ours):
            return layer  # full attention can do with any layer, such as a quantised one
    if getattr(layer, "is_initialized", False) and layer.get_seq_length() > 0:
        raise ValueError(
            f"Layer {index} of the cache is a used {type(layer).__name__}, but the model's is of type {layer_type!r}: "
            "start from an empty `DynamicCache`."
        )
    return new_layer
