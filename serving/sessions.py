# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Conversations that outlast the server: each a file of its memory, which is whole at any moment."""

import asyncio
import hashlib
import json
import re
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

from ..conversation_file import locked
from ..files_ttt_omni import new_file
from ..memory_ttt_omni import TTTOmniMemory, memory_metadata
from ..modeling_ttt_omni import TTTOmniForCausalLM
from .errors import APIError


ID = re.compile(r"sess_[A-Za-z0-9_-]{43}")


class Session:
    """
    A conversation, while a client has it open.

    Args:
        folder: of the memories.
        id: of the session.
    """

    def __init__(self, folder: Path, id: str, model: TTTOmniForCausalLM):
        self.id, self.model = id, model
        self.path = folder / f"{id}.safetensors"
        self.memory: TTTOmniMemory | None = None  # after the last completed turn
        self.instructions: str | None = None
        self.saving: asyncio.Future | None = None

    def load(self) -> None:
        """Takes up what the file holds, if there is one."""
        if self.path.exists():
            self.memory = self.model.load_memory(self.path)
            self.instructions = memory_metadata(self.path).get("instructions")

    async def save(self, memory: TTTOmniMemory) -> None:
        """
        Replaces the file by one of a completed turn, also where nobody waits for it any longer.

        Raises:
            APIError: if it cannot be written.
        """
        self.saving = asyncio.ensure_future(asyncio.to_thread(self.write, memory))
        try:
            await asyncio.shield(self.saving)
        except (OSError, ValueError) as error:
            message = str(error).replace(str(self.path), "The session's memory")
            raise APIError(f"The turn could not be saved: {message}", "not_saved", 500) from None

    def write(self, memory: TTTOmniMemory) -> None:
        """The same, at once."""
        metadata = {"turn": "complete"}
        if self.instructions is not None:
            metadata["instructions"] = self.instructions
        self.model.save_memory(self.path, memory.cache, memory.input_ids, metadata=metadata)
        self.memory = memory

    def describe(self) -> dict:
        """Its size, and how much each layer adds to what attention sees."""
        return {"id": self.id, "object": "session", **describe(self.model, self.memory)}


def describe(model: TTTOmniForCausalLM, memory: TTTOmniMemory | None) -> dict:
    """`tokens`, `seconds` of speech heard, `bytes` of the memory, and of each layer its type, bytes and gate."""
    config, layers = model.config.get_text_config(), []
    for index, layer_type in enumerate(config.layer_types):
        held = {} if memory is None else memory.cache.layers[index].tensors()
        gate = getattr(model.model.language_model.layers[index], "ttt_gate", None)
        layers.append(
            {
                "type": layer_type,
                "bytes": sum(x.nbytes for x in held.values()),
                "gate": None if gate is None else round(float(gate.weight.detach().tanh().abs().mean()), 4),
            }
        )
    heard = 0
    if memory is not None and model.config.audio_token_id is not None:
        heard = int((memory.input_ids == model.config.audio_token_id).sum())
    return {
        "tokens": 0 if memory is None else memory.input_ids.shape[1],
        "seconds": round(heard * model.config.audio_downsample * 0.02, 1),  # the encoder's frames last 20 ms
        "bytes": sum(layer["bytes"] for layer in layers),
        "layers": layers,
    }


class Sessions:
    """
    The sessions of a folder. Beside each memory `ID.safetensors`, `ID.json` says whose it is.

    Args:
        folder: of the memories.
        max_open: how many may be open at the same time.
    """

    def __init__(self, folder: Path, model: TTTOmniForCausalLM, max_open: int):
        self.folder, self.model, self.max_open = folder, model, max_open
        self.open_sessions: dict[str, Session] = {}

    def create(self, owner: str) -> str:
        """The id of a new session, which nobody can guess."""
        id = f"sess_{secrets.token_urlsafe(32)}"
        with new_file(self.folder / f"{id}.json") as file:
            file.write_text(json.dumps({"owner": owner, "created": int(time.time())}))
        return id

    def adopt(self, content: Path, owner: str) -> str:
        """
        A new session that goes on from a memory that someone has kept.

        Raises:
            APIError: if that is none of this model's.
        """
        try:
            memory = self.model.load_memory(content)
            if memory.input_ids is None or memory.input_ids.shape[0] != 1:
                raise ValueError("It holds no conversation.")
            metadata = memory_metadata(content)
        except ValueError as error:
            message = str(error).replace(str(content), "The upload")
            raise APIError(message, "invalid_memory") from None
        id = self.create(owner)
        session = Session(self.folder, id, self.model)
        session.instructions = metadata.get("instructions")
        session.write(memory)
        return id

    def check(self, id: str, owner: str) -> Path:
        """
        Where the memory of a session is, or would be.

        Raises:
            APIError: if there is none of that id, or it is another's, which is the same to whoever asks.
        """
        record = self.folder / f"{id}.json"
        if not ID.fullmatch(id) or not record.is_file() or json.loads(record.read_text())["owner"] != owner:
            raise APIError("There is no session of that id.", "session_not_found", 404, "session")
        return self.folder / f"{id}.safetensors"

    def delete(self, id: str, owner: str) -> None:
        path = self.check(id, owner)
        if id in self.open_sessions:
            raise _in_use()
        for file in (path, path.with_suffix(".json")):
            file.unlink(missing_ok=True)

    def describe(self, id: str, owner: str) -> dict:
        """As [`Session.describe`], whether it is open or not."""
        self.check(id, owner)
        session = self.open_sessions.get(id)
        if session is None:
            session = Session(self.folder, id, self.model)
            session.load()
        return session.describe()

    @asynccontextmanager
    async def open(self, id: str, owner: str) -> AsyncIterator[Session]:
        """
        A session for one client, here and among all servers of the folder.

        Raises:
            APIError: as [`check`], or if another client has it, or too many are open.
        """
        path = self.check(id, owner)
        if id in self.open_sessions:
            raise _in_use()
        if len(self.open_sessions) >= self.max_open:
            raise APIError(f"{self.max_open} sessions are open already: try again later.", "too_many_sessions", 429)
        session, stack = Session(self.folder, id, self.model), ExitStack()
        self.open_sessions[id] = session
        stack.callback(self.open_sessions.pop, id)
        try:
            try:
                stack.enter_context(locked(path))
            except ValueError:
                raise _in_use() from None
            try:
                await asyncio.to_thread(session.load)
            except ValueError as error:
                message = str(error).replace(str(path), "The session's memory")
                raise APIError(message, "unreadable_session", 500) from None
            yield session
        finally:
            if session.saving is None or session.saving.done():
                stack.close()
            else:  # nobody may have it before
                session.saving.add_done_callback(lambda _: stack.close())


def _in_use() -> APIError:
    return APIError("Another client has this session open.", "session_in_use", 409, "session")


def owner_of(api_key: str | None) -> str:
    """What is known of the owner of a session without his key."""
    return "" if api_key is None else hashlib.sha256(api_key.encode()).hexdigest()
