# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
Who may import whom: what stands lower in the list below knows nothing of what stands above it.

`python tests/test_rooms.py` prints the graph.
"""

import ast
import subprocess
import sys
from collections import defaultdict
from importlib.metadata import packages_distributions
from pathlib import Path


ROOT = Path(__file__).parent.parent
# From the top to the bottom; those of one line do not import each other.
ROOMS = [
    ["__main__", "__init__"],
    ["commands"],
    ["evaluation"],
    ["training", "conversion", "serving"],
    ["checkpoint", "registration", "loading", "conversation_file"],
    ["modeling_ttt_omni"],
    ["generation_ttt_omni"],
    ["processing_ttt_omni", "memory_ttt_omni"],
    ["audio_ttt_omni", "streaming_ttt_omni", "parallel_ttt_omni"],
    ["layers_ttt_omni", "vocoder_ttt_omni"],
    ["cache_ttt_omni"],
    ["ops_ttt_omni", "configuration_ttt_omni", "files_ttt_omni"],
    ["ttt_kernels"],
]
LEVELS = {room: -level for level, rooms in enumerate(ROOMS) for room in rooms}


def room_of(path: Path) -> str:
    """The folder at the top of the repository, or the file."""
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def imports() -> dict[str, set[str]]:
    """The rooms that each room imports."""
    graph = defaultdict(set)
    files = [*ROOT.glob("*.py"), *(path for room in LEVELS for path in (ROOT / room).rglob("*.py"))]
    for path in files:
        room = room_of(path)
        depth = len(path.relative_to(ROOT).parts) - 1  # folders below the root
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.level == depth + 1:
                names = [node.module.partition(".")[0]] if node.module else [alias.name for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names if alias.name == "ttt_kernels"]
            elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "ttt_omni":
                names = [(node.module.split(".") + ["__init__"])[1]]
            graph[room] |= set(names) - {room, "__version__"}  # which anyone may say
    return graph


def test_no_arrow_runs_up():
    graph = imports()
    assert graph.keys() <= LEVELS.keys(), "a new room has no place yet"
    up = {(room, used) for room, rooms in graph.items() for used in rooms if LEVELS[used] >= LEVELS[room]}
    assert not up


def test_importing_the_package_loads_the_model_alone():
    program = "import sys, ttt_omni; print(*(name for name in sys.modules if name.startswith('ttt_omni.')))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    rooms = {name.split(".")[1] for name in loaded.split()}
    assert "modeling_ttt_omni" in rooms
    others = {"commands", "evaluation", "training", "conversion", "serving", "checkpoint", "loading"}
    assert not rooms & {*others, "parallel_ttt_omni"}


def test_no_script_hides_a_package():
    """Which it would for all scripts beside it, as Python looks in their folder first."""
    scripts = {path.stem for folder in ("benchmarks", "examples", "recipes/*") for path in ROOT.glob(f"{folder}/*.py")}
    assert "kernel_times" in scripts
    assert not scripts & {*packages_distributions(), *sys.stdlib_module_names}


if __name__ == "__main__":
    for room, used in sorted(imports().items(), key=lambda entry: -LEVELS[entry[0]]):
        print(f"{room:24} -> {', '.join(sorted(used, key=lambda name: -LEVELS[name]))}")
