# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""`ttt-omni serve`, by OpenAI's own client."""

import base64
import io
import json
import time

import httpx
import numpy as np
import openai
import pytest
import soundfile
from layouts import sound

from serving import NAME, alone, assert_same_pcm, open_model, pcm16, question, running, wav
from ttt_omni.serving import realtime
from ttt_omni.serving.audio import VoiceActivity, decode
from ttt_omni.serving.server import Limits


TOKENS = 12
FIRST, SECOND = sound(2, 1), sound(2, 2)


@pytest.fixture(scope="module")
def parts(tiny_model_dir):
    return open_model(tiny_model_dir)


@pytest.fixture(scope="module")
def processor(parts):
    return parts[1]


@pytest.fixture(scope="module")
def served(parts, tmp_path_factory):
    with running(*parts, tmp_path_factory.mktemp("sessions")) as (address, server):
        yield address, server


@pytest.fixture
def client(served):
    return openai.OpenAI(base_url=f"http://{served[0]}/v1", api_key="none", max_retries=0)


def spoken(waveform):
    audio = {"type": "input_audio", "input_audio": {"data": wav(waveform), "format": "wav"}}
    return {"role": "user", "content": [audio]}


def ask(client, messages, stream=False, session=None, **kwargs):
    kwargs = {"modalities": ["text", "audio"], "max_completion_tokens": TOKENS} | kwargs
    if "audio" in kwargs["modalities"]:
        kwargs["audio"] = {"voice": "own", "format": "pcm16" if stream else "wav"}
    extra = None if session is None else {"session": session}
    return client.chat.completions.create(model=NAME, messages=messages, stream=stream, extra_body=extra, **kwargs)


def test_chat(client, parts):
    """Speech in and out, at once and as it comes: `generate`'s."""
    waveform = sound(3, 1)
    text, expected, _ = alone(*parts, question(waveform, parts[1]), tokens=TOKENS)
    answer = ask(client, [spoken(waveform)])
    (choice,) = answer.choices
    assert choice.message.audio.transcript == text and choice.message.content is None
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(choice.message.audio.data)), dtype="int16")
    assert rate == 16000
    np.testing.assert_array_equal(samples, pcm16(expected))
    assert choice.finish_reason in ("stop", "length") and answer.usage.completion_tokens <= TOKENS

    chunks = list(ask(client, [spoken(waveform)], stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta.model_dump().get("audio") or {} for chunk in chunks if chunk.choices]
    assert "".join(delta.get("transcript") or "" for delta in deltas) == text
    data = b"".join(base64.b64decode(delta.get("data") or "") for delta in deltas)
    assert_same_pcm(np.frombuffer(data, "<i2"), pcm16(expected, 16000))
    assert chunks[-1].usage == answer.usage
    assert sum(1 for delta in deltas if delta.get("data")) > 1


def test_chat_in_text(client, parts):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "A model."},
        {"role": "user", "content": "And who am I?"},
    ]
    text, *_ = alone(*parts, messages, tokens=TOKENS)
    answer = ask(client, messages, modalities=["text"])
    assert answer.choices[0].message.content == text and answer.choices[0].message.audio is None
    chunks = ask(client, messages, stream=True, modalities=["text"])
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    drawn = [ask(client, messages, modalities=["text"], temperature=1.5, seed=seed) for seed in (1, 1, 2)]
    first, second, third = (answer.choices[0].message.content for answer in drawn)
    assert first == second != third


