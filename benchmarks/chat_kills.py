# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
Kills `ttt-omni chat --memory` (SIGKILL) at random moments of three turns, and goes on: once with the same command,
once with another question, each from a copy of what was left on disk.

    python benchmarks/chat_kills.py --kills 40

Of each kill it prints how many turns were complete, what was being heard, how many pieces of prompts were heard twice
(at most the one that was not saved yet), and how far the states that come out are from those of conversations that
nobody disturbed: the same tokens, and caches that differ by so much. It fails where they are not the same.

The command runs in a process of its own, forked from one that has imported the libraries, as that alone would take
most of its time, and saves after each piece rather than each minute. A moment is a number of events (pieces heard,
tokens, saves) and a while after it; `--moments` are shares of all events, in place of random ones. Linux, and other
systems with `fork`.
"""

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import torch
from safetensors import safe_open

from ttt_omni.commands import chat, cli
from ttt_omni.conversion import make_tiny
from ttt_omni.memory_ttt_omni import memory_metadata
from ttt_omni.streaming_ttt_omni import TextStream


RATE = 16000
SECONDS = [35, 65, 4, 40]  # of the recordings; the last one is the other question
TOLERANCE = 1e-5
HEARD = b"h"


def command(model: Path, questions: list[str]) -> None:
    """`chat` over `questions` in the working directory. Logs each piece that was heard, each token, and each save."""
    log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    output = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)

    def log_after(owner, name, event):
        function = getattr(owner, name)

        def logged(*arguments, **kwargs):
            result = function(*arguments, **kwargs)
            os.write(log, event)
            return result

        setattr(owner, name, logged)

    log_after(chat.TTTOmniForCausalLM, "_hear", HEARD)
    log_after(chat.TTTOmniForCausalLM, "save_memory", b"s")
    log_after(TextStream, "push", b"t")
    chat.SAVE_SECONDS = 0
    cli.main(
        ["chat", f"--model={model}", *questions, "--memory=m.safetensors", "--output=answers", "--max-new-tokens=24"]
    )


def run(folder: Path, model: Path, questions: list[str], kill_after: float | None = None) -> None:
    """Runs the command, and kills it after so many events of its log, whose fraction is one of 50 ms."""

    def target():
        os.chdir(folder)
        command(model, questions)

    folder.mkdir(exist_ok=True)
    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    if kill_after is not None:
        while process.is_alive() and len(events(folder)) < int(kill_after):
            time.sleep(0.0005)
        process.join(0.05 * (kill_after % 1))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        sys.exit(f"The command failed: {(folder / 'output').read_text().splitlines()[-1]}")


def events(folder: Path) -> bytes:
    log = folder / "log"
    return log.read_bytes() if log.exists() else b""


def difference(path: Path, expected: Path) -> float:
    """The largest between the caches of two memories; infinite if their tokens or sizes are not the same."""
    with safe_open(path, "pt") as one, safe_open(expected, "pt") as other:
        if sorted(one.keys()) != sorted(other.keys()):
            return torch.inf
        pairs = [(one.get_tensor(name), other.get_tensor(name)) for name in one.keys() if name != "weights"]
    if any(x.shape != y.shape or (not x.is_floating_point() and not torch.equal(x, y)) for x, y in pairs):
        return torch.inf
    return max(float((x - y).abs().max()) for x, y in pairs if x.is_floating_point() and x.numel())


def tokens(path: Path) -> int:
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        return file.get_slice("input_ids").get_shape()[1]


def state(path: Path) -> str:
    """What is said of the unfinished turn in the memory `path`."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    if not unfinished.exists():
        return "-"
    metadata = memory_metadata(unfinished)
    return f"{metadata['turn']}, {metadata['pieces']}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Kills `ttt-omni chat --memory`, and goes on.")
    parser.add_argument("--kills", type=int, default=40, metavar="N", help="default: 40")
    parser.add_argument("--moments", type=float, nargs="*", metavar="SHARE", help="when, in place of random moments")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    arguments = parser.parse_args()
    generator = random.Random(arguments.seed)
    moments = arguments.moments or [generator.random() for _ in range(arguments.kills)]
    torch.set_num_threads(1)  # threads do not survive a fork
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(measure(Path(folder), moments))


def measure(folder: Path, moments: list[float]) -> int:
    """Prints the table. Returns 1 if anything was lost, or heard twice."""
    model = folder / "model"
    make_tiny(model)
    questions = []
    for seed, seconds in enumerate(SECONDS):
        questions.append(str(folder / f"{seed}.wav"))
        noise = np.random.default_rng(seed).standard_normal(seconds * RATE)
        soundfile.write(questions[-1], 0.05 * noise, RATE)
    *questions, other = questions

    run(folder / "expected", model, questions)
    expected, all_events = folder / "expected" / "m.safetensors", events(folder / "expected")
    ends, expected_others = [], []
    for turns in range(len(questions) + 1):
        reference = folder / f"{turns} turns"
        for question in questions[:turns]:
            run(reference, model, [question])
        ends.append(tokens(reference / "m.safetensors"))
        run(reference, model, [other])
        expected_others.append(reference / "m.safetensors")

    print(f"{'moment':>8}{'turns':>7}{'unfinished':>16}{'twice':>7}{'same command':>14}{'another':>10}")
    failures = 0
    for number, moment in enumerate(moments):
        killed, another = folder / f"killed {number}", folder / f"another {number}"
        run(killed, model, questions, kill_after=moment * len(all_events))
        shutil.copytree(killed, another)
        unfinished, turns = state(killed / "m.safetensors"), ends.index(tokens(killed / "m.safetensors"))
        is_over = turns == len(questions)
        if not is_over:
            run(killed, model, questions)
        run(another, model, [other])
        twice = events(killed).count(HEARD) - all_events.count(HEARD)
        same = difference(killed / "m.safetensors", expected)
        changed = difference(another / "m.safetensors", expected_others[turns])
        left = {name for name in os.listdir(killed) if not is_over} - {"m.safetensors", "answers", "log", "output"}
        is_good = same <= TOLERANCE and changed <= TOLERANCE and 0 <= twice <= 1 and not left
        failures += not is_good
        print(
            f"{moment * len(all_events):8.1f}{turns:7}{unfinished:>16}{twice:7}{same:14.1e}{changed:10.1e}"
            f"{'' if is_good else '  WRONG'}",
            flush=True,
        )
    print(f"{len(moments) - failures} of {len(moments)} went on as if nobody had killed them.")
    return int(failures > 0)


if __name__ == "__main__":
    main()
