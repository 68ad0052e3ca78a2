# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Conversion of a LLaMA-Omni or Llama 3 checkpoint to TTT-Omni."""

import copy
import math
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from string import Template

import torch
from transformers import (
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
)

from ..configuration_ttt_omni import (
    TTTOmniConfig,
    TTTOmniSpeechDecoderConfig,
    TTTOmniTextConfig,
    require_token_ids,
)
from ..files_ttt_omni import new_folder
from ..modeling_ttt_omni import TTTOmniForCausalLM
from ..processing_ttt_omni import TTTOmniProcessor
from .checkpoint import (
    ConversionError,
    LazyTensor,
    check_layers,
    check_sizes,
    check_tensors,
    errors_of,
    open_checkpoint,
    read_json,
    write_checkpoint,
)
from .graft import LAYER_TYPES, WINDOWED_LAYER_TYPES, graft, select_layers
from .vocoder import load_fairseq_vocoder, vocoder_config_from_fairseq
from .whisper import open_openai_encoder, open_whisper


PACKAGE_FOLDER = Path(__file__).parent.parent
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SOURCE_MODEL_TYPES = ("llama", "omni_speech_llama", "omni_speech2s_llama")

# What LLaMA-Omni's modules are called here. The first match counts.
RENAMES = {
    "model.speech_projector.linear1.": "model.multi_modal_projector.linear_1.",
    "model.speech_projector.linear2.": "model.multi_modal_projector.linear_2.",
    "model.": "model.language_model.",
    "speech_generator.": "speech_decoder.",
}
# The fields of its config that go with its tensors of these names.
LISTENING = (
    "model.speech_projector.",
    ("speech_encoder_type", "speech_encoder_ds_rate", "speech_encoder_hidden_size"),
)
SPEAKING = (
    "speech_generator.",
    ("speech_generator_type", "ctc_decoder_config", "ctc_upsample_factor", "ctc_loss_weight", "unit_vocab_size"),
)
NUMBERS = {
    "speech_encoder_ds_rate": int,
    "speech_encoder_hidden_size": int,
    "ctc_upsample_factor": int,
    "ctc_loss_weight": (int, float),
    "unit_vocab_size": int,
}
# The sizes in its config, which are those of tensors, alone or multiplied by others.
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
SPEECH_SIZES = ("speech_encoder_ds_rate", "speech_encoder_hidden_size", "unit_vocab_size")
# Frames that the speech decoder sees where attention has a window, in tokens: most answers are shorter, and sound as
# without; later ones cost as much per token as the 100th.
SPEECH_WINDOW_TOKENS = 100
# Types of what a generation config most often has, which Transformers takes as it comes.
GENERATION_FIELDS = {
    "do_sample": bool,
    "max_length": int,
    "max_new_tokens": int,
    "min_length": int,
    "min_new_tokens": int,
    "num_beams": int,
    "repetition_penalty": (int, float),
    "temperature": (int, float),
    "top_k": int,
    "top_p": (int, float),
}
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
ROPE_FIELDS = ("rope_parameters", "rope_theta", "rope_scaling")
# What the speech decoder takes over from the language model.
SHARED_FIELDS = (
    *ROPE_FIELDS,
    "attention_bias",
    "attention_dropout",
    "hidden_act",
    "initializer_range",
    "max_position_embeddings",
    "mlp_bias",
    "rms_norm_eps",
)


