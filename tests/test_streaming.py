# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Speech that is made while it is generated equals speech that is made at once."""

import copy
import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, DynamicCache
from transformers.generation.streamers import TextStreamer

from ttt_omni import TTTOmniForCausalLM, TTTOmniProcessor
from ttt_omni.configuration_ttt_omni import TTTOmniSpeechDecoderConfig
from ttt_omni.modeling_ttt_omni import TTTOmniSpeechDecoder
from ttt_omni.streaming_ttt_omni import SpeechStream, TextStream, UnitStream, iter_sentences


GREEDY = {"do_sample": False, "max_new_tokens": 24}


@pytest.fixture(scope="module")
def model(golden_model_dir) -> TTTOmniForCausalLM:
    return TTTOmniForCausalLM.from_pretrained(golden_model_dir)


@pytest.fixture(scope="module")
def inputs(model, golden) -> dict[str, torch.Tensor]:
    """The golden question."""
    ids = [[model.config.audio_token_id] * 300 if i == -200 else [i] for i in golden["input_ids"].tolist()]
    return {"input_ids": torch.tensor([sum(ids, [])]), "input_features": golden["mel"].T[None]}


def text_inputs(seed: int, length: int = 12) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(300, (1, length), generator=torch.Generator().manual_seed(seed))}


def speech_decoder(seed: int = 0, dtype=torch.float64, **config) -> TTTOmniSpeechDecoder:
    """A small one that often repeats itself and often says nothing."""
    sizes = {"input_size": 6, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    decoder = TTTOmniSpeechDecoder(
        TTTOmniSpeechDecoderConfig(**(sizes | {"unit_vocab_size": 3, "upsample_factor": 3} | config))
    )
    torch.manual_seed(seed)
    for parameter in decoder.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(std=parameter.shape[1] ** -0.5)
    return decoder.eval().to(dtype)


def split(x: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
    """Pieces of these sizes, none of them the last, and the rest."""
    pieces = []
    for size in sizes:
        pieces.append(x[:size])
        x = x[size:]
    return [*pieces, x]


def joined(events) -> tuple[str, torch.Tensor, list[int]]:
    events = list(events)
    waveforms = [event.waveform for event in events if event.waveform is not None]
    return (
        "".join(event.text or "" for event in events),
        torch.cat(waveforms) if waveforms else torch.empty(0),
        [event.token for event in events if event.token is not None],
    )


SIZES = st.lists(st.integers(0, 8), max_size=8)


@settings(deadline=None, max_examples=20)
@given(SIZES)
def test_golden_units_in_pieces(model, golden, sizes):
    stream = UnitStream(model.speech_decoder)
    units = torch.cat([stream.push(piece) for piece in split(golden["decoder_hidden"], sizes)])
    assert torch.equal(units, golden["units"])


@torch.no_grad()
@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 1000),
    sizes=SIZES,
    upsample_factor=st.integers(1, 4),
    sliding_window=st.sampled_from([None, 1, 7, 30]),
    stutter=st.booleans(),
)
def test_units_in_pieces(seed, sizes, upsample_factor, sliding_window, stutter):
    decoder = speech_decoder(seed, upsample_factor=upsample_factor, sliding_window=sliding_window)
    hidden_states = torch.randn(30, 6, dtype=torch.float64)
    if stutter:  # tokens that go on saying the same across their borders
        hidden_states = hidden_states[::5].repeat_interleave(5, dim=0)
    frames = decoder(hidden_states[None])[0].argmax(-1)
    stream, units, seen = UnitStream(decoder), [], 0
    for piece in split(hidden_states, sizes):
        units += stream.push(piece).tolist()
        seen += len(piece)
        expected = [
            frame
            for frame, before in zip(frames[: seen * upsample_factor].tolist(), [decoder.blank_id, *frames.tolist()])
            if frame not in (before, decoder.blank_id)
        ]
        assert units == expected  # also in the middle: what was said is never taken back


@torch.no_grad()
def test_window_within_its_reach():
    hidden_states = torch.randn(1, 20, 6, dtype=torch.float64)
    whole, windowed = speech_decoder(), speech_decoder(sliding_window=60)
    torch.testing.assert_close(windowed(hidden_states), whole(hidden_states))
    narrow = speech_decoder(sliding_window=30)
    torch.testing.assert_close(narrow(hidden_states)[:, :30], whole(hidden_states)[:, :30])
    assert not torch.allclose(narrow(hidden_states)[:, 50:], whole(hidden_states)[:, 50:])


