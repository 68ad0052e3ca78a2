# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""What tokens that come one by one are written to in place: the same as what they are appended to."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import assert_same_cache, text_model
from transformers import DynamicCache

from ttt_omni.cache_ttt_omni import SlidingWindowLayer, snapshot


WINDOWED, FULL = ("sliding_attention", "hybrid_sliding"), ("full_attention", "hybrid", "linear_attention")
VOCABULARY = 50


def make_model(window=5, sinks=2, layers=WINDOWED):
    types = {"ttt_layer_type": ["linear", "mlp", "linear"][: len(layers)]}
    return text_model([*layers], sliding_window=window, attention_sinks=sinks, ttt_gate_init=0.5, **types).double()


@pytest.fixture(scope="module")
def models():
    found = {}

    def get(*sizes):
        if sizes not in found:
            found[sizes] = make_model(*sizes)
        return found[sizes]

    return get


def tokens(seed, *shape):
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def rings(cache):
    return [getattr(layer, "ring", None) is not None for layer in cache.layers]


@torch.no_grad()
def go_on(model, cache, ids):
    """Logits of tokens that come one by one."""
    return torch.cat([model(column, cache=cache).logits for column in ids.split(1, dim=1)], dim=1)


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    window=st.sampled_from([1, 2, 5]),
    sinks=st.sampled_from([0, 2]),
    rows=st.integers(1, 3),
    data=st.data(),
)
@torch.no_grad()
def test_steps_are_as_if_appended(models, seed, window, sinks, rows, data):
    """Chunks and single tokens, padding anywhere, rows repeated, selected and saved: as each row at once."""
    model, draw = models(window, sinks), data.draw
    cache, mask = DynamicCache(config=model.config), torch.ones(rows, 0, dtype=torch.long)
    ids = torch.zeros(rows, 0, dtype=torch.long)
    for part in range(draw(st.integers(1, 5), "parts")):
        length = draw(st.integers(1, 9), "length")
        new, here = tokens(seed + part, len(ids), length), torch.ones(len(ids), length, dtype=torch.long)
        if draw(st.booleans(), "padded"):
            here = tokens(seed + 100 + part, len(ids), length) % 3 > 0
        ids, mask = torch.cat([ids, new], dim=1), torch.cat([mask, here.long()], dim=1)
        start = ids.shape[1] - length
        bounds = [start, ids.shape[1]]
        if draw(st.booleans(), "one by one"):
            bounds = range(start, ids.shape[1] + 1)
        masked = not mask.all() or draw(st.booleans(), "masked")
        logits = torch.cat(
            [
                model(ids[:, a:b], attention_mask=mask[:, :b] if masked else None, cache=cache).logits
                for a, b in zip(bounds, bounds[1:])
            ],
            dim=1,
        )
        for row in range(len(ids)):
            if mask[row].any():
                alone = model(ids[row][mask[row] == 1][None]).logits[0]
                expected = alone[len(alone) - mask[row, start:].sum() :]
                assert_same(logits[row, mask[row, start:] == 1], expected)
        change = draw(st.sampled_from([None, "repeat", "select", "save"]), "change")
        if change == "repeat" and len(ids) < 3:
            cache.batch_repeat_interleave(2)
            ids, mask = ids.repeat_interleave(2, 0), mask.repeat_interleave(2, 0)
        elif change == "select":
            chosen = tokens(seed + 200 + part, len(ids)) % len(ids)
            cache.reorder_cache(chosen)
            ids, mask = ids[chosen], mask[chosen]
        elif change == "save":
            for layer in cache.layers:
                layer.load({name: x.clone() for name, x in layer.tensors().items()}, layer.get_seq_length())


@pytest.mark.parametrize("length", [3, 30])
@torch.no_grad()
def test_a_ring_stays_where_it_is(models, length):
    """Steps move no tensor and make none larger; what is saved is what an appended window saves."""
    model, ids, following = models(5, 2), tokens(0, 1, length), tokens(1, 1, 20)
    cache, appended = (DynamicCache(config=model.config) for _ in range(2))
    model(ids, cache=cache)
    go_on(model, cache, following[:, :1])
    assert all(rings(cache))
    places = [(layer.ring.keys.data_ptr(), layer.ring.values.data_ptr()) for layer in cache.layers]
    go_on(model, cache, following[:, 1:])
    assert places == [(layer.ring.keys.data_ptr(), layer.ring.values.data_ptr()) for layer in cache.layers]
    model(torch.cat([ids, following], dim=1), cache=appended)
    assert not any(rings(appended))
    assert_same_cache(cache, appended)
    assert_same(go_on(model, cache, ids), go_on(model, appended, ids))


BOTH = pytest.mark.parametrize("layers", [WINDOWED, FULL])


@BOTH
@torch.no_grad()
def test_a_snapshot_sees_nothing_of_what_comes(models, layers):
    model, ids, a, b = models(5, 2, layers), tokens(0, 1, 9), tokens(1, 1, 8), tokens(2, 1, 8)
    cache, never = (DynamicCache(config=model.config) for _ in range(2))
    for one in (cache, never):
        model(ids, cache=one)
        go_on(model, one, ids)
    before = snapshot(cache)
    copied = copy.deepcopy(before)
    assert all(rings(before)) == (layers is WINDOWED)
    expected = [go_on(model, copy.deepcopy(never), following) for following in (a, b)]
    assert_same(go_on(model, cache, a), expected[0])
    assert_same_cache(before, never)
    assert_same(go_on(model, before, b), expected[1])
    assert_same(go_on(model, copied, b), expected[1])
    again = snapshot(cache)
    assert_same(go_on(model, again, b), go_on(model, cache, b))
    assert_same(go_on(model, again, a), go_on(model, cache, a))


