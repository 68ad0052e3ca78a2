# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""What clients get wrong, or try: each a clear error, after which the server serves on and is no larger."""

import base64
import gc
import json
import socket

import httpx
import psutil
import pytest
from layouts import sound
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from serving import NAME, open_model, pcm16, running, wav
from ttt_omni.commands.cli import main
from ttt_omni.serving.server import Limits


KEYS = ("first-key", "second-key")
REPEATS = 1000  # of bad requests, in which memory may not grow


@pytest.fixture(scope="module")
def served(tiny_model_dir, tmp_path_factory):
    limits = Limits(upload_mb=1, audio_seconds=10, sessions=3, new_tokens=64)
    with running(*open_model(tiny_model_dir), tmp_path_factory.mktemp("sessions"), limits, KEYS) as (address, server):
        yield address, server


@pytest.fixture(scope="module")
def http(served):
    with httpx.Client(base_url=f"http://{served[0]}", headers=bearer(KEYS[0]), timeout=60) as client:
        yield client


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def chat(content="Hello.", **kwargs):
    return {"model": NAME, "messages": [{"role": "user", "content": content}], "max_tokens": 4} | kwargs


def audio(data, format="wav"):
    return [{"type": "input_audio", "input_audio": {"data": data, "format": format}}]


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def header(rate: int, data_bytes: int = 8) -> str:
    """A WAV of nothing that announces a rate."""
    form = b"WAVEfmt " + (16).to_bytes(4, "little") + b"\x01\x00\x01\x00" + rate.to_bytes(4, "little")
    form += (2 * rate % 2**32).to_bytes(4, "little") + b"\x02\x00\x10\x00data" + data_bytes.to_bytes(4, "little")
    form += bytes(data_bytes)
    return b64(b"RIFF" + len(form).to_bytes(4, "little") + form)


