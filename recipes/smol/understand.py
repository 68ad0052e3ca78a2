# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
Teaches the projector to be understood: asked aloud, the language model is to say what it says when the same is typed.

    python understand.py graft work/adapted corpus features work

The language model stays as it is; its own predictions are the targets, so that there is nothing else to learn.
"""

import argparse
import random
from functools import partial
from pathlib import Path

import torch
from adapt import draw_batch
from hear import Features, Normalized, Speller, ctc_loss
from loop import pad, run, train
from texts import SYSTEM_PROMPT
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from ttt_omni import TTTOmniConfig
from ttt_omni.files_ttt_omni import new_file
from ttt_omni.modeling_ttt_omni import TTTOmniMultiModalProjector


BATCH_SIZE = 16
SPELLING = 0.1  # weight of CTC beside it, so that what is heard goes on to be spelt
HEARD = "\x00"  # where a question stands


def around(tokenizer) -> list[list[int]]:
    """The tokens before the first question, between it and its answer, and between that and the next question."""
    messages = [{"role": "system", "content": SYSTEM_PROMPT}]
    for role in ("user", "assistant", "user"):
        messages.append({"role": role, "content": HEARD})
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    before, between, after, _ = text.split(HEARD)
    after = after.removeprefix(tokenizer.eos_token)
    return [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, between, after)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the model of ours that is to hear")
    parser.add_argument("adapted", help="folder of its language model, as `adapt.py` left it")
    parser.add_argument("corpus", type=Path)
    parser.add_argument("features", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=340)
    parser.add_argument("--lr", type=float, default=7e-4)
    arguments = parser.parse_args()
    config = TTTOmniConfig.from_pretrained(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(arguments.adapted)
    model = AutoModelForCausalLM.from_pretrained(arguments.adapted, dtype=torch.bfloat16, attn_implementation="eager")
    model.requires_grad_(False)
    embed = model.get_input_embeddings()
    features = Features(arguments.corpus, arguments.features)
    heard = torch.load(arguments.folder / "heard.pt", weights_only=True)
    ear = Normalized(TTTOmniMultiModalProjector(config), heard["ear"]["mean"], heard["ear"]["std"])
    ear.load_state_dict(heard["ear"])
    speller = Speller(embed.weight[heard["tokens"]])
    speller.load_state_dict(heard["speller"])
    number = {token: index + 1 for index, token in enumerate(heard["tokens"])}
    before, between, after = around(tokenizer)
    with torch.no_grad():  # what all conversations begin with
        beginning = model.model(torch.tensor([before]), use_cache=True).cache

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def conversation(chosen: list[int], questions: list) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings `[T, hidden]` behind the beginning, and where `[T]` an answer is predicted."""
        parts, is_predicted = [], []
        for turn, (index, question) in enumerate(zip(chosen, questions)):
            answer = ids(features.records[index]["conversations"][1]["value"]) + [tokenizer.eos_token_id]
            question = embed(torch.tensor(question)) if isinstance(question, list) else question
            parts += [*([embed(torch.tensor(after))] if turn else []), question, embed(torch.tensor(between + answer))]
            asked = sum(map(len, parts)) - len(answer) - len(is_predicted)
            is_predicted += [False] * (asked - 1) + [True] * len(answer) + [False]
        return torch.cat(parts), torch.tensor(is_predicted)

    def predictions(batch: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        for index, layer in enumerate(beginning.layers):
            cache.update(*(x.expand(len(batch), -1, -1, -1) for x in (layer.keys, layer.values)), index)
        embeddings = pad(parts for parts, _ in batch)
        states = model.model(inputs_embeds=embeddings, cache=cache, use_cache=True).last_hidden_state
        states = states[pad((where for _, where in batch), False)]
        return model.lm_head(states).float().log_softmax(-1)

    def loss_on(batch: list[list[int]], listen, spelling: float = 0.0) -> torch.Tensor:
        with torch.no_grad():
            typed = predictions([conversation(turns, [ids(features.text(i)) for i in turns]) for turns in batch])
        spoken = [[listen(index) for index in turns] for turns in batch]
        sizes = [len(states) for turns in spoken for states in turns]
        embedded = ear(torch.cat([states.float() for turns in spoken for states in turns])).split(sizes)
        pieces = iter(piece.bfloat16() for piece in embedded)
        spoken = [[next(pieces) for _ in turns] for turns in spoken]
        said = predictions([conversation(turns, questions) for turns, questions in zip(batch, spoken)])
        divergence = nn.functional.kl_div(said, typed, log_target=True, reduction="none").sum(-1).mean()
        if spelling == 0:
            return divergence
        targets = [torch.tensor([number[t] for t in ids(features.text(i))]) for turns in batch for i in turns]
        return divergence + spelling * ctc_loss(speller(pad(embedded)), sizes, targets)

    def loss_of(draw: random.Random) -> torch.Tensor:
        batch = draw_batch(features.training, BATCH_SIZE, draw)
        return loss_on(batch, lambda index: features.draw(index, draw), SPELLING)

    def held_out_states(reading: int, index: int) -> torch.Tensor:
        return features.of[index][reading][0]

    def evaluate() -> dict:
        figures = {}
        for kind, reading in (("trained", 0), ("reserved", 1)):
            chosen = [index for index in features.held_out if reading in features.of[index]][:96]
            listen = partial(held_out_states, reading)
            losses = [
                loss_on([[index] for index in chosen[i : i + 24]], listen).item() for i in range(0, len(chosen), 24)
            ]
            figures[f"kl_{kind}"] = sum(losses) / max(len(losses), 1)
        return figures

    state = arguments.folder / "understand.pt"
    train(
        state,
        nn.ModuleList([ear, speller]),
        loss_of,
        steps=arguments.steps,
        lr=arguments.lr,
        evaluate=evaluate,
        evaluate_every=250,
    )
    with new_file(arguments.folder / "projector.pt") as path:
        torch.save(ear.folded(), path)


if __name__ == "__main__":
    run(main)
