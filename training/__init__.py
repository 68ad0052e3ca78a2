# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Fine-tuning of TTT-Omni: data, calibration and adapters."""

from .calibration import calibrate, calibrate_folder
from .data import ConversationCollator, ConversationDataset, ManifestError


__all__ = ["ConversationCollator", "ConversationDataset", "ManifestError", "calibrate", "calibrate_folder"]