SPOKEN = {"modalities": ["text", "audio"]}
# Bodies of /v1/chat/completions, the status, and what the message says.
CHATS = {
    "no json": ("{", 400, "no JSON"),
    "no messages": ({"model": NAME}, 400, "`messages`"),
    "another model": (chat(model="gpt-4o"), 404, "model is `tiny`"),
    "unknown parameter": (chat(tools=[]), 400, "`tools` is unknown"),
    "unknown role": ({"model": NAME, "messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role"),
    "no question": ({"model": NAME, "messages": [{"role": "assistant", "content": "x"}]}, 400, "last message"),
    "too many tokens": (chat(max_tokens=65), 400, "from 1 to 64"),
    "no tokens": (chat(max_tokens=0), 400, "from 1 to 64"),
    "temperature": (chat(temperature=-1), 400, "`temperature`"),
    "audio format missing": (chat(**SPOKEN), 400, "in which format"),
    "stream in wav": (chat(**SPOKEN, stream=True, audio={"voice": "a", "format": "wav"}), 400, "`pcm16`"),
    "no base64": (chat(audio("§§§")), 400, "not base64"),
    "no audio": (chat(audio(b64(b"This is no audio."))), 400, "cannot be read as audio"),
    "empty audio": (chat(audio("")), 400, "cannot be read as audio"),
    "half a header": (chat(audio(wav(sound(1))[:40])), 400, "cannot be read as audio"),
    "rate of 0 Hz": (chat(audio(header(0))), 400, ""),
    "rate of 3 GHz": (chat(audio(header(3_000_000_000))), 400, "cannot be read as audio"),
    "NaN": (chat(audio(wav(sound(1) * float("nan")))), 400, "NaN"),
    "too long": (chat(audio(wav(sound(12)))), 413, "longer than the 10 s"),
    "audio of the assistant": (
        {"model": NAME, "messages": [{"role": "assistant", "content": audio(wav(sound(1)))}]}, 400, "Only a user's"
    ),
    "no session": (chat(session="sess_unknown"), 404, "no session of that id"),
    "out of the folder": (chat(session="../../etc/passwd"), 404, "no session of that id"),
}  # fmt: skip
# Requests that are wrong by more than their body.
REQUESTS = {
    "no key": (("GET", "/v1/models", None, {"Authorization": ""}), 401, "API key is needed"),
    "wrong key": (("GET", "/v1/models", None, bearer("guess")), 401, "not one of this server's"),
    "page of another site": (("GET", "/v1/models", None, {"Origin": "http://evil.example"}), 403, "may not use"),
    "rebound name": (("GET", "/v1/models", None, {"Host": "evil.example"}), 403, "for this machine"),
    "2 GB announced": (("POST", "/v1/sessions", None, {"Content-Length": str(2**31)}), 413, "larger than 1 MB"),
    "2 MB that come": (("POST", "/v1/sessions", bytes(2**21), {}), 413, "larger than 1 MB"),
    "no memory": (("POST", "/v1/sessions", b"no safetensors", {}), 400, "damaged or no safetensors"),
    "path in an id": (("GET", "/v1/sessions/..%2f..%2fetc%2fpasswd", None, {}), 404, ""),
    "unknown path": (("GET", "/v2", None, {}), 404, "Not Found"),
    "wrong method": (("PUT", "/v1/models", None, {}), 405, "Not Allowed"),
}
IMAGE = {"type": "message", "role": "user", "content": [{"type": "input_image"}]}
# Events of a realtime session.
EVENTS = {
    "no json": ("{", "no JSON"),
    "no object": ("[]", ""),
    "no type": ({"event_id": "mine"}, "none of a client's"),
    "unknown event": ({"type": "session.destroy", "event_id": "mine"}, "none of a client's"),
    "binary": (b"\x00", "not binary"),
    "no base64": ({"type": "input_audio_buffer.append", "audio": "§"}, "not base64"),
    "empty commit": ({"type": "input_audio_buffer.commit"}, "at least 100"),
    "nothing to answer": ({"type": "response.create"}, "nothing to answer"),
    "nothing to cancel": ({"type": "response.cancel"}, "no such response"),
    "wrong rate": (
        {"type": "session.update", "session": {"audio": {"input": {"format": {"type": "audio/pcm", "rate": 8000}}}}},
        "session.audio.input.format.rate",
    ),
    "tools": ({"type": "session.update", "session": {"tools": [{"type": "function"}]}}, "session.tools"),
    "another model": ({"type": "session.update", "session": {"model": "gpt-realtime"}}, "model is `tiny`"),
    "unknown field": ({"type": "session.update", "session": {"memory": "/etc"}}, "session.memory"),
    "nothing to truncate": (
        {"type": "conversation.item.truncate", "item_id": "x", "content_index": 0, "audio_end_ms": 1},
        "Only the last answer",
    ),
    "an image": ({"type": "conversation.item.create", "item": IMAGE}, "item.content.0.type"),
    "too long": ({"type": "input_audio_buffer.append", "audio": b64(bytes(24000 * 2 * 11))}, "More than the 10 s"),
}  # fmt: skip


def send(http, method, path, content, headers):
    if method == "POST" and headers.get("Content-Length"):  # of what never comes
        with socket.create_connection((http.base_url.host, http.base_url.port)) as connection:
            lines = [f"POST {path} HTTP/1.1", f"Host: {http.base_url.netloc.decode()}"]
            lines += [f"{name}: {value}" for name, value in {**bearer(KEYS[0]), **headers}.items()]
            connection.sendall("\r\n".join([*lines, "", ""]).encode())
            head, _, body = connection.recv(2**16).partition(b"\r\n\r\n")
            return int(head.split()[1]), json.loads(body or connection.recv(2**16))
    response = http.request(method, path, content=content, headers=headers)
    return response.status_code, response.json()


def assert_error(body, says):
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert says in body["error"]["message"] and len(body["error"]["message"]) > 10


@pytest.mark.parametrize("body, status, says", CHATS.values(), ids=CHATS)
def test_chat(http, body, status, says):
    content = body if isinstance(body, str) else json.dumps(body)
    response = http.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == status, response.text
    assert_error(response.json(), says)


@pytest.mark.parametrize("request_, status, says", REQUESTS.values(), ids=REQUESTS)
def test_request(http, request_, status, says):
    found, body = send(http, *request_)
    assert found == status, body
    assert_error(body, says)


def realtime(served, query="", key=KEYS[0]):
    return connect(f"ws://{served[0]}/v1/realtime?{query}", additional_headers=bearer(key))


def receive(websocket, kind):
    while (event := json.loads(websocket.recv(timeout=60)))["type"] != kind:
        pass
    return event


def test_events(served):
    """All in one session, which lives on, and says to which event an error belongs."""
    with realtime(served) as websocket:
        for name, (event, says) in EVENTS.items():
            websocket.send(json.dumps(event) if isinstance(event, dict) else event)
            error = receive(websocket, "error")["error"]
            assert says in error["message"] and len(error["message"]) > 10, (name, error)
            assert error["event_id"] == (event.get("event_id") if isinstance(event, dict) else None)
        websocket.send(json.dumps({"type": "input_audio_buffer.clear"}))
        receive(websocket, "input_audio_buffer.cleared")


def refused(served, status, says, query="", key=KEYS[0]):
    with pytest.raises(InvalidStatus) as error, realtime(served, query, key):
        pass
    assert error.value.response.status_code == status
    assert_error(json.loads(error.value.response.body), says)


def test_sessions_of_others(served, http):
    id = http.post("/v1/sessions").json()["id"]
    for method, path in (("GET", ""), ("GET", "/memory"), ("DELETE", "")):
        status, body = send(http, method, f"/v1/sessions/{id}{path}", None, bearer(KEYS[1]))
        assert status == 404
        assert_error(body, "no session of that id")
    refused(served, 404, "no session of that id", f"session={id}", KEYS[1])
    refused(served, 401, "not one of this server's", f"session={id}", "guess")
    refused(served, 404, "model is `tiny`", "model=other")
    refused(served, 404, "no session of that id", "session=../../etc/passwd")


def test_two_clients_on_one_session(served, http):
    id = http.post("/v1/sessions").json()["id"]
    with realtime(served, f"session={id}"):
        refused(served, 409, "Another client", f"session={id}")
        assert http.post("/v1/chat/completions", json=chat(session=id)).status_code == 409
        assert http.delete(f"/v1/sessions/{id}").status_code == 409
        with realtime(served), realtime(served):
            refused(served, 429, "3 sessions are open")
    assert http.get(f"/v1/sessions/{id}").status_code == 200


def test_clients_that_leave(served, http):
    """In the middle of a request, of a stream, and of an answer."""
    with socket.create_connection((http.base_url.host, http.base_url.port)) as connection:
        connection.sendall(b"POST /v1/sessions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\nonly this")
    body = chat(max_tokens=64, stream=True)
    with http.stream("POST", "/v1/chat/completions", json=body) as response:
        next(response.iter_lines())
    with realtime(served) as websocket:
        content = [{"type": "input_text", "text": "Hello."}]
        item = {"type": "message", "role": "user", "content": content}
        websocket.send(json.dumps({"type": "conversation.item.create", "item": item}))
        websocket.send(json.dumps({"type": "response.create"}))
        receive(websocket, "response.output_audio_transcript.delta")
        websocket.close_socket()
    assert_serves(http)


def assert_serves(http):
    response = http.post("/v1/chat/completions", json=chat())
    assert response.status_code == 200 and response.json()["usage"]["completion_tokens"] > 0
    for _ in range(1200):
        health = http.get("/health").json()
        if health["sessions"] == health["answers"] == 0:
            break
    assert health == {"status": "ok", "sessions": 0, "answers": 0}


def test_memory_is_flat(served, http):
    chats = [body if isinstance(body, str) else json.dumps(body) for body, *_ in CHATS.values()]
    requests = [request for request, *_ in REQUESTS.values()]
    events = [json.dumps(event) if isinstance(event, dict) else event for event, _ in EVENTS.values()]

    def repeat(number):
        for index in range(number // 3):
            content = chats[index % len(chats)]
            http.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
            send(http, *requests[index % len(requests)])
        for start in range(0, number // 3, len(events)):
            with realtime(served) as websocket:
                for event in events[: number // 3 - start]:
                    websocket.send(event)
                    receive(websocket, "error")
        gc.collect()
        return psutil.Process().memory_info().rss

    before = repeat(REPEATS // 4)
    after = repeat(REPEATS)
    assert after - before < 30 * 2**20
    assert_serves(http)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--host=0.0.0.0"], "set an --api-key"),
        (["--sessions=0"], "greater than 0"),
        (["--model=nowhere"], "neither a folder"),
    ],
    ids=["everyone", "no sessions", "no model"],
)
def test_command(tiny_model_dir, capsys, arguments, says):
    with pytest.raises(SystemExit):
        main(["serve", f"--model={tiny_model_dir}", *arguments])
    assert says in capsys.readouterr().err


def test_audio_that_is_no_whole_sample(served):
    """One byte more or less is no error: the other half comes with the next piece."""
    with realtime(served) as websocket:
        data = pcm16(sound(1), 16000).tobytes()
        update = {"type": "session.update", "session": {"audio": {"input": {"turn_detection": None}}}}
        websocket.send(json.dumps(update))
        for piece in (data[:1001], data[1001:]):
            websocket.send(json.dumps({"type": "input_audio_buffer.append", "audio": b64(piece)}))
        websocket.send(json.dumps({"type": "input_audio_buffer.commit"}))
        receive(websocket, "input_audio_buffer.committed")
