# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
import os


os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors, and several workers on few cores

from functools import cache, partial
from pathlib import Path

import torch


if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports the kernels

import pytest
from layouts import with_layers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


GOLDENS = Path(__file__).parent / "goldens"


def pytest_collection_modifyitems(items):
    """The root's `__init__.py` is that of `ttt_omni`: pytest must not import it once more, under the folder's name."""
    for root in {node for item in items for node in item.listchain() if isinstance(node, pytest.Package)}:
        root.setup = lambda: None


@pytest.fixture(scope="session")
def goldens() -> Path:
    """A checkpoint in LLaMA-Omni's layout, and what the original code computes from it."""
    return GOLDENS / "llama_omni_tiny"


@pytest.fixture(scope="session")
def parts(goldens) -> dict[str, Path]:
    """The arguments that `convert_llama_omni` needs for that checkpoint besides source and output."""
    return {
        "whisper": goldens / "whisper.pt",
        "vocoder": goldens / "vocoder.pt",
        "vocoder_config": goldens / "vocoder_config.json",
    }


@pytest.fixture(scope="session")
def golden_model_dir(goldens, parts, tmp_path_factory) -> Path:
    """That checkpoint converted in float32, with TTT beside attention in the upper half of its layers."""
    from ttt_omni.conversion import convert_llama_omni

    output = tmp_path_factory.mktemp("golden") / "model"
    convert_llama_omni(goldens, output, **parts, layers="2-3", dtype="float32")
    return output


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory) -> Path:
    """What `ttt-omni make-tiny` makes; its source is in `llama-omni` there."""
    from ttt_omni.conversion import make_tiny

    output = tmp_path_factory.mktemp("tiny") / "model"
    make_tiny(output)
    return output


@pytest.fixture(scope="session")
def spoken_corpus(tmp_path_factory) -> Path:
    """A manifest of four conversations of tones and texts for the tiny model, one of them of two turns."""
    import json

    import numpy as np
    import soundfile

    folder = tmp_path_factory.mktemp("corpus")
    lines = []
    for number in range(4):
        speech, turns = [], []
        for turn in range(1 + (number == 3)):
            speech.append(f"{number}-{turn}.wav")
            tone = 0.3 * np.sin(np.arange(4000 + 2000 * number) * 0.1 * (number + 1))
            soundfile.write(folder / speech[-1], tone, 16000)
            units = [(7 * number + 3 * i) % 100 for i in range(5 + number)]
            turns.append({"from": "human", "value": "<speech>\nPlease directly answer."})
            turns.append({"from": "gpt", "value": f"I heard tone {number} in turn {turn}.", "units": units})
        record = {"id": str(number), "speech": speech if len(speech) > 1 else speech[0], "conversations": turns}
        lines.append(json.dumps(record))
    manifest = folder / "corpus.jsonl"
    manifest.write_text("\n".join(lines) + "\n")
    return manifest


@pytest.fixture(scope="session")
def golden(goldens):
    return load_file(goldens / "golden.safetensors")


@pytest.fixture(scope="session")
def golden_model(golden_model_dir):
    return AutoModelForCausalLM.from_pretrained(golden_model_dir).eval()


@pytest.fixture(scope="session")
def models(golden_model):
    """The golden model with other layers; see `with_layers`."""
    return cache(partial(with_layers, golden_model))
