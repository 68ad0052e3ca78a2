# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""`ttt-omni finetune`: a graft learns to use its memory, in stages on ever longer conversations. Needs PEFT."""

import atexit
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments, set_seed
from transformers.hf_argparser import HfArg

from ..configuration_ttt_omni import TTTOmniConfig
from ..layers_ttt_omni import TTTOmniTTT
from ..modeling_ttt_omni import TTTOmniForCausalLM
from ..processing_ttt_omni import TTTOmniProcessor
from .arguments import StageParser, check_stage
from .data import ConversationCollator, ConversationDataset
from .lora import ttt_lora_config, write_adapter_card
from .truncation import find_pieces, take_pieces


LOSSES = ("both", "lm", "ctc")
DESCRIPTION = "Teach a graft to use its memory, one stage of fine-tuning."
EPILOG = """\
example, where --model is from `ttt-omni calibrate`:
  ttt-omni finetune 8k --model calibrated --manifest units.jsonl --output_dir stage-8k
  ttt-omni finetune 16k --model calibrated --manifest units.jsonl --output_dir stage-16k --previous stage-8k

The same command again goes on from the last checkpoint after an interruption. The adapter and its card end up in
--output_dir, and on the Hub with --push_to_hub --hub_model_id REPOSITORY. On several devices:
  accelerate launch -m ttt_omni finetune 8k ..."""


