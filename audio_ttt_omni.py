# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Audio of any source and length, block by block: files, pipes, URLs, bytes and arrays to mono samples of one rate."""

import io
import os
import re
import shutil
import stat
import tempfile
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
import soundfile
import soxr
import torch
from huggingface_hub.utils import httpx
from transformers.utils import logging


logger = logging.get_logger(__name__)

# A path, URL or encoded file; or samples, alone or with their rate as `(array, rate)` or as `datasets` gives them.
AudioInput = str | os.PathLike | bytes | np.ndarray | torch.Tensor | list[float] | tuple | dict[str, Any]

MAX_CHANNELS = 32
MIN_RATE, MAX_RATE = 1_000, 768_000  # samples per second, of what is read
MAX_SAMPLE = 100.0  # of a full scale of 1, which floats may well go beyond
BLOCK_SAMPLES = 480_000  # of all channels
MP3_FRAME = 1152  # samples
MP3_TAIL = 2**16  # bytes at the end of an MP3 that need not be frames
UNKNOWN_FRAMES = 2**48  # libsndfile has more for a file that does not say how many it has
URL_TIMEOUT = 10  # seconds without a byte


class _Decoder(soundfile.SoundFile):
    """Reads on to the end: soundfile itself stops at the announced one, and seeks after each read."""

    def __init__(self, file: BinaryIO):
        self.source = file
        super().__init__(file)

    def seekable(self) -> bool:
        return False


class _EndlessDecoder(_Decoder):
    """Reads an MP3 to the end, which libsndfile would estimate by its first frame and its size."""

    def __init__(self, file: BinaryIO):
        super().__init__(_EndlessFile(file))

    def read(self, frames: int, **kwargs) -> np.ndarray:
        block = np.empty((frames, self.channels), np.float32)
        size = 0
        while size < frames:
            try:
                read = len(super().read(out=block[size : size + MP3_FRAME]))
            except soundfile.SoundFileError:
                read = 0  # a frame that is cut off, or tags
            if read == 0:
                position = self.source.tell()
                if len(self.source.read(MP3_TAIL)) == MP3_TAIL:
                    raise soundfile.SoundFileRuntimeError(f"it is damaged at byte {position}.")
                break
            size += read
        return block[:size]


class _EndlessFile:
    """A file whose end cannot be sought, so that libsndfile does not estimate by it how much an MP3 has to give."""

    def __init__(self, file: BinaryIO):
        self.file, self.read, self.readinto, self.at_end = file, file.read, file.readinto, False

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> None:
        self.at_end = whence == os.SEEK_END
        if not self.at_end:
            self.file.seek(offset, whence)

    def tell(self) -> int:
        return 2**62 if self.at_end else self.file.tell()


class _PatchedFile:
    """A file with other bytes at one place."""

    def __init__(self, file: BinaryIO, position: int, patch: bytes):
        self.file, self.read, self.seek, self.tell = file, file.read, file.seek, file.tell
        self.position, self.patch = position, patch

    def readinto(self, buffer) -> int:
        start = self.file.tell()
        read = self.file.readinto(buffer)
        for index, byte in enumerate(self.patch, self.position - start):
            if 0 <= index < read:
                buffer[index : index + 1] = bytes([byte])
        return read


def _mp3_header(mp3: BinaryIO) -> tuple[int, bool] | None:
    """
    Where an MP3 says how many frames it has, and whether others follow them, as where MP3s were joined; `None` for one
    that does not say, as of an encoder that wrote to a pipe.
    """
    mp3.seek(0)
    tag = mp3.read(10)
    size = sum((byte & 0x7F) << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0)))  # 7 bits in a byte
    start = mp3.seek(10 + size if tag.startswith(b"ID3") else 0)
    header = re.search(rb"(?:Xing|Info)...([\x03\x07\x0b\x0f])....(....)", mp3.read(200), re.DOTALL)
    if header is None:
        return None
    mp3.seek(start + int.from_bytes(header[2]))
    following = mp3.read(3)
    goes_on = following == b"ID3" or (following[:1] == b"\xff" and following[1:] >= b"\xe0")
    return start + header.start(), goes_on


