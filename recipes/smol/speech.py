# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
Has the texts of the corpus spoken: answers in one voice, questions in many.

    python speech.py texts.jsonl corpus --readings 2 --answers 10000

The folder gets two manifests such as `ttt-omni finetune` takes: `answers.jsonl` of typed questions and spoken answers,
and `questions.jsonl` of spoken questions, whose other recordings are in `"readings"`; and the recordings, FLAC, beside
the answers the latents of their vocoder. Held-out questions are spoken in a voice to train on and in the reserved
ones. What is there is kept.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import voices
from loop import read_corpus, run
from tqdm import tqdm

from ttt_omni.files_ttt_omni import new_file
from ttt_omni.training.data import SPEECH_TOKEN


# Shares of the readings of a question; Kokoro is as slow as it is good, so that the questions with one right answer,
# which are asked the most, have more of it.
KINDS = {"flite": 0.35, "espeak": 0.2, "joe": 0.32, "kokoro": 0.15}
KOKORO_OF_OTHERS = 0.03
# Which makes the answers as much alike as the voice can, so that there is less to learn.
ANSWER_NOISE = {"noise": 0.2, "duration_noise": 0.0}


def name_of(*key: str) -> str:
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]


def write(path: Path, samples: np.ndarray, rate: int) -> None:
    with new_file(path) as made:
        soundfile.write(made, np.clip(samples, -1, 1), rate, format="FLAC")


def kinds_of(record: dict, count: int) -> list[str]:
    """The kinds of voice that a question is read in, the same for the same question."""
    question, has_word = record["conversations"][0]["value"], "word" in record
    shares = KINDS if has_word else KINDS | {"kokoro": KOKORO_OF_OTHERS}
    kinds = random.Random(question).choices(list(shares), list(shares.values()), k=count if has_word else 1)
    return [*kinds[:1], *voices.RESERVED_VOICES] if record["split"] == "held_out" else kinds


def read_question(record: dict, folder: Path, count: int) -> dict:
    """The conversation, its question spoken in all of its voices."""
    question, *answer = record["conversations"]
    text, names, kinds = question["value"], [], kinds_of(record, count)
    for index, kind in enumerate(kinds):
        names.append(f"{name_of(text, kind, str(index))}.flac")
        if not (folder / names[-1]).exists():
            write(folder / names[-1], *voices.say(text, kind, random.Random(names[-1])))
    spoken = {"text": text, "speech": names[0], "readings": names, "voices": kinds}
    return record | spoken | {"conversations": [question | {"value": SPEECH_TOKEN}, *answer]}


def speak_answer(record: dict, folder: Path) -> dict:
    """The conversation, its last answer spoken, whose latents are kept too."""
    *before, answer = record["conversations"]
    name = name_of(answer["value"])
    if not (folder / f"{name}.flac").exists():
        samples, latents = voices.joe()(answer["value"], **ANSWER_NOISE)
        with new_file(folder / f"{name}.npy") as made, open(made, "wb") as file:
            np.save(file, latents.astype(np.float16))
        write(folder / f"{name}.flac", samples, voices.JOE_RATE)
    return record | {"conversations": [*before, answer | {"speech": f"{name}.flac"}]}


def spelt(record: dict) -> dict:
    """The answer of `record` as one more sentence to be heard."""
    turn = record["conversations"][-1]
    spoken = {"text": turn["value"], "speech": turn["speech"], "readings": [turn["speech"]], "voices": ["joe"]}
    return {"split": "spelling"} | spoken | {"conversations": [{"from": "human", "value": SPEECH_TOKEN}]}


def repeated(record: dict) -> dict:
    """A conversation in which the assistant says what was asked in `record`, so that it has more words to say.

    Asked once more it repeats nearly anything word for word, and its hidden states know each word before it is said.
    """
    text = record["conversations"][0]["value"]
    request, reply = {"from": "human", "value": f'Please repeat: "{text}"'}, {"from": "gpt", "value": text}
    return {"id": f"{record['id']}-repeated", "split": "train", "conversations": [request, reply, request, reply]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--readings", type=int, default=2, help="of a question with one right answer (default: 2)")
    parser.add_argument("--answers", type=int, default=20_000, help="at most so many are spoken (default: 20000)")
    parser.add_argument("--held-out", type=int, default=200, help="held-out questions to be spoken (default: 200)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="default: one per core")
    arguments = parser.parse_args()
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    records = read_corpus(arguments.texts)
    held_out = [record for record in records if record["split"] == "held_out"][: arguments.held_out]
    spelling = [record for record in records if record["split"] == "spelling"]
    records = held_out + [record for record in records if record["split"] == "train"]
    to_repeat = [record for record in records + spelling if record["split"] != "held_out"]
    answers = records + [repeated(record) for record in to_repeat]
    answers = list({record["conversations"][-1]["value"]: record for record in answers}.values())
    with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:

        def have_read(name: str, its_records: list[dict], read) -> list[dict]:
            work = partial(read, folder=folder)
            return list(tqdm(pool.imap(work, its_records, chunksize=8), total=len(its_records), desc=name))

        answers = have_read("Answers", answers[: arguments.answers], speak_answer)
        read = partial(read_question, count=arguments.readings)
        questions = have_read("Questions", records + spelling, read)
    questions += [spelt(record) for record in answers if record["split"] == "train"]
    for name, its_records in (("answers.jsonl", answers), ("questions.jsonl", questions)):
        with new_file(folder / name) as made, open(made, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in its_records)


if __name__ == "__main__":
    run(main)
