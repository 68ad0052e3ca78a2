# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""The language model of a graft as a plain model of Transformers, which GGUF and every server can take."""

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import GenerationConfig

from ..checkpoint import ConversionError, open_checkpoint, write_checkpoint
from ..configuration_ttt_omni import SLIDING_LAYER_TYPES, TTTOmniTextConfig
from ..files_ttt_omni import new_folder
from ..loading import read_config
from ..processing_ttt_omni import PARTS_TO_TEXT, TTTOmniProcessor
from .backbone import SOURCES


def export(model: str | os.PathLike, output: str | os.PathLike, backbone: bool = False) -> None:
    """
    Writes the language model of the graft in the folder `model` as a plain one of its backbone's type: without TTT,
    without windows that have sinks, and without the parts that listen and speak.

    Args:
        output: folder to make.
        backbone: whether TTT is left out although its gates are open, so that the plain model says something else.

    Raises:
        [`ConversionError`]: if the graft is more than its backbone: an open gate, or a layer without attention.
        ValueError: `model` is no TTT-Omni model.
        FileExistsError: `output` is a file, or a folder that is not empty.
    """
    model = Path(model)
    config = read_config(model)
    text = config.text_config
    if "linear_attention" in text.layer_types:
        index = text.layer_types.index("linear_attention")
        raise ConversionError(f"{model}: layer {index} has TTT in the place of attention, which a plain model lacks.")
    tensors = open_checkpoint(model)
    open_gates = [name for name in tensors if name.endswith(".ttt_gate.weight") and tensors[name].read().any()]
    if open_gates and not backbone:
        raise ConversionError(
            f"{model}: the gate `{open_gates[0]}` is open, so that the model without TTT is another one; --backbone "
            "exports that."
        )
    plain = {
        name.replace("model.language_model.", "model.", 1): tensor
        for name, tensor in tensors.items()
        if name.startswith(("model.language_model.", "lm_head.")) and ".ttt" not in name
    }
    _, config_class = SOURCES[text.backbone]
    plain_config = config_class(**_fields(text, config_class.__annotations__.keys()))
    plain_config.architectures = [f"{config_class.__name__.removesuffix('Config')}ForCausalLM"]
    plain_config.dtype = config.dtype

    processor = TTTOmniProcessor.from_pretrained(model)
    tokenizer = processor.tokenizer
    added = PARTS_TO_TEXT.replace("AUDIO_TOKEN", processor.audio_token or "")
    tokenizer.chat_template = processor.chat_template.removeprefix(added)
    dtype = config.dtype or torch.float32
    with new_folder(output) as folder:
        plain_config.save_pretrained(folder)
        GenerationConfig.from_pretrained(model).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_checkpoint(folder, plain, dict.fromkeys(plain, dtype))


def _fields(text: TTTOmniTextConfig, names: Iterable[str]) -> dict:
    """What `names` are in `text`, whose windows count where they have no sinks, as those of plain models."""
    fields = {name: getattr(text, name) for name in names if hasattr(text, name)}
    if "sliding_window" in fields:
        is_plain = text.attention_sinks == 0 and not set(text.layer_types).isdisjoint(SLIDING_LAYER_TYPES)
        fields["sliding_window"] = text.sliding_window if is_plain else None
    if "layer_types" in fields:
        fields["use_sliding_window"] = fields["sliding_window"] is not None
        fields["layer_types"] = [
            "sliding_attention" if fields["use_sliding_window"] and name in SLIDING_LAYER_TYPES else "full_attention"
            for name in text.layer_types
        ]
    return fields
