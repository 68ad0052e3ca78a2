# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""`ttt-omni answer` and `ttt-omni chat`: spoken conversations on the command line."""

import ctypes
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path

import numpy as np
import soundfile
import torch
from tqdm import tqdm

from ..configuration_ttt_omni import TTTOmniConfig
from ..conversation_file import ConversationFile, RecordedPieces, UnfinishedCommand, UnfinishedTurn, locked
from ..loading import find_device, quantization, read_config
from ..memory_ttt_omni import TTTOmniMemory, skip_pieces
from ..modeling_ttt_omni import TTTOmniForCausalLM
from ..processing_ttt_omni import TTTOmniProcessor
from ..streaming_ttt_omni import TTTOmniStreamEvent
from .audio_io import (
    Player,
    SpeechFile,
    check_folder,
    check_output,
    find_sounddevice,
    open_player,
    record_questions,
    repeatable,
)
from .terminal import progress
from .voice import VOICE_RATE, program_words, with_voice


WINDOW_SECONDS = 30
SAVE_SECONDS = 60


def answer_question(
    question: str,
    model: str,
    output: str | None = None,
    max_new_tokens: int = 256,
    device: str = "auto",
    dtype: str = "auto",
    stream: bool = False,
    play: bool = False,
    memory: str | None = None,
    skip_silence: bool = False,
    voice_command: str | None = None,
    quantize: str | None = None,
) -> None:
    """
    Prints the answer to the recording `question` as it comes, and writes it as speech to the file `output`.

    Args:
        question: path, of a pipe too, or URL.
        model: folder, or repository on the Hub.
        output: a .wav, .flac or .ogg; by default none.
        max_new_tokens: of the answer, at least 1 and at most the model's `max_position_embeddings`.
        stream: whether `output`, a .wav, grows with the answer, rather than to appear when it is complete.
        play: whether to play the answer, too.
        memory: file of a conversation that goes on. While a long recording is heard, that is saved beside it, so that
            the same command goes on where it was interrupted; another question goes on from the last completed turn.
        skip_silence: whether to leave out windows of 30 s in which nothing is to be heard.
        voice_command: of a text-to-speech program that speaks for a model which does not, as [`run_program`] takes it.
        quantize: "int8" or "int4", to take less memory.

    Raises:
        ValueError, OSError: a recording that cannot be read, a model that cannot be loaded or does not do what is
            asked of it, a file that another command is writing.
    """
    if output is not None:
        check_output(output, stream)
    elif stream:
        raise ValueError("`--stream` is for `--output`: there is no file to grow.")
    with ExitStack() as stack:
        if stream:
            stack.enter_context(locked(output))
        recording = stack.enter_context(repeatable(question))
        sounddevice = find_sounddevice("playing") if play else None
        stack.enter_context(_locked_memory(memory))
        config = _check_model(model, max_new_tokens)
        _require_hearing(config, model)
        voice = Voice(config, model, voice_command, is_asked=play or output is not None)
        conversation = Conversation(model, device, dtype, memory, skip_silence, quantize)
        conversation.hear(recording)
        player = stack.enter_context(open_player(sounddevice, voice.sampling_rate))
        path = None if output is None else Path(output)
        voice.speak(conversation.answer(max_new_tokens), path, stream, player)
        conversation.complete_turn()


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
    voice_command: str | None = None,
    quantize: str | None = None,
) -> None:
    """
    Answers one recording after the other, each with all before in mind.

    Args:
        questions: recordings; none to speak into the microphone, or for a model that does not hear, to type.
        output: folder for the answers, `answer-1.wav` and so on.
        memory: file of the conversation, which is saved there after each turn, and goes on if there is one. The same
            command goes on where it was interrupted, without the questions that it has answered.
        model, max_new_tokens, device, dtype, play, skip_silence, voice_command, quantize: as in [`answer_question`].

    Raises:
        ValueError, OSError: as [`answer_question`], or without questions where there is no microphone.
    """
    with ExitStack() as stack:
        recordings = [stack.enter_context(repeatable(question)) for question in questions]
        config = _check_model(model, max_new_tokens)
        if questions:
            _require_hearing(config, model)
        voice = Voice(config, model, voice_command, is_asked=play or output is not None)
        hears = config.audio_config is not None
        if not questions:
            recordings = record_questions(find_sounddevice("speaking")) if hears else typed_questions()
        sounddevice = find_sounddevice("playing") if play else None
        if output is not None:
            Path(output).mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(Path(output) / "answers"))
        stack.enter_context(_locked_memory(memory))
        conversation = Conversation(model, device, dtype, memory, skip_silence, quantize)
        answered = conversation.skip_answered(recordings) if questions else 0
        player = stack.enter_context(open_player(sounddevice, voice.sampling_rate))
        for number, recording in enumerate(recordings, start=1):
            if number <= answered:
                progress(f"{questions[number - 1]} was answered before the interruption")
                continue
            conversation.hear(recording) if hears else conversation.read(recording)
            path = None if output is None else Path(output) / f"answer-{number}.wav"
            voice.speak(conversation.answer(max_new_tokens), path, True, player)
            conversation.complete_turn()


