# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
Streams in and out: prompts of any length piece by piece, and speech while it is generated, token by token.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.generation.streamers import BaseStreamer


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
    """

    def __init__(self, model: PreTrainedModel, first_chunk_size: int, chunk_size: int):
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


class TTTOmniStreamer(BaseStreamer):
    """
    A streamer for `generate(streamer=...)` of one answer, which speaks while it is generated.

    Args:
        model: the [`TTTOmniForCausalLM`] that generates.
        on_event: called with each [`TTTOmniStreamEvent`].
        tokenizer: the model's; without it there is no text.
        first_chunk_size, chunk_size: as in [`SpeechStream`].

    Raises:
        ValueError: if the model does not speak, or a chunk has no units.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        on_event: Callable[[TTTOmniStreamEvent], None],
        tokenizer: PreTrainedTokenizerBase | None = None,
        first_chunk_size: int = 10,
        chunk_size: int = 40,
    ):
        check_speaks(model)
        if min(first_chunk_size, chunk_size) < 1:
            raise ValueError(
                "`first_chunk_size` and `chunk_size` must be at least 1 unit, got "
                f"{first_chunk_size} and {chunk_size}."
            )
        self.model = model
        self.on_event = on_event
        self.tokenizer = tokenizer
        self.chunk_sizes = first_chunk_size, chunk_size
        self._start()

    def _start(self):
        self.eos_token_ids: set[int] = set()  # set by `generate`
        self.states = deque()  # [hidden_size], of tokens to come
        self.prompt_is_next = True
        self.is_first_token = True
        self.text_stream = None if self.tokenizer is None else TextStream(self.tokenizer)
        self.speech_stream = SpeechStream(self.model, *self.chunk_sizes)

    def put_state(self, state: torch.Tensor) -> None:
        """Receives the hidden state `[1, hidden_size]` that predicts the next token."""
        self.states.append(state)

    def put(self, value: torch.LongTensor) -> None:
        """Receives the prompt, then each token."""
        if value.shape[0] > 1:
            raise ValueError(
                f"A stream speaks one answer, got {value.shape[0]} rows: pass one prompt, and neither `num_beams` nor "
                "`num_return_sequences`."
            )
        if self.prompt_is_next:
            self.prompt_is_next = False
            return
        token, state = int(value), self.states.popleft()
        text = self.text_stream.push(token) if self.text_stream else ""
        # As in `generate`: an answer that ends before it began says nothing.
        is_silent = self.is_first_token and token in self.eos_token_ids
        self.is_first_token = False
        self._emit(text, self.speech_stream.push(state[:0] if is_silent else state), token)

    def end(self) -> None:
        """Receives the end of the answer. The streamer may then be used for another one."""
        text = self.text_stream.flush() if self.text_stream else ""
        self._emit(text, self.speech_stream.flush())
        self._start()

    def _emit(self, text, waveform, token=None):
        if text or len(waveform) or token is not None:
            self.on_event(TTTOmniStreamEvent(text or None, waveform if len(waveform) else None, token))


def check_speaks(model: PreTrainedModel) -> None:
    """Raises `ValueError` unless `model` has what it takes to speak."""
    for field, name in (("speech_decoder_config", "speech decoder"), ("vocoder_config", "vocoder")):
        if getattr(model.config, field) is None:
            raise ValueError(f"This model has no {name} (`{field}` is None): it cannot speak.")


def decode_steps(
    model: PreTrainedModel,
    input_ids: torch.LongTensor,
    logits_processor: Callable,
    stopping_criteria: Callable,
    generation_config: GenerationConfig,
    **model_kwargs,
) -> Iterator[torch.LongTensor]:
    """
    Transformers' `GenerationMixin._sample` for one row, as a generator that can be left at any token: what
    `generate(custom_generate=decode_steps)` returns. Yields each token `[1]`.
    """
    outputs = model._prefill(input_ids, generation_config, model_kwargs)
    while True:
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32, device=input_ids.device)
        del outputs
        scores = logits_processor(input_ids, logits)
        if generation_config.do_sample:
            token = torch.multinomial(scores.softmax(-1), num_samples=1)[:, 0]
        else:
            token = scores.argmax(-1)
        input_ids = torch.cat([input_ids, token[:, None]], dim=1)
        yield token
        if stopping_criteria(input_ids, None).all():
            return
        inputs = model.prepare_inputs_for_generation(
            input_ids, next_sequence_length=1 if model_kwargs["use_cache"] else None, **model_kwargs
        )
        outputs = model(**inputs, return_dict=True)


__all__ = ["TTTOmniStreamEvent", "TTTOmniStreamer", "skip_pieces", "turn_pieces"]
