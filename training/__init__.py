# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Fine-tuning of TTT-Omni: data, calibration and adapters."""

from .calibration import calibrate, calibrate_folder
from .data import ConversationCollator, ConversationDataset, ManifestError
from .lora import TTT_MODULES_TO_SAVE, ttt_lora_config, write_adapter_card


__all__ = [
    "TTT_MODULES_TO_SAVE",
    "ConversationCollator",
    "ConversationDataset",
    "ManifestError",
    "calibrate",
    "calibrate_folder",
    "ttt_lora_config",
    "write_adapter_card",
]
