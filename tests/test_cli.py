# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoModelForCausalLM

from ttt_omni.commands.cli import main


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


def test_help(capsys):
    status, stdout, _ = run(capsys, "--help")
    assert status == 0
    for command in ("convert", "make-tiny", "answer"):
        assert command in stdout
