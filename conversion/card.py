# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""What a converted model says of itself: its card, and a line for who converted it."""

import os
import re
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import metadata_load

from ..checkpoint import ConversionError, read_json
from ..configuration_ttt_omni import TTTOmniConfig


# What is carried over from the card of the source.
CARRIED_OVER = ("license", "license_name", "license_link", "language")
TEMPLATE = Path(__file__).parent.parent / "model_card.md"


def make_model_card(source: Path, repository: str | None, config: TTTOmniConfig, is_llama_omni: bool, **facts) -> str:
    """
    The card of the model of `config`, with the licence and languages that the card in the folder `source` names.

    Args:
        repository: on the Hub, that `source` came from; without one its config, its card or its name says which.
        facts: what else `model_card.md` calls for.
    """
    path = source / "README.md"
    try:
        card = (metadata_load(path) if path.is_file() else None) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConversionError(
            f"{path}: the head of the card is not readable: {' '.join(str(error).split())}"
        ) from None
    speaks = config.vocoder_config is not None
    data = ModelCardData(
        **{name: card[name] for name in CARRIED_OVER if card.get(name)},
        base_model=repository or _base_model(source, card),
        library_name="transformers",
        pipeline_tag="text-generation" if config.audio_config is None else "any-to-any",
        tags=[
            *(["speech"] if config.audio_config is not None else []),
            *(["speech-to-speech"] if speaks else []),
            "test-time-training",
            "long-context",
            *(["llama-omni"] if is_llama_omni else []),
            "custom_code",
        ],
    )
    name = repository or re.sub(r"[^\w.-]", "-", source.resolve().name)
    return str(
        ModelCard.from_template(
            data,
            template_path=str(TEMPLATE),
            source=name,
            listens=config.audio_config is not None,
            speaks=speaks,
            is_llama_omni=is_llama_omni,
            **facts,
        )
    )


def _base_model(source: Path, card: dict) -> str:
    """The repository that the folder's card or config names, or else the folder's own name."""
    for name in (card.get("base_model"), read_json(source / "config.json").get("_name_or_path")):
        if isinstance(name, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
            return name
    return re.sub(r"[^\w.-]", "-", source.resolve().name)


def summary(
    output: str | os.PathLike, size: int, config: TTTOmniConfig, ttt_layers: list[int], mode: str, to_train: bool
) -> str:
    """
    One line: what was written into the folder `output`, and what to do with it next.

    Args:
        size: of the weights, in bytes.
        to_train: whether it has fresh parts besides TTT.
    """
    hears, speaks = config.audio_config is not None, config.speech_decoder_config is not None
    abilities = " and ".join(["listens"] * hears + ["speaks"] * speaks) or "text only"
    if mode == "replace":
        step = f"bring its parent's quality back with `ttt-omni distill … --model {output}`"
    elif to_train:
        step = f"train its new parts: `ttt-omni calibrate --model {output} …`, then `ttt-omni finetune`"
    elif hears and speaks:
        step = f"`ttt-omni chat --model {output}`, or calibrate and fine-tune it"
    else:
        step = f"`AutoModelForCausalLM.from_pretrained({str(output)!r}).generate(…)`, or calibrate and fine-tune it"
    rounded = f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
    layers = ", ".join(map(str, ttt_layers)) or "none"
    return f"Wrote {output}: {rounded}, {abilities}, TTT ({mode}) in layers {layers}. Next: {step}."
