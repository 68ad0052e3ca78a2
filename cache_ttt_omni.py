# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Layers for Transformers' caches that hold the state of TTT, and windowed attention with sinks."""

import copy
from collections.abc import Callable

import torch
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, StaticLayer

from .configuration_ttt_omni import SLIDING_LAYER_TYPES
from .ops_ttt_omni import TTTLinearState, TTTMLPState, TTTState


# Transformers' linear-attention layers could hold TTT's tensors, but neither repeat nor select them along the batch,
# and read them back only after a convolution state was written. No class here sets `_layer_type`, which would replace
# a layer for every model in the process: `add_ttt_layers` puts them where a model of this package needs them.

# A token's place is its index among the tokens of its sequence (padding is no token: -1), plus the index of its
# sequence in a packed row shifted by this. Places grow along a row, and those of two sequences are never near.
SEQUENCE_SHIFT = 40


class OwnedTensorsMixin:
    """All that a cache layer holds, as tensors whose first dimension is the batch: `names`, and the state of TTT."""

    names: tuple[str, ...] = ("keys", "values")
    ttt_state: TTTState | None = None  # before the first token, and where there is no TTT
    columns_without_padding: int = 0  # how many of the last columns hold a token in every row
    record_past: bool = False  # whether `crop` may go back further than the state alone can
    earlier: tuple[TTTState, int] | None = None  # the state before the last step, and the tokens since

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


class FullAttentionLayer(OwnedTensorsMixin, DynamicLayer):
    """Keys and values of all tokens."""


class SlidingWindowLayer(OwnedTensorsMixin, DynamicLayer):
    """Keys and values of each row's last `sliding_window - 1` and first `attention_sinks` tokens."""

    names = ("keys", "values", "places")
    past: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None  # all since the last `crop`, where recorded

    def __init__(self, sliding_window: int, attention_sinks: int):
        super().__init__()
        self.sliding_window = sliding_window
        self.attention_sinks = attention_sinks
        self.cumulative_length = 0
        self.places: torch.LongTensor | None = None  # [B, L], -1 where a column holds no token

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
        capacity = self.attention_sinks + self.sliding_window - 1
        surplus = places.shape[1] - capacity
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

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().map(function)
        self.past = None if self.past is None else tuple(map(function, self.past))

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
        self.places = self.past = None


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


def snapshot(cache: Cache) -> Cache:
    """
    `cache` as it is now, to come back to after it went on. Of its tensors only the state of TTT, whose size is fixed,
    is copied: keys and values are never written to, but replaced.
    """
    layers = [copy.copy(layer) for layer in cache.layers]
    for layer in layers:
        if getattr(layer, "ttt_state", None) is not None:
            layer.ttt_state = layer.ttt_state.clone()
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
