# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""GGUF files, read by Transformers, as folders of its own."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import is_gguf_available

from ..checkpoint import CARD_FILES, ConversionError, LazyTensor, write_checkpoint
from .backbone import SOURCES


# Fields of GGUF that a model's card has too.
GGUF_CARD_FIELDS = {
    "license": "general.license",
    "license_name": "general.license.name",
    "license_link": "general.license.link",
    "language": "general.languages",
}


@contextmanager
def as_folder(path: Path, parent: Path, dtype: torch.dtype) -> Iterator[Path]:
    """`path`, or if it is a GGUF file a folder in `parent` that has the same in `dtype`, for as long as it is used."""
    if path.suffix != ".gguf":
        yield path
        return
    with TemporaryDirectory(dir=parent) as workplace:
        folder = Path(workplace, path.name)
        folder.mkdir()
        try:
            _unpack_gguf(path, folder, dtype)
            yield folder
        except ConversionError as error:
            raise ConversionError(str(error).replace(str(folder), str(path))) from error


def _unpack_gguf(path: Path, folder: Path, dtype: torch.dtype) -> None:
    """Transformers reads, and dequantises, the whole of it at once."""
    if not is_gguf_available():
        raise ConversionError(f"{path}: GGUF is read by the package gguf: pip install 'ttt-omni[gguf]'.")
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    except Exception as error:  # all that NumPy raises
        raise ConversionError(f"{path} is no GGUF file, or damaged: {' '.join(str(error).split())}") from error
    architecture = fields.get("general.architecture")
    if architecture not in SOURCES:
        raise ConversionError(
            f"{path} is of the architecture {architecture!r}, which is not supported: the language model must be one "
            f"of {', '.join(SOURCES)}."
        )
    is_scaled = fields.get(f"{architecture}.rope.scaling.type", "none") != "none"
    if is_scaled or any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors):
        raise ConversionError(
            f"{path} scales its rotary embedding, which Transformers does not read from GGUF: convert from the "
            "weights that it was made of."
        )
    kwargs = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            **kwargs,
            dtype=dtype,
            quantization_config=GgufConfig(dequantize=True),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        AutoTokenizer.from_pretrained(**kwargs).save_pretrained(folder)
    except Exception as error:  # all that Transformers and the tokenizers library raise
        raise ConversionError(f"{path}: Transformers cannot read it: {' '.join(str(error).split())}") from error
    if wrong := sorted(info["missing_keys"]) + sorted(name for name, *_ in info["mismatched_keys"]):
        raise ConversionError(f"{path}: the tensors for {', '.join(wrong[:3])} are missing or of another shape.")
    num_read = len({tensor.data_ptr() for tensor in model.state_dict().values()})
    if len(reader.tensors) != num_read:
        raise ConversionError(f"{path} has {len(reader.tensors)} tensors, of which Transformers reads {num_read}.")
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tensors = {name: LazyTensor.of(tensor, f"`{name}` in {path}") for name, tensor in model.state_dict().items()}
    write_checkpoint(folder, tensors, dict.fromkeys(tensors, dtype), "5GB")

    for file in (file for pattern in CARD_FILES for file in path.parent.glob(pattern)):
        shutil.copyfile(file, folder / file.name)
    if not (folder / "README.md").exists():
        data = ModelCardData(**{name: fields[field] for name, field in GGUF_CARD_FIELDS.items() if field in fields})
        ModelCard(f"---\n{data.to_yaml()}\n---\n").save(folder / "README.md")
