# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
Streams in and out: prompts of any length piece by piece, and speech while it is generated, token by token.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin


SILENCE = 0.0  # in Whisper's scale of mel bins, what a sine of -65 dBFS reaches


def turn_pieces(
    processor: ProcessorMixin, message: dict, is_first: bool = True, skip_silence: bool = False, device: str = "cpu"
) -> Iterator[dict[str, torch.Tensor]]:
    """
    The prompt for an answer to `message`, piece by piece for `model.listen`: text, and windows of 30 s that are made
    while the audio is read. Joined, the pieces are what `processor.apply_chat_template` makes of `[message]`.

    Args:
        processor: a [`TTTOmniProcessor`].
        message: the user's, as in `apply_chat_template`.
        is_first: whether the conversation begins here, rather than goes on.
        skip_silence: whether to leave out windows in which nothing is louder than about -65 dBFS.
        device: where to compute spectrograms.

    Yields:
        `input_ids` `[1, n]`, and for a window `input_features` `[1, n_mels, 3000]`. The last piece is text.

    Raises:
        FileNotFoundError, TypeError, ValueError: as the processor does, once the audio's turn comes.
    """

    def text_piece(text):
        return processor.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]

    no_system = {"role": "system", "content": ""}
    turn = processor.apply_chat_template([no_system, message], add_generation_prompt=True)
    while turn.startswith(bos := processor.tokenizer.bos_token):
        turn = turn.removeprefix(bos)
    if is_first:
        beginning = processor.apply_chat_template([message], add_generation_prompt=True).removesuffix(turn)
        yield {"input_ids": text_piece(beginning)}
    texts = turn.split(processor.audio_token)
    items = [] if isinstance(message["content"], str) else message["content"]
    audios = [item for item in items if item["type"] == "audio"]
    if len(texts) != len(audios) + 1:
        raise ValueError(f"The message's text holds {processor.audio_token}, which stands for audio.")
    for text, item in zip(texts, audios):
        yield {"input_ids": text_piece(text)}
        audio = next(item[key] for key in ("audio", "path", "url") if item.get(key) is not None)
        for window in processor.iter_audio_windows(audio, item.get("sampling_rate"), device=device):
            if not skip_silence or window["input_features"].max() > SILENCE:
                yield window
    yield {"input_ids": text_piece(texts[-1])}


def skip_pieces(
    pieces: Iterator[dict[str, torch.Tensor]], heard: torch.LongTensor
) -> Iterator[dict[str, torch.Tensor]]:
    """
    The `pieces` after those whose tokens `heard` `[1, n]` are.

    Raises:
        ValueError: if the pieces do not begin with these tokens.
    """
    while heard.shape[1] > 0:
        input_ids = next(pieces, {}).get("input_ids", heard[:, :0])  # [1, n]
        if input_ids.shape[1] == 0 or not torch.equal(input_ids, heard[:, : input_ids.shape[1]]):
            raise ValueError(
                "The memory was saved in the middle of another prompt than this: finish that one first, or begin anew."
            )
        heard = heard[:, input_ids.shape[1] :]
    return pieces


@dataclass
class TTTOmniStreamEvent:
    """
    What `stream` yields for each token, and once more for what was held back until the end.

    Args:
        text: the next piece of the answer's text.
        waveform: the next samples of its speech, float32 `[samples]` at the vocoder's sampling rate (16 kHz).
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
        logits = self.speech_decoder(hidden_states.unsqueeze(0), cache=self.cache)
        frames = logits[0].argmax(-1)  # [T * upsample_factor]
        units = self.speech_decoder.collapse(frames, self.last_frame.to(frames.device))
        self.last_frame = frames[-1:]
        return units


class SpeechStream:
    """
    Speaks hidden states that arrive in pieces, as a waveform. The returned chunks, joined, are the waveform of all
    hidden states at once.

    Args:
        model: a [`TTTOmniForCausalLM`] that speaks.
        first_chunk_size: units to wait for until there is a first sound; fewer make it come sooner.
        chunk_size: units to wait for afterwards; more cost less, as chunks overlap in the vocoder's receptive field.

    Raises:
        ValueError: if the model does not speak, or a chunk has no units.
    """

    def __init__(self, model: PreTrainedModel, first_chunk_size: int, chunk_size: int):
        check_speaks(model)
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
        units = self.unit_stream.push(hidden_states)
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


def check_speaks(model: PreTrainedModel) -> None:
    """Raises `ValueError` unless `model` has what it takes to speak."""
    for field, name in (("speech_decoder_config", "speech decoder"), ("vocoder_config", "vocoder")):
        if getattr(model.config, field) is None:
            raise ValueError(f"This model has no {name} (`{field}` is None): it cannot speak.")


__all__ = ["TTTOmniStreamEvent", "skip_pieces", "turn_pieces"]
