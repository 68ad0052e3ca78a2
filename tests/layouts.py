# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Layouts of layers that the tests run on, small models of them, prompts for them, and another tokenizer."""

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ttt_omni import TTTOmniConfig, TTTOmniForCausalLM, TTTOmniTextConfig


LAYERS = {
    "full": {"layer_types": ["full_attention"] * 4},
    "hybrid": {"layer_types": ["full_attention", "full_attention", "hybrid", "hybrid"]},
    "replace": {"layer_types": ["full_attention", "hybrid", "linear_attention", "linear_attention"]},
    "mixed": {
        "layer_types": ["hybrid", "linear_attention", "hybrid", "linear_attention"],
        "ttt_layer_type": ["linear", "mlp", "mlp", "linear"],
        "ttt_rope_theta": 100.0,
        "ttt_qk_norm": "l2",
    },
    "windowed": {
        "layer_types": ["hybrid_sliding", "sliding_attention", "hybrid_sliding", "linear_attention"],
        "sliding_window": 9,
        "attention_sinks": 2,
    },
    "gated": {
        "layer_types": ["hybrid_sliding", "sliding_attention", "hybrid_sliding", "linear_attention"],
        "sliding_window": 9,
        "attention_sinks": 2,
        "ttt_head_gate": True,
        "ttt_lr_activation": "hardsigmoid",
        "ttt_divide_repeats": True,
    },
    "ttt": {"layer_types": ["linear_attention"] * 4},
}
WITH_MLP = ("hybrid", "replace", "windowed", "ttt")
LAYERS |= {f"{name}_mlp": {**LAYERS[name], "ttt_layer_type": "mlp"} for name in WITH_MLP}


def expand(model, ids):
    """`ids` with each -200 as 300 audio placeholders."""
    audio = [model.config.audio_token_id] * 300
    return torch.tensor([[x for i in ids.tolist() for x in (audio if i == -200 else [i])]])


def random_rows(seed, lengths):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(10, 380, (length,), generator=generator) for length in lengths]


def pad(rows, side):
    length = max(len(row) for row in rows)
    input_ids, attention_mask = torch.full((len(rows), length), 7), torch.zeros(len(rows), length, dtype=torch.long)
    for row, ids in enumerate(rows):
        columns = slice(length - len(ids), length) if side == "left" else slice(0, len(ids))
        input_ids[row, columns], attention_mask[row, columns] = ids, 1
    return input_ids, attention_mask


def with_layers(parent, layers, **speech):
    """
    A model of speech with other layers, whose TTT is random and open: it takes part in every output.

    In float64, as its large random weights amplify float32's rounding to 1e-2; `test_ops.py` has the state in float32.

    Args:
        speech: fields of the speech decoder's config.
    """
    config = parent.config.to_dict()
    config["text_config"].update(ttt_mini_batch_size=6, **LAYERS[layers])
    config["speech_decoder_config"].update(speech)
    torch.manual_seed(0)
    model = TTTOmniForCausalLM(TTTOmniConfig(**config)).eval()
    for name, parameter in model.named_parameters():
        if "ttt_gate" in name:
            parameter.data.uniform_(0.3, 1)
        elif ".ttt." in name and "proj.weight" in name:
            parameter.data.normal_(0, 0.25)
    weights = {name: x for name, x in parent.state_dict().items() if ".ttt" not in name}
    model.load_state_dict(weights, strict=False)
    model.generation_config = parent.generation_config
    return model.double()


def assert_same_cache(cache, expected):
    """The same number of tokens, and the same tensors of all layers."""
    assert cache.get_seq_length() == expected.get_seq_length()
    for layer, other in zip(cache.layers, expected.layers):
        tensors, others = layer.tensors(), other.tensors()
        assert tensors.keys() == others.keys()
        for name in tensors:
            torch.testing.assert_close(tensors[name], others[name], rtol=1e-9, atol=1e-9)


def text_model(layer_types, seed=0, vocab_size=50, **kwargs):
    """A random language model of so many small layers."""
    torch.manual_seed(seed)
    config = TTTOmniTextConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=len(layer_types),
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        layer_types=layer_types,
        ttt_mini_batch_size=4,
        **kwargs,
    )
    return TTTOmniForCausalLM(TTTOmniConfig(text_config=config)).eval()


def sound(seconds: float, seed: int = 0) -> np.ndarray:
    """Noise at 16 kHz."""
    noise = np.random.default_rng(seed).standard_normal(int(16000 * seconds))
    return (0.05 * noise).astype(np.float32)


def assert_close(actual, expected, tolerance=1e-4):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\n"
    "Be kind.<|im_end|>\n' }}{% endif %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_tokenizer(folder, special_tokens=SPECIAL_TOKENS, template=CHATML):
    """Bytes as tokens, after the special ones."""
    vocabulary = [*special_tokens, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(special_tokens)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
