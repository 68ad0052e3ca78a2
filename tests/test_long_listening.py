# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Recordings that are heard piece by piece, as if at once."""

from collections import deque
from itertools import islice

import numpy as np
import pytest
import soundfile
import torch
from layouts import sound

from ttt_omni import TTTOmniForCausalLM, TTTOmniProcessor
from ttt_omni.memory_ttt_omni import skip_pieces


RATE = 16000
GREEDY = {"do_sample": False, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def model(tiny_model_dir) -> TTTOmniForCausalLM:
    return TTTOmniForCausalLM.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="module")
def processor(tiny_model_dir) -> TTTOmniProcessor:
    return TTTOmniProcessor.from_pretrained(tiny_model_dir)


def message(audio) -> dict:
    return {"role": "user", "content": [{"type": "audio", "audio": audio}, {"type": "text", "text": "What was it?"}]}


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> str:
    """70 s, which are three windows."""
    path = tmp_path_factory.mktemp("recording") / "talk.flac"
    soundfile.write(path, sound(70), RATE)
    return str(path)


def whole(processor, messages):
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def listen(model, pieces, memory=None):
    return deque(model.listen(pieces, memory), maxlen=1).pop()


def answer(model, memory) -> tuple[list[int], torch.Tensor]:
    events = list(model.stream(**vars(memory), **GREEDY))
    waveforms = [event.waveform for event in events if event.waveform is not None]
    return [event.token for event in events if event.token is not None], torch.cat(waveforms)


def test_pieces_are_the_prompt(processor, recording):
    inputs = whole(processor, [message(recording)])
    pieces = list(processor.turn_pieces(message(recording)))
    assert torch.equal(torch.cat([piece["input_ids"] for piece in pieces], dim=1), inputs["input_ids"])
    assert torch.equal(
        torch.cat([piece["input_features"] for piece in pieces if "input_features" in piece]), inputs["input_features"]
    )
    assert max(piece["input_ids"].shape[1] for piece in pieces) == 300
    assert sum(piece["input_ids"].eq(processor.audio_token_id).sum() for piece in pieces) == 3 * 300


@pytest.mark.parametrize("content", ["Hello", [{"type": "text", "text": "Hello"}]])
def test_pieces_of_text(processor, content):
    pieces = list(processor.turn_pieces({"role": "user", "content": content}))
    inputs = whole(processor, [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}])
    assert torch.equal(torch.cat([piece["input_ids"] for piece in pieces], dim=1), inputs["input_ids"])


def test_pieces_of_several_recordings(processor):
    several = {
        "role": "user",
        "content": [{"type": "audio", "audio": (sound(40, seed), RATE)} for seed in range(2)]
        + [{"type": "text", "text": "Compare"}],
    }
    inputs = whole(processor, [several])
    pieces = list(processor.turn_pieces(several))
    assert torch.equal(torch.cat([piece["input_ids"] for piece in pieces], dim=1), inputs["input_ids"])
    assert len([piece for piece in pieces if "input_features" in piece]) == len(inputs["input_features"]) == 4


def test_heard_in_pieces(model, processor, recording):
    inputs = whole(processor, [message(recording)])
    expected = model.generate(**inputs, **GREEDY, return_audio=True)
    memory = listen(model, processor.turn_pieces(message(recording)))
    assert torch.equal(memory.input_ids, inputs["input_ids"])
    tokens, waveform = answer(model, memory)
    assert tokens == expected.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    torch.testing.assert_close(waveform, expected.waveform[0], rtol=0, atol=1e-5)


def test_a_file_is_read_as_it_is_heard(model, processor, recording, monkeypatch):
    blocks = []
    read = soundfile.SoundFile.read
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *args, **kwargs: blocks.append(1) or read(*args, **kwargs))
    ahead = []
    for memory in model.listen(processor.turn_pieces(message(recording))):
        windows = int(memory.input_ids.eq(processor.audio_token_id).sum()) // 300
        ahead.append(len(blocks) - windows)
    assert max(ahead) <= 2 and len(blocks) == 4


def test_interrupted_and_resumed(model, processor, recording, tmp_path):
    expected = answer(model, listen(model, processor.turn_pieces(message(recording))))
    for stop in (0, 3, 5):
        listening = model.listen(processor.turn_pieces(message(recording)))
        memory = deque(islice(listening, stop + 1), maxlen=1).pop()
        path = tmp_path / f"{stop}.safetensors"
        model.save_memory(path, memory.cache, memory.input_ids)
        loaded = model.load_memory(path)
        rest = skip_pieces(processor.turn_pieces(message(recording)), loaded.input_ids)
        tokens, waveform = answer(model, listen(model, rest, loaded))
        assert tokens == expected[0]
        torch.testing.assert_close(waveform, expected[1], rtol=0, atol=1e-5)


def test_another_recording_does_not_resume(model, processor):
    memory = listen(model, processor.turn_pieces(message((sound(40), RATE))))
    with pytest.raises(ValueError, match="in the middle of another prompt"):
        skip_pieces(processor.turn_pieces(message((sound(10), RATE))), memory.input_ids)


def test_second_turn(model, processor):
    """A question to a conversation whose answer was left unfinished by one token, as `generate` does."""
    first, second = message((sound(5), RATE)), message((sound(35, seed=1), RATE))
    memory = listen(model, processor.turn_pieces(first))
    tokens, _ = answer(model, memory)
    end = processor.tokenizer.convert_tokens_to_ids("<|eot_id|>")
    memory.input_ids = torch.cat([memory.input_ids, torch.tensor([[*tokens, end]])], dim=1)
    memory = listen(model, processor.turn_pieces(second, memory.input_ids), memory)

    features = [whole(processor, [turn])["input_features"] for turn in (first, second)]
    expected = model.generate(memory.input_ids, input_features=torch.cat(features), **GREEDY)
    assert answer(model, memory)[0] == expected[0, memory.input_ids.shape[1] :].tolist()

    said = {"role": "assistant", "content": "SAID"}
    prompt = processor.tokenizer.decode(whole(processor, [first, said, second])["input_ids"][0])
    assert processor.tokenizer.decode(memory.input_ids[0]) == prompt.replace(
        "SAID", processor.tokenizer.decode(tokens)
    )


def test_silence_is_skipped(processor):
    quiet = np.concatenate([sound(30), np.zeros(60 * RATE, np.float32), 1e-4 * sound(30), sound(20)])
    audio = message((quiet, RATE))
    assert len([p for p in processor.turn_pieces(audio) if "input_features" in p]) == 5
    kept = [p["input_features"] for p in processor.turn_pieces(audio, skip_silence=True) if "input_features" in p]
    assert len(kept) == 2
    everything = whole(processor, [audio])["input_features"]
    assert torch.equal(torch.cat(kept), everything[[0, 4]])


def test_refusals(model, processor):
    with pytest.raises(ValueError, match="last piece of a prompt must be text"):
        list(model.listen([]))
    windows = processor.iter_audio_windows((sound(5), RATE))
    with pytest.raises(ValueError, match="last piece of a prompt must be text"):
        list(model.listen(windows))
    (piece,) = processor.turn_pieces({"role": "user", "content": f"Say {processor.audio_token}"})
    assert processor.audio_token_id not in piece["input_ids"]  # what a user writes stays text
