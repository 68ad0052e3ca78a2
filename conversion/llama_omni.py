# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Conversion of a LLaMA-Omni or LLaMA-Omni2 checkpoint, or a language model's, to TTT-Omni."""

import copy
import math
import os
import re
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    WhisperConfig,
    WhisperFeatureExtractor,
)
from transformers.utils import logging

from ..checkpoint import (
    CARD_FILES,
    ConversionError,
    LazyTensor,
    check_layers,
    check_sizes,
    check_tensors,
    errors_of,
    find_source,
    open_checkpoint,
    read_json,
    write_checkpoint,
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
from .backbone import (
    LLAMA_OMNI2,
    ROPE_FIELDS,
    TOKEN_IDS,
    find_audio_token,
    make_chat_template,
    own_audio_token,
    read_config,
    read_tokenizer,
    text_values,
)
from .card import make_model_card, summary
from .gguf import as_folder
from .graft import LAYER_TYPES, fresh_tensor, graft, select_layers
from .vocoder import load_fairseq_vocoder, vocoder_config_from_fairseq
from .whisper import open_openai_encoder, open_whisper


logger = logging.get_logger(__name__)

PACKAGE_FOLDER = Path(__file__).parent.parent
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

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
SPEECH_SIZES = ("speech_encoder_ds_rate", "speech_encoder_hidden_size", "unit_vocab_size")
# Frames that the speech decoder sees where attention has a window, in tokens: most answers are shorter, and sound as
# without; later ones cost as much per token as the 100th.
SPEECH_WINDOW_TOKENS = 100
MAX_UNITS = 100_000
# By which a tokenizer is known to be Llama 3's, whose prompt is known.
LLAMA_3_TOKENS = {"<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"}
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
    listen: bool = False,
    speak: int | None = None,
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
    Converts a checkpoint in LLaMA-Omni's layout, or a language model that neither listens nor speaks, to TTT-Omni. One
    in LLaMA-Omni2's layout is converted without its speech generator, to answer in text.

    Weights are read and written one tensor at a time, and everything is checked before anything is written. The
    `output` folder appears when it is complete; it loads with `from_pretrained`, also as remote code. A line on stderr
    says what it is and what to do next.

    Args:
        source: folder with `config.json`, `model.safetensors` or shards with their index, and the tokenizer; or a
            GGUF file, which is read whole, in `dtype`, before the rest goes on. This and the next three may be on the
            Hub: `"owner/name"`, `"owner/name@revision"`, or of one file `"owner/name/path/in/repo"`.
        output: folder to make.
        whisper: Whisper's encoder, as OpenAI's `.pt` file, or as a folder of Transformers or CTranslate2. It takes
            precedence over an encoder inside the checkpoint, and may be left out where there is one.
        vocoder, vocoder_config: fairseq's unit HiFi-GAN and its JSON.
        listen: whether a language model gets a speech projector, to be trained; it takes `whisper`.
        speak: number of speech units of the speech decoder, to be trained, that a language model gets.
        layers: layers to graft TTT into, as `"24-31"`, `"0,2,5-7"` or numbers; by default the upper quarter.
        mode: `"hybrid"`, TTT beside attention behind a gate that starts at 0, with a gate per head and tokens that
            may write nothing; or `"replace"`, TTT in its place, with its rotary embedding, by the position in the
            mini-batch.
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
    if mode not in LAYER_TYPES:
        raise ConversionError(f"The mode must be one of {', '.join(LAYER_TYPES)}, got {mode!r}.")
    if dtype not in DTYPES:
        raise ConversionError(f"The dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    with new_folder(output) as folder:
        found = find_source(source, "--source")
        with as_folder(found.path, folder, DTYPES[dtype]) as source_folder:
            conversion = plan_conversion(
                source_folder,
                repository=found.repository,
                whisper=whisper,
                vocoder=vocoder,
                vocoder_config=vocoder_config,
                listen=listen,
                speak=speak,
                layers=layers,
                mode=mode,
                ttt_type=ttt_type,
                mini_batch_size=mini_batch_size,
                attention_window=attention_window,
                attention_sinks=attention_sinks,
                dtype=dtype,
            )
            conversion.write(folder, max_shard_size)
    print(conversion.summary(output), file=sys.stderr)


@dataclass
class Conversion:
    """All that a converted folder holds; its tensors not read yet."""

    config: TTTOmniConfig
    tensors: dict[str, LazyTensor]
    dtypes: dict[str, torch.dtype]
    processor: TTTOmniProcessor
    generation_config: GenerationConfig
    model_card: str
    licences: list[Path]
    ttt_layers: list[int]
    mode: str
    has_fresh_parts: bool

    def write(self, folder: Path, max_shard_size: int | str = "5GB") -> None:
        """Writes everything into the existing `folder`."""
        self.config.save_pretrained(folder)
        self.generation_config.to_json_file(folder / "generation_config.json")
        self.processor.save_pretrained(folder)
        (folder / "README.md").write_text(self.model_card + "\n", encoding="utf-8")
        for file in PACKAGE_FOLDER.glob("*_ttt_omni.py"):
            shutil.copyfile(file, folder / file.name)
        for file in self.licences:
            shutil.copyfile(file, folder / file.name)
        write_checkpoint(folder, self.tensors, self.dtypes, max_shard_size)

    def summary(self, output: str | os.PathLike) -> str:
        """What is written into `output`, and what to do with it next, in one line."""
        size = sum(math.prod(tensor.shape) * self.dtypes[name].itemsize for name, tensor in self.tensors.items())
        return summary(output, size, self.config, self.ttt_layers, self.mode, self.has_fresh_parts)


@dataclass
class TrainedParts:
    """What makes a language model listen and speak: fields of the config, and tensors by our names."""

    config: dict[str, Any]
    tensors: dict[str, LazyTensor]
    folder: Path


def plan_conversion(
    source: Path,
    *,
    repository: str | None = None,
    whisper: str | os.PathLike | None = None,
    vocoder: str | os.PathLike | None = None,
    vocoder_config: str | os.PathLike | None = None,
    listen: bool = False,
    speak: int | None = None,
    trained: TrainedParts | None = None,
    layers: str | Iterable[int] | None = None,
    mode: str = "hybrid",
    ttt_type: str | list[str] = "linear",
    mini_batch_size: int = 64,
    attention_window: int | None = None,
    attention_sinks: int = 4,
    dtype: str = "bfloat16",
) -> Conversion:
    """
    Reads all of the checkpoint in the folder `source` but its weights, and checks it.

    Args:
        repository: on the Hub, that `source` came from.
        trained: what `source` gets with `listen`, in place of parts to be trained; the other arguments are those of
            [`convert_llama_omni`].
    """
    if not source.is_dir():
        raise ConversionError(f"The source {source} is not a folder.")
    values = read_config(source)
    config, tensors, processor = _read(source, values, whisper, vocoder, vocoder_config, listen, speak, trained)
    ttt_layers = select_layers(layers, config.text_config.num_hidden_layers)
    config = _grafted(config, ttt_layers, mode, ttt_type, mini_batch_size, attention_window, attention_sinks)
    tensors = graft(tensors, config.text_config, _shapes(config))

    config.architectures = [TTTOmniForCausalLM.__name__]
    config.dtype = DTYPES[dtype]
    has_fresh_parts = trained is None and (listen or speak is not None)
    return Conversion(
        config=config,
        tensors=tensors,
        dtypes={name: _dtype(name, config.dtype) for name in tensors},
        processor=processor,
        generation_config=_generation_config(source, config, processor.tokenizer, listen),
        model_card=make_model_card(
            source,
            repository,
            config,
            has_fresh_parts=has_fresh_parts,
            is_llama_omni=values["model_type"].startswith("omni"),
            layers=", ".join(map(str, ttt_layers)),
            mode=mode,
            ttt_type=ttt_type,
            mini_batch_size=mini_batch_size,
            attention_window=attention_window or "unbounded",
            dtype=dtype,
        ),
        licences=[file for pattern in CARD_FILES[1:] for file in sorted(source.glob(pattern)) if file.is_file()],
        ttt_layers=ttt_layers,
        mode=mode,
        has_fresh_parts=has_fresh_parts,
    )


def _read(
    source: Path,
    values: dict,
    whisper: str | os.PathLike | None,
    vocoder: str | os.PathLike | None,
    vocoder_config: str | os.PathLike | None,
    listen: bool,
    speak: int | None,
    trained: TrainedParts | None,
) -> tuple[TTTOmniConfig, dict[str, LazyTensor], TTTOmniProcessor]:
    """The checkpoint and what comes with it, as a model without TTT that has all the tensors it should have."""
    tensors = open_checkpoint(source)
    if values["model_type"] in LLAMA_OMNI2:
        values, tensors = _without_speech_generator(values, tensors, source)
    listens = _has_part(LISTENING, tensors, values, source)
    speaks = _has_part(SPEAKING, tensors, values, source)
    _check_parts(listens, speaks, listen, speak, whisper, vocoder, vocoder_config, source)
    whisper = None if whisper is None else find_source(whisper, "--whisper").path
    vocoder = None if vocoder is None else find_source(vocoder, "--vocoder").path
    vocoder_config = None if vocoder_config is None else find_source(vocoder_config, "--vocoder-config").path
    tensors, encoder = _rename(tensors)
    text = text_values(values, tensors, source)
    parts = {}
    if listens:
        parts |= _listening_config(values, tensors, source)
        parts["audio_config"], encoder = _encoder(values, encoder, whisper, source)
    elif listen:
        parts["audio_config"], encoder = open_whisper(whisper)
    tensors |= {f"model.audio_tower.{name}": tensor for name, tensor in encoder.items()}
    if speaks:
        parts["speech_decoder_config"] = _speech_decoder_config(values, tensors, source)
    elif speak is not None:
        parts["speech_decoder_config"] = _fresh_speech_decoder_config(text, speak)
    if speaks or vocoder is not None:
        parts["vocoder_config"] = vocoder_config_from_fairseq(vocoder_config)
        state = load_fairseq_vocoder(vocoder, parts["vocoder_config"])
        tensors |= {f"vocoder.{name}": LazyTensor.of(x, f"`{name}` in {vocoder}") for name, x in state.items()}
    if trained is not None:
        parts |= trained.config
        tensors |= trained.tensors
    with errors_of(source):
        processor = _processor(source, values, parts.get("audio_config"), is_fresh=listen)
    if "vocoder_config" in parts:
        processor.output_sampling_rate = parts["vocoder_config"].sampling_rate
    if "audio_config" in parts:
        parts["audio_token_id"] = processor.audio_token_id
        tensors |= _with_rows(tensors, text, processor.audio_token_id + 1)
    config = TTTOmniConfig(
        text_config=TTTOmniTextConfig(**text), tie_word_embeddings=text.get("tie_word_embeddings", False), **parts
    )
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    shapes = _shapes(config)
    if trained is None:
        fresh = ["model.multi_modal_projector."] * listen + ["speech_decoder."] * (speak is not None)
        tensors |= {name: fresh_tensor(name, shapes[name]) for name in shapes if name.startswith(tuple(fresh))}
    check_tensors(tensors, shapes, source if trained is None else f"{source} with {trained.folder}")
    return config, tensors, processor


def _without_speech_generator(
    values: dict, tensors: dict[str, LazyTensor], source: Path
) -> tuple[dict, dict[str, LazyTensor]]:
    """What LLaMA-Omni2 listens and thinks with; its way of speaking is another than ours."""
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(SPEAKING[0])}
    if len(kept) < len(tensors):
        logger.warning(
            f"{source} is left without its autoregressive speech generator, whose flow-matching vocoder is a model of "
            "its own: the converted one answers in text, which a text-to-speech program can say (`--voice-command` of "
            "`ttt-omni answer` and `chat`)."
        )
    fields = {"speech_generator", *SPEAKING[1]}
    return {name: value for name, value in values.items() if name not in fields}, kept


def _check_parts(listens, speaks, listen, speak, whisper, vocoder, vocoder_config, source: Path) -> None:
    """Raises unless what was asked for and given fits what the checkpoint has."""
    if listens and listen:
        raise ConversionError(f"{source} has a speech projector, so that --listen has no use; leave it out.")
    if listen and whisper is None:
        raise ConversionError("--listen needs the encoder to listen with: give one with --whisper.")
    if whisper is not None and not (listens or listen):
        raise ConversionError(f"{source} has no speech projector for --whisper: --listen adds one, to be trained.")
    if speaks and speak is not None:
        raise ConversionError(f"{source} has a speech generator, so that --speak has no use; leave it out.")
    if speak is not None and not 1 <= speak <= MAX_UNITS:
        raise ConversionError(f"--speak takes a number of speech units from 1 to {MAX_UNITS}, got {speak}.")
    for given, option in ((vocoder, "--vocoder"), (vocoder_config, "--vocoder-config")):
        if speaks and given is None:
            raise ConversionError(f"{source} speaks: give its unit vocoder with --vocoder and --vocoder-config.")
        if given is not None and not (speaks or speak is not None):
            raise ConversionError(f"{source} has no speech generator, so that {option} has no use; leave it out.")
    if (vocoder is None) != (vocoder_config is None):
        raise ConversionError("--vocoder and --vocoder-config belong together: give both.")


def _grafted(
    config: TTTOmniConfig,
    ttt_layers: list[int],
    mode: str,
    ttt_type: str | list[str],
    mini_batch_size: int,
    attention_window: int | None,
    attention_sinks: int,
) -> TTTOmniConfig:
    """`config` with TTT in these layers, and windows in all."""
    text, speech = config.text_config.to_dict(), config.speech_decoder_config
    text |= {"ttt_layer_type": ttt_type, "ttt_mini_batch_size": mini_batch_size}
    if attention_window is not None:
        text |= {"sliding_window": attention_window, "attention_sinks": attention_sinks}
        text["layer_types"] = ["sliding_attention"] * len(text["layer_types"])
        if speech is not None and speech.sliding_window is None:
            window = SPEECH_WINDOW_TOKENS * speech.upsample_factor
            window = min(window, speech.max_position_embeddings - speech.attention_sinks)
            speech = TTTOmniSpeechDecoderConfig(**speech.to_dict() | {"sliding_window": window})
    for layer in ttt_layers:
        is_sliding = text["layer_types"][layer] == "sliding_attention"
        hybrid = "hybrid_sliding" if is_sliding else "hybrid"
        text["layer_types"][layer] = hybrid if mode == "hybrid" else LAYER_TYPES[mode]
    if mode == "replace":
        text["ttt_rope_theta"] = text["rope_parameters"]["rope_theta"]
    else:
        text |= {"ttt_head_gate": True, "ttt_lr_activation": "hardsigmoid", "ttt_divide_repeats": True}
    return TTTOmniConfig(**config.to_dict() | {"text_config": text, "speech_decoder_config": speech})


def _with_rows(tensors: dict[str, LazyTensor], text: dict, rows: int) -> dict[str, LazyTensor]:
    """The embeddings, and the head, with rows of 0 for tokens up to `rows`, by which `text` is told to grow."""
    if rows <= text["vocab_size"]:
        return {}
    missing, text["vocab_size"] = rows - text["vocab_size"], rows

    def longer(tensor: LazyTensor) -> LazyTensor:
        def read():
            weight = tensor.read()
            return torch.cat([weight, weight.new_zeros(missing, weight.shape[1])])

        return LazyTensor((rows, *tensor.shape[1:]), read, tensor.origin, tensor.dtype)

    names = ("model.language_model.embed_tokens.weight", "lm_head.weight")
    return {name: longer(tensors[name]) for name in names if name in tensors}


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


def _speech_decoder_config(values: dict, tensors: dict[str, LazyTensor], source: Path) -> TTTOmniSpeechDecoderConfig:
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
        return TTTOmniSpeechDecoderConfig(
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


def _fresh_speech_decoder_config(text: dict, units: int) -> TTTOmniSpeechDecoderConfig:
    """Two layers of the language model's width, as LLaMA-Omni has them."""
    return TTTOmniSpeechDecoderConfig(
        num_hidden_layers=2,
        hidden_size=text["hidden_size"],
        intermediate_size=text["intermediate_size"],
        num_attention_heads=text["num_attention_heads"],
        num_key_value_heads=text["num_attention_heads"],
        input_size=text["hidden_size"],
        unit_vocab_size=units,
    )


def _encoder(
    values: dict, inside: dict[str, LazyTensor], whisper: Path | None, source: Path
) -> tuple[WhisperConfig, dict[str, LazyTensor]]:
    """The encoder that was asked for, which wins over the one inside, as in the original."""
    if whisper is None and not inside:
        raise ConversionError(f"{source} has no Whisper encoder inside; give the one of its training with --whisper.")
    config, encoder = open_openai_encoder(inside, source) if whisper is None else open_whisper(whisper)
    if config.d_model != values["speech_encoder_hidden_size"]:
        raise ConversionError(
            f"The Whisper encoder {whisper or 'inside'} is {config.d_model} wide, but {source} was trained with one "
            f"of {values['speech_encoder_hidden_size']} (speech_encoder_hidden_size)."
        )
    return config, encoder


def _processor(source: Path, values: dict, audio_config: WhisperConfig | None, is_fresh: bool) -> TTTOmniProcessor:
    """With the source's own template, but for LLaMA-Omni's prompt where that listens, or Llama 3 comes without one."""
    tokenizer = read_tokenizer(source, values)
    num_mel_bins = 80 if audio_config is None else audio_config.num_mel_bins
    feature_extractor = WhisperFeatureExtractor(feature_size=num_mel_bins)
    if audio_config is not None and values["model_type"] in LLAMA_OMNI2:
        audio_token = own_audio_token(tokenizer, source)
        return TTTOmniProcessor(
            feature_extractor,
            tokenizer,
            audio_token,
            values["speech_encoder_ds_rate"],
            chat_template=make_chat_template(tokenizer, audio_token, source),
            speech_instruction="",
        )
    if audio_config is not None and not is_fresh:
        return TTTOmniProcessor(feature_extractor, tokenizer, audio_downsample=values["speech_encoder_ds_rate"])
    if tokenizer.chat_template is None and LLAMA_3_TOKENS <= tokenizer.get_vocab().keys():
        return TTTOmniProcessor(feature_extractor, tokenizer)
    audio_token = find_audio_token(tokenizer) if is_fresh else None
    template = make_chat_template(tokenizer, audio_token, source)
    return TTTOmniProcessor(feature_extractor, tokenizer, audio_token, chat_template=template)


def _generation_config(
    source: Path, config: TTTOmniConfig, tokenizer: PreTrainedTokenizerBase, has_new_placeholder: bool
) -> GenerationConfig:
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
    if has_new_placeholder:  # which the model was not trained to leave unsaid
        generation_config.suppress_tokens = [*(generation_config.suppress_tokens or []), config.audio_token_id]
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
