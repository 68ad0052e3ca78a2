# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Questions with one right answer, written for this recipe, in wordings to train on and wordings to judge by."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Fact:
    """A question, the sentence that answers it, the word that must be in it, and whether it is for judging only."""

    kind: str
    question: str
    answer: str
    word: str
    held_out: bool


CAPITALS = dict(
    pair.split(":")
    for pair in (
        "France:Paris Germany:Berlin Italy:Rome Spain:Madrid Japan:Tokyo China:Beijing India:Delhi Canada:Ottawa "
        "Egypt:Cairo Kenya:Nairobi Russia:Moscow Greece:Athens Poland:Warsaw Sweden:Stockholm Norway:Oslo "
        "Finland:Helsinki Ireland:Dublin Portugal:Lisbon Austria:Vienna Belgium:Brussels Denmark:Copenhagen "
        "Australia:Canberra Chile:Santiago Peru:Lima Cuba:Havana Thailand:Bangkok Iran:Tehran Iraq:Baghdad "
        "Turkey:Ankara Hungary:Budapest Ukraine:Kiev Colombia:Bogota England:London Scotland:Edinburgh"
    ).split()
)
OPPOSITES = dict(
    pair.split(":")
    for pair in (
        "hot:cold big:small old:young good:bad happy:sad fast:slow strong:weak rich:poor clean:dirty easy:hard "
        "up:down left:right day:night black:white open:closed high:low long:short early:late light:dark wet:dry "
        "loud:quiet full:empty hard:soft thick:thin near:far inside:outside true:false alive:dead brave:afraid "
        "first:last push:pull win:lose love:hate begin:end buy:sell give:take laugh:cry sweet:sour wide:narrow "
        "deep:shallow"
    ).split()
)
COLOURS = {
    "the sky": "blue",
    "grass": "green",
    "snow": "white",
    "blood": "red",
    "coal": "black",
    "a banana": "yellow",
    "a lemon": "yellow",
    "the sun": "yellow",
    "an orange": "orange",
    "a carrot": "orange",
    "a strawberry": "red",
    "a tomato": "red",
    "milk": "white",
    "chocolate": "brown",
    "the ocean": "blue",
    "a cherry": "red",
    "a leaf": "green",
    "a frog": "green",
    "a crow": "black",
    "a pumpkin": "orange",
    "an elephant": "gray",
    "a flamingo": "pink",
    "gold": "yellow",
    "a polar bear": "white",
    "broccoli": "green",
    "a fire truck": "red",
    "a school bus": "yellow",
    "salt": "white",
    "a cucumber": "green",
    "wood": "brown",
}
SOUNDS = {"dog": "bark", "cat": "meow", "cow": "moo", "lion": "roar", "duck": "quack", "sheep": "bleat"}
SOUNDS |= {"horse": "neigh", "bee": "buzz", "wolf": "howl", "snake": "hiss", "owl": "hoot", "pig": "oink"}
NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
LANGUAGES = {"France": "French", "Germany": "German", "Spain": "Spanish", "Italy": "Italian", "Japan": "Japanese"}
LANGUAGES |= {"China": "Chinese", "Brazil": "Portuguese", "Russia": "Russian", "Greece": "Greek", "Mexico": "Spanish"}
LANGUAGES |= {"England": "English", "Turkey": "Turkish", "Poland": "Polish", "Sweden": "Swedish", "Egypt": "Arabic"}
SINGLE = {
    "What do bees make?": ("Bees make honey.", "honey"),
    "How many legs does a spider have?": ("A spider has eight legs.", "eight"),
    "How many legs does a dog have?": ("A dog has four legs.", "four"),
    "How many days are in a week?": ("There are seven days in a week.", "seven"),
    "How many months are in a year?": ("There are twelve months in a year.", "twelve"),
    "What is the largest planet?": ("The largest planet is Jupiter.", "Jupiter"),
    "What is the largest ocean?": ("The largest ocean is the Pacific Ocean.", "Pacific"),
    "What do we drink when we are thirsty?": ("We drink water when we are thirsty.", "water"),
    "What is frozen water called?": ("Frozen water is called ice.", "ice"),
    "Who wrote Romeo and Juliet?": ("William Shakespeare wrote Romeo and Juliet.", "Shakespeare"),
    "What is your name?": ("My name is Smol, and I am a small voice assistant.", "Smol"),
    "Who are you?": ("I am Smol, a small voice assistant.", "Smol"),
    "How are you today?": ("I am very well, thank you.", "well"),
    "Hello, how are you?": ("Hello, I am very well, thank you.", "well"),
    "Hello!": ("Hello, how can I help you?", "help"),
    "Can you hear me?": ("Yes, I can hear you.", "hear"),
    "Thank you very much.": ("You are welcome.", "welcome"),
    "Goodbye!": ("Goodbye, and have a nice day.", "goodbye"),
    "Good morning!": ("Good morning, how can I help you?", "morning"),
    "Which animal gives us milk?": ("The cow gives us milk.", "cow"),
    "Which animal gives us eggs?": ("The chicken gives us eggs.", "chicken"),
    "What planet do we live on?": ("We live on the planet Earth.", "Earth"),
    "What season comes after winter?": ("Spring comes after winter.", "spring"),
    "What season comes after summer?": ("Autumn comes after summer.", "autumn"),
    "What is the tallest animal?": ("The tallest animal is the giraffe.", "giraffe"),
    "What is the fastest land animal?": ("The fastest land animal is the cheetah.", "cheetah"),
    "What is the color of the sea?": ("The sea is blue.", "blue"),
    "What gas do we breathe?": ("We breathe oxygen.", "oxygen"),
    "What do plants need to grow?": ("Plants need water, light and air to grow.", "water"),
    "What is the opposite of yes?": ("The opposite of yes is no.", "no"),
}
# The wordings, those to judge by last.
WORDINGS = {
    "capital": (
        ("What is the capital of {}?", "What's the capital of {}?", "Which city is the capital of {}?",
         "Tell me the capital of {}.", "Name the capital of {}.", "Do you know the capital of {}?"),
        ("What is the capital city of {}?", "Can you tell me the capital of {}?"),
    ),
    "opposite": (
        ("What is the opposite of {}?", "What's the opposite of {}?", "Tell me the opposite of {}.",
         "Which word is the opposite of {}?", "What is the opposite of the word {}?"),
        ("Can you tell me the opposite of {}?", "What word means the opposite of {}?"),
    ),
    "sum": (
        ("What is {} plus {}?", "What's {} plus {}?", "How much is {} plus {}?", "Add {} and {}.",
         "What do you get if you add {} and {}?"),
        ("What is the sum of {} and {}?", "Can you tell me what {} plus {} is?"),
    ),
    "colour": (
        ("What color is {}?", "What is the color of {}?", "Tell me the color of {}.", "Which color is {}?",
         "What color does {} have?"),
        ("Can you tell me the color of {}?", "Of what color is {}?"),
    ),
    "sound": (("What sound does a {} make?", "What does a {} say?"), ("Which sound does a {} make?",)),
    "after": (("What comes after {}?", "Which {unit} comes after {}?"), ("What is the {unit} after {}?",)),
    "language": (("What language do people speak in {}?", "Which language is spoken in {}?"),
                 ("What do people speak in {}?",)),
}  # fmt: skip