class Conversation:
    """
    A model, a processor and what they said so far. A turn is [`hear`] or [`read`], [`answer`] and [`complete_turn`].

    Args:
        model: folder, or repository on the Hub.
        memory: file from which the conversation goes on, and where it is saved.
        device, dtype, skip_silence, quantize: as in [`answer_question`].
    """

    def __init__(
        self,
        model: str,
        device: str,
        dtype: str,
        memory: str | None,
        skip_silence: bool,
        quantize: str | None = None,
    ):
        device = find_device(device)
        _return_freed_memory()
        progress(f"Loading {model}")
        self.processor = TTTOmniProcessor.from_pretrained(model)
        self.model = TTTOmniForCausalLM.from_pretrained(
            model, dtype=dtype, device_map=device, **quantization(quantize, model, dtype)
        )
        self.skip_silence = skip_silence
        self.file = None if memory is None else ConversationFile(memory)
        self.memory: TTTOmniMemory | None = None
        self.unfinished: UnfinishedTurn | None = None
        self.command = UnfinishedCommand()
        if self.file is not None:
            self.memory = self.file.load(self.model, self.processor.answer_end_id)
            self.unfinished = self.file.unfinished_turn()
        if self.memory is not None:
            progress(f"Going on with the {self.memory.input_ids.shape[1]} tokens of {memory}")

    def skip_answered(self, questions: list[str]) -> int:
        """
        How many of a command's `questions` were answered before it was interrupted; the others are to come.

        It is known by their number, and by the content of those that were answered.
        """
        before = UnfinishedCommand() if self.file is None else self.file.command()
        self.command = UnfinishedCommand(len(questions))
        if before.questions != len(questions):
            return 0
        for question, recording in zip(questions, before.answered):
            pieces = self._pieces(question, None)
            for _ in pieces:
                pass
            if pieces.recordings[-1] != recording:
                return 0
        self.command = before
        return len(before.answered)

    def hear(self, question: str | tuple[np.ndarray, int]) -> None:
        """
        Listens to a recording of any length, a file or samples with their rate; goes on with it where the memory was
        saved in its middle.
        """
        self.begins = 0 if self.memory is None else self.memory.input_ids.shape[1]
        pieces = self._resume(question)
        if pieces is None:
            pieces = self._pieces(question, None if self.memory is None else self.memory.input_ids)
        saved = time.monotonic()
        for memory in self.model.listen(pieces, self.memory):
            self.memory = memory
            if time.monotonic() - saved >= SAVE_SECONDS:
                self._save_unfinished(pieces, "listening")
                saved = time.monotonic()
        self._save_unfinished(pieces, "answering")
        self.recording = pieces.recordings[-1]

    def read(self, question: str) -> None:
        """Reads a question that was typed, of which nothing is saved before it is answered."""
        history = None if self.memory is None else self.memory.input_ids
        pieces = self.processor.turn_pieces({"role": "user", "content": question}, history)
        for memory in self.model.listen(pieces, self.memory):
            self.memory = memory
        self.recording = ""

    def answer(self, max_new_tokens: int) -> Iterator[TTTOmniStreamEvent]:
        """Answers what was heard or read."""
        self.tokens = []
        for event in self.model.stream(
            **vars(self.memory), tokenizer=self.processor.tokenizer, max_new_tokens=max_new_tokens
        ):
            self.tokens += [] if event.token is None else [event.token]
            yield event

    def complete_turn(self) -> None:
        """Remembers and saves the answer, once it is complete and where it shall be."""
        if self.tokens[-1] in np.atleast_1d(self.model.generation_config.eos_token_id):
            self.tokens.pop()
        answer = torch.tensor([[*self.tokens, self.processor.answer_end_id]])
        self.memory.input_ids = torch.cat([self.memory.input_ids, answer.to(self.memory.input_ids.device)], dim=1)
        self.command.answered.append(self.recording)
        if len(self.command.answered) == self.command.questions:
            self.command = UnfinishedCommand()
        if self.file is not None:
            self.file.save(self.model, self.memory, self.command)

    def _resume(self, question) -> RecordedPieces | None:
        """The pieces of `question` that are to come, if it is that which was heard in part; the memory is of then."""
        turn, self.unfinished = self.unfinished, None
        if turn is None:
            return None
        self.memory = None  # before there is another one
        self.memory = self.file.load_unfinished(self.model)
        pieces = self._pieces(question, self.memory.input_ids[:, : turn.begins] if turn.begins else None)
        with suppress(ValueError):  # the prompt of another recording
            skip_pieces(pieces, self.memory.input_ids[:, turn.begins :])
            if (len(pieces.recordings) - 1, pieces.recordings[-1]) == (turn.pieces, turn.recording):
                progress(f"Going on with a question of which {turn.pieces} pieces were heard")
                return pieces
        progress("Going back to the last completed turn, as this is another question than the unfinished one")
        self.memory = None
        self.memory = self.file.load(self.model, self.processor.answer_end_id)
        return None

    def _pieces(self, question, history: torch.LongTensor | None) -> RecordedPieces:
        content = [{"type": "audio", "audio": question}]
        if instruction := self.processor.speech_instruction:
            content.append({"type": "text", "text": instruction})
        pieces = self.processor.turn_pieces({"role": "user", "content": content}, history, self.skip_silence)
        return RecordedPieces(_show_progress(pieces, question))

    def _save_unfinished(self, pieces: RecordedPieces, state: str) -> None:
        if self.file is None:
            return
        # While the end of the last answer is heard, which comes before the turn, there is nothing of it yet.
        heard, recording = pieces.heard(max(self.memory.input_ids.shape[1] - self.begins, 0))
        self.file.save_unfinished(self.model, self.memory, UnfinishedTurn(self.begins, heard, recording, state))


