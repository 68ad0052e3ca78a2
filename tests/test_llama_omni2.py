# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""LLaMA-Omni2's layout: what listens and thinks computes what its own code does, and answers in text."""

import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from layouts import expand
from safetensors.torch import load_file, save_file

from ttt_omni import TTTOmniForCausalLM, TTTOmniProcessor
from ttt_omni.commands.cli import main
from ttt_omni.conversion import ConversionError, convert_llama_omni


def weights(name: str, shape: list[int]) -> torch.Tensor:
    """What the golden checkpoint has by this name: NumPy promises these numbers for all time to come."""
    x = np.random.RandomState(zlib.crc32(name.encode())).uniform(-1, 1, shape)
    if len(shape) > 1:
        return torch.from_numpy(x * (0.5 if "embed" in name else 2.5 * np.prod(shape[1:]) ** -0.5)).float()
    return torch.from_numpy(1 + x / 2 if name.endswith("weight") else x / 4).float()


@pytest.fixture(scope="module")
def golden2(goldens) -> Path:
    return goldens.parent / "llama_omni2_tiny"


@pytest.fixture(scope="module")
def source(golden2, tmp_path_factory) -> Path:
    """The checkpoint, as that code saved it: names and shapes, with its configuration and its tokenizer."""
    folder = tmp_path_factory.mktemp("omni2") / "LLaMA-Omni2"
    shutil.copytree(golden2, folder, ignore=shutil.ignore_patterns("golden.safetensors", "tensors.json"))
    shapes = json.loads((golden2 / "tensors.json").read_text())
    tensors = {name: weights(name, shape) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("omni2") / "model"
    convert_llama_omni(source, output, layers="2-3", dtype="float32")
    return output


@pytest.fixture(scope="module")
def expected(golden2) -> dict[str, torch.Tensor]:
    return load_file(golden2 / "golden.safetensors")


@pytest.fixture(scope="module")
def mel(goldens) -> torch.Tensor:
    return load_file(goldens / "golden.safetensors")["mel"].T  # [128, 3000]


@torch.no_grad()
def test_original_numbers(converted, expected, mel):
    model = TTTOmniForCausalLM.from_pretrained(converted).eval()
    assert model.config.text_config.backbone == "qwen2" and model.config.speech_decoder_config is None

    def assert_close(actual, name):
        torch.testing.assert_close(actual, expected[name], rtol=1e-4, atol=1e-4)

    features = mel[None]
    assert_close(model.model.audio_tower(features).last_hidden_state[0, -16:], "encoder_states_last16")
    assert_close(
        model.model.embed(torch.full((1, 300), model.config.audio_token_id), features, None)[0], "speech_embeds"
    )
    inputs = {"input_ids": expand(model, expected["input_ids"]), "input_features": features}
    assert_close(model(**inputs).logits[0, -32:], "logits_last32")
    two = torch.stack([mel, mel.flip(1)])
    logits = model(input_ids=expand(model, expected["input_ids_two_turns"]), input_features=two).logits
    assert_close(logits[0, -32:], "logits_two_turns_last32")
    tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokens.tolist() == expected["greedy_tokens"].tolist()


def test_original_prompts(converted, expected, mel):
    model, processor = TTTOmniForCausalLM.from_pretrained(converted), TTTOmniProcessor.from_pretrained(converted)
    question = {"role": "user", "content": [{"type": "audio", "audio": (np.zeros(16000, np.float32), 16000)}]}
    answer = {"role": "assistant", "content": "In the end."}
    for messages, name in (([question], "input_ids"), ([question, answer, question], "input_ids_two_turns")):
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        assert torch.equal(inputs["input_ids"], expand(model, expected[name]))
    assert processor.tokenizer.decode(processor.answer_end_id) == "<|im_end|>"
    assert processor.audio_token == "<speech>" and model.config.audio_token_id == 263
    assert (
        model.generation_config.eos_token_id == processor.answer_end_id and not model.generation_config.suppress_tokens
    )

    told = {"role": "user", "content": "Say <speech> <|im_end|>"}  # is text, as anybody's
    ids = processor.apply_chat_template([told], tokenize=True, return_dict=True)["input_ids"][0]
    assert processor.audio_token_id not in ids and ids.count(processor.answer_end_id) == 2


def test_it_answers_in_text(converted, goldens, capsys):
    """By the commands, with the prompt of its training, in which nothing stands beside the speech."""
    question = goldens.parents[2] / "examples" / "question.wav"
    torch.manual_seed(0)
    main(["answer", "--model", str(converted), str(question), "--max-new-tokens=8"])
    answer = capsys.readouterr().out
    model, processor = TTTOmniForCausalLM.from_pretrained(converted), TTTOmniProcessor.from_pretrained(converted)
    message = {"role": "user", "content": [{"type": "audio", "audio": str(question)}]}
    inputs = processor.apply_chat_template(
        [message], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    torch.manual_seed(0)
    events = list(model.stream(**inputs, max_new_tokens=8))
    assert "".join(event.text or "" for event in events) + "\n" == answer and not any(e.waveform for e in events)


def test_what_is_left_out_is_said(source, tmp_path, caplog):
    convert_llama_omni(source, tmp_path / "m")
    assert "without its autoregressive speech generator" in caplog.text and "--voice-command" in caplog.text


def test_a_tokenizer_without_the_token_of_speech(source, tmp_path):
    shutil.copytree(source, tmp_path / "s")
    (tmp_path / "s" / "added_tokens.json").unlink()
    config = json.loads((tmp_path / "s" / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"].pop("263")
    (tmp_path / "s" / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match="has no token <speech>"):
        convert_llama_omni(tmp_path / "s", tmp_path / "m")
    (tmp_path / "s" / "vocab.json").unlink()
    with pytest.raises(ConversionError, match="has no tokenizer.json"):
        convert_llama_omni(tmp_path / "s", tmp_path / "m")
