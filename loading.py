# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""What is to be known of a model and a device before anything is loaded, which takes minutes for a large one."""

import os

import torch
from transformers import BitsAndBytesConfig

from .configuration_ttt_omni import TTTOmniConfig


# Activations above it are computed with as they are: all, for with bitsandbytes' default of 6 twice as many units of a
# small model's speech change.
INT8_THRESHOLD = 1e-4


def read_config(model: str | os.PathLike) -> TTTOmniConfig:
    """
    The configuration of `model`, a folder or a repository on the Hub.

    Raises:
        ValueError: if there is none, or that of another architecture.
    """
    try:
        config, _ = TTTOmniConfig.get_config_dict(model)
    except OSError:
        config = {}
    if not config:
        raise ValueError(f"The model {model} is neither a folder with a config.json nor found on the Hub.")
    if config.get("model_type") != TTTOmniConfig.model_type:
        raise ValueError(f"{model} is no TTT-Omni model but {config.get('model_type')!r}: see `ttt-omni convert`.")
    return TTTOmniConfig.from_dict(config)


def quantization(scheme: str | None, model: str | os.PathLike, dtype: str = "auto") -> dict:
    """
    What `from_pretrained` is told so that a model is loaded with the weights of its projections as integers.

    Args:
        scheme: "int8", "int4" (NormalFloat, of 64 weights with one scale), or `None` for the weights as they are.
        model: folder, or repository on the Hub.
        dtype: to compute in; "auto" for that of the files.

    Raises:
        ValueError: for another scheme.
    """
    if scheme is None:
        return {}
    if scheme == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=INT8_THRESHOLD)
        return {"quantization_config": config}
    if scheme != "int4":
        raise ValueError(f"A model is quantised to int8 or int4, not {scheme!r}.")
    if dtype == "auto":
        dtype = read_config(model).dtype or torch.float32
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": config}


def find_device(name: str = "auto") -> torch.device:
    """
    The device called `name`, once it is known to be there; "auto" is an accelerator if there is one, or else the CPU.

    Raises:
        ValueError: if it cannot be used.
    """
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        torch.empty(1, device=name).cpu()
    except (RuntimeError, AssertionError) as error:  # the latter without CUDA
        raise ValueError(f"The device {name!r} cannot be used: {str(error).partition(chr(10))[0]}") from error
    return torch.device(name)
