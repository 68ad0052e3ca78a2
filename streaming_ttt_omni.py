# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Speech and text while they are generated, token by token."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase


# Where a sentence may end: a line does, Chinese and Japanese ones without a space behind them.
CLOSING = "[\"'”’»)\\]」』）]*"
SENTENCE_END = re.compile(rf"[.!?…]+{CLOSING}(?=\s)|[。！？]+{CLOSING}(?=[^。！？\"'”’»)\]」』）])|\n")


@dataclass
class TTTOmniStreamEvent:
    """
    What `stream` yields for each token, and once more for what was held back until the end.

    Args:
        text: the next piece of the answer's text.
        waveform: the next samples of its speech, float32 `[samples]` at the vocoder's sampling rate; none of
            a model that does not speak.
        token: the id of the token.
    """

    text: str | None = None
    waveform: torch.FloatTensor | None = None
    token: int | None = None


class UnitStream:
    """
    Speaks hidden states that arrive in pieces, as units. The returned units, joined, are those of all hidden states at
    once. With `sliding_window` in the speech decoder's config, memory and the work per token do not grow.
    """

    def __init__(self, speech_decoder: PreTrainedModel):
        self.speech_decoder = speech_decoder
        self.cache = DynamicCache(config=speech_decoder.config)
        self.last_frame = torch.tensor([speech_decoder.blank_id])

    @torch.no_grad()
    def push(self, hidden_states: torch.Tensor) -> torch.LongTensor:
        """The units `[U]` that the next tokens' `hidden_states` `[T, hidden_size]` begin."""
        if hidden_states.shape[0] == 0:
            return self.last_frame[:0]
        return self.collapse(self.speech_decoder(hidden_states.unsqueeze(0), cache=self.cache)[0])

    def collapse(self, logits: torch.Tensor) -> torch.LongTensor:
        """The units `[U]` that the next frames begin, whose `logits` `[F, units + 1]` the speech decoder made."""
        frames = logits.argmax(-1)
        units = self.speech_decoder.collapse(frames, self.last_frame.to(frames.device))
        self.last_frame = frames[-1:]
        return units


class SpeechStream:
    """
    Speaks hidden states that arrive in pieces, as a waveform. The returned chunks, joined, are the waveform of all
    hidden states at once.

    Args:
        model: a [`TTTOmniForCausalLM`] with a speech decoder and a vocoder.
        first_chunk_size: units to wait for until there is a first sound; fewer make it come sooner.
        chunk_size: units to wait for afterwards; more cost less, as chunks overlap in the vocoder's receptive field.

    Raises:
        ValueError: if a chunk has no units.
    """

    def __init__(self, model: PreTrainedModel, first_chunk_size: int, chunk_size: int):
        if min(first_chunk_size, chunk_size) < 1:
            raise ValueError(
                "`first_chunk_size` and `chunk_size` must be at least 1 unit, got "
                f"{first_chunk_size} and {chunk_size}."
            )
        self.unit_stream = UnitStream(model.speech_decoder)
        self.vocoder_stream = model.vocoder.stream()
        self.waiting = torch.empty(0, dtype=torch.long)
        self.size_to_wait_for = first_chunk_size
        self.chunk_size = chunk_size

    def push(self, hidden_states: torch.Tensor) -> torch.FloatTensor:
        """The next samples, possibly none, after the next tokens' `hidden_states` `[T, hidden_size]`."""
        return self.push_units(self.unit_stream.push(hidden_states))

    def push_units(self, units: torch.LongTensor) -> torch.FloatTensor:
        """The next samples, possibly none, after the next `units` `[U]`."""
        self.waiting = torch.cat([self.waiting.to(units.device), units])
        if len(self.waiting) < self.size_to_wait_for:
            return torch.empty(0, device=self.waiting.device)
        waveform = self._synthesize()
        if len(waveform) > 0:
            self.size_to_wait_for = self.chunk_size
        return waveform

    def flush(self) -> torch.FloatTensor:
        """The last samples, possibly none."""
        return torch.cat([self._synthesize(), self.vocoder_stream.flush()])

    def _synthesize(self):
        units, self.waiting = self.waiting, self.waiting[:0]
        return self.vocoder_stream.push(units)


class TextStream:
    """
    Decodes tokens that arrive one by one. The returned pieces, joined, are the text of all tokens at once.

    For byte-level tokenizers, such as Llama 3's, whose tokens may hold parts of a character.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.tokens: list[int] = []  # since a token that ended with a whole character
        self.length = 0  # of their text that was returned

    def push(self, token: int) -> str:
        """The next piece of text, possibly empty."""
        self.tokens.append(token)
        text = self._decode()
        is_whole = not text.endswith("\ufffd")  # what replaces the bytes of a character that is not complete
        piece = text[self.length :] if is_whole else text[self.length : -1]
        self.length += len(piece)
        if is_whole:
            self.tokens, self.length = [], 0
        return piece

    def flush(self) -> str:
        """The last piece of text, possibly empty."""
        return self._decode()[self.length :]

    def _decode(self):
        return self.tokenizer.decode(self.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class SentenceStream:
    """
    Cuts text that arrives in pieces into sentences, without the white space around them. Each is returned as soon as
    it is known to be complete.

    A sentence ends with its line, at `.`, `!`, `?` or `…` before white space, or at `。`, `！` or `？`, quotes and
    brackets that close there included; so that it may also end after an abbreviation.
    """

    def __init__(self):
        self.rest = ""

    def push(self, text: str) -> list[str]:
        """The sentences that are complete with the next piece of text."""
        text = self.rest + text
        ends = [match.end() for match in SENTENCE_END.finditer(text)]
        *sentences, self.rest = [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)])]
        return [sentence.strip() for sentence in sentences if sentence.strip()]

    def flush(self) -> list[str]:
        """The last sentence, if there is one more."""
        rest, self.rest = self.rest.strip(), ""
        return [rest] if rest else []


def iter_sentences(pieces: Iterable[str]) -> Iterator[str]:
    """
    The sentences of a text that comes in pieces, as [`SentenceStream`] cuts it, for a text-to-speech program to say
    while the next is written.
    """
    stream = SentenceStream()
    for piece in pieces:
        yield from stream.push(piece)
    yield from stream.flush()


__all__ = ["TTTOmniStreamEvent", "iter_sentences"]
