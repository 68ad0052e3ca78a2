# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""The inner loop of TTT against ttt-lm-pytorch, and the contract of its state."""

import random
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deliveries import OPS, Delivery
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from ttt_omni import TTTLinearState, TTTOmniTextConfig, ops_ttt_omni, ttt_linear, use_kernels
from ttt_omni.modeling_ttt_omni import TTTOmniTextModel


GOLDENS = ["mb16_len16", "mb16_len75", "mb64_len200"]
TTT_TYPES = pytest.mark.parametrize("ttt_type", ["linear", "mlp"])
properties = settings(max_examples=60, deadline=None)


def random_inputs(ttt_type, seed, rows, heads=2, length=20, head_dim=8, mini_batch_size=4, dtype=torch.float32):
    """Inputs of an op with the scales that a graft has: q, k of norm sqrt(D), W1 of 0.02."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    q, k, v = (randn(rows, heads, length, head_dim) for _ in range(3))
    lr = torch.sigmoid(randn(rows, heads, length)) / head_dim
    scale = torch.full((mini_batch_size,), mini_batch_size**-0.5, dtype=dtype)
    norm = 1 + 0.1 * randn(heads, head_dim), 0.1 * randn(heads, head_dim)
    width = 4 * head_dim
    shapes = {
        "linear": [(head_dim, head_dim), (1, head_dim)],
        "mlp": [(head_dim, width), (1, width), (width, head_dim), (1, head_dim)],
    }
    initial = [0.2 * randn(heads, *shape) for shape in shapes[ttt_type]]
    return (q, k, v, lr), (scale, *norm), initial


def tensors(state):
    return {field.name: getattr(state, field.name) for field in fields(state)}


def assert_states_close(state, expected, tolerance):
    for name, value in tensors(expected).items():
        torch.testing.assert_close(tensors(state)[name], value, rtol=tolerance, atol=tolerance)


def run_in_chunks(op, tokens, parameters, state, lengths, **masks):
    outputs, start = [], 0
    for length in lengths:
        chunk = slice(start, start + length)
        chunk_masks = {name: mask[:, chunk] for name, mask in masks.items()}
        o, state = op(*(x[:, :, chunk] for x in tokens), *parameters, state, **chunk_masks)
        outputs.append(o)
        start += length
    return torch.cat(outputs, dim=2), state


def cut(length, cuts):
    bounds = [0, *sorted({c % (length + 1) for c in cuts}), length]
    return [b - a for a, b in zip(bounds, bounds[1:])]


@TTT_TYPES
@pytest.mark.parametrize("case", GOLDENS)
def test_equals_ttt_lm(goldens, ttt_type, case):
    golden = load_file(goldens.parent / "ttt" / f"ttt_{ttt_type}_{case}.safetensors")
    op, state_class = OPS[ttt_type]
    tokens = golden["q"], golden["k"], golden["v"], golden["lr"].squeeze(-1)
    scale = golden["token_scale"].flatten()
    parameters = scale, golden["param.ttt_norm_weight"], golden["param.ttt_norm_bias"]
    names = [field.name for field in fields(state_class) if f"init_{field.name}" in golden]
    state = state_class.initial(*(golden[f"init_{name}"] for name in names), batch_size=golden["q"].shape[0])

    o, last = op(*tokens, *parameters, state)
    torch.testing.assert_close(o, golden["o"], rtol=1e-9, atol=1e-9)
    for name in names:
        torch.testing.assert_close(getattr(last, name), golden[f"last_full_{name}"], rtol=1e-9, atol=1e-9)
    assert last.position.tolist() == [golden["q"].shape[2] % len(scale)] * golden["q"].shape[0]

    decoded, decoded_last = run_in_chunks(op, tokens, parameters, state, [1] * golden["q"].shape[2])
    torch.testing.assert_close(decoded, golden["o"], rtol=1e-9, atol=1e-9)
    assert_states_close(decoded_last, last, 1e-12)


@TTT_TYPES
@pytest.mark.parametrize("case", GOLDENS)
@torch.no_grad()
def test_layer_equals_ttt_lm(goldens, ttt_type, case):
    """The whole layer with ttt-lm's options: no norm of q and k, rotary embedding, the target as it is."""
    golden = load_file(goldens.parent / "ttt" / f"ttt_{ttt_type}_{case}.safetensors")
    _, heads, _, head_dim = golden["q"].shape
    mini_batch_size = golden["token_scale"].numel()
    config = TTTOmniTextConfig(
        vocab_size=10,
        hidden_size=heads * head_dim,
        num_hidden_layers=1,
        num_attention_heads=heads,
        layer_types=["linear_attention"],
        ttt_layer_type=ttt_type,
        ttt_mini_batch_size=mini_batch_size,
        ttt_qk_norm="none",
        ttt_base_lr={"linear": 1.0, "mlp": 0.1}[ttt_type],
        ttt_rope_theta=10000.0,
        ttt_standardize_target=False,
    )
    layer = TTTOmniTextModel(config).double().layers[0].ttt
    # ttt-lm rotates neighbours, Llama the halves of a head: ours are its channels in another order.
    pairs = torch.arange(head_dim).view(-1, 2).T.flatten()
    channels = (torch.arange(heads)[:, None] * head_dim + pairs).flatten()
    theirs = {name.removeprefix("param."): x for name, x in golden.items() if name.startswith("param.")}
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(layer, name).weight.copy_(theirs[f"{name}.weight"][channels])
    layer.q_proj.bias.zero_()
    layer.k_proj.bias.zero_()
    layer.o_proj.weight.copy_(theirs["o_proj.weight"][:, channels])
    layer.post_norm.weight.copy_(theirs["post_norm.weight"][channels])
    layer.post_norm.bias.copy_(theirs["post_norm.bias"][channels])
    layer.lr_gate.weight.copy_(theirs["learnable_ttt_lr_weight"][:, 0])
    layer.lr_gate.bias.copy_(theirs["learnable_ttt_lr_bias"][:, 0])
    layer.token_scale.weight.copy_(theirs["learnable_token_idx"])
    layer.inner_norm.weight.copy_(theirs["ttt_norm_weight"][:, pairs])
    layer.inner_norm.bias.copy_(theirs["ttt_norm_bias"][:, pairs])
    for name, parameter in layer.inner_model.named_parameters():
        value = theirs[name]
        value = value[:, pairs] if name == "W1" else value
        parameter.copy_(value[..., pairs] if value.shape[-1] == head_dim else value)

    torch.testing.assert_close(layer(golden["x"]), golden["y"], rtol=1e-6, atol=1e-6)  # angles are in float32