def test_memory_of_window_is_flat():
    stream = UnitStream(speech_decoder(sliding_window=100))

    def size():
        return [x.nelement() for layer in stream.cache.layers for x in (layer.keys, layer.values, layer.places)]

    for tokens in range(50, 5001, 50):
        stream.push(torch.randn(50, 6))
        if tokens == 100:
            expected = size()
    assert stream.cache.get_seq_length() == 5000 * 3
    assert size() == expected


def test_golden_answer(model, inputs, golden):
    out = model.generate(**inputs, **GREEDY, eos_token_id=-1, return_audio=True)
    text, waveform, tokens = joined(model.stream(**inputs, **GREEDY, eos_token_id=-1))
    assert tokens == golden["greedy_tokens"].tolist()
    assert text == model._own_tokenizer().decode(tokens, skip_special_tokens=True)
    assert torch.equal(out.units[0], golden["units"])
    torch.testing.assert_close(waveform, out.waveform[0], rtol=0, atol=1e-5)


@settings(deadline=None, max_examples=4)
@given(first_chunk_size=st.integers(1, 60), chunk_size=st.integers(1, 60), seed=st.integers(0, 2))
def test_stream_is_generate(model, first_chunk_size, chunk_size, seed):
    inputs = text_inputs(seed) | {"do_sample": False, "max_new_tokens": 10}
    out = model.generate(**inputs, return_audio=True)
    _, waveform, tokens = joined(model.stream(**inputs, first_chunk_size=first_chunk_size, chunk_size=chunk_size))
    assert tokens == out.sequences[0, 12:].tolist()
    torch.testing.assert_close(waveform, out.waveform[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("place", [0, 1, 9])
def test_end_of_answer(model, inputs, golden, place):
    tokens = golden["greedy_tokens"].tolist()
    eos, end = tokens[place], tokens.index(tokens[place])
    out = model.generate(**inputs, **GREEDY, eos_token_id=eos, return_audio=True)
    _, waveform, streamed = joined(model.stream(**inputs, **GREEDY, eos_token_id=eos))
    assert streamed == tokens[: end + 1]
    torch.testing.assert_close(waveform, out.waveform[0], rtol=0, atol=1e-5)
    assert (len(waveform) > 0) == (end > 0)


def test_sampled(model, inputs):
    sampling = {"do_sample": True, "max_new_tokens": 8, "repetition_penalty": 1.2, "top_k": 20}
    torch.manual_seed(1)
    out = model.generate(**inputs, **sampling, return_audio=True)
    torch.manual_seed(1)
    _, waveform, tokens = joined(model.stream(**inputs, **sampling))
    assert tokens == out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    torch.testing.assert_close(waveform, out.waveform[0], rtol=0, atol=1e-5)


def test_streams_do_not_mix(model):
    def run(seed):
        return joined(start(seed))

    def start(seed):
        return model.stream(**text_inputs(seed), do_sample=False, max_new_tokens=8)

    alone = [run(seed) for seed in range(3)]
    assert len({text for text, *_ in alone}) == 3
    with ThreadPoolExecutor(3) as pool:
        at_once = list(pool.map(run, range(3)))
    interleaved = [[] for _ in alone]
    streams = {seed: start(seed) for seed in range(3)}
    while streams:
        for seed, stream in list(streams.items()):
            if (event := next(stream, None)) is None:
                del streams[seed]
            else:
                interleaved[seed].append(event)
    for expected, in_thread, in_turn in zip(alone, at_once, interleaved):
        for text, waveform, tokens in (in_thread, joined(in_turn)):
            assert (text, tokens) == (expected[0], expected[2])
            assert torch.equal(waveform, expected[1])


def test_closing_frees_everything(model, inputs):
    def alive():
        gc.collect()
        return sum(type(x) in (DynamicCache, SpeechStream) for x in gc.get_objects())

    before = alive()
    stream = model.stream(**inputs, **GREEDY)
    next(stream)
    assert alive() > before
    stream.close()
    assert alive() == before
    for _ in model.stream(**inputs, **GREEDY):  # or by leaving a loop
        break
    assert alive() == before


def test_only_what_was_asked_for_is_generated(model, monkeypatch):
    calls = []
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    stream = model.stream(**text_inputs(0), **GREEDY)
    assert not calls
    next(stream)
    assert len(calls) == 1


def test_text_streamer_of_transformers(model, inputs, capsys):
    expected, *_ = joined(model.stream(**inputs, **GREEDY))
    streamer = TextStreamer(model._own_tokenizer(), skip_prompt=True, skip_special_tokens=True)
    model.generate(**inputs, **GREEDY, streamer=streamer)
    assert capsys.readouterr().out == expected + "\n"


@pytest.fixture(scope="module")
def tokenizer(golden_model_dir):
    return AutoTokenizer.from_pretrained(golden_model_dir)


@settings(deadline=None)
@given(st.lists(st.integers(0, 639), max_size=40))
def test_text_in_pieces(tokenizer, tokens):
    stream = TextStream(tokenizer)
    text = "".join([stream.push(token) for token in tokens]) + stream.flush()
    assert text == tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_text_of_many_bytes(tokenizer):
    stream, sentence = TextStream(tokenizer), "naïve – 日本 🎙️ end"
    pieces = [stream.push(token) for token in tokenizer.encode(sentence, add_special_tokens=False)]
    assert "".join(pieces) == sentence
    assert len(pieces) > len(sentence) and "\ufffd" not in "".join(pieces)


def test_second_turn(model, inputs):
    """The answer to the second question of a conversation, with the cache of the first."""
    out = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    question = torch.cat([out.sequences, text_inputs(3)["input_ids"]], dim=1)
    expected = model.generate(question, cache=copy.deepcopy(out.cache), **GREEDY, return_audio=True)
    _, waveform, tokens = joined(model.stream(question, cache=out.cache, **GREEDY))
    assert tokens == expected.sequences[0, question.shape[1] :].tolist()
    torch.testing.assert_close(waveform, expected.waveform[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("missing", ["vocoder_config", "speech_decoder_config"])
def test_a_model_that_does_not_speak_streams_text(model, inputs, missing):
    mute = copy.copy(model)
    mute.config = copy.deepcopy(model.config)
    setattr(mute.config, missing, None)
    text, waveform, tokens = joined(model.stream(**inputs, **GREEDY))
    mute_text, no_waveform, mute_tokens = joined(mute.stream(**inputs, **GREEDY))
    assert (mute_text, mute_tokens) == (text, tokens) and len(waveform) > len(no_waveform) == 0


SENTENCES = {
    "One. Two!  Three?\nFour\n\nFive": ["One.", "Two!", "Three?", "Four", "Five"],
    "It is 3.14, or… “Who?!” he asked. (So.) End.": ["It is 3.14, or…", "“Who?!”", "he asked.", "(So.)", "End."],
    "你好。「再见！」三？！四": ["你好。", "「再见！」", "三？！", "四"],
    " \n ": [],
    "Dr. No": ["Dr.", "No"],
}


@pytest.mark.parametrize("text", SENTENCES)
def test_sentences(text):
    for size in range(1, len(text) + 1):
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        assert list(iter_sentences(pieces)) == SENTENCES[text]


def test_sentences_come_when_they_are_complete():
    said = []

    def pieces():
        for piece in ("One", ".", " Two", ". Th", "ree。四"):
            said.append(piece)
            yield piece

    assert [(sentence, len(said)) for sentence in iter_sentences(pieces())] == [
        ("One.", 3), ("Two.", 4), ("Three。", 5), ("四", 5),
    ]  # fmt: skip


def test_refusals(model, inputs):
    two = torch.cat([inputs["input_ids"]] * 2)
    with pytest.raises(ValueError, match="one answer, got 2 rows"):
        list(model.stream(two[:, -20:], max_new_tokens=2))
    with pytest.raises(ValueError, match="neither `num_beams`"):
        list(model.stream(**text_inputs(0), max_new_tokens=2, num_beams=2))
    with pytest.raises(ValueError, match="`stream` speaks where the model can"):
        model.stream(**inputs, return_audio=True)
    with pytest.raises(ValueError, match="at least 1 unit, got 0 and 40"):
        model.stream(**inputs, first_chunk_size=0)
    stranger = copy.copy(model)
    stranger.config = copy.deepcopy(model.config)
    stranger.config._name_or_path, stranger._tokenizer = "", None
    with pytest.raises(ValueError, match="pass `tokenizer=processor.tokenizer`"):
        stranger.stream(**inputs)
    tokenizer = TTTOmniProcessor.from_pretrained(model.config.name_or_path).tokenizer
    assert list(stranger.stream(**text_inputs(0), max_new_tokens=2, tokenizer=tokenizer))