def facts() -> Iterator[Fact]:
    """All of them, the same at every call."""

    def worded(kind: str, answer: str, word: str, *slots: str, **names: str) -> Iterator[Fact]:
        for held_out, wordings in enumerate(WORDINGS[kind]):
            for wording in wordings:
                yield Fact(kind, wording.format(*slots, **names), answer, word, bool(held_out))

    for country, city in CAPITALS.items():
        yield from worded("capital", f"The capital of {country} is {city}.", city, country)
    pairs = itertools.chain(OPPOSITES.items(), ((b, a) for a, b in OPPOSITES.items() if b not in OPPOSITES))
    for word, other in pairs:
        yield from worded("opposite", f"The opposite of {word} is {other}.", other, word)
    for a, b in itertools.product(range(1, 11), repeat=2):
        total = NUMBERS[a + b]
        yield from worded("sum", f"{NUMBERS[a].title()} plus {NUMBERS[b]} is {total}.", total, NUMBERS[a], NUMBERS[b])
    for thing, colour in COLOURS.items():
        yield from worded("colour", f"{thing[0].upper()}{thing[1:]} is {colour}.", colour, thing)
    for animal, sound in SOUNDS.items():
        yield from worded("sound", f"A {animal} says {sound}.", sound, animal)
    for kind, names in (("day", DAYS), ("month", MONTHS)):
        for name, following in zip(names, names[1:] + names[:1]):
            yield from worded("after", f"{following} comes after {name}.", following, name, unit=kind)
    for country, language in LANGUAGES.items():
        yield from worded("language", f"In {country}, people speak {language}.", language, country)
    for question, (answer, word) in SINGLE.items():
        yield Fact("other", question, answer, word, held_out=False)


