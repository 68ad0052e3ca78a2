# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
Peak memory of a training step on one long sequence, with and without the chunked loss and TTT's checkpoints.

    python benchmarks/training_memory.py [--tokens 16384] [--output benchmarks/results/training_memory.json]

Each step runs on the CPU in a process of its own; a small model with a vocabulary of 16,384 tokens stands in for the
8B one, whose logits at 16k tokens alone take 8 GB in float32.
"""

import argparse
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from reporting import RESULTS, environment, peak_memory, store


VOCAB_SIZE = 16384


def step(tokens: int, loss_chunk_size: int | None, group_size: int) -> dict[str, float]:
    """One forward and backward pass: what it adds to the memory of the process in bytes, and seconds."""
    from ttt_omni import TTTOmniConfig, TTTOmniForCausalLM, TTTOmniTextConfig

    torch.manual_seed(0)
    config = TTTOmniTextConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        layer_types=["linear_attention"] * 2,
        ttt_scan_checkpoint_group_size=group_size,
    )
    model = TTTOmniForCausalLM(TTTOmniConfig(text_config=config)).train()
    input_ids = torch.randint(0, VOCAB_SIZE, (1, tokens))
    before, start = peak_memory(), time.perf_counter()
    loss = model(input_ids, labels=input_ids, loss_chunk_size=loss_chunk_size, use_cache=False).loss
    loss.backward()
    return {"bytes": peak_memory() - before, "seconds": time.perf_counter() - start, "loss": loss.item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--output", type=Path, default=RESULTS / "training_memory.json")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step is not None:
        print(json.dumps(step(arguments.tokens, *json.loads(arguments.step))))
        return
    rows = []
    print("| logits at a time | mini-batches per TTT checkpoint | memory | seconds | loss |\n" + "| --- " * 5 + "|")
    for loss_chunk_size, group_size in itertools.product((None, 1024), (0, 16)):
        setting = json.dumps([loss_chunk_size, group_size])
        command = [sys.executable, __file__, "--tokens", str(arguments.tokens), "--step", setting]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        row = json.loads(output.splitlines()[-1])
        rows.append({"loss_chunk_size": loss_chunk_size, "group_size": group_size, **row})
        print(
            f"| {loss_chunk_size or 'all'} | {group_size or 'no checkpoints'} | {row['bytes'] / 1e9:.2f} GB "
            f"| {row['seconds']:.0f} | {row['loss']:.5f} |",
            flush=True,
        )
    store(arguments.output, {"tokens": arguments.tokens, "vocab_size": VOCAB_SIZE, "rows": rows, **environment()})


if __name__ == "__main__":
    main()
