# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""fairseq's unit HiFi-GAN (`CodeHiFiGANVocoder`) as a `TTTOmniVocoder`."""

import json
import os
import pickle
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError

from ..configuration_ttt_omni import TTTOmniVocoderConfig
from ..vocoder_ttt_omni import TTTOmniVocoder


# fairseq's name of a field, those of `dur_predictor_params` included, to ours.
_FIELDS = {
    "num_embeddings": "unit_vocab_size",
    "embedding_dim": "unit_embed_dim",
    "var_pred_hidden_dim": "duration_predictor_hidden_dim",
    "var_pred_kernel_size": "variance_predictor_kernel_size",
    "var_pred_dropout": "var_pred_dropout",
    "upsample_initial_channel": "upsample_initial_channel",
    "upsample_rates": "upsample_rates",
    "upsample_kernel_sizes": "upsample_kernel_sizes",
    "resblock_kernel_sizes": "resblock_kernel_sizes",
    "resblock_dilation_sizes": "resblock_dilation_sizes",
    "sampling_rate": "sampling_rate",
}
# Our name of a module to fairseq's; the others differ in `hifi_gan.` alone, or not at all.
_MODULES = {
    "unit_embedding.": "dict.",
    "dur_predictor.conv1.": "dur_predictor.conv1.0.",
    "dur_predictor.conv2.": "dur_predictor.conv2.0.",
    "hifi_gan.upsampler.": "ups.",
    "hifi_gan.": "",
}


def _fairseq_name(name: str) -> str:
    for ours, theirs in _MODULES.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def vocoder_config_from_fairseq(json_path: str | os.PathLike) -> TTTOmniVocoderConfig:
    """
    Reads the JSON that comes with fairseq's unit HiFi-GAN.

    Raises:
        `ValueError`: it is no such JSON, lacks a field, or describes a vocoder of another kind.
    """
    try:
        source = json.loads(Path(json_path).read_text(encoding="utf-8"))
        fields = source | source.get("dur_predictor_params", {})
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{json_path} is not the JSON of a vocoder: {error}") from error
    missing = sorted({*_FIELDS, "encoder_embed_dim"} - fields.keys())
    if missing:
        raise ValueError(f"{json_path} lacks {missing}; a unit vocoder with a duration predictor is needed.")
    for field in ("f0", "multispkr", "embedder_params"):
        if fields.get(field):
            raise ValueError(f"{json_path}: `{field}` is set; a vocoder with pitch or speaker input is not supported.")
    for field, supported in (
        ("resblock", "1"),
        ("model_in_dim", fields["embedding_dim"]),
        ("encoder_embed_dim", fields["embedding_dim"]),
    ):
        if str(fields.get(field, supported)) != str(supported):
            raise ValueError(f"{json_path}: `{field}` is {fields[field]!r}; only {supported!r} is supported here.")
    try:
        return TTTOmniVocoderConfig(**{ours: fields[theirs] for theirs, ours in _FIELDS.items()})
    except (ValueError, StrictDataclassError) as error:
        raise ValueError(f"{json_path}: {' '.join(str(error).split())}") from error


def load_fairseq_vocoder(checkpoint_path: str | os.PathLike, config: TTTOmniVocoderConfig) -> dict[str, torch.Tensor]:
    """
    Reads fairseq's checkpoint, `{"generator": state}`, with weight norm or without.

    Returns:
        The state dict, in float32, of a [`TTTOmniVocoder`] of `config`.

    Raises:
        `ValueError`: it cannot be read, or its tensors are not those that `config` calls for.
    """
    try:
        state = torch.load(checkpoint_path, map_location="cpu", weights_only=True)["generator"]
        state = {name: tensor.float() for name, tensor in state.items()}
    except (RuntimeError, EOFError, pickle.UnpicklingError, LookupError, TypeError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{checkpoint_path} is not a fairseq vocoder, {{'generator': tensors}}: {reason}") from error

    def take(name: str, shape: torch.Size) -> torch.Tensor:
        if name not in state:
            raise ValueError(f"{checkpoint_path} lacks the tensor `{name}`.")
        if state[name].shape != shape:
            raise ValueError(
                f"{checkpoint_path}: `{name}` has the shape {list(state[name].shape)}, expected {list(shape)}."
            )
        return state.pop(name)

    with torch.device("meta"):
        expected = TTTOmniVocoder(config).state_dict()
    tensors = {}
    for name, tensor in expected.items():
        source = _fairseq_name(name)
        if f"{source}_g" in state:  # weight norm
            weight = take(f"{source}_v", tensor.shape)  # [rows, ...]
            norm = torch.linalg.vector_norm(weight, dim=(1, 2), keepdim=True)
            tensors[name] = weight * (take(f"{source}_g", norm.shape) / norm)
        else:
            tensors[name] = take(source, tensor.shape)
    if state:
        raise ValueError(f"{checkpoint_path} has tensors that its JSON does not call for: {sorted(state)[:5]}.")
    return tensors
