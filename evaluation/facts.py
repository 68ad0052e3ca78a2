# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Facts to be told and asked for: of several kinds, in wordings to train on and in others to judge by."""

import json
import os
import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Fact:
    """
    Something to remember.

    Args:
        told: the sentence that says it.
        question: what asks for it.
        stem: how the answer begins, up to the value.
        value: what must be remembered.
        kind: of the fact, by which results may be told apart.
    """

    told: str
    question: str
    stem: str
    value: str
    kind: str = "own"


@dataclass(frozen=True)
class Kind:
    """Facts of one kind. The last of `told`, and of `asked`, which are questions and stems, is for judging only."""

    name: str
    subjects: tuple[str, ...]
    values: tuple[str, ...]
    told: tuple[str, ...]
    asked: tuple[tuple[str, str], ...]

    def fact(self, draw: random.Random, subject: str, value: str, held_out: bool) -> Fact:
        """One in a wording of those to train on, or of those to judge by."""
        if self in HELD_OUT_KINDS:
            wordings = slice(None)
        else:
            wordings = slice(-1, None) if held_out else slice(-1)
        told, (question, stem) = draw.choice(self.told[wordings]), draw.choice(self.asked[wordings])
        question, stem = question.format(subject=subject), stem.format(subject=subject)
        return Fact(told.format(subject=subject, value=value), question, stem, value, self.name)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PEOPLE = _words(
    "Anna Peter John Mary Tom Lucy David Sarah Paul Emma James Alice Robert Linda Michael Susan George Henry Laura "
    "Julia Martin Oliver Simon Helen Kate Frank Arthur Grace Jack Sam Ben Max Leo Adam Eric Carl Jane Ruth Rose Clara"
)
WORDS = _words(
    "tiger apple river stone cloud paper glass horse bread music silver winter garden window doctor pencil bottle "
    "carpet dragon engine flower guitar hammer island jacket kettle ladder magnet needle rabbit tunnel violin wagon "
    "zebra anchor basket candle diamond eagle forest honey jungle knight lemon marble olive pepper ribbon salmon "
    "temple velvet walnut copper cotton desert maple tulip willow castle bridge ocean mountain valley market butter "
    "cheese coffee planet rocket"
)
CITIES = _words(
    "Paris London Berlin Rome Madrid Vienna Dublin Oslo Athens Lisbon Moscow Cairo Tokyo Delhi Sydney Toronto Boston "
    "Chicago Dallas Denver Seattle Miami Houston Phoenix Detroit Portland Warsaw Prague Geneva Milan"
)
ANIMALS = _words(
    "cat dog horse cow sheep pig goat duck lion tiger bear wolf fox rabbit mouse owl eagle frog snake turtle whale "
    "shark penguin monkey elephant zebra camel deer bee ant"
)
COLOURS = _words("red blue green yellow black white brown orange pink purple gray silver gold")
PLACES = _words("kitchen garden garage cellar attic bathroom bedroom office hall car shed library cupboard drawer")
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _words("January February March April May June July August September October November December")
JOBS = _words(
    "doctor teacher baker pilot farmer lawyer nurse painter singer writer driver cook judge sailor soldier actor"
)
INSTRUMENTS = _words("piano violin guitar flute drums trumpet cello harp organ saxophone clarinet banjo")
DRINKS = _words("tea coffee water milk wine beer juice cider lemonade cocoa soup whisky")
GIFTS = _words("book watch ring scarf hat bike camera lamp clock puzzle knife basket kite puppet vase necklace")
THINGS = _words("key bag phone umbrella wallet camera hammer bottle notebook ball ladder map candle lamp knife rope")
OBJECTS = _words("car door house bike boat coat chair table roof fence tent sofa truck gate hat kite")
EVENTS = _words("meeting concert wedding party exam lesson match lecture funeral festival interview dinner")
NUMBERS = tuple(str(number) for number in range(11, 100))
ATTRIBUTES = _words(
    "code symbol sign nickname keyword hobby team fruit badge brand logo signal mark prize secret title topic "
    "wish dream motto hero book song dish tool toy charm label token"
)

