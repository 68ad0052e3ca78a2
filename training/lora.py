# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Adapters of PEFT for the layers that remember."""

import os
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import ModelCardData
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..files_ttt_omni import new_file, new_folder
from ..layers_ttt_omni import TTT_MODULES_TO_SAVE
from ..loading import read_config
from ..modeling_ttt_omni import TTTOmniForCausalLM
from ..processing_ttt_omni import TTTOmniProcessor


if TYPE_CHECKING:
    from peft import LoraConfig


CARD = """\
# Adapter of [{base_model}](https://huggingface.co/{base_model})

Fine-tuned with TTT-Omni.

| | |
| --- | --- |
{rows}

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoProcessor

model = AutoModelForCausalLM.from_pretrained("{base_model}", trust_remote_code=True)
model = PeftModel.from_pretrained(model, "path or repository of this adapter")
processor = AutoProcessor.from_pretrained("{base_model}", trust_remote_code=True)
```
"""


def ttt_lora_config(model: TTTOmniForCausalLM, rank: int = 16, **kwargs: Any) -> "LoraConfig":
    """
    The recommended adapter: LoRA on all projections from the first layer with TTT on, and TTT's small modules in full.

    The layers below, encoder and speech decoder stay as they are, so that no gradient runs through them.

    Args:
        model: a graft.
        rank: of LoRA.
        kwargs: further arguments of [`peft.LoraConfig`], such as `use_dora=True`; they win over those set here.

    Raises:
        ValueError: if the model has no TTT.
    """
    from peft import LoraConfig  # an optional dependency

    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    values = {
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": projections_of(layers_from_ttt(model), "self_attn", "mlp", "ttt"),
        "modules_to_save": [name for name in TTT_MODULES_TO_SAVE if name in names],
    }
    return LoraConfig(**(values | kwargs))


def merge_adapter(adapter: str | os.PathLike, output: str | os.PathLike) -> None:
    """
    Writes the model with the adapter in it, in the base's dtype, into the new folder `output`.

    Args:
        adapter: folder or repository of an adapter of ours. It is merged in float32, of which memory is needed for
            all parameters, and rounded once.

    Raises:
        ValueError: if it is no adapter, or one of another model.
        FileExistsError: `output` is a file, or a folder that is not empty.
    """
    base = base_of(adapter)
    read_config(base)
    with new_folder(output) as folder:
        load_merged(adapter, "auto").save_pretrained(folder)
        TTTOmniProcessor.from_pretrained(base).save_pretrained(folder)


def base_of(adapter: str | os.PathLike) -> str:
    """The folder or repository of the model that an adapter is of. Raises ValueError if it is no adapter."""
    from peft import PeftConfig  # an optional dependency

    return PeftConfig.from_pretrained(adapter).base_model_name_or_path


def load_merged(adapter: str | os.PathLike, dtype: str | torch.dtype, **kwargs: Any) -> PreTrainedModel:
    """
    Any causal language model of Transformers with an adapter in it: merged in float32, and then rounded as a saved
    model is.

    Args:
        dtype: "auto" for that of the base.
        kwargs: further arguments of `from_pretrained`.
    """
    from peft import PeftModel  # an optional dependency

    base = base_of(adapter)
    found = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    if dtype == "auto":
        dtype = AutoConfig.from_pretrained(base).dtype
    with TemporaryDirectory() as folder:  # loading knows what stays in float32
        found.merge_and_unload().save_pretrained(folder)
        del found
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **kwargs)


def layers_from_ttt(model: TTTOmniForCausalLM) -> range:
    """Indices of the layers from the first one with TTT on. Raises ValueError if none has TTT."""
    layers = model.model.language_model.layers
    first = next((index for index, layer in enumerate(layers) if hasattr(layer, "ttt")), None)
    if first is None:
        raise ValueError("There is nothing to adapt: no layer of the model has TTT.")
    return range(first, len(layers))


def projections_of(layers: Iterable[int], *parts: str) -> str:
    """The pattern of all projections of these parts of these layers, as PEFT's `target_modules` takes it."""
    return rf"model\.language_model\.layers\.({'|'.join(map(str, layers))})\.({'|'.join(parts)})\.\w+_proj"


def write_adapter_card(folder: str | os.PathLike, base_model: str, stage: dict[str, Any]) -> None:
    """
    Writes `README.md` into the folder of an adapter, from where `push_to_hub` or `hf upload` takes it.

    Args:
        folder: that of the adapter.
        base_model: repository, or folder, of the model that it belongs to.
        stage: what the card says of its training, by name.
    """
    data = ModelCardData(base_model=base_model, library_name="peft", tags=["lora", "ttt-omni"])
    rows = "\n".join(f"| {name} | {value} |" for name, value in stage.items())
    text = f"---\n{data.to_yaml()}\n---\n\n{CARD.format(base_model=base_model, rows=rows)}"
    with new_file(Path(folder, "README.md")) as file:
        file.write_text(text, encoding="utf-8")