def _unfinished_size(wav: BinaryIO) -> int | None:
    """
    Where a WAV says the size of its samples, if that was never filled in: it is 0, or the file goes on behind it.

    A program that writes to a pipe, or was stopped, leaves it so; and one that goes beyond 4 GB begins anew at 0.
    """
    wav.seek(0)
    riff = wav.read(12)
    if riff[:4] != b"RIFF" or riff[8:] != b"WAVE":
        return None
    end = 8 + int.from_bytes(riff[4:8], "little")  # of the file, as announced
    end_of_file = wav.seek(0, os.SEEK_END)
    start = wav.seek(12)
    while len(chunk := wav.read(8)) == 8:
        size = int.from_bytes(chunk[4:], "little")
        end_of_chunk = start + 8 + size + size % 2
        if chunk[:4] == b"data":
            chunk_follows = end == end_of_file and re.fullmatch(b"[ -~]{4}", wav.read(4))  # its name
            is_unfinished = end <= end_of_chunk or (size == 0 and not chunk_follows)
            return start + 4 if is_unfinished and end_of_chunk < end_of_file else None
        start = wav.seek(end_of_chunk)
    return None


def _decoder(file: BinaryIO) -> _Decoder:
    """That of a file, which gives all of it. Raises `soundfile.SoundFileError`."""
    unfinished = _unfinished_size(file)
    file.seek(0)
    decoder = _Decoder(file if unfinished is None else _PatchedFile(file, unfinished, b"\xff" * 4))
    if decoder.format != "MP3":
        return decoder
    decoder.close()
    header = _mp3_header(file)
    file.seek(0)
    if header is None:
        return _EndlessDecoder(file)
    position, goes_on = header
    return _EndlessDecoder(_PatchedFile(file, position, bytes(4))) if goes_on else _Decoder(file)


def printable(name: str | os.PathLike) -> str:
    """A name for a message of one line, which may have to be encoded."""
    name = os.fsdecode(name)
    return name if name.isprintable() else repr(name)


def _is_url(source: Any) -> bool:
    return isinstance(source, str) and source.startswith(("http://", "https://", "data:"))


def _name(source: str | bytes) -> str:
    if not isinstance(source, str):
        return "Audio given as bytes"
    return f"{source[:40]}…" if source.startswith("data:") else printable(source)


def _fetch(url: str, file: BinaryIO) -> None:
    """Writes what a URL holds to `file`. Raises OSError, naming it."""
    try:
        if url.startswith("data:"):
            with urllib.request.urlopen(url) as response:
                shutil.copyfileobj(response, file)
            return
        with httpx.stream("GET", url, follow_redirects=True, timeout=URL_TIMEOUT) as response:
            if not response.is_success:
                raise ValueError(f"the server says {response.status_code} {response.reason_phrase}")
            for piece in response.iter_bytes():
                file.write(piece)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(f"{_name(url)} cannot be fetched: {reason}") from error


def _open_file(source: str | bytes) -> BinaryIO:
    """What can be sought in, of a path, a URL, or a file's bytes; pipes and URLs are copied to a temporary file."""
    if not isinstance(source, str):
        return io.BytesIO(source)
    is_url = _is_url(source)
    if not is_url and os.path.isfile(source):
        return open(source, "rb")
    if not is_url and not (os.path.exists(source) and stat.S_ISFIFO(os.stat(source).st_mode)):
        raise FileNotFoundError(f"Audio file {printable(source)} does not exist.")
    file = tempfile.TemporaryFile()
    try:
        if is_url:
            _fetch(source, file)
        else:
            with open(source, "rb") as pipe:
                shutil.copyfileobj(pipe, file)
    except BaseException:
        file.close()
        raise
    file.seek(0)
    return file