KINDS = (
    Kind(
        "password",
        PEOPLE,
        WORDS,
        (
            "The password of {subject} is {value}.",
            "{subject} uses the password {value}.",
            "Remember that {subject}'s password is {value}.",
            "To log in, {subject} types the word {value}.",
        ),
        (
            ("What is the password of {subject}?", "The password of {subject} is"),
            ("Which password does {subject} use?", "{subject} uses the password"),
            ("Do you still know {subject}'s password?", "Yes, {subject}'s password is"),
        ),
    ),
    Kind(
        "attribute",
        tuple(f"{attribute} of {person}" for attribute in ATTRIBUTES for person in PEOPLE),
        WORDS,
        (
            "The {subject} is {value}.",
            "Please note that the {subject} is {value}.",
            "By the way, {value} is the {subject}.",
            "As for the {subject}, it is {value}.",
        ),
        (
            ("What is the {subject}?", "The {subject} is"),
            ("Tell me the {subject}.", "The {subject} is"),
            ("What was the {subject}?", "The {subject} was"),
        ),
    ),
    Kind(
        "home",
        PEOPLE,
        CITIES,
        (
            "{subject} lives in {value}.",
            "The home of {subject} is in {value}.",
            "{subject} has moved to {value}.",
            "In {value} there is a house where {subject} lives.",
        ),
        (
            ("Where does {subject} live?", "{subject} lives in"),
            ("In which city is the home of {subject}?", "The home of {subject} is in"),
            ("Where would I find {subject}'s house?", "{subject}'s house is in"),
        ),
    ),
    Kind(
        "animal",
        PEOPLE,
        ANIMALS,
        (
            "The favorite animal of {subject} is the {value}.",
            "{subject} likes no animal more than the {value}.",
            "Of all animals, {subject} loves the {value}.",
            "Ask {subject} for an animal, and you will hear of the {value}.",
        ),
        (
            ("What is the favorite animal of {subject}?", "The favorite animal of {subject} is the"),
            ("Which animal does {subject} love?", "{subject} loves the"),
            ("What animal does {subject} like best?", "{subject} likes the"),
        ),
    ),
    Kind(
        "color",
        OBJECTS,
        COLOURS,
        (
            "The {subject} is {value}.",
            "I have painted the {subject} {value}.",
            "The color of the {subject} is {value}.",
            "We wanted the {subject} in {value}, and so it is.",
        ),
        (
            ("What color is the {subject}?", "The {subject} is"),
            ("Which color does the {subject} have?", "The color of the {subject} is"),
            ("How was the {subject} painted?", "The {subject} was painted"),
        ),
    ),
    Kind(
        "place",
        THINGS,
        PLACES,
        (
            "The {subject} is in the {value}.",
            "I left the {subject} in the {value}.",
            "You can find the {subject} in the {value}.",
            "Go to the {value} if you need the {subject}.",
        ),
        (
            ("Where is the {subject}?", "The {subject} is in the"),
            ("Where did I leave the {subject}?", "You left the {subject} in the"),
            ("Where must I look for the {subject}?", "Look for the {subject} in the"),
        ),
    ),
    Kind(
        "day",
        EVENTS,
        DAYS,
        (
            "The {subject} is on {value}.",
            "The {subject} takes place on {value}.",
            "They have moved the {subject} to {value}.",
            "On {value} we go to the {subject}.",
        ),
        (
            ("On which day is the {subject}?", "The {subject} is on"),
            ("When does the {subject} take place?", "The {subject} takes place on"),
            ("What day should I keep free for the {subject}?", "Keep free for the {subject}"),
        ),
    ),
    Kind(
        "room",
        EVENTS,
        NUMBERS,
        (
            "The {subject} is in room {value}.",
            "Come to room {value} for the {subject}.",
            "For the {subject} we have room {value}.",
            "Room {value} is where the {subject} will be.",
        ),
        (
            ("In which room is the {subject}?", "The {subject} is in room"),
            ("What is the number of the room for the {subject}?", "For the {subject} we have room"),
            ("To which room do I go for the {subject}?", "For the {subject}, go to room"),
        ),
    ),
    Kind(
        "month",
        PEOPLE,
        MONTHS,
        (
            "{subject} was born in {value}.",
            "The birthday of {subject} is in {value}.",
            "{subject} has a birthday in {value}.",
            "In {value}, {subject} will be a year older.",
        ),
        (
            ("In which month was {subject} born?", "{subject} was born in"),
            ("When is the birthday of {subject}?", "The birthday of {subject} is in"),
            ("In what month does {subject} get a year older?", "{subject} gets a year older in"),
        ),
    ),
    Kind(
        "job",
        PEOPLE,
        JOBS,
        (
            "{subject} works as a {value}.",
            "{subject} is a {value}.",
            "By profession, {subject} is a {value}.",
            "{subject} earns a living as a {value}.",
        ),
        (
            ("What is the job of {subject}?", "{subject} works as a"),
            ("What does {subject} do for a living?", "{subject} is a"),
            ("How does {subject} earn a living?", "{subject} earns a living as a"),
        ),
    ),
)
# Kinds that nothing is trained on.
HELD_OUT_KINDS = (
    Kind(
        "instrument",
        PEOPLE,
        INSTRUMENTS,
        ("{subject} plays the {value}.", "{subject} has learnt to play the {value}."),
        (
            ("Which instrument does {subject} play?", "{subject} plays the"),
            ("What has {subject} learnt to play?", "{subject} has learnt to play the"),
        ),
    ),
    Kind(
        "drink",
        PEOPLE,
        DRINKS,
        ("{subject} ordered a glass of {value}.", "{subject} drinks {value}."),
        (
            ("What did {subject} order?", "{subject} ordered a glass of"),
            ("What does {subject} drink?", "{subject} drinks"),
        ),
    ),
    Kind(
        "gift",
        PEOPLE,
        GIFTS,
        ("I bought a {value} for {subject}.", "{subject} will get a {value} as a present."),
        (
            ("What did I buy for {subject}?", "You bought {subject} a"),
            ("What present will {subject} get?", "{subject} will get a"),
        ),
    ),
)


