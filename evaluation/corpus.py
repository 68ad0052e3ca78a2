# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Conversations that demand recall, for the stages of training."""

import json
import os
import random
import re
from pathlib import Path

from ..files_ttt_omni import new_file
from ..training.data import SPEECH_TOKEN
from .facts import draw_facts


REMEMBERED = ("I will remember that.", "Thank you, I will keep that in mind.", "All right, I have noted it.")
HEARD = ("I see.", "That is interesting.", "Go on, please.", "I understand.")
CHANGED = ("That has changed: ", "I was wrong before: ", "Let me correct that: ")


def read_talk(path: str | os.PathLike) -> list[str]:
    """
    The sentences of a text.

    Raises:
        ValueError, OSError: if it cannot be read, or has none.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text: {error}") from None
    sentences = [" ".join(part.split()) for part in re.split(r"(?<=[.?!])\s+|\n", text)]
    sentences = [sentence for sentence in sentences if sentence]
    if not sentences:
        raise ValueError(f"{path} has no text.")
    return sentences


def make_recall_corpus(
    output: str | os.PathLike,
    talk: str | os.PathLike,
    conversations: int = 2000,
    facts: int = 6,
    asked: int = 4,
    words: int = 120,
    chat: str | os.PathLike | None = None,
    seed: int = 0,
) -> None:
    """
    Writes a manifest, in the form of [`ConversationDataset`](../training/data.py), of conversations in text: facts are
    told, some of them once more with another value, then comes other talk, and then they are asked for.

    The user tells and talks, so that what a model learns to say is the answers. Kinds and wordings to judge by are
    left out. A conversation in four asks for nothing if there is `chat`, which keeps what else the model can say.

    Args:
        output: JSONL file to write.
        talk: text file from which the other talk comes, a stretch from a random place for each conversation.
        conversations: how many.
        facts: told in a conversation, half as many to as many.
        asked: at most so many of them.
        words: of other talk, a third as many to as many, in one to three turns; some of them stand between the facts.
        chat: manifest of ordinary conversations in text, of which some stand among the other talk.
        seed: of the random choices.

    Raises:
        ValueError, OSError: a talk, a number or a file that will not do.
    """
    for name, number in (("conversations", conversations), ("facts", facts), ("asked", asked)):
        if number < 1:
            raise ValueError(f"`{name}` must be at least 1, got {number}.")
    if words < 0:
        raise ValueError(f"`words` must be at least 0, got {words}.")
    sentences, draw = read_talk(talk), random.Random(seed)
    chats = [] if chat is None else read_chat(chat)
    with new_file(Path(output)) as path, open(path, "w", encoding="utf-8") as file:
        for number in range(conversations):
            turns = _conversation(draw, sentences, chats, facts, asked, words)
            turns = [{"from": role, "value": text} for pair in turns for role, text in zip(("human", "gpt"), pair)]
            file.write(json.dumps({"id": str(number), "conversations": turns}, ensure_ascii=False) + "\n")


def read_chat(path: str | os.PathLike) -> list[list[tuple[str, str]]]:
    """
    The questions and answers of the conversations in a manifest, but those with speech.

    Raises:
        ValueError, OSError: naming the line that is wrong.
    """
    chats = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                texts = [turn["value"] for turn in json.loads(line)["conversations"]]
                chats.append(list(zip(texts[::2], texts[1::2], strict=True)))
            except (KeyError, TypeError, ValueError):
                raise ValueError(f"{path}, line {number}: no conversation of questions and answers.") from None
    chats = [chat for chat in chats if chat and not any(SPEECH_TOKEN in question for question, _ in chat)]
    if not chats:
        raise ValueError(f"{path} has no conversations in text.")
    return chats


def _conversation(
    draw: random.Random, sentences: list[str], chats: list, facts: int, asked: int, words: int
) -> list[tuple[str, str]]:
    """Questions and answers."""
    if chats and draw.random() < 0.25:
        return [turn for chat in draw.choices(chats, k=asked) for turn in chat]
    count = draw.randint(max(1, facts // 2), facts)
    changes = draw.randint(1, 2) if count > 2 and draw.random() < 0.25 else 0
    told = draw_facts(draw, count, changes=changes)
    texts = [fact.told for fact in told[:count]] + [draw.choice(CHANGED) + fact.told for fact in told[count:]]
    valid = told[changes:]  # of the first, the later ones hold
    groups = _cut(draw, texts, draw.randint(1, 2))
    turns = [(" ".join(group), draw.choice(REMEMBERED)) for group in groups]
    stretches = _cut(draw, _stretch(draw, sentences, draw.randint(words // 3, words)), draw.randint(1, 3))
    between = [(" ".join(stretch), draw.choice(HEARD)) for stretch in stretches]
    if chats and draw.random() < 0.5:
        between += draw.choice(chats)
        draw.shuffle(between)
    if len(groups) > 1 and len(between) > 1:
        turns.insert(1, between.pop())
    turns += between
    for fact in draw.sample(valid, min(asked, len(valid))):
        turns.append((fact.question, f"{fact.stem} {fact.value}."))
    return turns


def _stretch(draw: random.Random, sentences: list[str], words: int) -> list[str]:
    """Sentences in a row, from a random place, of about so many words."""
    found, start = [], draw.randrange(len(sentences))
    while words > 0:
        found.append(sentences[start % len(sentences)])
        words -= len(found[-1].split())
        start += 1
    return found


def _cut(draw: random.Random, texts: list[str], pieces: int) -> list[list[str]]:
    """`texts` in at most so many pieces, none of them empty."""
    pieces = min(pieces, len(texts))
    if pieces < 1:
        return []
    cuts = sorted(draw.sample(range(1, len(texts)), pieces - 1))
    return [texts[start:end] for start, end in zip([0, *cuts], [*cuts, len(texts)])]
