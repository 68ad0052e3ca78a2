# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""TTT-Omni: LLaMA-Omni with Test-Time Training layers, as an installed package known to Transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoProcessor

from .configuration_ttt_omni import (
    TTTOmniConfig,
    TTTOmniSpeechDecoderConfig,
    TTTOmniTextConfig,
    TTTOmniVocoderConfig,
)
from .ops_ttt_omni import TTTLinearState, TTTMLPState, ttt_linear, ttt_mlp


AutoConfig.register(TTTOmniConfig.model_type, TTTOmniConfig)
TTTOmniConfig.register_for_auto_class()
try:
    from .modeling_ttt_omni import TTTOmniForCausalLM, TTTOmniModel

    AutoModel.register(TTTOmniConfig, TTTOmniModel)
    AutoModelForCausalLM.register(TTTOmniConfig, TTTOmniForCausalLM)
    AutoModelForMultimodalLM.register(TTTOmniConfig, TTTOmniForCausalLM)
    TTTOmniModel.register_for_auto_class("AutoModel")
    TTTOmniForCausalLM.register_for_auto_class("AutoModelForCausalLM")
except ImportError:
    pass
try:
    from .processing_ttt_omni import TTTOmniProcessor

    AutoProcessor.register(TTTOmniConfig, TTTOmniProcessor)
    TTTOmniProcessor.register_for_auto_class()
except ImportError:
    pass
