# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""`ttt-omni answer` as a stream and with a memory, and `ttt-omni chat`."""

import io
import os
import sys
import types

import numpy as np
import pytest
import soundfile

from ttt_omni.commands import chat
from ttt_omni.commands.cli import main


RATE = 16000


def sound(seconds: float, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal(int(seconds * RATE))
    return (0.05 * noise).astype(np.float32)


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> list[str]:
    """Recordings of 3, 40 and 4 s."""
    folder = tmp_path_factory.mktemp("questions")
    for seed, seconds in enumerate([3, 40, 4]):
        soundfile.write(folder / f"{seed}.wav", sound(seconds, seed), RATE)
    return [str(folder / f"{seed}.wav") for seed in range(3)]


@pytest.fixture
def run(tiny_model_dir, capsys, monkeypatch, tmp_path):
    """Runs a command in `tmp_path`; returns what it says on stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(command, *arguments):
        main([command, "--model", str(tiny_model_dir), *arguments, "--max-new-tokens=5"])
        return capsys.readouterr()

    return run


def fails(run, capsys, *arguments) -> str:
    """The last line on stderr of a command that fails."""
    with pytest.raises(SystemExit) as exit:
        run(*arguments)
    assert exit.value.code == 1
    return capsys.readouterr().err.splitlines()[-1]


def test_stream_grows_to_the_same_file(run, questions, monkeypatch):
    run("answer", questions[0], "--output=whole.wav")
    sizes = []
    write = chat.SpeechFile.write

    def write_and_look(writer, waveform):
        write(writer, waveform)
        sizes.append(soundfile.info("grown.wav").frames)

    monkeypatch.setattr(chat.SpeechFile, "write", write_and_look)
    run("answer", questions[0], "--output=grown.wav", "--stream")
    assert sizes == sorted(set(sizes)) and len(sizes) > 1
    whole, grown = (soundfile.read(name, dtype="int16")[0] for name in ("whole.wav", "grown.wav"))
    np.testing.assert_array_equal(whole, grown)
    assert len(whole) == sizes[-1]
    assert sorted(os.listdir()) == ["grown.wav", "whole.wav"]


@pytest.mark.parametrize("pieces", [0, 1, 3])
def test_interrupted_answer_goes_on(run, questions, tiny_model_dir, monkeypatch, pieces):
    expected = run("answer", questions[1], "--output=a.wav").out
    monkeypatch.setattr(chat, "SAVE_SECONDS", 0)
    heard = []

    def interrupt(self, *arguments):
        if len(heard) == pieces:
            raise KeyboardInterrupt
        heard.append(1)
        return encode(self, *arguments)

    model_class = chat.TTTOmniForCausalLM
    encode = model_class._hear
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr(model_class, "_hear", interrupt)
        run("answer", questions[1], "--output=b.wav", "--memory=m.safetensors")
    assert exit.value.code == 130
    assert os.path.exists("m.safetensors") == (pieces > 0) and not os.path.exists("b.wav")
    output = run("answer", questions[1], "--output=b.wav", "--memory=m.safetensors")
    assert output.out == expected
    assert ("Going on with" in output.err) == (pieces > 0)
    np.testing.assert_array_equal(soundfile.read("a.wav")[0], soundfile.read("b.wav")[0])
    assert sorted(os.listdir()) == ["a.wav", "b.wav", "m.safetensors"]


def test_resumed_with_another_recording(run, questions, monkeypatch, capsys):
    monkeypatch.setattr(chat, "SAVE_SECONDS", 0)
    monkeypatch.setattr(chat.Conversation, "answer", lambda *_: exec("raise ValueError('stopped')"))
    assert "stopped" in fails(run, capsys, "answer", questions[1], "--output=a.wav", "--memory=m.safetensors")
    message = fails(run, capsys, "answer", questions[0], "--output=a.wav", "--memory=m.safetensors")
    assert "in the middle of another prompt" in message


def test_chat_over_files(run, questions, tiny_model_dir):
    at_once = run("chat", *questions, "--output=together").out
    assert sorted(os.listdir("together")) == ["answer-1.wav", "answer-2.wav", "answer-3.wav"]
    assert at_once.count("\n") == 3
    first = run("chat", *questions[:1], "--memory=m.safetensors").out
    second = run("chat", *questions[1:2], "--memory=m.safetensors").out
    third = run("answer", questions[2], "--output=c.wav", "--memory=m.safetensors").out  # which goes on as well
    assert first + second + third == at_once
    np.testing.assert_array_equal(soundfile.read("c.wav")[0], soundfile.read("together/answer-3.wav")[0])
    assert run("chat", questions[1]).out != second  # without the memory it is another answer


def test_chat_is_the_template(run, questions, tiny_model_dir):
    run("chat", *questions[:2], "--memory=m.safetensors")
    model = chat.TTTOmniForCausalLM.from_pretrained(tiny_model_dir)
    processor = chat.TTTOmniProcessor.from_pretrained(tiny_model_dir)
    memory = model.load_memory("m.safetensors")
    ids = memory.input_ids
    turns = processor.tokenizer.decode(ids[0]).split("<|start_header_id|>")
    assert [turn.split("<|end_header_id|>")[0] for turn in turns[1:]] == [
        "system", *["user", "assistant"] * 2,
    ]  # fmt: skip
    assert all(turn.endswith("<|eot_id|>") for turn in turns[1:])
    assert int((ids == processor.audio_token_id).sum()) == (1 + 2) * 300
    assert ids.shape[1] - memory.cache.get_seq_length() == 2  # the last token, and the end of the turn


def test_skip_silence(run, tmp_path):
    soundfile.write("quiet.wav", np.concatenate([sound(30), np.zeros(60 * RATE), sound(5)]), RATE)
    run("answer", "quiet.wav", "--output=a.wav", "--memory=all.safetensors")
    run("answer", "quiet.wav", "--output=a.wav", "--memory=some.safetensors", "--skip-silence")
    sizes = [os.path.getsize(name) for name in ("some.safetensors", "all.safetensors")]
    assert sizes[0] < 0.7 * sizes[1]


def test_memory_of_another_kind(run, questions, capsys):
    with open("m.safetensors", "w") as file:
        file.write("?")
    assert "m.safetensors" in fails(run, capsys, "chat", questions[0], "--memory=m.safetensors")
    assert "does not exist" in fails(run, capsys, "chat", questions[0], "--memory=none/m.safetensors")


@pytest.fixture
def sounddevice(monkeypatch):
    """A device that says a question of 2 s whenever it is asked, and records what is played."""
    played = []

    class OutputStream:
        def __init__(self, samplerate, channels, dtype):
            assert (samplerate, channels, dtype) == (RATE, 1, "float32")

        def __enter__(self): ...

        def __exit__(self, *_): ...

        def write(self, chunk):
            played.append(chunk)

    class InputStream(OutputStream):
        def __init__(self, callback, **kwargs):
            super().__init__(**kwargs)
            for block in np.split(sound(2)[:, None], 4):
                callback(block, len(block), None, None)

    device = types.SimpleNamespace(OutputStream=OutputStream, InputStream=InputStream, played=played)
    monkeypatch.setitem(sys.modules, "sounddevice", device)
    return device


def test_microphone_and_loudspeaker(run, sounddevice, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n\n\n\n"))  # two questions
    output = run("chat", "--play", "--output=answers")
    assert output.out.count("\n") == 2 and "Press Enter to speak" in output.err
    written = np.concatenate([soundfile.read(f"answers/answer-{i}.wav", dtype="float32")[0] for i in (1, 2)])
    np.testing.assert_allclose(np.concatenate(sounddevice.played), written, atol=1e-4)


def test_no_sound_device(run, questions, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    assert "no sound device for speaking" in fails(run, capsys, "chat")
    message = fails(run, capsys, "answer", questions[0], "--output=a.wav", "--play")
    assert "no sound device for playing" in message and "pip install sounddevice" in message
