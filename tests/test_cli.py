# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
import functools
import http.server
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor

import ttt_omni
from ttt_omni import registration
from ttt_omni.commands import cli
from ttt_omni.commands.cli import main
from ttt_omni.conversion.graft import LAYER_TYPES
from ttt_omni.conversion.llama_omni import DTYPES
from ttt_omni.processing_ttt_omni import SPEECH_INSTRUCTION


QUESTION = Path(__file__).parent.parent / "examples" / "question.wav"


def run(capsys, *arguments):
    """The status, and what stands on stdout and stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
        sys.exit(0)
    output = capsys.readouterr()
    return exit.value.code, output.out, output.err


def assert_fails(capsys, message, *arguments):
    status, _, stderr = run(capsys, *arguments)
    assert status == 1
    last_line = stderr.splitlines()[-1]
    assert last_line.startswith("ttt-omni: error: ") and message in last_line
    assert "Traceback" not in stderr


def test_answer(tiny_model_dir, tmp_path, capsys):
    status, text, stderr = run(
        capsys, "answer", "--model", tiny_model_dir, QUESTION, "--output", tmp_path / "a.wav", "--max-new-tokens", 8
    )
    assert status == 0
    assert text.strip().isprintable() and text.strip()
    assert stderr.splitlines()[-1].startswith("ttt-omni: Wrote ")
    assert os.listdir(tmp_path) == ["a.wav"]
    waveform, sampling_rate = soundfile.read(tmp_path / "a.wav")
    assert sampling_rate == 16000 and soundfile.info(tmp_path / "a.wav").subtype == "PCM_16"
    assert len(waveform) > 8000 and waveform.std() > 0.01


def test_python_m_from_any_directory(tiny_model_dir, tmp_path):
    arguments = ["answer", "--model", tiny_model_dir, QUESTION, "--output=a.wav", "--max-new-tokens=2"]
    finished = subprocess.run(
        [sys.executable, "-m", "ttt_omni", *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert finished.stdout.strip()
    assert (tmp_path / "a.wav").stat().st_size > 1000


def write(path, waveform, sampling_rate=16000, **kwargs):
    soundfile.write(path, np.asarray(waveform, dtype=np.float32), sampling_rate, **kwargs)


BAD_RECORDINGS = {
    "not a WAV": (lambda path: path.write_text("Is this a question?"), "cannot be read as audio"),
    "empty file": (lambda path: path.touch(), "cannot be read as audio"),
    "no samples": (lambda path: write(path, []), "is empty"),
    "NaN": (lambda path: write(path, [0.1, np.nan], subtype="FLOAT"), "NaN"),
    "missing": (lambda path: None, "does not exist"),
    "a folder": (lambda path: path.mkdir(), "question.wav"),
}


@pytest.mark.parametrize("case", BAD_RECORDINGS)
def test_bad_recordings(case, tmp_path, capsys):
    make, message = BAD_RECORDINGS[case]
    question = tmp_path / "question.wav"
    make(question)
    # before the model is loaded, which takes minutes for a large one: this one does not even exist
    assert_fails(capsys, message, "answer", "--model", tmp_path / "none", question, "--output", tmp_path / "a.wav")
    assert not (tmp_path / "a.wav").exists()


def test_bad_models_and_outputs(tiny_model_dir, tmp_path, capsys):
    def fails(message, model=tiny_model_dir, output=tmp_path / "a.wav", *options):
        assert_fails(capsys, message, "answer", "--model", model, QUESTION, "--output", output, *options)

    fails("neither a folder with a config.json nor found on the Hub", tmp_path / "none")
    fails("neither a folder with a config.json nor found on the Hub", tmp_path)
    fails("is no TTT-Omni model but 'omni_speech2s_llama'", tiny_model_dir / "llama-omni")
    fails("does not exist", tiny_model_dir, tmp_path / "none" / "a.wav")
    fails("max_new_tokens", tiny_model_dir, tmp_path / "a.wav", "--max-new-tokens", -1)
    fails("", tiny_model_dir, tmp_path / "a.wav", "--device", "abacus")
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_model_dir, damaged)
    os.truncate(damaged / "model.safetensors", 100_000)
    fails("", damaged)
    assert os.listdir(tmp_path) == ["damaged"]


def test_options_out_of_range(tiny_model_dir, tmp_path, capsys):
    answer = ["answer", "--model", tiny_model_dir, QUESTION, "--output", tmp_path / "a.wav"]
    for number in (-1, 0, 131073, 10**30):
        assert_fails(capsys, "`max_new_tokens` must be from 1 to the 131072", *answer, "--max-new-tokens", number)
    devices = ["abacus", "meta", *["cuda"] * (not torch.cuda.is_available())]
    for device in devices:
        assert_fails(capsys, f"The device '{device}' cannot be used", *answer, "--device", device)


def test_models_that_cannot_converse(tiny_model_dir, tmp_path, capsys):
    """It is said before the weights are read: there are none."""
    config = json.loads((tiny_model_dir / "config.json").read_text())
    answer = ["answer", "--model", tmp_path, QUESTION]
    chat = ["chat", "--model", tmp_path, QUESTION]
    (tmp_path / "config.json").write_text(json.dumps(config | {"audio_config": None}))
    for command in (answer, chat):
        assert_fails(capsys, "cannot hear: its config.json has no `audio_config`", *command)
    for field in ("speech_decoder_config", "vocoder_config"):
        (tmp_path / "config.json").write_text(json.dumps(config | {field: None}))
        for command in ([*answer, "--output", tmp_path / "a.wav"], [*chat, "--output", tmp_path / "answers"]):
            assert_fails(capsys, f"cannot speak: its config.json has no `{field}`; name a text-to-speech", *command)
            assert_fails(capsys, "nosuch is not installed", *command, "--voice-command", "nosuch {output}")
            assert_fails(capsys, "has no {output}", *command, "--voice-command", "echo {text}")
        assert_fails(capsys, "is for `--output` or `--play`", *answer, "--voice-command", "echo {output}")
        assert_fails(capsys, "`--stream` is for `--output`", *answer, "--stream")
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = ["--output", tmp_path / "a.wav", "--voice-command", "echo {output}"]
    assert_fails(capsys, "speaks by itself: leave out --voice-command", *answer, *options)


def test_a_model_of_ttt_alone(tiny_model_dir, tmp_path, capsys):
    source = tiny_model_dir / "llama-omni"
    parts = ["--whisper", source / "whisper.pt", "--vocoder", source / "vocoder.pt"]
    layers = ["--vocoder-config", source / "vocoder_config.json", "--mode=replace", "--layers=0-3", "--dtype=float32"]
    assert run(capsys, "convert", "--source", source, *parts, "--output", tmp_path / "model", *layers)[0] == 0
    arguments = ["--output", tmp_path / "a.wav", "--max-new-tokens", 4]
    status, text, _ = run(capsys, "answer", "--model", tmp_path / "model", QUESTION, *arguments)
    assert status == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    content = [{"type": "audio", "audio": str(QUESTION)}, {"type": "text", "text": SPEECH_INSTRUCTION}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    expected = model.generate(**inputs, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
    assert text == processor.tokenizer.decode(expected, skip_special_tokens=True) + "\n"


def test_formats(tiny_model_dir, tmp_path, capsys):
    answer = ["answer", "--model", tiny_model_dir, QUESTION, "--max-new-tokens", 3, "--output"]
    for name in ("a.wav", "a.FLAC", "a.ogg", os.fsdecode(b"caf\xe9.wav")):
        assert run(capsys, *answer, tmp_path / name)[0] == 0
    kinds = {"a.wav": ("WAV", "PCM_16"), "a.FLAC": ("FLAC", "PCM_16"), "a.ogg": ("OGG", "VORBIS")}
    infos = {name: soundfile.info(tmp_path / name) for name in kinds}
    assert {name: (info.format, info.subtype) for name, info in infos.items()} == kinds
    assert len({info.frames for info in infos.values()}) == 1
    wav, flac = (soundfile.read(tmp_path / name, dtype="int16")[0] for name in ("a.wav", "a.FLAC"))
    np.testing.assert_array_equal(wav, flac)
    assert (tmp_path / os.fsdecode(b"caf\xe9.wav")).read_bytes() == (tmp_path / "a.wav").read_bytes()
    assert len(os.listdir(tmp_path)) == 4

    assert_fails(capsys, "does not end with .wav, .flac, .ogg", *answer, tmp_path / "a.txt")
    assert_fails(capsys, "`--stream` writes .wav", *answer, tmp_path / "b.flac", "--stream")
    (tmp_path / "c.wav").mkdir()
    assert_fails(capsys, "is a folder", *answer, tmp_path / "c.wav")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes")
def test_recordings_that_can_be_read_only_once(tiny_model_dir, tmp_path, capsys):
    def pipe(content):
        os.mkfifo(tmp_path / "pipe")
        threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(content,)).start()
        return tmp_path / "pipe"

    answer = ["answer", "--model", tiny_model_dir, "--max-new-tokens", 3, "--output", tmp_path / "a.wav"]
    expected = run(capsys, *answer, QUESTION)[:2]
    assert run(capsys, *answer, pipe(QUESTION.read_bytes()))[:2] == expected
    (tmp_path / "pipe").unlink()
    assert_fails(capsys, f"{tmp_path / 'pipe'} cannot be read as audio", *answer, pipe(b"Is this a question?"))


def test_recordings_on_the_web(tiny_model_dir, tmp_path, capsys):
    (tmp_path / "page.wav").write_text("<!DOCTYPE html><html>404</html>")
    shutil.copy(QUESTION, tmp_path / "question.wav")

    class Handler(http.server.SimpleHTTPRequestHandler):
        requests = []

        def log_message(self, *_):
            self.requests.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    answer = ["answer", "--model", tiny_model_dir, "--max-new-tokens", 3, "--output", tmp_path / "a.wav"]
    try:
        assert run(capsys, *answer, f"{url}/question.wav")[:2] == run(capsys, *answer, QUESTION)[:2]
        assert Handler.requests == ["/question.wav"]  # once
        for name in ("missing.wav", "page.wav"):
            assert_fails(capsys, f"{url}/{name}", *answer, f"{url}/{name}")
    finally:
        server.shutdown()
        server.server_close()
    assert_fails(capsys, f"{url}/question.wav", *answer, f"{url}/question.wav")  # nobody is there


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_that_lacks_a_character(encoding, tiny_model_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ttt_omni.streaming_ttt_omni.TextStream.push", lambda *_: "\u4f60e")
    terminal = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(terminal, encoding=encoding))
    arguments = ["answer", "--model", str(tiny_model_dir), str(QUESTION), "--output", str(tmp_path / "a.wav")]
    main([*arguments, "--max-new-tokens=3"])
    assert terminal.getvalue().startswith(b"?e?e?e")
    assert soundfile.info(tmp_path / "a.wav").frames > 0


def test_nobody_reads_the_output(tiny_model_dir, tmp_path):
    arguments = ["answer", "--model", tiny_model_dir, QUESTION, "--output=a.wav", "--max-new-tokens=5"]
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "ttt_omni", *arguments]
    assert subprocess.run(command, cwd=tmp_path, stdout=write_end, stderr=write_end).returncode == 0
    os.close(write_end)
    assert os.listdir(tmp_path) == ["a.wav"] and soundfile.info(tmp_path / "a.wav").frames > 0


def test_a_model_that_says_nothing(tiny_model_dir, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        model.speech_decoder.output_proj.bias[model.speech_decoder.blank_id] = 1e6
    shutil.copytree(tiny_model_dir, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors", "llama-omni"))
    model.save_pretrained(tmp_path / "model")
    arguments = ["--model", tmp_path / "model", QUESTION, "--output", tmp_path / "a.wav", "--max-new-tokens", 2]
    status, _, stderr = run(capsys, "answer", *arguments)
    assert status == 0 and "says nothing" in stderr.splitlines()[-1]
    assert not (tmp_path / "a.wav").exists()


def test_an_interrupted_answer_leaves_no_file(tiny_model_dir, tmp_path):
    arguments = ["answer", "--model", tiny_model_dir, QUESTION, "--output=a.wav", "--max-new-tokens=100000"]
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "ttt_omni", *arguments],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.read(1)  # the answer has begun
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == "ttt-omni: error: interrupted"
    assert os.listdir(tmp_path) == []


def test_make_tiny(tiny_model_dir, tmp_path, capsys):
    status, _, _ = run(capsys, "make-tiny", tmp_path / "tiny")
    assert status == 0
    for name in ("model.safetensors", "llama-omni/model.safetensors", "config.json"):
        assert (tmp_path / "tiny" / name).read_bytes() == (tiny_model_dir / name).read_bytes()
    assert_fails(capsys, "not empty", "make-tiny", tmp_path / "tiny")
    assert os.listdir(tmp_path) == ["tiny"]


@pytest.mark.parametrize(
    "arguments",
    [[], ["sing"], ["convert"], ["convert", "--source=a", "--output=b", "--mode=swap"], ["answer", "a.wav"]],
)
def test_bad_usage(arguments, capsys):
    status, stdout, stderr = run(capsys, *arguments)
    assert status == 2 and stdout == ""
    assert "error: " in stderr.splitlines()[-1]


COMMANDS = ("convert", "make-tiny", "calibrate", "finetune", "distill", "merge", "export", "answer", "chat", "serve")


def test_help(capsys):
    status, stdout, _ = run(capsys, "--help")
    assert status == 0
    for command in COMMANDS:
        assert command in stdout
        status, text, _ = run(capsys, command, "--help")
        assert status == 0 and f"ttt-omni {command} " in text.partition("example")[2], command
    assert run(capsys, "--version")[:2] == (0, f"ttt-omni {ttt_omni.__version__}\n")


HELP = """
import runpy, sys
try:
    runpy.run_module("ttt_omni", run_name="__main__", alter_sys=True)
