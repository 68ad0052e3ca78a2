# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
Facts told aloud in the first minute, other speech for so many minutes, and the facts asked for aloud.

    python benchmarks/spoken_recall.py MODEL --talk talk.txt --minutes 1,10,60 \\
        [--voice "espeak-ng -w {output} {text}"]

MODEL hears and has a window, such as what `ttt-omni make-smol --attention-window 256` writes. All is spoken by the
program `--voice`, turn by turn, and heard as in a conversation, with short replies that are put in the model's mouth.
Each fact is asked for on a copy of what the model then holds; as in `ttt-omni evaluate recall`, the answer is written,
from the words with which it begins up to the value. Beside the model as it is stand the state alone, attention's cache
being dropped before the question, the model without TTT, and the model to which nothing was told. Prints a table and
writes benchmarks/results/spoken_recall.json.
"""

import argparse
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import soundfile
import torch
from reporting import RESULTS, environment, store
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from ttt_omni import TTTOmniProcessor
from ttt_omni.commands.voice import program_words, run_program
from ttt_omni.evaluation.conditions import answer, copies, state_alone, under
from ttt_omni.evaluation.corpus import HEARD, REMEMBERED, read_talk
from ttt_omni.evaluation.facts import Fact, draw_facts
from ttt_omni.evaluation.recall import SPARE_TOKENS, WORDS_OF_A_TURN, Score
from ttt_omni.memory_ttt_omni import TTTOmniMemory


class Speaker:
    """Turns of a conversation as sound."""

    def __init__(self, command: str):
        self.words = program_words(command, "--voice")

    def say(self, text: str) -> dict:
        """The message of a user who says `text`."""
        with TemporaryDirectory() as folder:
            path = Path(folder, "said.wav")
            run_program(self.words, text, path)
            samples, rate = soundfile.read(path, dtype="float32")
        return {"role": "user", "content": [{"type": "audio", "audio": samples, "sampling_rate": rate}]}

    def seconds(self, message: dict) -> float:
        (part,) = message["content"]
        return len(part["audio"]) / part["sampling_rate"]


def hear(model, processor, message: dict, memory: TTTOmniMemory | None) -> TTTOmniMemory:
    """The conversation with one more message, of which the last tokens are not in the cache yet."""
    history = None if memory is None else memory.input_ids
    *_, memory = model.listen(processor.turn_pieces(message, history=history), memory)
    return memory


def reply(processor, memory: TTTOmniMemory, text: str) -> None:
    """Puts `text` in the model's mouth, to be taken up with the next message."""
    said = torch.tensor([processor.answer_ids(text)], device=memory.input_ids.device)
    memory.input_ids = torch.cat([memory.input_ids, said], dim=1)


def ask(model, processor, speaker: Speaker, fact: Fact, memory: TTTOmniMemory, is_state_alone: bool) -> str:
    """What the model says of a fact, on a copy of `memory`."""
    length, held = memory.cache.get_seq_length(), copies(memory.cache)
    copied = TTTOmniMemory(held, memory.input_ids.clone())
    if is_state_alone:  # which has seen nothing of what is to come
        copied = TTTOmniMemory(state_alone(model, held), memory.input_ids[:, length:].clone())
    pieces = processor.turn_pieces(speaker.say(fact.question), history=memory.input_ids)
    *_, copied = model.listen(pieces, copied)
    rest = copied.input_ids[0, copied.cache.get_seq_length() :].tolist()
    stem = processor.tokenizer(fact.stem, add_special_tokens=False)["input_ids"]
    new_tokens = len(processor.tokenizer(f" {fact.value}", add_special_tokens=False)["input_ids"]) + SPARE_TOKENS
    (said,) = answer(model, [rest + stem], copied.cache, new_tokens, processor.tokenizer.eos_token_id)
    return processor.tokenizer.decode(said, skip_special_tokens=True)


def stretches(draw: random.Random, sentences: list[str]) -> Iterator[str]:
    """Turns of talk, without end."""
    while True:
        start, found = draw.randrange(len(sentences)), []
        while sum(len(sentence.split()) for sentence in found) < WORDS_OF_A_TURN:
            found.append(sentences[(start + len(found)) % len(sentences)])
        yield " ".join(found)


def measure(
    model: PreTrainedModel,
    processor: TTTOmniProcessor,
    speaker: Speaker,
    sentences: list[str],
    minutes: list[float],
    num_facts: int,
    seed: int,
    scores: dict,
) -> None:
    """One round, whose answers go into `scores`."""
    facts = draw_facts(random.Random(seed), num_facts)
    for run in ("model", "window", "nothing told"):
        draw = random.Random(seed)
        with under("window" if run == "window" else "model", model) as current:
            told = ["Hello."] if run == "nothing told" else [fact.told for fact in facts]
            memory = hear(current, processor, speaker.say(" ".join(told)), None)
            reply(processor, memory, REMEMBERED[0])
            talk, heard = stretches(draw, sentences), 0.0
            for place in sorted(minutes):
                with tqdm(total=round(60 * place), initial=round(heard), desc=run, unit=" s") as progress:
                    while heard < 60 * place:
                        message = speaker.say(next(talk))
                        memory = hear(current, processor, message, memory)
                        reply(processor, memory, draw.choice(HEARD))
                        heard += speaker.seconds(message)
                        progress.update(round(heard) - progress.n)
                for name in (run, "state") if run == "model" else (run,):
                    said = [ask(current, processor, speaker, fact, memory, name == "state") for fact in facts]
                    key = name, num_facts, place
                    scores.setdefault(key, Score(*key)).add(facts, said)
                    print(name, place, list(zip([fact.value for fact in facts], said)), file=sys.stderr, flush=True)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model that hears")
    parser.add_argument("--talk", type=Path, required=True, help="what else is said")
    parser.add_argument("--minutes", default="1,10,60")
    parser.add_argument("--facts", type=int, default=4, help="told at a time (default: 4)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--voice", default="espeak-ng -w {output} {text}")
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.model).eval()
    processor, speaker = TTTOmniProcessor.from_pretrained(arguments.model), Speaker(arguments.voice)
    minutes, scores = [float(word) for word in arguments.minutes.split(",")], {}
    for number in range(arguments.rounds):
        talk = read_talk(arguments.talk)
        measure(model, processor, speaker, talk, minutes, arguments.facts, number, scores)
    rows = [scores[key].row() for key in sorted(scores)]
    print("| condition | " + " | ".join(f"{x:g} min" for x in minutes) + " |\n|" + " --- |" * (1 + len(minutes)))
    for condition in dict.fromkeys(row["condition"] for row in rows):
        cells = [f"{row['recall']:.0%}" for row in rows if row["condition"] == condition]
        print(f"| {condition} | " + " | ".join(cells) + " |")
    store(
        RESULTS / "spoken_recall.json",
        {"model": arguments.model, "voice": arguments.voice, "distance": "minutes", "rows": rows, **environment()},
    )


if __name__ == "__main__":
    main()
