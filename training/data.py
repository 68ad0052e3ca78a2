# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Spoken conversations to train on: a JSONL manifest in LLaMA-Omni's form, read lazily, and batches of it."""

import json
import os
import re
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from tqdm import tqdm

from ..audio_ttt_omni import open_audio, printable, read_audio
from ..configuration_ttt_omni import TTTOmniConfig, audio_embedding_lengths
from ..processing_ttt_omni import TTTOmniProcessor


SPEECH_TOKEN = "<speech>"
ROLES = ("human", "gpt")
IGNORE_INDEX = -100


class ManifestError(ValueError):
    """A manifest that cannot be trained on; the message names its file and line."""


class ConversationDataset(Dataset):
    r"""
    Conversations of a manifest, one JSON object per line in the form of LLaMA-Omni's training data:

        {"id": "7", "speech": ["7a.wav", "7b.wav"], "conversations": [
            {"from": "human", "value": "<speech>\nPlease directly answer the questions in the user's speech."},
            {"from": "gpt", "value": "It is four o'clock.", "units": [63, 7, 91]},
            {"from": "human", "value": "<speech>"},
            {"from": "gpt", "value": "You are welcome."}]}

    `speech` has a recording for each `<speech>`, as a path relative to the manifest; one alone needs no list. `units`
    are those of the spoken answer, runs of the same unit merged, and may be left out.

    All lines are checked when the dataset is made, for which recordings are read whole, other than a WAV of integers
    of whose header it is enough. An item is read when it is taken; it holds `input_ids` and `labels` `[T]`, in
    `unit_labels` a tensor `[U]` per answer, and if there is speech `input_features` `[W, n_mels, 3000]` of its W
    windows.

    Args:
        manifest: path of the JSONL file.
        processor: that of the model.
        config: that of the model.
        join_to_length: join neighbouring conversations into long ones of at most so many tokens; `None` joins none.
        processor_kwargs: further arguments of the processor, such as `{"drop_audio_padding": True}`.

    Raises:
        FileNotFoundError: if there is no such manifest.
        [`ManifestError`]: naming the line that is wrong, and what is wrong with it.
        ValueError: if the processor's chat template does not tell where an answer begins.
    """

    def __init__(
        self,
        manifest: str | os.PathLike,
        processor: TTTOmniProcessor,
        config: TTTOmniConfig,
        join_to_length: int | None = None,
        processor_kwargs: dict[str, Any] | None = None,
    ):
        self.manifest = Path(manifest)
        self.processor = processor
        self.config = config
        self.join_to_length = join_to_length
        self.processor_kwargs = processor_kwargs or {}
        self.offsets = array("q")  # of the lines in the file
        self.groups = []  # of the conversations joined into one item, first and last + 1
        self.num_spoken = 0  # conversations with units for all answers
        self.special_tokens = _special_tokens(processor)
        self._check()

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> dict[str, Any]:
        conversations = []
        with open(self.manifest, "rb") as file:
            for offset in self.offsets[slice(*self.groups[index])]:
                file.seek(offset)
                conversations.append(_parse(file.readline(), self.manifest.parent))
        pieces = []
        for message in (message for conversation in conversations for message in conversation.messages):
            if message["role"] == "assistant":
                input_ids = torch.tensor([self.processor.answer_ids(message["content"])])
                pieces.append({"input_ids": input_ids, "labels": input_ids})
            else:
                history = pieces[-1]["input_ids"] if pieces else None
                pieces += self.processor.turn_pieces(message, history, **self.processor_kwargs)
        for piece in pieces:
            piece.setdefault("labels", torch.full_like(piece["input_ids"], IGNORE_INDEX))
        item = {name: torch.cat([piece[name][0] for piece in pieces]) for name in ("input_ids", "labels")}
        for name in ("input_features", "input_features_mask"):
            if found := [piece[name] for piece in pieces if name in piece]:
                item[name] = torch.cat(found)
        units = [answer for conversation in conversations for answer in conversation.units]
        return item | {"unit_labels": [torch.tensor(answer, dtype=torch.long) for answer in units]}

    def _check(self) -> None:
        """Checks every line, and fills `offsets` and `groups`."""
        self.processor.answer_ids("Yes.")  # whether the template allows for labels
        room = 0
        lines = tqdm(read_manifest(self.manifest), desc=f"Checking {self.manifest.name}", unit=" conversations")
        for number, offset, conversation in lines:
            with naming_line(self.manifest, number):
                self._check_texts(conversation)
                embeddings = self._check_speech(conversation)
                self._check_units(conversation)
                room = self._add(conversation, embeddings, room)
            self.offsets.append(offset)
            self.num_spoken += all(conversation.units)
        if not self.offsets:
            raise ManifestError(f"{self.manifest} has no conversations.")

    def _check_texts(self, conversation: "Conversation") -> None:
        for index, turn in enumerate(conversation.record["conversations"], 1):
            token = self.special_tokens.search(turn["value"])
            if token is not None:
                raise ManifestError(f"turn {index} holds {token[0]}, a special token of the tokenizer: leave it out.")

    def _check_speech(self, conversation: "Conversation") -> int:
        """Returns the number of embeddings that the recordings have together."""
        if conversation.speech and self.config.audio_config is None:
            raise ManifestError("the model has no audio encoder: it takes conversations without `speech` only.")
        return sum(self._speech_length(self._count_samples(path)) for path in conversation.speech)

    def _count_samples(self, path: Path) -> int:
        if not path.is_file():
            raise ManifestError(f"the recording {printable(path)} does not exist.")
        rate = self.processor.feature_extractor.sampling_rate
        with open_audio(str(path)) as file:
            if file.samplerate != rate:
                raise ManifestError(
                    f"{printable(path)} has {file.samplerate} samples per second, not {rate}: resample it."
                )
            if file.format in ("WAV", "WAVEX") and file.subtype.startswith("PCM") and file.frames > 0:
                return file.frames
        return sum(len(block) for block in read_audio(path, rate))

    def _check_units(self, conversation: "Conversation") -> None:
        if not any(conversation.units):
            return
        decoder = self.config.speech_decoder_config
        if decoder is None:
            raise ManifestError("the model has no speech decoder: leave out `units`.")
        answers = [message["content"] for message in conversation.messages if message["role"] == "assistant"]
        for answer, units in zip(answers, conversation.units):
            wrong = next((unit for unit in units if not 0 <= unit < decoder.unit_vocab_size), None)
            if wrong is not None:
                raise ManifestError(
                    f"unit {wrong} is out of range: the model has the units 0 to {decoder.unit_vocab_size - 1}."
                )
            # CTC puts a blank between two of the same.
            needed = len(units) + sum(unit == following for unit, following in zip(units, units[1:]))
            tokens = len(self.processor.answer_ids(answer))
            if needed > max(tokens * decoder.upsample_factor, len(units)):  # the frames that the model has for them
                raise ManifestError(
                    f"an answer of {tokens} tokens has {len(units)} units, of which {needed - len(units)} repeat the "
                    f"one before: they need {needed} frames, and the model has {decoder.upsample_factor} per token. "
                    "Merge runs of the same unit."
                )

    def _add(self, conversation: "Conversation", embeddings: int, room: int) -> int:
        """Joins the next conversation to the last group if there is room, or to a new one. Returns the room left."""
        index = len(self.offsets)
        if self.join_to_length is None:
            self.groups.append((index, index + 1))
            return 0
        length = self._length(conversation.messages, embeddings)
        if length > self.join_to_length:
            raise ManifestError(f"the conversation has {length} tokens, more than {self.join_to_length} at a time.")
        if index == 0:  # the system prompt comes once
            self.shared_length = 2 * length - self._length(2 * conversation.messages, 2 * embeddings)
        if not self.groups or length - self.shared_length > room:
            self.groups.append((index, index + 1))
            return self.join_to_length - length
        self.groups[-1] = (self.groups[-1][0], index + 1)
        return room - (length - self.shared_length)

    def _length(self, messages: list[dict[str, Any]], embeddings: int) -> int:
        """Number of tokens, of which each recording takes those of its windows."""
        input_ids = []
        for message in messages:
            if message["role"] == "assistant":
                input_ids += self.processor.answer_ids(message["content"])
            else:
                history = torch.tensor([input_ids]) if input_ids else None
                input_ids += self.processor.turn_ids(message, history)
        return len(input_ids) - input_ids.count(self.processor.audio_token_id) + embeddings

    def _speech_length(self, samples: int) -> int:
        """Number of embeddings of a recording."""
        extractor = self.processor.feature_extractor
        starts = torch.arange(0, samples, extractor.n_samples)
        windows = (samples - starts).clamp(max=extractor.n_samples)  # samples of each
        if not self.processor_kwargs.get("drop_audio_padding", not self.processor.embed_audio_padding):
            windows[:] = extractor.n_samples
        mel_frames = -(-windows // extractor.hop_length)  # [W]
        mask = torch.arange(extractor.nb_max_frames) < mel_frames[:, None]  # [W, 3000]
        return int(audio_embedding_lengths(mask, self.processor.audio_downsample).sum())


def _special_tokens(processor: TTTOmniProcessor) -> re.Pattern[str]:
    """What the tokenizer takes for a token of its own wherever it stands in a text, the audio's placeholder too."""
    added = processor.tokenizer.added_tokens_decoder.values()
    tokens = {processor.audio_token} - {None} | {token.content for token in added if token.special}
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))


