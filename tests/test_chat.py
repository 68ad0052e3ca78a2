# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""`ttt-omni answer` as a stream and with a memory, and `ttt-omni chat`."""

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from layouts import sound, write_tokenizer
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from ttt_omni import TTTOmniConfig
from ttt_omni.commands import chat
from ttt_omni.commands.cli import main
from ttt_omni.commands.voice import with_voice
from ttt_omni.conversation_file import locked
from ttt_omni.conversion import convert_llama_omni
from ttt_omni.memory_ttt_omni import memory_metadata
from ttt_omni.streaming_ttt_omni import TTTOmniStreamEvent


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
        main([command, f"--model={tiny_model_dir}", *arguments, "--max-new-tokens=5"])
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
        stop_hearing(patch, 2) if state == "listening" else stop_answering(patch, 1)
        stops(run, "chat", questions[1], "--memory=m.safetensors")
    metadata = memory_metadata("m.safetensors.unfinished")
    assert metadata["turn"] == state
    assert int(metadata["begins"]) == load_file("m.safetensors")["input_ids"].shape[1]
    assert metadata["pieces"] == ("2" if state == "listening" else "4")  # a header, two windows, and the rest
    with monkeypatch.context() as patch:
        heard = count_pieces(patch)
        output = run("chat", question, "--memory=m.safetensors")
    assert output.out == expected
    # the end of the first answer with a header, and two windows; the rest is heard as the answer begins
    assert len(heard) == {("same", "listening"): 1, ("same", "answering"): 0}.get((next_question, state), 3)
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
            assert (samplerate, channels, dtype) == (device.rate, 1, "float32")

        def __enter__(self): ...

        def __exit__(self, *_): ...

        def write(self, chunk):
            played.append(chunk)

    class InputStream(OutputStream):
        def __init__(self, callback, **kwargs):
            super().__init__(**kwargs)
            for block in np.split(sound(2)[:, None], 4):
                callback(block, len(block), None, None)

    device = types.SimpleNamespace(OutputStream=OutputStream, InputStream=InputStream, played=played, rate=RATE)
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


# Models that do not hear, or do not speak


@pytest.fixture(scope="module")
def text_model(tmp_path_factory) -> tuple[Path, Path]:
    """A language model and its graft, which neither hears nor speaks."""
    source, graft = (tmp_path_factory.mktemp("text") / name for name in ("source", "graft"))
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, eos_token_id=2))
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    model.save_pretrained(source)
    write_tokenizer(source)
    convert_llama_omni(source, graft, dtype="float32")
    return source, graft