def convert_llama_omni(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    whisper: str | os.PathLike | None = None,
    vocoder: str | os.PathLike | None = None,
    vocoder_config: str | os.PathLike | None = None,
    layers: str | Iterable[int] | None = None,
    mode: str = "hybrid",
    ttt_type: str | list[str] = "linear",
    mini_batch_size: int = 64,
    attention_window: int | None = None,
    attention_sinks: int = 4,
    dtype: str = "bfloat16",
    max_shard_size: int | str = "5GB",
) -> None:
    """
    Converts a checkpoint in LLaMA-Omni's layout, or a Llama 3 that neither listens nor speaks, to TTT-Omni.

    Weights are read and written one tensor at a time, and everything is checked before anything is written. The
    `output` folder appears when it is complete; it loads with `from_pretrained`, also as remote code.

    Args:
        source: folder with `config.json`, `model.safetensors` or shards with their index, and the tokenizer.
        output: folder to make.
        whisper: Whisper's encoder, as OpenAI's `.pt` file or as a Transformers folder. It takes precedence over an
            encoder inside the checkpoint, and may be left out where there is one.
        vocoder, vocoder_config: fairseq's unit HiFi-GAN and its JSON.
        layers: layers to graft TTT into, as `"24-31"`, `"0,2,5-7"` or numbers; by default the upper quarter.
        mode: `"hybrid"`, TTT beside attention behind a gate that starts at 0, or `"replace"`, TTT in its place, with
            its rotary embedding, by the position in the mini-batch.
        ttt_type: inner model, `"linear"` or `"mlp"`, for all layers or one per layer of the model.
        mini_batch_size: tokens per inner mini-batch.
        attention_window: tokens that attention sees, in all layers, so that memory is bounded; by default all. The
            speech decoder then sees the frames of the last 100 tokens.
        attention_sinks: first tokens that it sees besides, for ever.
        dtype: `"bfloat16"`, `"float16"` or `"float32"`; TTT's inner parameters and the vocoder are float32 always.
        max_shard_size: of a file of weights, in bytes or as `"5GB"`.

    Raises:
        [`ConversionError`]: what is wrong with the checkpoint, in one line.
        FileExistsError: `output` is a file, or a folder that is not empty.
    """
    with new_folder(output) as folder:
        conversion = plan_conversion(
            Path(source),
            whisper=whisper,
            vocoder=vocoder,
            vocoder_config=vocoder_config,
            layers=layers,
            mode=mode,
            ttt_type=ttt_type,
            mini_batch_size=mini_batch_size,
            attention_window=attention_window,
            attention_sinks=attention_sinks,
            dtype=dtype,
        )
        conversion.write(folder, max_shard_size)


@dataclass
class Conversion:
    """All that a converted folder holds; its tensors not read yet."""

    config: TTTOmniConfig
    tensors: dict[str, LazyTensor]
    dtypes: dict[str, torch.dtype]
    processor: TTTOmniProcessor
    generation_config: GenerationConfig
    model_card: str

    def write(self, folder: Path, max_shard_size: int | str = "5GB") -> None:
        """Writes everything into the existing `folder`."""
        self.config.save_pretrained(folder)
        self.generation_config.to_json_file(folder / "generation_config.json")
        self.processor.save_pretrained(folder)
        (folder / "README.md").write_text(self.model_card, encoding="utf-8")
        for file in PACKAGE_FOLDER.glob("*_ttt_omni.py"):
            shutil.copyfile(file, folder / file.name)
        write_checkpoint(folder, self.tensors, self.dtypes, max_shard_size)


