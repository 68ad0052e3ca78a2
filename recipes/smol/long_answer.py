# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
Whether a voice stays the same: among answers, and from the first minute to the last of one that goes on and on.

    python long_answer.py smol judged texts.jsonl --minutes 10

One answer is made of the texts of many, given to the model word by word; it is streamed, read back by Whisper base and
compared by Resemblyzer (`pip install Resemblyzer==0.1.4`). The other recordings are those that `judge.py` left.
"""

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
import soundfile
import torch
import voices
from judge import Judge
from loop import read_corpus, run
from resemblyzer import VoiceEncoder, preprocess_wav
from transformers import AutoModelForCausalLM, AutoProcessor

import ttt_omni  # noqa: F401  which registers its classes
from ttt_omni.streaming_ttt_omni import SpeechStream


def similarity(encoder: VoiceEncoder, recordings: list[np.ndarray], rate: int) -> float:
    """The mean cosine of all pairs."""
    embeddings = np.stack([encoder.embed_utterance(preprocess_wav(x, source_sr=rate)) for x in recordings])
    cosines = embeddings @ embeddings.T
    return float(cosines[np.triu_indices(len(cosines), 1)].mean())


@torch.no_grad()
def say_on(model, processor, texts: list[str], seconds: float, rate: int) -> tuple[np.ndarray, str]:
    """The speech of `texts` as one answer, and those that were needed for so many seconds."""
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": "Tell me all that you know."}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    out = model(input_ids=inputs["input_ids"], use_cache=True)
    state, cache = out.last_hidden_state[0, -1:], out.cache
    stream, pieces, said, length = SpeechStream(model, 10, 25), [], [], 0
    for text in itertools.cycle(texts):
        ids = processor.tokenizer(f" {text}" if said else text, add_special_tokens=False)["input_ids"]
        out = model(input_ids=torch.tensor([ids]), cache=cache, use_cache=True)
        states = torch.cat([state, out.last_hidden_state[0]])
        pieces.append(stream.push(states[:-1]).numpy())
        state = states[-1:]
        said.append(text)
        length += len(pieces[-1])
        if length > seconds * rate:
            return np.concatenate([*pieces, stream.flush().numpy()]), " ".join(said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the finished model")
    parser.add_argument("folder", type=Path, help="that `judge.py` made")
    parser.add_argument("texts", type=Path)
    parser.add_argument("--minutes", type=float, default=10)
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.model)
    processor = AutoProcessor.from_pretrained(arguments.model)
    rate = model.config.vocoder_config.sampling_rate
    encoder, judge, figures = VoiceEncoder("cpu", verbose=False), Judge(arguments.folder), {}

    answers = [soundfile.read(path, dtype="float32")[0] for path in sorted(arguments.folder.glob("answer-*.wav"))]
    said = [text for text, _ in json.loads((arguments.folder / "answers.json").read_text())]
    enough = [index for index, samples in enumerate(answers) if len(samples) > 1.5 * rate][:30]
    figures["between_answers"] = similarity(encoder, [answers[index] for index in enough], rate)
    figures["of_the_voice_itself"] = similarity(encoder, [voices.joe()(said[index])[0] for index in enough], rate)

    records = [r for r in read_corpus(arguments.texts) if r["split"] != "spelling" and "word" not in r]
    texts = [record["conversations"][1]["value"] for record in records]
    samples, text = say_on(model, processor, texts[:400], 60 * arguments.minutes, rate)
    soundfile.write(arguments.folder / "long-answer.wav", samples, rate)
    minutes = [samples[start : start + 60 * rate] for start in range(0, len(samples) - 50 * rate, 60 * rate)]
    first = [minutes[0][: 30 * rate], minutes[0][30 * rate :]]
    figures["within_minute_1"] = similarity(encoder, first, rate)
    figures["minute_1_to_last"] = similarity(encoder, [minutes[0], minutes[-1]], rate)
    figures["loudness"] = [round(float(np.sqrt(np.mean(minute**2))), 4) for minute in minutes]
    heard = " ".join(judge.read_back(minute, rate) for minute in minutes)
    spoken = " ".join(text.split()[: len(heard.split())])
    figures["wer"] = judge.wer([(spoken, heard)])
    print(json.dumps(figures, indent=2))
    (arguments.folder / "long_answer.json").write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    run(main)
