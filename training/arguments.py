# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""The arguments of a stage of training: flags, and a YAML file or one of our recipes."""

import argparse
import difflib
import tempfile
import types
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available, logging

from ..loading import find_device, read_config


logger = logging.get_logger(__name__)
EXAMPLES = Path(__file__).parent.parent / "examples"
Stage = TypeVar("Stage")


class StageParser(HfArgumentParser):
    """
    Parses what follows `ttt-omni finetune` or `distill`: flags for each field of a stage and of [`TrainingArguments`],
    and a YAML file of the same fields, over which flags win.

    Args:
        command: that is, of the two.
        stage_class: dataclass of the stage's own fields.
        recipes: folder in the examples, of YAML files that may be called by their name alone.
        kwargs: of [`argparse.ArgumentParser`].
    """

    def __init__(self, command: str, stage_class: type[Stage], recipes: str, **kwargs: Any):
        super().__init__(
            (stage_class, TrainingArguments),
            prog=f"ttt-omni {command}",
            usage="%(prog)s [CONFIG] --model MODEL --manifest FILE --output_dir DIR [--FIELD VALUE ...]",
            formatter_class=_HelpFormatter,
            **kwargs,
        )
        paths = sorted((EXAMPLES / recipes).glob("*.yaml"), key=lambda path: len(path.stem))
        self.recipes = {path.stem: path for path in paths}
        self.add_argument(
            "config", nargs="?", metavar="CONFIG", help=f"a YAML file of these fields, or one of ours: {self._names()}"
        )
        self.fields = {
            action.dest: action for action in reversed(self._actions) if action.dest not in ("help", "config")
        }
        self.fields["output_dir"].required = True
        self.hints = get_type_hints(TrainingArguments) | get_type_hints(stage_class)

    def _names(self) -> str:
        return ", ".join(self.recipes)

    def error(self, message: str) -> None:
        """One line, without the usage of all fields."""
        self.exit(2, f"ttt-omni: error: {message.rstrip('.')}. See `{self.prog} --help`.\n")

    def parse(self, words: list[str]) -> tuple[Stage, TrainingArguments]:
        """
        The stage and the trainer's arguments. A bfloat16 that only the file asks for is left out where the device
        lacks it, and without an accelerator the CPU is used.

        Raises:
            SystemExit: with one line for flags that will not do, or fields that are missing.
            ValueError, OSError: a file or a value that will not do.
        """
        required = [action for action in self.fields.values() if action.required]
        for action in required:  # the file may have them
            action.required = False
        flags, _ = self.parse_known_args(words)
        values = {} if flags.config is None else self._read(flags.config)
        for action in required:
            action.required = action.dest not in values
        use_cpu = flags.use_cpu or values.get("use_cpu", find_device().type == "cpu")
        if values.get("bf16") and not flags.bf16 and (use_cpu or not is_torch_bf16_gpu_available()):
            logger.warning("Training in float32: bfloat16 is for accelerators that have it.")
            del values["bf16"]
        self.set_defaults(**{"use_cpu": use_cpu, **values})
        stage, arguments, _, rest = self.parse_args_into_dataclasses(
            words, return_remaining_strings=True, look_for_args_file=False
        )
        if rest:
            names = [word.lstrip("-").partition("=")[0] for word in rest if word.startswith("--")]
            self.error(f"unrecognized arguments: {' '.join(rest)}{self._suggest(*names[:1])}")
        arguments.remove_unused_columns = False  # of what the collator needs
        return stage, arguments

    def _read(self, config: str) -> dict[str, Any]:
        """The fields in a YAML file, of their types."""
        path = self.recipes.get(config, Path(config))
        if not path.exists():
            raise FileNotFoundError(f"{config} is neither a YAML file nor one of ours: {self._names()}.")
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no YAML: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds no fields of the form `name: value`.")
        return {name: self._convert(path, name, value) for name, value in values.items()}

    def _convert(self, path: Path, name: str, value: Any) -> Any:
        if name not in self.fields:
            raise ValueError(f"{path}: unknown field `{name}`{self._suggest(str(name))}")
        hint = self.hints[name]
        kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        if value is None or isinstance(value, (list, dict)):
            if any(isinstance(value, get_origin(kind) or kind) for kind in kinds if kind is not Any):
                return value
        else:
            action = self.fields[name]
            word = "no" if value is False and "no" in (action.choices or ()) else str(value)  # as YAML reads `no`
            try:  # as a flag, so that 1e-4, a text in YAML, is a number too
                return (action.type or str)(word)
            except (ValueError, TypeError, argparse.ArgumentTypeError):
                pass
        raise ValueError(f"{path}: `{name}` is {value!r}, expected {getattr(hint, '__name__', hint)}.")

    def _suggest(self, *names: str) -> str:
        close = [match for name in names for match in difflib.get_close_matches(name, self.fields, 1)]
        return f", did you mean `{close[0]}`?" if close else ""


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults where there are any, and an epilogue as it stands."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def check_stage(stage: Stage, arguments: TrainingArguments) -> None:
    """
    What can be known before the model is loaded.

    Raises:
        ValueError, OSError: a model, a manifest or a folder that will not do.
    """
    read_config(stage.model)
    for manifest in (stage.manifest, stage.eval_manifest):
        if manifest is not None and not Path(manifest).is_file():
            raise FileNotFoundError(f"The manifest {manifest} does not exist.")
    if stage.previous is not None and Path(stage.previous).is_dir():
        if not Path(stage.previous, "adapter_config.json").is_file():
            raise FileNotFoundError(f"{stage.previous} holds no adapter: it has no adapter_config.json.")
    if stage.eval_manifest is None and arguments.eval_strategy != "no":
        raise ValueError(f"`eval_strategy: {arguments.eval_strategy.value}` needs an `eval_manifest`.")
    if arguments.push_to_hub and Path(stage.model).is_dir():
        raise ValueError(f"An adapter on the Hub needs a base there: push {stage.model}, and name its repository.")
    output = Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=output).close()