@pytest.mark.parametrize("first", range(0, 300, 50))
def test_deliveries(first):
    """What `python tests/deliveries.py` draws."""
    for number in range(first, first + 50):
        Delivery(random.Random(number)).check()


@properties
@given(draw=st.randoms(use_true_random=False))
def test_any_delivery(draw):
    Delivery(draw).check()


@TTT_TYPES
@properties
@given(
    seed=st.integers(0, 2**31),
    length=st.integers(0, 30),
    cuts=st.lists(st.integers(0, 30), max_size=8),
    mini_batch_size=st.integers(1, 9),
)
def test_any_split_is_the_same(ttt_type, seed, length, cuts, mini_batch_size):
    op, state_class = OPS[ttt_type]
    tokens, parameters, initial = random_inputs(ttt_type, seed, rows=2, length=length, mini_batch_size=mini_batch_size)
    state = state_class.initial(*initial, batch_size=2)
    o, last = op(*tokens, *parameters, state)
    for lengths in (cut(length, cuts), [1] * length):
        if lengths:
            chunked, chunked_last = run_in_chunks(op, tokens, parameters, state, lengths)
            torch.testing.assert_close(chunked, o, rtol=1e-5, atol=1e-5)
            assert_states_close(chunked_last, last, 1e-5)


@TTT_TYPES
@properties
@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=4),
    cuts=st.lists(st.integers(0, 20), max_size=5),
    data=st.data(),
)
def test_padding_changes_nothing(ttt_type, seed, lengths, cuts, data):
    """On the left, on the right, or anywhere, in one chunk or in several; its content is NaN."""
    op, state_class = OPS[ttt_type]
    total = max(max(lengths), 1) + 3
    tokens, parameters, initial = random_inputs(ttt_type, seed, rows=len(lengths), length=total)
    columns = [
        sorted(data.draw(st.permutations(range(total)))[:length])
        if data.draw(st.booleans())
        else list(range(total - length, total) if data.draw(st.booleans()) else range(length))
        for length in lengths
    ]
    mask = torch.zeros(len(lengths), total, dtype=torch.long)
    for row, tokens_of_row in enumerate(columns):
        mask[row, tokens_of_row] = 1
    padded = [x.masked_fill((mask == 0).view(len(lengths), 1, total, *[1] * (x.ndim - 3)), torch.nan) for x in tokens]
    state = state_class.initial(*initial, batch_size=len(lengths))
    o, last = run_in_chunks(op, padded, parameters, state, cut(total, cuts) or [total], attention_mask=mask)
    assert not o.isnan().any()
    for row, tokens_of_row in enumerate(columns):
        alone, alone_last = op(
            *(x[row : row + 1][:, :, tokens_of_row] for x in tokens),
            *parameters,
            state_class.initial(*initial, batch_size=1),
        )
        torch.testing.assert_close(o[row : row + 1][:, :, tokens_of_row], alone, rtol=1e-5, atol=1e-5)
        if tokens_of_row:
            assert_states_close(last.select(torch.tensor([row])), alone_last, 1e-5)


