# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""OpenAI's realtime protocol over a WebSocket: speech in and out, and a listener who may interrupt."""

import asyncio
import base64
import secrets
from contextlib import suppress
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, WebSocket, WebSocketDisconnect
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from .audio import MODEL_RATE, PCM_RATE, Resampler, VoiceActivity, decode, decode_base64, to_pcm16
from .chat import with_instruction
from .errors import APIError, invalid


router = APIRouter()
SUBPROTOCOL, KEY_SUBPROTOCOL = "realtime", "openai-insecure-api-key."  # as browsers, which set no headers, send them
GONE = "client_gone"  # why a response is cancelled of which nothing is kept
SHORTEST_MS = 100  # of what may be committed
SLICE = 4800  # bytes of PCM16 in 100 ms


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PCM(_Strict):
    type: Literal["audio/pcm"] = "audio/pcm"
    rate: Literal[24000] = 24000


class TurnDetection(_Strict):
    type: Literal["server_vad"] = "server_vad"
    threshold: float = Field(0.5, gt=0, lt=1)
    prefix_padding_ms: int = Field(300, ge=0, le=5000)
    silence_duration_ms: int = Field(500, ge=50, le=10000)
    create_response: bool = True
    interrupt_response: bool = True
    idle_timeout_ms: None = None


class AudioInput(_Strict):
    format: PCM = PCM()
    turn_detection: TurnDetection | None = TurnDetection()
    transcription: None = None
    noise_reduction: None = None


class AudioOutput(_Strict):
    """`voice` may be any: a model has one."""

    format: PCM = PCM()
    voice: str | dict | None = None
    speed: Literal[1] = 1


class SessionAudio(_Strict):
    input: AudioInput = AudioInput()
    output: AudioOutput = AudioOutput()


class _Options(_Strict):
    """What a session sets for its responses, and a response for itself."""

    output_modalities: list[Literal["text", "audio"]] = Field(["audio"], min_length=1, max_length=1)
    instructions: str | None = None
    max_output_tokens: int | Literal["inf"] = "inf"
    tools: list[Any] = Field([], max_length=0)
    tool_choice: Literal["auto", "none"] = "auto"


class SessionConfig(_Options):
    type: Literal["realtime"] = "realtime"
    model: str | None = None
    audio: SessionAudio = SessionAudio()
    include: None = None
    prompt: None = None
    tracing: None = None
    truncation: Literal["disabled"] | None = None


class ResponseConfig(_Options):
    audio: dict[Literal["output"], AudioOutput] = {}
    conversation: Literal["auto"] = "auto"
    metadata: dict[str, str] | None = None


class Part(_Strict):
    type: Literal["input_text", "input_audio"]
    text: str | None = None
    audio: str | None = None


class Item(_Strict):
    type: Literal["message"]
    role: Literal["user", "system"]
    content: list[Part] = Field(min_length=1)
    id: str | None = Field(None, max_length=64)
    object: Literal["realtime.item"] | None = None
    status: Literal["completed"] | None = None


class _Event(_Strict):
    event_id: str | None = Field(None, max_length=512)


class SessionUpdate(_Event):
    type: Literal["session.update"]
    session: dict[str, Any]


class Append(_Event):
    type: Literal["input_audio_buffer.append"]
    audio: str


class Commit(_Event):
    type: Literal["input_audio_buffer.commit"]


class Clear(_Event):
    type: Literal["input_audio_buffer.clear"]


class ItemCreate(_Event):
    type: Literal["conversation.item.create"]
    item: Item
    previous_item_id: str | None = None


class ItemTruncate(_Event):
    type: Literal["conversation.item.truncate"]
    item_id: str
    content_index: Literal[0]
    audio_end_ms: int = Field(ge=0)


class ResponseCreate(_Event):
    type: Literal["response.create"]
    response: dict[str, Any] = {}


class ResponseCancel(_Event):
    type: Literal["response.cancel"]
    response_id: str | None = None


