# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
Puts what the stages trained into one folder, in half precision, from which `ttt-omni make-smol` makes the model.

    python assemble.py work parts
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from loop import run
from safetensors.torch import load_file, save_file
from texts import SYSTEM_PROMPT

from ttt_omni.conversion.smol import tensor_names
from ttt_omni.files_ttt_omni import new_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder of the stages")
    parser.add_argument("output", type=Path, help="new folder")
    arguments = parser.parse_args()
    work = arguments.work
    projector = torch.load(work / "projector.pt", weights_only=True)
    tensors = tensor_names(load_file(work / "understood/adapter_model.safetensors"))
    for prefix, part in (
        ("model.multi_modal_projector.", projector),
        ("speech_decoder.", load_file(work / "speak.safetensors")),
        ("vocoder.", load_file(work / "vocoder.safetensors")),
    ):
        tensors |= {f"{prefix}{name}": tensor for name, tensor in part.items()}
    adapter = json.loads((work / "understood/adapter_config.json").read_text())
    config = {
        "system_prompt": SYSTEM_PROMPT,
        "lora_scale": adapter["lora_alpha"] / adapter["r"],
        "projector_hidden_size": len(projector["linear_1.bias"]),
        "speech_decoder_config": json.loads((work / "speak.json").read_text()),
        "vocoder_config": json.loads((work / "vocoder.json").read_text()),
    }
    with new_folder(arguments.output) as folder:
        halves = {name: tensor.half().contiguous() for name, tensor in tensors.items()}
        save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        shutil.copyfile(Path(__file__).parent / "card.md", folder / "README.md")
        size = (folder / "model.safetensors").stat().st_size
    print(f"{arguments.output}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main)
