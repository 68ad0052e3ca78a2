# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
What Whisper's encoder makes of all readings of the questions, as recorded and as if by others in other rooms.

    python encode.py graft corpus features --copies 2

A file of the folder holds those of 256 questions; what is there is kept.
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
from loop import read_corpus, run
from tqdm import tqdm
from transformers import WhisperFeatureExtractor

from ttt_omni import TTTOmniForCausalLM
from ttt_omni.files_ttt_omni import new_file


RATE, WINDOW = 16_000, 480_000
EMBEDDING = 1600  # samples of one audio embedding
QUESTIONS_PER_FILE, WINDOWS_PER_PASS = 256, 4


def load(path: Path) -> np.ndarray:
    """Samples at 16 kHz. Raises ValueError, naming the file, for one that is broken or empty."""
    try:
        samples, rate = soundfile.read(path, dtype="float32")
    except soundfile.SoundFileError as error:
        raise ValueError(f"{path} cannot be read ({error}): delete it and make the corpus again.") from error
    if samples.ndim != 1 or not np.abs(samples).max(initial=0) > 0:
        raise ValueError(f"{path} holds no sound of one channel: delete it and make the corpus again.")
    return soxr.resample(samples, rate, RATE)


def disturb(samples: np.ndarray, draw: random.Random) -> np.ndarray:
    """The same from a throat of another size, in a room, with noise, by another microphone; each by chance."""
    noise = np.random.default_rng(draw.getrandbits(32))
    samples = soxr.resample(samples, RATE, RATE * draw.uniform(0.88, 1.15))
    if draw.random() < 0.5:
        decay = draw.uniform(0.05, 0.4)
        times = np.arange(int(decay * RATE)) / RATE
        room = noise.standard_normal(len(times)) * np.exp(-6.9 * times / decay) * draw.uniform(0.02, 0.12)
        room[0] = 1.0
        size = len(samples) + len(room)
        samples = np.fft.irfft(np.fft.rfft(samples, size) * np.fft.rfft(room, size), size)[: len(samples)]
    if draw.random() < 0.3:
        low = draw.choice([6000, 8000, 11_025])
        samples = soxr.resample(soxr.resample(samples, RATE, low), low, RATE)
    level = np.sqrt(np.mean(samples**2)) * 10 ** (-draw.uniform(10, 45) / 20)
    spectrum = np.fft.rfft(noise.standard_normal(len(samples)))
    spectrum /= np.maximum(np.arange(len(spectrum)), 20) ** draw.uniform(0, 0.7)  # from white to brownish
    hiss = np.fft.irfft(spectrum, len(samples))
    return samples + hiss * level / max(np.sqrt(np.mean(hiss**2)), 1e-9)


def prepare(samples: np.ndarray, draw: random.Random, is_disturbed: bool) -> np.ndarray:
    """As a recording may come: loud or quiet, with some silence around; a whole number of embeddings long."""
    if is_disturbed:
        samples = disturb(samples, draw)
    samples = samples / np.abs(samples).max() * draw.uniform(0.1, 0.95)
    samples = np.pad(samples, (int(draw.uniform(0, 0.4) * RATE), int(draw.uniform(0, 0.5) * RATE)))
    return np.pad(samples, (0, -len(samples) % EMBEDDING))[: WINDOW // 2].astype(np.float32)


class Encoder:
    """Whisper's encoder of a model of ours, for many short recordings at once."""

    def __init__(self, folder: str):
        self.tower = TTTOmniForCausalLM.from_pretrained(folder).model.audio_tower.bfloat16().eval()
        self.extractor = WhisperFeatureExtractor(feature_size=self.tower.config.num_mel_bins)

    @torch.no_grad()
    def __call__(self, recordings: list[np.ndarray], alone: bool) -> list[np.ndarray]:
        """The hidden states `[n, 5 * d_model]` of each, for one embedding a row, float16; `alone` in a window each."""
        places, windows, end = [], [], WINDOW
        for recording in recordings:
            if alone or end + len(recording) > WINDOW:
                windows.append(np.zeros(WINDOW, np.float32))
                end = 0
            windows[-1][end : end + len(recording)] = recording
            places.append((len(windows) - 1, end // EMBEDDING, len(recording) // EMBEDDING))
            end += len(recording) + 4 * EMBEDDING
        states = []
        for start in range(0, len(windows), WINDOWS_PER_PASS):
            batch = windows[start : start + WINDOWS_PER_PASS]
            mel = self.extractor(batch, sampling_rate=RATE, return_tensors="pt").input_features
            hidden = self.tower(mel.bfloat16()).last_hidden_state
            states.extend(hidden.reshape(len(batch), WINDOW // EMBEDDING, -1).half().numpy())
        return [states[window][first : first + length] for window, first, length in places]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model of ours that listens")
    parser.add_argument("corpus", type=Path, help="folder of the corpus")
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--copies", type=int, default=2, help="of each reading, all but the first disturbed (default: 2)"
    )
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    records = read_corpus(arguments.corpus / "questions.jsonl")
    encoder = Encoder(arguments.model)
    for start in tqdm(range(0, len(records), QUESTIONS_PER_FILE), desc="Encoding", unit=" files"):
        path = arguments.folder / f"{start:06}.npz"
        if path.exists():
            continue
        keys, recordings = [], {True: [], False: []}
        for index, record in enumerate(records[start : start + QUESTIONS_PER_FILE], start):
            is_held_out = record["split"] == "held_out"
            for reading, name in enumerate(record["readings"]):
                samples = load(arguments.corpus / name)
                for copy in range(1 if is_held_out else arguments.copies):
                    prepared = prepare(samples, random.Random(f"{name}{copy}"), copy > 0)
                    keys.append((is_held_out, f"{index} {reading} {copy}"))
                    recordings[is_held_out].append(prepared)
        encoded = {alone: iter(encoder(recordings[alone], alone)) for alone in (True, False)}
        with new_file(path) as made, open(made, "wb") as file:
            np.savez(file, **{key: next(encoded[alone]) for alone, key in keys})
    (arguments.folder / "done.json").write_text(json.dumps({"questions": len(records)}))  # which says that all are


if __name__ == "__main__":
    run(main)
