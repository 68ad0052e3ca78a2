# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""The kernels compile for a Hopper GPU, also on a machine without one: what the interpreter takes, Triton may not."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


triton = pytest.importorskip("triton", reason="Triton is not installed, which there is for Linux only")
try:
    triton.knobs.nvidia.ptxas  # noqa: B018
except RuntimeError as error:
    pytest.skip(f"this Triton does not compile for NVIDIA: {error}", allow_module_level=True)

ROOT = Path(__file__).parent.parent
SHARED_PER_BLOCK = 227 * 1024  # bytes, on sm_90 as what follows
REGISTERS_PER_THREAD = 255
REGISTERS_PER_BLOCK = 65536


def kernels_of(layer: str) -> set[str]:
    """The Triton functions of a layer that none of the others calls."""
    code = ast.parse((ROOT / "ttt_kernels" / f"{layer}_kernels.py").read_text()).body
    functions = [x for x in code if isinstance(x, ast.FunctionDef)]
    functions = [x for x in functions if any("triton.jit" in ast.unparse(y) for y in x.decorator_list)]
    called = {x.id for function in functions for x in ast.walk(function) if isinstance(x, ast.Name)}
    return {function.name for function in functions} - called


@pytest.mark.parametrize("layer, head_dim, mini_batch", [("linear", 128, 64), ("mlp", 128, 64)])
def test_every_kernel_compiles_for_hopper(layer, head_dim, mini_batch, tmp_path):
    output = tmp_path / "resources.json"
    options = [f"--layer={layer}", f"--head-dim={head_dim}", f"--mini-batch={mini_batch}", "--dtype=bfloat16"]
    subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "kernel_resources.py", *options, f"--output={output}"],
        check=True,
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache")},
    )
    rows = json.loads(output.read_text())["rows"]
    assert {row["kernel"] for row in rows} == kernels_of(layer)
    for row in rows:
        assert row["shared"] <= SHARED_PER_BLOCK, row
        assert row["registers"] <= REGISTERS_PER_THREAD, row
        assert row["registers"] * row["warps"] * 32 <= REGISTERS_PER_BLOCK, row