CLIENT_EVENT = TypeAdapter(
    Annotated[
        SessionUpdate | Append | Commit | Clear | ItemCreate | ItemTruncate | ResponseCreate | ResponseCancel,
        Field(discriminator="type"),
    ]
)


class InputBuffer:
    """What is said and not committed yet, at 16 kHz, of a stream that comes as PCM16 at 24 kHz."""

    def __init__(self):
        self.resampler = Resampler(PCM_RATE, MODEL_RATE)
        self.odd = b""  # half a sample
        self.blocks: list[np.ndarray] = []
        self.begin = self.end = 0  # samples of the stream before and after what is kept

    def append(self, data: bytes) -> np.ndarray:
        """The samples `[samples]` that come of the next bytes."""
        data = self.odd + data
        even = len(data) // 2 * 2
        data, self.odd = data[:even], data[even:]
        samples = self.resampler.push(np.frombuffer(data, "<i2").astype(np.float32) / 32768)
        self.blocks.append(samples)
        self.end += len(samples)
        return samples

    def drop_before(self, position: int) -> None:
        """Forgets what is before a sample of the stream."""
        if position > self.begin:
            kept = np.concatenate(self.blocks)[position - self.begin :]
            self.blocks, self.begin = [kept], self.end - len(kept)

    def take(self) -> np.ndarray:
        """All that is kept, which then is no longer."""
        samples = np.concatenate([np.zeros(0, np.float32), *self.blocks])
        self.blocks, self.begin = [], self.end
        return samples

    def finish(self) -> None:
        """Ends the stream: what the resampler holds back of it comes, and another one begins."""
        self.blocks.append(self.resampler.flush())
        self.end += len(self.blocks[-1])
        self.resampler, self.odd = Resampler(PCM_RATE, MODEL_RATE), b""

    @property
    def seconds(self) -> float:
        return (self.end - self.begin) / MODEL_RATE


class Response:
    """An answer on its way to the client."""

    def __init__(self, options: _Options, metadata: dict | None):
        self.id, self.item_id = _new_id("resp"), _new_id("item")
        self.speaks = options.output_modalities == ["audio"]
        self.options, self.metadata = options, metadata
        self.text, self.answer = "", None
        self.samples = 0  # sent, at 24 kHz
        self.status, self.reason, self.error = "in_progress", None, None
        self.task: asyncio.Task | None = None

    def cancel(self, reason: str) -> None:
        if self.reason is None:
            self.reason = reason
        if self.answer is not None:
            self.answer.cancel()

    @property
    def part(self) -> dict:
        return {"type": "audio", "transcript": self.text} if self.speaks else {"type": "text", "text": self.text}

    @property
    def item(self) -> dict:
        content = {"type": "output_audio", "transcript": self.text}
        if not self.speaks:
            content = {"type": "output_text", "text": self.text}
        status = self.status if self.status in ("completed", "in_progress") else "incomplete"
        return {
            "id": self.item_id,
            "object": "realtime.item",
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [] if self.status == "in_progress" else [content],
        }

    def describe(self) -> dict:
        details = None
        if self.status != "in_progress":
            details = {"type": self.status, "reason": self.reason, "error": self.error}
        response = {
            "id": self.id,
            "object": "realtime.response",
            "status": self.status,
            "status_details": details,
            "output": [] if self.status == "in_progress" else [self.item],
            "output_modalities": self.options.output_modalities,
            "max_output_tokens": self.options.max_output_tokens,
            "metadata": self.metadata,
        }
        if self.answer is not None and self.status != "in_progress":
            prompt, tokens = self.answer.prompt_tokens, len(self.answer.tokens)
            usage = {"input_tokens": prompt, "output_tokens": tokens, "total_tokens": prompt + tokens}
            response["usage"] = usage
        return response