@TTT_TYPES
def test_rows_that_fill_a_mini_batch_together(ttt_type):
    """One row stands where the other's tokens end, so that side by side they look like one whole mini-batch."""
    op, state_class = OPS[ttt_type]
    tokens, parameters, initial = random_inputs(ttt_type, 0, rows=2, length=4)
    state = state_class.initial(*initial, batch_size=2)
    mask = torch.tensor([[0, 0], [1, 1]])
    o, last = run_in_chunks(op, [x[:, :, :2] for x in tokens], parameters, state, [2], attention_mask=mask)
    o, last = op(*(x[:, :, 2:] for x in tokens), *parameters, last)
    alone, _ = op(*(x[:1, :, 2:] for x in tokens), *parameters, state.select(torch.tensor([0])))
    torch.testing.assert_close(o[:1], alone, rtol=1e-5, atol=1e-5)
    alone, _ = op(*(x[1:] for x in tokens), *parameters, state.select(torch.tensor([1])))
    torch.testing.assert_close(o[1:], alone[:, :, 2:], rtol=1e-5, atol=1e-5)


@TTT_TYPES
@pytest.mark.parametrize("pending", [1, 2])
@pytest.mark.parametrize("length", [4, 8])
def test_padding_in_place_of_pending_tokens(ttt_type, pending, length):
    """As many columns as whole mini-batches have, of which padding takes as many as tokens are pending."""
    op, state_class = OPS[ttt_type]
    tokens, parameters, initial = random_inputs(ttt_type, 0, rows=2, length=pending + length, dtype=torch.float64)
    _, state = op(*(x[:, :, :pending] for x in tokens), *parameters, state_class.initial(*initial, batch_size=2))
    mask = torch.ones(2, length, dtype=torch.long)
    mask[:, :pending] = 0
    o, last = op(*(x[:, :, pending:] for x in tokens), *parameters, state, attention_mask=mask)
    expected, expected_last = op(*(x[:, :, 2 * pending :] for x in tokens), *parameters, state)
    assert not o[:, :, :pending].any()
    torch.testing.assert_close(o[:, :, pending:], expected, rtol=1e-9, atol=1e-9)
    assert_states_close(last, expected_last, 1e-9)


@TTT_TYPES
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_row_breaks_no_other(ttt_type, value):
    """Nor its padding, nor what the other row's padding holds; and padding has gradients of 0."""
    op, state_class = OPS[ttt_type]
    tokens, parameters, initial = random_inputs(ttt_type, 0, rows=2, length=11, dtype=torch.float64)
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[0, :2] = mask[1, 5:7] = mask[1, 10:] = False
    broken = [x.clone() for x in tokens]
    for x in broken:
        x[0, :, 4] = value
        x[1][:, ~mask[1]] = value
    results = []
    for inputs in (tokens, broken):
        inputs = [x.requires_grad_() for x in inputs]
        state = state_class.initial(*initial, batch_size=2)
        o, last = op(*inputs, *parameters, state, attention_mask=mask)
        assert not o.transpose(1, 2)[~mask].any()
        gradients = torch.autograd.grad(o[1].square().sum() + last.W1[1].square().sum(), inputs)
        for gradient in gradients:
            assert not gradient.transpose(1, 2)[~mask].any()
        results.append((o[1:], last.select(torch.tensor([1])), [x[1] for x in gradients]))
    (expected, expected_last, expected_gradients), (o, last, gradients) = results
    assert torch.equal(o, expected)
    assert_states_close(last, expected_last, 0)
    for gradient, expected in zip(gradients, expected_gradients):
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


@TTT_TYPES
def test_a_broken_sequence_breaks_no_other(ttt_type):
    op, state_class = OPS[ttt_type]
    tokens, parameters, initial = random_inputs(ttt_type, 0, rows=1, length=14, dtype=torch.float64)
    bounds, state = torch.tensor([0, 5, 5, 9, 14]), state_class.initial(*initial, batch_size=4)
    expected, expected_last = op(*tokens, *parameters, state, cu_seqlens=bounds)
    for x in tokens:
        x[:, :, 6] = torch.nan
    o, last = op(*tokens, *parameters, state, cu_seqlens=bounds)
    others = torch.tensor([0, 1, 3])
    assert torch.equal(o[:, :, :5], expected[:, :, :5]) and torch.equal(o[:, :, 9:], expected[:, :, 9:])
    assert_states_close(last.select(others), expected_last.select(others), 0)