class Voice:
    """
    What says an answer: the model itself, or the program of `command` for a model that does not speak.

    Args:
        config, model: of the model, and its name.
        command: as [`program_words`] takes it; `None` for none.
        is_asked: whether speech is to be written or played.

    Raises:
        ValueError, OSError: if nobody can speak, a program has nothing to do, or its command will not do.
    """

    def __init__(self, config: TTTOmniConfig, model: str, command: str | None, is_asked: bool):
        if command is not None and config.speaks:
            raise ValueError(f"{model} speaks by itself: leave out --voice-command.")
        if command is not None and not is_asked:
            raise ValueError("`--voice-command` is for `--output` or `--play`: there is nothing to be spoken.")
        if is_asked and command is None and not config.speaks:
            missing = "speech_decoder_config" if config.speech_decoder_config is None else "vocoder_config"
            raise ValueError(
                f"{model} cannot speak: its config.json has no `{missing}`; name a text-to-speech program with "
                "--voice-command, or leave out --output and --play."
            )
        self.words = None if command is None else program_words(command, "--voice-command")
        self.speaks = config.speaks or command is not None
        self.sampling_rate = config.vocoder_config.sampling_rate if config.speaks else VOICE_RATE

    def speak(
        self, events: Iterator[TTTOmniStreamEvent], path: Path | None, grows: bool, player: Player | None
    ) -> None:
        """Prints the text of `events`, and writes and plays their speech."""
        samples, is_silent = 0, True
        with nullcontext() if path is None else SpeechFile(path, self.sampling_rate, grows) as file:
            for event in events if self.words is None else with_voice(events, self.words):
                if event.text:
                    print(event.text, end="", flush=True)
                if event.waveform is not None:
                    waveform = event.waveform.float().cpu()
                    samples, is_silent = samples + len(waveform), is_silent and not waveform.any()
                    for sink in filter(None, (file, player)):
                        sink.write(waveform)
            print(flush=True)
        if self.speaks and is_silent:
            progress("The answer says nothing" if path is None else "The answer says nothing: no file is written")
        elif path is not None:
            progress(f"Wrote {samples / self.sampling_rate:.1f} s of speech to {path}")


def typed_questions() -> Iterator[str]:
    """The lines of standard input that say something."""
    progress("Type a question and press Enter; Ctrl-D ends the conversation")
    while line := sys.stdin.readline():
        if line.strip():
            yield line.strip()


def _locked_memory(memory: str | None):
    if memory is None:
        return nullcontext()
    check_folder(memory)
    return locked(memory)


def _show_progress(pieces: Iterator[dict], question) -> Iterator[dict]:
    """The pieces of a turn, with a bar on stderr if the recording is a file of several windows."""
    try:
        windows = -(-soundfile.info(os.fsencode(question)).duration // WINDOW_SECONDS)
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


def _check_model(model: str, max_new_tokens: int) -> TTTOmniConfig:
    """The config of `model`. Raises ValueError unless there is one, and it may be asked for so many tokens."""
    config = read_config(model)
    limit = config.text_config.max_position_embeddings
    if not 1 <= max_new_tokens <= limit:
        raise ValueError(
            f"`max_new_tokens` must be from 1 to the {limit} of the model's `max_position_embeddings`, got "
            f"{max_new_tokens}."
        )
    return config


def _require_hearing(config: TTTOmniConfig, model: str) -> None:
    if config.audio_config is None:
        raise ValueError(
            f"{model} cannot hear: its config.json has no `audio_config`; `ttt-omni chat` without recordings lets you "
            "type."
        )
