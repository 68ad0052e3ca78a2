# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Conversations: listened to piece by piece, into the cache of a model, and on disk, as a safetensors file."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import Cache, DynamicCache
from transformers.utils import logging
from transformers.utils.deprecation import deprecate_kwarg

from .cache_ttt_omni import LAYER_CLASSES, add_ttt_layers
from .configuration_ttt_omni import SLIDING_LAYER_TYPES, TTT_LAYER_TYPES
from .files_ttt_omni import new_file
from .ops_ttt_omni import with_pending_rows


try:
    from accelerate.utils import align_module_device
except ImportError:  # without which nothing is offloaded
    align_module_device = nullcontext

logger = logging.get_logger(__name__)

FORMAT = "ttt_omni_memory"
VERSION = "2"
# The metadata of a file by its version, besides the checksum.
FIELDS = {
    "1": {"format", "version", "fingerprint", "lengths"},
    "2": {"format", "version", "fingerprint", "length", "metadata"},
}
SAMPLES_PER_PARAMETER = 64
TOKENS_PER_STEP = 60  # of a long prompt; a mask of so many rows over hours of speech is still small
WEIGHTS = "weights"  # the tensor of samples, by which a memory knows its model
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# A weight differs by less between a checkpoint in float32 and what float16 or bfloat16 make of it.
RELATIVE_ROUNDING, ABSOLUTE_ROUNDING = 2**-7, 1e-7
# What of the text model's config a memory depends on, besides what `ttt_` fields say.
CONFIG_FIELDS = (
    "backbone",
    "layer_types",
    "sliding_window",
    "attention_sinks",
    "rope_parameters",
    "rms_norm_eps",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
# Fields that came later, which a model without them has as here, so that its files are known again.
LATER_FIELDS = {"ttt_lr_activation": "sigmoid", "ttt_head_gate": False, "ttt_divide_repeats": False}
FIELDS_OF_VERSION_1 = (
    "ttt_base_lr",
    "ttt_gate_init",
    "ttt_layer_type",
    "ttt_mini_batch_size",
    "ttt_qk_norm",
    "ttt_rope_theta",
    "ttt_scan_checkpoint_group_size",
    "ttt_standardize_target",
)


@dataclass
class TTTOmniMemory:
    """
    A conversation as it was saved.

    Args:
        cache: on the devices and in the dtype of the model.
        input_ids: `[B, T]`, the tokens of the conversation, if they were saved.
        attention_mask: `[B, T]`, 0 for padding, if it was saved.
    """

    cache: Cache
    input_ids: torch.LongTensor | None = None
    attention_mask: torch.LongTensor | None = None


class TTTOmniMemoryMixin:
    """Listening to, saving and loading of conversations."""

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    def save_memory(
        self,
        path: str | os.PathLike,
        cache: Cache,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
        metadata: dict[str, str] | None = None,
    ) -> None:
        """
        Save a conversation: keys and values, TTT states and positions, and by what its model is known again.

        Args:
            path: of the safetensors file; it is replaced as a whole, once all is written.
            cache: that `generate` or `forward` filled.
            input_ids, attention_mask: `[B, T]`, the conversation so far, to go on from with the next turn.
            metadata: what else [`memory_metadata`] shall find in the file.

        Raises:
            ValueError: if the cache is empty, static or has values that are not finite, if tokens or mask are fewer
                than it holds, or a tensor-parallel model has only a part of it in this process.
            TypeError: if `metadata` is no dictionary of strings.
        """
        self._require_all_heads()
        if not _is_metadata(metadata := metadata or {}):
            raise TypeError(f"`metadata` must be a dictionary of strings, got {metadata!r}.")
        add_ttt_layers(cache, self.config.get_text_config())
        tensors, lengths = {}, set()
        for index, layer in enumerate(cache.layers):
            if not isinstance(layer, tuple(LAYER_CLASSES.values())):
                raise ValueError(
                    f"Layer {index} of the cache is a {type(layer).__name__}: only a `DynamicCache` is saved."
                )
            lengths.add(layer.get_seq_length())
            tensors |= {f"layers.{index}.{name}": x for name, x in layer.tensors().items()}
        if lengths == {0}:
            raise ValueError("There is nothing to save: the cache is empty.")
        conversation = {"input_ids": input_ids, "attention_mask": attention_mask, WEIGHTS: self._weight_samples()}
        tensors |= {name: x for name, x in conversation.items() if x is not None}
        tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
        self._check_memory(tensors, lengths)
        fields = {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": self._config_fingerprint(),
            "length": str(*lengths),
            "metadata": json.dumps(metadata),
        }
        with new_file(path) as file:
            save_file(tensors, file, fields | {"checksum": _checksum(tensors, fields)})

    def load_memory(self, path: str | os.PathLike) -> TTTOmniMemory:
        """
        Load a conversation that [`save_memory`] wrote, to continue as if nothing had happened.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is damaged, is none of `save_memory`, or belongs to another model, or if this model
                is tensor-parallel.
        """
        self._require_all_heads()
        tensors, fields = _read(Path(path))
        another = f"{path} belongs to another model: a memory means nothing to other weights or layers."
        if fields["version"] == "1":
            lengths = {int(length) for length in re.findall("[0-9]+", fields["lengths"])}
            is_ours = fields["fingerprint"] == self._fingerprint_1()
        else:
            samples, lengths = tensors.pop(WEIGHTS), {int(fields["length"])}
            is_ours = fields["fingerprint"] == self._config_fingerprint() and _agree(samples, self._weight_samples())
        if not is_ours:
            raise ValueError(another)
        try:
            self._check_memory(tensors, lengths)
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from error

        cache = DynamicCache(config=self.config)
        add_ttt_layers(cache, self.config.get_text_config())
        for index, layer in enumerate(cache.layers):
            norm = self.model.language_model.layers[index].input_layernorm
            device = getattr(getattr(norm, "_hf_hook", None), "execution_device", None) or norm.weight.device
            prefix = f"layers.{index}."
            found = {name.removeprefix(prefix): x.to(device) for name, x in tensors.items() if name.startswith(prefix)}
            found |= {name: found[name].to(norm.weight.dtype) for name in ("keys", "values") if name in found}
            layer.load(found, *lengths)
        return TTTOmniMemory(cache, tensors.get("input_ids"), tensors.get("attention_mask"))

    @torch.no_grad()
    def listen(
        self, pieces: Iterable[dict[str, torch.Tensor]], memory: TTTOmniMemory | None = None
    ) -> Iterator[TTTOmniMemory]:
        """
        Hear a prompt of any length piece by piece, straight into the cache, so that only one piece is in memory.

        After the last piece, `generate(**vars(memory))` or `stream(**vars(memory))` answers. A memory can be saved
        after any piece, and `skip_pieces` finds the place in the prompt from which to go on.

        Args:
            pieces: model inputs of one row, each with `input_ids` `[1, n]` and maybe `input_features`, as
                `processor.turn_pieces` yields them.
            memory: of the conversation so far, which goes on in place.

        Yields:
            The memory of all pieces so far, after each; of the last, which must be text, only the tokens, as its
            last state is what `generate` begins with. Tokens of the conversation that were not heard yet go with a
            first piece that is text.

        Raises:
            ValueError: if there are no pieces, or the last one is not text.
        """
        if memory is None:
            memory = TTTOmniMemory(DynamicCache(config=self.config), torch.empty(1, 0, dtype=torch.long))
        cache = memory.cache
        add_ttt_layers(cache, self.config.get_text_config())
        rest = memory.input_ids[:, cache.get_seq_length() :]  # such as the token that ended an answer
        memory.input_ids = memory.input_ids[:, : cache.get_seq_length()]
        last = {"input_ids": rest}
        for piece in pieces:
            if last["input_ids"] is rest and "input_features" not in piece:
                piece = {"input_ids": torch.cat([rest, piece["input_ids"].to(rest.device)], dim=1)}
            elif last["input_ids"].shape[1] > 0:
                self._hear(last, memory)
                yield memory
            last = piece
        if last["input_ids"].shape[1] == 0 or "input_features" in last:
            raise ValueError("The last piece of a prompt must be text, for an answer to begin with.")
        self._remember(last["input_ids"], memory)
        yield memory

    def _hear(self, piece, memory):
        embeds = self.model.embed(**{name: self._to_device(x) for name, x in piece.items()})
        for step in embeds.split(TOKENS_PER_STEP, dim=1):
            self.model(inputs_embeds=step, cache=memory.cache, use_cache=True)
        self._remember(piece["input_ids"], memory)

    def _remember(self, input_ids, memory):
        memory.input_ids = torch.cat([memory.input_ids, input_ids.to(memory.input_ids.device)], dim=1)
        memory.attention_mask = torch.ones_like(memory.input_ids)
        config = self.config.get_text_config()
        if memory.input_ids.shape[1] > config.max_position_embeddings and {"full_attention", "hybrid"} & set(
            config.layer_types
        ):
            logger.warning_once(
                f"The conversation is longer than the {config.max_position_embeddings} tokens that this model's full "
                "attention was made for (`max_position_embeddings`)."
            )

    def _to_device(self, x: torch.Tensor) -> torch.Tensor:
        """`x` where this model is; where its weights are offloaded, their hooks move it."""
        return x if self.device.type == "meta" else x.to(self.device)

    def _require_all_heads(self) -> None:
        if (self.tp_size or 1) > 1:
            raise ValueError(
                "This process of a tensor-parallel model has only some heads of a conversation: save and load "
                "memories with a model that is not divided."
            )

    def _check_memory(self, tensors: dict[str, torch.Tensor], lengths: set[int]) -> None:
        """Raises `ValueError` unless `tensors` are those of a conversation with this model."""
        if len(lengths) != 1 or min(lengths) < 1:
            raise ValueError(f"its layers hold different numbers of tokens, {sorted(lengths)}.")
        (length,) = lengths
        rows = next((x.shape[0] for name, x in tensors.items() if name.startswith("layers.") and x.ndim), 0)
        if rows < 1:
            raise ValueError("it holds no conversation.")
        expected = {
            f"layers.{index}.{name}": shape
            for index in range(len(self.model.language_model.layers))
            for name, shape in self._layer_shapes(index, rows, length).items()
        }
        conversation = {"input_ids", "attention_mask", WEIGHTS}
        if strange := sorted(tensors.keys() - conversation ^ expected.keys()):
            raise ValueError(f"the tensor `{strange[0]}` is missing, or has no place in this model.")
        for name, shape in expected.items():
            x, is_integer = tensors[name], name.endswith(("places", "position"))
            if x.shape != shape or x.dtype not in ([torch.int64] if is_integer else FLOATS):
                raise ValueError(f"`{name}` has the shape {tuple(x.shape)} and {x.dtype}, expected {tuple(shape)}.")
            if not is_integer and not x.isfinite().all():
                raise ValueError(f"`{name}` has values that are not finite.")
            first, end = (-1, length) if name.endswith("places") else (0, self.config.text_config.ttt_mini_batch_size)
            if is_integer and x.numel() and not first <= x.min() <= x.max() < end:
                raise ValueError(f"`{name}` is not between {first} and {end - 1}.")
        integers = (torch.uint8, torch.int32, torch.int64)
        vocab_size = self.config.text_config.vocab_size
        for name, end, dtypes in (("input_ids", vocab_size, integers), ("attention_mask", 2, (*integers, torch.bool))):
            if (x := tensors.get(name)) is None:
                continue
            if x.ndim != 2 or x.shape[0] != rows or x.shape[1] < length or x.dtype not in dtypes:
                raise ValueError(
                    f"`{name}` has the shape {tuple(x.shape)} and {x.dtype}, expected {rows} rows of at least "
                    f"{length} integers."
                )
            if not 0 <= x.min() <= x.max() < end:
                raise ValueError(f"`{name}` is not between 0 and {end - 1}.")

    def _layer_shapes(self, index: int, rows: int, length: int) -> dict[str, torch.Size]:
        """The shapes of what a layer's cache holds of `rows` conversations of `length` tokens."""
        config, shapes = self.config.get_text_config(), {}
        layer_type = config.layer_types[index]
        if layer_type != "linear_attention":
            columns = length
            if layer_type in SLIDING_LAYER_TYPES:
                columns = min(length, config.attention_sinks + config.sliding_window - 1)
                shapes["places"] = torch.Size([rows, columns])
            shape = torch.Size([rows, config.num_key_value_heads, columns, config.head_dim])
            shapes |= {"keys": shape, "values": shape}
        if layer_type in TTT_LAYER_TYPES:
            state = self.model.language_model.layers[index].ttt.inner_model(rows)
            state = with_pending_rows(state, config.ttt_mini_batch_size)
            shapes |= {f"ttt.{name}": x.shape for name, x in vars(state).items()}
        return shapes

    def _config_fingerprint(self) -> str:
        """A digest of the language model's layers and sizes."""
        config = self.config.get_text_config()
        names = [*CONFIG_FIELDS, *sorted(name for name in config.to_dict() if name.startswith("ttt_"))]
        values = {name: getattr(config, name) for name in names}
        values = {name: value for name, value in values.items() if (name, value) not in LATER_FIELDS.items()}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def _weight_samples(self) -> torch.Tensor:
        """
        A fixed sample `[P, 64]` of each of the language model's parameters, in float32, wherever they are; NaN for
        those that are quantised.
        """
        samples = []
        for module in self.model.language_model.modules():
            with align_module_device(module):  # offloaded weights
                for parameter in module.parameters(recurse=False):
                    sample = torch.full((SAMPLES_PER_PARAMETER,), torch.nan)
                    if parameter.dtype in FLOATS:
                        step = max(parameter.numel() // SAMPLES_PER_PARAMETER, 1)
                        values = parameter.detach().flatten()[::step][:SAMPLES_PER_PARAMETER]
                        sample[: len(values)] = values.float().cpu()
                    samples.append(sample)
        return torch.stack(samples)

    def _fingerprint_1(self) -> str:
        """The digest of layers and weights in files of version 1."""
        digest = hashlib.sha256()
        config = self.config.get_text_config()
        for field in ("layer_types", "sliding_window", "attention_sinks", "rope_parameters", "rms_norm_eps"):
            digest.update(repr(getattr(config, field)).encode())
        for field in FIELDS_OF_VERSION_1:
            digest.update(f"{field}={getattr(config, field)}".encode())
        for name, parameter in self.model.language_model.named_parameters():
            digest.update(f"{name}{tuple(parameter.shape)}".encode())
            if parameter.device.type != "meta":
                step = max(parameter.numel() // SAMPLES_PER_PARAMETER, 1)
                sample = parameter.detach().flatten()[::step].to("cpu", torch.bfloat16)
                digest.update(sample.view(torch.int16).numpy().tobytes())
        return digest.hexdigest()


def skip_pieces(
    pieces: Iterator[dict[str, torch.Tensor]], heard: torch.LongTensor
) -> Iterator[dict[str, torch.Tensor]]:
    """
    The `pieces` after those whose tokens `heard` `[1, n]` are.

    Raises:
        ValueError: if the pieces do not begin with these tokens.
    """
    while heard.shape[1] > 0:
        input_ids = next(pieces, {}).get("input_ids", heard[:, :0])  # [1, n]
        if input_ids.shape[1] == 0 or not torch.equal(input_ids, heard[:, : input_ids.shape[1]]):
            raise ValueError(
                "The memory was saved in the middle of another prompt than this: finish that one first, or begin anew."
            )
        heard = heard[:, input_ids.shape[1] :]
    return pieces


def memory_metadata(path: str | os.PathLike) -> dict[str, str]:
    """
    What `save_memory(metadata=…)` wrote beside a conversation.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, or none of `save_memory`.
    """
    _, fields = _read(Path(path))
    return _user_metadata(fields)


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors and the metadata of a file, once it is known to be whole."""
    if not path.is_file():
        raise FileNotFoundError(f"No saved conversation at {path}.")
    try:
        with safe_open(path, "pt") as file:
            fields = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error}).") from error
    if fields.get("format") != FORMAT or fields.get("version") not in FIELDS:
        raise ValueError(f"{path} is no conversation that this version of TTT-Omni saved.")
    checksum = fields.pop("checksum", None)
    is_whole = fields.keys() == FIELDS[fields["version"]]
    if fields["version"] == "1":  # which protected the tensors alone
        is_whole &= checksum == _checksum(tensors)
        is_whole &= re.fullmatch(r"\[[0-9]{1,15}(, [0-9]{1,15})*\]", fields.get("lengths", "")) is not None
    else:
        is_whole &= checksum == _checksum(tensors, fields) and WEIGHTS in tensors
        is_whole &= re.fullmatch("[0-9]{1,15}", fields.get("length", "")) is not None
        is_whole &= _user_metadata(fields) is not None
    if not is_whole:
        raise ValueError(f"{path} is damaged: its checksum does not fit its content.")
    return tensors, fields


def _user_metadata(fields: dict[str, str]) -> dict[str, str] | None:
    """What `save_memory(metadata=…)` was given; `None` if the fields of a file hold something else in its place."""
    try:
        metadata = json.loads(fields.get("metadata", "{}"))
    except (ValueError, RecursionError):
        return None
    return metadata if _is_metadata(metadata) else None


def _is_metadata(metadata) -> bool:
    return isinstance(metadata, dict) and all(isinstance(x, str) for item in metadata.items() for x in item)


def _agree(samples: torch.Tensor, others: torch.Tensor) -> bool:
    """Whether two samples of weights are of the same weights, in whatever dtype; NaN agrees with all."""
    if samples.shape != others.shape or samples.dtype != others.dtype:
        return False
    difference, size = (samples - others).abs(), torch.maximum(samples.abs(), others.abs())
    return bool((difference.isnan() | (difference <= RELATIVE_ROUNDING * size + ABSOLUTE_ROUNDING)).all())


def _checksum(tensors: dict[str, torch.Tensor], fields: dict[str, str] | None = None) -> str:
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode() if fields else b"")
    for name in sorted(tensors):
        x = tensors[name].contiguous()
        digest.update(f"{name}{x.dtype}{tuple(x.shape)}".encode())
        digest.update(x.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
