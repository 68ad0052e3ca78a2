# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
import base64
import functools
import http.server
import io
import json
import os
import socket
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor
from transformers.utils import ModelOutput

from ttt_omni import TTTOmniConfig
from ttt_omni.audio_ttt_omni import read_audio
from ttt_omni.configuration_ttt_omni import audio_embedding_lengths
from ttt_omni.processing_ttt_omni import TTTOmniProcessor


GOLDENS = Path(__file__).parent / "goldens" / "llama_omni_tiny"
AUDIO = "<|reserved_special_token_0|>"
QUESTION = "Please directly answer the questions in the user's speech."


def make_processor(chunk_length=30, **kwargs):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(GOLDENS)
    return TTTOmniProcessor(WhisperFeatureExtractor(feature_size=128, chunk_length=chunk_length), tokenizer, **kwargs)


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture(scope="module")
def short_processor():
    """Windows of one second: 100 mel frames and 10 embeddings."""
    return make_processor(chunk_length=1)


def noise(samples, seed=0):
    return (0.1 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def user(*content):
    return [{"role": "user", "content": list(content)}]


def audio_item(audio, **kwargs):
    return {"type": "audio", "audio": audio, **kwargs}


def text_item(text):
    return {"type": "text", "text": text}


def tokenize(processor, conversation, **kwargs):
    return processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=kwargs
    )


# The original's prompt and spectrogram


def test_golden_prompt_and_mel(processor, golden):
    conversation = user(audio_item(golden["waveform"], sampling_rate=16000), text_item(QUESTION))
    inputs = processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    expected = []
    for token in json.loads((GOLDENS / "prompt_golden.json").read_text())["prompt_ids_with_speech_at_minus_200"]:
        expected += [processor.audio_token_id] * 300 if token == -200 else [token]
    assert inputs["input_ids"].tolist() == [expected]
    assert inputs["attention_mask"].all()
    assert set(inputs) == set(processor.model_input_names)
    # In float64, the golden itself is off by 4.3e-5, where the FFT of another CPU may be too.
    torch.testing.assert_close(inputs["input_features"][0].T, golden["mel"], atol=1e-4, rtol=0)


def test_golden_prompt_text(processor):
    text = processor.apply_chat_template(user({"type": "audio"}, text_item(QUESTION)), add_generation_prompt=True)
    golden = json.loads((GOLDENS / "prompt_golden.json").read_text())["prompt_text"]
    assert text == "<|begin_of_text|>" + golden.replace("<speech>", AUDIO)


def turn(role, text):
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>"


@pytest.mark.parametrize(
    "content, expected",
    [
        ("  Hello. \n", "Hello."),
        ([text_item(" Hello. ")], "Hello."),
        ([{"type": "audio"}], AUDIO),
        ([{"type": "audio"}, {"type": "audio"}, text_item("Which?")], f"{AUDIO}\n{AUDIO}\nWhich?"),
        ([text_item("Listen: "), {"type": "audio"}], f"Listen: {AUDIO}"),
    ],
)
def test_template_content(processor, content, expected):
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]
    text = processor.apply_chat_template(conversation)
    assert text == "<|begin_of_text|>" * 2 + turn("system", "Be brief.") + turn("user", expected)


def test_template_turns(processor):
    conversation = [
        {"role": "system", "content": ""},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": [text_item("Two. ")]},
        {"role": "user", "content": "Three?"},
    ]
    text = processor.apply_chat_template(conversation, add_generation_prompt=True)
    turns = turn("user", "One?") + turn("assistant", "Two.") + turn("user", "Three?")
    assert text == "<|begin_of_text|>" * 2 + turns + "<|start_header_id|>assistant<|end_header_id|>\n\n"
    continued = processor.apply_chat_template(conversation[:3], continue_final_message=True)
    assert continued.endswith("\n\nTwo.")


@pytest.mark.parametrize(
    "message", [{"role": "human", "content": "Hello."}, {"role": "user", "content": [{"type": "image"}]}]
)
def test_template_rejects(processor, message):
    with pytest.raises(Exception, match="'human'|'image'"):
        processor.apply_chat_template([message])


def test_rendered_prompt_gets_no_third_bos(processor):
    conversation = user(audio_item(noise(1600), sampling_rate=16000), text_item("What is it?"))
    prompt = processor.apply_chat_template(conversation)
    inputs = processor(text=prompt, audio=noise(1600), sampling_rate=16000, return_tensors="pt")
    assert torch.equal(inputs["input_ids"], tokenize(processor, conversation)["input_ids"])
    assert processor(text="Hello.")["input_ids"][0][0] == processor.tokenizer.bos_token_id


