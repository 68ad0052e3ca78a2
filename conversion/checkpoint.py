# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints as tensors that are read one at a time, and folders that appear whole or not at all."""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from tqdm import tqdm
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


class ConversionError(ValueError):
    """A checkpoint or argument that cannot be converted; the message says in one line what is wrong with it."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read, or made, only when it is needed. `origin` names its source in error messages."""

    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]
    origin: str

    @classmethod
    def of(cls, tensor: torch.Tensor, origin: str) -> "LazyTensor":
        """One that is in memory, or mapped into it, already."""
        return cls(tuple(tensor.shape), lambda: tensor, origin)


def read_json(path: Path) -> dict:
    """The object in the JSON file `path`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConversionError(f"{path} does not exist.") from None
    except (OSError, ValueError) as error:
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
    files = sorted(set(weight_map.values())) or [SAFE_WEIGHTS_NAME]
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise ConversionError(f"{folder} lacks {', '.join(missing)}, named in {index_path.name}; download it again.")

    tensors = {}
    for file in files:
        tensors |= _open_safetensors(folder / file)
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
            return {
                name: LazyTensor(tuple(file.get_slice(name).get_shape()), reader(name), f"`{name}` in {path}")
                for name in file.keys()
            }
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{path} is damaged or truncated ({error}); download it again.") from error


def check_tensors(tensors: dict[str, LazyTensor], shapes: dict[str, tuple[int, ...]], source: Path) -> None:
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


def _first(names: list[str], count: int = 3) -> str:
    rest = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + rest


_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def write_checkpoint(
    folder: Path,
    tensors: dict[str, LazyTensor],
    dtypes: dict[str, torch.dtype],
    max_shard_size: int | str,
) -> None:
    """Writes `tensors`, each cast to its dtype, as safetensors into `folder`, holding one of them at a time."""
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
                    tensor = tensors[name].read().detach().to(dtypes[name]).contiguous()
                    file.write(tensor.view(-1).view(torch.uint8).numpy())
                    progress.update(sizes[name])
    if split.is_sharded:
        index = {"metadata": {"total_size": total_size}, "weight_map": split.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes the name `path` when all went well, and disappears otherwise."""
    path = path.absolute()
    check_new_folder(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_new_folder(path: Path) -> None:
    """Raises unless `path` is free, or an empty folder."""
    if path.is_dir() and any(path.iterdir()):
        raise ConversionError(f"The output folder {path} exists and is not empty; choose another one or remove it.")
    if path.exists() and not path.is_dir():
        raise ConversionError(f"The output {path} exists and is not a folder.")
