# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
Turns conversations in text into spoken ones to train on, with a text-to-speech program of your choice.

    python examples/speak.py examples/conversations.jsonl spoken --answer-voice en-us
    python examples/speak.py texts.jsonl spoken --voices amy.onnx joe.onnx \\
        --command "piper --model {voice} --output_file {output}"

A line of texts.jsonl is a conversation like those of a manifest, whose questions are text:

    {"id": "7", "conversations": [{"from": "human", "value": "What time is it?"}, {"from": "gpt", "value": "Four."}]}

The folder gets the manifest `corpus.jsonl` and its recordings, 16 kHz mono; the same command keeps those that are
there. Answers are spoken with `--answer-voice` only, for `examples/extract_units.py` to make units of them.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import soundfile
from tqdm import tqdm

from ttt_omni.audio_ttt_omni import read_audio
from ttt_omni.commands.voice import program_words, run_program
from ttt_omni.files_ttt_omni import new_file
from ttt_omni.training.data import SPEECH_TOKEN, ManifestError, naming_line, read_manifest


QUESTION = f"{SPEECH_TOKEN}\nPlease directly answer the questions in the user's speech."  # as in LLaMA-Omni's data
SAMPLING_RATE = 16000
COMMAND = "espeak-ng -v {voice} -w {output} --stdin"
VOICES = ("en-us", "en-us+f3")


def conversations(texts: Path) -> Iterator[tuple[int, dict]]:
    """The lines of `texts` that are not empty, each with its number. Raises [`ManifestError`] for a wrong one."""
    for number, _, conversation in read_manifest(texts):
        if conversation.speech:
            with naming_line(texts, number):
                raise ManifestError(f"it has {SPEECH_TOKEN} already, where a question in text is needed.")
        yield number, conversation.record


def record(text: str, voice: str, command: list[str], folder: Path) -> str:
    """
    The name of the recording of `text` in `folder`, which the program makes unless it is there.

    Raises:
        ValueError, OSError: saying why there is none.
    """
    text = " ".join(text.split())
    if not text:
        raise ValueError("there is a turn without text, which cannot be spoken.")
    key = json.dumps([command, voice, text])
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.wav"
    if path.exists():
        return path.name
    with new_file(path) as resampled:
        made = resampled.with_name("made.wav")
        run_program(command, text, made, voice)
        with soundfile.SoundFile(resampled, "w", SAMPLING_RATE, channels=1, subtype="PCM_16") as file:
            for block in read_audio(made, SAMPLING_RATE):
                file.write(block)
    return path.name


def speak(texts: Path, folder: Path, command: str, voices: list[str], answer_voice: str | None) -> None:
    """
    Makes `corpus.jsonl` and its recordings in `folder`.

    Args:
        texts: JSONL file of conversations in text.
        command: of the program, whose `{voice}` and `{output}` are filled in, and `{text}` too; without `{text}`, the
            text comes on its standard input. No shell reads it.
        voices: the conversations' questions have them in turn.
        answer_voice: `None` leaves the answers unspoken.

    Raises:
        [`ManifestError`]: naming the line that is wrong, or cannot be spoken.
        ValueError, OSError: for a command that will not do, and for files that cannot be read or written.
    """
    words = program_words(command, "--command")
    total = sum(1 for _ in conversations(texts))
    if total == 0:
        raise ManifestError(f"{texts} has no conversations.")
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with new_file(folder / "corpus.jsonl") as manifest, open(manifest, "w", encoding="utf-8") as file:
        spoken = tqdm(conversations(texts), desc="Speaking", total=total, unit=" conversations")
        for index, (number, conversation) in enumerate(spoken):
            recordings = []
            with naming_line(texts, number):
                for turn in conversation["conversations"]:
                    if turn["from"] == "human":
                        voice = voices[index % len(voices)]
                        recordings.append(record(turn["value"], voice, words, folder))
                        turn["value"] = QUESTION
                    elif answer_voice is not None:
                        turn["speech"] = record(turn["value"], answer_voice, words, folder)
            conversation["speech"] = recordings if len(recordings) > 1 else recordings[0]
            file.write(json.dumps(conversation) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, help="JSONL file of conversations in text")
    parser.add_argument("folder", type=Path, help="for the manifest and the recordings")
    parser.add_argument("--command", default=COMMAND, help=f"default: {COMMAND}")
    parser.add_argument("--voices", nargs="+", default=VOICES, help=f"of questions (default: {' '.join(VOICES)})")
    parser.add_argument("--answer-voice", help="speak the answers too, in this voice")
    try:
        speak(**vars(parser.parse_args()))
    except (ValueError, OSError) as error:
        sys.exit(f"speak.py: error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
