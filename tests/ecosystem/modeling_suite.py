# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
Transformers' own model tests, run on TTT-Omni.

They are in the source release of Transformers, which pip's wheel does not hold. From the root of this repository:

    python tests/ecosystem/run.py modeling

downloads that release (of the version installed) and runs this file inside of it.
"""

import unittest

import torch
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor
from transformers import WhisperConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES
from transformers.testing_utils import torch_device

from ttt_omni import (
    TTTOmniConfig,
    TTTOmniForCausalLM,
    TTTOmniModel,
    TTTOmniSpeechDecoderConfig,
    TTTOmniTextConfig,
    TTTOmniVocoderConfig,
)


# The tests tell by these names which classes have a head and take labels.
MODEL_MAPPING_NAMES["ttt_omni"] = "TTTOmniModel"
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["ttt_omni"] = "TTTOmniForCausalLM"


# These draw ids from the whole vocabulary, or leave out all inputs but the ids.
TESTS_OF_TEXT_ALONE = (
    "test_eager_matches_sdpa_inference",
    "test_model_rope_scaling_from_config",
    "test_recurrent_layers_mask_padding_on_continued_forward",
)


class TTTOmniModelTester:
    """A tiny TTT-Omni whose gate is open, so that TTT takes part in every output."""

    batch_size = 3
    text_length = 7
    audio_length = 6
    audio_token_id = 4
    num_frames = 60
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    vocab_size = 99
    is_training = True

    def __init__(self, parent, text_alone=False):
        self.parent = parent
        if text_alone:
            self.audio_length = 0
        self.seq_length = self.encoder_seq_length = self.audio_length + self.text_length

    def get_config(self):
        llama = {
            "hidden_size": self.hidden_size,
            "intermediate_size": 48,
            "num_attention_heads": self.num_attention_heads,
        }
        config = TTTOmniConfig(
            text_config=TTTOmniTextConfig(
                **llama,
                vocab_size=self.vocab_size,
                num_hidden_layers=self.num_hidden_layers,
                num_key_value_heads=2,
                max_position_embeddings=512,
                layer_types=["full_attention", "hybrid"],
                ttt_mini_batch_size=4,
                ttt_gate_init=0.5,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=3,
            ),
            audio_config=WhisperConfig(
                d_model=16,
                encoder_layers=2,
                encoder_attention_heads=4,
                encoder_ffn_dim=32,
                num_mel_bins=8,
                max_source_positions=self.num_frames // 2,
                dropout=0.0,
                attention_dropout=0.0,
                activation_dropout=0.0,
            ),
            speech_decoder_config=TTTOmniSpeechDecoderConfig(
                **llama,
                input_size=self.hidden_size,
                num_hidden_layers=1,
                upsample_factor=2,
                unit_vocab_size=20,
                max_position_embeddings=512,
            ),
            vocoder_config=TTTOmniVocoderConfig(
                unit_vocab_size=20,
                unit_embed_dim=8,
                duration_predictor_hidden_dim=8,
                upsample_initial_channel=32,
                num_frame_layers=1,
            ),
            audio_token_id=self.audio_token_id,
            projector_hidden_size=24,
        )
        if self.audio_length == 0:
            config.audio_config = config.audio_token_id = None
        return config

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        audio_tokens = torch.full((self.batch_size, self.audio_length), self.audio_token_id, device=torch_device)
        text_tokens = ids_tensor([self.batch_size, self.text_length], self.vocab_size - 5) + 5
        input_ids = torch.cat([text_tokens[:, :1], audio_tokens, text_tokens[:, 1:]], dim=1)
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        if self.audio_length > 0:
            inputs["input_features"] = floats_tensor([self.batch_size, 8, self.num_frames])
        return config, inputs


class TTTOmniModelTest(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (TTTOmniForCausalLM, TTTOmniModel)
    _is_composite = True

    def setUp(self):
        self.model_tester = TTTOmniModelTester(self, text_alone=self._testMethodName.startswith(TESTS_OF_TEXT_ALONE))
        self.config_tester = ConfigTester(
            self, config_class=TTTOmniConfig, has_text_modality=False, common_properties=["audio_token_id"]
        )

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels and model_class is TTTOmniForCausalLM:
            inputs["unit_labels"] = torch.tensor([[3, 4, 5]] * self.model_tester.batch_size, device=torch_device)
        return inputs

    def test_config(self):
        self.config_tester.run_common_tests()
