# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""At which layers a model looks back at what it was told: where a memory belongs."""

import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..checkpoint import find_source, read_json
from ..conversion.gguf import as_folder
from .corpus import REMEMBERED
from .facts import draw_facts
from .recall import Wording


SHARE_OF_BEST = 1 / 3  # of a layer's attention to facts, for it to be among those that retrieve


@torch.no_grad()
def attention_to_facts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, num_facts: int = 12, rounds: int = 2, seed: int = 0
) -> list[float]:
    """
    How much of its attention each layer gives to a fact when it is asked for.

    Facts are told, and then each is asked for; the other facts stand between. What counts is the attention of the last
    token before the value is to be said to the tokens of the value as it was told.

    Args:
        model: any causal language model of Transformers that gives out its attention (`attn_implementation="eager"`).
        num_facts: told at a time.
        rounds: so often, with other facts.
        seed: of the random choices.

    Returns:
        Per layer, summed over its heads, the mean over all questions.

    Raises:
        ValueError: if the tokenizer does not tell where in a text its tokens stand.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"The tokenizer {type(tokenizer).__name__} does not tell where in a text its tokens stand.")
    wording, found = Wording(tokenizer), []
    for number in tqdm(range(rounds), desc="Looking back", unit=" rounds"):
        facts = draw_facts(random.Random(f"{seed} {number}"), num_facts)
        told = wording.turn_text(" ".join(fact.told for fact in facts), REMEMBERED[0], is_first=True)
        for fact in facts:
            first = told.index(fact.told) + fact.told.rindex(fact.value)
            text = told + wording.question_text(fact.question, fact.stem)
            asked = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            is_value = torch.tensor([a < first + len(fact.value) and first < b for a, b in asked.offset_mapping])
            ids = torch.tensor([asked.input_ids], device=model.device)
            attentions = model(input_ids=ids, output_attentions=True, use_cache=False).attentions
            found.append([x[0, :, -1].float().cpu()[:, is_value].sum().item() for x in attentions])
    return torch.tensor(found).mean(0).tolist()


def retrieving_layers(attention: Sequence[float]) -> list[int]:
    """The layers that give facts at least a third of the attention that the best one does."""
    return [layer for layer, share in enumerate(attention) if share >= SHARE_OF_BEST * max(attention)]


def find_layers(source: str | os.PathLike) -> list[int]:
    """
    The layers at which the language model `source` retrieves, which are printed on stderr: folder, `owner/name` on the
    Hub, or GGUF file.

    Raises:
        ValueError, OSError: a source that is none, or that Transformers does not load, such as LLaMA-Omni's layout.
    """
    with TemporaryDirectory() as scratch:
        with as_folder(find_source(source, "--source").path, Path(scratch), torch.bfloat16) as folder:
            model_type = read_json(folder / "config.json").get("model_type")
            if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
                raise ValueError(f"`--layers auto` needs a language model: name the layers of {source}.")
            model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="eager")
            attention = attention_to_facts(model.eval(), AutoTokenizer.from_pretrained(folder))
    layers = retrieving_layers(attention)
    for layer, share in enumerate(attention):
        mark = " <" if layer in layers else ""
        print(f"layer {layer:3} {share:5.2f} {'#' * round(40 * share / max(attention))}{mark}", file=sys.stderr)
    print(f"It looks back at what it was told in the layers {as_ranges(layers)}.", file=sys.stderr)
    return layers


def as_ranges(layers: Sequence[int]) -> str:
    """Numbers in order as `convert --layers` takes them, such as `"18,20-23"`."""
    groups = []
    for layer in layers:
        if groups and groups[-1][-1] == layer - 1:
            groups[-1].append(layer)
        else:
            groups.append([layer])
    return ",".join(str(group[0]) if len(group) == 1 else f"{group[0]}-{group[-1]}" for group in groups)
