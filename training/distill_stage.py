# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""`ttt-omni distill`: a graft gets its parent's quality back, first layer by layer, then as a whole. Needs PEFT."""

from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments, set_seed
from transformers.hf_argparser import HfArg

from ..modeling_ttt_omni import TTTOmniForCausalLM
from .arguments import StageParser, check_stage
from .distillation import layer_matching_loss, logit_matching_loss, make_parent
from .lora import layers_from_ttt, projections_of, ttt_lora_config
from .stages import StageArguments, StageTrainer, add_adapter, load_base, read_data, run


OBJECTIVES = ("layers", "logits")
DESCRIPTION = "Give a graft its parent's quality back, one stage of distillation."
EPILOG = """\
example, first each TTT layer and then the model, where --model is from `ttt-omni calibrate`:
  ttt-omni distill layers --model calibrated --source SOURCE --manifest units.jsonl --output_dir matched
  ttt-omni distill logits --model calibrated --source SOURCE --manifest units.jsonl --output_dir distilled \\
      --previous matched

The same command again goes on from the last checkpoint after an interruption. The adapter in --output_dir holds TTT in
full, and LoRA for the rest of the language model; `ttt-omni finetune` takes it as --previous.

Everything runs on one device, where the parent shares the graft's weights. Of Llama 3.1 8B with TTT in 8
layers, 0.6 billion parameters are trained, which take 9 GB with their gradients and Adam's moments, beside 19 GB."""


@dataclass
class DistillationArguments(StageArguments):
    """Those of a stage, and what it learns from the parent."""

    objective: str = HfArg(
        help="`layers`: each TTT layer learns what the parent's attention does; `logits`: the model what the parent "
        "says.",
        default="logits",
    )
    source: str | None = HfArg(
        help="Folder of the checkpoint that the graft was converted from; needed if TTT stands in attention's place.",
        default=None,
    )
    temperature: float = HfArg(help="Of the logits.", default=1.0)
    label_weight: float = HfArg(
        help="Weight of the `loss` of the labels beside that of the parent's logits.", default=0.0
    )

    def __post_init__(self):
        super().__post_init__()
        if self.objective not in OBJECTIVES:
            raise ValueError(f"`objective` must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}.")
        if self.backpropagate_length is not None:
            raise ValueError("`backpropagate_length` has no meaning here: the parent reads a sequence as a whole.")
        if self.write_penalty > 0:
            raise ValueError("`write_penalty` has no meaning here: it is for `ttt-omni finetune`.")


class DistillationTrainer(StageTrainer):
    """The trainer of a stage, whose losses compare with the parent."""

    def __init__(self, *args, parent: TTTOmniForCausalLM, **kwargs):
        super().__init__(*args, **kwargs)
        self.parent = parent

    def _describe_stage(self) -> dict[str, Any]:
        return {"distillation": self.stage.objective}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with self.accelerator.autocast():  # of what is not called through the model's forward
            if self.stage.objective == "layers":
                loss, outputs = layer_matching_loss(model, self.parent, inputs), {}
                if model.training:
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


def parse(words: list[str]) -> tuple[DistillationArguments, TrainingArguments]:
    """The arguments of `ttt-omni distill`, as [`StageParser.parse`] does."""
    parser = StageParser("distill", DistillationArguments, "distillation", description=DESCRIPTION, epilog=EPILOG)
    stage, arguments = parser.parse(words)
    if arguments.world_size > 1:
        raise ValueError("distillation runs on one device; start it without a launcher.")
    return stage, arguments


def train(stage: DistillationArguments, arguments: TrainingArguments) -> DistillationTrainer:
    """
    Runs the stage.

    Raises:
        ValueError, OSError: a model, a source, a manifest or a folder that will not do.
    """
    check_stage(stage, arguments)
    set_seed(arguments.seed)
    graft = load_base(stage, arguments).to(arguments.device)
    parent = make_parent(graft, stage.source)
    data = read_data(stage, graft.config)
    # Layers are matched without LoRA; `finetune`, for which it is, needs it no lower than where TTT begins.
    adapted = (
        layers_from_ttt(graft) if stage.objective == "layers" else range(graft.config.text_config.num_hidden_layers)
    )
    projections = projections_of(adapted, "self_attn", "mlp")
    fresh = ttt_lora_config(graft, stage.rank, modules_to_save=["ttt", "ttt_gate"], target_modules=projections)
    model = add_adapter(graft, fresh, stage)
    return run(DistillationTrainer(model, arguments, stage=stage, parent=parent, **data))


def main(words: list[str]) -> None:
    """`ttt-omni distill` with these arguments."""
    train(*parse(words))
