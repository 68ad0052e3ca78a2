# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""TTT-Omni: LLaMA-Omni whose language model remembers by Test-Time Training, made known to the Auto classes."""

import sys
from importlib import import_module
from pathlib import Path


__version__ = "0.1.0"

# The command line imports PyTorch once it knows what to do: `--help` takes no seconds. Python says `-m` for our
# __main__.py while it looks for it. Where the guess is wrong, the names below make it good at their first use.
_PROGRAM = Path(sys.argv[0]).name if sys.argv else ""
if _PROGRAM not in ("ttt-omni", "-m"):
    from . import registration  # noqa: F401


def __getattr__(name: str):
    if name == "ttt_lora_config":  # which loads what only training needs
        return import_module(".training", __name__).ttt_lora_config
    if name in __all__:
        return getattr(import_module(".registration", __name__), name)
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