@pytest.mark.parametrize("stops", [False, True])
def test_a_typed_chat_is_the_plain_model(run, text_model, monkeypatch, stops):
    """Three turns in two commands have the plain model's tokens and text, whether answers stop or are cut off."""
    source, graft = text_model
    plain, tokenizer = Qwen2ForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    question = [{"role": "user", "content": "Hi!"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    ends = [2]
    if stops:
        ends.append(int(plain.generate(torch.tensor([ids]), max_new_tokens=3, do_sample=False)[0, -1]))
        shutil.copytree(graft, "graft")
        graft, config = Path("graft"), json.loads((graft / "generation_config.json").read_text())
        (graft / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": ends}))
    expected = ""
    for question in ("And?", "Bye, bye.", None):
        settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": ends}
        answer = plain.generate(torch.tensor([ids]), **settings)[0, len(ids) :].tolist()
        expected += tokenizer.decode(answer, skip_special_tokens=True) + "\n"
        ids += answer[:-1] if answer[-1] in ends else answer
        if question is not None:
            turn = f"<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
            ids += tokenizer(turn).input_ids

    outputs = []
    for lines in ("Hi!\n \n", "And?\n\n  Bye, bye. \n"):
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        outputs.append(run("chat", "--memory=m.safetensors", f"--model={graft}"))
    assert "".join(output.out for output in outputs) == expected
    assert load_file("m.safetensors")["input_ids"].tolist() == [[*ids, 2]]
    assert "Type a question" in outputs[0].err and "says nothing" not in outputs[0].err
    assert not os.path.exists("m.safetensors.unfinished")


@pytest.fixture(scope="module")
def mute_model(tiny_model_dir, tmp_path_factory) -> Path:
    """The tiny model without its vocoder."""
    folder = tmp_path_factory.mktemp("mute")
    config = TTTOmniConfig.from_pretrained(tiny_model_dir)
    config.vocoder_config = None
    chat.TTTOmniForCausalLM.from_pretrained(tiny_model_dir, config=config).save_pretrained(folder)
    chat.TTTOmniProcessor.from_pretrained(tiny_model_dir).save_pretrained(folder)
    return folder


# Says a text of n bytes as n / 100 s of n / 1024 at 22,050 Hz; nothing of "...".
PROGRAM = r"""
import sys, wave
output, *texts = sys.argv[1:]
text = (texts[0] if texts else sys.stdin.buffer.read().decode()).strip()
if text == "fail":
    sys.exit("cannot say\nthat")
with open("said.txt", "a", encoding="utf-8") as log:
    log.write(text + "\n")
size = len(text.encode()) * (text != "...")
with wave.open(output, "wb") as file:
    file.setparams((1, 2, 22050, 0, "NONE", ""))
    file.writeframes((size * 32).to_bytes(2, "little") * round(220.5 * size))
"""


def say_by_rote(patch, pieces: list[str]) -> None:
    """Has every answer say these pieces of text."""

    def answer(self, max_new_tokens):
        self.tokens = [300]
        yield from (TTTOmniStreamEvent(text=piece) for piece in pieces)

    patch.setattr(chat.Conversation, "answer", answer)


@pytest.mark.parametrize("options", ["{output} {text}", "{output}"])
def test_a_program_speaks_for_a_mute_model(run, questions, mute_model, sounddevice, monkeypatch, options):
    Path("program.py").write_text(PROGRAM)
    sounddevice.rate = 24000
    command = f"{shlex.quote(sys.executable)} program.py {options}"
    pieces = ["Wel", "l. ", "-h means ", "“$HOME;”", "!\n...\nAnd {text}…"]
    say_by_rote(monkeypatch, pieces)
    arguments = [questions[0], f"--voice-command={command}", "--play", f"--model={mute_model}"]
    assert run("answer", *arguments, "--output=a.wav").out == "".join(pieces) + "\n"
    sentences = ["Well.", "-h means “$HOME;”!", "...", "And {text}…"]
    assert Path("said.txt").read_text(encoding="utf-8").splitlines() == sentences
    samples, rate = soundfile.read("a.wav")
    sizes = [len(sentence.encode()) for sentence in sentences if sentence != "..."]
    assert rate == 24000 and len(samples) == pytest.approx(240 * sum(sizes), abs=4)
    for size, end in zip(sizes, np.cumsum(sizes)):
        middle = int(240 * (end - size / 2))
        np.testing.assert_allclose(samples[middle - 20 : middle + 20], size / 1024, atol=2e-3)
    np.testing.assert_allclose(np.concatenate(sounddevice.played), samples, atol=1e-4)

    run("chat", questions[1], *arguments, "--output=answers")  # one that grows, and is the same
    for number in (1, 2):
        np.testing.assert_array_equal(soundfile.read(f"answers/answer-{number}.wav")[0], samples)


def test_sentences_are_spoken_while_the_next_are_written(tmp_path, monkeypatch):
    """The program's first sentence ends only once the text has come to its end."""
    monkeypatch.chdir(tmp_path)
    waiting = "import pathlib, time\nwhile not pathlib.Path('written').exists():\n    time.sleep(0.01)\n"
    Path("program.py").write_text(waiting + PROGRAM)

    def events():
        yield TTTOmniStreamEvent(text="One. Two. Three")
        Path("written").touch()

    waveforms = [x.waveform for x in with_voice(events(), [sys.executable, "program.py", "{output}"]) if not x.text]
    assert [len(x) for x in waveforms] == pytest.approx([960, 960, 1200], abs=2)


def test_a_mute_model_writes(run, questions, mute_model, capsys, monkeypatch):
    spoken = run("answer", questions[0], "--output=a.wav").out
    output = run("answer", questions[0], f"--model={mute_model}")
    assert output.out == spoken and "says nothing" not in output.err
    assert os.listdir() == ["a.wav"]

    Path("program.py").write_text(PROGRAM)
    say_by_rote(monkeypatch, ["Well.\n", "fail\n", "More.\n"])
    command = f"--voice-command={shlex.quote(sys.executable)} program.py {{output}}"
    message = fails(run, capsys, "answer", questions[0], f"--model={mute_model}", "--output=b.wav", command)
    assert "exited with 1 for 'fail': cannot say that" in message
    assert not os.path.exists("b.wav")
