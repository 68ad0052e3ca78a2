# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Audio as it comes in and goes out: files, PCM16 at 24 kHz, and where in it someone speaks."""

import base64
import binascii
import importlib.util
import io
from functools import cache
from pathlib import Path

import numpy as np
import soundfile
import soxr

from ..audio_ttt_omni import read_audio
from .errors import APIError


MODEL_RATE = 16000
PCM_RATE = 24000  # Hz, of PCM16 in OpenAI's protocols
ENCODINGS = {"wav": ("WAV", "PCM_16"), "flac": ("FLAC", "PCM_16"), "mp3": ("MP3", None), "opus": ("OGG", "OPUS")}
VAD_FRAME, VAD_CONTEXT = 512, 64  # samples that silero-vad takes at 16 kHz, and those before them


def decode_base64(data: str, param: str) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise APIError(f"`{param}` is not base64: {error}.", "invalid_base64", param=param) from None


def decode(data: bytes, encoding: str, max_seconds: float, param: str) -> np.ndarray:
    """
    Float32 samples `[samples]` at 16 kHz of a file in any format, or of PCM16 at 24 kHz.

    Raises:
        APIError: for what is no audio, is empty, or too long.
    """
    try:
        if encoding == "pcm16":
            data = (np.frombuffer(data[: len(data) // 2 * 2], "<i2"), PCM_RATE)
        blocks, samples = [], 0
        for block in read_audio(data, MODEL_RATE):
            blocks.append(block)
            samples += len(block)
            if samples > max_seconds * MODEL_RATE:
                raise APIError(
                    f"The audio is longer than the {max_seconds:g} s allowed here.", "audio_too_long", 413, param
                )
        return np.concatenate(blocks)
    except (ValueError, TypeError, OSError) as error:
        raise APIError(str(error), "invalid_audio", param=param) from None


def to_pcm16(waveform: np.ndarray) -> np.ndarray:
    """Int16 samples, in which what is beyond full scale is clipped."""
    return np.rint(waveform.clip(-1, 1) * 32767).astype("<i2")


def encode(waveform: np.ndarray, rate: int, encoding: str) -> bytes:
    """A file, in one of `ENCODINGS` at `rate`, or PCM16 at 24 kHz."""
    if encoding == "pcm16":
        pcm = Resampler(rate, PCM_RATE)
        return to_pcm16(np.concatenate([pcm.push(waveform), pcm.flush()])).tobytes()
    file, (container, subtype) = io.BytesIO(), ENCODINGS[encoding]
    samples = to_pcm16(waveform) if subtype == "PCM_16" else waveform
    soundfile.write(file, samples, rate, format=container, subtype=subtype)
    return file.getvalue()


class Resampler:
    """From one rate to another, piece by piece: joined, the pieces are what all at once would be."""

    def __init__(self, source: int, target: int):
        self.stream = soxr.ResampleStream(source, target, num_channels=1, dtype="float32")

    def push(self, waveform: np.ndarray) -> np.ndarray:
        """The next samples, float32, after the next of the source."""
        return self.stream.resample_chunk(np.ascontiguousarray(waveform, dtype=np.float32))

    def flush(self) -> np.ndarray:
        """The last samples."""
        return self.stream.resample_chunk(np.zeros(0, np.float32), last=True)


@cache
def _vad():
    """silero-vad's network, without its package's code, which would take the threads from PyTorch when imported."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    folder = importlib.util.find_spec("silero_vad").submodule_search_locations[0]
    path = Path(folder, "data", "silero_vad.onnx")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class VoiceActivity:
    """
    Where in a stream someone speaks.

    Args:
        threshold: of the probability of speech, from 0 to 1; speech ends where it stays 0.15 below that.
        silence_ms: how long it must.
    """

    def __init__(self, threshold: float, silence_ms: int):
        self.threshold, self.silence = threshold, silence_ms * MODEL_RATE // 1000
        self.network = _vad()
        self.pending = np.zeros(0, np.float32)
        self.position = 0  # samples that were looked at
        self.is_speech = False
        self.quiet_since = None
        self.reset()

    def reset(self) -> None:
        """Forgets what was said before."""
        self.state, self.context = np.zeros((2, 1, 128), np.float32), np.zeros(VAD_CONTEXT, np.float32)

    def push(self, samples: np.ndarray) -> list[tuple[str, int]]:
        """`("start", n)` and `("stop", n)` for each change in the next samples at 16 kHz, with the sample where."""
        self.pending, changes = np.concatenate([self.pending, samples]), []
        while len(self.pending) >= VAD_FRAME:
            frame, self.pending = self.pending[:VAD_FRAME], self.pending[VAD_FRAME:]
            probability = self._probability(frame)
            begin, self.position = self.position, self.position + VAD_FRAME
            if probability >= self.threshold:
                self.quiet_since = None
                if not self.is_speech:
                    self.is_speech = True
                    changes.append(("start", begin))
            elif self.is_speech and probability < max(self.threshold - 0.15, 0.01):
                self.quiet_since = begin if self.quiet_since is None else self.quiet_since
                if self.position - self.quiet_since >= self.silence:
                    changes.append(("stop", self.quiet_since))
                    self.is_speech, self.quiet_since = False, None
                    self.reset()
        return changes

    def _probability(self, frame: np.ndarray) -> float:
        frame = np.concatenate([self.context, frame])
        inputs = {"input": frame[None], "state": self.state, "sr": np.array(MODEL_RATE)}
        probability, self.state = self.network.run(None, inputs)
        self.context = frame[-VAD_CONTEXT:]
        return float(probability[0, 0])
