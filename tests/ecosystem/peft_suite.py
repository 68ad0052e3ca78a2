# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
PEFT's own tests of decoder models, run on TTT-Omni, outside of this repository.

    python tests/ecosystem/peft_suite.py [--source DIR] [pytest arguments]

They are in the source release of PEFT, which is downloaded from PyPI in the version that is installed, or taken from
--source. A tiny model is added to theirs, without speech, which these tests don't have. As PEFT has no default target
modules for its type, those of Llama are set for it (LoRA's are its own).

Three kinds of adapters fail: Shadow takes no model whose text configuration is a part of its configuration, BEFT
cannot merge into a layer without bias (where the model is a Llama, its tests are skipped), and a tuned prefix is a
cache of attention alone, which a model refuses whose memory has not seen these tokens. PEFT 0.21 does not know
Transformers 5.24's `cache` either: where it generates from a tuned prompt (CPT, prompt encoder, prompt tuning), mask
and inputs no longer agree, which we refuse, and which gives a Llama other tokens. And LoRA of some layers
(`layers_to_transform`) without `target_modules` fails to load again, as the default that a model brings with it is a
pattern, beside which PEFT takes no layers: name `target_modules` there. In all other tests nothing fails.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import peft
from run import download

from ttt_omni import TTTOmniConfig, TTTOmniForCausalLM
from ttt_omni.conversion import make_tiny


# Their helpers import `diffusers`, which no test of decoder models uses, and `datasets`, to load some from the Hub.
CONFTEST = """
import importlib.machinery
import sys
import types

import peft.utils.constants
import pytest
import ttt_omni

for name in ("diffusers", "datasets"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
sys.modules["diffusers"].StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
sys.modules["datasets"].load_dataset = lambda *args, **kwargs: pytest.skip("needs a data set of the Hub")

for name, mapping in vars(peft.utils.constants).items():
    if name.startswith("TRANSFORMERS_MODELS_TO_") and "llama" in mapping:
        mapping["ttt_omni"] = mapping["llama"]
"""


def write_text_model(folder: Path) -> None:
    """The tiny model without encoder, speech decoder and vocoder, its gate open so that TTT takes part."""
    make_tiny(folder)
    config = TTTOmniConfig.from_pretrained(folder)
    config.audio_config = config.speech_decoder_config = config.vocoder_config = None
    config.eos_token_id = config.text_config.eos_token_id  # which PEFT's tests read where text models have it
    model = TTTOmniForCausalLM.from_pretrained(folder, config=config)
    for layer in model.model.language_model.layers:
        if hasattr(layer, "ttt_gate"):
            layer.ttt_gate.weight.data.fill_(0.5)
    model.save_pretrained(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="an unpacked source release of PEFT")
    arguments, pytest_arguments = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        work = folder / "work"
        shutil.copytree((arguments.source or download(peft, folder)) / "tests", work / "tests")
        model = folder / "tiny-ttt-omni"
        write_text_model(model)
        (work / "tests" / "__init__.py").touch()
        (work / "tests" / "conftest.py").write_text(CONFTEST)
        suite = work / "tests" / "test_decoder_models.py"
        models = "PEFT_DECODER_MODELS_TO_TEST = [\n"
        suite.write_text(suite.read_text().replace(models, f'{models}    "{model}",\n'))
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--rootdir", str(work), str(suite)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        return subprocess.run([*command, "-k", model.name, *pytest_arguments], cwd=work, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