def test_session_over_http(client, served, parts, tmp_path):
    """One message a time, with all before in mind; taken away as a file, and brought back."""
    http = httpx.Client(base_url=f"http://{served[0]}")
    id = http.post("/v1/sessions").json()["id"]
    memory, waveforms = None, [sound(2, 1), sound(3, 2), sound(1, 3)]
    for waveform in waveforms:
        text, _, memory = alone(*parts, question(waveform, parts[1]), memory, tokens=TOKENS)
        answer = ask(client, [spoken(waveform)], session=id)
        assert answer.choices[0].message.audio.transcript == text
        assert answer.session == id
    state = http.get(f"/v1/sessions/{id}").json()
    assert state["tokens"] == memory.input_ids.shape[1] and state["seconds"] == 90
    assert state["bytes"] == sum(x.nbytes for layer in memory.cache.layers for x in layer.tensors().values())
    gates = [layer["gate"] for layer in state["layers"]]
    assert gates[0] > 0.2 and gates[1] is None

    kept = tmp_path / "kept.safetensors"
    kept.write_bytes(http.get(f"/v1/sessions/{id}/memory").content)
    copy = http.post("/v1/sessions", content=kept.read_bytes()).json()
    assert copy["id"] != id and copy["tokens"] == state["tokens"]
    text, _, _ = alone(*parts, question(sound(2, 4), parts[1]), parts[0].load_memory(kept), tokens=TOKENS)
    for session in (id, copy["id"]):
        chunks = ask(client, [spoken(sound(2, 4))], stream=True, session=session)
        said = [(chunk.choices[0].delta.model_dump().get("audio") or {}).get("transcript") for chunk in chunks]
        assert "".join(filter(None, said)) == text
    assert http.delete(f"/v1/sessions/{id}").json()["deleted"]
    assert http.get(f"/v1/sessions/{id}").status_code == 404


class Talk:
    """A realtime session."""

    def __init__(self, connection):
        self.connection = connection
        self.created = self.next("session.created")

    def next(self, kind):
        """The next event of a kind; an error is one if it is not what is waited for."""
        while True:
            event = self.connection.recv()
            if event.type == kind:
                return event
            assert event.type != "error", event

    def append(self, waveform, rate=16000):
        pcm = pcm16(waveform, rate).tobytes()
        for start in range(0, len(pcm), 24000):
            self.connection.input_audio_buffer.append(audio=base64.b64encode(pcm[start : start + 24000]).decode())

    def say(self, waveform):
        """A turn of which no voice activity is to find the end."""
        self.append(waveform)
        self.connection.input_audio_buffer.commit()

    def begin_answer(self):
        """A long one, of which the first text has come."""
        self.connection.response.create(response={"max_output_tokens": 64})
        self.next("response.output_audio_transcript.delta")

    def answer(self, **response):
        self.connection.response.create(response={"max_output_tokens": TOKENS, **response})
        return self.collect()

    def collect(self):
        """Transcript, PCM16 and the last event of a response."""
        text, data, kinds = "", b"", []
        while True:
            event = self.connection.recv()
            kinds.append(event.type)
            assert event.type != "error", event
            if event.type in ("response.output_audio_transcript.delta", "response.output_text.delta"):
                text += event.delta
            if event.type == "response.output_audio.delta":
                data += base64.b64decode(event.delta)
            if event.type == "response.done":
                return text, np.frombuffer(data, "<i2"), event.response, kinds


def connect(client, session=None):
    return client.realtime.connect(model=NAME, extra_query={} if session is None else {"session": session})


def by_hand(talk):
    talk.connection.session.update(
        session={"type": "realtime", "audio": {"input": {"turn_detection": None}}, "max_output_tokens": TOKENS}
    )
    return talk.next("session.updated").session


def begin(connection, waveform):
    """A session in which `waveform` is said by hand, and waits for its answer."""
    talk = Talk(connection)
    by_hand(talk)
    talk.say(waveform)
    return talk


def heard(waveform):
    """What the server makes of PCM16 at 24 kHz."""
    return decode(pcm16(waveform, 16000).tobytes(), "pcm16", 60, "audio")


def test_realtime_of_20_turns(client, parts):
    memory = None
    with connect(client) as connection:
        talk = Talk(connection)
        assert talk.created.session.id.startswith("sess_")
        assert by_hand(talk).audio.input.turn_detection is None
        for turn in range(20):
            waveform = sound(1 + turn % 3 / 2, turn)
            if turn == 10:
                content = [{"type": "input_text", "text": "What did I say?"}]
                connection.conversation.item.create(item={"type": "message", "role": "user", "content": content})
                message = {"role": "user", "content": [{"type": "text", "text": "What did I say?"}]}
            else:
                talk.say(waveform)
                item = talk.next("conversation.item.added").item
                assert item.role == "user" and item.content[0].type == "input_audio"
                message = question(heard(waveform), parts[1])
            text, samples, response, kinds = talk.answer()
            expected, waveform, memory = alone(*parts, message, memory, tokens=TOKENS)
            assert text == expected
            assert_same_pcm(samples, pcm16(waveform, 16000))
            assert response.output[0].content[0].transcript == expected
            assert response.usage.input_tokens + response.usage.output_tokens in (
                memory.input_ids.shape[1] - 1,
                memory.input_ids.shape[1],
            )
            assert kinds.index("response.created") < kinds.index("response.output_audio.delta")


