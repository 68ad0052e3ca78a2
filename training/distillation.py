# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Recovery of the parent's quality after a graft: first each TTT layer by itself, then the model as a whole."""

import copy
import os
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..checkpoint import ConversionError, check_tensors, find_source, open_checkpoint
from ..layers_ttt_omni import TokenLayout, TTTOmniDecoderLayer, lay_out_tokens, make_attention
from ..modeling_ttt_omni import TTTOmniForCausalLM, TTTOmniTextModel
from .calibration import INPUTS


def make_parent(student: TTTOmniForCausalLM, source: str | os.PathLike | None = None) -> TTTOmniForCausalLM:
    """
    The model that `student` was grafted from: full attention in all layers, and no TTT.

    It shares the student's parameters, so that it takes memory for no more than the attention that the student lacks.
    Adapters that the student is given afterwards are not in it; parameters trained in place would change it as well.

    Args:
        student: a graft.
        source: folder that the student was converted from, or that of another conversion of it, or its name on the Hub
            (`owner/name`). Only the attention that `linear_attention` layers lack is read; may be left out where there
            are none.

    Raises:
        [`ConversionError`]: if the student lacks attention and there is no source, or one that lacks it too or has
            that of a model of another size.
    """
    folder = None if source is None else find_source(source, "source").path
    parent = copy.deepcopy(student, {id(x): x for x in (*student.parameters(), *student.buffers())})
    text_model = parent.model.language_model
    for config in (parent.config.text_config, text_model.config):
        config.layer_types = ["full_attention"] * config.num_hidden_layers
    text_model.has_sliding_layers = False
    for layer in text_model.layers:
        with torch.device("meta"):
            attention = make_attention(text_model.config, layer.layer_idx)
        if layer.self_attn is not None:
            for name, projection in layer.self_attn.named_children():  # modules, as they may be quantised
                setattr(attention, name, projection)
        elif folder is None:
            raise ConversionError(f"Layer {layer.layer_idx} has no attention to learn from: give the graft's source.")
        else:
            shapes = {name: tuple(x.shape) for name, x in attention.named_parameters()}
            weights = _read_attention(folder, layer.layer_idx, shapes)
            weights = {name: x.to(layer.input_layernorm.weight) for name, x in weights.items()}
            attention.load_state_dict(weights, assign=True)
        layer.self_attn = attention
        layer.layer_type = "full_attention"
        for name in ("ttt", "ttt_gate"):
            if hasattr(layer, name):
                delattr(layer, name)
    return parent.eval()


