# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
Teaches a graft to use its memory: one stage of fine-tuning with PEFT, on conversations of at most so many tokens.

    ttt-omni calibrate --model GRAFT --data corpus.jsonl --output calibrated
    python examples/finetune.py examples/stages/8k.yaml model=calibrated manifest=corpus.jsonl output_dir=stage-8k
    python examples/finetune.py examples/stages/16k.yaml model=calibrated manifest=corpus.jsonl output_dir=stage-16k \\
        previous=stage-8k

A YAML file holds the fields of `StageArguments` and of Transformers' `TrainingArguments`; `name=value` after it wins.
`accelerate launch examples/finetune.py …` runs it on several devices. The same command again goes on from the last
checkpoint after an interruption. The adapter and its card end up in `output_dir`, and on the Hub with
`push_to_hub=true hub_model_id=REPOSITORY`.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed

from ttt_omni import TTTOmniConfig, TTTOmniForCausalLM, TTTOmniProcessor, ttt_lora_config
from ttt_omni.conversion import ConversionError
from ttt_omni.training import ConversationCollator, ConversationDataset, ManifestError, write_adapter_card
from ttt_omni.training.truncation import find_pieces, take_pieces


LOSSES = ("both", "lm", "ctc")


@dataclass
class StageArguments:
    """
    Args:
        model: folder or repository of the calibrated graft.
        manifest: conversations to train on, see [`ConversationDataset`].
        length: conversations are joined into ones of at most so many tokens.
        previous: folder or repository of the adapter of the stage before; without it, a fresh one is made.
        rank: of a fresh adapter.
        memory_learning_rate: for what belongs to TTT; `learning_rate` is for the rest.
        loss: "lm", "ctc", or "both".
        loss_chunk_size: positions whose logits are held at a time.
        packing: put the items of a batch into one row rather than padding them.
        backpropagate_length: gradients go back through so many tokens at most, for lengths whose activations do not
            fit: forward and backward pass run piece by piece, each on what those before left in TTT's state and in
            attention's cache. A piece is cut before an answer rather than in it, so that it may be somewhat shorter,
            and all losses are those of the whole. Without gradient checkpointing, which has no use for a cache.
        drop_audio_padding: give no embeddings to the padding of speech to 30 s, other than the original.
    """

    model: str
    manifest: str
    length: int
    previous: str | None = None
    rank: int = 16
    memory_learning_rate: float = 1e-3
    loss: str = "both"
    loss_chunk_size: int = 1024
    packing: bool = True
    backpropagate_length: int | None = None
    drop_audio_padding: bool = False

    def __post_init__(self):
        if self.loss not in LOSSES:
            raise ValueError(f"`loss` must be one of {', '.join(LOSSES)}, got {self.loss!r}.")
        if self.backpropagate_length is not None and self.backpropagate_length < 1:
            raise ValueError(f"`backpropagate_length` must be at least 1, got {self.backpropagate_length}.")
        if self.backpropagate_length is not None and not self.packing:
            raise ValueError(
                "`backpropagate_length` takes sequences one after the other, which needs `packing: true`."
            )


class StageTrainer(Trainer):
    """Transformers' trainer with a learning rate for the memory, and with the losses of speech and text."""

    def __init__(self, *args, stage: StageArguments, **kwargs):
        super().__init__(*args, **kwargs)
        self.stage = stage
        self.num_units_in_batch = None  # of speech, in all that a step of the optimizer takes

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if not is_new:
            return optimizer
        named_parameters = (self.model if model is None else model).named_parameters()
        memory = {id(parameter) for name, parameter in named_parameters if ".ttt." in name or ".ttt_gate." in name}
        for group in list(optimizer.param_groups):
            parameters = group["params"]
            group["params"] = [parameter for parameter in parameters if id(parameter) not in memory]
            taken = [parameter for parameter in parameters if id(parameter) in memory]
            if taken:
                optimizer.add_param_group({**group, "params": taken, "lr": self.stage.memory_learning_rate})
        return optimizer

    def create_model_card(self, *args, **kwargs) -> None:
        """Ours, also where Transformers would write one of its own before a push."""
        if self.is_world_process_zero():
            stage = {"tokens": self.stage.length, "loss": self.stage.loss}
            stage["previous stage"] = self.stage.previous or "none"
            write_adapter_card(self.args.output_dir, base_model=self.stage.model, stage=stage)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        num_units = torch.tensor([sum(count_labels(batch.get("unit_labels")) for batch in batches)], device=device)
        self.num_units_in_batch = int(self.accelerator.gather(num_units).sum())
        return batches, num_items_in_batch

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.stage.backpropagate_length is None:
            return super().training_step(model, inputs, num_items_in_batch)
        config = self.accelerator.unwrap_model(model).config
        pieces = find_pieces(inputs, self.stage.backpropagate_length, config)
        # Processes exchange weights and gradients in each pass, so that each takes as many as the one with the most.
        num_pieces = self.accelerator.gather(torch.tensor([len(pieces)], device=self.args.device)).max()
        passes = take_pieces(inputs, pieces, config, int(num_pieces))
        return sum(super(StageTrainer, self).training_step(model, piece, num_items_in_batch) for piece in passes)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = {**inputs, "loss_chunk_size": self.stage.loss_chunk_size, "num_items_in_batch": num_items_in_batch}
        if self.stage.loss == "lm":
            inputs.pop("unit_labels", None)
        else:  # where no answer was spoken too, as another process may run the speech decoder
            inputs.setdefault("unit_labels", inputs["labels"].new_empty(len(inputs["labels"]), 0))
        outputs = model(**inputs)
        loss = outputs.lm_loss
        if self.stage.loss != "lm":
            ctc_loss = outputs.ctc_loss
            if num_items_in_batch is not None and self.num_units_in_batch:
                # The model weighs it by the share of these tokens in the batch, which need not be that of the units.
                share_of_tokens = max(count_labels(inputs["labels"][:, 1:]), 1) / num_items_in_batch
                ctc_loss = ctc_loss * count_labels(inputs["unit_labels"]) / self.num_units_in_batch / share_of_tokens
            config = self.accelerator.unwrap_model(model).config.speech_decoder_config
            loss = ctc_loss if self.stage.loss == "ctc" else loss + config.ctc_loss_weight * ctc_loss
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # those items are of all processes, whose mean is taken
        return (loss, outputs) if return_outputs else loss


