# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""`ttt-omni answer` and `ttt-omni chat`: spoken conversations on the command line."""

import ctypes
import os
import queue
import sys
import threading
import time
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import soundfile
import torch
from tqdm import tqdm

from ..configuration_ttt_omni import TTTOmniConfig
from ..memory_ttt_omni import TTTOmniMemory
from ..modeling_ttt_omni import TTTOmniForCausalLM
from ..processing_ttt_omni import TTTOmniProcessor, read_audio
from ..streaming_ttt_omni import TTTOmniStreamEvent, check_speaks, skip_pieces, turn_pieces


# The instruction beside the speech that LLaMA-Omni was trained with.
INSTRUCTION = "Please directly answer the questions in the user's speech."
END_OF_TURN = "<|eot_id|>"
WINDOW_SECONDS = 30
SAVE_SECONDS = 60
MICROPHONE_RATE = 16000


def answer_question(
    question: str,
    output: str,
    model: str,
    max_new_tokens: int = 256,
    device: str = "auto",
    dtype: str = "auto",
    stream: bool = False,
    play: bool = False,
    memory: str | None = None,
    skip_silence: bool = False,
) -> None:
    """
    Prints the answer to the recording `question` as it comes, and writes it as speech to the WAV file `output`.

    Args:
        model: folder, or repository on the Hub.
        stream: whether `output` grows with the answer, rather than to appear when it is complete.
        play: whether to play the answer, too.
        memory: file of a conversation that goes on. While a long recording is heard it is saved there, so that the
            same command goes on where it was interrupted.
        skip_silence: whether to leave out windows of 30 s in which nothing is to be heard.

    Raises:
        ValueError, OSError: a recording that cannot be read, a model that cannot be loaded or does not speak.
    """
    _check_folder(output)
    _check_recording(question)
    sounddevice = _sounddevice("playing") if play else None
    conversation = Conversation(model, device, dtype, memory, skip_silence)
    conversation.hear(question)
    with _player(sounddevice, conversation.sampling_rate) as player:
        _speak(conversation.answer(max_new_tokens), Path(output), stream, player, conversation.sampling_rate)


def chat(
    questions: list[str],
    model: str,
    output: str | None = None,
    max_new_tokens: int = 256,
    device: str = "auto",
    dtype: str = "auto",
    play: bool = False,
    memory: str | None = None,
    skip_silence: bool = False,
) -> None:
    """
    Answers one recording after the other, each with all before in mind.

    Args:
        questions: recordings; none to speak into the microphone.
        output: folder for the answers, `answer-1.wav` and so on.
        memory: file of the conversation, which is saved there after each turn, and goes on if there is one.
        model, max_new_tokens, device, dtype, play, skip_silence: as in [`answer_question`].

    Raises:
        ValueError, OSError: as [`answer_question`], or without questions where there is no microphone.
    """
    for question in questions:
        _check_recording(question)
    if not questions:
        questions = _record_questions(_sounddevice("speaking"))
    sounddevice = _sounddevice("playing") if play else None
    if output is not None:
        Path(output).mkdir(parents=True, exist_ok=True)
    conversation = Conversation(model, device, dtype, memory, skip_silence)
    with _player(sounddevice, conversation.sampling_rate) as player:
        for number, question in enumerate(questions, start=1):
            conversation.hear(question)
            path = None if output is None else Path(output) / f"answer-{number}.wav"
            _speak(conversation.answer(max_new_tokens), path, True, player, conversation.sampling_rate)


