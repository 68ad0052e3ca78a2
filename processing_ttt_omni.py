# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""TTT-Omni processor: conversations of speech and text to model inputs."""

import io
import os
import re
import shutil
import stat
import tempfile
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Unpack

import numpy as np
import soundfile
import soxr
import torch
from huggingface_hub.utils import httpx
from transformers import BatchFeature, PreTrainedTokenizerBase, WhisperFeatureExtractor
from transformers.processing_utils import AudioKwargs, ProcessingKwargs, ProcessorMixin
from transformers.tokenization_utils_base import TextInput
from transformers.utils import logging

from .configuration_ttt_omni import audio_embedding_lengths
from .files_ttt_omni import new_file


logger = logging.get_logger(__name__)

# A path, URL or encoded file; or samples, alone or with their rate as `(array, rate)` or as `datasets` gives them.
AudioInput = str | os.PathLike | bytes | np.ndarray | torch.Tensor | list[float] | tuple | dict[str, Any]

# Llama 3 reserves this token for padding, whichever the side.
PAD_TOKEN = "<|finetune_right_pad_id|>"
MAX_CHANNELS = 32
MIN_RATE, MAX_RATE = 1_000, 768_000  # samples per second, of what is read
MAX_SAMPLE = 100.0  # of a full scale of 1, which floats may well go beyond
BLOCK_SAMPLES = 480_000  # of all channels
MP3_FRAME = 1152  # samples
MP3_TAIL = 2**16  # bytes at the end of an MP3 that need not be frames
UNKNOWN_FRAMES = 2**48  # libsndfile has more for a file that does not say how many it has
URL_TIMEOUT = 10  # seconds without a byte

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


class _Decoder(soundfile.SoundFile):
    """Reads on to the end: soundfile itself stops at the announced one, and seeks after each read."""

    def __init__(self, file: BinaryIO):
        self.source = file
        super().__init__(file)

    def seekable(self) -> bool:
        return False


class _EndlessDecoder(_Decoder):
    """Reads an MP3 to the end, which libsndfile would estimate by its first frame and its size."""

    def __init__(self, file: BinaryIO):
        super().__init__(_EndlessFile(file))

    def read(self, frames: int, **kwargs) -> np.ndarray:
        block = np.empty((frames, self.channels), np.float32)
        size = 0
        while size < frames:
            try:
                read = len(super().read(out=block[size : size + MP3_FRAME]))
            except soundfile.SoundFileError:
                read = 0  # a frame that is cut off, or tags
            if read == 0:
                position = self.source.tell()
                if len(self.source.read(MP3_TAIL)) == MP3_TAIL:
                    raise soundfile.SoundFileRuntimeError(f"it is damaged at byte {position}.")
                break
            size += read
        return block[:size]


class _EndlessFile:
    """A file whose end cannot be sought, so that libsndfile does not estimate by it how much an MP3 has to give."""

    def __init__(self, file: BinaryIO):
        self.file, self.read, self.readinto, self.at_end = file, file.read, file.readinto, False

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> None:
        self.at_end = whence == os.SEEK_END
        if not self.at_end:
            self.file.seek(offset, whence)

    def tell(self) -> int:
        return 2**62 if self.at_end else self.file.tell()


class _PatchedFile:
    """A file with other bytes at one place."""

    def __init__(self, file: BinaryIO, position: int, patch: bytes):
        self.file, self.read, self.seek, self.tell = file, file.read, file.seek, file.tell
        self.position, self.patch = position, patch

    def readinto(self, buffer) -> int:
        start = self.file.tell()
        read = self.file.readinto(buffer)
        for index, byte in enumerate(self.patch, self.position - start):
            if 0 <= index < read:
                buffer[index : index + 1] = bytes([byte])
        return read


def _mp3_header(mp3: BinaryIO) -> tuple[int, bool] | None:
    """
    Where an MP3 says how many frames it has, and whether others follow them, as where MP3s were joined; `None` for one
    that does not say, as of an encoder that wrote to a pipe.
    """
    mp3.seek(0)
    tag = mp3.read(10)
    size = sum((byte & 0x7F) << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0)))  # 7 bits in a byte
    start = mp3.seek(10 + size if tag.startswith(b"ID3") else 0)
    header = re.search(rb"(?:Xing|Info)...([\x03\x07\x0b\x0f])....(....)", mp3.read(200), re.DOTALL)
    if header is None:
        return None
    mp3.seek(start + int.from_bytes(header[2]))
    following = mp3.read(3)
    goes_on = following == b"ID3" or (following[:1] == b"\xff" and following[1:] >= b"\xe0")
    return start + header.start(), goes_on


