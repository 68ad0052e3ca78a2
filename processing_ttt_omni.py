# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""TTT-Omni processor: conversations of speech and text to model inputs."""

import io
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any, Unpack

import numpy as np
import soundfile
import soxr
import torch
from transformers import BatchFeature, PreTrainedTokenizerBase, WhisperFeatureExtractor
from transformers.audio_utils import load_audio
from transformers.processing_utils import AudioKwargs, ProcessingKwargs, ProcessorMixin
from transformers.tokenization_utils_base import TextInput
from transformers.utils import logging

from .configuration_ttt_omni import audio_embedding_lengths


logger = logging.get_logger(__name__)

# A path, URL or encoded file; or samples, alone or with their rate as `(array, rate)` or as `datasets` gives them.
AudioInput = str | os.PathLike | bytes | np.ndarray | torch.Tensor | list[float] | tuple | dict[str, Any]

# Llama 3 reserves this token for padding, whichever the side.
PAD_TOKEN = "<|finetune_right_pad_id|>"
MAX_CHANNELS = 32
BLOCK_SECONDS = 30

# The original's prompt. Its tokenizer adds a second bos to the one in the text.
CHAT_TEMPLATE = """\
{{- bos_token + bos_token }}
{%- if not messages or messages[0]['role'] != 'system' %}
    {{- '<|start_header_id|>system<|end_header_id|>\\n\\nYou are a helpful language and speech assistant. You are \
able to understand the speech content that the user provides, and assist the user with a variety of tasks using \
natural language.<|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
    {%- set content = namespace(text='') %}
    {%- if message['content'] is string %}
        {%- set content.text = message['content'] %}
    {%- else %}
        {%- for item in message['content'] %}
            {%- if item['type'] == 'audio' %}
                {%- set content.text = content.text + 'AUDIO_TOKEN' + '\\n' %}
            {%- elif item['type'] == 'text' %}
                {%- set content.text = content.text + item['text'] %}
            {%- else %}
                {{- raise_exception("Content must be of type 'text' or 'audio', got '" + item['type'] + "'.") }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {%- if message['role'] == 'system' %}
        {%- if content.text %}
            {{- '<|start_header_id|>system<|end_header_id|>\\n\\n' + content.text + '<|eot_id|>' }}
        {%- endif %}
    {%- elif message['role'] == 'user' %}
        {{- '<|start_header_id|>user<|end_header_id|>\\n\\n' + content.text | trim + '<|eot_id|>' }}
    {%- elif message['role'] == 'assistant' %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {%- generation %}
            {{- content.text | trim + '<|eot_id|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- raise_exception("Role must be 'system', 'user' or 'assistant', got '" + message['role'] + "'.") }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""


def _file_blocks(source: str | io.BytesIO, name: str) -> Iterator[tuple[np.ndarray, int]]:
    """Blocks of an audio file as float32 mono `[samples]`, each with the file's sampling rate."""
    try:
        with soundfile.SoundFile(source) as file:
            # libsndfile corrects the size of a WAV's data chunk and only says so in its log.
            if re.search(r"^data : \d+ \(should be", file.extra_info, re.MULTILINE):
                logger.warning(f"{name}: its header announces another length than the {file.frames} samples it has.")
            block_size = BLOCK_SECONDS * file.samplerate
            while len(block := file.read(block_size, dtype="float32", always_2d=True)):  # [samples, channels]
                yield block.mean(axis=1), file.samplerate
    except (soundfile.SoundFileError, TypeError) as error:  # TypeError: taken for headerless, by its name
        reason = getattr(error, "error_string", str(error))
        raise ValueError(f"{name} cannot be read as audio (WAV, FLAC, OGG or MP3): {reason}") from error


