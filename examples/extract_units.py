# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
Gives the spoken answers of a manifest their `units`, with a HuBERT-style model or Whisper's encoder and k-means.

    python examples/extract_units.py spoken/corpus.jsonl spoken/units.jsonl \\
        --model voidful/mhubert-base --kmeans km.npy

An answer is spoken if its turn names a recording, as `examples/speak.py --answer-voice` writes it: {"from": "gpt",
"value": "Four.", "speech": "7.wav"}. LLaMA-Omni's units are layer 11 of fairseq's multilingual HuBERT in the 1,000
clusters of mhubert_base_vp_en_es_fr_it3_L11_km1000.bin; voidful/mhubert-base on the Hub has both. The latter is a
pickle, which may run any code when it is opened, so that this program does not. If you trust it, take its centroids:

    python -c "import joblib, numpy; numpy.save('km.npy', joblib.load('….bin').cluster_centers_)"

Or `--fit 500` finds 500 clusters in the answers themselves, and keeps them in the new file km.npy.

A model of ours that listens will do too: `--model converted` takes the Whisper encoder in it.

As in fairseq, a unit is the cluster of a frame of 20 ms, recordings are cut into pieces of 100 s (Whisper: of 30 s),
encoded one by one, and the frame that would span two pieces is lost. Runs of the same unit are merged, as the model
and its vocoder take them; `--keep-frames` keeps the units of all frames as well, in `frames`, from which a vocoder
learns how long a unit lasts. One recording is in memory at a time.

After an interruption, the same command goes on behind the last answer in units.jsonl.partial, and ends with the same
file as if it had not been interrupted; but a fit that was interrupted begins anew.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoFeatureExtractor, AutoModel, WhisperFeatureExtractor, WhisperModel

from ttt_omni import TTTOmniModel
from ttt_omni.audio_ttt_omni import read_audio
from ttt_omni.files_ttt_omni import new_file
from ttt_omni.loading import find_device
from ttt_omni.training.data import ManifestError, naming_line, read_manifest


PIECE_SECONDS = 100
FRAMES_PER_CLUSTER = 256  # to fit clusters to: more make them hardly better