@dataclass
class StageArguments:
    """The fields of a stage beside those of [`TrainingArguments`]; the help of each says what it is."""

    model: str = HfArg(help="Folder or repository of the calibrated graft.")
    manifest: str = HfArg(help="Conversations to train on, a JSONL file in LLaMA-Omni's form.")
    length: int = HfArg(help="Conversations are joined into ones of at most so many tokens.")
    eval_manifest: str | None = HfArg(
        help="Conversations to evaluate on, when `eval_strategy` says so or else at the end.", default=None
    )
    previous: str | None = HfArg(
        help="Folder or repository of the adapter of the stage before; without it, a fresh one is made.", default=None
    )
    rank: int = HfArg(help="Rank of a fresh adapter.", default=16)
    memory_learning_rate: float = HfArg(help="For what belongs to TTT; `learning_rate` is for the rest.", default=1e-3)
    loss: str = HfArg(help="`lm` of the text, `ctc` of the speech, or `both`.", default="both")
    loss_chunk_size: int = HfArg(help="Positions whose logits are held at a time.", default=1024)
    packing: bool = HfArg(help="Put the items of a batch into one row rather than padding them.", default=True)
    backpropagate_length: int | None = HfArg(
        help="Gradients go back through so many tokens at most, for lengths whose activations do not fit: forward and "
        "backward pass run piece by piece, each on what those before left in TTT's state and in attention's cache. A "
        "piece is cut before an answer rather than in it, so that it may be somewhat shorter, and all losses are "
        "those of the whole. Without activation checkpointing, which has no use for a cache.",
        default=None,
    )
    write_penalty: float = HfArg(
        help="Weight, beside the loss, of the mean share of `ttt_base_lr` with which tokens are learnt, so that only "
        "what is asked for later is written into the memory. Without activation checkpointing.",
        default=0.0,
    )
    drop_audio_padding: bool = HfArg(
        help="Give no embeddings to the padding of speech to 30 s, other than the original.", default=False
    )

    def __post_init__(self):
        if self.loss not in LOSSES:
            raise ValueError(f"`loss` must be one of {', '.join(LOSSES)}, got {self.loss!r}.")
        for name in ("length", "rank", "loss_chunk_size", "backpropagate_length"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.write_penalty < float("inf"):
            raise ValueError(f"`write_penalty` must be a number of at least 0, got {self.write_penalty}.")
        if self.backpropagate_length is not None and not self.packing:
            raise ValueError(
                "`backpropagate_length` takes sequences one after the other, which needs `packing: true`."
            )


class StageTrainer(Trainer):
    """
    Transformers' trainer with a learning rate for the memory, and with the losses of speech and text.

    The log has both beside `loss`, as `lm_loss` and `ctc_loss`, and beside `eval_loss` with `eval_` before them: means
    over the same steps, batches and processes.
    """

    def __init__(self, *args, stage: StageArguments, **kwargs):
        super().__init__(*args, **kwargs)
        self.stage = stage
        self.label_names = ["labels"]  # by which a batch has a loss, not only if it has every argument named so
        self.num_units_in_batch = None  # of speech, in all that a step of the optimizer takes
        self.num_steps = 0  # of the optimizer, since the last log
        self.parts = defaultdict(float)  # of the loss, summed over these steps
        self.eval_parts = defaultdict(list)  # of each batch of an evaluation

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
            stage = {"tokens": self.stage.length, **self._describe_stage()}
            stage["previous stage"] = self.stage.previous or "none"
            write_adapter_card(self.args.output_dir, base_model=self.stage.model, stage=stage)

    def _describe_stage(self) -> dict[str, Any]:
        return {"loss": self.stage.loss}

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._count_units(batches, device)
        self.num_steps += 1
        return batches, num_items_in_batch

    def prediction_step(self, model, inputs, *args, **kwargs):
        self._count_units([inputs], self.args.device)
        return super().prediction_step(model, inputs, *args, **kwargs)

    def _count_units(self, batches, device):
        num_units = torch.tensor([sum(count_labels(batch.get("unit_labels")) for batch in batches)], device=device)
        self.num_units_in_batch = int(self.accelerator.gather(num_units).sum())

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
        is_penalised = self.stage.write_penalty > 0
        with record_write_strengths(model) if is_penalised else nullcontext() as strengths:
            outputs = model(**inputs)
        parts = {"lm_loss": outputs.lm_loss}
        if self.stage.loss != "lm":
            parts["ctc_loss"] = outputs.ctc_loss
            if num_items_in_batch is not None and self.num_units_in_batch:
                # The model weighs it by the share of these tokens in the batch, which need not be that of the units.
                share_of_tokens = max(count_labels(inputs["labels"][:, 1:]), 1) / num_items_in_batch
                share_of_units = count_labels(inputs["unit_labels"]) / self.num_units_in_batch
                parts["ctc_loss"] = parts["ctc_loss"] * share_of_units / share_of_tokens
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # Those items are of all processes, whose mean is taken.
            parts = {name: part * self.accelerator.num_processes for name, part in parts.items()}
        self._note(parts)
        if self.stage.loss == "both":
            config = self.accelerator.unwrap_model(model).config.speech_decoder_config
            loss = parts["lm_loss"] + config.ctc_loss_weight * parts["ctc_loss"]
        else:
            loss = parts[f"{self.stage.loss}_loss"]
        if is_penalised:
            strength = torch.stack([x.mean() for x in strengths]).mean()
            strength = strength / (self.current_gradient_accumulation_steps if model.training else 1)
            self._note({"write_strength": strength})
            loss = loss + self.stage.write_penalty * strength
        return (loss, outputs) if return_outputs else loss

    def _note(self, parts: Mapping[str, torch.Tensor]) -> None:
        """Keeps the parts of a loss for the log; those of an evaluation as Transformers' trainer does the whole."""
        for name, part in parts.items():
            if self.model.training:
                self.parts[name] += part.detach()
            else:
                batch = part.detach().repeat(self.args.eval_batch_size)
                self.eval_parts[name].append(self.gather_function(batch))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            for name, part in self.parts.items():
                logs[name] = self.accelerator.gather(part).mean().item() / self.num_steps
            self.parts.clear()
            self.num_steps = 0
        if "eval_loss" in logs:
            logs |= {f"eval_{name}": torch.cat(batches).mean().item() for name, batches in self.eval_parts.items()}
            self.eval_parts.clear()
        super().log(logs, start_time)


@contextmanager
def record_write_strengths(model: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """The write strengths `[B, T, H]` of each TTT layer in each forward pass of the body."""
    strengths = []
    handles = [
        module.register_forward_pre_hook(lambda ttt, args: strengths.append(ttt.write_strength(args[0])))
        for module in model.modules()
        if isinstance(module, TTTOmniTTT)
    ]
    try:
        yield strengths
    finally:
        for handle in handles:
            handle.remove()


def count_labels(labels: torch.Tensor | None) -> int:
    """Number of labels other than -100."""
    return 0 if labels is None else int((labels != -100).sum())


def parse(words: list[str]) -> tuple[StageArguments, TrainingArguments]:
    """The arguments of `ttt-omni finetune`, as [`StageParser.parse`] does."""
    parser = StageParser("finetune", StageArguments, "stages", description=DESCRIPTION, epilog=EPILOG)
    stage, arguments = parser.parse(words)
    if stage.backpropagate_length is not None and arguments.activation_checkpointing:
        raise ValueError("`backpropagate_length` needs `activation_checkpointing: false`: its pieces pass on a cache.")
    if stage.write_penalty > 0 and arguments.activation_checkpointing:
        raise ValueError("`write_penalty` needs `activation_checkpointing: false`.")
    if stage.backpropagate_length is not None and arguments.world_size > 1:
        if arguments.per_device_train_batch_size > 1:
            raise ValueError("`backpropagate_length` on several processes needs `per_device_train_batch_size: 1`.")
        arguments.ddp_find_unused_parameters = True  # only a sequence's first piece has TTT's initial state
    return stage, arguments


def last_checkpoint(folder: Path) -> str | None:
    """The last checkpoint in `folder` that is complete: an interruption may have come while one was written."""
    complete = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return max(map(str, complete), key=lambda path: int(path.rpartition("-")[2]), default=None)


def load_base(stage: StageArguments, arguments: TrainingArguments) -> TTTOmniForCausalLM:
    """The graft, in float32 unless the passes are in half precision by autocast."""
    is_mixed = arguments.bf16 or arguments.fp16
    return TTTOmniForCausalLM.from_pretrained(stage.model, dtype="auto" if is_mixed else torch.float32)


def read_data(stage: StageArguments, config: TTTOmniConfig) -> dict[str, Any]:
    """The arguments of a trainer that say what it trains and is evaluated on."""
    processor = TTTOmniProcessor.from_pretrained(stage.model)
    datasets = {
        name: manifest
        and ConversationDataset(
            manifest,
            processor,
            config,
            join_to_length=stage.length,
            processor_kwargs={"drop_audio_padding": True} if stage.drop_audio_padding else {},
        )
        for name, manifest in (("train_dataset", stage.manifest), ("eval_dataset", stage.eval_manifest))
    }
    return {**datasets, "data_collator": ConversationCollator(processor.tokenizer.pad_token_id, stage.packing)}


def add_adapter(base: TTTOmniForCausalLM, fresh: LoraConfig, stage: StageArguments) -> PeftModel:
    """`base` with the adapter of the stage before, or else a fresh one, to be trained."""
    if stage.previous is None:
        model = get_peft_model(base, fresh)
    else:
        model = PeftModel.from_pretrained(base, stage.previous, is_trainable=True)
    for parameter in model.parameters():  # in half precision they would lose small steps
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    return model


def run(trainer: StageTrainer) -> StageTrainer:
    """Trains from the last checkpoint if there is one, and saves the adapter, its card and the log."""
    trainer.train(resume_from_checkpoint=last_checkpoint(Path(trainer.args.output_dir)))
    trainer.save_model()
    if trainer.eval_dataset is not None and trainer.args.eval_strategy == "no":
        trainer.log_metrics("eval", trainer.evaluate())
    trainer.save_state()
    trainer.create_model_card()
    return trainer


def train(stage: StageArguments, arguments: TrainingArguments) -> StageTrainer:
    """
    Runs the stage.

    Raises:
        ValueError, OSError: a model, a manifest or a folder that will not do.
    """
    check_stage(stage, arguments)
    set_seed(arguments.seed)
    base = load_base(stage, arguments)
    data = read_data(stage, base.config)
    dataset = data["train_dataset"]
    needed = {"lm": 0, "both": 1, "ctc": len(dataset.offsets)}[stage.loss]
    if dataset.num_spoken < needed:
        raise ValueError(f"{stage.manifest} has too few conversations with `units` for `loss={stage.loss}`.")
    model = add_adapter(base, ttt_lora_config(base, stage.rank), stage)
    return run(StageTrainer(model, arguments, stage=stage, **data))


def main(words: list[str]) -> None:
    """`ttt-omni finetune` with these arguments."""
    stage, arguments = parse(words)
    # A process that ended with its threads for the others still running would abort.
    atexit.register(PartialState().destroy_process_group)
    train(stage, arguments)