@pytest.fixture
def taken(monkeypatch):
    """What connections took from their buffers."""
    taken, take = [], realtime.InputBuffer.take
    monkeypatch.setattr(realtime.InputBuffer, "take", lambda self: taken.append(take(self)) or taken[-1])
    return taken


def spoken_question():
    """The question, its rate, and the seconds at which it begins and ends."""
    speech, rate = soundfile.read("examples/question.wav", dtype="float32")
    loud = np.flatnonzero(np.abs(speech) > 0.05) / rate
    return speech, rate, loud[0], loud[-1]


def test_voice_activity():
    speech, rate, begin, end = spoken_question()
    silence = np.zeros(rate, np.float32)
    activity, changes = VoiceActivity(0.5, 500), []
    stream = np.concatenate([silence, speech, silence, speech[: rate // 2], silence])
    for start in range(0, len(stream), 1000):
        changes += activity.push(stream[start : start + 1000])
    kinds, times = zip(*changes)
    assert kinds == ("start", "stop", "start", "stop")
    assert abs(times[0] / rate - (1 + begin)) < 0.2 and abs(times[1] / rate - (1 + end)) < 0.7
    whole = VoiceActivity(0.5, 500).push(stream)
    assert whole == changes


def test_voice_activity_answers_and_interrupts(client, parts, taken):
    """An open microphone: speech begins and ends a turn, and cuts an answer off."""
    speech, rate, begin, end = spoken_question()
    silence = np.zeros(rate, np.float32)
    with connect(client) as connection:
        talk = Talk(connection)
        talk.append(np.concatenate([silence, silence, speech, silence]))
        started = talk.next("input_audio_buffer.speech_started")
        assert abs(started.audio_start_ms - (1700 + 1000 * begin)) < 200  # 300 ms before
        stopped = talk.next("input_audio_buffer.speech_stopped")
        assert abs(stopped.audio_end_ms - (2000 + 1000 * end)) < 700
        committed = talk.next("input_audio_buffer.committed")
        assert committed.item_id == started.item_id == stopped.item_id
        first = talk.next("response.output_audio.delta")
        talk.append(speech[:rate])
        talk.next("input_audio_buffer.speech_started")
        done = talk.next("response.done").response
        assert (done.status, done.status_details.reason) == ("cancelled", "turn_detected")
        connection.conversation.item.truncate(item_id=first.item_id, content_index=0, audio_end_ms=0)
        talk.next("conversation.item.truncated")
        talk.append(silence)
        text, samples, response, _ = talk.collect()
        assert response.status in ("completed", "incomplete") and len(samples) > 0
        message, second = (question(samples, parts[1]) for samples in taken)
        _, _, memory = alone(*parts, message, tokens=1)
        prompt = memory.input_ids.shape[1] - 2
        memory.input_ids = memory.input_ids[:, [*range(prompt), prompt + 1]]  # of which no token was heard
        *_, heard_alone = parts[0].listen(parts[1].turn_pieces(message))
        memory.cache = heard_alone.cache
        memory.input_ids[:, prompt:] = parts[1].answer_end_id
        assert alone(*parts, second, memory, tokens=64)[0] == text


def test_truncated_in_mid_answer(client, parts, served):
    """The conversation goes on as if no more had been said than was heard, and so does its file."""
    with connect(client) as connection:
        talk = begin(connection, FIRST)
        id = talk.created.session.id
        _, samples, response, _ = talk.answer(max_output_tokens=30)
        (item,) = response.output
        end = len(samples) * 1000 // 24000
        connection.conversation.item.truncate(item_id=item.id, content_index=0, audio_end_ms=end // 2)
        talk.next("conversation.item.truncated")
        said = served[1].sessions.open_sessions[id].memory.input_ids
        prompt = response.usage.input_tokens
        num_tokens = said.shape[1] - prompt - 1
        assert 0 < num_tokens < response.usage.output_tokens
        _, _, memory = alone(*parts, question(heard(FIRST), parts[1]), tokens=num_tokens)
        assert memory.input_ids.tolist() == said.tolist()
        saved = parts[0].load_memory(served[1].sessions.folder / f"{id}.safetensors")
        assert saved.input_ids.tolist() == said.tolist()
        talk.say(SECOND)
        text, *_ = talk.answer()
        assert text == alone(*parts, question(heard(SECOND), parts[1]), memory, tokens=TOKENS)[0]


def test_cancelled_and_resumed(client, parts):
    """A response that is cancelled keeps what was said; who comes back goes on from there."""
    with connect(client) as connection:
        talk = begin(connection, FIRST)
        id = talk.created.session.id
        talk.begin_answer()
        connection.response.cancel()
        done = talk.next("response.done").response
        assert (done.status, done.status_details.reason) == ("cancelled", "client_cancelled")
        num_tokens = done.usage.output_tokens
        assert 0 < num_tokens < 64
    _, _, memory = alone(*parts, question(heard(FIRST), parts[1]), tokens=num_tokens)
    with again(client, id) as connection:
        talk = begin(connection, SECOND)
        text, *_ = talk.answer()
        assert text == alone(*parts, question(heard(SECOND), parts[1]), memory, tokens=TOKENS)[0]


def again(client, id):
    """The session, once the server has seen that its client is gone."""
    for _ in range(100):
        answer = httpx.get(f"{str(client.base_url).removesuffix('/v1/')}/health").json()
        if answer["sessions"] == 0:
            break
        time.sleep(0.05)
    return connect(client, id)


def test_instructions(client, parts):
    """Stand at the beginning, and stay."""
    with connect(client) as connection:
        talk = Talk(connection)
        by_hand(talk)
        id = talk.created.session.id
        connection.session.update(session={"type": "realtime", "instructions": "Be brief."})
        assert talk.next("session.updated").session.instructions == "Be brief."
        content = [{"type": "input_text", "text": "Hello."}]
        connection.conversation.item.create(item={"type": "message", "role": "user", "content": content})
        text, samples, response, _ = talk.answer(output_modalities=["text"])
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hello."}]},
        ]
        assert text == alone(*parts, messages, tokens=TOKENS)[0]
        assert len(samples) == 0 and response.output[0].content[0].text == text
    with again(client, id) as connection:
        talk = Talk(connection)
        assert talk.created.session.instructions == "Be brief."
        connection.session.update(session={"type": "realtime", "instructions": "Be long."})
        error = talk.next("error").error
        assert error.param == "session.instructions"


def test_gone_in_mid_answer(client, served):
    """Of a turn that its client did not wait for, nothing remains, and nobody goes on with it."""
    with connect(client) as connection:
        talk = begin(connection, FIRST)
        id = talk.created.session.id
        talk.begin_answer()
    with again(client, id):
        state = httpx.get(f"http://{served[0]}/v1/sessions/{id}").json()
        assert state["tokens"] == 0
        assert httpx.get(f"http://{served[0]}/health").json()["answers"] == 0


def test_idle(parts, tmp_path):
    with running(*parts, tmp_path, Limits(idle_seconds=0.3, new_tokens=64)) as (address, _):
        client = openai.OpenAI(base_url=f"http://{address}/v1", api_key="none")
        with connect(client) as connection:
            talk = Talk(connection)
            assert talk.next("error").error.code == "session_idle_timeout"
            with pytest.raises(Exception, match="1000"):
                connection.recv()


def test_speech_is_not_implemented(client):
    with pytest.raises(openai.InternalServerError, match="reads no text out") as raised:
        client.audio.speech.create(model=NAME, voice="own", input="Hello.")
    assert raised.value.status_code == 501
    assert json.loads(raised.value.response.text)["error"]["code"] == "not_implemented"
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "ttt-omni"
