# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Speech by a text-to-speech program of the user's choice."""

import os
import re
import shlex
import shutil
import subprocess
import textwrap
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import soundfile
import torch

from ..audio_ttt_omni import read_audio
from ..streaming_ttt_omni import SentenceStream, TTTOmniStreamEvent


VOICE_RATE = 24000  # Hz, of an answer, whatever the program's


def program_words(command: str, option: str) -> list[str]:
    """
    The words of a command with an `{output}`, the WAV for the program to write, that `option` gave. No shell reads it.

    Raises:
        ValueError, FileNotFoundError: for a command that will not do.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ValueError(f"The command {command!r} cannot be split into words: {error}.") from None
    if "{output}" not in command:
        raise ValueError(f"The command {command!r} has no {{output}}, the file for the program to write.")
    if shutil.which(words[0]) is None:
        raise FileNotFoundError(f"{words[0]} is not installed; install it, or name another program with {option}.")
    return words


def run_program(words: list[str], text: str, output: Path, voice: str = "") -> None:
    """
    Has a program speak `text` into the WAV `output`, by a command whose `{output}`, `{text}` and `{voice}` are filled
    in; the text comes on its standard input, too.

    Raises:
        ValueError, OSError: saying why there is no WAV.
    """
    text = " ".join(text.split())  # some programs take each line for a text of its own
    values = {
        "voice": voice,
        "output": str(output),
        "text": f" {text}" if text.startswith("-") else text,  # no option of the program
    }
    filled = [re.sub(r"\{(voice|output|text)\}", lambda match: values[match[1]], word) for word in words]
    result = subprocess.run(filled, input=f"{text}\n".encode(), capture_output=True)
    if result.returncode != 0 or not output.exists():
        ending = f"exited with {result.returncode}" if result.returncode else "wrote no {output}"
        said = (result.stderr or result.stdout).decode(errors="replace")
        raise ValueError(f"{words[0]} {ending} for {textwrap.shorten(text, 60)!r}: {said or 'it said nothing.'}")


def with_voice(events: Iterable[TTTOmniStreamEvent], words: list[str]) -> Iterator[TTTOmniStreamEvent]:
    """
    The events of an answer in text, and between them its speech at `VOICE_RATE`: a program says each sentence while
    the next is written.

    Raises:
        ValueError, OSError: as [`run_program`].
    """
    text, spoken = SentenceStream(), deque()
    with ThreadPoolExecutor(1) as program:
        try:
            for event in events:
                spoken.extend(program.submit(_speech, words, sentence) for sentence in text.push(event.text or ""))
                yield event
                while spoken and spoken[0].done():
                    yield TTTOmniStreamEvent(waveform=spoken.popleft().result())
            spoken.extend(program.submit(_speech, words, sentence) for sentence in text.flush())
            while spoken:
                yield TTTOmniStreamEvent(waveform=spoken.popleft().result())
        finally:
            program.shutdown(wait=False, cancel_futures=True)


def _speech(words: list[str], sentence: str) -> torch.FloatTensor:
    """`sentence` as samples `[samples]` at `VOICE_RATE`; none if the program finds nothing in it to be said."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "sentence.wav")
        run_program(words, sentence, path)
        with soundfile.SoundFile(os.fsencode(path)) as file:
            if file.frames == 0:
                return torch.empty(0)
        return torch.from_numpy(np.concatenate(list(read_audio(path, VOICE_RATE))))