class Connection:
    """
    A client of a session.

    Args:
        websocket: accepted.
        server: the [`Server`].
        session: opened.
    """

    def __init__(self, websocket: WebSocket, server, session):
        self.websocket, self.server, self.session = websocket, server, session
        speaks = server.model.config.speaks
        self.config = SessionConfig(model=server.name, instructions=session.instructions)
        if not speaks:
            self.config.output_modalities = ["text"]
        self.buffer = InputBuffer()
        self.voice_activity = self._voice_activity()
        self.speech_item: str | None = None  # that of what is being said
        self.last_item: str | None = None
        self.unheard: list[dict] = []  # parts of the user's message that the next response answers
        self.response: Response | None = None  # that is being made
        self.said: Response | None = None  # the last one, which may be truncated

    async def run(self) -> None:
        """Until the client leaves, or is idle for too long."""
        await self.send("session.created", session=self._describe())
        try:
            while True:
                message = await self._receive()
                if message is None:
                    continue
                try:
                    await self.handle(message)
                except APIError as error:
                    await self.send_error(error, message)
        except WebSocketDisconnect:
            pass
        finally:
            if self.response is not None:
                self.response.cancel(GONE)
                await asyncio.wait([self.response.task])

    async def _receive(self) -> dict | None:
        while True:
            try:
                message = await asyncio.wait_for(self.websocket.receive(), self.server.limits.idle_seconds)
                break
            except TimeoutError:
                if self.response is None:
                    seconds = self.server.limits.idle_seconds
                    error = APIError(f"Nothing came for {seconds:g} s: the session is closed.", "session_idle_timeout")
                    await self.send_error(error)
                    await self.websocket.close(1000, "idle")
                    raise WebSocketDisconnect(1000) from None
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1000))
        text = message.get("text")
        if text is None:
            await self.send_error(APIError("Events are JSON in text messages, not binary ones.", "invalid_json"))
        return text

    async def handle(self, text: str) -> None:
        try:
            event = CLIENT_EVENT.validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)
            if first[0]["type"].startswith("union_tag"):
                raise APIError(
                    f"The event's type is none of a client's: {first[0]['msg']}.", "unknown_event"
                ) from None
            raise invalid(first) from None
        await getattr(self, f"_on_{type(event).__name__}")(event)

    async def send(self, kind: str, **fields) -> None:
        with suppress(RuntimeError, WebSocketDisconnect):  # it is gone, which whoever receives will see
            await self.websocket.send_json({"type": kind, "event_id": _new_id("event"), **fields})

    async def send_error(self, error: APIError, text: str = "") -> None:
        event_id = None
        with suppress(ValidationError):
            event_id = TypeAdapter(dict[str, Any]).validate_json(text).get("event_id")
        await self.send("error", error={**error.error, "event_id": event_id if isinstance(event_id, str) else None})

    def _describe(self) -> dict:
        config = self.config.model_dump()
        return {"object": "realtime.session", "id": self.session.id, **config}

    def _voice_activity(self) -> VoiceActivity | None:
        detection = self.config.audio.input.turn_detection
        if detection is None or self.server.model.config.audio_config is None:
            return None
        activity = VoiceActivity(detection.threshold, detection.silence_duration_ms)
        activity.position = self.buffer.end
        return activity

    async def _on_SessionUpdate(self, event: SessionUpdate) -> None:
        try:
            config = SessionConfig(**_merged(self.config.model_dump(), event.session))
        except ValidationError as error:
            raise _within("session", error) from None
        self.server.check_model(config.model)
        self._check(config, "session")
        is_new_detection = config.audio.input.turn_detection != self.config.audio.input.turn_detection
        self.config = config
        if self.session.memory is None:
            self.session.instructions = config.instructions
        if is_new_detection:
            self.voice_activity, self.speech_item = self._voice_activity(), None
        await self.send("session.updated", session=self._describe())

    def _check(self, options: _Options, param: str) -> None:
        self.server.check_modalities(hears=False, speaks=options.output_modalities == ["audio"])
        if options.max_output_tokens != "inf":
            self.server.check_new_tokens(options.max_output_tokens, f"{param}.max_output_tokens")
        if self.session.memory is not None and options.instructions != self.session.instructions:
            raise APIError(
                "Instructions stand at the beginning of a conversation, which this one is past.",
                "invalid_value",
                param=f"{param}.instructions",
            )

    async def _on_Append(self, event: Append) -> None:
        self.server.check_modalities(hears=True, speaks=False)
        data = decode_base64(event.audio, "audio")
        limit = self.server.limits.audio_seconds
        if self.buffer.seconds + len(data) / 2 / PCM_RATE > limit:
            raise APIError(
                f"More than the {limit:g} s allowed are in the buffer: commit or clear it.", "audio_too_long"
            )
        for start in range(0, len(data), SLICE):
            samples = self.buffer.append(data[start : start + SLICE])
            if self.voice_activity is not None:
                await self._listen(samples)
                await asyncio.sleep(0)  # for others

    async def _listen(self, samples: np.ndarray) -> None:
        """Looks whether someone begins or ceases to speak in the next samples."""
        for change, position in self.voice_activity.push(samples):
            await (self._speech_started if change == "start" else self._speech_stopped)(position)
        if self.speech_item is None:
            self.buffer.drop_before(self.buffer.end - self._padding() - MODEL_RATE)

    def _padding(self) -> int:
        return self.config.audio.input.turn_detection.prefix_padding_ms * MODEL_RATE // 1000

    async def _speech_started(self, position: int) -> None:
        self.speech_item = _new_id("item")
        begin = max(position - self._padding(), self.buffer.begin)
        self.buffer.drop_before(begin)
        milliseconds = begin * 1000 // MODEL_RATE
        await self.send("input_audio_buffer.speech_started", audio_start_ms=milliseconds, item_id=self.speech_item)
        if self.response is not None and self.config.audio.input.turn_detection.interrupt_response:
            self.response.cancel("turn_detected")

    async def _speech_stopped(self, position: int) -> None:
        milliseconds, item_id = position * 1000 // MODEL_RATE, self.speech_item
        self.speech_item = None
        await self.send("input_audio_buffer.speech_stopped", audio_end_ms=milliseconds, item_id=item_id)
        await self._commit(item_id)
        if self.config.audio.input.turn_detection.create_response:
            if self.response is not None:  # on its way out, or not to be interrupted
                await asyncio.wait([self.response.task])
            await self._respond(self.config, None)

    async def _on_Commit(self, event: Commit) -> None:
        if self.buffer.seconds * 1000 < SHORTEST_MS:
            raise APIError(
                f"The buffer has {self.buffer.seconds * 1000:.0f} ms of audio, at least {SHORTEST_MS} are needed.",
                "input_audio_buffer_commit_empty",
            )
        item_id, self.speech_item = self.speech_item or _new_id("item"), None
        self.buffer.finish()
        await self._commit(item_id)
        if self.voice_activity is not None:
            self.voice_activity = self._voice_activity()

    async def _commit(self, item_id: str) -> None:
        audio = self.buffer.take()
        self.unheard.append({"type": "audio", "audio": audio, "sampling_rate": MODEL_RATE})
        await self.send("input_audio_buffer.committed", item_id=item_id, previous_item_id=self.last_item)
        await self._add_item(item_id, [{"type": "input_audio", "transcript": None}])

    async def _on_Clear(self, event: Clear) -> None:
        self.buffer.take()
        self.speech_item = None
        if self.voice_activity is not None:
            self.voice_activity = self._voice_activity()
        await self.send("input_audio_buffer.cleared")

    async def _on_ItemCreate(self, event: ItemCreate) -> None:
        item, parts = event.item, []
        if event.previous_item_id not in (None, self.last_item):
            raise APIError("Items can only be added at the end.", "invalid_value", param="previous_item_id")
        for index, part in enumerate(item.content):
            param = f"item.content.{index}"
            if part.type == "input_text" and part.text is not None:
                parts.append({"type": "text", "text": part.text})
            elif part.type == "input_audio" and part.audio is not None:
                self.server.check_modalities(hears=True, speaks=False)
                data = decode_base64(part.audio, f"{param}.audio")
                audio = await asyncio.to_thread(decode, data, "pcm16", self.server.limits.audio_seconds, param)
                parts.append({"type": "audio", "audio": audio, "sampling_rate": MODEL_RATE})
            else:
                raise APIError(f"`{param}` has not what its type says.", "invalid_value", param=param)
        if item.role == "system":
            if self.session.memory is not None or self.unheard:
                raise APIError("A system message stands at the beginning.", "invalid_value", param="item.role")
            if any(part["type"] == "audio" for part in parts):
                raise APIError("A system message is text.", "invalid_value", param="item.content")
            self.session.instructions = self.config.instructions = "".join(part["text"] for part in parts)
        else:
            self.unheard += parts
        content = [part.model_dump(exclude_none=True, exclude={"audio"}) for part in item.content]
        await self._add_item(item.id or _new_id("item"), content, item.role)

    async def _add_item(self, item_id: str, content: list[dict], role: str = "user") -> None:
        item = {"id": item_id, "object": "realtime.item", "type": "message", "role": role}
        item |= {"status": "completed", "content": content}
        for kind in ("conversation.item.added", "conversation.item.done"):
            await self.send(kind, item=item, previous_item_id=self.last_item)
        self.last_item = item_id

    async def _on_ItemTruncate(self, event: ItemTruncate) -> None:
        if self.response is not None and self.response.item_id == event.item_id:
            self.response.cancel("client_cancelled")
            await asyncio.wait([self.response.task])
        said = self.said
        if said is None or said.item_id != event.item_id:
            raise APIError("Only the last answer can be truncated.", "item_not_found", param="item_id")
        if not said.speaks:
            raise APIError("The answer has no audio to truncate.", "invalid_value", param="item_id")
        heard = event.audio_end_ms * PCM_RATE // 1000
        if heard > said.samples:
            milliseconds = said.samples * 1000 // PCM_RATE
            raise APIError(f"The answer has {milliseconds} ms of audio.", "invalid_value", param="audio_end_ms")
        samples = heard * self.server.speech_rate // PCM_RATE
        num_tokens = await asyncio.to_thread(self.server.engine.heard_tokens, said.answer, samples)
        await self.session.save(said.answer.conversation(self.server.answer_end_id, num_tokens))
        await self.send(
            "conversation.item.truncated", item_id=event.item_id, content_index=0, audio_end_ms=event.audio_end_ms
        )

    async def _on_ResponseCreate(self, event: ResponseCreate) -> None:
        defaults = {name: getattr(self.config, name) for name in _Options.model_fields}
        try:
            options = ResponseConfig(**(defaults | event.response))
        except ValidationError as error:
            raise _within("response", error) from None
        self._check(options, "response")
        if options.instructions != self.config.instructions:
            raise APIError("Instructions are the session's.", "invalid_value", param="response.instructions")
        await self._respond(options, options.metadata)

    async def _respond(self, options: _Options, metadata: dict | None) -> None:
        if self.response is not None:
            raise APIError("A response is being made: cancel it first.", "conversation_already_has_active_response")
        if not self.unheard:
            raise APIError("There is nothing to answer: add a user's message first.", "nothing_to_answer")
        self.response = Response(options, metadata)
        self.response.task = asyncio.create_task(self._make(self.response))

    async def _on_ResponseCancel(self, event: ResponseCancel) -> None:
        if self.response is None or event.response_id not in (None, self.response.id):
            raise APIError("There is no such response being made.", "response_cancel_not_active")
        self.response.cancel("client_cancelled")

    async def _make(self, response: Response) -> None:
        """Answers what is unheard, and tells the client how it went."""
        where = {"response_id": response.id, "output_index": 0}
        part = {**where, "item_id": response.item_id, "content_index": 0}
        try:
            await self.send("response.created", response=response.describe())
            await self.send("response.output_item.added", **where, item=response.item)
            await self.send("conversation.item.added", item=response.item, previous_item_id=self.last_item)
            await self.send("response.content_part.added", **part, part=response.part)
            self.last_item = response.item_id
            try:
                await self._answer(response, part)
            except Exception as error:
                if not isinstance(error, APIError):
                    error = APIError(f"The answer failed: {error!r}.", "internal_error", 500)
                response.status, response.reason = "failed", None
                response.error = {"type": error.error["type"], "code": error.code, "message": error.message}
            if response.speaks:
                await self.send("response.output_audio.done", **part)
                await self.send("response.output_audio_transcript.done", **part, transcript=response.text)
            else:
                await self.send("response.output_text.done", **part, text=response.text)
            await self.send("response.content_part.done", **part, part=response.part)
            await self.send("response.output_item.done", **where, item=response.item)
            await self.send("conversation.item.done", item=response.item, previous_item_id=None)
        finally:
            self.response = None
        await self.send("response.done", response=response.describe())

    async def _answer(self, response: Response, part: dict) -> None:
        unheard, memory = self.unheard, self.session.memory
        content = with_instruction(unheard, self.server.processor.speech_instruction)
        question = {"role": "user", "content": content}
        if memory is None:
            system = [{"role": "system", "content": self.config.instructions}] if self.config.instructions else []
            question = [*system, question]
        number = response.options.max_output_tokens
        options = {"max_new_tokens": self.server.limits.new_tokens if number == "inf" else number}
        pcm = Resampler(self.server.speech_rate, PCM_RATE) if response.speaks else None
        async with self.server.answer(question, memory, response.speaks, options, None) as stream:
            response.answer = answer = stream.answer
            if response.reason is not None:  # cancelled before it began
                answer.cancel()
            kind = "output_audio_transcript" if response.speaks else "output_text"
            async for event in stream:
                if event.text:
                    response.text += event.text
                    await self.send(f"response.{kind}.delta", **part, delta=event.text)
                if event.waveform is not None:
                    await self._send_audio(response, part, pcm.push(event.waveform.numpy()))
            if pcm is not None and answer.finish_reason != "cancelled":
                await self._send_audio(response, part, pcm.flush())
        if answer.heard is not None and response.reason != GONE:
            conversation = answer.conversation(self.server.answer_end_id)
            self.unheard = self.unheard[len(unheard) :]
            await self.session.save(conversation)
            self.said = response
        response.status = {"stop": "completed", "length": "incomplete"}.get(answer.finish_reason, answer.finish_reason)
        if answer.finish_reason == "length":
            response.reason = "max_output_tokens"
        elif answer.finish_reason == "stop":
            response.reason = None

    async def _send_audio(self, response: Response, part: dict, samples: np.ndarray) -> None:
        if len(samples):
            response.samples += len(samples)
            delta = base64.b64encode(to_pcm16(samples).tobytes()).decode()
            await self.send("response.output_audio.delta", **part, delta=delta)