@TTT_TYPES
def test_a_broken_token_is_taken_back(ttt_type):
    """As long as it is pending, also while another row steps on."""
    op, state_class = OPS[ttt_type]
    tokens, parameters, initial = random_inputs(ttt_type, 0, rows=2, length=7)
    _, state = op(*(x[:, :, :1] for x in tokens), *parameters, state_class.initial(*initial, batch_size=2))
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    _, expected = op(*(x[:, :, 1:5] for x in tokens), *parameters, state, attention_mask=mask)
    for x in tokens:
        x[0, :, 2] = torch.nan
    for lengths in ([4], [1, 1, 1, 1]):
        _, last = run_in_chunks(op, [x[:, :, 1:5] for x in tokens], parameters, state, lengths, attention_mask=mask)
        assert last.k[0].isnan().any()
        last = last.rewind(torch.tensor([1, 0]))
        assert_states_close(last, expected.rewind(torch.tensor([1, 0])), 1e-6)


@TTT_TYPES
@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32, torch.bfloat16])
def test_mask_of_any_dtype_and_layout(ttt_type, dtype):
    op, state_class = OPS[ttt_type]
    tokens, parameters, initial = random_inputs(ttt_type, 0, rows=3, length=5)
    mask = torch.tensor([[0, 1, 1, 1, 1], [0, 1, 1, 0, 1], [0, 1, 1, 1, 1]])
    state = state_class.initial(*initial, batch_size=3)
    expected, _ = op(*tokens, *parameters, state, attention_mask=mask)
    o, _ = op(*tokens, *parameters, state, attention_mask=mask.T.contiguous().T.to(dtype))
    assert torch.equal(o, expected)
    expanded, _ = op(*tokens, *parameters, state, attention_mask=mask[:1].to(dtype).expand(3, 5))
    assert torch.equal(expanded[::2], expected[::2])


@TTT_TYPES
@properties
@given(
    seed=st.integers(0, 2**31),
    steps=st.lists(st.tuples(st.integers(1, 6), st.lists(st.integers(0, 2), min_size=3, max_size=3)), max_size=5),
)
def test_beams(ttt_type, seed, steps):
    """Rows reordered between chunks are those of the tokens that each of them followed."""
    op, state_class = OPS[ttt_type]
    length = sum(step for step, _ in steps) + 1
    tokens, parameters, initial = random_inputs(ttt_type, seed, rows=3, length=length)
    state = state_class.initial(*initial, batch_size=1).repeat_interleave(3)
    history, start = [x[:, :, :0] for x in tokens], 0
    for step, beams in [*steps, (1, [0, 1, 2])]:
        chunk = [x[:, :, start : start + step] for x in tokens]
        o, state = op(*chunk, *parameters, state)
        history = [torch.cat([past, new], dim=2) for past, new in zip(history, chunk)]
        start += step
        last_output = o[beams]
        state, history = state.select(torch.tensor(beams)), [x[beams] for x in history]
    expected, expected_state = op(*history, *parameters, state_class.initial(*initial, batch_size=3))
    torch.testing.assert_close(last_output, expected[:, :, -1:], rtol=1e-5, atol=1e-5)
    assert_states_close(state, expected_state, 1e-5)


@TTT_TYPES
@properties
@given(seed=st.integers(0, 2**31), lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5))
def test_packed_sequences_do_not_see_each_other(ttt_type, seed, lengths):
    op, state_class = OPS[ttt_type]
    tokens, parameters, initial = random_inputs(ttt_type, seed, rows=1, length=sum(lengths))
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    o, last = op(*tokens, *parameters, state_class.initial(*initial, batch_size=len(lengths)), cu_seqlens=bounds)
    for row, (start, end) in enumerate(zip(bounds, bounds[1:])):
        alone, alone_last = op(
            *(x[:, :, start:end] for x in tokens), *parameters, state_class.initial(*initial, batch_size=1)
        )
        torch.testing.assert_close(o[:, :, start:end], alone, rtol=1e-5, atol=1e-5)
        assert_states_close(last.select(torch.tensor([row])), alone_last, 1e-5)