finally:
    heavy = {name.partition(".")[0] for name in sys.modules} & {"torch", "transformers", "numpy", "huggingface_hub"}
    assert not heavy, heavy
"""


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["convert", "--help"], ["chat", "--help"]])
def test_help_imports_nothing_heavy(words, tmp_path):
    program = tmp_path / "ttt-omni"  # as pip calls it
    program.write_text(HELP)
    assert subprocess.run([sys.executable, str(program), *words], check=True, capture_output=True).stdout


def test_the_package_registers_unless_it_is_the_command(tmp_path):
    """And where a program of another's has the command's name, at the first use of what is public."""
    program = "import sys, ttt_omni\nprint('ttt_omni.registration' in sys.modules, ttt_omni.TTTOmniConfig.__name__)\n"
    program += "from transformers import AutoConfig\nAutoConfig.for_model('ttt_omni')\n"
    for name, registers in (("program.py", True), ("ttt-omni", False)):
        (tmp_path / name).write_text(program)
        done = subprocess.run([sys.executable, str(tmp_path / name)], check=True, capture_output=True, text=True)
        assert done.stdout.split() == [str(registers), "TTTOmniConfig"]


def test_choices_are_those_of_the_conversion():
    assert set(cli.MODES) == set(LAYER_TYPES) and set(cli.DTYPES) == set(DTYPES)
    assert all(hasattr(registration, name) for name in {*ttt_omni.__all__} - {"ttt_lora_config"})


def test_a_language_model_that_is_to_listen_and_speak(tiny_model_dir, tmp_path, capsys):
    """And its plain form again."""
    plain, source = tmp_path / "plain", tiny_model_dir / "llama-omni"
    assert run(capsys, "export", "--model", tiny_model_dir, "--output", plain)[0] == 0
    assert AutoConfig.from_pretrained(plain).model_type == "llama"
    fresh = ["--whisper", source / "whisper.pt", "--listen", "--speak", 100, "--vocoder", source / "vocoder.pt"]
    fresh += ["--vocoder-config", source / "vocoder_config.json", "--layers=2-3", "--output", tmp_path / "model"]
    assert run(capsys, "convert", "--source", plain, *fresh)[0] == 0
    config = AutoConfig.from_pretrained(tmp_path / "model")
    assert config.audio_config is not None and config.speech_decoder_config.unit_vocab_size == 100
    assert_fails(capsys, "is no TTT-Omni model but 'llama'", "export", "--model", plain, "--output", tmp_path / "b")
    config = json.loads((tiny_model_dir / "config.json").read_text())
    config["text_config"]["layer_types"][3] = "linear_attention"
    shutil.copytree(tiny_model_dir, tmp_path / "replaced", ignore=shutil.ignore_patterns("llama-omni"))
    (tmp_path / "replaced" / "config.json").write_text(json.dumps(config))
    assert_fails(
        capsys, "layer 3", "export", "--model", tmp_path / "replaced", "--output", tmp_path / "b", "--backbone"
    )