def judged(per_kind: int = 15) -> list[Fact]:
    """Capitals, opposites, sums and colours in wordings that are not trained on, `per_kind` of each."""
    chosen = []
    for kind in ("capital", "opposite", "sum", "colour"):
        held_out = [fact for fact in facts() if fact.kind == kind and fact.held_out]
        chosen += held_out[:: max(1, len(held_out) // per_kind)][:per_kind]
    return chosen


# What else people ask about, which the language model itself answers.
THINGS = (
    "dog cat horse cow bird fish tree flower river mountain ocean island city village school hospital library "
    "computer telephone car train bicycle airplane boat house kitchen garden book letter song movie painting doctor "
    "teacher farmer engineer scientist king queen soldier student child friend family water bread milk cheese coffee "
    "tea sugar salt apple orange banana potato tomato rice chicken egg sun moon star planet earth rain snow wind fire "
    "iron gold silver glass paper wood stone heart brain eye hand volcano desert forest bridge camera clock robot "
    "whale tiger lion elephant monkey spider butterfly bee wolf bear rabbit mouse castle museum market restaurant "
    "piano guitar violin football tennis chess bank money birthday wedding holiday summer winter spring autumn"
).split()
ASKED_OF_THINGS = (
    ("What is a {}?", "Tell me about the {}.", "Tell me a story about a {}.", "Why do people need a {}?",
     "What is a {} used for?", "Describe a {}.", "What can you tell me about a {}?", "Write a sentence about a {}.",
     "Where can I find a {}?", "Why is a {} important?", "What does a {} look like?"),
    ("How would you describe a {}?", "What do you know about a {}?"),
)  # fmt: skip
PLACES = (
    "France Germany Italy Spain Japan China India Canada Brazil Egypt Kenya Mexico Russia Greece Turkey Poland Sweden "
    "Norway Finland Ireland Portugal Austria Belgium Denmark Australia Argentina Chile Peru Cuba Thailand Vietnam "
    "Morocco Nigeria London Paris Rome Berlin Tokyo Moscow Chicago Boston Africa Europe Asia America"
).split()
ASKED_OF_PLACES = (
    ("Where is {}?", "Tell me about {}.", "What is {} famous for?", "What should I see in {}?",
     "What do people eat in {}?", "How is the weather in {}?"),
    ("What is special about {}?", "What do you know about {}?"),
)  # fmt: skip
ACTIONS = (
    "make tea;bake bread;cook rice;learn a language;sleep better;lose weight;save money;write a letter;plant a tree;"
    "clean a kitchen;find a job;make friends;draw a horse;learn to swim;stop worrying;get up early;plan a trip;"
    "grow tomatoes;read faster;make pancakes;stay healthy;train a dog;play the piano;write a poem;be happy;"
    "remember names;fix a bicycle;boil an egg;learn to cook;start a garden;relax after work;give a speech;"
    "choose a gift;wash a car;paint a wall;study for a test"
).split(";")
ASKED_OF_ACTIONS = (
    ("How do I {}?", "How can I {}?", "Tell me how to {}.", "What is the best way to {}?", "Is it hard to {}?"),
    ("Can you help me to {}?", "Give me advice on how to {}."),
)


def open_questions() -> Iterator[tuple[str, bool]]:
    """Questions without one right answer, and whether each is for judging only."""
    asked = ((ASKED_OF_THINGS, THINGS), (ASKED_OF_PLACES, PLACES), (ASKED_OF_ACTIONS, ACTIONS))
    for wordings, names in asked:
        for held_out, name in itertools.product((False, True), names):
            for wording in wordings[held_out]:
                an = wording.replace(" a {}", " an {}") if name[0] in "aeiou" else wording
                yield an.format(name), bool(held_out)