def _array_to_mono(audio: np.ndarray | torch.Tensor | list[float]) -> np.ndarray:
    """Float32 mono `[samples]` from samples of one or, in either order, more channels; integers are taken as PCM."""
    if isinstance(audio, torch.Tensor):
        audio = (audio.float() if audio.is_floating_point() else audio).numpy(force=True)
    audio = np.asarray(audio)
    if audio.dtype.kind in "iu" and audio.itemsize <= 4:
        full_scale = 2.0 ** (8 * audio.itemsize - 1)
        audio = audio / full_scale - (1.0 if audio.dtype.kind == "u" else 0.0)
    if audio.dtype.kind != "f":
        raise TypeError(f"Audio samples must be floats, or integers of at most 32 bits, got {audio.dtype}.")
    if audio.ndim == 2:
        channels = min(audio.shape)
        if audio.shape[0] == audio.shape[1] or channels > MAX_CHANNELS:
            raise ValueError(
                f"Audio of shape {audio.shape} is neither [channels, samples] nor [samples, channels] with at most "
                f"{MAX_CHANNELS} channels."
            )
        audio = audio.mean(axis=audio.shape.index(channels))
    if audio.ndim != 1:
        raise ValueError(f"Audio must have the shape [samples] or [channels, samples], got {audio.shape}.")
    return audio.astype(np.float32)


def _is_one_audio(audio: Any) -> bool:
    """Whether `audio` is not a list of audios: `(array, sampling_rate)` and a list of samples are one."""
    if isinstance(audio, tuple):
        return len(audio) == 2 and isinstance(audio[1], int | np.integer)
    return not isinstance(audio, list) or (len(audio) > 0 and isinstance(audio[0], float))


def _flatten(audio: Any) -> list[AudioInput]:
    """The audios of one input, a list, or a list per text."""
    return [audio] if _is_one_audio(audio) else [leaf for item in audio for leaf in _flatten(item)]


def _source_blocks(
    audio: AudioInput, target_rate: int, sampling_rate: int | None
) -> tuple[str, Iterable[tuple[np.ndarray, int]]]:
    """A name for error messages, and the blocks `[samples]` of `audio` with their sampling rate."""
    if isinstance(audio, dict):
        sampling_rate = audio.get("sampling_rate") or sampling_rate
        audio = next((audio[key] for key in ("array", "bytes", "path") if audio.get(key) is not None), None)
    elif isinstance(audio, tuple) and _is_one_audio(audio):
        audio, sampling_rate = audio

    if isinstance(audio, str) and audio.startswith(("http://", "https://", "data:")):
        return audio[:80], [(load_audio(audio, sampling_rate=target_rate), target_rate)]
    if isinstance(audio, str | os.PathLike):
        path = os.fspath(audio)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"Audio file {path} does not exist.")
        return path, _file_blocks(path, path)
    if isinstance(audio, bytes | bytearray | memoryview):
        return "Audio given as bytes", _file_blocks(io.BytesIO(audio), "Audio given as bytes")
    if not isinstance(audio, np.ndarray | torch.Tensor | list):
        raise TypeError(
            "Audio must be a path, the bytes of a file, an array or tensor, (array, sampling_rate) or "
            f"{{'array', 'sampling_rate'}}, got {type(audio).__name__}."
        )
    if sampling_rate is None:
        logger.warning_once(
            f"An audio array came without `sampling_rate`: {target_rate} Hz is assumed. Pass `sampling_rate=` or "
            "(array, sampling_rate)."
        )
        sampling_rate = target_rate
    if sampling_rate <= 0:
        raise ValueError(f"`sampling_rate` must be positive, got {sampling_rate}.")
    return "Audio array", [(_array_to_mono(audio), int(sampling_rate))]


