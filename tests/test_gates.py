# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""The gates of a TTT layer: what a token writes, which may be nothing, and which heads are heard."""

from pathlib import Path

import pytest
import torch
from layouts import text_model
from test_memory import make_model
from torch import nn

import ttt_omni
from ttt_omni import TTTOmniTextConfig
from ttt_omni.cache_ttt_omni import TTTLayer


HIDDEN_SIZE = 16


def ttt_layer(**kwargs) -> nn.Module:
    return text_model(["linear_attention"], **kwargs).model.language_model.layers[0].ttt


def write(ttt: nn.Module, tokens: torch.Tensor) -> TTTLayer:
    cache_layer = TTTLayer()
    ttt(tokens, cache_layer=cache_layer)
    return cache_layer


@torch.no_grad()
def test_a_head_is_heard_as_far_as_its_gate_is_open():
    ttt = ttt_layer(ttt_head_gate=True)
    ttt.head_gate.weight.zero_()
    ttt.head_gate.bias.copy_(torch.tensor([0.7, -40.0]))
    tokens = torch.randn(2, 9, HIDDEN_SIZE)
    heads = []
    handle = ttt.post_norm.register_forward_hook(lambda *args: heads.append(args[-1]))
    output = ttt(tokens)
    handle.remove()
    first = heads[0] * (torch.arange(16) < 8)
    torch.testing.assert_close(output, ttt.o_proj(torch.sigmoid(torch.tensor(0.7)) * first))


@torch.no_grad()
@pytest.mark.parametrize("activation", ["sigmoid", "hardsigmoid"])
@pytest.mark.parametrize("ttt_type", ["linear", "mlp"])
def test_a_token_that_writes_nothing(activation, ttt_type):
    """A silent start, in which all tokens are the same, does not spoil what follows, if nothing of it is written."""
    ttt = ttt_layer(ttt_layer_type=ttt_type, ttt_lr_activation=activation)
    silence, talk = torch.randn(HIDDEN_SIZE), torch.randn(1, 12, HIDDEN_SIZE)
    ttt.lr_gate.weight.copy_(-4 / silence.square().sum() * silence.expand(2, -1))
    assert (ttt.write_strength(silence) == 0).all() == (activation == "hardsigmoid")
    cache_layer = write(ttt, silence.expand(1, 42, -1))
    fresh = ttt.inner_model(1)
    untouched = all(torch.equal(getattr(cache_layer.ttt_state, name), getattr(fresh, name)) for name in ("W1", "b1"))
    assert untouched == (activation == "hardsigmoid")
    after = ttt(talk[:, :2], cache_layer=cache_layer)  # to the end of the mini-batch, of 4 tokens
    after = torch.cat([after, ttt(talk[:, 2:], cache_layer=cache_layer)], dim=1)
    cache_layer = TTTLayer()
    ttt(silence.expand(1, 2, -1), cache_layer=cache_layer)
    alone = ttt(talk, cache_layer=cache_layer)
    assert torch.allclose(after, alone, rtol=0, atol=1e-6) == (activation == "hardsigmoid")


@pytest.mark.parametrize("ttt_type", ["linear", "mlp"])
def test_a_silent_start_spoils_nothing(ttt_type, monkeypatch):
    """Nor does it before the gate has learnt what to write, where tokens that are all alike count as few."""
    monkeypatch.syspath_prepend(Path(ttt_omni.__file__).parent / "benchmarks")
    import recall

    spoilt, swollen = recall.after_silence(ttt_layer_type=ttt_type)
    found, norm = recall.after_silence(ttt_layer_type=ttt_type, ttt_divide_repeats=True)
    assert spoilt < 0.3 < 0.6 < found and 3 * norm < swollen


def test_what_need_not_be_written_is_learnt():
    """Asked for 4 of 44 tokens, which can be told by one channel, a layer comes to write nothing of many others."""
    ttt = ttt_layer(ttt_lr_activation="hardsigmoid")
    ttt.lr_gate.weight.data.zero_()[:, 0] = 2
    optimizer = torch.optim.Adam(ttt.parameters(), lr=0.03)
    torch.manual_seed(0)
    for _ in range(60):
        told = torch.randn(16, 44, HIDDEN_SIZE)
        told[..., 0] = -1
        told[:, :4, 0] = 1
        asked = told[:, :4] * (torch.arange(HIDDEN_SIZE) < 8)
        answered = ttt(torch.cat([told, asked], dim=1))[:, -4:]
        (answered - told[:, :4])[..., 8:].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    is_nothing = ttt.write_strength(told) == 0
    assert is_nothing[:, 4:].float().mean() > 0.1
    assert not is_nothing[:, :4].any()


def test_a_memory_of_before_these_fields_is_known_again():
    """The digest that the code before them wrote; one with a gate is another model."""
    before = "90fafff413549c3b85df410c3fd0d0f39ef3ac61a8dba9759876b34d9aafbd8b"
    assert make_model()._config_fingerprint() == before
    for kwargs in ({"ttt_head_gate": True}, {"ttt_lr_activation": "hardsigmoid"}, {"ttt_divide_repeats": True}):
        assert make_model(**kwargs)._config_fingerprint() != before


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="`ttt_lr_activation` must be 'sigmoid' or 'hardsigmoid', got 'relu'"):
        TTTOmniTextConfig(ttt_lr_activation="relu")
