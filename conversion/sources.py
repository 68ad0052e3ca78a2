# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Where a checkpoint comes from: a folder, a file, or a repository on the Hub; and GGUF as a folder."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import ModelCard, ModelCardData, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import is_gguf_available

from ..checkpoint import ConversionError, LazyTensor, write_checkpoint
from .backbone import SOURCES


# What of a repository says whose it is and under which terms, and what else a model is made of.
CARD_FILES = ("README.md", "LICEN[CS]E*", "NOTICE*")
MODEL_FILES = ("*.json", "*.jinja", "model.safetensors", "model-*.safetensors", "model.bin")
REPOSITORY = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(refs/pr/\d+|[^/@]+))?(?:/(.+))?")
# Fields of GGUF that a model's card has too.
GGUF_CARD_FIELDS = {
    "license": "general.license",
    "license_name": "general.license.name",
    "license_link": "general.license.link",
    "language": "general.languages",
}


@dataclass(frozen=True)
class Source:
    """A folder or file, and the repository on the Hub that it came from, if any, as `owner/name`."""

    path: Path
    repository: str | None = None


def find_source(name: str | os.PathLike, option: str) -> Source:
    """
    Finds what a user names: a folder or file that is there, or else a repository on the Hub, `owner/name` or
    `owner/name@revision`, or one file of it, as `owner/name/path/in/repo`, which the Hub's cache then has.

    Args:
        option: that names it, for errors.

    Raises:
        [`ConversionError`]: there is no such thing, or it may not be had, or the Hub cannot be reached.
    """
    path, found = Path(name), REPOSITORY.fullmatch(os.fspath(name))
    if path.exists():
        return Source(path)
    if found is None:
        raise ConversionError(f"{option}: {name} does not exist.")
    repository, revision, file = found.groups()
    try:
        folder = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=[*CARD_FILES, *([file] if file else MODEL_FILES)],
            ignore_patterns=None if file else "*/*",
        )
    except GatedRepoError:
        raise ConversionError(
            f"{option}: {repository} is gated: ask for access at {constants.ENDPOINT}/{repository}, and log in with "
            "`hf auth login`."
        ) from None
    except RepositoryNotFoundError:
        raise ConversionError(
            f"{option}: {name} is neither here nor a repository on the Hub; for a private one, log in with "
            "`hf auth login`."
        ) from None
    except RevisionNotFoundError:
        raise ConversionError(f"{option}: {repository} on the Hub has no revision {revision!r}.") from None
    except LocalEntryNotFoundError as error:
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else " ".join(str(error).split())
        raise ConversionError(f"{option}: {name} is neither here nor in the Hub's cache, and {reason}.") from error
    except (OSError, ValueError, httpx.HTTPError) as error:
        raise ConversionError(f"{option}: {name} on the Hub: {' '.join(str(error).split())}") from error
    path = Path(folder, file or "")
    if not path.exists():
        raise ConversionError(f"{option}: {repository} on the Hub, or its cache when offline, has no file {file}.")
    return Source(path, repository)


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
