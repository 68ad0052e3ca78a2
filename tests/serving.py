# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""A model whose memory counts, and a server of it in this process, for the tests."""

import base64
import io
import socket
import threading
import time
from contextlib import contextmanager

import numpy as np
import soundfile
import soxr
import torch
import uvicorn
from layouts import with_layers

from ttt_omni import TTTOmniForCausalLM, TTTOmniProcessor
from ttt_omni.serving.server import Limits, Server, make_app


NAME = "tiny"


def open_model(folder, layers="windowed"):
    """The model in `folder` with other layers (`with_layers`), speech windowed where they are; and its processor."""
    parent, speech = TTTOmniForCausalLM.from_pretrained(folder), {"sliding_window": 40} if layers == "windowed" else {}
    return with_layers(parent, layers, **speech), TTTOmniProcessor.from_pretrained(folder)


@contextmanager
def running(model, processor, folder, limits=None, api_keys=(), name=NAME):
    """The address of a server, and the server."""
    server = Server(model, processor, name, folder, limits or Limits(new_tokens=64), frozenset(api_keys))
    listening = socket.create_server(("127.0.0.1", 0))
    uvicorn_server = uvicorn.Server(uvicorn.Config(make_app(server), log_level="error", ws_max_size=2**20))
    thread = threading.Thread(target=uvicorn_server.run, args=([listening],), daemon=True)
    thread.start()
    while not uvicorn_server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"127.0.0.1:{listening.getsockname()[1]}", server
    finally:
        uvicorn_server.should_exit = True
        thread.join()


def alone(model, processor, messages, memory=None, tokens=12):
    """The text and samples of an answer by `generate`, and the conversation after it."""
    *_, memory = model.listen(processor.turn_pieces(messages, None if memory is None else memory.input_ids), memory)
    out = model.generate(**vars(memory), max_new_tokens=tokens, return_audio=True)
    new = out.sequences[0, memory.input_ids.shape[1] :].tolist()
    if new[-1] in model.generation_config.eos_token_id:
        new.pop()
    text = processor.decode(new, skip_special_tokens=True)
    memory.cache = out.cache
    memory.input_ids = torch.cat([memory.input_ids, torch.tensor([[*new, processor.answer_end_id]])], dim=1)
    memory.attention_mask = torch.ones_like(memory.input_ids)
    return text, out.waveform[0].float().numpy(), memory


def question(waveform, processor, rate=16000):
    """A user's message in speech."""
    audio = {"type": "audio", "audio": waveform, "sampling_rate": rate}
    return {"role": "user", "content": [audio, {"type": "text", "text": processor.speech_instruction}]}


def wav(waveform, rate=16000) -> str:
    """A WAV file in base64."""
    file = io.BytesIO()
    soundfile.write(file, waveform, rate, format="WAV", subtype="FLOAT")
    return base64.b64encode(file.getvalue()).decode()


def pcm16(waveform, rate=None) -> np.ndarray:
    """Int16 samples; at 24 kHz of those at `rate`."""
    if rate is not None:
        waveform = soxr.resample(np.asarray(waveform, np.float32), rate, 24000)
    return np.rint(np.clip(waveform, -1, 1) * 32767).astype("<i2")


def assert_same_pcm(samples, expected):
    """But for the rounding of a resampler that took them piece by piece."""
    assert len(samples) == len(expected) > 0
    assert np.abs(samples.astype(int) - expected.astype(int)).max() <= 1
