# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Perplexity by position on a long text, with the size of the TTT state beside it."""

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from .conditions import CHUNK_SIZE, conditions_of, empty_cache, max_length, under


FIRST_BIN = 512  # tokens of the first stretch; each further one ends at twice the position


def evaluate_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | os.PathLike,
    length: int = 65536,
    conditions: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """
    Reads a text in chunks, and takes the loss of each token.

    Args:
        text: file to read, which is cut after `length` tokens.
        length: in tokens. A condition whose attention is made for fewer stops there.
        conditions: by default all that the model has.

    Returns:
        A row per condition and stretch, that ends at 512, 1,024, 2,048 … tokens: `condition`, `first` and `last`
        position, `perplexity`, and `state_norm`, the root mean square over layers of the norm of TTT's weights there,
        `None` without TTT.

    Raises:
        ValueError, OSError: a text or a condition that will not do.
    """
    if length < 2:
        raise ValueError(f"`length` must be at least 2 tokens, got {length}.")
    try:
        words = Path(text).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{text} is no text: {error}") from None
    ids = torch.tensor([tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"]])[:, :length]
    if ids.shape[1] < 2:
        raise ValueError(f"{text} has no text.")
    rows = []
    for condition in conditions_of(model) if conditions is None else conditions:
        with under(condition, model) as current:
            end = int(min(ids.shape[1], max_length(model, condition)))
            rows += _read(current, ids[:, :end].to(model.device), condition)
    return rows


def _read(model: PreTrainedModel, ids: torch.Tensor, condition: str) -> list[dict[str, Any]]:
    cache, rows = empty_cache(model), []
    loss, first, position, last = 0.0, 1, 0, FIRST_BIN
    chunks = math.ceil((ids.shape[1] - 1) / CHUNK_SIZE)
    for losses in tqdm(read_losses(model, ids, cache), desc=f"Perplexity, {condition}", total=chunks, unit=" chunks"):
        loss, position = loss + losses.sum().item(), position + len(losses)
        if position >= last or position == ids.shape[1] - 1:
            row = {"condition": condition, "first": first, "last": position}
            row["perplexity"] = math.exp(loss / (position - first + 1))
            rows.append(row | {"state_norm": state_norm(cache)})
            loss, first, last = 0.0, position + 1, 2 * last
    return rows


@torch.no_grad()
def read_losses(model: PreTrainedModel, ids: torch.Tensor, cache: Cache) -> Iterator[torch.Tensor]:
    """The losses of the tokens `ids` `[1, T]` from the second one on, chunk by chunk, which `cache` takes up."""
    for start in range(0, ids.shape[1] - 1, CHUNK_SIZE):
        targets = ids[0, start + 1 : start + CHUNK_SIZE + 1]
        piece = ids[:, start : start + len(targets)]
        logits = model(input_ids=piece, cache=cache, use_cache=True).logits[0].float()
        yield torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def state_norm(cache: Cache) -> float | None:
    """The root mean square over layers of the norm of TTT's weights, `None` without TTT."""
    states = [layer.ttt_state for layer in cache.layers if getattr(layer, "ttt_state", None) is not None]
    squares = [x.double().square().sum() for state in states for name, x in vars(state).items() if name[0] in "Wb"]
    return math.sqrt(float(sum(squares)) / len(states)) if states else None