def read_audio(audio: AudioInput, target_rate: int, sampling_rate: int | None = None) -> Iterator[np.ndarray]:
    """
    Read audio block by block, mixed to mono and resampled (soxr, HQ). Of a file, one block is in memory at a time.

    Args:
        audio: path, URL, bytes of a file, or samples `[samples]`, `[channels, samples]` or `[samples, channels]`,
            alone, as `(array, sampling_rate)` or as `{"array", "sampling_rate"}`.
        target_rate: sampling rate of the result in Hz.
        sampling_rate: that of an array that comes without its own; files know theirs.

    Yields:
        float32 `[samples]`.

    Raises:
        FileNotFoundError, TypeError, ValueError: naming the file, for what cannot be read, is empty, or has samples
            that are not finite.
    """
    name, blocks = _source_blocks(audio, target_rate, sampling_rate)
    resampler, samples = None, 0
    for block, rate in blocks:
        if not np.isfinite(block).all():
            raise ValueError(f"{name} has NaN or infinite samples.")
        if rate != target_rate:
            resampler = resampler or soxr.ResampleStream(rate, target_rate, num_channels=1, dtype="float32")
            block = resampler.resample_chunk(block)
        samples += len(block)
        yield block
    if resampler is not None:
        block = resampler.resample_chunk(np.zeros(0, np.float32), last=True)
        samples += len(block)
        yield block
    if samples == 0:
        raise ValueError(f"{name} is empty: it holds no audio.")


