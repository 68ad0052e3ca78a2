# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import ttt_omni


EXAMPLES = Path(ttt_omni.__file__).parent / "examples"


@pytest.fixture(scope="module")
def finetune():
    sys.path.insert(0, str(EXAMPLES))
    import finetune

    yield finetune
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def stage(tmp_path_factory, tiny_model_dir, spoken_corpus):
    """A short stage in the form of those in `examples/stages`, whose corpus has text beside the speech."""
    folder = tmp_path_factory.mktemp("stage")
    texts = [
        {"conversations": [{"from": "human", "value": f"Say {i}."}, {"from": "gpt", "value": f"I say {i}, as asked."}]}
        for i in range(24)
    ]
    lines = [*map(json.dumps, texts), *spoken_corpus.read_text().splitlines()]
    manifest = spoken_corpus.with_name("mixed.jsonl")
    manifest.write_text("\n".join(lines))
    values = yaml.safe_load((EXAMPLES / "stages" / "8k.yaml").read_text())
    values |= {
        "model": str(tiny_model_dir),
        "manifest": str(manifest),
        "length": 512,
        "loss": "lm",
        "drop_audio_padding": True,
        "bf16": False,
        "use_cpu": True,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "warmup_steps": 0,
        "max_steps": 4,
        "save_steps": 2,
        "rank": 4,
        "learning_rate": 3e-2,
        "memory_learning_rate": 6e-2,
        "lr_scheduler_type": "constant",
        "report_to": "none",
    }
    path = folder / "stage.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def losses(folder):
    steps = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    history = json.loads((steps[-1] / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.fixture(scope="module")
def unkilled(finetune, stage, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unkilled") / "adapter"
    finetune.train(*finetune.read_arguments(str(stage), f"output_dir={folder}"))
    return folder


def test_loss_falls(unkilled):
    curve = losses(unkilled)
    assert len(curve) == 4 and curve[-1] < 0.8 * curve[0], curve


def test_card_names_the_base_and_the_stage(unkilled, tiny_model_dir):
    card = ModelCard.load(unkilled / "README.md")
    assert card.data.base_model == str(tiny_model_dir) and card.data.library_name == "peft"
    assert "| tokens | 512 |" in card.text


def test_killed_and_resumed_run_ends_the_same(unkilled, stage, tmp_path):
    folder = tmp_path / "adapter"
    command = [sys.executable, str(EXAMPLES / "finetune.py"), str(stage), f"output_dir={folder}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (folder / "checkpoint-2" / "trainer_state.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / "adapter_model.safetensors").exists()
    subprocess.run(command, check=True, capture_output=True)
    assert losses(folder) == pytest.approx(losses(unkilled), rel=1e-5)
    resumed, straight = (load_file(path / "adapter_model.safetensors") for path in (folder, unkilled))
    for name, tensor in straight.items():
        torch.testing.assert_close(resumed[name], tensor, atol=1e-5, rtol=1e-4)


def test_next_stage_goes_on_from_the_last_one(finetune, stage, unkilled, tiny_model_dir, tmp_path):
    overrides = [f"output_dir={tmp_path}", f"previous={unkilled}", "length=1024", "max_steps=1", "save_steps=10"]
    trainer = finetune.train(*finetune.read_arguments(str(stage), *overrides))
    first = trainer.state.log_history[0]["loss"]
    assert first < 0.8 * losses(unkilled)[0]
    assert max(len(item["input_ids"]) for item in trainer.train_dataset) > 512
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), tmp_path)
    assert model.peft_config["default"].r == 4


def test_groups_of_parameters(finetune, stage, tmp_path):
    trainer = finetune.train(*finetune.read_arguments(str(stage), f"output_dir={tmp_path}", "max_steps=1"))
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    groups = [(group["initial_lr"], names[id(p)]) for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len(groups) == sum(p.requires_grad for p in trainer.model.parameters())
    for learning_rate, name in groups:
        assert learning_rate == (6e-2 if ".ttt." in name or ".ttt_gate." in name else 3e-2), name


@pytest.mark.parametrize("loss", ["both", "ctc"])
def test_loss_of_speech(finetune, stage, spoken_corpus, tmp_path, loss):
    overrides = [f"output_dir={tmp_path}", "max_steps=1", f"loss={loss}", f"manifest={spoken_corpus}", "length=800"]
    trainer = finetune.train(*finetune.read_arguments(str(stage), *overrides))
    gate = trainer.model.get_parameter(
        "base_model.model.model.language_model.layers.3.ttt_gate.modules_to_save.default.weight"
    )
    assert gate.any()


def test_bad_arguments(finetune, stage, tmp_path):
    with pytest.raises(ValueError, match="`loss` must be one of both, lm, ctc, got 'asr'"):
        finetune.read_arguments(str(stage), "loss=asr", f"output_dir={tmp_path}")
    with pytest.raises(ValueError, match="not of the form name=value"):
        finetune.read_arguments(str(stage), "--loss")
    with pytest.raises(ValueError, match="lenght"):
        finetune.read_arguments(str(stage), "lenght=3")
    arguments = finetune.read_arguments(str(stage), "loss=ctc", f"output_dir={tmp_path}", "max_steps=1")
    with pytest.raises(ValueError, match="too few conversations with `units` for `loss=ctc`"):
        finetune.train(*arguments)


@pytest.mark.parametrize("path", sorted((EXAMPLES / "stages").glob("*.yaml")), ids=lambda path: path.stem)
def test_stages_are_valid(finetune, path, tmp_path):
    overrides = ["model=x", "manifest=y", f"output_dir={tmp_path}", "bf16=false"]
    stage, arguments = finetune.read_arguments(str(path), *overrides)
    assert stage.length == 1024 * (64 if path.stem == "65k" else int(path.stem.removesuffix("k")))
    assert arguments.gradient_checkpointing and stage.memory_learning_rate > arguments.learning_rate
