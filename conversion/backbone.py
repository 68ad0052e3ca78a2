# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""What a checkpoint of any backbone says of itself: its configuration, its tokenizer, and how a conversation looks."""

import copy
import re
from pathlib import Path

from transformers import (
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Tokenizer,
    Qwen3Config,
)

from ..checkpoint import ConversionError, LazyTensor, check_layers, check_sizes, errors_of, read_json
from ..configuration_ttt_omni import TTTOmniTextConfig, require_token_ids
from ..processing_ttt_omni import PARTS_TO_TEXT


# The backbone of a checkpoint, and the class that reads its config, by its `model_type`.
SOURCES = {
    "llama": ("llama", LlamaConfig),
    "mistral": ("mistral", MistralConfig),
    "omni2_speech2s_qwen2": ("qwen2", Qwen2Config),
    "omni2_speech_qwen2": ("qwen2", Qwen2Config),
    "omni_speech2s_llama": ("llama", LlamaConfig),
    "omni_speech_llama": ("llama", LlamaConfig),
    "qwen2": ("qwen2", Qwen2Config),
    "qwen3": ("qwen3", Qwen3Config),
}
# LLaMA-Omni2, which marks speech by a token of its own, and says nothing beside it.
LLAMA_OMNI2 = ("omni2_speech2s_qwen2", "omni2_speech_qwen2")
SPEECH_TOKEN = "<speech>"
# The sizes in its config, which are those of tensors, alone or multiplied by others.
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
ROPE_FIELDS = ("rope_parameters", "rope_theta", "rope_scaling")
# What tokens are called that models are not trained to use, the best placeholders first.
UNUSED_TOKENS = (r"audio", r"reserved", r"unused", r"")
AUDIO_TOKEN = "<|audio|>"


def read_config(source: Path) -> dict:
    """`config.json` as it is: Transformers does not know LLaMA-Omni's `model_type`."""
    values = read_json(source / "config.json")
    if values.get("model_type") not in SOURCES:
        raise ConversionError(
            f"{source}/config.json has the `model_type` {values.get('model_type')!r}, which is not supported: the "
            f"language model must be one of {', '.join(SOURCES)}."
        )
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    missing = [field for field in needed if type(values.get(field)) is not int]
    if missing:
        raise ConversionError(f"{source}/config.json has no number {', '.join(missing)}.")
    return values


def text_values(values: dict, tensors: dict[str, LazyTensor], source: Path) -> dict:
    """The arguments of a [`TTTOmniTextConfig`] without TTT, such as the tensors are those of."""
    path, num_layers = source / "config.json", values["num_hidden_layers"]
    check_layers(num_layers, tensors, "model.language_model.layers.", f"{path}: `num_hidden_layers`")
    backbone, config_class = SOURCES[values["model_type"]]
    known = (*LlamaConfig.__annotations__, *ROPE_FIELDS)
    text = {name: values[name] for name in known if name in values}  # as a `LlamaConfig`, which ours is, reads it
    text["layer_types"] = ["full_attention"] * num_layers
    with errors_of(path):
        if backbone != "llama":
            config = config_class.from_dict(values)
            text = {name: getattr(config, name) for name in known if hasattr(config, name)}
            text["sliding_window"] = config.sliding_window
            default = "full_attention" if config.sliding_window is None else "sliding_attention"
            text["layer_types"] = getattr(config, "layer_types", None) or [default] * num_layers
            text["attention_sinks"] = 0
        text["backbone"] = backbone
        config = TTTOmniTextConfig(**copy.deepcopy(text))
        require_token_ids(config, config.vocab_size, *TOKEN_IDS)
    check_sizes({name: getattr(config, name) for name in SIZES}, tensors, path)
    return copy.deepcopy(text)


def read_tokenizer(source: Path, values: dict) -> PreTrainedTokenizerBase:
    """By its own class: `AutoTokenizer` fails on LLaMA-Omni's `config.json`."""
    is_slow = all((source / name).is_file() for name in ("vocab.json", "merges.txt"))  # as LLaMA-Omni2 saves it
    if not (source / "tokenizer.json").is_file() and not (is_slow and SOURCES[values["model_type"]][0] == "qwen2"):
        raise ConversionError(f"{source} has no tokenizer.json.")
    tokenizer_class = PreTrainedTokenizerFast if (source / "tokenizer.json").is_file() else Qwen2Tokenizer
    try:
        tokenizer = tokenizer_class.from_pretrained(source)
    except Exception as error:  # all that the tokenizers library raises
        raise ConversionError(f"{source}: the tokenizer cannot be read: {error}") from error
    num_tokens = max(tokenizer.get_vocab().values(), default=-1) + 1
    if num_tokens > values["vocab_size"]:
        raise ConversionError(
            f"{source}: the tokenizer has {num_tokens} tokens, more than the model's {values['vocab_size']}."
        )
    tokenizer.model_max_length = values.get("max_position_embeddings", tokenizer.model_max_length)
    return tokenizer


def own_audio_token(tokenizer: PreTrainedTokenizerBase, source: Path) -> str:
    """The token with which LLaMA-Omni2 marks speech, made special, so that in a text it is text."""
    if SPEECH_TOKEN not in tokenizer.get_vocab():
        raise ConversionError(
            f"{source}: the tokenizer has no token {SPEECH_TOKEN}, with which the model marks speech."
        )
    tokenizer.add_special_tokens({"additional_special_tokens": [SPEECH_TOKEN]}, replace_extra_special_tokens=False)
    return SPEECH_TOKEN


def find_audio_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """
    A special token to stand for audio: one that the model has no use for, or else a new one, which is added to
    `tokenizer`.
    """
    named = {getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    special = [token for token in tokenizer.get_added_vocab() if token in tokenizer.all_special_tokens]
    special += [
        token.content
        for _, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special and token.content not in special
    ]
    free = [token for token in special if token not in named and token not in (tokenizer.chat_template or "")]
    for pattern in UNUSED_TOKENS:
        if found := [token for token in free if re.search(pattern, token)]:
            return found[-1]
    tokenizer.add_special_tokens({"additional_special_tokens": [AUDIO_TOKEN]})
    return AUDIO_TOKEN


def make_chat_template(tokenizer: PreTrainedTokenizerBase, audio_token: str | None, source: Path) -> str:
    """The tokenizer's own template, with the placeholder where a message's audio stands."""
    if not isinstance(tokenizer.chat_template, str):
        raise ConversionError(f"{source}: the tokenizer has no chat template, which says how a conversation looks.")
    if audio_token is None:
        return tokenizer.chat_template
    return PARTS_TO_TEXT.replace("AUDIO_TOKEN", audio_token) + tokenizer.chat_template
