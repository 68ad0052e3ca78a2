# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""TTT-Omni: LLaMA-Omni whose language model remembers by Test-Time Training, made known to the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoProcessor

from .configuration_ttt_omni import (
    TTTOmniConfig,
    TTTOmniSpeechDecoderConfig,
    TTTOmniTextConfig,
    TTTOmniVocoderConfig,
)
from .modeling_ttt_omni import TTTOmniForCausalLM, TTTOmniModel
from .ops_ttt_omni import TTTLinearState, TTTMLPState, ttt_linear, ttt_mlp, use_kernels
from .processing_ttt_omni import TTTOmniProcessor
from .streaming_ttt_omni import iter_sentences


__version__ = "0.1.0"

AutoConfig.register(TTTOmniConfig.model_type, TTTOmniConfig)
AutoModel.register(TTTOmniConfig, TTTOmniModel)
AutoModelForCausalLM.register(TTTOmniConfig, TTTOmniForCausalLM)
AutoModelForMultimodalLM.register(TTTOmniConfig, TTTOmniForCausalLM)
AutoProcessor.register(TTTOmniConfig, TTTOmniProcessor)

# So that what they save carries its code, and loads where this package is not installed.
TTTOmniConfig.register_for_auto_class()
TTTOmniModel.register_for_auto_class("AutoModel")
TTTOmniForCausalLM.register_for_auto_class("AutoModelForCausalLM")
TTTOmniProcessor.register_for_auto_class()


def __getattr__(name: str):
    if name == "ttt_lora_config":  # which loads what only training needs
        from .training import ttt_lora_config

        return ttt_lora_config
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "TTTLinearState",
    "TTTMLPState",
    "TTTOmniConfig",
    "TTTOmniForCausalLM",
    "TTTOmniModel",
    "TTTOmniProcessor",
    "TTTOmniSpeechDecoderConfig",
    "TTTOmniTextConfig",
    "TTTOmniVocoderConfig",
    "iter_sentences",
    "ttt_linear",
    "ttt_lora_config",
    "ttt_mlp",
    "use_kernels",
]