def _unfinished_size(wav: BinaryIO) -> int | None:
    """
    Where a WAV says the size of its samples, if that was never filled in: it is 0, or the file goes on behind it.

    A program that writes to a pipe, or was stopped, leaves it so; and one that goes beyond 4 GB begins anew at 0.
    """
    wav.seek(0)
    riff = wav.read(12)
    if riff[:4] != b"RIFF" or riff[8:] != b"WAVE":
        return None
    end = 8 + int.from_bytes(riff[4:8], "little")  # of the file, as announced
    end_of_file = wav.seek(0, os.SEEK_END)
    start = wav.seek(12)
    while len(chunk := wav.read(8)) == 8:
        size = int.from_bytes(chunk[4:], "little")
        end_of_chunk = start + 8 + size + size % 2
        if chunk[:4] == b"data":
            chunk_follows = end == end_of_file and re.fullmatch(b"[ -~]{4}", wav.read(4))  # its name
            is_unfinished = end <= end_of_chunk or (size == 0 and not chunk_follows)
            return start + 4 if is_unfinished and end_of_chunk < end_of_file else None
        start = wav.seek(end_of_chunk)
    return None


def _decoder(file: BinaryIO) -> _Decoder:
    """That of a file, which gives all of it. Raises `soundfile.SoundFileError`."""
    unfinished = _unfinished_size(file)
    file.seek(0)
    decoder = _Decoder(file if unfinished is None else _PatchedFile(file, unfinished, b"\xff" * 4))
    if decoder.format != "MP3":
        return decoder
    decoder.close()
    header = _mp3_header(file)
    file.seek(0)
    if header is None:
        return _EndlessDecoder(file)
    position, goes_on = header
    return _EndlessDecoder(_PatchedFile(file, position, bytes(4))) if goes_on else _Decoder(file)


def printable(name: str | os.PathLike) -> str:
    """A name for a message of one line, which may have to be encoded."""
    name = os.fsdecode(name)
    return name if name.isprintable() else repr(name)


def _is_url(source: Any) -> bool:
    return isinstance(source, str) and source.startswith(("http://", "https://", "data:"))


def _name(source: str | bytes) -> str:
    if not isinstance(source, str):
        return "Audio given as bytes"
    return f"{source[:40]}…" if source.startswith("data:") else printable(source)


def _fetch(url: str, file: BinaryIO) -> None:
    """Writes what a URL holds to `file`. Raises OSError, naming it."""
    try:
        if url.startswith("data:"):
            with urllib.request.urlopen(url) as response:
                shutil.copyfileobj(response, file)
            return
        with httpx.stream("GET", url, follow_redirects=True, timeout=URL_TIMEOUT) as response:
            if not response.is_success:
                raise ValueError(f"the server says {response.status_code} {response.reason_phrase}")
            for piece in response.iter_bytes():
                file.write(piece)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(f"{_name(url)} cannot be fetched: {reason}") from error


def _open_file(source: str | bytes) -> BinaryIO:
    """What can be sought in, of a path, a URL, or a file's bytes; pipes and URLs are copied to a temporary file."""
    if not isinstance(source, str):
        return io.BytesIO(source)
    is_url = _is_url(source)
    if not is_url and os.path.isfile(source):
        return open(source, "rb")
    if not is_url and not (os.path.exists(source) and stat.S_ISFIFO(os.stat(source).st_mode)):
        raise FileNotFoundError(f"Audio file {printable(source)} does not exist.")
    file = tempfile.TemporaryFile()
    try:
        if is_url:
            _fetch(source, file)
        else:
            with open(source, "rb") as pipe:
                shutil.copyfileobj(pipe, file)
    except BaseException:
        file.close()
        raise
    file.seek(0)
    return file


@contextmanager
def open_audio(source: str | bytes) -> Iterator[soundfile.SoundFile]:
    """
    Open an audio file, whose header may announce another length than it has.

    Args:
        source: path, of a pipe too; URL; or the bytes of a file.

    Yields:
        A `SoundFile` to read once from its beginning to its end. Its `frames` are right for a WAV; for other formats,
        those that arrive are to be counted.

    Raises:
        FileNotFoundError, OSError, ValueError: naming the file, for what cannot be read, here or in the body.
    """
    name = _name(source)
    with _open_file(source) as file:
        try:
            with _decoder(file) as decoder:
                if not MIN_RATE <= decoder.samplerate <= MAX_RATE or decoder.channels > MAX_CHANNELS:
                    raise ValueError(
                        f"{name} announces {decoder.channels} channels of {decoder.samplerate} samples per second: at "
                        f"most {MAX_CHANNELS} channels of {MIN_RATE} to {MAX_RATE} can be read."
                    )
                yield decoder
        except (soundfile.SoundFileError, TypeError) as error:  # TypeError: taken for headerless, by its name
            reason = getattr(error, "error_string", str(error))
            raise ValueError(f"{name} cannot be read as audio (WAV, FLAC, OGG or MP3): {reason}") from error