class Conversation:
    """
    A model, a processor and what they said so far.

    Args:
        model: folder, or repository on the Hub.
        memory: file from which the conversation goes on, and where it is saved.
        device, dtype, skip_silence: as in [`answer_question`].
    """

    def __init__(self, model: str, device: str, dtype: str, memory: str | None, skip_silence: bool):
        if memory is not None:
            _check_folder(memory)
        if device == "auto":
            device = torch.accelerator.current_accelerator() or "cpu"
        _return_freed_memory()
        progress(f"Loading {model}")
        _check_model(model)
        self.processor = TTTOmniProcessor.from_pretrained(model)
        self.model = TTTOmniForCausalLM.from_pretrained(model, dtype=dtype, device_map=device)
        check_speaks(self.model)
        self.end_of_turn = self.processor.tokenizer.convert_tokens_to_ids(END_OF_TURN)
        self.skip_silence = skip_silence
        self.path = memory
        self.memory: TTTOmniMemory | None = None
        if memory is not None and Path(memory).exists():
            self.memory = self.model.load_memory(memory)
            if self.memory.input_ids is None:
                raise ValueError(f"{memory} holds no tokens: it is none that `ttt-omni` saved.")
            progress(f"Going on with the {self.memory.input_ids.shape[1]} tokens of {memory}")

    @property
    def sampling_rate(self) -> int:
        """Of the answers, in Hz."""
        return self.model.config.vocoder_config.sampling_rate

    def hear(self, question: str | tuple[np.ndarray, int]) -> None:
        """
        Listens to a recording of any length, a file or samples with their rate; goes on with it where the memory was
        saved in its middle.
        """
        content = [{"type": "audio", "audio": question}, {"type": "text", "text": INSTRUCTION}]
        heard, is_first = self._unfinished_turn()
        pieces = turn_pieces(self.processor, {"role": "user", "content": content}, is_first, self.skip_silence)
        pieces = skip_pieces(_show_progress(pieces, question), heard)
        saved = time.monotonic()
        for memory in self.model.listen(pieces, self.memory):
            self.memory = memory
            if time.monotonic() - saved >= SAVE_SECONDS:
                self._save()
                saved = time.monotonic()
        self._save()

    def answer(self, max_new_tokens: int) -> Iterator[TTTOmniStreamEvent]:
        """Answers what was heard; remembers and saves the answer once it is complete."""
        tokens = []
        for event in self.model.stream(
            **vars(self.memory), tokenizer=self.processor.tokenizer, max_new_tokens=max_new_tokens
        ):
            tokens += [] if event.token is None else [event.token]
            yield event
        if tokens[-1] in np.atleast_1d(self.model.generation_config.eos_token_id):
            tokens.pop()
        tokens.append(self.end_of_turn)
        self.memory.input_ids = torch.cat([self.memory.input_ids, torch.tensor([tokens])], dim=1)
        self._save()

    def _unfinished_turn(self) -> tuple[torch.LongTensor, bool]:
        """The tokens `[1, n]` of a turn that the memory holds a part of, and whether the turn is the first."""
        if self.memory is None:
            return torch.empty(1, 0, dtype=torch.long), True
        input_ids = self.memory.input_ids
        ends = (input_ids[0] == self.end_of_turn).nonzero().flatten().tolist()
        if len(ends) < 3:  # the system prompt's, and not yet those of a question and its answer
            return input_ids, True
        return input_ids[:, ends[-1] + 1 :], False

    def _save(self):
        if self.path is not None:
            self.model.save_memory(self.path, self.memory.cache, self.memory.input_ids)


def _speak(events, path: Path | None, grows: bool, player: "_Player | None", sampling_rate: int) -> None:
    """Prints the text of `events`, and writes and plays their speech."""
    writer = None if path is None else _WavWriter(path, sampling_rate, grows)
    samples, is_silent = 0, True
    try:
        for event in events:
            if event.text:
                print(event.text, end="", flush=True)
            if event.waveform is not None:
                waveform = event.waveform.float().cpu()
                samples, is_silent = samples + len(waveform), is_silent and not waveform.any()
                for sink in filter(None, (writer, player)):
                    sink.write(waveform)
        print(flush=True)
        if is_silent:
            progress("The answer says nothing: no file is written" if writer else "The answer says nothing")
        elif writer:
            writer.complete()
            progress(f"Wrote {samples / sampling_rate:.1f} s of speech to {path}")
    finally:
        if writer:
            writer.close()


class _WavWriter:
    """
    Writes speech as 16-bit PCM: to `path` at once, a complete WAV after each chunk, if it `grows`; else to a temporary
    file that `complete` moves there.
    """

    def __init__(self, path: Path, sampling_rate: int, grows: bool):
        self.path = path
        self.temporary = path if grows else path.with_name(f".{path.name}.tmp")
        self.grows = grows
        self.sampling_rate = sampling_rate
        self.file = None  # until there is a sound

    def write(self, waveform: torch.FloatTensor) -> None:
        if self.file is None:
            if not waveform.any():
                return
            self.file = wave.open(os.fspath(self.temporary), "wb")
            self.file.setparams((1, 2, self.sampling_rate, 0, "NONE", "not compressed"))
        pcm = (waveform.clamp(-1, 1) * 32767).round().to(torch.int16)
        self.file.writeframes(pcm.numpy().astype("<i2").tobytes())  # which brings the header up to date

    def complete(self) -> None:
        self.file.close()
        self.temporary.replace(self.path)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            if not self.grows:
                self.temporary.unlink(missing_ok=True)


