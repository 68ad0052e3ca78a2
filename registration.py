# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
# ruff: noqa: F401
"""The public names of the package, and what makes them known to the Auto classes of Transformers."""

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