class Encoder:
    """
    The hidden states of a speech model of Transformers, at 50 Hz.

    Args:
        name: folder or repository of a model that takes waveforms, such as HuBERT, wav2vec 2.0 or WavLM, of Whisper,
            or of a model of ours, whose Whisper encoder is taken.
        layer: its layer, counted from 1; as `output_layer` in fairseq.
        dtype: to compute in.

    Raises:
        ValueError, OSError: for a model that will not do.
    """

    def __init__(self, name: str, layer: int, dtype: torch.dtype = torch.float32):
        model = AutoModel.from_pretrained(name, dtype=dtype)
        self.is_whisper = isinstance(model, (WhisperModel, TTTOmniModel))
        if self.is_whisper:
            model = model.encoder if isinstance(model, WhisperModel) else getattr(model, "audio_tower", None)
            if model is None:
                raise ValueError(f"{name} has no audio encoder.")
            self.extractor = WhisperFeatureExtractor(feature_size=model.config.num_mel_bins)
        else:
            if model.main_input_name != "input_values":
                raise ValueError(f"{name} takes {model.main_input_name}: a model of waveforms, or Whisper, is needed.")
            self.extractor = AutoFeatureExtractor.from_pretrained(name)
        self.model = model.eval().to(find_device())
        self.layer = layer
        if not 1 <= layer <= self.model.config.num_hidden_layers:
            raise ValueError(f"{name} has the layers 1 to {self.model.config.num_hidden_layers}, not {layer}.")

    @torch.no_grad()
    def __call__(self, path: Path) -> torch.Tensor:
        """The frames `[T, hidden]` of a recording. Raises ValueError or OSError for one that has none."""
        rate = self.extractor.sampling_rate
        audio = np.concatenate(list(read_audio(path, rate)))
        frames = list(self._whisper_frames(audio) if self.is_whisper else self._frames(audio))
        if not frames:
            raise ValueError(f"{path} has {len(audio)} samples, too few for a unit.")
        return torch.cat(frames).float()

    def _whisper_frames(self, audio: np.ndarray) -> Iterator[torch.Tensor]:
        size, hop = self.extractor.n_samples, 2 * self.extractor.hop_length
        for start in range(0, len(audio), size):
            piece = audio[start : start + size]
            mel = self.extractor(piece, sampling_rate=self.extractor.sampling_rate, return_tensors="pt").input_features
            mel = mel.to(self.model.device, self.model.dtype)
            outputs = self.model(mel, output_hidden_states=True)
            yield outputs.hidden_states[self.layer][0, : len(piece) // hop]

    def _frames(self, audio: np.ndarray) -> Iterator[torch.Tensor]:
        rate = self.extractor.sampling_rate
        values = self.extractor(audio, sampling_rate=rate, return_tensors="pt").input_values  # [1, samples]
        for piece in values.split(PIECE_SECONDS * rate, dim=1):
            if self.model._get_feat_extract_output_lengths(torch.tensor(piece.shape[1])) > 0:
                outputs = self.model(piece.to(self.model.device, self.model.dtype), output_hidden_states=True)
                yield outputs.hidden_states[self.layer][0]

    def fingerprint(self) -> str:
        """A digest of all that its frames come from."""
        config = self.model.config.to_dict() | {"transformers_version": None, "_name_or_path": None}
        settings = [config, self.extractor.to_dict(), self.layer, PIECE_SECONDS, str(self.model.dtype)]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
        for name, weight in self.model.state_dict().items():
            if name != "masked_spec_embed":  # for training only, and random where a checkpoint lacks it
                digest.update(name.encode())
                digest.update(weight.float().numpy(force=True).tobytes())
        return digest.hexdigest()


def sample_frames(recordings: Iterable[np.ndarray], size: int) -> np.ndarray:
    """At most `size` `[size, hidden]` of the frames `[T, hidden]` of all recordings, each as likely as another."""
    generator = np.random.default_rng(0)
    sample, seen = np.empty((size, 0), np.float32), 0
    for frames in recordings:
        if seen == 0:
            sample = np.empty((size, frames.shape[1]), np.float32)
        # Reservoir sampling: the i-th frame takes one of i places, of which the first are the sample.
        index = np.arange(seen, seen + len(frames))
        places = np.where(index < size, index, generator.integers(index + 1))
        kept = places < size
        sample[places[kept]] = frames[kept]
        seen += len(frames)
    return sample[:seen]


def fit_centroids(frames: np.ndarray, clusters: int) -> np.ndarray:
    """Centroids `[clusters, hidden]` of `frames` `[T, hidden]`, by scikit-learn with the settings of fairseq."""
    try:
        from sklearn.cluster import MiniBatchKMeans
    except ImportError as error:
        raise ValueError(f"--fit needs scikit-learn ({error}): pip install scikit-learn") from None
    if not 1 <= clusters <= len(frames):
        raise ValueError(f"{clusters} clusters cannot be made of the {len(frames)} frames that the answers have.")
    kmeans = MiniBatchKMeans(
        clusters, batch_size=10000, max_no_improvement=100, n_init=20, reassignment_ratio=0, random_state=0
    )
    return kmeans.fit(frames).cluster_centers_


def load_centroids(path: Path, encoder: Encoder) -> torch.Tensor:
    """The centroids `[clusters, hidden]` in an .npy file. Raises ValueError or OSError for others."""
    try:
        centroids = np.load(path, allow_pickle=False)
    except (ValueError, EOFError):
        raise ValueError(f"{path} is no .npy file of centroids; --help says how to make one of a pickle.") from None
    hidden_size = encoder.model.config.hidden_size
    if getattr(centroids, "shape", ())[1:] != (hidden_size,):
        raise ValueError(f"{path} does not hold centroids of the shape [clusters, {hidden_size}].")
    return torch.from_numpy(centroids).float().to(encoder.model.device)


def nearest(frames: torch.Tensor, centroids: torch.Tensor) -> list[int]:
    """The nearest of `centroids` `[clusters, hidden]` to each of `frames` `[T, hidden]`."""
    return torch.cdist(frames, centroids).argmin(1).tolist()


def merged(frames: list[int]) -> list[int]:
    """`frames` with runs of the same merged."""
    return [unit for unit, _ in groupby(frames)]


def answers(manifest: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The spoken answers of a manifest, each with the number of its line. Raises [`ManifestError`] for a wrong one."""
    for number, _, conversation in read_manifest(manifest):
        for turn in spoken_answers(conversation.record):
            if not isinstance(turn["speech"], str) or not (manifest.parent / turn["speech"]).is_file():
                with naming_line(manifest, number):
                    raise ManifestError(f"the recording {turn['speech']} of an answer does not exist.")
            yield number, turn


def spoken_answers(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The turns of 'gpt' that name a recording."""
    return [turn for turn in record["conversations"] if turn["from"] == "gpt" and turn.get("speech")]


def fit_to_answers(manifest: Path, total: int, encoder: Encoder, clusters: int) -> np.ndarray:
    """Centroids `[clusters, hidden]` of the frames of the `total` answers of a manifest."""

    def encode() -> Iterator[np.ndarray]:
        for number, turn in tqdm(answers(manifest), desc="Fitting clusters", total=total, unit=" answers"):
            with naming_line(manifest, number):
                frames = encoder(manifest.parent / turn["speech"])
            yield frames.numpy(force=True)

    return fit_centroids(sample_frames(encode(), FRAMES_PER_CLUSTER * clusters), clusters)


def begin(partial: BinaryIO, settings: dict[str, Any]) -> None:
    """Begins a file of units with its settings, or to read it if it has them. Raises ValueError if it has others."""
    header = json.dumps(settings).encode() + b"\n"
    partial.seek(0)
    begun = partial.readline()
    if not begun.endswith(b"\n"):
        partial.seek(partial.truncate(0))
        partial.write(header)
        partial.flush()
    elif begun != header:
        raise ValueError(
            f"{partial.name} was begun with another model, --layer, --kmeans or --fit: repeat the command that began "
            "it, or delete it to begin anew."
        )


def read_units(partial: BinaryIO, turn: dict[str, Any]) -> list[int] | None:
    """
    The units of the next answer in a file, `None` at its end, where half a line is cut off.

    Raises:
        ValueError: if that is another answer than `turn`.
    """
    line = partial.readline()
    if not line.endswith(b"\n"):
        partial.seek(partial.truncate(partial.tell() - len(line)))
        return None
    finished = json.loads(line)
    if finished["speech"] != turn["speech"]:
        raise ValueError(
            f"{partial.name} was begun with another manifest, which had {finished['speech']} in the place of "
            f"{turn['speech']}: delete it to begin anew."
        )
    return finished["units"]


def extract(
    manifest: Path,
    output: Path,
    model: str,
    layer: int,
    kmeans: Path,
    fit: int | None,
    keep_frames: bool = False,
    dtype: str = "float32",
) -> None:
    """
    Writes `manifest` with the units of its spoken answers as `output`.

    Until all are there, they are kept in a file beside it, whose name ends in `.partial`. An interrupted call, when
    made again, takes from there those that it has; their recordings must be the same as before.

    Args:
        output: in the same folder, to which the manifest's paths are relative.
        model, layer, dtype: as in [`Encoder`].
        kmeans: .npy file of centroids `[clusters, hidden]`.
        fit: make it anew, with so many clusters of the answers' frames; at most 256 frames for each are in memory.
        keep_frames: keep the units of all frames as well, as `frames`.

    Raises:
        [`ManifestError`]: naming the line that is wrong.
        ValueError, OSError: for a model, files and clusters that will not do, and for a `.partial` file of others.
    """
    if output.absolute().parent != manifest.absolute().parent:
        raise ValueError(f"{output} must be in the folder of {manifest}, to which the paths in it are relative.")
    partial_path = output.with_name(f"{output.name}.partial")
    if fit is not None and kmeans.exists() and not partial_path.exists():
        raise ValueError(f"{kmeans} exists: name a new file, or leave out --fit to use it.")
    if fit is not None and partial_path.exists() and not kmeans.exists():
        raise ValueError(f"{partial_path} was begun with another file than {kmeans}: delete it to begin anew.")
    total = sum(1 for _ in answers(manifest))
    if total == 0:
        raise ManifestError(f"{manifest} has no spoken answers: `speech` is missing in the turns of 'gpt'.")
    encoder = Encoder(model, layer, getattr(torch, dtype))

    if fit is not None and not kmeans.exists():
        fitted = fit_to_answers(manifest, total, encoder, fit)
        with new_file(kmeans) as path, open(path, "wb") as file:  # NumPy would add .npy to a path without
            np.save(file, fitted)
    centroids = load_centroids(kmeans, encoder)

    settings = {
        "model": encoder.fingerprint(),
        "kmeans": hashlib.sha256(centroids.numpy(force=True).tobytes()).hexdigest(),
        "fit": fit,
    }
    with open(partial_path, "a+b") as partial:

        def take_units(number: int, turn: dict[str, Any]) -> list[int]:
            with naming_line(manifest, number):
                found = read_units(partial, turn)
                if found is None:
                    found = nearest(encoder(manifest.parent / turn["speech"]), centroids)
                    partial.write(json.dumps({"speech": turn["speech"], "units": found}).encode() + b"\n")
                    partial.flush()
            return found

        begin(partial, settings)
        for number, turn in tqdm(answers(manifest), desc="Units", total=total, unit=" answers"):
            take_units(number, turn)

        begin(partial, settings)
        with new_file(output) as made, open(made, "w", encoding="utf-8") as file:
            for number, _, conversation in read_manifest(manifest):
                for turn in spoken_answers(conversation.record):
                    frames = take_units(number, turn)
                    turn["units"] = merged(frames)
                    if keep_frames:
                        turn["frames"] = frames
                file.write(json.dumps(conversation.record) + "\n")
    partial_path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path, help="JSONL file of conversations with spoken answers")
    parser.add_argument("output", type=Path, help="the same with units, in the same folder")
    parser.add_argument("--model", required=True, help="folder, or repository on the Hub, of the speech model")
    parser.add_argument("--layer", type=int, default=11, help="of its hidden states (default: 11)")
    parser.add_argument("--kmeans", type=Path, required=True, help=".npy file of centroids")
    parser.add_argument("--keep-frames", action="store_true", help="keep the units of all frames, too")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="to compute in")
    parser.add_argument("--fit", type=int, metavar="CLUSTERS", help="make that file of so many clusters")
    try:
        extract(**vars(parser.parse_args()))
    except (ValueError, OSError) as error:
        sys.exit(f"extract_units.py: error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