@router.websocket("/v1/realtime")
async def realtime(websocket: WebSocket, model: str | None = None, session: str | None = None) -> None:
    server = websocket.app.state.server
    offered = [name.strip() for name in websocket.headers.get("sec-websocket-protocol", "").split(",")]
    try:
        owner = server.owner(_key(websocket, offered))
        server.check_model(model)
        if session is None:
            session = server.sessions.create(owner)
        async with server.sessions.open(session, owner) as opened:
            await websocket.accept(subprotocol=SUBPROTOCOL if SUBPROTOCOL in offered else None)
            await Connection(websocket, server, opened).run()
    except APIError as error:
        await websocket.send_denial_response(JSONResponse({"error": error.error}, error.status))


def _key(websocket: WebSocket, offered: list[str]) -> str | None:
    scheme, _, key = websocket.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key:
        return key
    keys = [name.removeprefix(KEY_SUBPROTOCOL) for name in offered if name.startswith(KEY_SUBPROTOCOL)]
    return keys[0] if keys else None


def _merged(config: dict, update: dict) -> dict:
    """`config` with what `update` says, at any depth."""
    merged = dict(config)
    for name, value in update.items():
        both = isinstance(value, dict) and isinstance(config.get(name), dict)
        merged[name] = _merged(config[name], value) if both else value
    return merged


def _within(name: str, error: ValidationError) -> APIError:
    return invalid([item | {"loc": (name, *item["loc"])} for item in error.errors(include_url=False)])


def _new_id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(12)}"
