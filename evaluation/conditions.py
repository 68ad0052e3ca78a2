# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""The same model with and without its parts, and what it takes to run any other through the same measurement."""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..cache_ttt_omni import OwnedTensorsMixin, add_ttt_layers, snapshot
from ..configuration_ttt_omni import SLIDING_LAYER_TYPES
from ..layers_ttt_omni import TTTOmniTTT
from ..loading import find_device
from ..modeling_ttt_omni import TTTOmniForCausalLM
from ..training.distillation import make_parent
from ..training.lora import base_of, load_merged


CHUNK_SIZE = 512  # tokens of a pass
BYTES_AT_ONCE = 2**29  # of copies of a cache, on which questions are asked together
# What is compared, and in which words.
CONDITIONS = {
    "model": "the model as it is",
    "window": "without TTT",
    "ring": "without TTT and sinks",
    "full": "full attention",
}


def load(
    model: str | os.PathLike, dtype: str = "auto", device: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Any causal language model that Transformers loads, or an adapter of one, and its tokenizer.

    Raises:
        ValueError, OSError: if there is none.
    """
    kwargs = {"dtype": dtype, "device_map": find_device(device)}
    if Path(model, "adapter_config.json").is_file():
        return load_merged(model, **kwargs).eval(), AutoTokenizer.from_pretrained(base_of(model))
    found = AutoModelForCausalLM.from_pretrained(model, **kwargs)
    return found.eval(), AutoTokenizer.from_pretrained(model)


def conditions_of(model: PreTrainedModel) -> list[str]:
    """Those of `CONDITIONS` in which it can run."""
    if not isinstance(model, TTTOmniForCausalLM):
        return ["model"]
    layer_types = set(model.config.text_config.layer_types)
    if "linear_attention" in layer_types:
        return ["model"]
    is_sliding = bool(layer_types & set(SLIDING_LAYER_TYPES))
    return ["model", "window", "ring", "full"] if is_sliding else ["model", "window"]


@contextmanager
def under(condition: str, model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """
    The model in one of its conditions, which it leaves again.

    Raises:
        ValueError: for another.
    """
    if condition not in conditions_of(model):
        known = ", ".join(conditions_of(model))
        raise ValueError(f"{condition!r} is no condition of this model: choose from {known}.")
    if condition == "full":
        yield make_parent(model)
        return
    if condition == "model":
        yield model
        return
    text_model = model.model.language_model
    sinks = text_model.config.attention_sinks
    configs = {id(config): config for config in (model.config.text_config, text_model.config)}.values()
    gates = [layer.ttt_gate for layer in text_model.layers if hasattr(layer, "ttt_gate")]
    handles = [gate.register_forward_hook(lambda *args: torch.zeros_like(args[-1])) for gate in gates]
    if condition == "ring":
        _set_sinks(text_model, configs, 0)
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()
        _set_sinks(text_model, configs, sinks)


def _set_sinks(text_model: nn.Module, configs, sinks: int) -> None:
    for config in configs:
        config.attention_sinks = sinks
    if text_model.has_sliding_layers:
        text_model.sliding_rotary_emb.max_distance = text_model.config.sliding_window + sinks - 1


def state_alone(model: PreTrainedModel, cache: Cache) -> Cache:
    """A cache with the TTT states of `cache`, and nothing that attention could see."""
    alone = DynamicCache()
    add_ttt_layers(alone, model.config.get_text_config())
    for layer, old in zip(alone.layers, cache.layers):
        layer.ttt_state = None if old.ttt_state is None else old.ttt_state.clone()
    return alone


def has_ttt(model: PreTrainedModel) -> bool:
    """Whether there is a state that could be alone."""
    return any(isinstance(module, TTTOmniTTT) for module in model.modules())


def max_length(model: PreTrainedModel, condition: str) -> float:
    """Tokens that it is made for; more have a meaning only where every layer has a window, or TTT alone."""
    text = model.config.get_text_config()
    layer_types = set(getattr(text, "layer_types", None) or ["full_attention"])
    is_bounded = not layer_types & {"full_attention", "hybrid"}
    if isinstance(model, TTTOmniForCausalLM) and condition != "full" and is_bounded:
        return float("inf")
    return getattr(text, "max_position_embeddings", None) or float("inf")


@torch.no_grad()
def read(
    model: PreTrainedModel, input_ids: torch.Tensor, cache: Cache, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """
    The logits `[B, V]` after `input_ids` `[B, T]`, which `cache` takes up piece by piece.

    Args:
        attention_mask: `[B, past + T]`, 0 for padding.
    """
    input_ids, end = input_ids.to(model.device), 0 if attention_mask is None else -input_ids.shape[1]
    for piece in input_ids.split(CHUNK_SIZE, dim=1):
        kwargs = {}
        if attention_mask is not None:
            end += piece.shape[1]
            kwargs["attention_mask"] = attention_mask[:, : end or None].to(model.device)
        logits = model(input_ids=piece, cache=cache, use_cache=True, logits_to_keep=1, **kwargs).logits
    return logits[:, -1]


@torch.no_grad()
def answer(
    model: PreTrainedModel, questions: list[list[int]], cache: Cache, new_tokens: int, eos_token_id: int | None
) -> list[list[int]]:
    """
    What is said greedily after each of the questions, each on a copy of `cache` of one row: at most so many tokens, of
    which those after `eos_token_id` mean nothing.

    Questions of a model of ours go in one pass, with padding between the cache and those that are shorter, which
    changes nothing; those of others where they are of the same length, as what padding does to them is not known.
    """
    answers, at_once = {}, max(1, BYTES_AT_ONCE // max(1, num_bytes(cache)))
    numbers = sorted(range(len(questions)), key=lambda number: len(questions[number]))
    is_ours = isinstance(model, TTTOmniForCausalLM)
    groups = [numbers] if is_ours else [list(group) for _, group in groupby(numbers, lambda n: len(questions[n]))]
    for group in groups:
        for start in range(0, len(group), at_once):
            rows = group[start : start + at_once]
            asked, copied = [questions[row] for row in rows], copies(cache, len(rows))
            answers |= zip(rows, _answer_rows(model, asked, copied, new_tokens, eos_token_id))
    return [answers[number] for number in range(len(questions))]


def _answer_rows(model, questions, cache, new_tokens, eos_token_id):
    longest, past = max(map(len, questions)), cache.get_seq_length()
    padding = [longest - len(question) for question in questions]
    ids = torch.tensor([question[:1] * columns + question for columns, question in zip(padding, questions)])
    mask = None
    if any(padding):
        mask = torch.ones(len(ids), past + longest, dtype=torch.long)
        for row, columns in enumerate(padding):
            mask[row, past : past + columns] = 0
    said = []
    while len(said) < new_tokens:
        said.append(read(model, ids, cache, mask).argmax(-1))
        if eos_token_id is not None and (torch.stack(said) == eos_token_id).any(0).all():
            break
        ids = said[-1][:, None]
        mask = None if mask is None else torch.nn.functional.pad(mask, (0, 1), value=1)
    return torch.stack(said, dim=1).tolist()


def copies(cache: Cache, rows: int = 1) -> Cache:
    """A copy of `cache`, which has one row, with so many."""
    is_ours = all(isinstance(layer, OwnedTensorsMixin) for layer in cache.layers)
    cache = snapshot(cache) if is_ours else copy.deepcopy(cache)
    if rows > 1:
        cache.batch_repeat_interleave(rows)
    return cache


def num_bytes(cache: Cache) -> int:
    """Of all that it holds."""
    held = [layer.tensors() if isinstance(layer, OwnedTensorsMixin) else vars(layer) for layer in cache.layers]
    return sum(x.nbytes for tensors in held for x in tensors.values() if isinstance(x, torch.Tensor))


def empty_cache(model: PreTrainedModel) -> Cache:
    """One to begin with."""
    return DynamicCache(config=model.config)