@torch.no_grad()
def test_full_attention_has_room(models):
    """Steps move nothing; what was cropped, and what another row holds, is never seen again."""
    model, ids = models(5, 2, FULL), tokens(0, 2, 11)
    cache = filled(model, ids)
    places = [layer.keys.data_ptr() for layer in cache.layers[:2]]
    go_on(model, cache, ids)
    assert places == [layer.keys.data_ptr() for layer in cache.layers[:2]]
    before = snapshot(cache)
    cache.crop(-2)  # 22 tokens, mini-batches of 4
    following = tokens(1, 2, 6)
    whole = torch.cat([ids, ids[:, :9], following], dim=1)
    assert_same(go_on(model, cache, following), model(whole).logits[:, -6:])
    cache.reorder_cache(torch.tensor([1, 1]))
    whole = torch.cat([whole, following], dim=1)[[1, 1]]
    assert_same(go_on(model, cache, following[[1, 1]]), model(whole).logits[:, -6:])
    assert_same(go_on(model, before, following), model(torch.cat([ids, ids, following], dim=1)).logits[:, -6:])
    with pytest.raises(ValueError, match="has 2 rows"):
        model(ids[:1], cache=cache)


@BOTH
@torch.no_grad()
def test_crop_after_steps(models, layers):
    model, ids, following = models(5, 2, layers), tokens(0, 1, 9), tokens(1, 1, 4)
    cache, expected = (DynamicCache(config=model.config) for _ in range(2))
    model(ids, cache=cache)
    go_on(model, cache, ids)
    cache.activate_past_recording()
    go_on(model, cache, following)
    assert not any(rings(cache)) and all(layer.record_past for layer in cache.layers)
    cache.crop(-3)
    model(torch.cat([ids, ids, following[:, :1]], dim=1), cache=expected)
    assert_same_cache(cache, expected)


@BOTH
def test_nothing_is_written_to_what_a_backward_pass_needs(models, layers):
    model, ids = models(5, 2, layers), tokens(0, 1, 12)
    whole = model(ids).logits[:, -1].square().sum()
    embeddings = model.get_input_embeddings().weight
    (expected,) = torch.autograd.grad(whole, embeddings)
    cache = DynamicCache(config=model.config)
    model(ids[:, :8], cache=cache)
    for column in ids[:, 8:].split(1, dim=1):
        logits = model(column, cache=cache).logits
    assert not any(rings(cache))
    go_on(model, cache, ids)
    assert all(rings(cache)) == (layers is WINDOWED)
    (actual,) = torch.autograd.grad(logits.square().sum(), embeddings)
    assert_same(actual, expected)


@BOTH
@torch.no_grad()
def test_inference_mode_and_back(models, layers):
    model, ids = models(5, 2, layers), tokens(0, 1, 12)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(ids[:, :6], cache=cache)
        model(ids[:, 6:7], cache=cache)
    logits = go_on(model, cache, ids[:, 7:])
    assert_same(logits, model(ids).logits[:, 7:])


@torch.no_grad()
def test_far_away(models):
    """At token 10,000,000 as at token 100: what is seen depends on distances alone."""
    model, ids = models(5, 2), tokens(0, 1, 40)
    cache = DynamicCache(config=model.config)
    model(ids, cache=cache)
    far = copy.deepcopy(cache)
    for layer in far.layers:
        tensors = layer.tensors()
        shift = 10_000_000 - 40
        tensors["places"] = torch.where(tensors["places"] < 2, tensors["places"], tensors["places"] + shift)
        layer.load(tensors, 10_000_000)
    appended = copy.deepcopy(far)
    for column in tokens(1, 1, 12).split(1, dim=1):
        stepped = model(column, cache=far).logits
        with torch.enable_grad():
            expected = model(column, cache=appended).logits
        assert_same(stepped, expected)
    assert all(rings(far)) and not any(rings(appended))


@torch.no_grad()
def test_eager_attention_gives_weights_in_the_order_of_tokens(models):
    model, ids = make_model(), tokens(0, 1, 12)
    model.set_attn_implementation("eager")
    cache = DynamicCache(config=model.config)
    model(ids[:, :11], cache=cache)
    step = model(ids[:, 11:], cache=cache, output_attentions=True).attentions[0]
    assert not any(rings(cache)) and step.shape[-1] == 7
    expected = go_on(models(5, 2), filled(models(5, 2), ids), ids)
    torch.testing.assert_close(go_on(model, cache, ids), expected, rtol=0, atol=1e-6)  # its softmax is in float32


def filled(model, ids):
    cache = DynamicCache(config=model.config)
    model(ids, cache=cache)
    return cache


@torch.no_grad()
def test_a_window_with_tokens_missing_is_appended_to():
    layer = SlidingWindowLayer(4, 1)
    layer.update_window(*torch.randn(2, 1, 1, 3, 8), torch.tensor([[0, 2, 3]]))
    assert layer.plan_step(torch.tensor([[4]]), False, None) is None and layer.ring is None
