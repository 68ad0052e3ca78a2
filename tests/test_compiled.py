# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""A step of decoding that `torch.compile` takes whole, through Transformers' own switch for it."""

import pytest
import torch
from layouts import pad, random_rows, text_model
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache, GenerationConfig


LAYERS = {
    "windowed": ["hybrid_sliding", "sliding_attention", "linear_attention"],
    "ttt": ["linear_attention", "linear_attention"],
}


def make_model(layers):
    types = ["mlp", "linear", "linear"][: len(LAYERS[layers])]
    return text_model(
        LAYERS[layers], sliding_window=5, attention_sinks=2, ttt_gate_init=0.5, ttt_layer_type=types
    ).double()


def compile_config():
    """A step is traced as a whole, and run without generated code, whose making would take most of the time."""
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    return config


@pytest.fixture
def steps(monkeypatch):
    """What `generate` gives to a step in place of which none is compiled."""

    def watch(model):
        seen = []

        def step(**kwargs):
            seen.append(kwargs)
            return model(**kwargs)

        monkeypatch.setattr(model, "get_compiled_call", lambda config: step)
        return seen

    return watch


OPTIONS = {"do_sample": False, "eos_token_id": None}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("layers", LAYERS)
def test_300_tokens(layers):
    """No break, nothing compiled anew after the first steps, and the tokens of eager steps."""
    model, prompt = make_model(layers), random_rows(0, [3])[0][None] % 50
    expected = model.generate(prompt, max_new_tokens=300, **OPTIONS)
    torch._dynamo.reset()
    counters.clear()
    graphs = []

    class Count:  # is given each token
        def put(self, tokens):
            graphs.append(counters["stats"]["unique_graphs"])

        def end(self):
            pass

    found = model.generate(
        prompt,
        max_new_tokens=300,
        streamer=Count(),
        cache_implementation="static",
        compile_config=compile_config(),
        **OPTIONS,
    )
    assert torch.equal(found, expected)
    assert not counters["graph_break"] and len(graphs) == 301
    assert 0 < graphs[-1] == graphs[4] <= 3


def test_steps_have_one_shape(steps):
    """In a padded batch, of which a row is shorter than the window, another longer, and one fills it just now."""
    model, rows = make_model("windowed"), [row % 50 for row in random_rows(1, [3, 12, 6])]
    expected = [model.generate(row[None], max_new_tokens=20, **OPTIONS)[0, -20:] for row in rows]
    input_ids, attention_mask = pad(rows, "left")
    seen = steps(model)
    found = model.generate(
        input_ids,
        attention_mask=attention_mask,
        max_new_tokens=20,
        cache_implementation="static",
        compile_config=compile_config(),
        **OPTIONS,
    )
    assert torch.equal(found[:, -20:], torch.stack(expected))
    assert len(seen) == 19
    for kwargs in seen:
        shapes = {name: x.shape for name, x in kwargs.items() if isinstance(x, torch.Tensor)}
        assert shapes == {"input_ids": (3, 1)}
        assert all(layer.ring is not None for layer in kwargs["cache"].layers[:2])


def test_a_stream_takes_the_same_step(steps):
    model, prompt = make_model("windowed"), random_rows(2, [9])[0][None] % 50
    expected = model.generate(prompt, max_new_tokens=12, **OPTIONS)[0, 9:].tolist()

    class NoTokenizer:
        def decode(self, *_, **__):
            return "x"

    seen = steps(model)
    events = model.stream(
        prompt,
        tokenizer=NoTokenizer(),
        max_new_tokens=12,
        cache_implementation="static",
        compile_config=compile_config(),
        **OPTIONS,
    )
    assert [event.token for event in events if event.token is not None] == expected
    assert [kwargs["input_ids"].shape for kwargs in seen] == [(1, 1)] * 11


def test_only_what_was_asked_for_is_compiled(steps):
    model, prompt = make_model("windowed"), random_rows(0, [9])[0][None] % 50
    cache, seen = DynamicCache(config=model.config), steps(model)
    model.generate(prompt, cache=cache, max_new_tokens=4)
    model.generate(prompt, cache_implementation="static", max_new_tokens=4)  # on a CPU
    model.generate(
        prompt,
        cache_implementation="static",
        generation_config=GenerationConfig(prefill_chunk_size=3, max_new_tokens=4, compile_config=compile_config()),
    )
    assert not cache.is_compileable and not seen
