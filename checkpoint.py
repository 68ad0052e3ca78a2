# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints, here or on the Hub, as tensors that are read one at a time."""

import json
import math
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath

import torch
from huggingface_hub import constants, snapshot_download, split_state_dict_into_shards_factory
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)
from huggingface_hub.utils import httpx
from safetensors import SafetensorError, safe_open
from tqdm import tqdm
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


class ConversionError(ValueError):
    """A checkpoint or argument that cannot be converted; the message says in one line what is wrong with it."""


# The dtypes of weights, by safetensors' names.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# What of a repository says whose it is and under which terms, and what else a model is made of.
CARD_FILES = ("README.md", "LICEN[CS]E*", "NOTICE*")
MODEL_FILES = ("*.json", "*.jinja", "model.safetensors", "model-*.safetensors", "model.bin")
REPOSITORY = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(refs/pr/\d+|[^/@]+))?(?:/(.+))?")


@dataclass(frozen=True)
class LazyTensor:
    """
    A tensor that is read, or made, only when it is needed. `origin` names its source in error messages, and `dtype` is
    safetensors' name of it.
    """

    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]
    origin: str
    dtype: str = "F32"

    @classmethod
    def of(cls, tensor: torch.Tensor, origin: str) -> "LazyTensor":
        """One that is in memory, or mapped into it, already."""
        dtype = _DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
        return cls(tuple(tensor.shape), lambda: tensor, origin, dtype)


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
def errors_of(path: Path) -> Iterator[None]:
    """What the foreign content of the file or folder `path` leads to, in one line that names it."""
    try:
        yield
    except ConversionError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, StrictDataclassError) as error:
        raise ConversionError(f"{path}: {' '.join(str(error).split())}") from error


