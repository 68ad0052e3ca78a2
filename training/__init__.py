# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Fine-tuning of TTT-Omni: data, calibration, distillation and adapters."""

from ..layers_ttt_omni import TTT_MODULES_TO_SAVE
from .calibration import calibrate, calibrate_folder
from .data import ConversationCollator, ConversationDataset, ManifestError
from .distillation import layer_matching_loss, logit_matching_loss, make_parent
from .lora import ttt_lora_config, write_adapter_card


__all__ = [
    "TTT_MODULES_TO_SAVE",
    "ConversationCollator",
    "ConversationDataset",
    "ManifestError",
    "calibrate",
    "calibrate_folder",
    "layer_matching_loss",
    "logit_matching_loss",
    "make_parent",
    "ttt_lora_config",
    "write_adapter_card",
]
