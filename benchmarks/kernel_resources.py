# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
What the TTT kernels take of a Hopper GPU, without one: Triton compiles them for sm_90 ahead of time.

    python benchmarks/kernel_resources.py [--layer linear] [--head-dim 128] [--mini-batch 64] [--dtype float32]

The ops run on CPU tensors, laid out as a model's are, and each kernel is compiled where it would be launched: with the
arguments and options of the launch, specialised by Triton itself. A kernel stands in the first pass that launches it,
once for each specialisation. Spills are the bytes of a thread's stack; "loop" counts the instructions of the largest
loop, the columns behind it those there (in the whole, where there is no loop) that read spilled registers (LDL), write
them (STL) or are barriers (BAR).
Results go to benchmarks/results/kernel_resources.json.
"""

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock


os.environ.pop("TRITON_INTERPRET", None)  # what is interpreted is not compiled
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # also without an installation

import torch
import triton
from reporting import RESULTS, store
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import ttt_kernels


HOPPER = GPUTarget("cuda", 90, 32)
HEADS, LENGTH = 32, 1024  # Triton specialises a size by whether it is 1, and whether it is a multiple of 16
PASSES = ("prefill", "training", "decode")


def main() -> None:
    """Compile, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", choices=("linear", "mlp"), nargs="+", default=["linear", "mlp"])
    parser.add_argument("--head-dim", type=int, choices=(16, 32, 64, 128), nargs="+", default=[64, 128])
    parser.add_argument("--mini-batch", type=int, choices=(16, 32, 64), nargs="+", default=[16, 64])
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), nargs="+",
                        help="default: bfloat16, and float32 at the largest sizes")  # fmt: skip
    parser.add_argument("--output", type=Path, default=RESULTS / "kernel_resources.json")
    args = parser.parse_args()

    cases = list(itertools.product(args.layer, args.head_dim, args.mini_batch, args.dtype or ["bfloat16"]))
    if args.dtype is None:
        cases += [(layer, max(args.head_dim), max(args.mini_batch), "float32") for layer in args.layer]
    rows, seen = [], set()
    for case in (progress := tqdm(cases, unit="case")):
        for what in PASSES:
            progress.set_description(" ".join(map(str, (*case, what))))
            with compiling_instead_of_running() as kernels:
                run(*case, what)
            names = dict(zip(("layer", "D", "m", "dtype"), case)) | {"pass": what}
            rows += [names | resources(kernel) for kernel in kernels.values() if kernel.hash not in seen]
            seen |= kernels.keys()

    table = [list(rows[0]), *(list(map(str, row.values())) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table)]
    for line in table:
        print(" | ".join(f"{text:{width}}" for text, width in zip(line, widths)).rstrip())
    report = {
        "target": f"sm_{HOPPER.arch}",
        "versions": {"triton": triton.__version__, "ptxas": triton.knobs.nvidia.ptxas.version},
        "settings": {"batch": 1, "heads": HEADS, "length": LENGTH},
        "rows": rows,
    }
    store(args.output, report)


@contextmanager
def compiling_instead_of_running() -> Iterator[dict]:
    """Collects the kernels launched meanwhile, by hash, compiled for Hopper and not run."""
    kernels, launch = {}, JITFunction.run
    driver = SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda device: 0, get_current_target=lambda: HOPPER
    )

    def compile_only(self, *args, warmup, **kwargs):
        kernel = launch(self, *args, warmup=True, **kwargs)
        return kernels.setdefault(kernel.hash, kernel)

    triton.runtime.driver.set_active(driver)
    with mock.patch.object(JITFunction, "run", compile_only):
        yield kernels


def run(layer: str, head_dim: int, mini_batch: int, dtype: str, what: str) -> None:
    """One pass of the op over tensors laid out as a model's."""
    length, d, f = 1 if what == "decode" else LENGTH, head_dim, 4 * head_dim
    q, k, v = (torch.empty(1, length, HEADS, d, dtype=getattr(torch, dtype)).transpose(1, 2) for _ in range(3))
    lr = torch.empty(1, length, HEADS).transpose(1, 2)
    parameters = [torch.empty(mini_batch), torch.empty(HEADS, d), torch.empty(HEADS, d)]
    shapes = [(d, d), (1, d)] if layer == "linear" else [(d, f), (1, f), (f, d), (1, d)]
    shapes += [(mini_batch, width) for width in ((d, d) if layer == "linear" else (d, f, f, d))]
    state = [torch.empty(1, HEADS, *shape) for shape in shapes]
    tensors = [q, k, v, lr, *parameters, *state]
    op = getattr(ttt_kernels, f"ttt_{layer}" + "_decode" * (what == "decode"))
    with torch.set_grad_enabled(what == "training"):
        o, _ = op(*(x.requires_grad_(what == "training") for x in tensors), torch.zeros(1, dtype=torch.long))
        if what == "training":
            torch.autograd.grad(o, tensors, torch.empty_like(o))


def resources(kernel) -> dict:
    """What a compiled kernel takes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    code = {int(address, 16): x for address, x in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", text) if x != "NOP"}
    loop = largest_loop(code)
    body = loop or code.values()
    return {
        "kernel": kernel.name,
        "warps": kernel.metadata.num_warps,
        "registers": int(re.search(r"REG:(\d+)", text)[1]),
        "spills": int(re.search(r"STACK:(\d+)", text)[1]),
        "shared": kernel.metadata.shared,
        "instructions": len(code),
        "loop": len(loop),
        **{name: sum(bool(re.search(rf"\b{name}\b", x)) for x in body) for name in ("LDL", "STL", "BAR")},
    }


def largest_loop(code: dict[int, str]) -> list[str]:
    """The instructions of the largest loop of `code`, which stand by address: those that a jump back encloses."""
    loops = [[]]
    for end, instruction in code.items():
        jump = re.search(r"\bBRA\b.* (0x[0-9a-f]+)$", instruction)
        if jump and (start := int(jump[1], 16)) < end:
            body = [x for address, x in code.items() if start <= address <= end]
            if "EXIT" not in body:  # what stands behind the exit was moved out of the way, and its jump is no loop
                loops.append(body)
    return max(loops, key=len)


if __name__ == "__main__":
    main()
