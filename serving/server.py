# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""`ttt-omni serve`: the model, its engine and sessions, behind HTTP and WebSockets."""

import asyncio
import ipaddress
import secrets
import sys
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

from ..loading import find_device, quantization, read_config
from ..memory_ttt_omni import TTTOmniMemory
from ..modeling_ttt_omni import TTTOmniForCausalLM
from ..processing_ttt_omni import TTTOmniProcessor
from ..streaming_ttt_omni import TTTOmniStreamEvent
from .engine import Answer, Engine
from .errors import APIError, invalid
from .sessions import Sessions, owner_of


@dataclass(frozen=True)
class Limits:
    """
    What a server takes.

    Args:
        upload_mb: of a request.
        audio_seconds: of one recording, or of what is said in one turn.
        sessions: open at the same time, and answers being made.
        idle_seconds: after which a realtime session that nobody uses is closed.
        new_tokens: of an answer.
    """

    upload_mb: float = 100
    audio_seconds: float = 3600
    sessions: int = 16
    idle_seconds: float = 900
    new_tokens: int = 1024


class Server:
    """
    What all requests share.

    Args:
        model, processor: loaded.
        name: of the model, as clients call it.
        folder: of the sessions' memories.
        api_keys: those that are let in; none lets everyone in.
    """

    def __init__(
        self,
        model: TTTOmniForCausalLM,
        processor: TTTOmniProcessor,
        name: str,
        folder: Path,
        limits: Limits,
        api_keys: frozenset[str] = frozenset(),
    ):
        self.model, self.processor, self.name, self.limits = model, processor, name, limits
        self.api_keys = api_keys
        self.answer_end_id = processor.answer_end_id
        self.sessions = Sessions(folder, model, limits.sessions)
        self.engine = Engine(model, processor)
        self.answers = 0  # being made

    @property
    def speech_rate(self) -> int:
        """Hz, of the model's voice."""
        return self.model.config.vocoder_config.sampling_rate

    def owner(self, key: str | None) -> str:
        """
        Who comes with a key.

        Raises:
            APIError: if it is none of ours.
        """
        if not self.api_keys:
            return owner_of(None)
        if key is None:
            raise APIError("An API key is needed: `Authorization: Bearer KEY`.", "missing_api_key", 401)
        if not any(secrets.compare_digest(key.encode(), known.encode()) for known in self.api_keys):
            raise APIError("The API key is not one of this server's.", "invalid_api_key", 401)
        return owner_of(key)

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.name:
            raise APIError(f"This server's model is `{self.name}`, not `{name}`.", "model_not_found", 404, "model")

    def check_new_tokens(self, number: int | None, param: str) -> int:
        """The number of tokens that an answer may have."""
        number = self.limits.new_tokens if number is None else number
        if not 1 <= number <= self.limits.new_tokens:
            raise APIError(f"`{param}` must be from 1 to {self.limits.new_tokens}.", "invalid_value", param=param)
        return number

    def check_modalities(self, hears: bool, speaks: bool) -> None:
        """Raises for what this model does not do."""
        if hears and self.model.config.audio_config is None:
            raise APIError("This model does not hear: send text.", "unsupported_modality", param="input_audio")
        if speaks and not self.model.config.speaks:
            raise APIError(
                "This model does not speak: ask for text alone.", "unsupported_modality", param="modalities"
            )

    @asynccontextmanager
    async def answer(
        self, message: dict | list[dict], memory: TTTOmniMemory | None, speaks: bool, options: dict, seed: int | None
    ) -> AsyncIterator["AnswerStream"]:
        """
        An answer to the user's message, or where the conversation begins, to all its messages. It is cancelled at the
        end of the `with` block.

        Raises:
            APIError: if too many are being made.
        """
        if self.answers >= self.limits.sessions:
            raise APIError(f"{self.answers} answers are being made: try again later.", "too_many_answers", 429)
        pieces = self.processor.turn_pieces(message, None if memory is None else memory.input_ids)
        stream = AnswerStream(pieces, memory, speaks, options, seed)
        self.answers += 1
        try:
            self.engine.submit(stream.answer)
            yield stream
        finally:
            stream.answer.cancel()
            self.answers -= 1


class AnswerStream:
    """The events of an answer, as they come."""

    def __init__(self, pieces, memory, speaks, options, seed):
        loop, self.events = asyncio.get_running_loop(), asyncio.Queue()

        def deliver(event: TTTOmniStreamEvent | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self.events.put_nowait, event)

        self.answer = Answer(pieces, memory, deliver, speaks, options, seed)

    def __aiter__(self) -> "AnswerStream":
        return self

    async def __anext__(self) -> TTTOmniStreamEvent:
        event = await self.events.get()
        if event is not None:
            return event
        if isinstance(self.answer.error, ValueError):
            raise APIError(str(self.answer.error), "invalid_value")
        if self.answer.error is not None:
            raise APIError(f"The answer failed: {self.answer.error!r}.", "internal_error", 500)
        raise StopAsyncIteration


