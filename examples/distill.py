# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
Gives a graft its parent's quality back, in two stages on conversations of at most so many tokens: first each TTT layer
learns what the parent's attention does (`objective: layers`), then the model what the parent says (`logits`).

    ttt-omni convert --mode replace --source SOURCE … --output graft
    ttt-omni calibrate --model graft --data corpus.jsonl --output calibrated
    python examples/distill.py examples/distillation/layers.yaml model=calibrated source=SOURCE \\
        manifest=corpus.jsonl output_dir=matched
    python examples/distill.py examples/distillation/logits.yaml model=calibrated source=SOURCE \\
        manifest=corpus.jsonl output_dir=distilled previous=matched

A YAML file holds the fields of `DistillationArguments` and of Transformers' `TrainingArguments`; `name=value` after it
wins. The same command again goes on from the last checkpoint after an interruption. The adapter in `output_dir` holds
TTT in full, and LoRA for the rest of the language model; `examples/finetune.py` takes it as `previous`.

Everything runs on one device, where the parent shares the graft's weights. Of Llama 3.1 8B with TTT in 8 layers, 0.6
billion parameters are trained, which take 9 GB with their gradients and Adam's moments beside the 19 GB of the model.
"""

from dataclasses import dataclass

import finetune
from finetune import StageArguments, StageTrainer
from transformers import TrainingArguments, set_seed

from ttt_omni import TTTOmniForCausalLM, ttt_lora_config
from ttt_omni.training import (
    layer_matching_loss,
    logit_matching_loss,
    make_parent,
    write_adapter_card,
)


OBJECTIVES = ("layers", "logits")
PROJECTIONS = r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"  # that LoRA adapts


@dataclass
class DistillationArguments(StageArguments):
    """
    Args:
        objective: "layers" or "logits".
        source: the checkpoint that the graft was converted from, a folder or a name on the Hub; needed if TTT stands
            in attention's place.
        temperature: of the logits.
        label_weight: weight of the `loss` of the labels beside that of the parent's logits.
    """

    objective: str = "logits"
    source: str | None = None
    temperature: float = 1.0
    label_weight: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if self.objective not in OBJECTIVES:
            raise ValueError(f"`objective` must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}.")
        if self.backpropagate_length is not None:
            raise ValueError("`backpropagate_length` has no meaning here: the parent reads a sequence as a whole.")


class DistillationTrainer(StageTrainer):
    """The trainer of a stage, whose losses compare with the parent."""

    def __init__(self, *args, parent: TTTOmniForCausalLM, **kwargs):
        super().__init__(*args, **kwargs)
        self.parent = parent

    def create_model_card(self, *args, **kwargs) -> None:
        """Ours, also where Transformers would write one of its own before a push."""
        stage = {"tokens": self.stage.length, "distillation": self.stage.objective}
        stage["previous stage"] = self.stage.previous or "none"
        write_adapter_card(self.args.output_dir, base_model=self.stage.model, stage=stage)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with self.accelerator.autocast():  # of what is not called through the model's forward
            if self.stage.objective == "layers":
                loss, outputs = layer_matching_loss(model, self.parent, inputs), {}
                loss = loss / self.current_gradient_accumulation_steps
            else:
                label_loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
                loss = self.stage.label_weight * label_loss + logit_matching_loss(
                    outputs.last_hidden_state,
                    self.parent,
                    inputs,
                    self.stage.temperature,
                    self.stage.loss_chunk_size,
                    num_items_in_batch,
                )
        return (loss, outputs) if return_outputs else loss


def read_arguments(path: str, *overrides: str) -> tuple[DistillationArguments, TrainingArguments]:
    """The fields in the YAML file `path`, and those that `name=value` set anew."""
    stage, arguments = finetune.read_arguments(path, *overrides, stage_class=DistillationArguments)
    if arguments.world_size > 1:
        raise ValueError("distillation runs on one device; start it without a launcher.")
    return stage, arguments


def train(stage: DistillationArguments, arguments: TrainingArguments) -> DistillationTrainer:
    """Runs the stage."""
    set_seed(arguments.seed)
    graft = TTTOmniForCausalLM.from_pretrained(stage.model, dtype="auto").to(arguments.device)
    parent = make_parent(graft, stage.source)
    data = finetune.read_data(stage, graft.config)
    fresh = ttt_lora_config(graft, stage.rank, modules_to_save=["ttt", "ttt_gate"], target_modules=PROJECTIONS)
    model = finetune.add_adapter(graft, fresh, stage, arguments)
    return finetune.run(DistillationTrainer(model, arguments, stage=stage, parent=parent, **data))


if __name__ == "__main__":
    finetune.main(__doc__, read_arguments, train)