@contextmanager
def naming_line(manifest: Path, number: int) -> Iterator[None]:
    """Makes a [`ManifestError`] that names the line of each ValueError and OSError raised in its body."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ManifestError(f"{manifest}, line {number}: {error}") from error


def read_manifest(manifest: Path) -> Iterator[tuple[int, int, "Conversation"]]:
    """
    Reads a manifest line by line, and checks its form; not its recordings, nor whether a model can have it.

    Yields:
        The conversation of each line that is not empty, after the line's number, counted from 1, and the byte of the
        file at which it begins. Whoever finds more wrong with it says so in [`naming_line`].

    Raises:
        OSError: if the manifest cannot be read.
        [`ManifestError`]: naming the line that is wrong, and what is wrong with it.
    """
    offset = 0
    with open(manifest, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                with naming_line(manifest, number):
                    conversation = _parse(line, manifest.parent)
                yield number, offset, conversation
            offset += len(line)


@dataclass(frozen=True)
class Conversation:
    """A line of a manifest."""

    record: dict[str, Any]  # as it stands there
    messages: list[dict[str, Any]]
    speech: list[Path]
    units: list[list[int]]  # per answer, empty where it was not spoken


def _parse(line: bytes, folder: Path) -> Conversation:
    """A line of a manifest whose recordings are in `folder`. Raises [`ManifestError`] without naming the line."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"not JSON ({error}).") from None
    if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
        raise ManifestError("no JSON object with a list of `conversations`.")
    speech = record.get("speech") or []
    speech = [speech] if isinstance(speech, str) else speech
    if not isinstance(speech, list) or not all(isinstance(path, str) for path in speech):
        raise ManifestError("`speech` is neither a path nor a list of paths.")
    speech = [folder / path for path in speech]

    turns = record["conversations"]
    if not turns or len(turns) % 2 != 0:
        raise ManifestError(f"`conversations` has {len(turns)} turns: a question and an answer in turn are needed.")
    recordings = iter(speech)
    messages, units = [], []
    for index, turn in enumerate(turns):
        role, value = ROLES[index % 2], turn.get("value") if isinstance(turn, dict) else None
        if not isinstance(value, str) or turn.get("from") != role:
            raise ManifestError(f"turn {index + 1} is not from {role!r} with a text as `value`.")
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            raise ManifestError(f"turn {index + 1} has half a character: a surrogate alone, which is no text.")
        if role == "human":
            messages.append({"role": "user", "content": _content(value, recordings)})
            continue
        if not value.strip():
            raise ManifestError(f"turn {index + 1} is an empty answer.")
        if SPEECH_TOKEN in value:
            raise ManifestError(f"turn {index + 1} is an answer with {SPEECH_TOKEN}, which is for questions.")
        messages.append({"role": "assistant", "content": value})
        units.append(turn.get("units") or [])
        if not isinstance(units[-1], list) or not all(type(unit) is int for unit in units[-1]):
            raise ManifestError(f"the `units` of turn {index + 1} are no list of integers.")
    asked = sum(turn["value"].count(SPEECH_TOKEN) for turn in turns[::2])
    if asked != len(speech):
        raise ManifestError(f"{asked} {SPEECH_TOKEN} for {len(speech)} recordings in `speech`.")
    return Conversation(record, messages, speech, units)