class Gate:
    """
    ASGI middleware that lets in what may come in: no pages of other sites, which a browser would let talk to this
    machine, and no request larger than the limit, of which no more is read.
    """

    def __init__(self, app, max_bytes: int, is_local: bool):
        self.app, self.max_bytes, self.is_local = app, max_bytes, is_local

    async def __call__(self, scope, receive, send):
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        if (error := self._refuse(headers)) is not None:
            return await _response(error)(scope, receive, send)
        seen, is_refused = 0, False

        async def counting_receive():
            nonlocal seen, is_refused
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.max_bytes:
                is_refused = True
                raise _too_large(self.max_bytes)
            return message

        async def send_unless_refused(message):
            if not is_refused:
                await send(message)

        try:
            await self.app(scope, counting_receive, send_unless_refused)
        except Exception:
            if not is_refused:
                raise
        if is_refused:
            await _response(_too_large(self.max_bytes))(scope, receive, send)

    def _refuse(self, headers: Headers) -> APIError | None:
        host = headers.get("host", "")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return APIError(f"Pages of {origin} may not use this server.", "foreign_origin", 403)
        if self.is_local and not _is_local(urlsplit(f"//{host}").hostname):
            return APIError(f"This server is for this machine, not {host}.", "foreign_host", 403)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.max_bytes:
            return _too_large(self.max_bytes)
        return None


def _too_large(max_bytes: int) -> APIError:
    return APIError(f"The request is larger than {max_bytes / 2**20:g} MB.", "request_too_large", 413)


def _is_local(host: str | None) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def _response(error: APIError) -> JSONResponse:
    return JSONResponse({"error": error.error}, error.status)


def make_app(server: Server, is_local: bool = True) -> FastAPI:
    """The ASGI application."""
    from . import chat, page, realtime

    @asynccontextmanager
    async def lifespan(app):
        yield
        await asyncio.to_thread(server.engine.close)

    app = FastAPI(title="TTT-Omni", lifespan=lifespan)
    app.state.server = server
    app.add_middleware(Gate, max_bytes=int(server.limits.upload_mb * 2**20), is_local=is_local)

    @app.exception_handler(APIError)
    async def api_error(request: Request, error: APIError):
        return _response(error)

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError):
        return _response(invalid(error.errors()))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException):
        message = f"{request.method} {request.url.path}: {error.detail}."
        return _response(
            APIError(message, "not_found" if error.status_code == 404 else "http_error", error.status_code)
        )

    @app.exception_handler(Exception)
    async def internal_error(request: Request, error: Exception):
        return _response(APIError(f"The server failed: {type(error).__name__}.", "internal_error", 500))

    for router in (chat.router, realtime.router, page.router):
        app.include_router(router)
    return app


def serve(
    model: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    memory: str | None = None,
    api_key: list[str] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
    upload_mb: float = 100,
    audio_minutes: float = 60,
    sessions: int = 16,
    idle_minutes: float = 15,
    new_tokens: int = 1024,
) -> None:
    """
    Serves a model until it is interrupted.

    Args:
        model: folder, or repository on the Hub; clients call it by its last name.
        host, port: where to listen.
        memory: folder of the sessions, which go on after a restart; by default they end with the server.
        api_key: keys that are let in; by default everyone on this machine is.
        device, dtype, quantize: as in `ttt-omni chat`.
        upload_mb, audio_minutes, sessions, idle_minutes, new_tokens: as in [`Limits`].

    Raises:
        ValueError, OSError: a model that cannot be loaded, limits of nothing, or an address for all without a key.
    """
    limits = Limits(upload_mb, audio_minutes * 60, sessions, idle_minutes * 60, new_tokens)
    if min(vars(limits).values()) <= 0:
        raise ValueError("A limit must be greater than 0.")
    is_local = _is_local(host)
    if not is_local and not api_key:
        raise ValueError(f"Everyone who reaches {host} could use the server: set an --api-key.")
    read_config(model)
    with ExitStack() as stack:
        if memory is None:
            memory = stack.enter_context(TemporaryDirectory(prefix="ttt-omni-"))
        folder = Path(memory)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        print(f"ttt-omni: Loading {model}", file=sys.stderr, flush=True)
        processor = TTTOmniProcessor.from_pretrained(model)
        options = {"dtype": dtype, "device_map": find_device(device), **quantization(quantize, model, dtype)}
        loaded = TTTOmniForCausalLM.from_pretrained(model, **options).eval()
        name = str(model).rstrip("/").rpartition("/")[2]
        server = Server(loaded, processor, name, folder, limits, frozenset(api_key or ()))
        config = uvicorn.Config(
            make_app(server, is_local),
            host=host,
            port=port,
            log_level="warning",
            ws_max_size=int(limits.upload_mb * 2**20),
        )
        running = uvicorn.Server(config)
        print(f"ttt-omni: {name} is at http://{host}:{port}", file=sys.stderr, flush=True)
        running.run()
