# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
Teaches to understand: asked aloud, the language model is to say what it says when the same is typed.

    python understand.py smollm2 work/adapted graft corpus features work

The projector learns, and the adapter goes on learning. The targets are the predictions and the last hidden states of
the language model as `adapt.py` left it, so that it says what it said, and the speech decoder reads what it read.
"""

import argparse
import random
from functools import partial
from pathlib import Path

import torch
from adapt import draw_batch
from hear import Features, Normalized, Speller, Spelling
from loop import pad, run, train
from peft import PeftModel
from texts import SYSTEM_PROMPT
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from ttt_omni import TTTOmniConfig
from ttt_omni.files_ttt_omni import new_file, new_folder
from ttt_omni.modeling_ttt_omni import TTTOmniMultiModalProjector


BATCH_SIZE = 16
SPELT, SPELLING = 32, 0.2  # recordings a step that are spelt as well, and the weight of that: words are not guessed
TYPED = 0.1  # share of the questions
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


class Conversations:
    """Conversations about questions of the corpus, as embeddings, and what a language model says in them."""

    def __init__(self, tokenizer, embed: nn.Embedding, features: Features):
        self.tokenizer, self.embed, self.features = tokenizer, embed, features
        self.before, self.between, self.after = around(tokenizer)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def typed(self, index: int) -> torch.Tensor:
        """The embeddings `[n, hidden]` of a question."""
        return self.embed(torch.tensor(self.ids(self.features.text(index))))

    def lay_out(self, turns: list[int], questions: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings `[T, hidden]` behind the beginning, and where `[T]` an answer is predicted."""
        parts, is_predicted = [], []
        for turn, (index, question) in enumerate(zip(turns, questions)):
            answer = self.ids(self.features.records[index]["conversations"][1]["value"]) + [
                self.tokenizer.eos_token_id
            ]
            parts += [self.embed(torch.tensor(self.after))] if turn else []
            parts += [question, self.embed(torch.tensor(self.between + answer))]
            asked = sum(map(len, parts)) - len(answer) - len(is_predicted)
            is_predicted += [False] * (asked - 1) + [True] * len(answer) + [False]
        return torch.cat(parts), torch.tensor(is_predicted)

    def answers(self, model, beginning: DynamicCache, batch: list[list[int]], questions: list) -> list[torch.Tensor]:
        """The last hidden states `[n, hidden]` that predict the answers, of each conversation of `batch`."""
        laid_out = [self.lay_out(*pair) for pair in zip(batch, questions)]
        cache = DynamicCache(config=model.config)
        for index, layer in enumerate(beginning.layers):
            cache.update(*(x.expand(len(batch), -1, -1, -1) for x in (layer.keys, layer.values)), index)
        embeddings = pad(parts for parts, _ in laid_out)
        states = model.model(inputs_embeds=embeddings, cache=cache, use_cache=True).last_hidden_state
        return [row[: len(where)][where] for row, (_, where) in zip(states, laid_out)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="folder of the language model that the adapter belongs to")
    parser.add_argument("adapted", help="folder of the language model as `adapt.py` left it, beside its adapter")
    parser.add_argument("model", help="folder of the model of ours that is to hear")
    parser.add_argument("corpus", type=Path)
    parser.add_argument("features", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=480)
    parser.add_argument("--lr", type=float, default=5e-4)
    arguments = parser.parse_args()
    config = TTTOmniConfig.from_pretrained(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(arguments.adapted)
    load = partial(AutoModelForCausalLM.from_pretrained, dtype=torch.bfloat16, attn_implementation="eager")
    teacher = load(arguments.adapted).requires_grad_(False)
    adapter = arguments.folder / "adapter"
    student = PeftModel.from_pretrained(load(arguments.base), adapter, is_trainable=True)
    listening = student.get_base_model()
    features = Features(arguments.corpus, arguments.features)
    conversations = Conversations(tokenizer, teacher.get_input_embeddings(), features)
    heard = torch.load(arguments.folder / "heard.pt", weights_only=True)
    ear = Normalized(TTTOmniMultiModalProjector(config), heard["ear"]["mean"], heard["ear"]["std"])
    ear.load_state_dict(heard["ear"])
    speller = Speller(conversations.embed.weight[heard["tokens"]])
    speller.load_state_dict(heard["speller"])
    spelling = Spelling(features, tokenizer, heard["tokens"])
    beginning_ids = torch.tensor([conversations.before])
    with torch.no_grad():
        taught = teacher.model(beginning_ids, use_cache=True).cache
    known = {}  # what the teacher says to a question that is the first

    def taught_to(batch: list[list[int]]) -> list[torch.Tensor]:
        questions = [[conversations.typed(index) for index in turns] for turns in batch]
        return conversations.answers(teacher, taught, batch, questions)

    @torch.no_grad()
    def targets_of(batch: list[list[int]]) -> torch.Tensor:
        if len(batch[0]) > 1:  # all have as many turns, and of several there are too many to keep
            return torch.cat(taught_to(batch))
        asked = [index for (index,) in batch]
        unknown = [index for index in asked if index not in known]
        if unknown:
            known.update(zip(unknown, taught_to([[index] for index in unknown])))
        return torch.cat([known[index] for index in asked])

    def loss_on(batch: list[list[int]], listen, draw: random.Random | None = None) -> torch.Tensor:
        heard = [[listen(index) for index in turns] for turns in batch]
        sizes = [len(states) for turns in heard for states in turns]
        embedded = ear(torch.cat([states.float() for turns in heard for states in turns])).split(sizes)
        pieces = iter(piece.bfloat16() for piece in embedded)
        questions = [[next(pieces) for _ in turns] for turns in heard]
        if draw is not None:  # some are typed, which is not to be forgotten
            questions = [
                [conversations.typed(i) if draw.random() < TYPED else q for i, q in zip(*pair)]
                for pair in zip(batch, questions)
            ]
        beginning = listening.model(beginning_ids, use_cache=True).cache
        states = torch.cat(conversations.answers(listening, beginning, batch, questions))
        targets = targets_of(batch)
        said, typed = (teacher.lm_head(x.bfloat16()).float().log_softmax(-1) for x in (states, targets))
        divergence = nn.functional.kl_div(said, typed, log_target=True, reduction="none").sum(-1).mean()
        if draw is None:
            return divergence
        distance = (states.float() - targets.float()).square().sum(-1) / targets.float().square().sum(-1)
        return divergence + distance.mean()

    def loss_of(draw: random.Random) -> torch.Tensor:
        batch = draw_batch(features.training, BATCH_SIZE, draw)
        understanding = loss_on(batch, lambda index: features.draw(index, draw), draw)
        spelt, _ = spelling.loss(ear, speller, SPELT, draw)
        return understanding + SPELLING * spelt

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

    train(
        arguments.folder / "understand.pt",
        nn.ModuleList([ear, speller, student]),
        loss_of,
        steps=arguments.steps,
        lr=arguments.lr,
        evaluate=evaluate,
        evaluate_every=200,
    )
    if not (arguments.folder / "understood").exists():
        with new_folder(arguments.folder / "understood") as folder:
            student.save_pretrained(folder)
    with new_file(arguments.folder / "projector.pt") as path:
        torch.save(ear.folded(), path)


if __name__ == "__main__":
    run(main)
