# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Conversations of any lengths that go on in one batch, and a cache that is come back to."""

import pytest
import torch
from layouts import LAYERS, assert_same_cache, random_rows
from transformers import DynamicCache

from ttt_omni.cache_ttt_omni import BatchedCache, snapshot


LENGTHS = [3, 21, 12, 1]


def prefill(model, rows):
    caches = []
    for row in rows:
        caches.append(DynamicCache(config=model.config))
        model(row[None], cache=caches[-1])
    return caches


@pytest.mark.parametrize("layers", LAYERS)
@torch.no_grad()
def test_rows_join_and_leave(models, layers):
    """Each row's logits and state are those of the row alone, whoever else is in the batch."""
    model, text_config = models(layers), models(layers).config.get_text_config()
    rows = random_rows(0, LENGTHS)
    caches, alone = prefill(model, rows), prefill(model, rows)
    members = [[0, 1], [0, 1, 2, 3], [3, 1], [2, 1, 0]]
    for step, batch in enumerate(members):
        cache = BatchedCache([caches[row] for row in batch], text_config)
        for length in (1, 4, 1, 1):
            tokens = torch.stack(random_rows(10 * step + length, [length] * len(batch)))
            logits = model(tokens, cache=cache).logits
            for index, row in enumerate(batch):
                expected = model(tokens[index : index + 1], cache=alone[row]).logits
                torch.testing.assert_close(logits[index : index + 1], expected, rtol=1e-9, atol=1e-9)
        for row, single in zip(batch, cache.split()):
            caches[row] = single
    for cache, expected in zip(caches, alone):
        assert_same_cache(cache, expected)


@torch.no_grad()
def test_speech_decoder(models):
    """With rows that have not said anything yet."""
    decoder = models("hybrid").speech_decoder
    states = torch.randn(3, 4, decoder.config.input_size, dtype=torch.float64)
    caches, alone = ([DynamicCache(config=decoder.config) for _ in range(3)] for _ in range(2))
    decoder(states[:1, :2], cache=caches[0])
    decoder(states[:1, :2], cache=alone[0])
    cache = BatchedCache(caches, decoder.config)
    for step in (2, 3):
        logits = decoder(states[:, step : step + 1], cache=cache)
        for row in range(3):
            expected = decoder(states[row : row + 1, step : step + 1], cache=alone[row])
            torch.testing.assert_close(logits[row : row + 1], expected, rtol=1e-9, atol=1e-9)
    for single, expected in zip(cache.split(), alone):
        assert_same_cache(single, expected)


@torch.no_grad()
def test_what_a_batch_refuses(models):
    model = models("hybrid")
    config = model.config.get_text_config()
    cache = BatchedCache(prefill(model, random_rows(0, LENGTHS)), config)
    tokens = torch.full((4, 1), 7)
    with pytest.raises(ValueError, match="neither mask nor positions"):
        model(tokens, cache=cache, attention_mask=torch.ones(4, 22))
    two = DynamicCache(config=model.config)
    model(tokens[:2], cache=two)
    with pytest.raises(ValueError, match="has one row, got 2"):
        BatchedCache([two], config)


@pytest.mark.parametrize("layers", LAYERS)
@torch.no_grad()
def test_snapshot(models, layers):
    """What was said after it leaves no trace, also where it went on in a batch."""
    model = models(layers)
    first, second, third = random_rows(0, [11, 9, 10])
    cache, never = prefill(model, [first, first])
    before = snapshot(cache)
    model(second[None], cache=cache)
    BatchedCache([cache], model.config.get_text_config())
    assert_same_cache(before, never)
    torch.testing.assert_close(model(third[None], cache=before).logits, model(third[None], cache=never).logits)
    assert_same_cache(before, never)
