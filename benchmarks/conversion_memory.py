# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
Peak memory of `ttt-omni convert`, against 1.5 times the largest source shard + 1 GB.

    python benchmarks/conversion_memory.py [--gigabytes 2] [--output benchmarks/results/conversion_memory.json]
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from reporting import RESULTS, environment, store
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

from ttt_omni.checkpoint import LazyTensor, write_checkpoint
from ttt_omni.conversion import tiny


NUM_SHARDS = 4
GB = 10**9
CONVERT = """
import re, sys
from ttt_omni.commands.cli import main
import ttt_omni.conversion.llama_omni  # which the command loads

def print_peak():
    print(1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]))

print_peak()
main(["convert", *sys.argv[1:]])
print_peak()
"""


def write_checkpoint_of_size(folder: Path, num_bytes: float) -> None:
    """A bfloat16 checkpoint in LLaMA-Omni's layout of about so many bytes, in shards, beside small parts."""
    tiny.write_llama_omni(folder)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=8192, num_attention_heads=16, num_key_value_heads=4
    )
    layer_bytes = 2 * (2 * 2048 * 2048 + 2 * 512 * 2048 + 3 * 2048 * 8192)
    config.num_hidden_layers = max(2, round((num_bytes - 4 * 32000 * 2048) / layer_bytes))
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in file.keys():
            if name.startswith(("speech_generator.", "model.speech_projector.")):
                shapes[name] = torch.Size(file.get_slice(name).get_shape())
    shapes["model.speech_projector.linear2.weight"] = torch.Size((2048, tiny.PROJECTOR_SIZE))
    shapes["model.speech_projector.linear2.bias"] = torch.Size((2048,))
    shapes["speech_generator.input_proj.weight"] = torch.Size((tiny.HIDDEN_SIZE, 2048))
    values = json.loads((folder / "config.json").read_text())
    values |= {name: getattr(config, name) for name in LlamaConfig.__annotations__ if name in values}
    (folder / "config.json").write_text(json.dumps(values | {"rope_scaling": None}))

    (folder / "model.safetensors").unlink()
    tensors = {name: LazyTensor(tuple(s), lambda s=s: torch.full(s, 0.5), name) for name, s in shapes.items()}
    total = 2 * sum(math.prod(shape) for shape in shapes.values())
    write_checkpoint(
        folder, tensors, dict.fromkeys(shapes, torch.bfloat16), max_shard_size=math.ceil(1.05 * total / NUM_SHARDS)
    )


def peak_memory(source: Path, output: Path) -> list[int]:
    """Bytes of memory that a process takes at most before it converts `source`, and until it has done so."""
    arguments = [f"--source={source}", f"--output={output}", f"--whisper={source / 'whisper.pt'}"]
    arguments += [f"--vocoder={source / 'vocoder.pt'}", f"--vocoder-config={source / 'vocoder_config.json'}"]
    process = subprocess.run(
        [sys.executable, "-c", CONVERT, *arguments], check=True, stdout=subprocess.PIPE, text=True
    )
    return [int(line) for line in process.stdout.split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--output", type=Path, default=RESULTS / "conversion_memory.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        source.mkdir()
        write_checkpoint_of_size(source, arguments.gigabytes * GB)
        shards = [path.stat().st_size for path in source.glob("*.safetensors")]
        libraries, peak = peak_memory(source, Path(folder) / "output")
        results = {
            "source": sum(shards),
            "shards": len(shards),
            "largest shard": max(shards),
            "limit": int(1.5 * max(shards)) + GB,
            "peak": peak,
            "libraries alone": libraries,
        }
    for name, value in results.items():
        print(f"{name:15} {value if name == 'shards' else f'{value / GB:.3f} GB':>10}")
    store(arguments.output, results | environment())


if __name__ == "__main__":
    main()
