# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""`ttt-omni answer` as a stream and with a memory, and `ttt-omni chat`."""

import io
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from layouts import sound
from safetensors.torch import load_file

from ttt_omni.commands import chat
from ttt_omni.commands.cli import main
from ttt_omni.commands.conversation_file import locked
from ttt_omni.memory_ttt_omni import memory_metadata


RATE = 16000


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
        capsys.readouterr()  # of one that failed
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


class Stopped(KeyboardInterrupt):
    pass


def stop_hearing(patch, pieces: int) -> None:
    """Interrupts what comes once so many pieces were heard."""
    heard = count_pieces(patch)
    hear = chat.TTTOmniForCausalLM._hear

    def interrupt(self, *arguments):
        if len(heard) == pieces:
            raise Stopped
        hear(self, *arguments)

    patch.setattr(chat.TTTOmniForCausalLM, "_hear", interrupt)


def stop_answering(patch, turn: int) -> None:
    """Interrupts the answer of a turn, which counts from 1, at its third token."""
    answer, turns = chat.Conversation.answer, []

    def interrupt(self, *arguments):
        turns.append(1)
        for number, event in enumerate(answer(self, *arguments)):
            if number == 2 and len(turns) == turn:
                raise Stopped
            yield event

    patch.setattr(chat.Conversation, "answer", interrupt)


def count_pieces(patch) -> list:
    """Grows with each piece of a prompt that is heard."""
    heard, hear = [], chat.TTTOmniForCausalLM._hear
    patch.setattr(chat.TTTOmniForCausalLM, "_hear", lambda self, *arguments: (hear(self, *arguments), heard.append(1)))
    return heard


def stops(run, *arguments) -> None:
    with pytest.raises(SystemExit) as exit:
        run(*arguments)
    assert exit.value.code == 130


