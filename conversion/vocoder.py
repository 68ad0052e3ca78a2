# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""fairseq's unit HiFi-GAN (`CodeHiFiGANVocoder`) as a `TTTOmniVocoder`."""

import os
from pathlib import Path

import torch

from ..checkpoint import ConversionError, check_dtype, check_sizes, errors_of, load_pt, read_json, tensors_of
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
        [`ConversionError`]: it is no such JSON, lacks a field, or describes a vocoder of another kind.
    """
    json_path = Path(json_path)
    source = read_json(json_path)
    predictor = source.get("dur_predictor_params", {})
    if not isinstance(predictor, dict):
        raise ConversionError(f"{json_path}: `dur_predictor_params` must be an object, got {predictor!r}.")
    fields = source | predictor
    missing = sorted({*_FIELDS, "encoder_embed_dim"} - fields.keys())
    if missing:
        raise ConversionError(f"{json_path} lacks {missing}; a unit vocoder with a duration predictor is needed.")
    for field in ("f0", "multispkr", "embedder_params"):
        if fields.get(field):
            raise ConversionError(
                f"{json_path}: `{field}` is set; a vocoder with pitch or speaker input is not supported."
            )
    for field, supported in (
        ("resblock", "1"),
        ("model_in_dim", fields["embedding_dim"]),
        ("encoder_embed_dim", fields["embedding_dim"]),
    ):
        if str(fields.get(field, supported)) != str(supported):
            raise ConversionError(
                f"{json_path}: `{field}` is {fields[field]!r}; only {supported!r} is supported here."
            )
    with errors_of(json_path):
        return TTTOmniVocoderConfig(**{ours: fields[theirs] for theirs, ours in _FIELDS.items()})


def load_fairseq_vocoder(checkpoint_path: str | os.PathLike, config: TTTOmniVocoderConfig) -> dict[str, torch.Tensor]:
    """
    Reads fairseq's checkpoint, `{"generator": state}`, with weight norm or without.

    Returns:
        The state dict, in float32, of a [`TTTOmniVocoder`] of `config`.

    Raises:
        [`ConversionError`]: it cannot be read, or its tensors are not those that `config` calls for.
    """
    path = Path(checkpoint_path)
    what = "a fairseq vocoder, {'generator': tensors}"
    state = tensors_of(*load_pt(path, "generator", what=what), path, what)
    check_sizes(_sizes(config), state, path)
    num_convolutions = 2 * len(config.upsample_rates) * sum(map(len, config.resblock_dilation_sizes))
    if num_convolutions > len(state):
        raise ConversionError(
            f"{path} has {len(state)} tensors, too few for the {num_convolutions} convolutions that its JSON's "
            "`resblock_dilation_sizes` call for."
        )

    def take(name: str, shape: torch.Size) -> torch.Tensor:
        if name not in state:
            raise ConversionError(f"{path} lacks the tensor `{name}`.")
        if state[name].shape != shape:
            raise ConversionError(f"{path}: `{name}` has the shape {list(state[name].shape)}, expected {list(shape)}.")
        check_dtype(state[name])
        return state.pop(name).read().float()

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
        raise ConversionError(f"{path} has tensors that its JSON does not call for: {sorted(state)[:5]}.")
    return tensors


def _sizes(config: TTTOmniVocoderConfig) -> dict[str, int]:
    lists = ("upsample_kernel_sizes", "resblock_kernel_sizes")
    sizes = ("unit_vocab_size", "unit_embed_dim", "duration_predictor_hidden_dim", "upsample_initial_channel")
    return {name: max(getattr(config, name)) for name in lists} | {name: getattr(config, name) for name in sizes}