@properties
@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    cuts=st.lists(st.integers(0, 12), max_size=4),
    data=st.data(),
)
def test_repeats_of_keys(seed, lengths, cuts, data):
    """Squares of positive cosines in the mini-batch, of rows that are padded and cut, packed, or go token by token."""
    mini_batch_size, longest = 4, max(lengths)
    tokens, parameters, initial = random_inputs("linear", seed, len(lengths), length=longest, dtype=torch.float64)
    lr, keys, expected = tokens[3], [], []
    for row, length in enumerate(lengths):
        k = tokens[1][row, :, :length]  # [H, T, D]
        cosines = torch.nn.functional.cosine_similarity(k[:, :, None], k[:, None], dim=-1)
        steps = torch.arange(length) // mini_batch_size
        keys.append(k)
        expected.append((cosines.clamp(min=0).square() * (steps == steps[:, None])).tril().sum(-1))

    def repeats(k, state, **masks):
        found = ops_ttt_omni.key_repeats(k, state, mini_batch_size, **masks)
        columns = (torch.zeros_like(k), k, torch.zeros_like(k), lr[:1, :, :1].expand(k.shape[:3]))
        return found, ttt_linear(*columns, *parameters, state, **masks)[1]

    mask, padded = torch.zeros(len(lengths), longest, dtype=torch.bool), torch.full_like(tokens[1], torch.nan)
    for row, length in enumerate(lengths):
        mask[row, data.draw(st.permutations(range(longest)))[:length]] = True
        padded[row, :, mask[row]] = keys[row]
    state, found, start = TTTLinearState.initial(*initial, len(lengths)), [], 0
    for length in cut(longest, cuts):
        columns = slice(start, start := start + length)
        if length:
            part, state = repeats(padded[:, :, columns], state, attention_mask=mask[:, columns])
            found.append(part)
    found = torch.cat(found, dim=2)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    state = TTTLinearState.initial(*initial, len(lengths))
    packed, _ = repeats(torch.cat(keys, dim=1)[None], state, cu_seqlens=bounds)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(found[row][:, mask[row]], expected[row], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(packed[0, :, bounds[row] : bounds[row + 1]], expected[row], rtol=1e-9, atol=1e-9)
        state = TTTLinearState.initial(*initial, 1)
        for token in range(length):
            one, state = repeats(keys[row][None, :, token : token + 1], state)
            torch.testing.assert_close(one[0, :, 0], expected[row][:, token], rtol=1e-9, atol=1e-9)


@TTT_TYPES
@properties
@given(seed=st.integers(0, 2**31), length=st.integers(1, 20), back=st.integers(0, 4))
def test_rewind(ttt_type, seed, length, back):
    """Back within the mini-batch equals never having gone on; farther raises."""
    op, state_class = OPS[ttt_type]
    tokens, parameters, initial = random_inputs(ttt_type, seed, rows=1, length=length)
    state = state_class.initial(*initial, batch_size=1)
    _, last = op(*tokens, *parameters, state)
    if back > length % 4:
        with pytest.raises(
            RuntimeError, match=f"Cannot take back {back} tokens of row 0: only {length % 4} came after"
        ):
            last.rewind(back)
    elif back < length:
        _, expected = op(*(x[:, :, : length - back] for x in tokens), *parameters, state)
        assert_states_close(last.rewind(back), expected, 1e-6)


@TTT_TYPES
def test_rewind_each_row(ttt_type):
    op, state_class = OPS[ttt_type]
    tokens, parameters, initial = random_inputs(ttt_type, 0, rows=3, length=7)
    state = state_class.initial(*initial, batch_size=3)
    _, last = op(*tokens, *parameters, state)
    back = torch.tensor([0, 3, 1])
    mask = (torch.arange(7) < 7 - back[:, None]).long()
    _, expected = op(*tokens, *parameters, state, attention_mask=mask)
    assert_states_close(last.rewind(back), expected, 1e-6)
    assert last.rewind(back).position.tolist() == [3, 0, 2]
    assert_states_close(last.rewind(0), last, 0)

    with pytest.raises(RuntimeError, match="Cannot take back 4 tokens of row 1: only 3 came after"):
        last.rewind(torch.tensor([0, 4, 1]))
    for wrong in (-5, torch.tensor([0, -1, 0])):
        with pytest.raises(ValueError, match="must not be negative, got -"):
            last.rewind(wrong)
    for wrong in (
        1.0,
        torch.tensor([1, 1]),
        torch.tensor([[1, 1, 1]]),
        torch.ones(3),
        torch.ones(3, dtype=torch.bool),
    ):
        with pytest.raises(ValueError, match="`length` must be an integer or 3 of them"):
            last.rewind(wrong)


@TTT_TYPES
@properties
@given(seed=st.integers(0, 2**31), length=st.integers(1, 30), cuts=st.lists(st.integers(0, 30), max_size=6))
def test_bfloat16_activations(ttt_type, seed, length, cuts):
    """
    The state is float32, so that with the same bfloat16 inputs it is as exact as ever. Outputs are rounded to bfloat16
    once, so that two of them differ by one unit in the last place at most where float32 rounds the other way: 2^-7.
    """
    op, state_class = OPS[ttt_type]
    tokens, parameters, initial = random_inputs(ttt_type, seed, rows=1, length=length)
    tokens = [x.bfloat16() for x in tokens]
    state = state_class.initial(*(x.bfloat16() for x in initial), batch_size=1)
    o, last = op(*tokens, *parameters, state)
    assert o.dtype == torch.bfloat16
    assert all(x.dtype == torch.float32 for name, x in tensors(last).items() if name != "position")
    chunked, chunked_last = run_in_chunks(op, tokens, parameters, state, cut(length, cuts))
    torch.testing.assert_close(chunked.float(), o.float(), rtol=2**-7, atol=1e-5)
    assert_states_close(chunked_last, last, 1e-5)


@TTT_TYPES
@pytest.mark.parametrize("group_size", [0, 2])
def test_autocast_leaves_the_state_in_float32(ttt_type, group_size):
    """Activations may be bfloat16, as in training with `bf16=True`; the inner loop is what it is without autocast."""
    op, state_class = OPS[ttt_type]
    tokens, parameters, initial = random_inputs(ttt_type, 0, rows=1, length=11)
    tokens = [x.bfloat16().requires_grad_() for x in tokens]

    def run(enabled, length):
        state = state_class.initial(*initial, batch_size=1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            o, last = op(*(x[:, :, :length] for x in tokens), *parameters, state, checkpoint_group_size=group_size)
        return o, last, torch.autograd.grad(o.float().square().sum(), tokens)

    for length in (11, 1):
        (o, last, gradients), (expected, expected_last, expected_gradients) = run(True, length), run(False, length)
        assert torch.equal(o, expected)
        assert_states_close(last, expected_last, 0)
        assert all(torch.equal(*pair) for pair in zip(gradients, expected_gradients))


@TTT_TYPES
@pytest.mark.parametrize("group_size", [0, 2])
def test_gradients_are_exact(ttt_type, group_size):
    """For every input, parameter and the initial state, across mini-batches and calls."""
    op, state_class = OPS[ttt_type]
    lengths = [2, 1, 5]
    tokens, parameters, initial = random_inputs(
        ttt_type, 0, rows=1, heads=1, length=sum(lengths), head_dim=3, mini_batch_size=3, dtype=torch.float64
    )
    arguments = [x.clone().requires_grad_() for x in (*tokens, *parameters, *initial)]

    def function(q, k, v, lr, scale, weight, bias, *initial):
        state = state_class.initial(*initial, batch_size=1)
        outputs, start = [], 0
        for length in lengths:
            chunk = (x[:, :, start : start + length] for x in (q, k, v, lr))
            o, state = op(*chunk, scale, weight, bias, state, checkpoint_group_size=group_size)
            outputs.append(o)
            start += length
        return torch.cat(outputs, dim=2), state.W1, state.b1, state.k, state.u1

    assert torch.autograd.gradcheck(function, arguments, eps=1e-6, atol=1e-6)


@TTT_TYPES
def test_checkpoint_groups_keep_the_state_of_short_rows(ttt_type):
    op, state_class = OPS[ttt_type]
    tokens, parameters, initial = random_inputs(ttt_type, 0, rows=2, length=18)
    mask = torch.ones(2, 18, dtype=torch.long)
    mask[0, 3:] = 0
    state = state_class.initial(*(x.requires_grad_() for x in initial), batch_size=2)
    _, expected = op(*tokens, *parameters, state, attention_mask=mask)
    _, grouped = op(*tokens, *parameters, state, attention_mask=mask, checkpoint_group_size=2)
    assert_states_close(grouped, expected, 1e-6)


@TTT_TYPES
def test_gradients_with_padding_and_packing(ttt_type):
    op, state_class = OPS[ttt_type]
    tokens, parameters, initial = random_inputs(
        ttt_type, 1, rows=1, heads=1, length=9, head_dim=2, dtype=torch.float64
    )
    tokens[3][:, :, ::2] = 0  # of tokens too, which still have a gradient
    arguments = [x.clone().requires_grad_() for x in (*tokens, *parameters, *initial)]
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 1, 0]])
    bounds = torch.tensor([0, 2, 9])

    def function(q, k, v, lr, scale, weight, bias, *initial):
        arguments = q, k, v, lr, scale, weight, bias
        padded, _ = op(*arguments, state_class.initial(*initial, batch_size=1), attention_mask=mask)
        packed, _ = op(*arguments, state_class.initial(*initial, batch_size=2), cu_seqlens=bounds)
        return padded, packed

    assert torch.autograd.gradcheck(function, arguments, eps=1e-6, atol=1e-6)