def _windows(blocks: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Windows of `size` samples from blocks of any size; the last one may be shorter."""
    pending = np.zeros(0, np.float32)
    for block in blocks:
        pending = np.concatenate([pending, block])
        while len(pending) >= size:
            yield pending[:size]
            pending = pending[size:]
    if len(pending):
        yield pending


def _sampling_rate(kwargs: dict) -> int | None:
    return kwargs.get("sampling_rate") or kwargs.get("audio_kwargs", {}).get("sampling_rate")


class TTTOmniAudioKwargs(AudioKwargs, total=False):
    """
    drop_audio_padding (`bool`, *optional*, defaults to `False`):
        Whether the padding of a window that speech fills only in part gets no embeddings; as the original, the default
        gives every window those of a full one. Adds `input_features_mask` `[windows, 3000]` to the outputs.
    """

    drop_audio_padding: bool | None


class TTTOmniProcessorKwargs(ProcessingKwargs, total=False):
    audio_kwargs: TTTOmniAudioKwargs
    _defaults = {"text_kwargs": {"padding": True}}  # to be read from the processor's `text_kwargs` from 5.29 on


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
        audio_token (`str`, defaults to `"<|reserved_special_token_0|>"`):
            Placeholder of audio, a reserved special token of the tokenizer.
        audio_downsample (`int`, defaults to 5):
            Encoder frames per embedding, as in [`TTTOmniConfig`].
        chat_template (`str`, *optional*):
            By default LLaMA-Omni's prompt.
    """

    valid_processor_kwargs = TTTOmniProcessorKwargs
    text_kwargs = TTTOmniProcessorKwargs._defaults["text_kwargs"]
    _auto_class = "AutoProcessor"

    def __init__(
        self,
        feature_extractor: WhisperFeatureExtractor,
        tokenizer: PreTrainedTokenizerBase,
        audio_token: str = "<|reserved_special_token_0|>",
        audio_downsample: int = 5,
        chat_template: str | None = None,
    ):
        if audio_downsample < 1:
            raise ValueError(f"`audio_downsample` must be at least 1, got {audio_downsample}.")
        self.audio_token = audio_token
        self.audio_token_id = tokenizer.convert_tokens_to_ids(audio_token)
        if self.audio_token_id in (None, tokenizer.unk_token_id):
            raise ValueError(f"`audio_token` {audio_token!r} is not in the tokenizer's vocabulary.")
        self.audio_downsample = audio_downsample
        self.auto_map = {"AutoProcessor": "processing_ttt_omni.TTTOmniProcessor"}  # loading drops the saved one
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = PAD_TOKEN if PAD_TOKEN in tokenizer.get_vocab() else tokenizer.eos_token
        if chat_template is None:
            chat_template = CHAT_TEMPLATE.replace("AUDIO_TOKEN", audio_token)
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
            audios in order, and with `drop_audio_padding=True` their `input_features_mask` `[windows, 3000]`.

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
        """
        if tokenize:
            if kwargs.get("return_assistant_tokens_mask") and not hasattr(super(), "_adjust_assistant_masks_indices"):
                raise NotImplementedError(
                    "`return_assistant_tokens_mask` needs a newer Transformers (such as 5.23): this one counts an "
                    "audio as one token."
                )
            processor_kwargs = dict(processor_kwargs or {})
            if "sampling_rate" in kwargs:
                processor_kwargs["sampling_rate"] = kwargs.pop("sampling_rate")
            conversation = self._with_arrays(conversation, _sampling_rate(processor_kwargs))
            processor_kwargs["sampling_rate"] = self.feature_extractor.sampling_rate
            processor_kwargs["audio_kwargs"] = dict(processor_kwargs.get("audio_kwargs", {}))
            processor_kwargs["audio_kwargs"].pop("sampling_rate", None)
        return super().apply_chat_template(
            conversation, *args, tokenize=tokenize, processor_kwargs=processor_kwargs, **kwargs
        )

    def iter_audio_windows(
        self,
        audio: AudioInput,
        sampling_rate: int | None = None,
        drop_audio_padding: bool = False,
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
        sampling_rate_of_model = self.feature_extractor.sampling_rate
        blocks = read_audio(audio, sampling_rate_of_model, sampling_rate)
        for window in _windows(blocks, self.feature_extractor.n_samples):
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
            audio = next((node[key] for key in ("audio", "path", "url") if node.get(key) is not None), None)
            if audio is None:
                raise ValueError("An audio item of the conversation has no 'audio', 'path' or 'url'.")
            return {"type": "audio", "audio": self._load_audio(audio, node.get("sampling_rate") or sampling_rate)}
        if isinstance(node, dict) and isinstance(node.get("content"), list | tuple):
            return {**node, "content": self._with_arrays(node["content"], sampling_rate)}
        return node

    def _load_audio(self, audio: AudioInput, sampling_rate: int | None) -> np.ndarray:
        """Float32 `[samples]` at the model's sampling rate."""
        return np.concatenate(list(read_audio(audio, self.feature_extractor.sampling_rate, sampling_rate)))

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        images, text, videos, _ = super().prepare_inputs_layout(images=images, text=text, videos=videos, **kwargs)
        if audio is not None:
            is_per_text = text and isinstance(audio, list | tuple) and audio and not any(map(_is_one_audio, audio))
            if is_per_text and [sample.count(self.audio_token) for sample in text] != [len(item) for item in audio]:
                raise ValueError(
                    f"The number of {self.audio_token} tokens in the prompts should be the same as the number of "
                    "audio inputs of each."
                )
            audio = [self._load_audio(item, _sampling_rate(kwargs)) for item in _flatten(audio)] or None
        return images, text, videos, audio

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
        super().validate_inputs(images=images, text=text, videos=videos, audio=audio, **kwargs)
        if text is not None:
            tokens, audios = sum(sample.count(self.audio_token) for sample in text), len(audio or [])
            if tokens != audios:  # newer versions of Transformers have raised by now
                raise ValueError(
                    f"The total number of {self.audio_token} tokens in the prompts should be the same as the number "
                    f"of audio inputs. Found {tokens} tokens and {audios} audio inputs."
                )

    def _process_audio(self, audio: list[np.ndarray], **kwargs) -> tuple[dict, list[str]]:
        windows = [
            list(
                self.iter_audio_windows(
                    waveform,
                    self.feature_extractor.sampling_rate,
                    drop_audio_padding=bool(kwargs.get("drop_audio_padding")),
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

    def replace_audio_token(self, audio_inputs: dict, audio_idx: int, **kwargs) -> str:
        return self.audio_token * audio_inputs["num_audio_tokens"][audio_idx]

    @property
    def unused_input_names(self) -> list[str]:
        return ["num_audio_tokens"]


__all__ = ["TTTOmniProcessor"]
