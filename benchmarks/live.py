# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
What a prompt and a token cost a graft, beside its parent: their steps take turns, in one run.

    python benchmarks/live.py weights --model parent=SmolLM2 --model hybrid=GRAFT --model windowed=GRAFT
    python benchmarks/live.py shapes        one layer of Llama-3.1-8B's shapes of each kind, weights random and shared

The first model is what the others are compared with. A step of decoding is one token of one row, its argmax taken.
Prints a table and writes benchmarks/results/live_<name>.json. Ratios are what to read: medians of the ratios of steps
that stood beside each other. Time of the processor is that of one thread where `--threads 1`, and of all otherwise.
"""

import argparse
import gc
import statistics
import time

import torch
from reporting import RESULTS, environment, store
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from ttt_omni import TTTOmniConfig, TTTOmniForCausalLM


PREFILL_LIMIT = 2048  # a longer past is made of copies of a shorter one: what a step costs depends on its length alone
SHAPES = {
    "vocab_size": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
}
KINDS = {
    "hybrid": {"layer_types": ["hybrid"]},
    "windowed": {"layer_types": ["sliding_attention"], "sliding_window": 1024},
    "hybrid, windowed": {"layer_types": ["hybrid_sliding"], "sliding_window": 1024},
}


class Ops(TorchDispatchMode):
    """Counts operators: those that compute something, views left out."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def load(path: str, dtype: torch.dtype) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def layers_of_shapes(dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    """Llama's layer, and ours on the same weights."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        models = {"parent": LlamaForCausalLM(LlamaConfig(**SHAPES)).eval()}
        for name, kind in KINDS.items():
            config = TTTOmniConfig(
                text_config={**SHAPES, **kind}, audio_config=None, speech_decoder_config=None, vocoder_config=None
            )
            model = TTTOmniForCausalLM(config).eval()
            weights = {
                key.replace("model.", "model.language_model.", 1): x
                for key, x in models["parent"].state_dict().items()
            }
            model.load_state_dict(weights, strict=False, assign=True)
            models[name] = model
            gc.collect()
    finally:
        torch.set_default_dtype(before)
    return models


def clock() -> tuple[float, float]:
    """Wall and processor time."""
    return time.perf_counter(), time.process_time()


class Conversation:
    """A model at some length of its past, which a step of decoding makes one token longer."""

    def __init__(self, model: torch.nn.Module, vocab_size: int):
        self.model, self.vocab_size = model, vocab_size

    def prefill(self, length: int) -> tuple[float, float]:
        self.cache = None
        gc.collect()
        generator = torch.Generator().manual_seed(length)
        tokens = torch.randint(0, self.vocab_size, (1, length), generator=generator)
        self.cache, wall, processor = DynamicCache(config=self.model.config), *clock()
        self.token = self._run(tokens)
        return tuple(now - then for now, then in zip(clock(), (wall, processor)))

    def stretch(self, times: int) -> None:
        """As many copies of the past in the place of itself, where all of it is kept."""
        length = self.cache.get_seq_length()
        for layer in self.cache.layers:
            if type(layer).__module__.startswith("transformers"):
                layer.keys, layer.values = (x.repeat(1, 1, times, 1) for x in (layer.keys, layer.values))
                continue
            tensors = layer.tensors()
            names = [name for name in ("keys", "values") if name in tensors and "places" not in tensors]
            tensors |= {name: tensors[name].repeat(1, 1, times, 1) for name in names}
            layer.load(tensors, times * length)

    def step(self) -> tuple[float, float]:
        wall, processor = clock()
        self.token = self._run(self.token)
        return tuple(now - then for now, then in zip(clock(), (wall, processor)))

    def operators(self) -> int:
        with Ops() as ops:
            self._run(self.token)
        return ops.count

    @torch.no_grad()
    def _run(self, tokens):
        logits = self.model(tokens, cache=self.cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1, keepdim=True)


def compare(models: dict[str, torch.nn.Module], lengths: list[int], steps: int, prefills: int) -> list[dict]:
    rows = []
    vocab_size = min(model.get_input_embeddings().num_embeddings for model in models.values())
    for length in lengths:
        conversations = {name: Conversation(model, vocab_size) for name, model in models.items()}
        prefill, decode = ({name: [] for name in models} for _ in range(2))
        filled = min(length, PREFILL_LIMIT)
        for _ in range(prefills):
            for name, conversation in conversations.items():
                prefill[name].append(conversation.prefill(filled))
        for conversation in conversations.values():
            if length > filled:
                conversation.stretch(length // filled)
            for _ in range(3):
                conversation.step()
        names = list(conversations)
        for step in range(steps):
            for name in names[step % len(names) :] + names[: step % len(names)]:
                decode[name].append(conversations[name].step())
        first = names[0]
        for name, conversation in conversations.items():
            row = {"T": length, "model": name, "operators": conversation.operators()}
            for kind, times in (("decode", decode), ("prefill", prefill)):
                if kind == "prefill" and length > filled:
                    continue
                for clock_index, unit in enumerate(("wall", "processor")):
                    own, parents = ([x[clock_index] for x in times[key]] for key in (name, first))
                    row[f"{kind}, {unit} ms"] = 1000 * statistics.median(own)
                    row[f"{kind}, {unit} ratio"] = statistics.median(a / b for a, b in zip(own, parents))
            rows.append(row)
            print_row(row)
    return rows


def print_row(row: dict) -> None:
    print(" | ".join(f"{key}: {value:.4g}" if isinstance(value, float) else f"{value}" for key, value in row.items()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=("weights", "shapes"))
    parser.add_argument("--model", action="append", default=[], help="NAME=FOLDER, the parent first")
    parser.add_argument("--lengths", default="64,256,2048,16384")
    parser.add_argument("--steps", type=int, default=60, help="tokens of each model at each length")
    parser.add_argument("--prefills", type=int, default=3, help="prompts of each model at each length")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", help="another name than that of the benchmark")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    if arguments.benchmark == "shapes":
        models = layers_of_shapes(dtype)
    else:
        models = {name: load(path, dtype) for name, path in (pair.split("=", 1) for pair in arguments.model)}
    rows = compare(models, [int(x) for x in arguments.lengths.split(",")], arguments.steps, arguments.prefills)
    result = {"environment": {**environment(), "dtype": arguments.dtype}, "steps": arguments.steps, "rows": rows}
    store(RESULTS / f"live_{arguments.output or arguments.benchmark}.json", result)
