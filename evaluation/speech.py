# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""An answer that goes on for hours: is it still understood, in the same voice, as loud as at its beginning?"""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import soxr
import torch
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel
from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

from ..processing_ttt_omni import TTTOmniProcessor
from ..streaming_ttt_omni import UnitStream
from .conditions import CHUNK_SIZE, max_length
from .corpus import read_talk


LENGTHS = (4096, 8192, 16384, 32768, 65536)
PIECE_SECONDS = 60
ENOUGH = 0.9  # of the quality of sentences said alone
QUESTION = "Tell me all that you know."
HEARD_AT = 16_000  # samples per second, by recognisers and by Resemblyzer
FRAME_SECONDS = 0.02
SILENT = 0.01  # of the baseline's loudness: 40 dB less
REPEATED_WORDS = 4  # in a row


@dataclass
class Piece:
    """
    What is judged together: whole sentences, each with its samples.

    Args:
        length: tokens of the answer up to the end of it; 0 of sentences that are answers of their own.
    """

    length: int
    texts: list[str]
    sounds: list[np.ndarray]
    rate: int

    @property
    def samples(self) -> np.ndarray:
        return np.concatenate(self.sounds)


@torch.no_grad()
def say_on(
    model: PreTrainedModel,
    processor: TTTOmniProcessor,
    sentences: Iterable[str],
    lengths: Sequence[int],
    seconds: float,
) -> Iterator[Piece]:
    """
    One answer of the given sentences, of which its beginning is heard, and so many `seconds` after each of `lengths`.

    The model is given the words and makes speech of them as in an answer of its own, in one go from the first to the
    last; but only what is heard goes through the vocoder, so that an answer of hours takes minutes.
    """
    answer, sentences = _Answer(model, processor), iter(sentences)
    for start in (0, *sorted(lengths)):
        texts = []
        while answer.length < start:  # in passes of about a chunk
            texts.append(next(sentences))
            words = sum(len(text.split()) for text in texts)
            if words >= min(CHUNK_SIZE, start - answer.length) // 2:
                answer.say(" ".join(texts))
                texts = []
        texts, sounds = _hear(model, sentences, seconds, answer.say)
        yield Piece(answer.length, texts, sounds, model.config.vocoder_config.sampling_rate)


@torch.no_grad()
def say_alone(model: PreTrainedModel, processor: TTTOmniProcessor, sentences: Iterable[str], seconds: float) -> Piece:
    """Sentences that are answers of their own, so many `seconds` of them."""
    texts, sounds = _hear(model, iter(sentences), seconds, lambda text: _Answer(model, processor).say(text))
    return Piece(0, texts, sounds, model.config.vocoder_config.sampling_rate)


class _Answer:
    """One that grows, of the words given."""

    def __init__(self, model: PreTrainedModel, processor: TTTOmniProcessor):
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": QUESTION}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        self.model, self.tokenizer, self.length = model, processor.tokenizer, 0
        self.cache, self.stream = DynamicCache(config=model.config), UnitStream(model.speech_decoder)
        self.ahead = _states(model, inputs["input_ids"], self.cache)[-1:]  # the state that foresees the next token

    def say(self, text: str) -> torch.LongTensor:
        """The units `[U]` of the next words."""
        text = f" {text}" if self.length else text
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        states = torch.cat([self.ahead, _states(self.model, torch.tensor([ids]), self.cache)])
        self.ahead, self.length = states[-1:], self.length + len(ids)
        return self.stream.push(states[:-1])


def _hear(
    model: PreTrainedModel, sentences: Iterator[str], seconds: float, say: Callable[[str], torch.LongTensor]
) -> tuple[list[str], list[np.ndarray]]:
    """The next sentences, and how they sound, until they have so many seconds."""
    texts, sounds = [], []
    while sum(map(len, sounds)) < seconds * model.config.vocoder_config.sampling_rate:
        texts.append(next(sentences))
        sounds.append(_synthesize(model, say(texts[-1])))
    return texts, sounds