def assert_same_memory(path: str, expected: str) -> None:
    tensors, others = load_file(path), load_file(expected)
    assert torch.equal(tensors["input_ids"], others["input_ids"])
    torch.testing.assert_close(tensors, others, rtol=0, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("pieces", [0, 1, 2])
def test_interrupted_answer_goes_on(run, questions, monkeypatch, pieces):
    with monkeypatch.context() as patch:
        all_heard = count_pieces(patch)
        expected = run("answer", questions[1], "--output=a.wav", "--memory=a.safetensors").out
    monkeypatch.setattr(chat, "SAVE_SECONDS", 0)
    with monkeypatch.context() as patch:
        stop_hearing(patch, pieces)
        stops(run, "answer", questions[1], "--output=b.wav", "--memory=m.safetensors")
    assert sorted(os.listdir()) == ["a.safetensors", "a.wav", *["m.safetensors.unfinished"] * (pieces > 0)]
    heard = count_pieces(monkeypatch)
    output = run("answer", questions[1], "--output=b.wav", "--memory=m.safetensors")
    assert output.out == expected
    assert (f"of which {pieces} pieces were heard" in output.err) == (pieces > 0)
    assert len(heard) == len(all_heard) - pieces
    np.testing.assert_array_equal(soundfile.read("a.wav")[0], soundfile.read("b.wav")[0])
    assert_same_memory("m.safetensors", "a.safetensors")
    assert sorted(os.listdir()) == ["a.safetensors", "a.wav", "b.wav", "m.safetensors"]


@pytest.mark.parametrize("state", ["listening", "answering"])
@pytest.mark.parametrize("next_question", ["same", "another"])
def test_second_turn_is_interrupted(run, questions, tmp_path, monkeypatch, state, next_question):
    """The other recording has as many windows, and so as many tokens, as the one that was heard."""
    soundfile.write("other.wav", sound(38, seed=7), RATE)
    question = questions[1] if next_question == "same" else "other.wav"
    run("chat", questions[0], "--memory=expected.safetensors")
    expected = run("chat", question, "--memory=expected.safetensors").out
    monkeypatch.setattr(chat, "SAVE_SECONDS", 0)
    run("chat", questions[0], "--memory=m.safetensors")
    with monkeypatch.context() as patch:
        stop_hearing(patch, 3) if state == "listening" else stop_answering(patch, 1)
        stops(run, "chat", questions[1], "--memory=m.safetensors")
    metadata = memory_metadata("m.safetensors.unfinished")
    assert metadata["turn"] == state
    assert int(metadata["begins"]) == load_file("m.safetensors")["input_ids"].shape[1]
    assert metadata["pieces"] == ("2" if state == "listening" else "4")  # a header, two windows, and the rest
    with monkeypatch.context() as patch:
        heard = count_pieces(patch)
        output = run("chat", question, "--memory=m.safetensors")
    assert output.out == expected
    # of the end of the first answer, a header, and two windows; the rest is heard as the answer begins
    assert len(heard) == {("same", "listening"): 1, ("same", "answering"): 0}.get((next_question, state), 4)
    assert_same_memory("m.safetensors", "expected.safetensors")
    assert not os.path.exists("m.safetensors.unfinished")


def test_chat_of_several_questions_goes_on(run, questions, monkeypatch):
    expected = run("chat", *questions, "--memory=expected.safetensors").out
    with monkeypatch.context() as patch:
        stop_answering(patch, 2)
        stops(run, "chat", *questions, "--memory=m.safetensors", "--output=answers")
    for name in ("", ".unfinished"):
        shutil.copy(f"m.safetensors{name}", f"another.safetensors{name}")
    assert os.listdir("answers") == ["answer-1.wav"]
    output = run("chat", *questions, "--memory=m.safetensors", "--output=answers")
    assert "0.wav was answered before" in output.err
    assert "".join(expected.splitlines(True)[1:]) == output.out
    assert_same_memory("m.safetensors", "expected.safetensors")
    assert sorted(os.listdir("answers")) == ["answer-1.wav", "answer-2.wav", "answer-3.wav"]

    # another command with the same beginning is another one, and so is the same command once it was over
    assert run("chat", questions[0], "--memory=another.safetensors").out.count("\n") == 1
    assert run("chat", *questions, "--memory=m.safetensors").out.count("\n") == 3


def test_a_turn_that_was_completed_is_not_unfinished(run, questions, monkeypatch):
    """What a kill between the two files leaves: the turn is complete, and what was heard of it still there."""
    run("chat", *questions[:2], "--memory=expected.safetensors")
    with monkeypatch.context() as patch:
        stop_answering(patch, 1)
        stops(run, "chat", questions[0], "--memory=m.safetensors")
    shutil.copy("m.safetensors.unfinished", "left")
    run("chat", questions[0], "--memory=m.safetensors")
    shutil.move("left", "m.safetensors.unfinished")
    run("chat", questions[1], "--memory=m.safetensors")
    assert_same_memory("m.safetensors", "expected.safetensors")


def test_memories_without_metadata(run, questions, tiny_model_dir, capsys):
    """As from `save_memory`, and of earlier versions."""
    expected = run("chat", *questions[:2], "--memory=expected.safetensors").out
    run("chat", questions[0], "--memory=m.safetensors")
    model = chat.TTTOmniForCausalLM.from_pretrained(tiny_model_dir)
    memory = model.load_memory("m.safetensors")
    model.save_memory("m.safetensors", memory.cache, memory.input_ids)
    model.save_memory("middle.safetensors", memory.cache, memory.input_ids[:, :-1])
    assert run("chat", questions[1], "--memory=m.safetensors").out == expected.splitlines(True)[1]
    assert "in the middle of a turn" in fails(run, capsys, "chat", questions[1], "--memory=middle.safetensors")


def test_the_file_of_an_unfinished_turn_is_no_memory(run, questions, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_answering(patch, 1)
        stops(run, "chat", questions[0], "--memory=m.safetensors")
    assert "unfinished turn" in fails(run, capsys, "chat", questions[0], "--memory=m.safetensors.unfinished")


def test_two_commands_on_one_file(run, questions, capsys):
    commands = {
        "m.safetensors": ["chat", questions[0], "--memory=m.safetensors"],
        "a.wav": ["answer", questions[0], "--output=a.wav", "--stream"],
        "answers": ["chat", questions[0], "--output=."],
    }
    for name, command in commands.items():
        with locked(name):
            assert "Another command is using" in fails(run, capsys, *command)
        open(f".{name}.lock", "w").close()  # left by one that was killed
        run(*command)
    assert sorted(os.listdir()) == ["a.wav", "answer-1.wav", "m.safetensors"]


def test_two_answers_at_once_do_not_mix(tmp_path):
    path = tmp_path / "a.wav"
    with chat.SpeechFile(path, RATE, False) as one, chat.SpeechFile(path, RATE, False) as other:
        one.write(torch.full((8000,), 0.25))
        other.write(torch.full((4000,), -0.5))
        one.write(torch.full((8000,), 0.25))
    samples, _ = soundfile.read(path)  # of the one that ended last
    np.testing.assert_allclose(samples, np.full(16000, 0.25), atol=1e-4)
    assert os.listdir(tmp_path) == ["a.wav"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_chats_go_on():
    benchmark = Path(__file__).parent.parent / "benchmarks" / "chat_kills.py"
    done = subprocess.run([sys.executable, benchmark, "--moments", "0.4", "0.7"], capture_output=True, text=True)
    assert "2 of 2 went on as if nobody had killed them" in done.stdout, done.stdout + done.stderr


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
