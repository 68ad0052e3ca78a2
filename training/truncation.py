# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Truncated backpropagation: sequences in pieces, each of which starts from what those before left in the cache."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from transformers import Cache, DynamicCache

from ..cache_ttt_omni import add_ttt_layers
from ..configuration_ttt_omni import TTTOmniConfig, audio_embedding_lengths
from .data import IGNORE_INDEX


def find_pieces(batch: dict[str, torch.Tensor], length: int, config: TTTOmniConfig) -> list[slice]:
    """
    Cuts the sequences of a packed batch into pieces of at most `length` tokens.

    No cut goes through an answer, whose speech is learned as a whole, or through a window of speech, which is encoded
    as a whole: a piece is longer where it is one of these.

    Args:
        batch: of a packing [`ConversationCollator`].
        length: of a piece, in tokens.
        config: the model's.

    Returns:
        The tokens of each piece in the one row.
    """
    window, answered = _windows(batch, config), batch["labels"][0] != IGNORE_INDEX  # [T]
    starts = batch["position_ids"][0] == 0
    may_cut = starts | ~answered & ((window < 0) | (window != window.roll(1)))  # before a token
    borders, is_start = may_cut.nonzero().flatten().tolist(), starts.tolist()
    pieces, first = [], 0
    for start, end in pairwise([*borders, len(may_cut)]):
        if start > first and (is_start[start] or end - first > length):
            pieces.append(slice(first, start))
            first = start
    return [*pieces, slice(first, len(may_cut))]


def take_pieces(
    batch: dict[str, torch.Tensor], pieces: list[slice], config: TTTOmniConfig, num_passes: int
) -> Iterator[dict[str, Any]]:
    """
    The arguments of the forward passes over the pieces, in turn. Each has the cache of those before of its sequence,
    cut off from their graph, so that it takes a backward pass of its own, which frees its activations.

    Args:
        batch: of a packing [`ConversationCollator`].
        pieces: what [`find_pieces`] found in it.
        config: the model's.
        num_passes: passes to take, at least as many as pieces; those left over have one token and nothing to learn.
    """
    window = _windows(batch, config)
    answered = batch["labels"][0] != IGNORE_INDEX
    answer = (answered & ~answered.roll(1)).cumsum(0) - 1  # [T], the last one that has begun
    cache = None
    for piece in pieces:
        if batch["position_ids"][0, piece.start] == 0:
            cache = DynamicCache(config=config)
            add_ttt_layers(cache, config.get_text_config())
        _detach(cache)
        inputs = {name: batch[name][:, piece] for name in ("input_ids", "labels")}
        inputs |= {"cache": cache, "use_cache": True}
        windows = window[piece].unique()
        windows = windows[windows >= 0]
        for name in ("input_features", "input_features_mask"):
            if name in batch and len(windows) > 0:
                inputs[name] = batch[name][windows]
        answers = answer[piece][answered[piece]].unique()
        if "unit_labels" in batch and len(answers) > 0:
            inputs["unit_labels"] = batch["unit_labels"][answers]
        yield inputs
    for _ in range(num_passes - len(pieces)):
        _detach(cache)
        input_ids = batch["input_ids"][:, -1:]
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        yield {"input_ids": input_ids, "labels": labels, "cache": cache, "use_cache": True}


def _windows(batch, config):
    """The window of speech `[T]` that each token belongs to, -1 for text."""
    window = torch.full_like(batch["input_ids"][0], -1)
    if "input_features" not in batch:
        return window
    is_audio = batch["input_ids"][0] == config.audio_token_id
    features, mask = batch["input_features"], batch.get("input_features_mask")
    mask = features.new_ones(features.shape[0], features.shape[-1]) if mask is None else mask
    lengths = audio_embedding_lengths(mask, config.audio_downsample)
    window[is_audio] = torch.arange(len(lengths), device=window.device).repeat_interleave(lengths.to(window.device))
    return window


def _detach(cache: Cache) -> None:
    """Cuts all that the cache holds off from the autograd graph."""
    for layer in cache.layers:
        layer.detach()
