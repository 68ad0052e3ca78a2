# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Layers for Transformers' `DynamicCache` that hold the state of TTT, and windowed attention with sinks."""

import torch
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from .configuration_ttt_omni import SLIDING_LAYER_TYPES
from .ops_ttt_omni import TTTState


# Transformers' linear-attention layers could hold TTT's tensors, but neither repeat nor select them along the batch,
# and read them back only after a convolution state was written. No class here sets `_layer_type`, which would replace
# a layer for every model in the process: `add_ttt_layers` puts them where a model of this package needs them.

# A token's place is its index among the tokens of its sequence (padding is no token: -1), plus the index of its
# sequence in a packed row shifted by this. Places grow along a row, and those of two sequences are never near.
SEQUENCE_SHIFT = 40


class FullAttentionLayer(DynamicLayer):
    """Keys and values of all tokens. Transformers 5.17's own layer keeps their number when it is reset."""

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False


class SlidingWindowLayer(DynamicLayer):
    """Keys and values of each row's last `sliding_window - 1` and first `attention_sinks` tokens."""

    is_croppable = False

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
        columns = columns[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
        return keys.gather(2, columns), values.gather(2, columns), places

    def update(self, *args, **kwargs):
        raise NotImplementedError("A window with sinks needs each token's place: call `update_window`.")

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_max_length(self) -> int:
        return self.attention_sinks + self.sliding_window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cumulative_length + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            raise RuntimeError("A window cannot be cropped: the tokens that it would need again are gone.")

    def reset(self) -> None:
        self.keys = self.values = self.places = None
        self.is_initialized = False
        self.cumulative_length = 0

    def offload(self):
        super().offload()
        if self.is_initialized:
            self.places = self.places.to("cpu", non_blocking=True)

    def prefetch(self):
        super().prefetch()
        if self.is_initialized:
            self.places = self.places.to(self.device, non_blocking=True)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        SlidingWindowLayer.batch_select_indices(self, beam_idx)  # and not also a subclass's, which reorders itself

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.keys, self.values, self.places = (
                x.repeat_interleave(repeats, dim=0) for x in (self.keys, self.values, self.places)
            )

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.is_initialized:
            indices = indices.to(self.keys.device)
            self.keys, self.values, self.places = (x[indices] for x in (self.keys, self.values, self.places))


class NoAttentionLayer(CacheLayerMixin):
    """Counts the tokens of a layer that has no attention."""

    supports_early_init = False

    def __init__(self):
        super().__init__()
        self.cumulative_length = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise NotImplementedError("A layer without attention has no keys and values.")

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        raise NotImplementedError("A layer without attention has no keys and values.")

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cumulative_length + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        self.cumulative_length -= abs(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None: ...

    def batch_repeat_interleave(self, repeats: int) -> None: ...

    def batch_select_indices(self, indices: torch.Tensor) -> None: ...


class TTTCacheMixin:
    """Adds the state of TTT to a cache layer. `ttt_state` is `None` before the first token."""

    is_croppable = False
    ttt_state: TTTState | None = None

    def update_ttt_state(self, state: TTTState, length: int) -> None:
        """Store the state after `length` more tokens."""
        self.ttt_state = state
        if isinstance(self, NoAttentionLayer):
            self.cumulative_length += length

    def offload(self):
        super().offload()
        if self.ttt_state is not None:
            self.ttt_state = self.ttt_state.to("cpu")

    def reset(self) -> None:
        super().reset()
        self.ttt_state = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        if self.ttt_state is not None:
            self.ttt_state = self.ttt_state.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.ttt_state is not None:
            self.ttt_state = self.ttt_state.repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        if self.ttt_state is not None:
            self.ttt_state = self.ttt_state.select(indices)

    def crop(self, tokens_to_remove: int) -> None:
        """
        Forget the last tokens (`tokens_to_remove` is negative, as elsewhere in Transformers).

        Raises:
            RuntimeError: if that would go back past the start of a row's current mini-batch.
        """
        state = self.ttt_state if self.ttt_state is None else self.ttt_state.rewind(abs(tokens_to_remove))
        super().crop(tokens_to_remove)
        self.ttt_state = state


class TTTLayer(TTTCacheMixin, NoAttentionLayer):
    """Cache of a `linear_attention` layer."""


class TTTAndFullAttentionLayer(TTTCacheMixin, FullAttentionLayer):
    """Cache of a `hybrid` layer."""


class TTTAndSlidingWindowLayer(TTTCacheMixin, SlidingWindowLayer):
    """Cache of a `hybrid_sliding` layer."""


def add_ttt_layers(cache: Cache, config: PreTrainedConfig) -> None:
    """
    Give `cache` the layers of this module wherever `config.layer_types` asks for them.

    Raises:
        ValueError: if the cache was already used by a model with other layers.
    """
    if cache.layer_class_to_replicate is not None:
        cache.layers += [cache.layer_class_to_replicate() for _ in range(len(cache.layers), config.num_hidden_layers)]
        cache.layer_class_to_replicate = None
    classes = {
        "full_attention": FullAttentionLayer,
        "linear_attention": TTTLayer,
        "hybrid": TTTAndFullAttentionLayer,
        "hybrid_sliding": TTTAndSlidingWindowLayer,
        "sliding_attention": SlidingWindowLayer,
    }
    for layer_idx, layer_type in enumerate(config.layer_types):
        layer = cache.layers[layer_idx]
        is_used = getattr(layer, "is_initialized", False)
        if type(layer) is classes[layer_type]:
            continue
        if layer_type == "full_attention" and (is_used or type(layer) is not DynamicLayer):
            continue  # full attention can do with any layer, such as a quantized one
        if is_used:
            raise ValueError(
                f"Layer {layer_idx} of the cache is a used {type(layer).__name__}, but the model's is of type "
                f"{layer_type!r}: start from an empty `DynamicCache`."
            )
        kwargs = {}
        if layer_type in SLIDING_LAYER_TYPES:
            kwargs = {"sliding_window": config.sliding_window, "attention_sinks": config.attention_sinks}
        cache.layers[layer_idx] = classes[layer_type](**kwargs)