def draw_facts(draw: random.Random, count: int, held_out: bool = False, changes: int = 0) -> list[Fact]:
    """
    Facts of one to three kinds, each of another subject or kind, so that no question has two answers.

    Args:
        held_out: of kinds that nothing is trained on, or in wordings that are not.
        changes: so many of the first are told once more at the end, with another value.

    Returns:
        The facts, and behind them those that take the place of the first `changes`.

    Raises:
        ValueError: if there are not so many facts.
    """
    pool = (*KINDS, *HELD_OUT_KINDS) if held_out else KINDS
    few, subjects = draw.sample(pool, draw.randint(1, 3)), []
    for kinds in (few, pool):
        if len(subjects) < count:
            subjects = [(kind, subject) for kind in kinds for subject in kind.subjects]
    if count > len(subjects):
        raise ValueError(f"There are no {count} facts of different subjects: ask for at most {len(subjects)}.")
    chosen = draw.sample(subjects, count)
    facts = []
    for kind, subject in [*chosen, *chosen[:changes]]:
        told = [fact.value for fact in facts if fact.kind == kind.name]
        values = [value for value in kind.values if value not in told] or kind.values
        facts.append(kind.fact(draw, subject, draw.choice(values), held_out))
    return facts


def read_facts(path: str | os.PathLike) -> list[Fact]:
    """
    Facts of one's own from a JSONL file, a line `{"told": …, "question": …, "value": …}` with `"stem"` and `"kind"` if
    wanted.

    Raises:
        ValueError, OSError: naming the line that is wrong.
    """
    facts = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                fact = Fact(**{"stem": ""} | json.loads(line))
            except (TypeError, ValueError):
                fact = None
            texts = [] if fact is None else list(vars(fact).values())
            if fact is None or not all(isinstance(text, str) for text in texts) or not fact.value.strip():
                raise ValueError(
                    f'{path}, line {number}: a fact is {{"told": …, "question": …, "value": …}} with texts, and '
                    '"stem" and "kind" if wanted.'
                )
            facts.append(fact)
    if not facts:
        raise ValueError(f"{path} has no facts.")
    return facts