@contextmanager
def open_audio(source: str | bytes) -> Iterator[soundfile.SoundFile]:
    """
    Open an audio file, whose header may announce another length than it has.

    Args:
        source: path, of a pipe too; URL; or the bytes of a file.

    Yields:
        A `SoundFile` to read once from its beginning to its end. Its `frames` are right for a WAV; for other formats,
        those that arrive are to be counted.

    Raises:
        FileNotFoundError, OSError, ValueError: naming the file, for what cannot be read, here or in the body.
    """
    name = _name(source)
    with _open_file(source) as file:
        try:
            with _decoder(file) as decoder:
                if not MIN_RATE <= decoder.samplerate <= MAX_RATE or decoder.channels > MAX_CHANNELS:
                    raise ValueError(
                        f"{name} announces {decoder.channels} channels of {decoder.samplerate} samples per second: at "
                        f"most {MAX_CHANNELS} channels of {MIN_RATE} to {MAX_RATE} can be read."
                    )
                yield decoder
        except (soundfile.SoundFileError, TypeError) as error:  # TypeError: taken for headerless, by its name
            reason = getattr(error, "error_string", str(error))
            raise ValueError(f"{name} cannot be read as audio (WAV, FLAC, OGG or MP3): {reason}") from error


def _file_blocks(source: str | bytes) -> Iterator[tuple[np.ndarray, int]]:
    """Blocks of an audio file as float32 `[samples, channels]`, each with the file's sampling rate."""
    with open_audio(source) as file:
        samples = 0
        while len(block := file.read(max(BLOCK_SAMPLES // file.channels, 1), dtype="float32", always_2d=True)):
            samples += len(block)
            yield block, file.samplerate
        if file.format == "OGG" and b"OggS" in file.source.read():
            raise ValueError(f"{_name(source)} is several OGG files in one, of which only the first can be read.")
        # libsndfile corrects the size of a WAV's data chunk and only says so in its log.
        is_corrected = re.search(r"^data : \d+ \(should be", file.extra_info, re.MULTILINE)
        if is_corrected or samples < file.frames < UNKNOWN_FRAMES:
            logger.warning(f"{_name(source)}: its header announces another length than the {samples} samples it has.")


def array_samples(audio: np.ndarray | torch.Tensor | list[float]) -> np.ndarray:
    """Floats `[samples, channels]` from samples of one or, in either order, more channels; integers are PCM."""
    if isinstance(audio, torch.Tensor):
        audio = (audio.float() if audio.is_floating_point() else audio).numpy(force=True)
    audio = np.asarray(audio)
    if audio.dtype.kind in "iu" and audio.itemsize <= 4:
        full_scale = 2.0 ** (8 * audio.itemsize - 1)
        audio = audio / full_scale - (1.0 if audio.dtype.kind == "u" else 0.0)
    if audio.dtype.kind != "f":
        raise TypeError(f"Audio samples must be floats, or integers of at most 32 bits, got {audio.dtype}.")
    if audio.ndim == 1:
        return audio[:, None]
    if audio.ndim != 2:
        raise ValueError(f"Audio must have the shape [samples] or [channels, samples], got {audio.shape}.")
    channels = min(audio.shape)
    if audio.shape[0] == audio.shape[1] or channels > MAX_CHANNELS:
        raise ValueError(
            f"Audio of shape {audio.shape} is neither [channels, samples] nor [samples, channels] with at most "
            f"{MAX_CHANNELS} channels."
        )
    return audio if audio.shape[1] == channels else audio.T


def check_samples(block: np.ndarray, start: float, rate: int, name: str) -> None:
    """Raises ValueError for samples `[samples, channels]` from second `start` on that no recording has."""
    if block.size == 0 or (block.max() <= MAX_SAMPLE and block.min() >= -MAX_SAMPLE):  # with NaN, neither
        return
    peaks = np.abs(block).max(axis=1)
    index = int(np.argmin(peaks <= MAX_SAMPLE))
    second = f"{start + index / rate:.3f} s"
    if not np.isfinite(peaks[index]):
        raise ValueError(f"{name} has NaN or infinite samples, the first at {second}.")
    raise ValueError(
        f"{name} has a sample of {peaks[index]:.3g} at {second}, where full scale is 1: divide the samples by theirs."
    )


def is_one_audio(audio: Any) -> bool:
    """Whether `audio` is not a list of audios: `(array, sampling_rate)` and a list of samples are one."""
    if isinstance(audio, tuple):
        return len(audio) == 2 and isinstance(audio[1], int | float | np.number)
    return not isinstance(audio, list) or (len(audio) > 0 and isinstance(audio[0], float))


def flatten_audio(audio: Any) -> list[AudioInput]:
    """The audios of one input, a list, or a list per text."""
    return [audio] if is_one_audio(audio) else [leaf for item in audio for leaf in flatten_audio(item)]


def _source_blocks(
    audio: AudioInput, target_rate: int, sampling_rate: int | None
) -> tuple[str, Iterable[tuple[np.ndarray, int]]]:
    """A name for error messages, and the blocks `[samples]` of `audio` with their sampling rate."""
    if isinstance(audio, dict):
        sampling_rate = sampling_rate if audio.get("sampling_rate") is None else audio["sampling_rate"]
        audio = next((audio[key] for key in ("array", "bytes", "path") if audio.get(key) is not None), None)
    elif isinstance(audio, tuple) and is_one_audio(audio):
        audio, sampling_rate = audio

    if isinstance(audio, str | os.PathLike):
        path = os.fsdecode(audio)
        return _name(path), _file_blocks(path)
    if isinstance(audio, bytes | bytearray | memoryview):
        return _name(audio), _file_blocks(audio)
    if not isinstance(audio, np.ndarray | torch.Tensor | list):
        raise TypeError(
            "Audio must be a path, the bytes of a file, an array or tensor, (array, sampling_rate) or "
            f"{{'array', 'sampling_rate'}}, got {type(audio).__name__}."
        )
    if sampling_rate is None:
        logger.warning_once(
            f"An audio array came without `sampling_rate`: {target_rate} Hz is assumed. Pass `sampling_rate=` or "
            "(array, sampling_rate)."
        )
        sampling_rate = target_rate
    is_integer = isinstance(sampling_rate, int | np.integer) and not isinstance(sampling_rate, bool)
    if not is_integer or not MIN_RATE <= sampling_rate <= MAX_RATE:
        raise ValueError(
            f"`sampling_rate` must be an integer from {MIN_RATE} to {MAX_RATE}, in Hz, got {sampling_rate!r}."
        )
    return "Audio array", [(array_samples(audio), int(sampling_rate))]


def read_audio(audio: AudioInput, target_rate: int, sampling_rate: int | None = None) -> Iterator[np.ndarray]:
    """
    Read audio block by block, mixed to mono and resampled (soxr, HQ). Of a file, one block is in memory at a time.

    Args:
        audio: path (of a pipe too), URL, bytes of a file, or samples `[samples]`, `[channels, samples]` or
            `[samples, channels]`, alone, as `(array, sampling_rate)` or as `{"array", "sampling_rate"}`.
        target_rate: sampling rate of the result in Hz.
        sampling_rate: that of an array that comes without its own; files know theirs.

    Yields:
        float32 `[samples]`.

    Raises:
        FileNotFoundError, OSError, TypeError, ValueError: naming the file or URL, for what cannot be read, is empty,
            announces a rate that no recording has, or has samples that are not finite or beyond 100 times full scale.
    """
    name, blocks = _source_blocks(audio, target_rate, sampling_rate)
    resampler, samples, seconds = None, 0, 0.0
    for block, rate in blocks:
        check_samples(block, seconds, rate, name)
        seconds += len(block) / rate
        block = block.mean(axis=1).astype(np.float32, copy=False)
        if rate != target_rate:
            resampler = resampler or soxr.ResampleStream(rate, target_rate, num_channels=1, dtype="float32")
            block = resampler.resample_chunk(block).clip(-MAX_SAMPLE, MAX_SAMPLE)  # which it may overshoot
        samples += len(block)
        yield block
    if resampler is not None:
        block = resampler.resample_chunk(np.zeros(0, np.float32), last=True).clip(-MAX_SAMPLE, MAX_SAMPLE)
        samples += len(block)
        yield block
    if samples == 0:
        raise ValueError(f"{name} is empty: it holds no audio.")


def audio_windows(blocks: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Windows of `size` samples from blocks of any size; the last one may be shorter."""
    pending = np.zeros(0, np.float32)
    for block in blocks:
        pending = np.concatenate([pending, block])
        while len(pending) >= size:
            yield pending[:size]
            pending = pending[size:]
    if len(pending):
        yield pending