def _read_attention(source: Path, layer_idx: int, shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The attention of a layer of a checkpoint in its original layout or in ours."""
    tensors = open_checkpoint(source)
    prefixes = [f"model.{part}layers.{layer_idx}.self_attn." for part in ("", "language_model.")]
    tensors = {name: tensors[prefix + name] for name in shapes for prefix in prefixes if prefix + name in tensors}
    check_tensors(tensors, shapes, f"{source}, layer {layer_idx},")
    return {name: tensor.read() for name, tensor in tensors.items()}


def layer_matching_loss(
    student: nn.Module, parent: TTTOmniForCausalLM, batch: dict[str, torch.Tensor]
) -> torch.Tensor:
    """
    How much of the parent's attention the student's TTT layers miss, each on the input that it has in the parent
    (attention transfer of LoLCATs, arXiv 2410.10254).

    TTT is to give what the parent's full attention gives less what the student's own attention gives of the same
    input: in a `linear_attention` layer all of it; in a `hybrid_sliding` layer the part of the tokens that its window
    has dropped, through the gate, which opens for it. In a `hybrid` layer nothing is missing and a gate of 0 is the
    best; there TTT learns, before the gate, to give what attention gives, so that a window may be set or the
    attention dropped later, while the model stays its parent.

    Gradients reach TTT and the gates of `hybrid_sliding` layers, and nothing else. One layer's activations are held
    at a time.

    Args:
        student: a graft, also one with adapters.
        parent: from [`make_parent`].
        batch: arguments of `forward`, padded or packed; `labels` are not needed.

    Returns:
        The squared error over all tokens but padding, as a share of the square of attention's output; mean over the
        layers. 0 is perfect, 1 as good as no output.

    Raises:
        ValueError: if the student has no TTT.
    """
    text_model = next(module for module in student.modules() if isinstance(module, TTTOmniTextModel))
    layers = {index: layer for index, layer in enumerate(text_model.layers) if hasattr(layer, "ttt")}
    if not layers:
        raise ValueError("There is nothing to match: no layer of the model has TTT.")
    parent_layers = parent.model.language_model.layers
    losses = []
    tokens = batch["input_ids"] if "input_ids" in batch else batch["inputs_embeds"][..., 0]  # [B, T]
    mask = batch.get("attention_mask")
    position_ids = batch.get("position_ids")
    layout = lay_out_tokens(*tokens.shape, 0, tokens.device, mask, position_ids, may_be_packed=mask is None)

    def match(layer, attention, args, output):
        hidden_states, attended = args[0], output[0]  # [B, T, hidden_size]
        target = attended
        if layer.is_sliding:
            rotations = text_model.sliding_rotary_emb(hidden_states, layout.places)
            target = attended - layer.self_attn(hidden_states, rotations, places=layout.places)[0]
        with torch.enable_grad():
            error = checkpoint(_squared_error, layer, hidden_states, target, layout, use_reentrant=False)
            losses.append(error / _squared(attended, layout.mask))

    hooks = [
        parent_layers[index].self_attn.register_forward_hook(partial(match, layer)) for index, layer in layers.items()
    ]
    try:
        with torch.no_grad():
            parent.model(**{name: batch[name] for name in INPUTS if name in batch}, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(losses).mean()


def _squared_error(layer: TTTOmniDecoderLayer, hidden_states, target, layout: TokenLayout) -> torch.Tensor:
    output = layer.ttt(hidden_states, layout.mask, layout.cu_seqlens)
    if layer.is_sliding:
        output = layer.ttt_gate(output)
    return _squared(output - target, layout.mask)


def _squared(x: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
    """Sum of squares over the tokens of `[B, T, hidden_size]` that are no padding."""
    squares = x.float().square().sum(-1)
    return squares.sum() if token_mask is None else squares[token_mask].sum()


def logit_matching_loss(
    hidden_states: torch.Tensor,
    parent: TTTOmniForCausalLM,
    batch: dict[str, torch.Tensor],
    temperature: float = 1.0,
    chunk_size: int = 1024,
    num_items_in_batch: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Kullback-Leibler divergence of the student's next token from the parent's, mean over the tokens that `labels` hold
    (knowledge distillation, arXiv 1503.02531).

    Args:
        hidden_states: `[B, T, hidden_size]`, the `last_hidden_state` of the student's output for this batch.
        parent: from [`make_parent`]; its head is the student's.
        batch: the arguments of the student's `forward`, with `labels`.
        temperature: that logits are divided by; the loss is multiplied by its square.
        chunk_size: never hold the logits of more positions.
        num_items_in_batch: what to divide by in place of the number of labels, as Transformers' trainer counts it.
    """
    with torch.no_grad():
        parent_states = parent.model(**{name: batch[name] for name in INPUTS if name in batch}, use_cache=False)[0]

    def divergence(states, parent_states):
        with torch.no_grad():
            expected = (parent.lm_head(parent_states).float() / temperature).log_softmax(-1)
        predicted = (parent.lm_head(states).float() / temperature).log_softmax(-1)
        return nn.functional.kl_div(predicted, expected, reduction="sum", log_target=True)

    is_target = nn.functional.pad(batch["labels"][:, 1:] != -100, (0, 1)).to(hidden_states.device)
    chunks = zip(hidden_states[is_target].split(chunk_size), parent_states[is_target].split(chunk_size))
    loss = sum(checkpoint(divergence, *chunk, use_reentrant=False) for chunk in chunks)
    return temperature**2 * loss / (is_target.sum() if num_items_in_batch is None else num_items_in_batch)
