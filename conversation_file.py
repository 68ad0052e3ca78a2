# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""A conversation on disk, from which a command that was killed at any moment goes on."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .memory_ttt_omni import TTTOmniMemory, memory_metadata
from .modeling_ttt_omni import TTTOmniForCausalLM


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@dataclass
class UnfinishedTurn:
    """
    What is known of a turn whose answer is not complete.

    Args:
        begins: index of its first token.
        pieces: how many of the pieces of its prompt were heard.
        recording: digest of the windows among them.
        state: "listening", or "answering" once all was heard.
    """

    begins: int
    pieces: int
    recording: str
    state: str


@dataclass
class UnfinishedCommand:
    """
    A command of several questions that has not come to its end.

    Args:
        questions: how many it has.
        answered: the digests of the recordings that were answered.
    """

    questions: int = 1
    answered: list[str] = field(default_factory=list)


class ConversationFile:
    """
    The completed turns in the file `path`; and beside it, in `path`.unfinished, these with what was heard of the next
    turn, until that is complete.

    Each is replaced as a whole. The latter names the content of the former that it follows, and is taken for nothing
    where that is another, as after a turn that was completed and a kill before it was removed.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.unfinished = self.path.with_name(f"{self.path.name}.unfinished")
        self.content = self._digest()

    def load(self, model: TTTOmniForCausalLM, answer_end_id: int) -> TTTOmniMemory | None:
        """
        The conversation after the last completed turn; `None` if there is none yet.

        Raises:
            ValueError: if it ends elsewhere, or as [`load_memory`].
        """
        if not self.path.exists():
            return None
        memory = model.load_memory(self.path)
        if memory.input_ids is None:
            raise ValueError(f"{self.path} holds no tokens: it is none that `ttt-omni` saved.")
        state = memory_metadata(self.path).get("turn")
        if state is None:  # from `save_memory`, or an earlier version
            state = "complete" if memory.input_ids[0, -1] == answer_end_id else None
        if state is None:
            raise ValueError(
                f"{self.path} ends in the middle of a turn, and does not say in which recording: begin a new file."
            )
        if state != "complete":
            raise ValueError(
                f"{self.path} holds an unfinished turn, which goes on with the file that it stood beside: pass that."
            )
        return memory

    def command(self) -> UnfinishedCommand:
        """That in which the last turn was completed."""
        metadata = memory_metadata(self.path) if self.path.exists() else {}
        with _readable(self.path):
            command = json.loads(metadata.get("command", "{}"))
            return UnfinishedCommand(int(command.get("questions", 1)), list(command.get("answered", [])))

    def save(self, model: TTTOmniForCausalLM, memory: TTTOmniMemory, command: UnfinishedCommand) -> None:
        """Save a completed turn."""
        metadata = {"turn": "complete", "command": json.dumps(vars(command))}
        model.save_memory(self.path, memory.cache, memory.input_ids, metadata=metadata)
        self.content = self._digest()
        self.unfinished.unlink(missing_ok=True)

    def unfinished_turn(self) -> UnfinishedTurn | None:
        """What [`save_unfinished`] wrote since the last completed turn, if anything."""
        if not self.unfinished.exists():
            return None
        metadata = memory_metadata(self.unfinished)
        if metadata.pop("follows", None) != self.content:
            return None
        with _readable(self.unfinished):
            begins, pieces = int(metadata["begins"]), int(metadata["pieces"])
            return UnfinishedTurn(begins, pieces, metadata["recording"], metadata["turn"])

    def load_unfinished(self, model: TTTOmniForCausalLM) -> TTTOmniMemory:
        """The conversation with what was heard of the unfinished turn."""
        return model.load_memory(self.unfinished)

    def save_unfinished(self, model: TTTOmniForCausalLM, memory: TTTOmniMemory, turn: UnfinishedTurn) -> None:
        """Save what was heard of a turn."""
        metadata = {
            "turn": turn.state,
            "begins": str(turn.begins),
            "pieces": str(turn.pieces),
            "recording": turn.recording,
            "follows": self.content,
        }
        model.save_memory(self.unfinished, memory.cache, memory.input_ids, metadata=metadata)

    def _digest(self) -> str:
        """That of the completed turns' file; "" while there is none."""
        if not self.path.is_file():
            return ""
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns what unexpected metadata lead to into one line."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: it does not say what is in it ({error!r}).") from error


class RecordedPieces:
    """
    Passes on the pieces of a prompt, and remembers of all so far their number of tokens, and a digest of the windows
    among them: of all that the model hears of a recording.
    """

    def __init__(self, pieces: Iterator[dict[str, torch.Tensor]]):
        self.pieces = pieces
        self.sha = hashlib.sha256()
        self.lengths, self.recordings = [0], [self.sha.hexdigest()]  # of the first 0, 1, 2, … pieces

    def __iter__(self) -> "RecordedPieces":
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        piece = next(self.pieces)
        if "input_features" in piece:
            self.sha.update(piece["input_features"].numpy().tobytes())
        self.lengths.append(self.lengths[-1] + piece["input_ids"].shape[1])
        self.recordings.append(self.sha.hexdigest())
        return piece

    def heard(self, num_tokens: int) -> tuple[int, str]:
        """How many pieces the first tokens are, and the digest of the windows among them."""
        pieces = self.lengths.index(num_tokens)
        return pieces, self.recordings[pieces]


@contextmanager
def locked(path: str | os.PathLike) -> Iterator[None]:
    """
    Keeps other commands from `path`, by a lock file `.NAME.lock` beside it; of one that was killed the system lets go.

    Raises:
        ValueError: if another command keeps it.
    """
    path = Path(path).resolve()
    lock = path.with_name(f".{path.name}.lock")
    descriptor = _acquire(lock, path)
    try:
        yield
    finally:
        with suppress(OSError):
            os.unlink(lock)
        os.close(descriptor)


def _acquire(lock: Path, path: Path) -> int:
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise ValueError(f"Another command is using {path}: wait for its end, or choose another name.") from None
        except (OSError, AttributeError):  # neither the file system nor the system has any
            return descriptor
        if _is_file(descriptor, lock):
            return descriptor
        os.close(descriptor)  # its last holder has removed it meanwhile


def _is_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
