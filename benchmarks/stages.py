# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
Four stages of fine-tuning, 512 -> 1,024 -> 2,048 -> 4,096 tokens, run straight through and killed on the way.

    python benchmarks/stages.py [--steps 6] [--output benchmarks/results/stages.json]

The tiny model goes through `ttt-omni finetune` with the configurations of the stages of 8k to 65k, of which only
the lengths and what a CPU needs are changed. The second run is killed (SIGKILL) in stage 3 after its first checkpoint,
and started again by the same command. It must end with the loss and the adapter of the first.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
from reporting import RESULTS, environment, store
from safetensors.torch import load_file
from tqdm import tqdm

from ttt_omni.conversion import make_tiny


STAGES = {512: "8k", 1024: "16k", 2048: "32k", 4096: "65k"}
KILLED = 2048
SAVE_STEPS = 2
PLACES = ("harbour", "garden", "market", "library", "station", "mountain", "bakery", "museum")
NAMES = ("Ada", "Ben", "Carl", "Dora", "Emil", "Fay", "Gus", "Ida")


def write_corpus(folder: Path) -> Path:
    """A manifest of 400 conversations about who went where, every fourth spoken (in tones) and answered in units."""
    choose, lines = random.Random(0), []
    for number in range(400):
        name, place = choose.choice(NAMES), choose.choice(PLACES)
        question, answer = f"Where did {name} go, to the {place}?", f"{name} went to the {place}, I remember."
        record = {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
        if number % 4 == 0:
            record["speech"] = f"{number}.wav"
            tone = 0.3 * np.sin(np.arange(8000) * 0.02 * (1 + NAMES.index(name)))
            soundfile.write(folder / record["speech"], tone, 16000)
            record["conversations"][0]["value"] = "<speech>\nWhere did they go?"
            record["conversations"][1]["units"] = [(11 * PLACES.index(place) + 7 * i) % 100 for i in range(100)]
        lines.append(json.dumps(record))
    manifest = folder / "corpus.jsonl"
    manifest.write_text("\n".join(lines) + "\n")
    return manifest


def command(folder: Path, length: int, model: Path, manifest: Path, steps: int) -> list[str]:
    """What trains the stage of `length` tokens in `folder`, from the stage before."""
    values = {
        "model": model,
        "manifest": manifest,
        "output_dir": folder / str(length),
        "length": length,
        "drop_audio_padding": "true",
        "gradient_accumulation_steps": 2,
        "rank": 8,
        "use_cpu": "true",
        "max_steps": steps,
        "save_steps": SAVE_STEPS,
        "warmup_steps": 1,
        "learning_rate": 1e-2,
        "memory_learning_rate": 2e-2,
        "report_to": "none",
        "disable_tqdm": "true",
    }
    if length != min(STAGES):
        values["previous"] = folder / str(length // 2)
    flags = [f"--{name}={value}" for name, value in values.items()]
    return [sys.executable, "-m", "ttt_omni", "finetune", STAGES[length], *flags]


def run_until_first_checkpoint(words: list[str], folder: Path) -> int:
    """Kills the command once its first checkpoint is complete. Returns the last step that is saved."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (folder / f"checkpoint-{SAVE_STEPS}" / "trainer_state.json").exists():
        if process.poll() is not None:
            raise RuntimeError(f"The stage ended before it could be killed: {' '.join(words)}")
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return max(int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*"))


def losses(folder: Path, steps: int) -> list[float]:
    state = json.loads((folder / f"checkpoint-{steps}" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of each stage")
    parser.add_argument("--output", type=Path, default=RESULTS / "stages.json")
    arguments = parser.parse_args()
    if arguments.steps <= SAVE_STEPS:
        parser.error(f"--steps must be more than {SAVE_STEPS}, after which the first checkpoint is saved.")
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        make_tiny(work / "model")
        manifest = write_corpus(work)
        runs, killed_after = {}, None
        progress = tqdm(total=2 * len(STAGES), unit=" stages")
        for run in ("straight", "killed"):
            runs[run] = []
            for length in STAGES:
                words = command(work / run, length, work / "model", manifest, arguments.steps)
                folder, start = work / run / str(length), time.perf_counter()
                if run == "killed" and length == KILLED:
                    killed_after = run_until_first_checkpoint(words, folder)
                subprocess.run(words, check=True, capture_output=True)
                curve = losses(folder, arguments.steps)
                runs[run].append({"tokens": length, "seconds": time.perf_counter() - start, "losses": curve})
                progress.update()
        progress.close()
        last = [load_file(work / run / str(max(STAGES)) / "adapter_model.safetensors") for run in runs]
    difference = max((last[0][name] - last[1][name]).abs().max().item() for name in last[0])

    print("tokens | first loss | last loss | last loss of the killed run | difference of the curves")
    for straight, killed in zip(*runs.values()):
        gap = max(abs(a - b) for a, b in zip(straight["losses"], killed["losses"], strict=True))
        row = straight["losses"][0], straight["losses"][-1], killed["losses"][-1], gap
        print(f"{straight['tokens']} | " + " | ".join(f"{x:.6g}" for x in row))
    print(f"killed in stage 3 after step {killed_after} of {arguments.steps}; adapters differ by {difference:.3g}")
    result = {"environment": environment("peft"), "steps": arguments.steps, "killed after step": killed_after}
    result |= {"largest difference of the adapters": difference, "runs": runs}
    store(arguments.output, result)


if __name__ == "__main__":
    main()