@contextmanager
def _player(sounddevice, sampling_rate: int) -> Iterator["_Player | None"]:
    """Plays what is written to it until all was heard, on no device at all for `None`."""
    if sounddevice is None:
        yield None
        return
    player = _Player(sounddevice, sampling_rate)
    yield player
    player.finish()


class _Player:
    """Plays speech in a thread, while the next is being made."""

    def __init__(self, sounddevice, sampling_rate: int):
        self.device = sounddevice.OutputStream(samplerate=sampling_rate, channels=1, dtype="float32")
        self.chunks = queue.Queue()
        self.thread = threading.Thread(target=self._play, daemon=True)
        self.thread.start()

    def write(self, waveform: torch.FloatTensor) -> None:
        self.chunks.put(waveform.numpy())

    def finish(self) -> None:
        self.chunks.put(None)
        self.thread.join()

    def _play(self):
        with self.device:
            while (chunk := self.chunks.get()) is not None:
                self.device.write(chunk)


def _record_questions(sounddevice) -> Iterator[tuple[np.ndarray, int]]:
    """What is said between two presses of Enter, time after time, until the end of the input."""
    while True:
        progress("Press Enter to speak, and Enter again when you are done; Ctrl-D ends the conversation")
        if not sys.stdin.readline():
            return
        if blocks := _record(sounddevice):
            yield np.concatenate(blocks), MICROPHONE_RATE


def _record(sounddevice) -> list[np.ndarray]:
    """Blocks `[samples]` of what is said until Enter is pressed."""
    blocks = []

    def append(block, *_):
        blocks.append(block[:, 0].copy())

    with sounddevice.InputStream(samplerate=MICROPHONE_RATE, channels=1, dtype="float32", callback=append):
        sys.stdin.readline()
    return blocks


def _sounddevice(purpose: str):
    try:
        import sounddevice

        return sounddevice
    except (ImportError, OSError) as error:  # OSError: without PortAudio
        raise ValueError(
            f"There is no sound device for {purpose} ({error}): it takes `pip install sounddevice`, and PortAudio."
        ) from error


def _show_progress(pieces: Iterator[dict], question) -> Iterator[dict]:
    """The pieces of a turn, with a bar on stderr if the recording is a file of several windows."""
    try:
        windows = -(-soundfile.info(question).duration // WINDOW_SECONDS)
    except (soundfile.SoundFileError, TypeError):
        windows = 0  # samples, or a file of which it is said where it is read what is wrong
    with tqdm(total=windows, desc="Listening", unit="window", disable=windows < 2) as bar:
        for piece in pieces:
            yield piece
            bar.update("input_features" in piece)


def _return_freed_memory() -> None:
    """Makes glibc give tensors back as they are freed: the holes that a growing cache leaves took 60 MB in 3 hours."""
    try:
        ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD
    except (AttributeError, OSError, TypeError):
        pass  # another C library


def _check_folder(path: str) -> None:
    if not Path(path).parent.is_dir():
        raise ValueError(f"The folder {Path(path).parent} for {Path(path).name} does not exist.")


def _check_recording(path: str) -> None:
    """Raises what reading it would: at once, rather than after the minutes that loading a model may take."""
    next(read_audio(path, MICROPHONE_RATE), None)


def _check_model(model: str) -> None:
    try:
        config, _ = TTTOmniConfig.get_config_dict(model)
    except OSError:
        config = {}
    if not config:
        raise ValueError(f"The model {model} is neither a folder with a config.json nor found on the Hub.")
    if config.get("model_type") != TTTOmniConfig.model_type:
        raise ValueError(f"{model} is no TTT-Omni model but {config.get('model_type')!r}: see `ttt-omni convert`.")


def progress(message: str) -> None:
    """Says on stderr what is going on."""
    print(f"ttt-omni: {message}", file=sys.stderr)