def count_labels(labels: torch.Tensor | None) -> int:
    """Number of labels other than -100."""
    return 0 if labels is None else int((labels != -100).sum())


def read_arguments(
    path: str, *overrides: str, stage_class: type[StageArguments] = StageArguments
) -> tuple[StageArguments, TrainingArguments]:
    """The fields in the YAML file `path`, and those that `name=value` set anew."""
    values: dict[str, Any] = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"{override!r} is not of the form name=value.")
        values[name] = yaml.safe_load(value)
    values["remove_unused_columns"] = False
    stage, arguments = HfArgumentParser((stage_class, TrainingArguments)).parse_dict(values)
    if stage.backpropagate_length is not None and arguments.activation_checkpointing:
        raise ValueError("`backpropagate_length` needs `activation_checkpointing: false`: its pieces pass on a cache.")
    if stage.backpropagate_length is not None and arguments.world_size > 1:
        if arguments.per_device_train_batch_size > 1:
            raise ValueError("`backpropagate_length` on several processes needs `per_device_train_batch_size: 1`.")
        arguments.ddp_find_unused_parameters = True  # only a sequence's first piece has TTT's initial state
    if arguments.push_to_hub and Path(stage.model).is_dir():
        raise ValueError(f"An adapter on the Hub needs a base there: push {stage.model}, and name its repository.")
    return stage, arguments


def last_checkpoint(folder: Path) -> str | None:
    """The last checkpoint in `folder` that is complete: an interruption may have come while one was written."""
    complete = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return max(map(str, complete), key=lambda path: int(path.rpartition("-")[2]), default=None)


def read_data(stage: StageArguments, config: TTTOmniConfig) -> dict[str, Any]:
    """The arguments of a trainer that say what it trains on."""
    processor = TTTOmniProcessor.from_pretrained(stage.model)
    dataset = ConversationDataset(
        stage.manifest,
        processor,
        config,
        join_to_length=stage.length,
        processor_kwargs={"drop_audio_padding": stage.drop_audio_padding},
    )
    collator = ConversationCollator(processor.tokenizer.pad_token_id, stage.packing)
    return {"train_dataset": dataset, "data_collator": collator}


def add_adapter(
    base: TTTOmniForCausalLM, fresh: LoraConfig, stage: StageArguments, arguments: TrainingArguments
) -> PeftModel:
    """`base` with the adapter of the stage before, or else a fresh one, to be trained."""
    if stage.previous is None:
        model = get_peft_model(base, fresh)
    else:
        model = PeftModel.from_pretrained(base, stage.previous, is_trainable=True)
    if arguments.bf16:  # of which the passes are, by autocast; weights in it would lose small steps
        for parameter in model.parameters():
            parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    return model


def run(trainer: StageTrainer) -> StageTrainer:
    """Trains from the last checkpoint if there is one, and saves the adapter and its card."""
    trainer.train(resume_from_checkpoint=last_checkpoint(Path(trainer.args.output_dir)))
    trainer.save_model()
    trainer.create_model_card()
    return trainer


def train(stage: StageArguments, arguments: TrainingArguments) -> StageTrainer:
    """Runs the stage."""
    set_seed(arguments.seed)
    base = TTTOmniForCausalLM.from_pretrained(stage.model, dtype="auto")
    data = read_data(stage, base.config)
    dataset = data["train_dataset"]
    needed = {"lm": 0, "both": 1, "ctc": len(dataset.offsets)}[stage.loss]
    if dataset.num_spoken < needed:
        raise ValueError(f"{stage.manifest} has too few conversations with `units` for `loss={stage.loss}`.")
    model = add_adapter(base, ttt_lora_config(base, stage.rank), stage, arguments)
    return run(StageTrainer(model, arguments, stage=stage, **data))


def main(doc: str, read_arguments: Callable, train: Callable) -> None:
    """A stage as a program, which ends with one line where its arguments or files will not do."""
    program, *arguments = sys.argv
    if not arguments:
        sys.exit(doc)
    try:
        stage_arguments = read_arguments(*arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"{Path(program).name}: {error}")
    try:
        train(*stage_arguments)
    except (ConversionError, ManifestError) as error:
        sys.exit(f"{Path(program).name}: {error}")


if __name__ == "__main__":
    main(__doc__, read_arguments, train)
