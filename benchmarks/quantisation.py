# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
What `--quantize` leaves of a model: its size, and how far its logits, tokens and speech units are from those in float.

    python benchmarks/quantisation.py [--model DIR] [--device cpu]

By default the model is a small random one, whose logits lie closer together than those of a trained one, so that its
figures are worse. All say the same answers to the same questions: tokens are compared position by position, so that
one that differs does not change those after it; units by the edit distance over the length. Each scheme has a process
of its own, whose peak memory is that beyond what it took before it loaded the model. Prints a table, and writes
`benchmarks/results/quantisation.json`.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from reporting import RESULTS, environment, peak_memory, store

from ttt_omni import TTTOmniConfig, TTTOmniForCausalLM, TTTOmniProcessor
from ttt_omni.conversion import make_tiny
from ttt_omni.loading import quantization


ANSWERS = {
    "What is the capital of France?": "The capital of France is Paris.",
    "How many days are there in a week?": "There are seven days in a week, from Monday to Sunday.",
    "What do bees make?": "Bees make honey from the nectar of flowers.",
    "Why is the sky blue?": "The air scatters blue light more than red light, so the sky looks blue to us.",
    "What should I drink when I am tired?": "A glass of water is good, and so is a cup of tea or coffee.",
    "Who wrote Hamlet?": "Hamlet was written by William Shakespeare around the year sixteen hundred.",
    "Can you tell me a short story?": "A small bird was afraid to fly. One day it tried, and it flew.",
    "What is two plus three?": "Two plus three is five.",
}


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
    TTTOmniProcessor.from_pretrained(folder / "tiny").save_pretrained(folder / "small")
    return folder / "small"


def edit_distance(one: list[int], other: list[int]) -> int:
    row = list(range(len(other) + 1))
    for i, x in enumerate(one, start=1):
        previous, row[0] = row[0], i
        for j, y in enumerate(other, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


@torch.no_grad()
def run(path: Path, scheme: str | None, device: str) -> dict:
    processor, before = TTTOmniProcessor.from_pretrained(path), peak_memory()
    model = TTTOmniForCausalLM.from_pretrained(path, device_map=device, **quantization(scheme, path)).eval()
    logits, units = [], []
    for question, answer in ANSWERS.items():
        conversation = [{"role": "user", "content": question}]
        prompt = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=True)
        answer_ids = processor.tokenizer(answer, add_special_tokens=False).input_ids
        outputs = model(torch.tensor([[*torch.tensor(prompt).flatten().tolist(), *answer_ids]], device=model.device))
        said = slice(-len(answer_ids) - 1, None)  # of the token before it to the last, which predicts its end
        logits.append(outputs.logits[0, said].float().cpu())
        units += model.speak(outputs.last_hidden_state[0, said]).tolist()
    size = sum(x.nbytes for x in [*model.parameters(), *model.buffers()])
    peak = torch.cuda.max_memory_allocated() if model.device.type == "cuda" else peak_memory() - before
    return {"bytes": size, "peak": peak, "logits": torch.cat(logits), "units": units}


def main() -> None:
    parser = argparse.ArgumentParser(description="Compares a quantised model with itself in float.")
    parser.add_argument("--model", metavar="DIR", help="default: a small random one")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--output", type=Path, default=RESULTS / "quantisation.json", metavar="FILE")
    arguments = parser.parse_args()
    results = {}
    with TemporaryDirectory() as folder:
        path = make_small(Path(folder)) if arguments.model is None else Path(arguments.model)
        for scheme in (None, "int8", "int4"):
            with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as process:
                results[scheme or "float"] = process.submit(run, path, scheme, arguments.device).result()
    full, rows = results["float"], {}
    print(f"{len(full['logits'])} positions, {len(full['units'])} units")
    print(f"{'':8}{'MB':>8}{'peak MB':>9}{'cosine':>10}{'same tokens':>13}{'units changed':>15}")
    for scheme, result in results.items():
        rows[scheme] = row = {
            "bytes": result["bytes"],
            "peak": result["peak"],
            "cosine": float(torch.cosine_similarity(result["logits"], full["logits"]).mean()),
            "same_tokens": float((result["logits"].argmax(-1) == full["logits"].argmax(-1)).float().mean()),
            "units_changed": edit_distance(result["units"], full["units"]) / max(len(full["units"]), 1),
        }
        print(f"{scheme:8}{row['bytes'] / 1e6:8.1f}{row['peak'] / 1e6:9.1f}{row['cosine']:10.4f}", end="")
        print(f"{row['same_tokens']:13.1%}{row['units_changed']:15.1%}")
    units = len(full["units"])
    store(arguments.output, {**environment("bitsandbytes"), "model": arguments.model, "units": units, "schemes": rows})


if __name__ == "__main__":
    main()