@TTT_TYPES
def test_numerical_safety(ttt_type):
    op, state_class = OPS[ttt_type]
    tokens, parameters, initial = random_inputs(ttt_type, 0, rows=2, length=40)
    state = state_class.initial(*initial, batch_size=2)
    cases = {
        "large bfloat16": ([(1e4 * x).bfloat16() if x.ndim == 4 else x for x in tokens], {}),
        "constant": ([torch.full_like(x, 0.5) for x in tokens], {}),
        "zero": ([torch.zeros_like(x) for x in tokens], {}),
        "padding": (tokens, {"attention_mask": torch.zeros(2, 40, dtype=torch.long)}),
    }
    for name, (inputs, masks) in cases.items():
        for start_state in (state, state_class.initial(*(torch.zeros_like(x) for x in initial), batch_size=2)):
            o, last = op(*inputs, *parameters, start_state, **masks)
            assert o.isfinite().all(), name
            assert all(x.isfinite().all() for x in tensors(last).values()), name


@TTT_TYPES
def test_no_token_changes_nothing(ttt_type):
    op, state_class = OPS[ttt_type]
    tokens, parameters, initial = random_inputs(ttt_type, 0, rows=2, length=5)
    _, state = op(*tokens, *parameters, state_class.initial(*initial, batch_size=2))
    o, same = op(*(x[:, :, :0] for x in tokens), *parameters, state)
    assert o.shape == (2, 2, 0, 8)
    assert_states_close(same, state, 0)
    _, padded = op(*tokens, *parameters, state, attention_mask=torch.zeros(2, 5))
    assert_states_close(padded, state, 0)