def test_assistant_mask(short_processor):
    conversations = [
        user(audio_item(noise(20000), sampling_rate=16000), text_item("One?"))
        + [{"role": "assistant", "content": "Two."}]
        + user(text_item("Three?"), audio_item(noise(100), sampling_rate=16000))
        + [{"role": "assistant", "content": "Four, five."}],
        user(text_item("Six?")) + [{"role": "assistant", "content": "Seven."}],
    ]
    inputs = short_processor.apply_chat_template(
        conversations, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
    )
    answers = [
        short_processor.decode(ids[mask.bool()]) for ids, mask in zip(inputs["input_ids"], inputs["assistant_masks"])
    ]
    assert answers == ["Two.<|eot_id|>Four, five.<|eot_id|>", "Seven.<|eot_id|>"]


# Windows and placeholders


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 50000), max_size=3), min_size=1, max_size=3),
    st.booleans(),
    st.sampled_from([5, 7]),
)
def test_placeholders_are_exact(lengths, drop, downsample):
    processor = make_processor(chunk_length=1, audio_downsample=downsample)
    waveforms = [[noise(length, seed=length) for length in row] for row in lengths]
    conversations = [
        user(text_item("Listen."), *[audio_item(waveform, sampling_rate=16000) for waveform in row])
        for row in waveforms
    ]
    inputs = tokenize(processor, conversations, drop_audio_padding=drop)

    windows = [waveform[start : start + 16000] for row in waveforms for waveform in row
               for start in range(0, len(waveform), 16000)]  # fmt: skip
    assert ("input_features" in inputs) == bool(windows)
    assert ("input_features_mask" in inputs) == (drop and bool(windows))
    if windows:
        assert inputs["input_features"].shape == (len(windows), 128, 100)
        alone = processor.feature_extractor(windows[-1], sampling_rate=16000, return_tensors="pt")
        assert torch.equal(inputs["input_features"][-1:], alone["input_features"])
    if drop and windows:
        mask = inputs["input_features_mask"]
        assert mask.sum(-1).tolist() == [-(-len(window) // 160) for window in windows]
        embeddings = audio_embedding_lengths(mask, downsample).tolist()
    else:
        embeddings = [50 // downsample] * len(windows)
    embeddings = iter(embeddings)
    for row, ids in zip(lengths, inputs["input_ids"]):
        windows_of_row = sum(-(-length // 16000) for length in row)
        assert (ids == processor.audio_token_id).sum() == sum(next(embeddings) for _ in range(windows_of_row))


def test_batch_is_left_padded_and_equals_single_rows(short_processor):
    conversations = [
        user(audio_item(noise(samples, samples), sampling_rate=16000), text_item("Hm. " * samples))
        for samples in (1, 3)
    ] + [user(text_item("No audio."))]
    batch = tokenize(short_processor, conversations)
    singles = [tokenize(short_processor, conversation) for conversation in conversations]
    for ids, mask, single in zip(batch["input_ids"], batch["attention_mask"], singles):
        length = single["input_ids"].shape[1]
        assert mask.tolist() == [0] * (len(mask) - length) + [1] * length
        assert torch.equal(ids[mask.bool()], single["input_ids"][0])
        assert (ids[~mask.bool()] == short_processor.tokenizer.pad_token_id).all()
    assert torch.equal(batch["input_features"], torch.cat([single["input_features"] for single in singles[:2]]))
    right = tokenize(short_processor, conversations, padding_side="right")
    assert right["attention_mask"][:, 0].all()


def test_long_audio_is_many_windows_as_the_original_makes_one(processor):
    waveform = noise(2 * 480000 + 1)
    inputs = processor(audio=waveform, sampling_rate=16000, return_tensors="pt")
    windows = processor.feature_extractor(
        [waveform[:480000], waveform[480000:960000], waveform[960000:]], sampling_rate=16000, return_tensors="pt"
    )
    torch.testing.assert_close(inputs["input_features"], windows["input_features"], atol=1e-5, rtol=0)


def test_what_the_model_was_trained_on_is_the_default(tmp_path):
    make_processor(chunk_length=1, embed_audio_padding=False, output_sampling_rate=22050).save_pretrained(tmp_path)
    processor = TTTOmniProcessor.from_pretrained(tmp_path)
    conversation = user(audio_item(noise(4000), sampling_rate=16000))
    inputs = tokenize(processor, [conversation])
    assert "input_features_mask" in inputs and inputs["input_ids"].eq(processor.audio_token_id).sum() == 3
    pieces = [piece["input_ids"] for piece in processor.turn_pieces(conversation[0])]
    assert torch.equal(torch.cat(pieces, 1)[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    whole = tokenize(processor, [conversation], drop_audio_padding=False)
    assert "input_features_mask" not in whole and whole["input_ids"].eq(processor.audio_token_id).sum() == 10
    processor.save_audio(noise(100), tmp_path / "answer.wav")
    assert soundfile.info(tmp_path / "answer.wav").samplerate == 22050


@pytest.mark.parametrize("rate", [16000, 44100])
def test_windows_read_from_disk_equal_those_in_memory(short_processor, tmp_path, rate, monkeypatch):
    monkeypatch.setattr(sys.modules[read_audio.__module__], "BLOCK_SAMPLES", 20000)
    path = tmp_path / "long.flac"
    soundfile.write(path, noise(int(7.3 * rate)), rate)
    samples = soundfile.read(path, dtype="float32")[0]
    inputs = short_processor(
        text=AUDIO, audio=samples, sampling_rate=rate, return_tensors="pt", drop_audio_padding=True
    )
    windows = list(short_processor.iter_audio_windows(path, drop_audio_padding=True))
    assert len(windows) == 8
    for name in ("input_features", "input_features_mask"):
        assert torch.equal(inputs[name], torch.cat([window[name] for window in windows]))
    placeholders = torch.cat([window["input_ids"] for window in windows], dim=1)
    assert placeholders.eq(short_processor.audio_token_id).all()
    assert placeholders.shape[1] == inputs["input_ids"].eq(short_processor.audio_token_id).sum()


def test_windows_are_read_in_bounded_memory(processor, tmp_path):
    path = tmp_path / "long.wav"
    with soundfile.SoundFile(path, "w", 16000, 1) as file:
        for _ in range(20):
            file.write(noise(480000))
    next(processor.iter_audio_windows(path))
    tracemalloc.start()
    try:
        assert sum(len(block) for block in read_audio(path, 16000)) == 20 * 480000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * 4 * 480000  # a few blocks of float32, of 20 in the file


def test_numbers_of_placeholders_and_audios_must_agree(processor):
    audio = noise(100)
    for text, audios in ((AUDIO, [audio, audio]), (AUDIO * 2, [audio]), ("Hi", audio), (AUDIO, None)):
        with pytest.raises(ValueError, match="token"):
            processor(text=text, audio=audios, sampling_rate=16000)
    with pytest.raises(ValueError, match="should be the same as the number of audio inputs of each"):
        processor(text=[AUDIO * 2, "Hi"], audio=[[audio], [audio]], sampling_rate=16000)
    assert "input_features" not in processor(text="Hi", audio=[])
    inputs = tokenize(processor, user(audio_item(audio), text_item(f"What does {AUDIO} mean?")))
    assert (inputs["input_ids"] == processor.audio_token_id).sum() == 300  # what a user writes is text
    with pytest.raises(ValueError, match="no 'audio', 'path' or 'url'"):
        tokenize(processor, user({"type": "audio"}))
    with pytest.raises(ValueError, match="no 'audio', 'path' or 'url'"):
        list(processor.turn_pieces({"role": "user", "content": [{"type": "audio"}]}))


def test_truncation_never_cuts_audio(processor):
    with pytest.raises(ValueError, match="truncation"):
        processor(text=AUDIO, audio=noise(100), sampling_rate=16000, truncation=True, max_length=200)
    inputs = processor(text="Hello there, all of you.", truncation=True, max_length=4)
    assert len(inputs["input_ids"][0]) == 4


def test_length_options_of_text_leave_audio_alone(processor):
    inputs = processor(
        text=AUDIO, audio=noise(480000), sampling_rate=16000, padding="max_length", max_length=320, return_tensors="np"
    )
    assert inputs["input_ids"].shape == (1, 320)
    plain = processor(audio=noise(480000), sampling_rate=16000, return_tensors="np")
    np.testing.assert_array_equal(inputs["input_features"], plain["input_features"])


def test_constructor_rejects():
    with pytest.raises(ValueError, match="`audio_token` '<speech>' is not in the tokenizer's vocabulary"):
        make_processor(audio_token="<speech>")
    with pytest.raises(ValueError, match="`audio_downsample` must be at least 1"):
        make_processor(audio_downsample=0)


# Reading audio


def read(audio, rate=16000, **kwargs):
    return np.concatenate(list(read_audio(audio, rate, **kwargs)))


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100])
@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize(
    "file_format, subtype",
    [("WAV", "PCM_U8"), ("WAV", "PCM_16"), ("WAV", "PCM_24"), ("WAV", "FLOAT"), ("FLAC", "PCM_16"), ("OGG", "VORBIS")],
)
def test_formats(tmp_path, rate, channels, file_format, subtype):
    path = tmp_path / f"audio.{file_format.lower()}"
    samples = noise(channels * rate).reshape(rate, channels)
    soundfile.write(path, samples, rate, format=file_format, subtype=subtype)
    stored = soundfile.read(path, always_2d=True)[0]
    if file_format != "OGG":
        np.testing.assert_allclose(stored, samples, atol=1 / 128 if subtype == "PCM_U8" else 1e-4)
    expected = soxr.resample(stored.mean(axis=1), rate, 16000, quality="HQ")
    np.testing.assert_allclose(read(path), expected, atol=1e-5)


def test_sources_are_equivalent(tmp_path):
    samples = noise(2 * 8000).reshape(8000, 2)
    path = tmp_path / "audio.wav"
    soundfile.write(path, samples, 8000, subtype="FLOAT")
    data = path.read_bytes()
    pcm = np.round(samples * 32768).astype(np.int16)
    expected = read(str(path))
    sources = [
        path,
        data,
        bytearray(data),
        {"path": str(path), "bytes": None},
        {"bytes": data},
        (samples, 8000),
        (samples.T, 8000),
        (torch.from_numpy(samples), 8000),
        (torch.from_numpy(samples.T).double(), np.int64(8000)),
        {"array": samples, "sampling_rate": 8000},
        (samples.mean(axis=1).tolist(), 8000),
    ]
    for source in sources:
        np.testing.assert_allclose(read(source), expected, atol=1e-6)
    np.testing.assert_allclose(read(samples, sampling_rate=8000), expected, atol=1e-6)
    np.testing.assert_allclose(read((pcm, 8000)), expected, atol=1e-4)
    unsigned = (pcm // 256 + 128).astype(np.uint8)
    np.testing.assert_allclose(read((unsigned, 8000)), expected, atol=1e-2)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a server, and the folder that it serves."""
    folder = tmp_path_factory.mktemp("served")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}", folder
        served.shutdown()


def test_urls(server, tmp_path):
    address, folder = server
    data = wav(folder, noise(16000)).read_bytes()
    encoded = base64.b64encode(data).decode()
    for url in (f"{address}/audio.wav", f"data:audio/wav;base64,{encoded}"):
        np.testing.assert_array_equal(read(url), read(data))
    (folder / "headerless.mp3").write_bytes(mp3_without_header())
    assert len(read(f"{address}/headerless.mp3")) == len(read(mp3_without_header()))


@pytest.mark.parametrize(
    "path, error, message",
    [
        ("missing.wav", OSError, "http://\\S*/missing.wav cannot be fetched: the server says 404 File not found"),
        ("page.wav", ValueError, "http://\\S*/page.wav cannot be read as audio"),
        ("http://127.0.0.1:1/a.wav", OSError, "http://127.0.0.1:1/a.wav cannot be fetched: .*refused"),
        ("http://[/a.wav", OSError, r"http://\[/a.wav cannot be fetched"),
        ("data:audio/wav;base64,UklGRg==", ValueError, "data:audio/wav;base64,UklGRg==… cannot be read as audio"),
        ("data:audio/wav", OSError, "data:audio/wav… cannot be fetched"),
        ("data:audio/wav;base64," + "é" * 99, ValueError, "data:audio/wav;base64,é{18}… cannot be read as audio"),
    ],
)
def test_bad_urls(server, path, error, message):
    address, folder = server
    (folder / "page.wav").write_text("<!DOCTYPE html><html>Not here</html>")
    with pytest.raises(error, match=message) as raised:
        read(path if ":" in path else f"{address}/{path}")
    assert "\n" not in str(raised.value)


def test_servers_that_break_off_or_say_nothing(monkeypatch):
    monkeypatch.setattr(sys.modules[read_audio.__module__], "URL_TIMEOUT", 0.2)
    answers = [b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + bytes(99), b""]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/a.wav"

        def serve():
            for answer in answers:
                connection, _ = listener.accept()
                connection.recv(4096)
                connection.sendall(answer)
                if answer:
                    connection.close()
                else:
                    connections.append(connection)

        connections = []
        threading.Thread(target=serve, daemon=True).start()
        for reason in ("closed connection", "timed out"):
            with pytest.raises(OSError, match=f"{url} cannot be fetched: .*{reason}"):
                read(url)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
@pytest.mark.parametrize("file_format", ["WAV", "FLAC", "OGG", "MP3"])
def test_pipes(tmp_path, file_format):
    buffer = io.BytesIO()
    soundfile.write(buffer, noise(40000), 16000, format=file_format)
    os.mkfifo(tmp_path / "pipe")
    threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(buffer.getvalue(),), daemon=True).start()
    np.testing.assert_array_equal(read(tmp_path / "pipe"), read(buffer.getvalue()))


@pytest.mark.parametrize("name", ["caf\udce9.wav", "two\nlines.wav", "a'\".wav", "-dash.wav", "#?%20.wav", "ü 語.wav"])
def test_file_names(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    soundfile.write("plain.wav", noise(100), 16000)
    os.rename("plain.wav", name)
    np.testing.assert_array_equal(read(name), read(Path(name)))
    assert len(read(os.fsencode(tmp_path / name).decode(errors="surrogateescape"))) == 100
    Path(name).write_bytes(b"no audio")
    with pytest.raises(ValueError, match="cannot be read as audio") as raised:
        read(name)
    assert str(raised.value).isprintable()
    os.unlink(name)
    with pytest.raises(FileNotFoundError, match="does not exist") as raised:
        read(name)
    assert str(raised.value).isprintable()


def test_nested_audio_and_rates_beside_it(short_processor):
    audio = noise(8000)
    expected = short_processor(audio=[(audio, 8000)] * 3, return_tensors="pt")["input_features"]
    prompts = [AUDIO * 2, AUDIO]
    nested = short_processor(text=prompts, audio=[[audio, audio], [audio]], sampling_rate=8000, return_tensors="pt")
    assert torch.equal(nested["input_features"], expected)
    nested = short_processor(audio=[[audio, audio], [audio]], sampling_rate=8000, return_tensors="pt")
    assert torch.equal(nested["input_features"], expected)
    items = [audio_item(audio, sampling_rate=8000), audio_item((audio, 8000)), audio_item(audio)]
    for kwargs in ({"sampling_rate": 8000}, {"audio_kwargs": {"sampling_rate": 8000}}):
        assert torch.equal(tokenize(short_processor, user(*items), **kwargs)["input_features"], expected)


def test_conversation_is_left_as_it_was(short_processor, tmp_path):
    soundfile.write(tmp_path / "audio.wav", noise(100), 16000)
    conversation = user({"type": "audio", "path": str(tmp_path / "audio.wav")}, text_item("Hm?"))
    before = json.dumps(conversation)
    tokenize(short_processor, conversation)
    assert json.dumps(conversation) == before


def written(path, data):
    path.write_bytes(data)
    return path


def wav(tmp_path, samples, **kwargs):
    soundfile.write(tmp_path / "audio.wav", samples, 16000, **kwargs)
    return tmp_path / "audio.wav"


def peak(value, dtype=np.float32, at=8000):
    """Silence but for one sample."""
    samples = np.zeros(at + 16000, dtype)
    samples[at] = value
    return samples


def with_rate(rate):
    """The bytes of a WAV that announces `rate` samples per second."""
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(4000), 16000, format="WAV")
    data = bytearray(buffer.getvalue())
    data[24:28] = rate.to_bytes(4, "little")
    return bytes(data)


def damaged_flac(tmp_path, damage):
    """A FLAC file whose second half is damaged."""
    path = tmp_path / "damaged.flac"
    soundfile.write(path, noise(16000), 16000)
    data = path.read_bytes()
    return written(path, data[: len(data) // 2] + damage(data[len(data) // 2 :]))


@pytest.mark.parametrize(
    "make_audio, error, message",
    [
        (lambda tmp: tmp / "missing.wav", FileNotFoundError, "missing.wav does not exist"),
        (lambda tmp: tmp, FileNotFoundError, "does not exist"),
        (lambda tmp: "/dev/zero", FileNotFoundError, "does not exist"),
        (lambda tmp: "null\0byte.wav", FileNotFoundError, r"'null\\x00byte.wav' does not exist"),
        (lambda tmp: written(tmp / "text.wav", b"This is not a WAV."), ValueError, "text.wav cannot be read as audio"),
        (lambda tmp: written(tmp / "bytes.raw", bytes(100)), ValueError, "bytes.raw cannot be read as audio"),
        (lambda tmp: written(tmp / "zero.wav", b""), ValueError, "zero.wav cannot be read as audio"),
        (lambda tmp: wav(tmp, np.zeros(0)), ValueError, "audio.wav is empty"),
        (
            lambda tmp: wav(tmp, peak(np.nan, at=16000 * 40), subtype="FLOAT"),
            ValueError,
            r"audio.wav has NaN or infinite samples, the first at 40.000 s",
        ),
        (
            lambda tmp: wav(tmp, peak(1e20), subtype="FLOAT"),
            ValueError,
            r"audio.wav has a sample of 1e\+20 at 0.5",
        ),
        (lambda tmp: wav(tmp, peak(-101), subtype="FLOAT"), ValueError, "audio.wav has a sample of 101 at 0.500 s"),
        (lambda tmp: (peak(3e38), 44100), ValueError, r"array has a sample of 3e\+38 at 0.181 s"),
        (lambda tmp: (peak(1e300, float), 16000), ValueError, r"array has a sample of 1e\+300 at 0.500 s"),
        (lambda tmp: (np.stack([peak(3e38)] * 2), 16000), ValueError, r"array has a sample of 3e\+38 at 0.500 s"),
        (lambda tmp: (np.stack([peak(1e20), peak(-1e20)]), 16000), ValueError, r"a sample of 1e\+20 at 0.500 s"),
        (lambda tmp: 300 * noise(16000), ValueError, "where full scale is 1: divide the samples by theirs"),
        (
            lambda tmp: with_rate(1),
            ValueError,
            "announces 1 channels of 1 samples per second: at most 32 .*1000 to",
        ),
        (lambda tmp: with_rate(10**9), ValueError, "bytes announces 1 channels of 1000000000 samples per second"),
        (lambda tmp: wav(tmp, np.zeros((9, 33))), ValueError, "announces 33 channels of 16000 samples per second"),
        (lambda tmp: damaged_flac(tmp, lambda rest: b""), ValueError, "damaged.flac cannot be read as audio"),
        (lambda tmp: damaged_flac(tmp, lambda rest: rest[9:]), ValueError, "damaged.flac cannot be read as audio"),
        (
            lambda tmp: damaged_flac(tmp, lambda rest: bytes(9) + rest[9:]),
            ValueError,
            "damaged.flac cannot be read as audio",
        ),
        (lambda tmp: b"RIFF and no more", ValueError, "bytes cannot be read as audio"),
        (lambda tmp: (np.zeros(0), 16000), ValueError, "array is empty"),
        (lambda tmp: (np.array([0.0, np.inf]), 44100), ValueError, "array has NaN or infinite"),
        (lambda tmp: (np.zeros((2, 3, 4)), 16000), ValueError, "shape"),
        (lambda tmp: (np.zeros((99, 99)), 16000), ValueError, "shape"),
        (lambda tmp: (np.zeros((40, 99)), 16000), ValueError, "shape"),
        (lambda tmp: (np.zeros(9, np.int64), 16000), TypeError, "32 bits, got int64"),
        *[
            (
                lambda tmp, rate=rate: (np.zeros(9), rate),
                ValueError,
                "`sampling_rate` must be an integer from 1000",
            )
            for rate in (-1, 0, 1, True, 1.5, 16000.0, np.float32(16000), 999, 768_001, 2**70)
        ],
        (lambda tmp: {"array": np.zeros(9), "sampling_rate": 0}, ValueError, "must be an integer .*, got 0"),
        (lambda tmp: 3.5, TypeError, "got float"),
        (lambda tmp: {"sampling_rate": 16000}, TypeError, "got NoneType"),
    ],
)
def test_bad_audio(processor, tmp_path, make_audio, error, message):
    audio = make_audio(tmp_path)
    for use in (
        lambda: processor(text=AUDIO, audio=audio),
        lambda: tokenize(processor, user(audio_item(audio))),
        lambda: list(processor.iter_audio_windows(audio)),
    ):
        with pytest.raises(error, match=message) as raised:
            use()
        assert "\n" not in str(raised.value)


def test_wav_shorter_than_its_header_says(tmp_path, caplog):
    samples = noise(16000)
    path = wav(tmp_path, samples, subtype="FLOAT")
    assert len(read(path)) == 16000 and not caplog.text
    path.write_bytes(path.read_bytes()[:-8000])
    np.testing.assert_array_equal(read(path), samples[:-2000])
    assert "its header announces another length than the 14000 samples it has" in caplog.text


# Lengths that are announced


def mp3(samples):
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, 16000, format="MP3", bitrate_mode="VARIABLE", compression_level=0.5)
    return buffer.getvalue()


def mp3_without_header():
    """An MP3 of 20 s whose first frame is larger than most, and says nothing of others."""
    samples = np.zeros(20 * 16000, np.float32)
    samples[:16000] = samples[-16000:] = noise(16000)
    data = mp3(samples)
    assert b"Xing" in data[:50]
    return data[data.index(data[:2], 50) :]


def test_mp3_without_header(tmp_path):
    data = mp3_without_header()
    assert soundfile.info(io.BytesIO(data)).duration < 10
    path = written(tmp_path / "audio.mp3", data)
    for source in (path, data, written(tmp_path / "tagged.mp3", data + b"TAG" + bytes(125))):
        samples = read(source)
        assert 20.0 <= len(samples) / 16000 < 20.2  # with the encoder's delay and padding
        assert np.abs(samples[-16000:]).max() > 0.1
    cut = read(data[: len(data) // 2 + 5])
    assert 9 < len(cut) / 16000 < 11
    np.testing.assert_array_equal(cut, samples[: len(cut)])
    with pytest.raises(ValueError, match=f"bytes cannot be read as audio .*: it is damaged at byte {len(data)}"):
        read(data + bytes(2000) + 3 * data)


def test_mp3_with_header(caplog):
    samples = noise(20 * 16000)
    data = mp3(samples)
    assert len(read(data)) == len(samples) and not caplog.text
    assert 40.0 <= len(read(data + data)) / 16000 < 40.5
    cut = len(read(data[: len(data) // 2]))
    assert 9 < cut / 16000 < 11
    assert f"its header announces another length than the {cut} samples it has" in caplog.text


def test_flac_of_unknown_length(tmp_path):
    samples = noise(35 * 16000)
    path = tmp_path / "audio.flac"
    soundfile.write(path, samples, 16000)
    expected = read(path)
    data = bytearray(path.read_bytes())
    data[21] &= 0xF0  # the upper 4 of 36 bits
    data[22:26] = bytes(4)
    assert soundfile.info(io.BytesIO(data)).frames > 2**48
    for source in (bytes(data), written(path, data)):
        np.testing.assert_array_equal(read(source), expected)
    assert len(expected) == len(samples)


@pytest.mark.parametrize(
    "riff_size, data_size",
    [
        (0, 0),
        (36, 0),
        (0xFFFFFFFF, 0),
        (36 + 32000, 0),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0, 0x7FFFF000),
        (36 + 8000, 8000),
        (10**6, 10**6),
    ],
)
def test_wav_without_a_length(tmp_path, caplog, riff_size, data_size):
    samples = noise(16000)
    data = bytearray(wav(tmp_path, samples).read_bytes())
    expected = read(bytes(data))
    data[4:8], data[40:44] = riff_size.to_bytes(4, "little"), data_size.to_bytes(4, "little")
    for source in (bytes(data), written(tmp_path / "unfinished.wav", data)):
        np.testing.assert_array_equal(read(source), expected)
    assert "its header announces another length than the 16000 samples it has" in caplog.text


@pytest.mark.parametrize("samples", [0, 15999, 16000])
def test_what_follows_the_samples_of_a_wav_is_not_heard(tmp_path, caplog, samples):
    data = bytearray(wav(tmp_path, noise(samples), subtype="PCM_U8").read_bytes())
    data += bytes(len(data) % 2) * (samples % 2 and len(data) == 44 + samples)
    data += b"LIST" + (100).to_bytes(4, "little") + bytes(100)
    data[4:8] = (len(data) - 8).to_bytes(4, "little")
    if samples:
        assert len(read(bytes(data))) == samples and not caplog.text
    else:
        with pytest.raises(ValueError, match="bytes is empty"):
            read(bytes(data))


def test_joined_ogg_files_are_refused():
    buffer = io.BytesIO()
    soundfile.write(buffer, noise(160000), 16000, format="OGG")
    assert len(read(buffer.getvalue())) == 160000
    with pytest.raises(ValueError, match="bytes is several OGG files in one"):
        read(buffer.getvalue() * 2)


def test_floats_beyond_full_scale_are_left_alone(tmp_path):
    samples = 10 * noise(16000)
    assert np.abs(samples).max() > 1
    np.testing.assert_array_equal(read(wav(tmp_path, samples, subtype="FLOAT")), samples)
    np.testing.assert_array_equal(read((samples, 16000)), samples)


@pytest.mark.parametrize("rate", [1000, 768_000, np.int32(48000)])
def test_rates_at_the_bounds(rate):
    assert len(read((np.zeros(int(rate)), rate))) == pytest.approx(16000, abs=1)


@pytest.mark.parametrize("rate", [16000, 44100])
def test_features_are_finite_up_to_the_largest_sample(processor, rate):
    loud = np.full(rate, 100.0, np.float32) * (-1.0) ** (np.arange(rate) // 7)
    inputs = processor(audio=loud, sampling_rate=rate, return_tensors="pt")
    assert inputs["input_features"].isfinite().all()


def test_array_without_sampling_rate_is_at_that_of_the_model(processor, monkeypatch):
    warnings = []
    monkeypatch.setattr(sys.modules[read_audio.__module__].logger, "warning_once", warnings.append)
    expected = processor(audio=noise(1600), sampling_rate=16000, return_tensors="pt")
    assert not warnings
    inputs = processor(audio=noise(1600), return_tensors="pt")
    assert torch.equal(inputs["input_features"], expected["input_features"])
    assert "16000 Hz is assumed" in warnings[0]


# What the model generates


def test_save_audio(processor, tmp_path):
    waveforms = [torch.from_numpy(noise(1600)), noise(800), noise(400).tolist()]
    paths = [tmp_path / "a.wav", str(tmp_path / "b\udce9.flac"), tmp_path / "c.ogg"]
    processor.save_audio(waveforms, paths)
    for path, waveform in zip(paths[:2], waveforms):
        np.testing.assert_allclose(read(path), waveform, atol=1 / 32768)
    assert len(read(paths[2])) == 400
    processor.save_audio(waveforms[0].bfloat16(), str(paths[0]), sampling_rate=8000)
    info = soundfile.info(paths[0])
    assert (info.frames, info.samplerate, info.subtype) == (1600, 8000, "PCM_16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.wav", "b\udce9.flac", "c.ogg"]


@pytest.mark.parametrize(
    "second, path, error, message",
    [
        (np.full(9, np.nan), "b.wav", ValueError, r"The waveform for \S*b.wav has NaN or infinite samples"),
        (noise(9), "b.txt", ValueError, r"\S*b.txt does not end like an audio file"),
        (noise(9), "none/b.wav", OSError, "none"),
    ],
)
def test_save_audio_saves_all_or_none(processor, tmp_path, second, path, error, message):
    (tmp_path / "a.wav").write_bytes(b"before")
    with pytest.raises(error, match=message):
        processor.save_audio([noise(9), second], [tmp_path / "a.wav", tmp_path / path])
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]
    assert (tmp_path / "a.wav").read_bytes() == b"before"
    with pytest.raises(ValueError, match="2 waveforms for 1 paths"):
        processor.save_audio([noise(9), noise(9)], tmp_path / "a.wav")


def test_post_process_multimodal_output(processor):
    sequences = processor.tokenizer(["Hello.", "Bye."], padding=True, return_tensors="pt")["input_ids"]
    outputs = ModelOutput(sequences=sequences, waveform=[torch.from_numpy(noise(9)), torch.zeros(3).bfloat16()])
    for generated in (outputs, sequences):
        assert processor.post_process_multimodal_output(generated) == ["Hello.", "Bye."]
        assert processor.post_process_multimodal_output(generated, generation_mode="text") == ["Hello.", "Bye."]
    waveforms = processor.post_process_multimodal_output(outputs, generation_mode="audio")
    np.testing.assert_array_equal(waveforms[0], noise(9))
    np.testing.assert_array_equal(waveforms[1], np.zeros(3, np.float32))
    for generated in (sequences, ModelOutput(sequences=sequences)):
        with pytest.raises(ValueError, match="no waveform in what was generated"):
            processor.post_process_multimodal_output(generated, generation_mode="audio")
    with pytest.raises(ValueError, match="image"):
        processor.post_process_multimodal_output(outputs, generation_mode="image")


# Files


def test_save_and_load(tmp_path):
    processor = make_processor(audio_token="<|reserved_special_token_7|>", audio_downsample=3)
    processor.save_pretrained(tmp_path)
    loaded = TTTOmniProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert (loaded.audio_token, loaded.audio_downsample) == ("<|reserved_special_token_7|>", 3)
    assert loaded.audio_token_id == processor.audio_token_id
    assert (tmp_path / "chat_template.jinja").read_text() == loaded.chat_template == processor.chat_template
    assert "<|reserved_special_token_7|>" in loaded.apply_chat_template(user({"type": "audio"}))


REMOTE = """
import sys
sys.modules["ttt_omni"] = None
from transformers import AutoProcessor
import numpy as np
folder, copy = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
processor.save_pretrained(copy)
for path in (folder, copy):
    processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
    assert type(processor).__module__.startswith("transformers_modules"), type(processor)
    message = {"role": "user", "content": [{"type": "audio", "audio": (np.zeros(999), 16000)}]}
    ids = processor.apply_chat_template([message], tokenize=True, return_dict=True)["input_ids"][0]
    print(len(ids), ids.count(processor.audio_token_id))
"""


def test_remote_code(processor, tmp_path):
    folder, copy = tmp_path / "model", tmp_path / "copy"
    processor.save_pretrained(folder)
    TTTOmniConfig().save_pretrained(folder)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", REMOTE, str(folder), str(copy)]
    output = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    lengths = tokenize(processor, user(audio_item((np.zeros(999), 16000))))["input_ids"].shape[1]
    assert output.stdout.split() == [str(lengths), "300"] * 2
    assert (copy / "processing_ttt_omni.py").read_text() == (folder / "processing_ttt_omni.py").read_text()
    assert json.loads((copy / "processor_config.json").read_text())["auto_map"] == {
        "AutoProcessor": "processing_ttt_omni.TTTOmniProcessor"
    }
