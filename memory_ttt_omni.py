# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Conversations on disk: the cache of a model as a safetensors file."""

import hashlib
import json
import os
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import Cache, DynamicCache

from .cache_ttt_omni import NoAttentionLayer, SlidingWindowLayer, TTTCacheMixin, add_ttt_layers
from .ops_ttt_omni import TTTLinearState, TTTMLPState


FORMAT = "ttt_omni_memory"
VERSION = "1"
SAMPLES_PER_PARAMETER = 64


@dataclass
class TTTOmniMemory:
    """
    A conversation as it was saved.

    Args:
        past_key_values: the cache, on the devices and in the dtype of the model.
        input_ids: `[B, T]`, the tokens of the conversation, if they were saved.
        attention_mask: `[B, T]`, 0 for padding, if it was saved.
    """

    past_key_values: Cache
    input_ids: torch.LongTensor | None = None
    attention_mask: torch.LongTensor | None = None


class TTTOmniMemoryMixin:
    """Saving and loading of conversations."""

    def save_memory(
        self,
        path: str | os.PathLike,
        past_key_values: Cache,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.LongTensor | None = None,
    ) -> None:
        """
        Save a conversation: keys and values, TTT states and positions, and a fingerprint of this model.

        Args:
            path: of the safetensors file; it is replaced as a whole, once all is written.
            past_key_values: the cache that `generate` or `forward` filled.
            input_ids, attention_mask: `[B, T]`, the conversation so far, to go on from with the next turn.

        Raises:
            ValueError: if the cache is empty, or a tensor-parallel model has only a part of it in this process.
        """
        self._require_all_heads()
        tensors, lengths = {}, []
        add_ttt_layers(past_key_values, self.config.get_text_config())
        for index, layer in enumerate(past_key_values.layers):
            lengths.append(layer.get_seq_length())
            tensors.update({f"layers.{index}.{name}": x for name, x in _layer_tensors(layer).items()})
        if not any(lengths):
            raise ValueError("There is nothing to save: the cache is empty.")
        conversation = {"input_ids": input_ids, "attention_mask": attention_mask}
        tensors.update({name: x for name, x in conversation.items() if x is not None})
        tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": self.memory_fingerprint(),
            "checksum": _checksum(tensors),
            "lengths": json.dumps(lengths),
        }
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            save_file(tensors, temporary, metadata)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def load_memory(self, path: str | os.PathLike) -> TTTOmniMemory:
        """
        Load a conversation that [`save_memory`] wrote, to continue as if nothing had happened.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is damaged, is none of `save_memory`, or belongs to another model, or if this model
                is tensor-parallel.
        """
        self._require_all_heads()
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"No saved conversation at {path}.")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or no safetensors file ({error}).") from error
        if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
            raise ValueError(f"{path} is no conversation that this version of TTT-Omni saved.")
        if metadata["checksum"] != _checksum(tensors):
            raise ValueError(f"{path} is damaged: its checksum does not fit its content.")
        if metadata["fingerprint"] != self.memory_fingerprint():
            raise ValueError(f"{path} belongs to another model: a memory means nothing to other weights or layers.")

        cache = DynamicCache(config=self.config)
        add_ttt_layers(cache, self.config.get_text_config())
        layers = self.model.language_model.layers
        for index, (layer, length) in enumerate(zip(cache.layers, json.loads(metadata["lengths"]))):
            prefix = f"layers.{index}."
            found = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
            weight = layers[index].input_layernorm.weight
            _fill_layer(layer, found, length, weight.device, weight.dtype)
        return TTTOmniMemory(cache, tensors.get("input_ids"), tensors.get("attention_mask"))

    def _require_all_heads(self) -> None:
        if (self.tp_size or 1) > 1:
            raise ValueError(
                "This process of a tensor-parallel model has only some heads of a conversation: save and load "
                "memories with a model that is not divided."
            )

    def memory_fingerprint(self) -> str:
        """
        A digest of the language model's layers, sizes and weights, the same in any dtype and on any device.

        Of each weight a fixed sample is read, so that it takes no time on models of any size.
        """
        digest = hashlib.sha256()
        config = self.config.get_text_config()
        for field in ("layer_types", "sliding_window", "attention_sinks", "rope_parameters", "rms_norm_eps"):
            digest.update(repr(getattr(config, field)).encode())
        for field in sorted(name for name in config.to_dict() if name.startswith("ttt_")):
            digest.update(f"{field}={getattr(config, field)}".encode())
        for name, parameter in self.model.language_model.named_parameters():
            digest.update(f"{name}{tuple(parameter.shape)}".encode())
            if parameter.device.type != "meta":
                step = max(parameter.numel() // SAMPLES_PER_PARAMETER, 1)
                sample = parameter.detach().flatten()[::step].to("cpu", torch.bfloat16)
                digest.update(sample.view(torch.int16).numpy().tobytes())
        return digest.hexdigest()


def _layer_tensors(layer) -> dict[str, torch.Tensor]:
    tensors = {}
    if getattr(layer, "is_initialized", False) and not isinstance(layer, NoAttentionLayer):
        tensors = {"keys": layer.keys, "values": layer.values}
        if isinstance(layer, SlidingWindowLayer):
            tensors["places"] = layer.places
    if isinstance(layer, TTTCacheMixin) and layer.ttt_state is not None:
        state = layer.ttt_state
        tensors.update({f"ttt.{field.name}": getattr(state, field.name) for field in fields(state)})
    return tensors


def _fill_layer(layer, tensors, length, device, dtype) -> None:
    if "keys" in tensors:
        keys, values = (tensors[name].to(device, dtype) for name in ("keys", "values"))
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
    if isinstance(layer, SlidingWindowLayer):
        layer.places = tensors["places"].to(device)
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length = length
    state = {name.removeprefix("ttt."): x.to(device) for name, x in tensors.items() if name.startswith("ttt.")}
    if state:
        layer.ttt_state = (TTTMLPState if "W2" in state else TTTLinearState)(**state)


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        x = tensors[name].contiguous()
        digest.update(f"{name}{x.dtype}{tuple(x.shape)}".encode())
        digest.update(x.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