def plan_conversion(
    source: Path,
    *,
    whisper: str | os.PathLike | None = None,
    vocoder: str | os.PathLike | None = None,
    vocoder_config: str | os.PathLike | None = None,
    layers: str | Iterable[int] | None = None,
    mode: str = "hybrid",
    ttt_type: str | list[str] = "linear",
    mini_batch_size: int = 64,
    attention_window: int | None = None,
    attention_sinks: int = 4,
    dtype: str = "bfloat16",
) -> Conversion:
    """Reads all of the checkpoint but its weights, and checks it; arguments are those of [`convert_llama_omni`]."""
    if mode not in LAYER_TYPES:
        raise ConversionError(f"The mode must be one of {', '.join(LAYER_TYPES)}, got {mode!r}.")
    if dtype not in DTYPES:
        raise ConversionError(f"The dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    if not source.is_dir():
        raise ConversionError(f"The source {source} is not a folder.")
    values = _read_config(source)
    tensors = open_checkpoint(source)
    listens = _has_part(LISTENING, tensors, values, source)
    speaks = _has_part(SPEAKING, tensors, values, source)
    tensors, encoder = _rename(tensors)
    text_values = _text_values(values, tensors, source)
    parts = {}
    if listens:
        parts |= _listening_config(values, tensors, source)
        parts["audio_config"], encoder = _encoder(values, encoder, whisper, source)
    elif whisper is not None:
        raise ConversionError(f"{source} has no speech projector, so that --whisper has no use; leave it out.")
    tensors |= {f"model.audio_tower.{name}": tensor for name, tensor in encoder.items()}
    _check_vocoder_arguments(speaks, vocoder, vocoder_config, source)
    if speaks:
        parts["speech_decoder_config"] = _speech_decoder_config(values, tensors, attention_window is not None, source)
        parts["vocoder_config"] = vocoder_config_from_fairseq(vocoder_config)
        state = load_fairseq_vocoder(vocoder, parts["vocoder_config"])
        tensors |= {f"vocoder.{name}": LazyTensor.of(x, f"`{name}` in {vocoder}") for name, x in state.items()}

    # The checkpoint is checked against the model without TTT, which is then grafted on.
    ttt_layers = select_layers(layers, values["num_hidden_layers"])
    text_config = TTTOmniTextConfig(
        **text_values,
        ttt_layer_type=ttt_type,
        ttt_mini_batch_size=mini_batch_size,
        sliding_window=attention_window,
        attention_sinks=attention_sinks,
    )
    with errors_of(source):
        processor = _processor(_read_tokenizer(source, values), parts.get("audio_config"), values)
    if listens:
        parts["audio_token_id"] = processor.audio_token_id
    config = TTTOmniConfig(text_config=text_config, tie_word_embeddings=text_config.tie_word_embeddings, **parts)
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    check_tensors(tensors, _shapes(config), source)
    for layer in ttt_layers:
        text_config.layer_types[layer] = LAYER_TYPES[mode]
    if mode == "replace":
        text_config.ttt_rope_theta = text_config.rope_parameters["rope_theta"]
    if attention_window is not None:
        text_config.layer_types = [WINDOWED_LAYER_TYPES.get(name, name) for name in text_config.layer_types]
    tensors = graft(tensors, text_config, _shapes(config), seed=0)

    config.architectures = [TTTOmniForCausalLM.__name__]
    config.dtype = DTYPES[dtype]
    card = Template((PACKAGE_FOLDER / "model_card.md").read_text(encoding="utf-8"))
    return Conversion(
        config=config,
        tensors=tensors,
        dtypes={name: _dtype(name, config.dtype) for name in tensors},
        processor=processor,
        generation_config=_generation_config(source, config, processor.tokenizer),
        model_card=card.substitute(
            base_model=re.sub(r"[^\w.-]", "-", source.resolve().name),
            layers=", ".join(map(str, ttt_layers)),
            mode=mode,
            ttt_type=ttt_type,
            mini_batch_size=mini_batch_size,
            attention_window=attention_window or "unbounded",
            dtype=dtype,
        ),
    )


def _read_config(source: Path) -> dict:
    """`config.json` as it is: Transformers does not know its `model_type`."""
    values = read_json(source / "config.json")
    if values.get("model_type") not in SOURCE_MODEL_TYPES:
        raise ConversionError(
            f"{source}/config.json has the `model_type` {values.get('model_type')!r}, not one of {SOURCE_MODEL_TYPES}."
        )
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    missing = [field for field in needed if not _is(values.get(field), int)]
    if missing:
        raise ConversionError(f"{source}/config.json has no number {', '.join(missing)}.")
    return values


def _is(value, types) -> bool:
    """Whether `value` is of one of `types`, as JSON has them: a Boolean is no number."""
    return isinstance(value, types) and (types is bool or not isinstance(value, bool))


def _has_part(part: tuple, tensors: dict[str, LazyTensor], values: dict, source: Path) -> bool:
    """Whether the checkpoint has a part of the model; raises if only its tensors do, or only its config."""
    prefix, fields = part
    missing = [field for field in fields if values.get(field) is None]
    if any(name.startswith(prefix) for name in tensors):
        if missing:
            raise ConversionError(f"{source}/config.json lacks {', '.join(missing)} for the tensors {prefix}*.")
        no_numbers = [name for name in fields if name in NUMBERS and not _is(values[name], NUMBERS[name])]
        if no_numbers:
            raise ConversionError(f"{source}/config.json: {no_numbers[0]} is no number: {values[no_numbers[0]]!r}.")
        return True
    if len(missing) < len(fields):
        present = sorted(set(fields) - set(missing))
        raise ConversionError(f"{source} lacks the tensors {prefix}*, for which its config.json has {present[0]}.")
    return False


def _rename(tensors: dict[str, LazyTensor]) -> tuple[dict[str, LazyTensor], dict[str, LazyTensor]]:
    """The checkpoint's tensors by our names, and apart from them those of the encoder inside by OpenAI's."""
    renamed, encoder = {}, {}
    for name, tensor in tensors.items():
        if name.startswith("model.speech_encoder."):
            encoder[name.removeprefix("model.speech_encoder.")] = tensor
        elif not name.endswith(".rotary_emb.inv_freq"):  # a buffer that old versions saved
            prefix = next((prefix for prefix in RENAMES if name.startswith(prefix)), "")
            renamed[RENAMES.get(prefix, "") + name.removeprefix(prefix)] = tensor
    return renamed, encoder


def _text_values(values: dict, tensors: dict[str, LazyTensor], source: Path) -> dict:
    """The arguments of a [`TTTOmniTextConfig`] without TTT, such as the tensors are those of."""
    path = source / "config.json"
    num_layers = values["num_hidden_layers"]
    check_layers(num_layers, tensors, "model.language_model.layers.", f"{path}: `num_hidden_layers`")
    known = (*LlamaConfig.__annotations__, *ROPE_FIELDS)
    text_values = {name: values[name] for name in known if name in values}
    text_values["layer_types"] = ["full_attention"] * num_layers
    with errors_of(path):
        config = TTTOmniTextConfig(**copy.deepcopy(text_values))
        require_token_ids(config, config.vocab_size, *TOKEN_IDS)
    check_sizes({name: getattr(config, name) for name in SIZES}, tensors, path)
    return copy.deepcopy(text_values)


def _listening_config(values: dict, tensors: dict[str, LazyTensor], source: Path) -> dict:
    if values.get("speech_projector_type", "linear") != "linear":
        raise ConversionError(f"{source}: the speech projector {values['speech_projector_type']!r} is not supported.")
    if values["speech_encoder_type"] != "whisper":
        raise ConversionError(
            f"{source}/config.json: the speech encoder {values['speech_encoder_type']!r} is not supported."
        )
    check_sizes({name: values[name] for name in SPEECH_SIZES if name in values}, tensors, source / "config.json")
    config = {"audio_downsample": values["speech_encoder_ds_rate"]}
    # The only size that config.json does not tell: 2048 in all that was released.
    if first_linear := tensors.get("model.multi_modal_projector.linear_1.weight"):
        config["projector_hidden_size"] = first_linear.shape[0]
    return config


def _check_vocoder_arguments(speaks: bool, vocoder, vocoder_config, source: Path) -> None:
    for given, option in ((vocoder, "--vocoder"), (vocoder_config, "--vocoder-config")):
        if speaks and given is None:
            raise ConversionError(f"{source} speaks: give its unit vocoder with --vocoder and --vocoder-config.")
        if given is not None and not speaks:
            raise ConversionError(f"{source} has no speech generator, so that {option} has no use; leave it out.")


def _speech_decoder_config(
    values: dict, tensors: dict[str, LazyTensor], is_windowed: bool, source: Path
) -> TTTOmniSpeechDecoderConfig:
    path = source / "config.json"
    if values["speech_generator_type"] != "ctc":
        raise ConversionError(f"{path}: the speech generator {values['speech_generator_type']!r} is not supported.")
    sizes = re.fullmatch(r"\(" + r",".join([r"\s*([0-9]{1,10})\s*"] * 4) + r"\)", str(values["ctc_decoder_config"]))
    if sizes is None:
        raise ConversionError(
            f"{path}: `ctc_decoder_config` must be '(layers, width, heads, inner width)', got "
            f"{str(values['ctc_decoder_config'])[:80]!r}."
        )
    num_layers, width, num_heads, inner_width = map(int, sizes.groups())
    check_layers(num_layers, tensors, "speech_decoder.layers.", f"{path}: the first number of `ctc_decoder_config`")
    check_sizes({"ctc_decoder_config": max(width, num_heads, inner_width)}, tensors, path)
    with errors_of(path):
        config = TTTOmniSpeechDecoderConfig(
            **copy.deepcopy({name: values[name] for name in SHARED_FIELDS if name in values}),
            num_hidden_layers=num_layers,
            hidden_size=width,
            num_attention_heads=num_heads,
            num_key_value_heads=num_heads,
            intermediate_size=inner_width,
            input_size=values["hidden_size"],
            upsample_factor=values["ctc_upsample_factor"],
            unit_vocab_size=values["unit_vocab_size"],
            ctc_loss_weight=values["ctc_loss_weight"],
        )
    if not is_windowed:
        return config
    longest = config.max_position_embeddings - config.attention_sinks
    window = min(SPEECH_WINDOW_TOKENS * config.upsample_factor, longest)
    return TTTOmniSpeechDecoderConfig(**config.to_dict() | {"sliding_window": window})


def _encoder(
    values: dict, inside: dict[str, LazyTensor], whisper: str | os.PathLike | None, source: Path
) -> tuple[WhisperConfig, dict[str, LazyTensor]]:
    """The encoder that was asked for, which wins over the one inside, as in the original."""
    if whisper is None and not inside:
        raise ConversionError(f"{source} has no Whisper encoder inside; give the one of its training with --whisper.")
    config, encoder = open_openai_encoder(inside, source) if whisper is None else open_whisper(Path(whisper))
    if config.d_model != values["speech_encoder_hidden_size"]:
        raise ConversionError(
            f"The Whisper encoder {whisper or 'inside'} is {config.d_model} wide, but {source} was trained with one "
            f"of {values['speech_encoder_hidden_size']} (speech_encoder_hidden_size)."
        )
    return config, encoder


def _read_tokenizer(source: Path, values: dict) -> PreTrainedTokenizerBase:
    """By its own class: `AutoTokenizer` fails on the checkpoint's `config.json`."""
    if not (source / "tokenizer.json").is_file():
        raise ConversionError(f"{source} has no tokenizer.json.")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    except Exception as error:  # all that the tokenizers library raises
        raise ConversionError(f"{source}: the tokenizer cannot be read: {error}") from error
    num_tokens = max(tokenizer.get_vocab().values(), default=-1) + 1
    if num_tokens > values["vocab_size"]:
        raise ConversionError(
            f"{source}: the tokenizer has {num_tokens} tokens, more than the model's {values['vocab_size']}."
        )
    tokenizer.model_max_length = values.get("max_position_embeddings", tokenizer.model_max_length)
    return tokenizer


def _processor(
    tokenizer: PreTrainedTokenizerBase, audio_config: WhisperConfig | None, values: dict
) -> TTTOmniProcessor:
    if audio_config is None:
        return TTTOmniProcessor(WhisperFeatureExtractor(), tokenizer, chat_template=tokenizer.chat_template)
    feature_extractor = WhisperFeatureExtractor(feature_size=audio_config.num_mel_bins)
    return TTTOmniProcessor(feature_extractor, tokenizer, audio_downsample=values["speech_encoder_ds_rate"])


def _generation_config(source: Path, config: TTTOmniConfig, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """What the checkpoint says of generation, completed by the special tokens' ids of its config and tokenizer."""
    path = source / "generation_config.json"
    values = read_json(path) if path.is_file() else {}
    for name, value in values.items():
        if name in GENERATION_FIELDS and value is not None and not _is(value, GENERATION_FIELDS[name]):
            raise ConversionError(f"{path}: `{name}` is of a wrong type: {value!r}.")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConversionError(f"{path}: `{name}` must be finite, got {value!r}.")
    with errors_of(path):
        generation_config = GenerationConfig.from_dict(values)
        require_token_ids(generation_config, config.text_config.vocab_size, *TOKEN_IDS)
    for name in TOKEN_IDS:
        for origin in (config.text_config, tokenizer):
            if getattr(generation_config, name) is None:
                setattr(generation_config, name, getattr(origin, name))
    return generation_config


def _shapes(config: TTTOmniConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a model of `config` saves."""
    with torch.device("meta"):
        model = TTTOmniForCausalLM(config)
    tied = model._tied_weights_keys if config.tie_word_embeddings else {}
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def _dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    kept = set(TTTOmniForCausalLM._keep_in_fp32_modules_strict)
    return torch.float32 if kept & set(name.split(".")) else dtype
