# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
Whether a voice stays the same, and its words understood: among answers, and in one that goes on and on.

    python long_answer.py smol judged texts.jsonl --lengths 200,800,3200

One answer is made of the texts of many, given to the model word by word, and judged as in `ttt-omni evaluate speech`,
by Whisper base and Resemblyzer (`pip install Resemblyzer==0.1.4`). The other recordings are those `judge.py` left.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
import voices
from judge import Judge
from loop import read_corpus, run
from transformers import AutoModelForCausalLM, AutoProcessor

from ttt_omni.evaluation.speech import evaluate_speech, voice_encoder


def similarity(embed: Callable, recordings: list[np.ndarray], rate: int) -> float:
    """The mean cosine of all pairs."""
    embeddings = np.stack([embed(samples, rate) for samples in recordings])
    cosines = embeddings @ embeddings.T
    return float(cosines[np.triu_indices(len(cosines), 1)].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the finished model")
    parser.add_argument("folder", type=Path, help="that `judge.py` made")
    parser.add_argument("texts", type=Path)
    parser.add_argument("--lengths", default="200,800,3200", help="tokens (default: 200,800,3200)")
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.model)
    processor = AutoProcessor.from_pretrained(arguments.model)
    rate = model.config.vocoder_config.sampling_rate
    embed, judge, figures = voice_encoder(), Judge(arguments.folder), {}
    if embed is None:
        raise ValueError("Voices are compared by Resemblyzer: pip install Resemblyzer==0.1.4")

    answers = [soundfile.read(path, dtype="float32")[0] for path in sorted(arguments.folder.glob("answer-*.wav"))]
    said = [text for text, _ in json.loads((arguments.folder / "answers.json").read_text())]
    enough = [index for index, samples in enumerate(answers) if len(samples) > 1.5 * rate][:30]
    figures["between_answers"] = similarity(embed, [answers[index] for index in enough], rate)
    originals = [voices.joe()(said[index])[0] for index in enough]
    figures["of_the_voice_itself"] = similarity(embed, originals, voices.JOE_RATE)

    records = [r for r in read_corpus(arguments.texts) if r["split"] != "spelling" and "word" not in r]
    texts = arguments.folder / "long-answer.txt"
    texts.write_text("\n".join(record["conversations"][1]["value"] for record in records[:400]))
    lengths = [int(word) for word in arguments.lengths.split(",")]
    figures["long_answer"] = evaluate_speech(model, processor, texts, judge.read_back, lengths, embed=embed)
    print(json.dumps(figures, indent=2))
    (arguments.folder / "long_answer.json").write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    run(main)
