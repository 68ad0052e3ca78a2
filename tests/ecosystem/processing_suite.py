# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
Transformers' own processor tests, run on TTT-Omni.

They are in the source release of Transformers, which pip's wheel does not hold, and need Pillow. From the root of this
repository:

    pip install pillow
    python tests/ecosystem/run.py processing

downloads that release (of the version installed) and runs this file inside of it.
"""

import sys
import tempfile
import types
import unittest
from pathlib import Path

import numpy as np
import PIL  # noqa: F401  # without it, the tests skip themselves without a word
import soundfile
import transformers.testing_utils
from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor

import ttt_omni
from ttt_omni.processing_ttt_omni import TTTOmniProcessor


GOLDENS = Path(ttt_omni.__file__).parent / "tests" / "goldens" / "llama_omni_tiny"
AUDIO = tempfile.TemporaryDirectory()


def url_to_local_path(url: str) -> str:
    """A second of noise for each of the recordings that the tests would fetch from the Hub."""
    path = Path(AUDIO.name, url.rsplit("/", 1)[-1]).with_suffix(".wav")
    if not path.exists():
        soundfile.write(path, 0.1 * np.random.default_rng(len(url)).standard_normal(22050), 22050)
    return str(path)


# Nothing that they test uses librosa any more.
transformers.testing_utils.require_librosa = lambda test: test

# A script of Transformers' repository that the release lacks.
sys.modules["fetch_hub_objects_for_ci"] = types.ModuleType("fetch_hub_objects_for_ci")
sys.modules["fetch_hub_objects_for_ci"].url_to_local_path = url_to_local_path

from tests.test_processing_common import ProcessorTesterMixin  # noqa: E402


class TTTOmniProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = TTTOmniProcessor
    # 300 placeholders per audio, and the text around them in the golden tokenizer's short tokens.
    audio_text_kwargs_max_length = 340
    audio_unstructured_max_length = 350

    @classmethod
    def _setup_tokenizer(cls):
        return PreTrainedTokenizerFast.from_pretrained(GOLDENS)

    @classmethod
    def _setup_feature_extractor(cls):
        return WhisperFeatureExtractor(feature_size=128)
