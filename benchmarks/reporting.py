# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""What benchmarks measure alike, and what they store beside their figures, and where."""

import json
import platform
import re
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


def peak_memory() -> int:
    """Bytes that this process took at most."""
    return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])


def store(path: Path, result: dict[str, Any]) -> None:
    """Writes `result` as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
