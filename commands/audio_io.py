# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Recordings, speech in files and on a sound device."""

import os
import queue
import shutil
import stat
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import soundfile
import torch
from huggingface_hub.utils import httpx

from ..audio_ttt_omni import read_audio
from ..files_ttt_omni import new_file
from .terminal import progress


MICROPHONE_RATE = 16000
# The subtype of a file of speech by its extension.
SUBTYPES = {".wav": "PCM_16", ".flac": "PCM_16", ".ogg": "VORBIS"}


@contextmanager
def repeatable(recording: str) -> Iterator[str]:
    """
    A path that can be read several times, and was read once to the end of its first window.

    A pipe or a URL is copied to a temporary file, whose name no error shows.

    Raises:
        FileNotFoundError, OSError, ValueError: what reading it would raise, at once rather than after the minutes that
            loading a model may take.
    """
    if os.path.isfile(recording):
        next(read_audio(recording, MICROPHONE_RATE), None)
        yield recording
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = os.path.join(folder, "recording")
        try:
            if os.path.exists(recording) and stat.S_ISFIFO(os.stat(recording).st_mode):
                with open(recording, "rb") as source, open(copy, "wb") as target:
                    shutil.copyfileobj(source, target)
                next(read_audio(copy, MICROPHONE_RATE), None)
            else:
                with soundfile.SoundFile(copy, "w", MICROPHONE_RATE, 1, "FLOAT", format="RF64") as target:
                    for block in read_audio(recording, MICROPHONE_RATE):
                        target.write(block)
        except (OSError, ValueError, RuntimeError, httpx.HTTPError) as error:
            message = str(error).replace(copy, recording)
            named = message if recording in message else f"{recording} cannot be read: {message}"
            raise ValueError(named) from error
        yield copy


def check_output(path: str, grows: bool) -> None:
    """Raises ValueError for a file in which no speech can be written."""
    extension = Path(path).suffix.lower()
    if extension not in SUBTYPES:
        raise ValueError(f"{path} does not end with {', '.join(SUBTYPES)}, which says in which format to write.")
    if grows and extension != ".wav":
        raise ValueError(f"{path} cannot grow with the answer: `--stream` writes .wav.")
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder.")
    check_folder(path)


def check_folder(path: str) -> None:
    if not Path(path).parent.is_dir():
        raise ValueError(f"The folder {Path(path).parent} for {Path(path).name} does not exist.")


class SpeechFile:
    """
    Writes speech to the file `path`, in the format that its extension says, from the first sound on.

    A file that `grows` is a complete WAV after each chunk; another one takes its name when all is in it, at the end of
    the `with` block, and disappears if that fails.
    """

    def __init__(self, path: Path, sampling_rate: int, grows: bool):
        self.path = path
        self.sampling_rate = sampling_rate
        self.grows = grows
        self.file = None  # until there is a sound

    def __enter__(self) -> "SpeechFile":
        self.stack = ExitStack()
        return self

    def __exit__(self, *exception) -> None:
        self.stack.__exit__(*exception)

    def write(self, waveform: torch.FloatTensor) -> None:
        """Writes samples `[samples]`."""
        if self.file is None:
            if not waveform.any():
                return
            self.file = self._open()
        pcm = (waveform.clamp(-1, 1) * 32767).round().to(torch.int16).numpy()
        if not self.grows:
            self.file.write(pcm)
            return
        self.file.seek(0)
        with soundfile.SoundFile(self.file, "r+") as wav:  # closing it brings the header up to date
            wav.seek(0, soundfile.SEEK_END)
            wav.write(pcm)
        self.file.flush()

    def _open(self):
        subtype = SUBTYPES[self.path.suffix.lower()]
        if self.grows:
            file = self.stack.enter_context(open(self.path, "w+b"))
            soundfile.SoundFile(file, "w", self.sampling_rate, 1, subtype, format="WAV").close()
            return file
        temporary = self.stack.enter_context(new_file(self.path))
        return self.stack.enter_context(
            soundfile.SoundFile(os.fsencode(temporary), "w", self.sampling_rate, 1, subtype)
        )


@contextmanager
def open_player(sounddevice, sampling_rate: int) -> Iterator["Player | None"]:
    """Plays what is written to it until all was heard, on no device at all for `None`."""
    if sounddevice is None:
        yield None
        return
    player = Player(sounddevice, sampling_rate)
    yield player
    player.finish()


class Player:
    """Plays speech in a thread, while the next is being made."""

    def __init__(self, sounddevice, sampling_rate: int):
        self.device = sounddevice.OutputStream(samplerate=sampling_rate, channels=1, dtype="float32")
        self.chunks = queue.Queue()
        self.thread = threading.Thread(target=self._play, daemon=True)
        self.thread.start()

    def write(self, waveform: torch.FloatTensor) -> None:
        self.chunks.put(waveform.numpy())

    def finish(self) -> None:
        self.chunks.put(None)
        self.thread.join()

    def _play(self):
        with self.device:
            while (chunk := self.chunks.get()) is not None:
                self.device.write(chunk)


def record_questions(sounddevice) -> Iterator[tuple[np.ndarray, int]]:
    """What is said between two presses of Enter, time after time, until the end of the input."""
    while True:
        progress("Press Enter to speak, and Enter again when you are done; Ctrl-D ends the conversation")
        if not sys.stdin.readline():
            return
        if blocks := _record(sounddevice):
            yield np.concatenate(blocks), MICROPHONE_RATE


def _record(sounddevice) -> list[np.ndarray]:
    """Blocks `[samples]` of what is said until Enter is pressed."""
    blocks = []

    def append(block, *_):
        blocks.append(block[:, 0].copy())

    with sounddevice.InputStream(samplerate=MICROPHONE_RATE, channels=1, dtype="float32", callback=append):
        sys.stdin.readline()
    return blocks


def find_sounddevice(purpose: str):
    try:
        import sounddevice

        return sounddevice
    except (ImportError, OSError) as error:  # OSError: without PortAudio
        raise ValueError(
            f"There is no sound device for {purpose} ({error}): it takes `pip install sounddevice`, and PortAudio."
        ) from error
