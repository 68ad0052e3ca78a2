# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
What `--quantize` leaves of a model: its size, and how far its logits, tokens and speech units are from those in float.

    python benchmarks/quantisation.py [--model DIR] [--device cpu]

By default the model is a small random one; its weights are no worse to quantise than trained ones, but its logits lie
closer together. Tokens are compared position by position on the same text, so that one that differs does not change
those after it; units by the edit distance over the length. Prints a table, and writes
`benchmarks/results/quantisation.json`.
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ttt_omni import TTTOmniConfig, TTTOmniForCausalLM
from ttt_omni.conversion import make_tiny
from ttt_omni.loading import quantization


TOKENS = 512


def make_small(folder: Path) -> Path:
    """A random model whose widths are multiples of the 64 that NormalFloat takes at once."""
    make_tiny(folder / "tiny")
    config = TTTOmniConfig.from_pretrained(folder / "tiny").to_dict()
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "head_dim": 64}
    config["text_config"].update(sizes, num_key_value_heads=2)
    config["speech_decoder_config"].update(sizes, num_key_value_heads=4, input_size=256)
    config["projector_hidden_size"] = 256
    config["audio_config"].update(d_model=64, encoder_ffn_dim=256)
    torch.manual_seed(0)
    model = TTTOmniForCausalLM(TTTOmniConfig(**config))
    for name, parameter in model.named_parameters():
        if "ttt_gate" in name:
            parameter.data.uniform_(0.1, 0.5)
    model.save_pretrained(folder / "small")
    return folder / "small"


def edit_distance(one: list[int], other: list[int]) -> int:
    row = list(range(len(other) + 1))
    for i, x in enumerate(one, start=1):
        previous, row[0] = row[0], i
        for j, y in enumerate(other, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


@torch.no_grad()
def run(path: Path, scheme: str | None, device: str, ids: torch.LongTensor) -> dict:
    model = TTTOmniForCausalLM.from_pretrained(path, device_map=device, **quantization(scheme, path)).eval()
    outputs = model(ids.to(model.device))
    size = sum(x.nbytes for x in [*model.parameters(), *model.buffers()])
    units = model.speak(outputs.last_hidden_state[0]) if model.config.speech_decoder_config is not None else ids[0, :0]
    return {"bytes": size, "logits": outputs.logits[0].float().cpu(), "units": units.tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Compares a quantised model with itself in float.")
    parser.add_argument("--model", metavar="DIR", help="default: a small random one")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--output", default=Path(__file__).parent / "results" / "quantisation.json", metavar="FILE")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        path = make_small(Path(folder)) if arguments.model is None else Path(arguments.model)
        vocab_size = TTTOmniConfig.from_pretrained(path).text_config.vocab_size
        ids = torch.randint(vocab_size // 4, (1, TOKENS), generator=torch.Generator().manual_seed(0))
        results = {scheme or "float": run(path, scheme, arguments.device, ids) for scheme in (None, "int8", "int4")}
    full, rows = results["float"], {}
    print(f"{'':8}{'MB':>8}{'cosine':>10}{'same tokens':>13}{'units changed':>15}")
    for scheme, result in results.items():
        rows[scheme] = {
            "bytes": result["bytes"],
            "cosine": float(torch.cosine_similarity(result["logits"], full["logits"]).mean()),
            "same_tokens": float((result["logits"].argmax(-1) == full["logits"].argmax(-1)).float().mean()),
            "units_changed": edit_distance(result["units"], full["units"]) / max(len(full["units"]), 1),
        }
        row = rows[scheme]
        print(f"{scheme:8}{row['bytes'] / 1e6:8.2f}{row['cosine']:10.4f}", end="")
        print(f"{row['same_tokens']:13.1%}{row['units_changed']:15.1%}")
    Path(arguments.output).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
