# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
Hours of listening: a recording of three hours through the tiny model and `ttt-omni answer`.

    python benchmarks/long_listening.py [--minutes 180]

Peak memory of the process against that for one minute, placeholders in the prompt, and whether a process that was
killed in the middle and resumed from its saved state gives the same answer as one that was not. Prints a table and
writes benchmarks/results/long_listening.json.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import soundfile
from reporting import RESULTS, environment, store
from safetensors import safe_open

from ttt_omni import TTTOmniConfig
from ttt_omni.conversion import make_tiny


RATE = 16000
WINDOW_SECONDS, EMBEDDINGS = 30, 300  # of a window


def write_recording(path: Path, minutes: int) -> None:
    """Noise that swells and fades, made minute by minute."""
    generator = np.random.default_rng(0)
    with soundfile.SoundFile(path, "w", RATE, 1, subtype="PCM_16") as file:
        for minute in range(minutes):
            seconds = np.arange(60 * RATE) / RATE
            loudness = np.sin(2 * np.pi * seconds * (0.1 + 0.01 * (minute % 7))) ** 2
            file.write(0.1 * generator.standard_normal(60 * RATE) * loudness)


def start(folder: Path, recording: str, output: str, memory: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "ttt_omni", "answer", "--model", "tiny", recording, "--output", output]
    command += ["--memory", memory, "--max-new-tokens", "32"]
    with open(folder / f"{output}.txt", "w") as text, open(folder / f"{output}.log", "a") as log:
        return subprocess.Popen(command, cwd=folder, stdout=text, stderr=log)


def finish(process: subprocess.Popen) -> float:
    """Waits for it; returns its peak memory in MB."""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(process.args)} failed with {process.returncode}.")
    return usage.ru_maxrss / (1024 if sys.platform == "linux" else 1024**2)


def placeholders(folder: Path, memory: str) -> int:
    config = TTTOmniConfig.from_pretrained(folder / "tiny")
    with safe_open(folder / memory, "pt") as file:
        return int(file.get_tensor("input_ids").eq(config.audio_token_id).sum())


def measure(folder: Path, minutes: int) -> dict:
    embeddings = minutes * 60 // WINDOW_SECONDS * EMBEDDINGS
    make_tiny(folder / "tiny")
    write_recording(folder / "short.flac", 1)
    write_recording(folder / "long.flac", minutes)
    short = finish(start(folder, "short.flac", "short.wav", "short.memory"))
    began = time.monotonic()
    long = finish(start(folder, "long.flac", "long.wav", "long.memory"))
    seconds = time.monotonic() - began
    print(f"peak memory: {short:.0f} MB for 1 minute, {long:.0f} MB for {minutes}; {seconds:.0f} s", flush=True)

    process = start(folder, "long.flac", "resumed.wav", "resumed.memory")
    while not (folder / "resumed.memory").exists() or placeholders(folder, "resumed.memory") < embeddings // 3:
        if process.poll() is not None:
            raise RuntimeError("The process ended before it could be killed: give more minutes.")
        time.sleep(1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    heard_when_killed = placeholders(folder, "resumed.memory")
    print(f"killed after {heard_when_killed} of {embeddings} placeholders", flush=True)
    finish(start(folder, "long.flac", "resumed.wav", "resumed.memory"))

    def same(suffix):
        return (folder / f"long.{suffix}").read_bytes() == (folder / f"resumed.{suffix}").read_bytes()

    hidden_size = TTTOmniConfig.from_pretrained(folder / "tiny").get_text_config().hidden_size
    return {
        "minutes": minutes,
        "seconds": seconds,
        "peak memory of 1 minute, MB": short,
        "peak memory, MB": long,
        "embeddings, MB": embeddings * hidden_size * 4 / 2**20,
        "growth without the embeddings, MB": long - short - embeddings * hidden_size * 4 / 2**20,
        "saved memory, MB": (folder / "long.memory").stat().st_size / 2**20,
        "placeholders": placeholders(folder, "long.memory"),
        "placeholders expected": embeddings,
        "placeholders heard when killed": heard_when_killed,
        "same text after resuming": same("wav.txt"),
        "same speech after resuming": same("wav"),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=int, default=180)
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        result = measure(Path(folder), arguments.minutes)
    for name, value in result.items():
        print(f"{name}: {value:.1f}" if isinstance(value, float) else f"{name}: {value}")
    store(RESULTS / "long_listening.json", {"environment": environment(), **result})