def _states(model: PreTrainedModel, input_ids: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    """Hidden states `[T, hidden_size]`."""
    pieces = [
        model(input_ids=piece.to(model.device), cache=cache, use_cache=True, logits_to_keep=1).last_hidden_state[0]
        for piece in input_ids.split(CHUNK_SIZE, dim=1)
    ]
    return torch.cat(pieces)


def _synthesize(model: PreTrainedModel, units: torch.LongTensor) -> np.ndarray:
    stream = model.vocoder.stream()
    return torch.cat([stream.push(units), stream.flush()]).float().cpu().numpy()


def evaluate_speech(
    model: PreTrainedModel,
    processor: TTTOmniProcessor,
    text: str | os.PathLike,
    recognize: Callable[[np.ndarray, int], str],
    lengths: Sequence[int] = LENGTHS,
    seconds: float = PIECE_SECONDS,
    language: str = "en",
    embed: Callable[[np.ndarray, int], np.ndarray] | None = None,
) -> list[dict[str, Any]]:
    """
    Judges an answer that goes on and on, at its beginning and at ever greater lengths; until its quality is less than
    90 % of the baseline's, which are the sentences of the beginning, each said as an answer of its own.

    Every sentence is recognised on its own, as recognisers made for half a minute fail on longer sound in ways of
    their own, and compared with what was to be said.

    Args:
        text: file of what is said, from its first sentence on and again from there.
        recognize: from samples and their rate to words, see [`recognizer`].
        lengths: of the answer in tokens; those that attention is not made for are left out.
        seconds: that are judged at a time.
        language: in English, numbers and contractions are compared by what they mean.
        embed: from samples and their rate to a unit vector that tells speakers apart, see [`voice_encoder`].

    Returns:
        A row per piece: `length` in tokens, 0 of the baseline, `minutes` of what is heard, `wer`, `similarity` of the
        voice to the baseline's (of this, between its halves), `loudness` (root mean square), `silence` (share of the
        time), `repetition` (share of four words in a row that were heard before in the piece, less that of the text),
        and `fell`, the names of what is less than 90 % of the baseline: `"words"` (right ones) or `"voice"`. The last
        row is the first one with any.

    Raises:
        ValueError, OSError: a text or lengths that will not do, or a model that does not speak.
        ImportError: without jiwer.
    """
    if model.speech_decoder is None or model.vocoder is None:
        raise ValueError("The model does not speak: it has no speech decoder and vocoder.")
    if not lengths or min(lengths) < 1:
        raise ValueError(f"`lengths` must be at least 1 token, got {list(lengths)}.")
    if seconds <= 0:
        raise ValueError(f"`seconds` must be positive, got {seconds}.")
    limit = max_length(model, "model") - 2 * CHUNK_SIZE  # what is judged goes beyond a length
    if min(lengths) > limit:
        raise ValueError(f"The model is made for fewer tokens than the length of {min(lengths)}.")
    normalize = EnglishTextNormalizer({}) if language == "en" else BasicTextNormalizer()
    sentences = [sentence for sentence in read_talk(text) if normalize(sentence)]
    if not sentences:
        raise ValueError(f"{text} has no words.")
    within = [length for length in sorted(lengths) if length <= limit]
    rows, first = [], None
    alone = say_alone(model, processor, itertools.cycle(sentences), seconds)
    pieces = itertools.chain([alone], say_on(model, processor, itertools.cycle(sentences), within, seconds))
    for piece in tqdm(pieces, total=2 + len(within), desc="Speech", unit=" pieces"):
        first = first or piece
        heard = [recognize(samples, piece.rate) for samples in piece.sounds]
        rows.append(_row(piece, first, [(normalize(a), normalize(b)) for a, b in zip(piece.texts, heard)], embed))
        rows[-1]["fell"] = fell(rows[-1], rows[0])
        if rows[-1]["fell"]:
            break
    return rows


def _row(piece: Piece, first: Piece, pairs: list[tuple[str, str]], embed) -> dict[str, Any]:
    import jiwer  # an optional dependency

    said, heard = zip(*pairs)
    frame = int(FRAME_SECONDS * piece.rate)
    frames = piece.samples[: len(piece.samples) // frame * frame].reshape(-1, frame)
    loudness = float(np.sqrt(np.mean(first.samples**2)))
    row = {
        "condition": "model",
        "length": piece.length,
        "minutes": len(piece.samples) / piece.rate / 60,
        "wer": jiwer.wer(list(said), list(heard)),
        "similarity": None,
        "loudness": float(np.sqrt(np.mean(piece.samples**2))),
        "silence": float((np.sqrt((frames**2).mean(1)) < SILENT * loudness).mean()),
        "repetition": repetition(" ".join(heard)) - repetition(" ".join(said)),
    }
    if embed is not None:
        middle = len(first.samples) // 2
        pair = (first.samples[:middle], first.samples[middle:]) if piece is first else (first.samples, piece.samples)
        row["similarity"] = float(np.dot(*(embed(samples, piece.rate) for samples in pair)))
    return row


def repetition(text: str) -> float:
    """The share of four words in a row that were there before."""
    words = text.split()
    runs = [tuple(words[start : start + REPEATED_WORDS]) for start in range(len(words) - REPEATED_WORDS + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def fell(row: dict[str, Any], baseline: dict[str, Any]) -> list[str]:
    """What of `row` is less than 90 % of the `baseline`."""
    found = []
    if 1 - row["wer"] < ENOUGH * max(0.0, 1 - baseline["wer"]):
        found.append("words")
    if row["similarity"] is not None and row["similarity"] < ENOUGH * baseline["similarity"]:
        found.append("voice")
    return found


def recognizer(source: str | os.PathLike, language: str = "en") -> Callable[[np.ndarray, int], str]:
    """
    What tells the words of samples `[N]` of a rate: a Whisper for CTranslate2, by `faster-whisper`, or any of
    Transformers' models for it, a folder or `owner/name` on the Hub.

    Raises:
        ImportError: without `faster-whisper`, if it is for CTranslate2.
        OSError: if there is none.
    """
    if Path(source, "model.bin").is_file():
        from faster_whisper import WhisperModel  # an optional dependency

        whisper = WhisperModel(str(source), device="auto", compute_type="float32")

        def transcribe(samples: np.ndarray) -> str:
            segments, _ = whisper.transcribe(samples, language=language, beam_size=5, without_timestamps=True)
            return " ".join(segment.text.strip() for segment in segments)

    else:
        from transformers import pipeline

        recognise = pipeline("automatic-speech-recognition", model=str(source))

        def transcribe(samples: np.ndarray) -> str:
            return recognise({"raw": samples, "sampling_rate": HEARD_AT})["text"].strip()

    return lambda samples, rate: transcribe(_resample(samples, rate))


def voice_encoder() -> Callable[[np.ndarray, int], np.ndarray] | None:
    """What makes a unit vector that tells speakers apart of samples `[N]` and their rate; none without Resemblyzer."""
    if find_spec("resemblyzer") is None:
        return None
    from resemblyzer import VoiceEncoder, preprocess_wav

    encoder = VoiceEncoder("cpu", verbose=False)
    return lambda samples, rate: encoder.embed_utterance(preprocess_wav(samples, source_sr=rate))


def _resample(samples: np.ndarray, rate: int) -> np.ndarray:
    return soxr.resample(samples, rate, HEARD_AT).astype(np.float32)
