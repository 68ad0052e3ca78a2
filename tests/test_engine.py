# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Many conversations at once, each as if it were alone; and answers that are interrupted."""

import queue
from contextlib import closing

import pytest
import torch
from layouts import LAYERS, sound

from serving import open_model
from ttt_omni import TTTOmniProcessor
from ttt_omni.cache_ttt_omni import BatchedCache
from ttt_omni.serving.engine import Answer, Engine


INSTRUCTION = "Please answer."
TIMEOUT = 120


@pytest.fixture(scope="module")
def processor(tiny_model_dir):
    return TTTOmniProcessor.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="module", params=["hybrid", "windowed", "mixed"])
def model(tiny_model_dir, request):
    """The tiny model with other layers, whose TTT is open."""
    return open_model(tiny_model_dir, request.param)[0]


@pytest.fixture(scope="module")
def engine(model, processor):
    engine = Engine(model, processor)
    yield engine
    engine.close()


def message(seconds, seed, text=INSTRUCTION):
    return {
        "role": "user",
        "content": [{"type": "audio", "audio": (sound(seconds, seed), 16000)}, {"type": "text", "text": text}],
    }


def submit(engine, processor, message, memory=None, tokens=12, seed=None, **options):
    events = queue.SimpleQueue()
    history = None if memory is None else memory.input_ids
    pieces = processor.turn_pieces(message, history)
    options["max_new_tokens"] = tokens
    answer = Answer(pieces, memory, events.put, speaks=True, options=options, seed=seed)
    engine.submit(answer)
    return answer, events


def collect(answer, events):
    text, waveform = "", [torch.empty(0)]
    while (event := events.get(timeout=TIMEOUT)) is not None:
        text += event.text or ""
        waveform += [] if event.waveform is None else [event.waveform]
    if answer.error is not None:
        raise answer.error
    return text, torch.cat(waveform)


def alone(model, processor, message, memory=None, tokens=12):
    """What `generate` makes of one conversation, and the memory that is left."""
    pieces = processor.turn_pieces(message, None if memory is None else memory.input_ids)
    *_, memory = model.listen(pieces, memory)
    out = model.generate(**vars(memory), max_new_tokens=tokens, return_audio=True)
    new = out.sequences[0, memory.input_ids.shape[1] :].tolist()
    if new[-1] in model.generation_config.eos_token_id:
        new.pop()
    return new, out.units[0], out.waveform[0].float(), out.cache


def assert_same_cache(cache, expected):
    for layer, other in zip(cache.layers, expected.layers):
        tensors, others = layer.tensors(), other.tensors()
        assert tensors.keys() == others.keys()
        for name in tensors:
            torch.testing.assert_close(tensors[name], others[name], rtol=1e-7, atol=1e-7)


def test_each_is_as_if_alone(model, processor, engine):
    """Over two turns, with questions and answers of different lengths that come while others are being made."""
    lengths = [(3, 5), (33, 20), (1, 30), (7, 11)]
    questions = [(message(seconds, seed), message(2, 10 + seed)) for seed, (seconds, _) in enumerate(lengths)]
    answers = [submit(engine, processor, questions[i][0], tokens=lengths[i][1]) for i in range(4)]
    heard = [collect(*answer) for answer in answers]
    memories = [answer.conversation(processor.answer_end_id) for answer, _ in answers]
    again = [submit(engine, processor, questions[i][1], memories[i], tokens=9) for i in (2, 0, 3, 1)]
    heard_again = dict(zip((2, 0, 3, 1), [collect(*answer) for answer in again]))
    again = dict(zip((2, 0, 3, 1), again))
    for i in range(4):
        tokens, units, waveform, cache = alone(model, processor, questions[i][0], tokens=lengths[i][1])
        answer, (text, sound_heard) = answers[i][0], heard[i]
        assert answer.tokens == tokens and torch.equal(torch.cat(answer.units), units)
        assert text == processor.decode(tokens, skip_special_tokens=True)
        torch.testing.assert_close(sound_heard, waveform, rtol=0, atol=1e-5)
        assert_same_cache(answer.cache, cache)
        expected, *_ = alone(model, processor, questions[i][1], memories[i], tokens=9)
        assert again[i][0].tokens == expected and len(heard_again[i][1]) > 0
        assert again[i][0].finish_reason in ("length", "stop")


@pytest.mark.parametrize("layers", LAYERS)
def test_eight_take_no_more_passes_than_one(tiny_model_dir, layers):
    """Questions that arrive together are answered together, from the first token, and each as if it were alone."""
    model, processor = open_model(tiny_model_dir, layers)
    with closing(Engine(model, processor)) as engine:
        _eight_at_once(model, processor, engine)


