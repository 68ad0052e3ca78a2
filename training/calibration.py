# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Calibration of a fresh graft: TTT's queries and keys get a mean of 0 by the biases of their projections."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..files_ttt_omni import new_folder
from ..loading import find_device, read_config
from ..modeling_ttt_omni import TTTOmniForCausalLM
from ..processing_ttt_omni import TTTOmniProcessor
from .data import ConversationCollator, ConversationDataset


INPUTS = ("input_ids", "inputs_embeds", "input_features", "input_features_mask", "attention_mask", "position_ids")


@torch.no_grad()
def calibrate(model: TTTOmniForCausalLM, batches: Iterable[dict[str, torch.Tensor]]) -> None:
    """
    Folds minus the mean of q and k over all tokens, padding excluded, into the biases of TTT's q and k projections.

    A mean that all keys have in common, as those of trained attention do, hides what tells them apart: a memory that
    is trained on such keys gives little of it back (`benchmarks/recall.py`).

    Args:
        model: a graft; its biases are changed in place. A second calibration on the same data changes nothing, as
            long as TTT's output does not reach a further TTT layer: with a gate of 0, or in a single layer.
        batches: arguments of `forward`, each run once; `labels` are not needed.

    Raises:
        ValueError: if the model has no TTT or is offloaded, or the batches have no tokens.
    """
    layers = [layer.ttt for layer in model.model.language_model.layers if hasattr(layer, "ttt")]
    if not layers:
        raise ValueError("There is nothing to calibrate: no layer of the model has TTT.")
    projections = [projection for ttt in layers for projection in (ttt.q_proj, ttt.k_proj)]
    if any(projection.bias.device.type == "meta" for projection in projections):
        raise ValueError("An offloaded model cannot be calibrated: load it onto one device.")
    sums = {projection: projection.bias.new_zeros((), dtype=torch.float64) for projection in projections}
    num_tokens, mask = 0, None

    def add(projection, args, output):
        tokens = output.flatten(0, -2) if mask is None else output[mask.to(output.device)]  # [N, H * D]
        sums[projection] = sums[projection] + tokens.double().sum(0)

    hooks = [projection.register_forward_hook(add) for projection in projections]
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            batch = {name: batch[name].to(model.device) for name in INPUTS if name in batch}
            mask = batch["attention_mask"].bool() if "attention_mask" in batch else None
            tokens = batch["input_ids"] if "input_ids" in batch else batch["inputs_embeds"][..., 0]
            num_tokens += tokens.numel() if mask is None else int(mask.sum())
            model.model(**batch, use_cache=False)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    if num_tokens == 0:
        raise ValueError("There is nothing to calibrate on: the batches have no tokens.")
    for projection, total in sums.items():
        projection.bias -= (total / num_tokens).to(projection.bias)


def calibrate_folder(
    model: str | os.PathLike, data: str | os.PathLike, output: str | os.PathLike, device: str = "auto"
) -> None:
    """
    Calibrates the model in the folder `model` on all conversations of a manifest, and saves it in a new folder.

    Args:
        data: a manifest, see [`ConversationDataset`].
        output: folder to make.
        device: "auto" for an accelerator if there is one.

    Raises:
        ValueError, OSError: a model, a manifest or a folder that will not do.
    """
    config, device = read_config(model), find_device(device)
    with new_folder(output) as folder:
        processor = TTTOmniProcessor.from_pretrained(model)
        dataset = ConversationDataset(data, processor, config)
        graft = TTTOmniForCausalLM.from_pretrained(model, dtype="auto", device_map=device)
        batches = DataLoader(dataset, collate_fn=ConversationCollator(processor.tokenizer.pad_token_id))
        calibrate(graft, tqdm(batches, desc="Calibrating", unit=" conversations"))
        graft.save_pretrained(folder)
        processor.save_pretrained(folder)
        if (card := Path(model, "README.md")).is_file():
            shutil.copyfile(card, folder / card.name)
