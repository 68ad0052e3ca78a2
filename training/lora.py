# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Adapters of PEFT for the layers that hold a memory."""

from typing import TYPE_CHECKING, Any

from ..modeling_ttt_omni import TTTOmniForCausalLM


if TYPE_CHECKING:
    from peft import LoraConfig


# What of TTT is no projection, and small: trained and saved as it is.
TTT_MODULES_TO_SAVE = ("inner_model", "inner_norm", "lr_gate", "post_norm", "token_scale", "ttt_gate")


def ttt_lora_config(model: TTTOmniForCausalLM, rank: int = 16, **kwargs: Any) -> "LoraConfig":
    """
    The recommended adapter: LoRA on all projections of the layers that have TTT, and TTT's small modules in full.

    The layers below, encoder and speech decoder stay as they are, so that no gradient runs through them.

    Args:
        model: a graft.
        rank: of LoRA.
        kwargs: further arguments of [`peft.LoraConfig`], such as `use_dora=True`; they win over those set here.

    Raises:
        ValueError: if the model has no TTT.
    """
    from peft import LoraConfig  # an optional dependency

    layers = [index for index, layer in enumerate(model.model.language_model.layers) if hasattr(layer, "ttt")]
    if not layers:
        raise ValueError("There is nothing to adapt: no layer of the model has TTT.")
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    indices = "|".join(map(str, layers))
    values = {
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": rf"model\.language_model\.layers\.({indices})\.(self_attn|mlp|ttt)\.\w+_proj",
        "modules_to_save": [name for name in TTT_MODULES_TO_SAVE if name in names],
    }
    return LoraConfig(**(values | kwargs))