def _eight_at_once(model, processor, engine):
    heard = [submit(engine, processor, message(1 + seed % 3, seed), tokens=1 + seed) for seed in range(8)]
    for answer in heard:
        collect(*answer)
    memories = [answer.conversation(processor.answer_end_id) for answer, _ in heard]
    questions = [{"role": "user", "content": "And what " + "else " * seed} for seed in range(8)]
    rows = []

    def count(model, args, kwargs):
        if isinstance(kwargs.get("cache"), BatchedCache):
            rows.append(len(kwargs["input_ids"]))

    with model.register_forward_pre_hook(count, with_kwargs=True):
        with engine.wakes:  # so that it sees all at once
            answers = [submit(engine, processor, *turn, tokens=10) for turn in zip(questions, memories)]
        sounds = [collect(*answer) for answer in answers]
    passes = [len(answer.tokens) + (answer.finish_reason == "stop") - 1 for answer, _ in answers]
    assert rows == [sum(step < n for n in passes) for step in range(max(passes))]
    for (answer, _), (text, waveform), *turn in zip(answers, sounds, questions, memories):
        tokens, units, expected, cache = alone(model, processor, *turn, tokens=10)
        assert answer.tokens == tokens and torch.equal(torch.cat(answer.units), units)
        assert text == processor.decode(tokens, skip_special_tokens=True)
        torch.testing.assert_close(waveform, expected, rtol=0, atol=1e-5)
        assert_same_cache(answer.cache, cache)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8, 1.0])
def test_interrupted_is_never_said(model, processor, engine, share):
    """The conversation goes on from what was heard as if the model had said no more."""
    question, following = message(3, 1), message(2, 2)
    answer, events = submit(engine, processor, question, tokens=16)
    _, waveform = collect(answer, events)
    num_tokens = engine.heard_tokens(answer, int(share * len(waveform)))
    fewer = [engine.heard_tokens(answer, samples) for samples in range(0, int(share * len(waveform)), 997)]
    assert fewer == sorted(fewer) and max([0, *fewer]) <= num_tokens
    assert share < 1 or num_tokens == len(answer.tokens)
    memory = answer.conversation(processor.answer_end_id, num_tokens)
    shorter, cache = [], answer.heard.cache
    if num_tokens > 0:
        shorter, _, _, cache = alone(model, processor, question, tokens=num_tokens)
    assert answer.tokens[:num_tokens] == shorter
    go_on = submit(engine, processor, following, memory, tokens=8)
    collect(*go_on)
    never = answer.conversation(processor.answer_end_id, num_tokens)
    never.cache = cache if num_tokens else never.cache
    expected, _, _, cache = alone(model, processor, following, never, tokens=8)
    assert go_on[0].tokens == expected
    assert_same_cache(go_on[0].cache, cache)


def test_cancelled(model, processor, engine):
    """At the token that is being made, while another answer goes on; or while the question is being heard."""
    expected, *_ = alone(model, processor, message(3, 5), tokens=24)
    other, others = submit(engine, processor, message(3, 5), tokens=24)
    answer, events = submit(engine, processor, message(3, 6), tokens=500)
    for _ in range(3):
        events.get(timeout=TIMEOUT)
    answer.cancel()
    collect(answer, events)
    assert answer.finish_reason == "cancelled" and 3 <= len(answer.tokens) < 500
    collect(other, others)
    assert other.tokens == expected
    unheard, events = submit(engine, processor, message(65, 7))
    unheard.cancel()
    collect(unheard, events)
    assert unheard.tokens == [] and unheard.heard is None
    with pytest.raises(ValueError, match="not heard to its end"):
        unheard.conversation(processor.answer_end_id)


def test_failure_of_one_is_not_that_of_others(model, processor, engine):
    expected, *_ = alone(model, processor, message(3, 5))
    good = submit(engine, processor, message(3, 5))
    bad = message(3, 6)
    bad["content"][0]["audio"] = b"RIFF and nothing else"
    with pytest.raises(ValueError, match="cannot be read as audio"):
        collect(*submit(engine, processor, bad))
    collect(*good)
    assert good[0].tokens == expected


def test_sampling_has_its_own_seed(processor, engine):
    answers = []
    for seed in (1, 1, 2):
        answers.append(submit(engine, processor, message(2, 3), seed=seed, do_sample=True, temperature=1.0))
    for answer in answers:
        collect(*answer)
    first, second, third = (answer.tokens for answer, _ in answers)
    assert first == second != third
