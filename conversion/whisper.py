# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Whisper's encoder, of OpenAI, Transformers or CTranslate2, as the tensors of a `WhisperEncoder`."""

import math
import re
import struct
from pathlib import Path

import numpy as np
import torch
from transformers import WhisperConfig
from transformers.utils import logging

from ..checkpoint import (
    ConversionError,
    LazyTensor,
    check_dtype,
    check_layers,
    check_sizes,
    errors_of,
    load_pt,
    open_checkpoint,
    read_json,
    tensors_of,
)


logger = logging.get_logger(__name__)

# What of Transformers' `WhisperConfig` says how the encoder is built.
_SIZES = ("num_mel_bins", "max_source_positions", "d_model", "encoder_attention_heads", "encoder_ffn_dim")
_FIELDS = (
    *_SIZES,
    "encoder_layers",
    "encoder_layerdrop",
    "activation_function",
    "activation_dropout",
    "attention_dropout",
    "dropout",
    "init_std",
    "scale_embedding",
)
_DIMS = ("n_mels", "n_audio_ctx", "n_audio_state", "n_audio_head", "n_audio_layer")
_MODULES = {
    "positional_embedding": "embed_positions.weight",
    "conv1": "conv1",
    "conv2": "conv2",
    "ln_post": "layer_norm",
}
_BLOCK_MODULES = {
    "attn.query": "self_attn.q_proj",
    "attn.key": "self_attn.k_proj",
    "attn.value": "self_attn.v_proj",
    "attn.out": "self_attn.out_proj",
    "attn_ln": "self_attn_layer_norm",
    "mlp.0": "fc1",
    "mlp.2": "fc2",
    "mlp_ln": "final_layer_norm",
}
# CTranslate2's file, its dtypes by their number, and what it calls the modules of a layer and of the encoder.
_CT2_FILE = "model.bin"
_CT2_DTYPES = {
    0: ("F32", torch.float32),
    1: ("I8", torch.int8),
    2: ("I16", torch.int16),
    3: ("I32", torch.int32),
    4: ("F16", torch.float16),
    5: ("BF16", torch.bfloat16),
}
_CT2_MODULES = {
    "position_encodings": "embed_positions",
    "self_attention/layer_norm": "self_attn_layer_norm",
    "self_attention/linear_1": "self_attn.out_proj",
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
}
_CT2_PARAMETERS = {"gamma": "weight", "beta": "bias", "encodings": "weight"}


def open_whisper(path: Path) -> tuple[WhisperConfig, dict[str, LazyTensor]]:
    """
    Config and encoder tensors of OpenAI's file (`{"dims", "model_state_dict"}`), of a folder of Transformers, or of
    CTranslate2 (as faster-whisper has them: a folder with `model.bin`, or that file).
    """
    if not path.exists():
        raise ConversionError(f"The Whisper encoder {path} does not exist.")
    if path.name == _CT2_FILE:
        return _open_ctranslate2(path)
    if not path.is_dir():
        return _open_openai(path)
    is_ctranslate2 = (path / _CT2_FILE).is_file() and not any(path.glob("*.safetensors*"))
    return _open_ctranslate2(path / _CT2_FILE) if is_ctranslate2 else _open_hugging_face(path)


def _open_hugging_face(folder: Path) -> tuple[WhisperConfig, dict[str, LazyTensor]]:
    values = read_json(folder / "config.json")
    if values.get("model_type") != "whisper":
        raise ConversionError(f"{folder} holds no Whisper model but `model_type` {values.get('model_type')!r}.")
    tensors = open_checkpoint(folder)
    prefixes = ("model.encoder.", "encoder.")  # of WhisperForConditionalGeneration and of WhisperModel
    prefix = next((prefix for prefix in prefixes if any(name.startswith(prefix) for name in tensors)), "")
    encoder = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
    with errors_of(folder / "config.json"):
        config = WhisperConfig(**{name: values[name] for name in _FIELDS if name in values})
    check_sizes({name: getattr(config, name) for name in _SIZES}, encoder, folder / "config.json")
    check_layers(config.encoder_layers, encoder, "layers.", f"{folder}/config.json: `encoder_layers`")
    return config, encoder


def _open_openai(path: Path) -> tuple[WhisperConfig, dict[str, LazyTensor]]:
    what = "a Whisper checkpoint in OpenAI's format"
    dims, state = load_pt(path, "dims", "model_state_dict", what=what)
    for field in _DIMS:
        if type(dims.get(field)) is not int or dims[field] < 1:
            raise ConversionError(f"{path} is not {what}: `{field}` in its `dims` is {dims.get(field)!r}.")
    tensors = tensors_of(state, path, what)
    tensors = {name.removeprefix("encoder."): x for name, x in tensors.items() if name.startswith("encoder.")}
    check_sizes({field: dims[field] for field in _DIMS[:-1]}, tensors, path)
    check_layers(dims["n_audio_layer"], tensors, "blocks.", f"{path}: `n_audio_layer`")
    return _config(*(dims[field] for field in _DIMS)), rename_openai_encoder(tensors)