def _file_blocks(source: str | bytes) -> Iterator[tuple[np.ndarray, int]]:
    """Blocks of an audio file as float32 `[samples, channels]`, each with the file's sampling rate."""
    with open_audio(source) as file:
        samples = 0
        while len(block := file.read(max(BLOCK_SAMPLES // file.channels, 1), dtype="float32", always_2d=True)):
            samples += len(block)
            yield block, file.samplerate
        if file.format == "OGG" and b"OggS" in file.source.read():
            raise ValueError(f"{_name(source)} is several OGG files in one, of which only the first can be read.")
        # libsndfile corrects the size of a WAV's data chunk and only says so in its log.
        is_corrected = re.search(r"^data : \d+ \(should be", file.extra_info, re.MULTILINE)
        if is_corrected or samples < file.frames < UNKNOWN_FRAMES:
            logger.warning(f"{_name(source)}: its header announces another length than the {samples} samples it has.")


def _array_samples(audio: np.ndarray | torch.Tensor | list[float]) -> np.ndarray:
    """Floats `[samples, channels]` from samples of one or, in either order, more channels; integers are PCM."""
    if isinstance(audio, torch.Tensor):
        audio = (audio.float() if audio.is_floating_point() else audio).numpy(force=True)
    audio = np.asarray(audio)
    if audio.dtype.kind in "iu" and audio.itemsize <= 4:
        full_scale = 2.0 ** (8 * audio.itemsize - 1)
        audio = audio / full_scale - (1.0 if audio.dtype.kind == "u" else 0.0)
    if audio.dtype.kind != "f":
        raise TypeError(f"Audio samples must be floats, or integers of at most 32 bits, got {audio.dtype}.")
    if audio.ndim == 1:
        return audio[:, None]
    if audio.ndim != 2:
        raise ValueError(f"Audio must have the shape [samples] or [channels, samples], got {audio.shape}.")
    channels = min(audio.shape)
    if audio.shape[0] == audio.shape[1] or channels > MAX_CHANNELS:
        raise ValueError(
            f"Audio of shape {audio.shape} is neither [channels, samples] nor [samples, channels] with at most "
            f"{MAX_CHANNELS} channels."
        )
    return audio if audio.shape[1] == channels else audio.T


def _check_samples(block: np.ndarray, start: float, rate: int, name: str) -> None:
    """Raises ValueError for samples `[samples, channels]` from second `start` on that no recording has."""
    if block.size == 0 or (block.max() <= MAX_SAMPLE and block.min() >= -MAX_SAMPLE):  # with NaN, neither
        return
    peaks = np.abs(block).max(axis=1)
    index = int(np.argmin(peaks <= MAX_SAMPLE))
    second = f"{start + index / rate:.3f} s"
    if not np.isfinite(peaks[index]):
        raise ValueError(f"{name} has NaN or infinite samples, the first at {second}.")
    raise ValueError(
        f"{name} has a sample of {peaks[index]:.3g} at {second}, where full scale is 1: divide the samples by theirs."
    )


def _is_one_audio(audio: Any) -> bool:
    """Whether `audio` is not a list of audios: `(array, sampling_rate)` and a list of samples are one."""
    if isinstance(audio, tuple):
        return len(audio) == 2 and isinstance(audio[1], int | float | np.number)
    return not isinstance(audio, list) or (len(audio) > 0 and isinstance(audio[0], float))


def _flatten(audio: Any) -> list[AudioInput]:
    """The audios of one input, a list, or a list per text."""
    return [audio] if _is_one_audio(audio) else [leaf for item in audio for leaf in _flatten(item)]


def _source_blocks(
    audio: AudioInput, target_rate: int, sampling_rate: int | None
) -> tuple[str, Iterable[tuple[np.ndarray, int]]]:
    """A name for error messages, and the blocks `[samples]` of `audio` with their sampling rate."""
    if isinstance(audio, dict):
        sampling_rate = sampling_rate if audio.get("sampling_rate") is None else audio["sampling_rate"]
        audio = next((audio[key] for key in ("array", "bytes", "path") if audio.get(key) is not None), None)
    elif isinstance(audio, tuple) and _is_one_audio(audio):
        audio, sampling_rate = audio

    if isinstance(audio, str | os.PathLike):
        path = os.fsdecode(audio)
        return _name(path), _file_blocks(path)
    if isinstance(audio, bytes | bytearray | memoryview):
        return _name(audio), _file_blocks(audio)
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
    is_integer = isinstance(sampling_rate, int | np.integer) and not isinstance(sampling_rate, bool)
    if not is_integer or not MIN_RATE <= sampling_rate <= MAX_RATE:
        raise ValueError(
            f"`sampling_rate` must be an integer from {MIN_RATE} to {MAX_RATE}, in Hz, got {sampling_rate!r}."
        )
    return "Audio array", [(_array_samples(audio), int(sampling_rate))]


def read_audio(audio: AudioInput, target_rate: int, sampling_rate: int | None = None) -> Iterator[np.ndarray]:
    """
    Read audio block by block, mixed to mono and resampled (soxr, HQ). Of a file, one block is in memory at a time.

    Args:
        audio: path (of a pipe too), URL, bytes of a file, or samples `[samples]`, `[channels, samples]` or
            `[samples, channels]`, alone, as `(array, sampling_rate)` or as `{"array", "sampling_rate"}`.
        target_rate: sampling rate of the result in Hz.
        sampling_rate: that of an array that comes without its own; files know theirs.

    Yields:
        float32 `[samples]`.

    Raises:
        FileNotFoundError, OSError, TypeError, ValueError: naming the file or URL, for what cannot be read, is empty,
            announces a rate that no recording has, or has samples that are not finite or beyond 100 times full scale.
    """
    name, blocks = _source_blocks(audio, target_rate, sampling_rate)
    resampler, samples, seconds = None, 0, 0.0
    for block, rate in blocks:
        _check_samples(block, seconds, rate, name)
        seconds += len(block) / rate
        block = block.mean(axis=1).astype(np.float32, copy=False)
        if rate != target_rate:
            resampler = resampler or soxr.ResampleStream(rate, target_rate, num_channels=1, dtype="float32")
            block = resampler.resample_chunk(block).clip(-MAX_SAMPLE, MAX_SAMPLE)  # which it may overshoot
        samples += len(block)
        yield block
    if resampler is not None:
        block = resampler.resample_chunk(np.zeros(0, np.float32), last=True).clip(-MAX_SAMPLE, MAX_SAMPLE)
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
    rate = kwargs.get("sampling_rate")
    return kwargs.get("audio_kwargs", {}).get("sampling_rate") if rate is None else rate


class TTTOmniAudioKwargs(AudioKwargs, total=False):
    """
    drop_audio_padding (`bool`, *optional*, defaults to `False`):
        Whether the padding of a window that speech fills only in part gets no embeddings; as the original, the default
        gives every window those of a full one. Adds `input_features_mask` `[windows, 3000]` to the outputs.
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
        audio_token (`str`, defaults to `"<|reserved_special_token_0|>"`):
            Placeholder of audio, a reserved special token of the tokenizer.
        audio_downsample (`int`, defaults to 5):
            Encoder frames per embedding, as in [`TTTOmniConfig`].
        chat_template (`str`, *optional*):
            By default LLaMA-Omni's prompt.
    """

    valid_processor_kwargs = TTTOmniProcessorKwargs
    text_kwargs = {"padding": True}
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
            if node.get("sampling_rate") is not None:
                sampling_rate = node["sampling_rate"]
            return {"type": "audio", "audio": self._load_audio(audio, sampling_rate)}
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
        sampling_rate: int = 16000,
    ) -> None:
        """
        Save waveforms, such as those that the model generated: all of them, or none.

        Args:
            audio: `[samples]`, or a list of such.
            saving_path: of the file, or a list of as many; its ending says what is written, such as `.wav` (of 16-bit
                integers, in which what is beyond full scale is clipped), `.flac` or `.mp3`.
            sampling_rate: in Hz; the vocoder's is 16,000.

        Raises:
            ValueError, OSError: for samples that are not finite, for numbers of waveforms and paths that differ, and
                for paths that cannot be written.
        """
        paths = [saving_path] if isinstance(saving_path, str | os.PathLike) else saving_path
        waveforms = [audio] if _is_one_audio(audio) else audio
        if len(paths) != len(waveforms):
            raise ValueError(f"There are {len(waveforms)} waveforms for {len(paths)} paths.")
        with ExitStack() as stack:
            for path, waveform in zip(map(Path, paths), waveforms):
                samples = _array_samples(waveform)
                _check_samples(samples, 0, sampling_rate, f"The waveform for {printable(path)}")
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