def read_json(path: Path) -> dict:
    """The object in the JSON file `path`."""

    def unique(pairs):
        content = dict(pairs)
        if len(content) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
        return content

    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except FileNotFoundError:
        raise ConversionError(f"{path} does not exist.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"{path} is not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds no JSON object.")
    return content


def open_checkpoint(folder: Path) -> dict[str, LazyTensor]:
    """The tensors of `folder`'s `model.safetensors`, or of all shards named in its index, by name."""
    index_path = folder / SAFE_WEIGHTS_INDEX_NAME
    if index_path.is_file():
        weight_map = read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ConversionError(f"{index_path} has no `weight_map`.")
    elif (folder / SAFE_WEIGHTS_NAME).is_file():
        weight_map = {}
    else:
        raise ConversionError(f"{folder} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}.")
    for name, file in weight_map.items():
        if not isinstance(file, str) or PurePath(file).is_absolute() or ".." in PurePath(file).parts:
            raise ConversionError(f"{index_path}: `weight_map` has no file of this folder for {name!r} but {file!r}.")
    files = sorted(set(weight_map.values())) or [SAFE_WEIGHTS_NAME]
    missing = [file for file in files if not os.path.isfile(folder / file)]  # `False` for impossible names too
    if missing:
        raise ConversionError(f"{folder} lacks {_first(missing)}, named in {index_path.name}; download it again.")

    tensors = {}
    for file in files:
        opened = _open_safetensors(folder / file)
        if twice := sorted(tensors.keys() & opened.keys()):
            raise ConversionError(f"{tensors[twice[0]].origin} is in {file} as well; one of the files is another's.")
        tensors |= opened
    lost = sorted(weight_map.keys() - tensors.keys())
    if lost:
        raise ConversionError(f"{folder}: the shards lack the tensors {_first(lost)}, named in {index_path.name}.")
    return tensors


def _open_safetensors(path: Path) -> dict[str, LazyTensor]:
    def reader(name):
        def read():
            # Opened for each tensor, so that the pages of those already read don't stay in memory.
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)

        return read

    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {
                name: LazyTensor(tuple(x.get_shape()), reader(name), f"`{name}` in {path}", x.get_dtype())
                for name, x in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{path} is damaged or truncated ({error}); download it again.") from error


def load_pt(path: Path, *keys: str, what: str) -> list[dict]:
    """
    The dicts under `keys` in a file of `torch.save`, their tensors mapped into memory where its format allows.

    Args:
        what: the file should be, for the error that says that it is not.
    """
    try:
        is_zip = zipfile.is_zipfile(path)
        if is_zip and any(x.compress_type != zipfile.ZIP_STORED for x in zipfile.ZipFile(path).infolist()):
            raise ValueError("it is a compressed archive")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        parts = [content[key] for key in keys]
        if not all(isinstance(part, dict) for part in parts):
            raise TypeError(f"{' and '.join(keys)} must be dicts")
    except FileNotFoundError:
        raise ConversionError(f"{path} does not exist.") from None
    except (
        RuntimeError, OSError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile, LookupError, TypeError,
        ValueError, AttributeError,
    ) as error:  # fmt: skip
        reason = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise ConversionError(f"{path} is not {what}: {reason}") from error
    return parts


def tensors_of(state: dict, path: Path, what: str) -> dict[str, LazyTensor]:
    """The tensors of a state dict in the file `path`; raises, as `load_pt`, if something else is in it."""
    for name, tensor in state.items():
        if not isinstance(name, str):
            raise ConversionError(f"{path} is not {what}: {name!r} is no name of a tensor.")
        if not isinstance(tensor, torch.Tensor):
            raise ConversionError(f"{path} is not {what}: {name!r} is no tensor but of type {type(tensor).__name__}.")
        if tensor.layout is not torch.strided or tensor.device.type != "cpu":
            raise ConversionError(f"{path}: `{name}` is a {tensor.layout} tensor on {tensor.device}, not a plain one.")
        if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.itemsize:
            raise ConversionError(f"{path}: `{name}` of shape {list(tensor.shape)} has fewer numbers than that.")
    return {name: LazyTensor.of(tensor, f"`{name}` in {path}") for name, tensor in state.items()}


def check_layers(num_layers: int, tensors: dict[str, LazyTensor], prefix: str, field: str) -> None:
    """Raises unless there are tensors of `num_layers` layers, `prefix` and a number. `field` is where this is said."""
    layers = {name.removeprefix(prefix).partition(".")[0] for name in tensors if name.startswith(prefix)}
    if num_layers != len(layers):
        raise ConversionError(f"{field} is {num_layers}, but there are {len(layers)} layers in the weights.")


def check_sizes(sizes: dict[str, int], tensors: dict[str, LazyTensor], source: Path) -> None:
    """Raises if one of `sizes`, by their fields in `source`, is none, or larger than all dimensions of `tensors`."""
    largest = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    for field, size in sizes.items():
        if not 1 <= size <= largest:
            raise ConversionError(f"{source}: `{field}` must be 1 to {largest}, as the weights are, got {size}.")


def check_tensors(tensors: dict[str, LazyTensor], shapes: dict[str, tuple[int, ...]], source: Path | str) -> None:
    """Raises unless `tensors`, made from the checkpoint `source`, have exactly the names and shapes `shapes`."""
    missing = sorted(shapes.keys() - tensors.keys())
    if missing:
        raise ConversionError(f"{source} lacks tensors for {_first(missing)}.")
    unknown = sorted(tensors[name].origin for name in tensors.keys() - shapes.keys())
    if unknown:
        raise ConversionError(f"{source} has tensors that its config does not call for: {_first(unknown)}.")
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise ConversionError(
                f"{tensors[name].origin} has the shape {list(tensors[name].shape)}, expected {list(shape)}."
            )
        check_dtype(tensors[name])


def check_dtype(tensor: LazyTensor) -> None:
    """Raises unless `tensor` holds floats of at least 16 bits: others are quantised, and need scales."""
    if tensor.dtype not in DTYPES:
        raise ConversionError(f"{tensor.origin} is of dtype {tensor.dtype}, not one of {', '.join(DTYPES)}.")


def _first(names: list[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest


def write_checkpoint(
    folder: Path,
    tensors: dict[str, LazyTensor],
    dtypes: dict[str, torch.dtype],
    max_shard_size: int | str = "5GB",
) -> None:
    """
    Writes `tensors`, each cast to its dtype, as safetensors into `folder`, holding one of them at a time.

    Raises:
        [`ConversionError`]: a tensor has NaN or infinity, or numbers that its new dtype cannot hold.
    """
    sizes = {name: math.prod(tensor.shape) * dtypes[name].itemsize for name, tensor in tensors.items()}
    split = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    total_size = sum(sizes.values())
    with tqdm(total=total_size, unit="B", unit_scale=True, desc="Writing weights") as progress:
        for filename, names in split.filename_to_tensors.items():
            # The wide dtypes come first, so that every tensor is aligned to its own.
            names = sorted(names, key=lambda name: -dtypes[name].itemsize)
            header, end = {"__metadata__": {"format": "pt"}}, 0
            for name in names:
                start, end = end, end + sizes[name]
                header[name] = {
                    "dtype": _DTYPE_NAMES[dtypes[name]],
                    "shape": tensors[name].shape,
                    "data_offsets": [start, end],
                }
            header = json.dumps(header, separators=(",", ":")).encode()
            header += b" " * (-len(header) % 8)
            with open(folder / filename, "wb") as file:
                file.write(len(header).to_bytes(8, "little") + header)
                for name in names:
                    tensor = _cast(tensors[name], dtypes[name])
                    file.write(tensor.view(-1).view(torch.uint8).numpy())
                    progress.update(sizes[name])
    if split.is_sharded:
        index = {"metadata": {"total_size": total_size}, "weight_map": split.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _cast(source: LazyTensor, dtype: torch.dtype) -> torch.Tensor:
    tensor = source.read().detach()
    cast = tensor.to(dtype).contiguous()
    if not _is_finite(cast):
        reason = f"numbers too large for {_DTYPE_NAMES[dtype]}" if _is_finite(tensor) else "NaN or infinity"
        raise ConversionError(f"{source.origin} has {reason}.")
    return cast


def _is_finite(tensor: torch.Tensor) -> bool:
    lowest, highest = tensor.aminmax()  # both NaN where there is one; takes a 20th of the time of `isfinite`
    return math.isfinite(lowest) and math.isfinite(highest)