def _content(value: str, recordings) -> str | list[dict[str, str]]:
    """A question, or the items of a spoken one: recordings where it says `<speech>`, and the text around them."""
    if SPEECH_TOKEN not in value:
        return value
    content = []
    for index, text in enumerate(value.split(SPEECH_TOKEN)):
        if index > 0:
            content.append({"type": "audio", "audio": str(next(recordings, ""))})
            text = text.removeprefix("\n")  # the template has it
        if text:
            content.append({"type": "text", "text": text})
    return content


class ConversationCollator:
    """
    Batches of a [`ConversationDataset`]'s items, as [`TTTOmniForCausalLM.forward`] takes them.

    Args:
        pad_token_id: id to pad `input_ids` with, on the right.
        packing: put all items into one row without padding, where they do not see each other, told apart by
            `position_ids` that start again.
    """

    def __init__(self, pad_token_id: int, packing: bool = False):
        self.pad_token_id = pad_token_id
        self.packing = packing

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if self.packing:
            batch = {name: torch.cat([item[name] for item in items])[None] for name in ("input_ids", "labels")}
            batch["position_ids"] = torch.cat([torch.arange(len(item["input_ids"])) for item in items])[None]
            batch["use_cache"] = False  # with a cache, sequences count as one that goes on
        else:
            batch = {
                "input_ids": _pad([item["input_ids"] for item in items], self.pad_token_id),
                "labels": _pad([item["labels"] for item in items], IGNORE_INDEX),
                "attention_mask": _pad([torch.ones_like(item["input_ids"]) for item in items], 0),
            }
        for name in ("input_features", "input_features_mask"):
            found = [item[name] for item in items if name in item]
            if found:
                batch[name] = torch.cat(found)
        units = [answer for item in items for answer in item["unit_labels"]]
        if any(len(answer) for answer in units):
            batch["unit_labels"] = _pad(units, IGNORE_INDEX)  # [answers, U]
        return batch


def _pad(rows: list[torch.Tensor], value: int) -> torch.Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=value)
