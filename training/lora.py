# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Adapters of PEFT for the layers that remember."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCardData

from ..files_ttt_omni import new_file
from ..layers_ttt_omni import TTT_MODULES_TO_SAVE
from ..modeling_ttt_omni import TTTOmniForCausalLM


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
    The recommended adapter: LoRA on all projections of the layers that have TTT, and TTT's small modules in full.

    The layers below, encoder and speech decoder stay as they are, so that no gradient runs through them.

    Args:
        model: a graft.
        rank: of LoRA.
        kwargs: further arguments of [`peft.LoraConfig`], such as `use_dora=True`; they win over those set here.

    Raises:
        ValueError: if the model has no TTT.
    """
    from peft import LoraConfig  # an optional dependency

    layers = [index for index, layer in enumerate(model.model.language_model.layers) if hasattr(layer, "ttt")]
    if not layers:
        raise ValueError("There is nothing to adapt: no layer of the model has TTT.")
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    indices = "|".join(map(str, layers))
    values = {
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": rf"model\.language_model\.layers\.({indices})\.(self_attn|mlp|ttt)\.\w+_proj",
        "modules_to_save": [name for name in TTT_MODULES_TO_SAVE if name in names],
    }
    return LoraConfig(**(values | kwargs))


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