@TTT_TYPES
def test_triton_backend(ttt_type):
    """The kernels through the op: prefill, decode in place and not, and a state that is not changed."""
    pytest.importorskip("ttt_kernels", reason="Triton has no release for this machine")
    op, state_class = OPS[ttt_type]
    tokens, parameters, initial = random_inputs(
        ttt_type, 0, rows=2, heads=1, length=20, head_dim=16, mini_batch_size=16
    )
    state = state_class.initial(*initial, batch_size=2)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :3] = 0
    with torch.no_grad():
        o, expected = op(*tokens, *parameters, state, attention_mask=mask, backend="torch")
        kernel_o, last = op(*tokens, *parameters, state, attention_mask=mask, backend="triton")
        torch.testing.assert_close(kernel_o, o, rtol=1e-4, atol=1e-4)
        assert_states_close(last, expected, 1e-4)
        one = [x[:, :, :1] for x in tokens]
        o, expected = op(*one, *parameters, last, backend="torch")
        before = last.clone()
        kernel_o, decoded = op(*one, *parameters, last, backend="triton")
        torch.testing.assert_close(kernel_o, o, rtol=1e-4, atol=1e-4)
        assert_states_close(decoded, expected, 1e-4)
        assert_states_close(last, before, 0)
        _, decoded = op(*one, *parameters, last, inplace=True, backend="triton")
        assert_states_close(decoded, expected, 1e-4)
        assert decoded.k is last.k
    with pytest.raises(RuntimeError, match="mini-batch size"):
        op(*tokens, parameters[0][:5], *parameters[1:], state, backend="triton")


def test_kernels_that_are_not_there(monkeypatch):
    tokens, parameters, initial = random_inputs("linear", 0, rows=1)
    monkeypatch.setattr(ops_ttt_omni, "ttt_kernels", None)
    with pytest.raises(RuntimeError, match="not installed"):
        ttt_linear(*tokens, *parameters, TTTLinearState.initial(*initial, batch_size=1), backend="triton")


