# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""TTT-Omni processor: conversations of speech and text to model inputs."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import soundfile
import torch
from transformers import BatchFeature, PreTrainedTokenizerBase, WhisperFeatureExtractor
from transformers.processing_utils import AudioKwargs, ProcessingKwargs, ProcessorMixin
from transformers.tokenization_utils_base import TextInput
from transformers.utils import logging

from .audio_ttt_omni import (
    AudioInput,
    array_samples,
    audio_windows,
    check_samples,
    flatten_audio,
    is_one_audio,
    printable,
    read_audio,
)
from .configuration_ttt_omni import audio_embedding_lengths
from .files_ttt_omni import new_file


logger = logging.get_logger(__name__)

# Llama 3 reserves this token for padding, whichever the side.
PAD_TOKEN = "<|finetune_right_pad_id|>"
# What a question in speech says besides, as LLaMA-Omni was trained.
SPEECH_INSTRUCTION = "Please directly answer the questions in the user's speech."
SILENCE = 0.0  # in Whisper's scale of mel bins, what a sine of -65 dBFS reaches

# Put before a template, so that a message's content may be a list of parts, with audio where a text may stand.
PARTS_TO_TEXT = """\
{%- set of_parts = namespace(messages=[], text='') %}
{%- for message in messages %}
    {%- set of_parts.text = message['content'] %}
    {%- if message['content'] is not string and message['content'] is iterable %}
        {%- set of_parts.text = '' %}
        {%- for item in message['content'] %}
            {%- if item['type'] == 'audio' %}
                {%- set of_parts.text = of_parts.text + 'AUDIO_TOKEN' + ('' if loop.last else '\\n') %}
            {%- elif item['type'] == 'text' %}
                {%- set of_parts.text = of_parts.text + item['text'] %}
            {%- else %}
                {{- raise_exception("Content must be of type 'text' or 'audio', got '" + item['type'] + "'.") }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {%- set of_parts.messages = of_parts.messages + [dict(message, content=of_parts.text)] %}
{%- endfor %}
{%- set messages = of_parts.messages %}
"""
# The original's prompt. Its tokenizer adds a second bos to the one in the text.
CHAT_TEMPLATE = (
    PARTS_TO_TEXT
    + """\
{{- bos_token + bos_token }}
{%- if not messages or messages[0]['role'] != 'system' %}
    {{- '<|start_header_id|>system<|end_header_id|>\\n\\nYou are a helpful language and speech assistant. You are \
able to understand the speech content that the user provides, and assist the user with a variety of tasks using \
natural language.<|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {%- if message['content'] %}
            {{- '<|start_header_id|>system<|end_header_id|>\\n\\n' + message['content'] + '<|eot_id|>' }}
        {%- endif %}
    {%- elif message['role'] == 'user' %}
        {{- '<|start_header_id|>user<|end_header_id|>\\n\\n' + message['content'].strip() + '<|eot_id|>' }}
    {%- elif message['role'] == 'assistant' %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {%- generation %}
            {{- message['content'].strip() + '<|eot_id|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- raise_exception("Role must be 'system', 'user' or 'assistant', got '" + message['role'] + "'.") }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
)


def _messages(message: dict[str, Any] | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [message] if isinstance(message, dict) else message


def _sampling_rate(kwargs: dict) -> int | None:
    rate = kwargs.get("sampling_rate")
    return kwargs.get("audio_kwargs", {}).get("sampling_rate") if rate is None else rate


def _audio_of(item: dict[str, Any]) -> AudioInput:
    """The audio of an item of a message."""
    for key in ("audio", "path", "url"):
        if item.get(key) is not None:
            return item[key]
    raise ValueError("An audio item of the conversation has no 'audio', 'path' or 'url'.")


class TTTOmniAudioKwargs(AudioKwargs, total=False):
    """
    drop_audio_padding (`bool`, *optional*):
        Whether the padding of a window that speech fills only in part gets no embeddings; by default as the processor
        was made. Adds `input_features_mask` `[windows, 3000]` to the outputs.
    """

    drop_audio_padding: bool | None


class TTTOmniProcessorKwargs(ProcessingKwargs, total=False):
    audio_kwargs: TTTOmniAudioKwargs


class TTTOmniProcessor(ProcessorMixin):
    r"""
    A Whisper feature extractor and a Llama-3 tokenizer in one.

    Audio is cut into windows of 30 s, each a log-mel spectrogram of its own. The audio token that stands for an audio
    in the text is repeated once per embedding that the model makes of its windows.

    Args:
        feature_extractor (`WhisperFeatureExtractor`):
            Its `feature_size` is the encoder's `num_mel_bins`.
        tokenizer (`PreTrainedTokenizerFast`):
            Set to pad on the left, with `<|finetune_right_pad_id|>` (or eos) where it has no padding token.
        audio_token (`str`, *optional*, defaults to `"<|reserved_special_token_0|>"`):
            Placeholder of audio, a special token of the tokenizer that text has no use for; `None` takes text only.
        audio_downsample (`int`, defaults to 5):
            Encoder frames per embedding, as in [`TTTOmniConfig`].
        chat_template (`str`, *optional*):
            By default LLaMA-Omni's prompt, for the tokenizer of Llama 3.
        speech_instruction (`str`, *optional*):
            The text that the model was trained to see beside a question in speech; by default LLaMA-Omni's.
        embed_audio_padding (`bool`, defaults to `True`):
            Whether the model was trained with embeddings for the padding of a window that speech fills only in part,
            as LLaMA-Omni was; where not, `drop_audio_padding` is the default of `__call__`.
        output_sampling_rate (`int`, defaults to 16000):
            That of the model's speech, its vocoder's.
    """

    valid_processor_kwargs = TTTOmniProcessorKwargs
    text_kwargs = {"padding": True}
    _auto_class = "AutoProcessor"

    def __init__(
        self,
        feature_extractor: WhisperFeatureExtractor,
        tokenizer: PreTrainedTokenizerBase,
        audio_token: str | None = "<|reserved_special_token_0|>",
        audio_downsample: int = 5,
        chat_template: str | None = None,
        speech_instruction: str = SPEECH_INSTRUCTION,
        embed_audio_padding: bool = True,
        output_sampling_rate: int = 16000,
    ):
        if audio_downsample < 1:
            raise ValueError(f"`audio_downsample` must be at least 1, got {audio_downsample}.")
        self.audio_token = audio_token
        self.audio_token_id = None if audio_token is None else tokenizer.convert_tokens_to_ids(audio_token)
        if audio_token is not None and self.audio_token_id in (None, tokenizer.unk_token_id):
            raise ValueError(f"`audio_token` {audio_token!r} is not in the tokenizer's vocabulary.")
        self.audio_downsample = audio_downsample
        self.speech_instruction = speech_instruction
        self.embed_audio_padding = embed_audio_padding
        self.output_sampling_rate = output_sampling_rate
        self.auto_map = {"AutoProcessor": "processing_ttt_omni.TTTOmniProcessor"}  # loading drops the saved one
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = PAD_TOKEN if PAD_TOKEN in tokenizer.get_vocab() else tokenizer.eos_token
        if chat_template is None:
            chat_template = CHAT_TEMPLATE.replace("AUDIO_TOKEN", audio_token or "")
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)

    def __call__(
        self,
        text: TextInput | list[TextInput] | None = None,
        audio: AudioInput | list[AudioInput] | None = None,
        **kwargs: Unpack[TTTOmniProcessorKwargs],
    ) -> BatchFeature:
        """
        Args:
            text (`str` or `list[str]`, *optional*):
                One per conversation, with an audio token in the place of each audio.
            audio (*optional*):
                One audio, a list in the order of the audio tokens, or a list per text; each as [`read_audio`] takes
                them. `sampling_rate` is that of arrays which come without their own.

        Returns:
            `input_ids` and `attention_mask` `[B, T]`, left-padded, `input_features` `[windows, n_mels, 3000]` of all
            audios in order, and with `drop_audio_padding` their `input_features_mask` `[windows, 3000]`.

        Raises:
            FileNotFoundError, TypeError, ValueError: for audio that cannot be read, for audio tokens and audios of
                different numbers, and for truncation that would cut audio.
        """
        texts = [text] if isinstance(text, str) else text
        bos_token = self.tokenizer.bos_token
        if texts and bos_token and all(isinstance(sample, str) and sample.startswith(bos_token) for sample in texts):
            # A rendered chat template has its special tokens already, as `apply_chat_template` assumes too.
            if "add_special_tokens" not in kwargs.get("text_kwargs", {}):
                kwargs.setdefault("add_special_tokens", False)
        return super().__call__(text=text, audio=audio, **kwargs)

    def apply_chat_template(
        self, conversation, *args, tokenize: bool = False, processor_kwargs: dict | None = None, **kwargs
    ):
        """
        [`ProcessorMixin.apply_chat_template`], for audio of all types that `__call__` takes.

        Args:
            conversation:
                A list of messages, or a list of such lists. A message's `content` is a string or a list of items, each
                `{"type": "text", "text": ...}` or `{"type": "audio", "audio": ...}` (or "path", or "url"); an array
                may have its "sampling_rate" beside it.
            tokenize:
                Whether to make model inputs of the prompt (with `return_dict=True`; else only `input_ids`).
            processor_kwargs:
                Arguments of `__call__`, such as `{"drop_audio_padding": True}`.
            kwargs:
                As in Transformers, but that `sanitize_control_tokens` is `True` by default: special tokens and
                placeholders in a message's text are tokenised as text, so that nobody puts words into the system's
                mouth or moves the audio. With `tokenize=False` it is for whoever tokenises the prompt to see to that,
                and with `return_assistant_tokens_mask` Transformers cannot.
        """
        if tokenize:
            processor_kwargs = dict(processor_kwargs or {})
            if "sampling_rate" in kwargs:
                processor_kwargs["sampling_rate"] = kwargs.pop("sampling_rate")
            conversation = self._with_arrays(conversation, _sampling_rate(processor_kwargs))
            processor_kwargs["sampling_rate"] = self.feature_extractor.sampling_rate
            processor_kwargs["audio_kwargs"] = dict(processor_kwargs.get("audio_kwargs", {}))
            processor_kwargs["audio_kwargs"].pop("sampling_rate", None)
            kwargs.setdefault("sanitize_control_tokens", not kwargs.get("return_assistant_tokens_mask"))
        return super().apply_chat_template(
            conversation, *args, tokenize=tokenize, processor_kwargs=processor_kwargs, **kwargs
        )

    def turn_pieces(
        self,
        message: dict[str, Any] | list[dict[str, Any]],
        history: torch.LongTensor | None = None,
        skip_silence: bool = False,
        drop_audio_padding: bool | None = None,
        device: str = "cpu",
    ) -> Iterator[dict[str, torch.Tensor]]:
        """
        The prompt for an answer to `message`, piece by piece for `model.listen`: text, and windows of 30 s that are
        made while the audio is read. Joined, the pieces are what `apply_chat_template` makes of `[message]`, or of the
        conversation so far and `message`, less `history`.

        Args:
            message: the user's, as in `apply_chat_template`; where the conversation begins, it may be a list of all
                messages.
            history: `[1, T]`, the tokens of the conversation so far, which ends with an answer, with or without the
                token that ends it; `None` where the conversation begins.
            skip_silence: whether to leave out windows in which nothing is louder than about -65 dBFS.
            drop_audio_padding: as in `__call__`.
            device: where to compute spectrograms.

        Yields:
            `input_ids` `[1, n]`, and for a window `input_features` `[1, n_mels, 3000]`, and with `drop_audio_padding`
            `input_features_mask` `[1, 3000]`. The last piece is text.

        Raises:
            FileNotFoundError, TypeError, ValueError: as `apply_chat_template`, once the audio's turn comes.
        """
        contents = [message["content"] for message in _messages(message)]
        items = [item for content in contents if not isinstance(content, str) for item in content]
        audios = [item for item in items if item["type"] == "audio"]
        token_ids = self.turn_ids(message, history)
        texts = [[]]  # token ids before, between and after the audios
        for token_id in token_ids:
            if token_id == self.audio_token_id:
                texts.append([])
            else:
                texts[-1].append(token_id)
        if len(texts) != len(audios) + 1:
            raise ValueError(f"The chat template makes {len(texts) - 1} placeholders of {len(audios)} audios.")
        for text, item in zip(texts, [*audios, None]):
            yield {"input_ids": torch.tensor([text], dtype=torch.long)}
            if item is not None:
                audio, rate = _audio_of(item), item.get("sampling_rate")
                for window in self.iter_audio_windows(audio, rate, drop_audio_padding, device):
                    if not skip_silence or window["input_features"].max() > SILENCE:
                        yield window

    def turn_ids(
        self, message: dict[str, Any] | list[dict[str, Any]], history: torch.LongTensor | None = None
    ) -> list[int]:
        """The tokens of [`turn_pieces`], with one placeholder per audio, which is not read."""
        if history is not None and not isinstance(message, dict):
            raise ValueError("A conversation goes on with one message, not with a list.")
        token_ids = self._prompt_ids(_messages(message)) if history is None else self._continuation_ids(message)
        if history is not None and history[0, -1] == token_ids[0]:
            token_ids = token_ids[1:]
        return token_ids

    def answer_ids(self, answer: str) -> list[int]:
        """
        The tokens of an answer as the chat template has it, from the end of the prompt for it up to and including the
        one that ends it: what a model is trained to say. White space around `answer` is no part of it.

        Raises:
            ValueError: if the template's prompt for an answer does not go on with one.
        """
        question = {"role": "user", "content": "?"}
        prompt, end = self._prompt_ids([question]), self._continuation_ids(question)
        token_ids = self._prompt_ids([question, {"role": "assistant", "content": answer.strip()}, question])
        if token_ids[: len(prompt)] != prompt or token_ids[-len(end) :] != end:
            raise ValueError(
                "The chat template does not write an answer behind its own prompt for one, so that it cannot be told "
                "what a model is to say."
            )
        return token_ids[len(prompt) : len(token_ids) - len(end) + 1]

    @property
    def answer_end_id(self) -> int:
        """The token with which the chat template ends an answer."""
        return self._continuation_ids({"role": "user", "content": "?"})[0]

    def _prompt_ids(self, messages: list[dict[str, Any]]) -> list[int]:
        """The prompt for an answer to a conversation, with one placeholder per audio."""
        return self.tokenizer.apply_chat_template(
            messages,
            chat_template=self.chat_template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            sanitize_control_tokens=True,
        )

    def _continuation_ids(self, message: dict[str, Any]) -> list[int]:
        """What stands behind an answer in the prompt for the next: the common end of two conversations."""
        question = {"role": "user", "content": "?"}
        one, other = (
            self._prompt_ids([question, {"role": "assistant", "content": answer}, message])[::-1]
            for answer in ("Yes", "No")
        )
        same = next(i for i, pair in enumerate(zip(one, other)) if pair[0] != pair[1])
        return one[:same][::-1]

    def iter_audio_windows(
        self,
        audio: AudioInput,
        sampling_rate: int | None = None,
        drop_audio_padding: bool | None = None,
        device: str = "cpu",
    ) -> Iterator[BatchFeature]:
        """
        The windows of one audio of any length, made one at a time while its file is read.

        Args:
            audio, sampling_rate: as in [`read_audio`].
            drop_audio_padding: as in `__call__`.
            device: where to compute the spectrogram.

        Yields:
            Model inputs: as many audio tokens as the window has embeddings in `input_ids` `[1, embeddings]`,
            `input_features` `[1, n_mels, 3000]`, and with `drop_audio_padding` `input_features_mask` `[1, 3000]`.
        """
        if drop_audio_padding is None:
            drop_audio_padding = not self.embed_audio_padding
        sampling_rate_of_model = self.feature_extractor.sampling_rate
        blocks = read_audio(audio, sampling_rate_of_model, sampling_rate)
        for window in audio_windows(blocks, self.feature_extractor.n_samples):
            features = self.feature_extractor(
                window,
                sampling_rate=sampling_rate_of_model,
                return_attention_mask=True,
                return_tensors="pt",
                device=device,
            )
            mask = features.pop("attention_mask")  # [1, 3000]
            kept = mask if drop_audio_padding else torch.ones_like(mask)
            embeddings = int(audio_embedding_lengths(kept, self.audio_downsample))
            features["input_ids"] = torch.full((1, embeddings), self.audio_token_id)
            if drop_audio_padding:
                features["input_features_mask"] = mask
            yield features

    def _with_arrays(self, node: Any, sampling_rate: int | None) -> Any:
        """A copy of a conversation, a batch of them, or a message, with the audio of its items read."""
        if isinstance(node, list | tuple):
            return [self._with_arrays(child, sampling_rate) for child in node]
        if isinstance(node, dict) and node.get("type") == "audio":
            if node.get("sampling_rate") is not None:
                sampling_rate = node["sampling_rate"]
            return {"type": "audio", "audio": self._load_audio(_audio_of(node), sampling_rate)}
        if isinstance(node, dict) and isinstance(node.get("content"), list | tuple):
            return {**node, "content": self._with_arrays(node["content"], sampling_rate)}
        return node

    def _load_audio(self, audio: AudioInput, sampling_rate: int | None) -> np.ndarray:
        """Float32 `[samples]` at the model's sampling rate."""
        return np.concatenate(list(read_audio(audio, self.feature_extractor.sampling_rate, sampling_rate)))

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        images, text, videos, _ = super().prepare_inputs_layout(images=images, text=text, videos=videos, **kwargs)
        if audio is not None:
            is_per_text = text and isinstance(audio, list | tuple) and audio and not any(map(is_one_audio, audio))
            if is_per_text and [sample.count(self.audio_token) for sample in text] != [len(item) for item in audio]:
                raise ValueError(
                    f"The number of {self.audio_token} tokens in the prompts should be the same as the number of "
                    "audio inputs of each."
                )
            audio = [self._load_audio(item, _sampling_rate(kwargs)) for item in flatten_audio(audio)] or None
        return images, text, videos, audio

    def _process_audio(self, audio: list[np.ndarray], **kwargs) -> tuple[dict, list[str]]:
        windows = [
            list(
                self.iter_audio_windows(
                    waveform,
                    self.feature_extractor.sampling_rate,
                    drop_audio_padding=kwargs.get("drop_audio_padding"),
                    device=kwargs.get("device") or "cpu",
                )
            )
            for waveform in audio
        ]
        lengths = [sum(window.pop("input_ids").shape[1] for window in audio_windows) for audio_windows in windows]
        windows = [window for audio_windows in windows for window in audio_windows]
        inputs = {name: torch.cat([window[name] for window in windows]) for name in windows[0]}
        inputs["num_audio_tokens"] = lengths
        return inputs, [self.replace_audio_token(inputs, index) for index in range(len(audio))]

    def post_process_multimodal_output(
        self, generated_outputs, skip_special_tokens: bool = True, generation_mode: str | None = None, **kwargs
    ) -> list[str] | list[np.ndarray]:
        """
        What `pipeline("any-to-any")` returns of what the model generated.

        Args:
            generated_outputs: ids `[B, T]`, or what `generate(return_audio=True)` returns.
            skip_special_tokens: whether they are left out of texts.
            generation_mode: "audio" for waveforms; otherwise, texts.

        Returns:
            B texts, or B float32 waveforms `[samples]`.

        Raises:
            ValueError: for other modes, and for the waveforms of a model without a vocoder.
        """
        if generation_mode != "audio":
            sequences = getattr(generated_outputs, "sequences", generated_outputs)
            return super().post_process_multimodal_output(sequences, skip_special_tokens, generation_mode, **kwargs)
        waveforms = getattr(generated_outputs, "waveform", None)
        if waveforms is None:
            raise ValueError(
                "There is no waveform in what was generated: it takes `return_audio=True`, and a model with a vocoder."
            )
        return [waveform.float().numpy(force=True) for waveform in waveforms]

    def save_audio(
        self,
        audio: np.ndarray | torch.Tensor | list,
        saving_path: str | os.PathLike | list[str | os.PathLike],
        sampling_rate: int | None = None,
    ) -> None:
        """
        Save waveforms, such as those that the model generated: all of them, or none.

        Args:
            audio: `[samples]`, or a list of such.
            saving_path: of the file, or a list of as many; its ending says what is written, such as `.wav` (of 16-bit
                integers, in which what is beyond full scale is clipped), `.flac` or `.mp3`.
            sampling_rate: in Hz; by default the vocoder's.

        Raises:
            ValueError, OSError: for samples that are not finite, for numbers of waveforms and paths that differ, and
                for paths that cannot be written.
        """
        sampling_rate = self.output_sampling_rate if sampling_rate is None else sampling_rate
        paths = [saving_path] if isinstance(saving_path, str | os.PathLike) else saving_path
        waveforms = [audio] if is_one_audio(audio) else audio
        if len(paths) != len(waveforms):
            raise ValueError(f"There are {len(waveforms)} waveforms for {len(paths)} paths.")
        with ExitStack() as stack:
            for path, waveform in zip(map(Path, paths), waveforms):
                samples = array_samples(waveform)
                check_samples(samples, 0, sampling_rate, f"The waveform for {printable(path)}")
                if path.suffix[1:].upper() not in soundfile.available_formats():
                    raise ValueError(f"{printable(path)} does not end like an audio file, such as .wav.")
                with open(stack.enter_context(new_file(path)), "wb") as file:  # of any name, unlike soundfile's
                    soundfile.write(file, samples, sampling_rate, format=path.suffix[1:].upper())

    def replace_audio_token(self, audio_inputs: dict, audio_idx: int, **kwargs) -> str:
        return self.audio_token * audio_inputs["num_audio_tokens"][audio_idx]

    @property
    def unused_input_names(self) -> list[str]:
        return ["num_audio_tokens"]


__all__ = ["TTTOmniProcessor"]