def _open_ctranslate2(path: Path) -> tuple[WhisperConfig, dict[str, LazyTensor]]:
    what = "a Whisper checkpoint in CTranslate2's format"
    try:
        spec, variables = _read_ctranslate2(path)
        if spec != "WhisperSpec":
            raise ValueError(f"it holds a {spec[:40]!r}")
        variables = {name.removeprefix("encoder/"): x for name, x in variables.items() if name.startswith("encoder/")}
        n_head = int(variables.pop("num_heads").read())
        _, n_mels, _ = variables["conv1/weight"].shape
        n_ctx, n_state = variables["position_encodings/encodings"].shape
    except (OSError, LookupError, ValueError, RuntimeError, struct.error) as error:
        raise ConversionError(f"{path} is not {what}: {error}") from error
    tensors = {}
    for name, tensor in variables.items():
        if not tensor.shape:  # what says how to run it
            continue
        check_dtype(tensor)
        layer, module, parameter = re.fullmatch(r"(?:layer_(\d+)/)?(.*?)/?(\w*)", name).groups()
        prefix = f"layers.{layer}." if layer else ""
        parameter = _CT2_PARAMETERS.get(parameter, parameter)
        if module == "self_attention/linear_0":
            for i, part in enumerate("qkv"):
                # Keys have no bias: one added to all scores of a query, and to no effect.
                if (part, parameter) != ("k", "bias"):
                    tensors[f"{prefix}self_attn.{part}_proj.{parameter}"] = _third(tensor, i)
        else:
            tensors[f"{prefix}{_CT2_MODULES.get(module, module)}.{parameter}"] = tensor
    layers = {name.split(".")[1] for name in tensors if name.startswith("layers.")}
    check_sizes({"num_heads": n_head}, tensors, path)
    return _config(n_mels, n_ctx, n_state, n_head, len(layers)), tensors


def _third(tensor: LazyTensor, index: int) -> LazyTensor:
    rows = tensor.shape[0] // 3
    return LazyTensor((rows, *tensor.shape[1:]), lambda: tensor.read().split(rows)[index], tensor.origin, tensor.dtype)


def _read_ctranslate2(path: Path) -> tuple[str, dict[str, LazyTensor]]:
    """
    The name of the model's kind, and its variables. The file: a version, that name and its revision, the number of
    variables, and of each its name, rank, shape, dtype, number of bytes and these. Names come with their length.
    """

    def number(form: str) -> int:
        (value,) = struct.unpack(f"<{form}", file.read(struct.calcsize(form)))
        return value

    def text() -> str:
        return file.read(number("H")).decode().removesuffix("\0")

    def reader(offset, size, dtype, shape):
        return lambda: torch.from_numpy(np.fromfile(path, np.uint8, size, offset=offset)).view(dtype).view(shape)

    variables, end = {}, path.stat().st_size
    with open(path, "rb") as file:
        version = number("I")
        if not 4 <= version <= 6:  # in which the format is this
            raise ValueError(f"its version is {version}, not 4 to 6")
        spec, _ = text(), number("I")
        for _ in range(number("I")):
            name = text()
            shape = tuple(number("I") for _ in range(number("B")))
            (dtype_name, dtype), size = _CT2_DTYPES[number("B")], number("I")
            offset = file.tell()
            if size != math.prod(shape) * dtype.itemsize or offset + size > end:
                raise ValueError(f"{name!r} of shape {list(shape)} is not whole; download it again")
            variables[name] = LazyTensor(shape, reader(offset, size, dtype, shape), f"`{name}` in {path}", dtype_name)
            file.seek(size, 1)
    return spec, variables


def open_openai_encoder(tensors: dict[str, LazyTensor], source: Path) -> tuple[WhisperConfig, dict[str, LazyTensor]]:
    """The same for an encoder without dims, as checkpoints of LLaMA-Omni hold it, in OpenAI's names."""
    try:
        _, n_mels, _ = tensors["conv1.weight"].shape
        n_ctx, n_state = tensors["positional_embedding"].shape
    except (KeyError, ValueError) as error:
        raise ConversionError(
            f"{source}: `model.speech_encoder.*` is no Whisper encoder ({error}); give one with --whisper."
        ) from error
    if n_state % 64:
        raise ConversionError(
            f"{source}: the Whisper encoder inside is {n_state} wide, no multiple of 64, which does not tell its "
            "number of heads; give its own file with --whisper."
        )
    logger.warning(
        f"The Whisper encoder inside {source} does not tell its number of heads: {n_state // 64} of width 64 are "
        "assumed, as in all of OpenAI's. If it differs, give its own file with --whisper."
    )
    blocks = {name.split(".")[1] for name in tensors if name.startswith("blocks.")}
    return _config(n_mels, n_ctx, n_state, n_state // 64, len(blocks)), rename_openai_encoder(tensors)


def _config(n_mels: int, n_ctx: int, n_state: int, n_head: int, n_layer: int) -> WhisperConfig:
    return WhisperConfig(
        num_mel_bins=n_mels,
        max_source_positions=n_ctx,
        d_model=n_state,
        encoder_attention_heads=n_head,
        encoder_layers=n_layer,
        encoder_ffn_dim=4 * n_state,
    )


def rename_openai_encoder(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """OpenAI's names of the encoder's tensors as those of `WhisperEncoder`; names that it lacks stay as they are."""

    def rename(name):
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name)
        if block:
            return f"layers.{block[1]}.{_BLOCK_MODULES.get(block[2], block[2])}.{block[3]}"
        module, dot, parameter = name.partition(".")
        return _MODULES.get(module, module) + dot + parameter

    renamed = {}
    for name, tensor in tensors.items():
        if (other := renamed.setdefault(rename(name), tensor)) is not tensor:
            raise ConversionError(f"{tensor.origin} is the same tensor as {other.origin}.")
    return renamed
