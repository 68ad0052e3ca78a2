# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Test-Time Training layers grafted onto a Llama: which layers, and the values that they start with."""

import re
import zlib
from collections.abc import Iterable

import torch

from ..checkpoint import ConversionError, LazyTensor
from ..configuration_ttt_omni import TTTOmniTextConfig
from ..layers_ttt_omni import TTTTokenScale


LAYER_TYPES = {"hybrid": "hybrid", "replace": "linear_attention"}
INIT_STD = 0.02  # of the inner model and the learning-rate gate, as in ttt-lm-pytorch


def select_layers(layers: str | Iterable[int] | None, num_layers: int) -> list[int]:
    """
    The layers that ranges and lists such as `"24-31"` or `"0,2,5-7"` name; by default the upper quarter.

    Raises:
        [`ConversionError`]: no such list, or a layer that the model of `num_layers` layers does not have.
    """
    if layers is None:
        return list(range(num_layers - max(1, num_layers // 4), num_layers))
    if isinstance(layers, str):
        ranges = [re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part) for part in layers.split(",")]
        if not all(ranges):
            raise ConversionError(f"The layers {layers!r} are no list of numbers and ranges such as '0,2,5-7'.")
        bounds = [(int(found[1]), int(found[2] or found[1])) for found in ranges]
        empty = [f"{first}-{last}" for first, last in bounds if last < first]
        if empty:
            raise ConversionError(f"The range of layers {empty[0]} runs backwards.")
        outside = [last for _, last in bounds if last >= num_layers]
        layers = () if outside else {layer for first, last in bounds for layer in range(first, last + 1)}
    else:
        layers = set(layers)
        outside = [layer for layer in layers if not 0 <= layer < num_layers]
    if outside:
        raise ConversionError(f"Layer {outside[0]} is outside the model, which has the layers 0-{num_layers - 1}.")
    return sorted(layers)


def fresh_tensor(name: str, shape: tuple[int, ...], mini_batch_size: int = 0, gate: float = 0.0) -> LazyTensor:
    """A parameter to be trained, with the value that it starts with, the same for the same name."""

    def normal():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return torch.empty(shape).normal_(std=INIT_STD, generator=generator)

    if name.endswith("token_scale.weight"):
        return LazyTensor(shape, lambda: TTTTokenScale.initial_weight(mini_batch_size), f"`{name}`")
    if name.endswith("ttt_gate.weight"):
        return LazyTensor(shape, lambda: torch.full(shape, float(gate)), f"`{name}`")
    if re.search(r"norm\w*\.weight$", name):
        return LazyTensor(shape, lambda: torch.ones(shape), f"`{name}`")
    is_weight = name.endswith((".weight", ".W1", ".W2"))
    return LazyTensor(shape, normal if is_weight else lambda: torch.zeros(shape), f"`{name}`")


def graft(
    tensors: dict[str, LazyTensor], config: TTTOmniTextConfig, shapes: dict[str, tuple[int, ...]]
) -> dict[str, LazyTensor]:
    """
    Adds the TTT parameters that `shapes`, those of the grafted model, call for, and drops the attention that it lacks.

    Projections, and norms of queries and keys, start as copies of the layer's attention, k and v repeated for all
    heads; where nothing can be copied the values make TTT remember best before it is trained.

    Args:
        tensors: those of the model without TTT, by the names that they have in it.
    """

    def start(name: str, shape: tuple[int, ...]) -> LazyTensor:
        layer, parameter = re.fullmatch(r"(.+\.layers\.\d+)\.ttt[._](.+)", name).groups()
        copied = tensors.get(f"{layer}.self_attn.{parameter}")
        if copied is None:
            return fresh_tensor(name, shape, config.ttt_mini_batch_size, config.ttt_gate_init)
        return _repeat_heads(copied, config.head_dim, shape[0] // copied.shape[0])

    return {name: tensors[name] if name in tensors else start(name, shape) for name, shape in shapes.items()}


def _repeat_heads(projection: LazyTensor, head_dim: int, repeats: int) -> LazyTensor:
    """Weight `[heads * D, hidden]` or bias `[heads * D]` with each head `repeats` times in a row."""
    if repeats == 1:
        return projection

    def read():
        heads = projection.read().unflatten(0, (-1, head_dim))
        return heads.repeat_interleave(repeats, dim=0).flatten(0, 1)

    return LazyTensor((projection.shape[0] * repeats, *projection.shape[1:]), read, projection.origin)
