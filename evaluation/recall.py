# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Recall: facts told at the start, and asked for after ever more other talk."""

import itertools
import os
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from .conditions import answer, conditions_of, empty_cache, has_ttt, max_length, read, state_alone, under
from .corpus import HEARD, REMEMBERED, read_talk
from .facts import Fact, draw_facts


DISTANCES = (512, 1024, 4096, 16384, 65536)
WORDS_OF_A_TURN = 40
SPARE_TOKENS = 2  # that an answer may have besides the value
FREE_TOKENS = 24  # the same, where no stem says how it begins


class Wording:
    """How a conversation looks to a model: by its tokenizer's chat template, or as plain text where there is none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.before = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello."}]

    def turn(self, text: str, reply: str, is_first: bool = False) -> list[int]:
        """The tokens of a turn of both."""
        is_plain = self.tokenizer.chat_template is None
        return self._encode(self.turn_text(text, reply, is_first), add_special_tokens=is_plain and is_first)

    def question(self, question: str, stem: str) -> list[int]:
        """The tokens of a question, and of the beginning of its answer."""
        return self._encode(self.question_text(question, stem))

    def turn_text(self, text: str, reply: str, is_first: bool = False) -> str:
        """What [`turn`](Wording.turn) encodes."""
        if self.tokenizer.chat_template is None:
            return f"{text} {reply}" if is_first else f" {text} {reply}"
        turn = [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]
        return self._render(turn) if is_first else self._after(turn)

    def question_text(self, question: str, stem: str) -> str:
        """What [`question`](Wording.question) encodes."""
        if self.tokenizer.chat_template is None:
            return f" {question} {stem}".rstrip()
        return self._after([{"role": "user", "content": question}], add_generation_prompt=True) + stem

    def _after(self, turns: list[dict[str, str]], **kwargs) -> str:
        before, whole = self._render(self.before), self._render(self.before + turns, **kwargs)
        if not whole.startswith(before):
            raise ValueError("The chat template rewrites earlier turns: a conversation cannot go on turn by turn.")
        return whole[len(before) :]

    def _render(self, turns: list[dict[str, str]], **kwargs) -> str:
        return self.tokenizer.apply_chat_template(turns, tokenize=False, **kwargs)

    def _encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]


@dataclass
class Score:
    """Of the questions of one condition at one distance, after so many facts."""

    condition: str
    facts: int
    distance: int
    asked: int = 0
    right: int = 0
    shuffled: int = 0  # answers that are right for another question
    values: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    kinds: dict[str, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))

    def add(self, facts: Sequence[Fact], answers: Sequence[str]) -> None:
        for number, (fact, said) in enumerate(zip(facts, answers)):
            is_right = says(said, fact.value)
            self.asked += 1
            self.right += is_right
            self.shuffled += says(said, facts[(number + 1) % len(facts)].value)
            self.values[fact.value] += 1
            self.kinds[fact.kind][0] += is_right
            self.kinds[fact.kind][1] += 1

    def row(self) -> dict[str, Any]:
        """As it goes into a file: `chance` is what the best answer that is always the same would have got."""
        return {
            "condition": self.condition,
            "facts": self.facts,
            "distance": self.distance,
            "asked": self.asked,
            "recall": self.right / self.asked,
            "shuffled": self.shuffled / self.asked,
            "chance": max(self.values.values()) / self.asked,
            "kinds": {name: right / asked for name, (right, asked) in sorted(self.kinds.items())},
        }


def says(answer: str, value: str) -> bool:
    """Whether `value` stands in `answer`, as whole words in whatever case."""
    words = r"\s+".join(map(re.escape, value.split()))
    return re.search(rf"(?<!\w){words}(?!\w)", answer, re.IGNORECASE) is not None


def evaluate_recall(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    talk: str | os.PathLike,
    distances: Sequence[int] = DISTANCES,
    num_facts: Sequence[int] = (8,),
    rounds: int = 4,
    held_out: bool = False,
    own_facts: list[Fact] | None = None,
    conditions: Sequence[str] | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """
    Tells facts, goes on with other talk, and at each distance asks for all of the facts, each on a copy of what the
    model then holds: one prefill, in chunks, serves them all, and they are asked together.

    Beside the conditions of the model, `state` is the model as it is with attention's cache dropped before a question,
    and `nothing told` is the model as it is after a greeting in place of the facts.

    Args:
        talk: text file from which the other talk comes.
        distances: tokens between the facts and the questions, met by whole turns, so that it may be some more. Those
            that a condition's attention is not made for are left out.
        num_facts: told at a time, by one sentence each; several numbers show how much a model can hold.
        rounds: so often, with other facts and other talk.
        held_out: of kinds and in wordings that [`make_recall_corpus`] leaves out.
        own_facts: to be told in place of those of our own, at most as many at a time as there are.
        conditions: of those above; by default all that the model has.
        seed: of the random choices.

    Returns:
        A row per condition, number of facts and distance, see [`Score.row`].

    Raises:
        ValueError, OSError: distances, conditions or files that will not do.
    """
    if not distances or min(distances) < 1:
        raise ValueError(f"`distances` must be at least 1 token, got {list(distances)}.")
    if not num_facts or min(num_facts) < 1:
        raise ValueError(f"`num_facts` must be at least 1, got {list(num_facts)}.")
    if rounds < 1:
        raise ValueError(f"`rounds` must be at least 1, got {rounds}.")
    known = [*conditions_of(model), *(["state"] if has_ttt(model) else []), "nothing told"]
    conditions = known if conditions is None else list(conditions)
    if unknown := [condition for condition in conditions if condition not in known]:
        raise ValueError(f"{unknown[0]!r} is no condition of this model: choose from {', '.join(known)}.")
    sentences, wording = read_talk(talk), Wording(tokenizer)
    if own_facts is None:
        draw_facts(random.Random(seed), max(num_facts), held_out)  # there are as many, or minutes would be lost
    else:
        num_facts = sorted({min(count, len(own_facts)) for count in num_facts})
    scores = {}
    runs = [name for name in ("model", "window", "ring", "full", "nothing told") if name in conditions]
    if "state" in conditions and "model" not in runs:
        runs.insert(0, "model")
    progress = tqdm(total=len(num_facts) * rounds * len(runs), desc="Recall", unit=" prefills")
    for count, number in itertools.product(num_facts, range(rounds)):
        draw = random.Random(f"{seed} {number}")
        facts = draw_facts(draw, count, held_out) if own_facts is None else draw.sample(own_facts, count)
        for run in runs:
            condition = "model" if run == "nothing told" else run
            told = "Hello." if run == "nothing told" else " ".join(fact.told for fact in facts)
            start = wording.turn(told, REMEMBERED[0], is_first=True)
            asks = [name for name in conditions if name == run or (name == "state" and run == "model")]
            with under(condition, model) as current:
                limit = max_length(model, condition)
                within = [distance for distance in sorted(distances) if distance + len(start) + 128 <= limit]
                talk_ids = _talk(wording, random.Random(f"{seed} {number} talk"), sentences)
                for distance, cache in _prefill(current, start, talk_ids, within):
                    for name in asks:
                        answers = _answers(current, wording, facts, cache, name)
                        key = name, count, distance
                        scores.setdefault(key, Score(*key)).add(facts, answers)
            progress.update()
    progress.close()
    if not scores:
        raise ValueError(f"The model is made for fewer tokens than the distance of {min(distances)}.")
    return [scores[key].row() for name in known for key in sorted(scores) if key[0] == name]


def _talk(wording: Wording, draw: random.Random, sentences: list[str]) -> Iterator[list[int]]:
    """The tokens of turns of other talk, without end: stretches of the text from random places."""
    while True:
        start, words, found = draw.randrange(len(sentences)), 0, []
        while words < WORDS_OF_A_TURN:
            found.append(sentences[(start + len(found)) % len(sentences)])
            words += len(found[-1].split())
        yield wording.turn(" ".join(found), draw.choice(HEARD))


def _prefill(
    model: PreTrainedModel, start: list[int], talk: Iterator[list[int]], distances: Sequence[int]
) -> Iterator[tuple[int, Cache]]:
    """Each distance, and the cache that is there then; it goes on being written to."""
    cache, read_so_far = empty_cache(model), 0
    read(model, torch.tensor([start]), cache)
    for distance in distances:
        turns = []
        while read_so_far + len(turns) < distance:
            turns += next(talk)
        if turns:
            read(model, torch.tensor([turns]), cache)
        read_so_far += len(turns)
        yield distance, cache


def _answers(model: PreTrainedModel, wording: Wording, facts: list[Fact], cache: Cache, condition: str) -> list[str]:
    """What the model says, greedily, to the question for each of the facts, which are told in `cache`."""
    tokenizer = wording.tokenizer
    if condition == "state":
        cache = state_alone(model, cache)
    questions = [wording.question(fact.question, fact.stem) for fact in facts]
    longest = max(len(wording._encode(f" {fact.value}")) for fact in facts)
    lengths = [longest + (SPARE_TOKENS if fact.stem else FREE_TOKENS) for fact in facts]
    answers = []
    for said, length in zip(answer(model, questions, cache, max(lengths), tokenizer.eos_token_id), lengths):
        said = said[:length]
        if tokenizer.eos_token_id in said:
            said = said[: said.index(tokenizer.eos_token_id)]
        answers.append(tokenizer.decode(said, skip_special_tokens=True))
    return answers
