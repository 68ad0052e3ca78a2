# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""What a benchmark stores beside its figures, and where."""

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


RESULTS = Path(__file__).parent / "results"


def environment(*packages: str) -> dict[str, Any]:
    """What has a part in all times, and the versions of `packages` besides."""
    return {
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        **{name: version(name) for name in ("torch", "transformers", *packages)},
    }


def store(path: Path, result: dict[str, Any]) -> None:
    """Writes `result` as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
