# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""OpenAI's HTTP endpoints, and those of sessions."""

import asyncio
import base64
import json
import os
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

import numpy as np
from fastapi import APIRouter, Depends, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from .audio import PCM_RATE, Resampler, decode, decode_base64, encode, to_pcm16
from .errors import APIError


router = APIRouter()
AudioFormat = Literal["wav", "mp3", "flac", "opus", "pcm16"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class InputAudio(_Strict):
    data: str
    format: AudioFormat | Literal["ogg"]


class AudioPart(_Strict):
    type: Literal["input_audio"]
    input_audio: InputAudio


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[TextPart | AudioPart, Field(discriminator="type")]]


class AudioOptions(_Strict):
    """`voice` may be any: a model has one."""

    voice: str | dict
    format: AudioFormat


class StreamOptions(_Strict):
    include_usage: bool = False


class ChatRequest(_Strict):
    """OpenAI's, of which `session` is not: the id of one whose conversation goes on with the one message."""

    model: str
    messages: list[Message] = Field(min_length=1)
    modalities: list[Literal["text", "audio"]] = ["text"]
    audio: AudioOptions | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_completion_tokens: int | None = None
    max_tokens: int | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    n: Literal[1] = 1
    session: str | None = None


def owner_of_request(request: Request) -> str:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return request.app.state.server.owner(key if scheme.lower() == "bearer" and key else None)


Owner = Annotated[str, Depends(owner_of_request)]


def sampling(temperature: float | None, top_p: float | None) -> dict:
    """Arguments of `generate`: by default the model's own."""
    if temperature is None and top_p is None:
        return {}
    if temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": 1.0 if temperature is None else temperature, "top_p": top_p or 1.0}


def with_instruction(content: list[dict], instruction: str) -> list[dict]:
    """What a question in speech alone says besides, as the model was trained."""
    if instruction and content and all(part["type"] == "audio" for part in content):
        return [*content, {"type": "text", "text": instruction}]
    return content


async def _read_messages(messages: list[Message], server) -> list[dict]:
    read = []
    for number, message in enumerate(messages):
        content = [{"type": "text", "text": message.content}] if isinstance(message.content, str) else []
        for index, part in enumerate([] if isinstance(message.content, str) else message.content):
            if isinstance(part, TextPart):
                content.append({"type": "text", "text": part.text})
                continue
            param = f"messages.{number}.content.{index}.input_audio"
            if message.role != "user":
                raise APIError("Only a user's message may have audio.", "invalid_value", param=param)
            server.check_modalities(hears=True, speaks=False)
            data = decode_base64(part.input_audio.data, f"{param}.data")
            audio = await asyncio.to_thread(
                decode, data, part.input_audio.format, server.limits.audio_seconds, f"{param}.data"
            )
            content.append({"type": "audio", "audio": audio, "sampling_rate": 16000})
        role = "system" if message.role == "developer" else message.role
        if message.role == "user":
            content = with_instruction(content, server.processor.speech_instruction)
        else:  # for templates that know text only
            content = "".join(part["text"] for part in content)
        read.append({"role": role, "content": content})
    if read[-1]["role"] != "user":
        raise APIError("The last message must be a user's.", "invalid_value", param="messages")
    return read


@router.post("/v1/chat/completions")
async def chat_completions(body: ChatRequest, request: Request, owner: Owner):
    server = request.app.state.server
    server.check_model(body.model)
    speaks = "audio" in body.modalities
    server.check_modalities(hears=False, speaks=speaks)
    if speaks and body.audio is None:
        raise APIError("`audio` must say in which format the answer shall come.", "missing_parameter", param="audio")
    if speaks and body.stream and body.audio.format != "pcm16":
        raise APIError("A stream's audio has the format `pcm16`.", "invalid_value", param="audio.format")
    number = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    options = sampling(body.temperature, body.top_p)
    options["max_new_tokens"] = server.check_new_tokens(number, "max_completion_tokens")
    messages = await _read_messages(body.messages, server)
    if body.session is not None and len(messages) != 1:
        raise APIError("A session goes on with one message: it knows the others.", "invalid_value", param="messages")

    stack = AsyncExitStack()
    try:
        session, memory = None, None
        if body.session is not None:
            session = await stack.enter_async_context(server.sessions.open(body.session, owner))
            memory = session.memory
        question = messages[0] if memory is not None else messages
        stream = await stack.enter_async_context(server.answer(question, memory, speaks, options, body.seed))
        completion = Completion(server, stream, session, body)
        if body.stream:
            return _EventStream(completion.events(), stack.pop_all())
        return await completion.whole(request)
    finally:
        await stack.aclose()


class _EventStream(StreamingResponse):
    """Server-sent events. What they are made with is closed after them, also where nobody waits for the rest."""

    def __init__(self, events: AsyncIterator[str], stack: AsyncExitStack):
        super().__init__(events, media_type="text/event-stream")
        self.stack = stack

    async def __call__(self, scope, receive, send) -> None:
        async with self.stack:
            await super().__call__(scope, receive, send)


