# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Conversion of LLaMA-Omni and Llama 3 checkpoints to TTT-Omni."""

from ..checkpoint import ConversionError
from .llama_omni import convert_llama_omni
from .tiny import make_tiny


__all__ = ["ConversionError", "convert_llama_omni", "make_tiny"]
