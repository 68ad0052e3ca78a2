# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Stages of training short enough for a test: their recipe, their texts, and what they log."""

import json
from pathlib import Path

import yaml

import ttt_omni


EXAMPLES = Path(ttt_omni.__file__).parent / "examples"
TEXTS = [
    json.dumps(
        {"conversations": [{"from": "human", "value": f"Say {i}."}, {"from": "gpt", "value": f"I say {i}, as asked."}]}
    )
    for i in range(24)
]
SHORT = {
    "bf16": False,
    "use_cpu": True,
    "gradient_accumulation_steps": 2,
    "warmup_steps": 0,
    "save_steps": 2,
    "rank": 4,
    "report_to": "none",
}


def shorten(recipe: Path, path: Path, **values) -> None:
    """Writes one of our recipes in short form."""
    path.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | SHORT | values))


def losses(folder: Path) -> list[float]:
    """Those logged until the last checkpoint in `folder`."""
    steps = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    history = json.loads((steps[-1] / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]