class Completion:
    """An answer as OpenAI's chat completion."""

    def __init__(self, server, stream, session, body: ChatRequest):
        self.server, self.stream, self.session, self.body = server, stream, session, body
        self.id, self.audio_id = f"chatcmpl-{secrets.token_hex(12)}", f"audio_{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.speaks = "audio" in body.modalities

    async def whole(self, request: Request) -> dict:
        """The response of a request that does not stream."""
        text, waveform = "", [np.zeros(0, np.float32)]
        watching = asyncio.create_task(self._cancel_when_gone(request))
        try:
            async for event in self.stream:
                text += event.text or ""
                waveform += [] if event.waveform is None else [event.waveform.numpy()]
        finally:
            watching.cancel()
        await self._save()
        message = {"role": "assistant", "content": text, "refusal": None}
        if self.speaks:
            rate, encoding = self.server.speech_rate, self.body.audio.format
            if encoding == "opus" and rate not in (8000, 12000, 16000, 24000, 48000):
                raise APIError(f"Opus has no rate of {rate} Hz.", "invalid_value", param="audio.format")
            data = await asyncio.to_thread(encode, np.concatenate(waveform), rate, encoding)
            audio = {"id": self.audio_id, "data": base64.b64encode(data).decode(), "transcript": text}
            message |= {"content": None, "audio": audio | {"expires_at": self.created}}
        choice = {"index": 0, "message": message, "finish_reason": self.stream.answer.finish_reason, "logprobs": None}
        return self._object("chat.completion") | {"choices": [choice], "usage": self._usage()}

    async def events(self) -> AsyncIterator[str]:
        """The server-sent events of a request that streams."""
        pcm = Resampler(self.server.speech_rate, PCM_RATE) if self.speaks else None
        yield self._chunk({"role": "assistant", "content": None if self.speaks else ""})
        try:
            async for event in self.stream:
                if event.text and self.speaks:
                    yield self._chunk({"audio": {"id": self.audio_id, "transcript": event.text}})
                elif event.text:
                    yield self._chunk({"content": event.text})
                if event.waveform is not None and len(samples := pcm.push(event.waveform.numpy())):
                    yield self._audio(samples)
            if pcm is not None and len(samples := pcm.flush()):
                yield self._audio(samples)
            await self._save()
        except APIError as error:
            yield f"data: {json.dumps({'error': error.error})}\n\n"
            return
        if self.speaks:
            yield self._chunk({"audio": {"id": self.audio_id, "expires_at": self.created}})
        yield self._chunk({}, self.stream.answer.finish_reason)
        if self.body.stream_options is not None and self.body.stream_options.include_usage:
            usage = self._object("chat.completion.chunk") | {"choices": [], "usage": self._usage()}
            yield f"data: {json.dumps(usage)}\n\n"
        yield "data: [DONE]\n\n"

    async def _cancel_when_gone(self, request: Request) -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(0.5)
        self.stream.answer.cancel()

    async def _save(self) -> None:
        answer = self.stream.answer
        if self.session is not None and answer.finish_reason != "cancelled":
            await self.session.save(answer.conversation(self.server.answer_end_id))

    def _audio(self, samples: np.ndarray) -> str:
        data = base64.b64encode(to_pcm16(samples).tobytes()).decode()
        return self._chunk({"audio": {"id": self.audio_id, "data": data}})

    def _chunk(self, delta: dict, finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return f"data: {json.dumps(self._object('chat.completion.chunk') | {'choices': [choice]})}\n\n"

    def _object(self, kind: str) -> dict:
        named = {"id": self.id, "object": kind, "created": self.created, "model": self.server.name}
        return named if self.session is None else named | {"session": self.session.id}

    def _usage(self) -> dict:
        prompt, completion = self.stream.answer.prompt_tokens, len(self.stream.answer.tokens)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


@router.post("/v1/audio/speech")
async def speech(owner: Owner):
    raise APIError(
        "This model answers speech, and reads no text out: ask /v1/chat/completions for an answer in audio.",
        "not_implemented",
        501,
    )


@router.get("/v1/models")
async def models(request: Request, owner: Owner) -> dict:
    return {"object": "list", "data": [_model(request.app.state.server)]}


@router.get("/v1/models/{name:path}")
async def model(name: str, request: Request, owner: Owner) -> dict:
    request.app.state.server.check_model(name)
    return _model(request.app.state.server)


def _model(server) -> dict:
    return {"id": server.name, "object": "model", "created": 0, "owned_by": "ttt-omni"}


@router.get("/health")
async def health(request: Request) -> dict:
    server = request.app.state.server
    return {"status": "ok", "sessions": len(server.sessions.open_sessions), "answers": server.answers}


@router.post("/v1/sessions")
async def create_session(request: Request, owner: Owner) -> dict:
    """A new session; with a body, one that goes on from that memory, a file that was downloaded."""
    sessions = request.app.state.server.sessions
    with TemporaryDirectory() as folder:
        content = Path(folder, "memory.safetensors")
        size = 0
        with open(content, "wb") as file:
            async for chunk in request.stream():
                size += file.write(chunk)
        if size == 0:
            return sessions.describe(sessions.create(owner), owner)
        id = await asyncio.to_thread(sessions.adopt, content, owner)
    return await asyncio.to_thread(sessions.describe, id, owner)


@router.get("/v1/sessions/{id}")
async def session(id: str, request: Request, owner: Owner) -> dict:
    return await asyncio.to_thread(request.app.state.server.sessions.describe, id, owner)


@router.delete("/v1/sessions/{id}")
async def delete_session(id: str, request: Request, owner: Owner) -> dict:
    request.app.state.server.sessions.delete(id, owner)
    return {"id": id, "object": "session.deleted", "deleted": True}


@router.get("/v1/sessions/{id}/memory")
async def session_memory(id: str, request: Request, owner: Owner) -> StreamingResponse:
    """The file of its last completed turn, also while the next one replaces it."""
    path = request.app.state.server.sessions.check(id, owner)
    try:
        file = open(path, "rb")
    except FileNotFoundError:
        raise APIError("The session has no completed turn yet.", "no_memory", 404, "session") from None
    headers = {
        "Content-Length": str(os.fstat(file.fileno()).st_size),
        "Content-Disposition": 'attachment; filename="conversation.safetensors"',
    }
    blocks = iter(partial(file.read, 2**20), b"")
    return StreamingResponse(blocks, headers=headers, media_type="application/octet-stream")