def test_needs_torch_alone():
    """Loaded from its file, as the package around it imports Transformers."""
    code = """
import importlib.util, sys
import torch
sys.modules.update(dict.fromkeys(("transformers", "huggingface_hub", "safetensors", "ttt_omni")))
spec = importlib.util.spec_from_file_location("ops", sys.argv[1])
ops = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ops)
x, lr, scale, norm = torch.ones(1, 1, 5, 4, device="cpu"), torch.ones(1, 1, 5), torch.ones(3), torch.ones(1, 4)
state = ops.TTTLinearState.initial(torch.ones(1, 4, 4), torch.ones(1, 1, 4), 1)
for enabled in (False, True):
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        o, state = ops.ttt_linear(x, x, x, lr, scale, norm, norm, state)
print(o.dtype, state.W1.dtype, state.position.tolist())
"""
    run = subprocess.run([sys.executable, "-c", code, ops_ttt_omni.__file__], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "torch.float32 torch.float32 [1]\n"
    assert "transformers" not in Path(ops_ttt_omni.__file__).read_text()


def test_devices_without_autocast():
    with ops_ttt_omni._no_autocast("meta"):
        pass


def test_says_why_it_runs_in_pytorch(monkeypatch):
    monkeypatch.setattr(ops_ttt_omni, "ttt_kernels", SimpleNamespace(unsupported=lambda *_: "the head size is 5"))
    q = SimpleNamespace(is_cuda=True)
    with pytest.warns(UserWarning, match="slower than its Triton kernels: the head size is 5"):
        assert not ops_ttt_omni._runs_on_kernels("auto", q, None, SimpleNamespace(W1=None))


@TTT_TYPES
def test_compiles_without_graph_breaks(ttt_type):
    op, state_class = OPS[ttt_type]
    tokens, parameters, initial = random_inputs(ttt_type, 0, rows=2, length=11)
    state = state_class.initial(*initial, batch_size=2)
    _, state = op(*(x[:, :, :3] for x in tokens), *parameters, state)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for length in (8, 1):
        o, last = op(*(x[:, :, :length] for x in tokens), *parameters, state)
        compiled_o, compiled_last = compiled(*(x[:, :, :length] for x in tokens), *parameters, state)
        torch.testing.assert_close(compiled_o, o, rtol=1e-5, atol=1e-5)
        assert_states_close(compiled_last, last, 1e-5)


def test_kernels_from_elsewhere(monkeypatch):
    monkeypatch.setattr(ops_ttt_omni, "ttt_kernels", None)  # which is undone afterwards
    tokens, parameters, (W1, b1) = random_inputs("linear", 0, rows=1)

    def kernel(q, *arguments):
        return 2 * q, [x + 1 for x in arguments[6:11]]

    use_kernels(SimpleNamespace(unsupported=lambda *_: None, ttt_linear=kernel))
    state = TTTLinearState.initial(W1, b1, batch_size=1)
    o, last = ttt_linear(*tokens, *parameters, state, backend="triton")
    assert torch.equal(o, 2 * tokens[0])
    assert torch.equal(last.W1[0], W1 + 1) and torch.equal(last.b1[0], b1 + 1)
    assert last.position.tolist() == [1] and torch.equal(last.u1, torch.ones(1, 2, 4, 8))


@TTT_TYPES
def test_errors_name_what_is_wrong(ttt_type):
    op, state_class = OPS[ttt_type]
    (q, k, v, lr), (scale, weight, bias), initial = random_inputs(ttt_type, 0, rows=2, length=5)
    state = state_class.initial(*initial, batch_size=2)
    with pytest.raises(ValueError, match="`lr`"):
        op(q, k, v, lr[..., None], scale, weight, bias, state)
    with pytest.raises(ValueError, match="`state.W1`"):
        op(q, k, v, lr, scale, weight, bias, state_class.initial(*initial, batch_size=3))
    with pytest.raises(ValueError, match="`backend`"):
        op(q, k, v, lr, scale, weight, bias, state, backend="cuda")
    with pytest.raises(ValueError, match="`cu_seqlens`"):
        op(
            q,
            k,
            v,
            lr,
            scale,
            weight,
            bias,
            state_class.initial(*initial, batch_size=1),
            cu_seqlens=torch.tensor([0, 5]),
        )
    with pytest.raises(ValueError, match="`attention_mask`"):
        op(q, k, v, lr, scale, weight, bias, state, attention_mask=torch.ones(5, 2))
    _, state = op(q, k, v, lr, scale, weight, bias, state)
    with pytest.raises(ValueError, match="`token_scale`"):
        op(q, k, v, lr, scale[:2], weight, bias, state)


BOUNDS = {
    "ends early": ([0, 3, 5], "from 0 to T = 7, got 0 to 5"),
    "ends late": ([0, 3, 9], "from 0 to T = 7, got 0 to 9"),
    "starts late": ([2, 3, 7], "from 0 to T = 7, got 2 to 7"),
    "negative": ([-2, 3, 7], "from 0 to T = 7, got -2 to 7"),
    "decreases": ([0, 5, 3, 7], "must not decrease, got 5 and then 3 at index 2"),
    "floats": ([0.0, 3.0, 7.0], "must be integers of the shape"),
    "booleans": ([False, True], "must be integers of the shape"),
    "two-dimensional": ([[0, 3, 7]], "must be integers of the shape"),
    "empty": ([], "must be integers of the shape"),
}


@TTT_TYPES
@pytest.mark.parametrize("case", BOUNDS)
def test_bounds_of_packed_sequences_are_checked(ttt_type, case):
    op, state_class = OPS[ttt_type]
    bounds, message = BOUNDS[case]
    tokens, parameters, initial = random_inputs(ttt_type, 0, rows=1, length=7)
    state = state_class.initial(*initial, batch_size=max(len(bounds) - 1, 1))
    with pytest.raises(ValueError, match=f"`cu_seqlens` .*{message}"):
        op(*tokens, *parameters, state, cu_seqlens=torch.tensor(bounds, dtype=None if bounds else torch.long))


@TTT_TYPES
def test_empty_packed_sequences_keep_their_state(ttt_type):
    op, state_class = OPS[ttt_type]
    tokens, parameters, initial = random_inputs(ttt_type, 0, rows=1, length=7)
    _, state = op(*tokens, *parameters, state_class.initial(*initial, batch_size=1))
    _, last = op(
        *tokens, *parameters, state.repeat_interleave(4), cu_seqlens=torch.tensor([0, 0, 7, 7, 7], dtype=torch.int32)
    )
    empty = torch.tensor([0, 2, 3])
    assert_states_close(last.select(empty), state.repeat_interleave(3), 0)
    assert last.position.tolist() == [3, 2, 3, 3]
