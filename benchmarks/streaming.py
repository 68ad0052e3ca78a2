# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
Streaming speech: how soon it starts, and what a token costs early and late.

    python benchmarks/streaming.py latency [--size tiny|mid|real] [--device cuda] [--dtype bfloat16]
    python benchmarks/streaming.py positions [--size mid]     time and memory per token, by position in the answer
    python benchmarks/streaming.py whole [--size mid]         an answer of 1,000 tokens, and the original's way to it

Weights are random. Each prints what it measures and puts it under its name into benchmarks/results/streaming.json.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict

import torch
from reporting import RESULTS, environment, store
from tqdm import tqdm

from ttt_omni import TTTOmniConfig, TTTOmniForCausalLM
from ttt_omni.streaming_ttt_omni import SpeechStream, UnitStream


WINDOW = 1000  # frames that the windowed speech decoder sees, 40 tokens
QUESTION_TOKENS = 60  # of the prompt around the speech
SIZES = {
    "tiny": {
        "text": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4},
        "audio": {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 128},
        "speech": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4},
        "vocoder": {"upsample_initial_channel": 64},
    },
    "mid": {
        "text": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8},
        "audio": {"d_model": 256, "encoder_layers": 4, "encoder_attention_heads": 4, "encoder_ffn_dim": 1024},
        "speech": {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8},
        "vocoder": {"upsample_initial_channel": 128},
    },
    "real": {  # Llama-3.1-8B, Whisper-large-v3, and the speech decoder and vocoder of LLaMA-Omni
        "text": {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
        },
        "audio": {"d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120},
        "speech": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32},
        "vocoder": {"upsample_initial_channel": 512},
    },
}


def random_model(size: str, device: str, dtype: str, sliding_window: int | None = None) -> TTTOmniForCausalLM:
    sizes = SIZES[size]
    vocab_size = sizes["text"].get("vocab_size", 2000)
    config = TTTOmniConfig(
        text_config={"vocab_size": vocab_size, "rope_theta": 500000.0} | sizes["text"],
        audio_config={"num_mel_bins": 128, "max_source_positions": 1500} | sizes["audio"],
        speech_decoder_config={
            "input_size": sizes["text"]["hidden_size"],
            "num_hidden_layers": 2,
            "sliding_window": sliding_window,
        }
        | sizes["speech"],
        vocoder_config=sizes["vocoder"],
        audio_token_id=vocab_size - 1,
    )
    torch.manual_seed(0)
    dtype_before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            model = TTTOmniForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(dtype_before)
    model.vocoder.float()
    with torch.no_grad():  # so that it says a few units per token, each for about two frames, as speech does
        for parameter in model.speech_decoder.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=2 * parameter.shape[1] ** -0.5)
        model.vocoder.dur_predictor.proj.bias.fill_(1.0)
    model.generation_config.eos_token_id = None
    return model


def now(device) -> float:
    """On a CPU with one thread, the processor time, which other programs don't change."""
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def stage_times(model: TTTOmniForCausalLM) -> dict[str, float]:
    """Seconds spent in each part of the model from now on; grows as it is used."""
    times = defaultdict(float)
    starts = {}

    def watch(module, stage):
        def before(*_):
            starts[stage] = now(model.device)

        def after(*_):
            name = stage
            if stage == "language model":
                name = "prefill" if "prefill" not in times else "decode"
            times[name] += now(model.device) - starts[stage]

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    watch(model.model.audio_tower, "encoder")
    watch(model.model.multi_modal_projector, "encoder")
    watch(model.model.language_model, "language model")
    watch(model.speech_decoder, "speech decoder")
    watch(model.vocoder.dur_predictor, "vocoder")
    watch(model.vocoder.hifi_gan, "vocoder")
    return times


def latency(size: str, device: str, dtype: str) -> dict:
    """From the end of a question of up to 30 s, its spectrogram made, to the first sound, and from there on."""
    model = random_model(size, device, dtype, WINDOW)
    input_ids = torch.randint(model.config.audio_token_id, (1, QUESTION_TOKENS + 300))
    input_ids[:, 20:320] = model.config.audio_token_id
    inputs = {
        "input_ids": input_ids.to(device),
        "input_features": torch.randn(1, 128, 3000).to(device),
        "do_sample": False,
    }

    class NoTokenizer:
        def decode(self, *_, **__):
            return "x"

    def answer(length):
        return model.stream(**inputs, tokenizer=NoTokenizer(), max_new_tokens=length)

    list(answer(20))  # the first run chooses kernels
    firsts, stages, tokens = [], [], []
    for _ in range(5):
        times = stage_times(model)
        start, count = now(device), 0
        for event in answer(200):
            count += 1
            if event.waveform is not None:
                break
        firsts.append(now(device) - start)
        stages.append(dict(times))
        tokens.append(count)
        _remove_hooks(model)
    start, samples = now(device), 0
    for event in answer(100):
        samples += 0 if event.waveform is None else len(event.waveform)
    seconds = now(device) - start
    middle = firsts.index(statistics.median(firsts))
    return {
        "time to first audio, ms": 1000 * firsts[middle],
        "of it, ms": {name: 1000 * value for name, value in stages[middle].items()},
        "tokens until first audio": tokens[middle],
        "tokens": 100,
        "of all tokens, s": seconds,
        "their speech, s": samples / model.config.vocoder_config.sampling_rate,
        "real-time factor": seconds / (samples / model.config.vocoder_config.sampling_rate),
    }


def _remove_hooks(model):
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()


@torch.no_grad()
def positions(size: str, device: str, dtype: str) -> dict:
    """
    Of the speech decoder and vocoder: time per token (mean of 20 around the position) and size of the cache,
    windowed and not, and the original's way, which runs the speech decoder over all states so far.
    """
    marks = [50, 100, 500, 1000, 2000]
    rows = {}
    for name, window in (("windowed", WINDOW), ("full attention", None)):
        model = random_model(size, device, dtype, window)
        states = _states(model, marks[-1] + 10)
        stream, position, rows[name] = SpeechStream(model, 10, 40), 0, {}
        for mark in tqdm(marks, desc=name):
            while position < mark - 10:  # fast forward
                length = min(25, mark - 10 - position)
                stream.push(states[position : position + length])
                position += length
            start = now(device)
            for state in states[position : position + 20].split(1):
                stream.push(state)
            seconds = now(device) - start
            position += 20
            rows[name][mark] = {
                "ms": 1000 * seconds / 20,
                "cache, MB": _cache_bytes(stream.unit_stream) / 2**20,
            }
        rows[name]["ms at 2000 / ms at 50"] = rows[name][2000]["ms"] / rows[name][50]["ms"]
    rows["recomputing everything"] = {}
    for mark in [mark for mark in marks if mark <= 500]:
        start = now(device)
        model.speak(states[:mark])
        rows["recomputing everything"][mark] = {"ms": 1000 * (now(device) - start)}
    return rows


@torch.no_grad()
def whole(size: str, device: str, dtype: str) -> dict:
    """
    The units of an answer of 1,000 tokens, token by token, and by the original's way: all so far at each token. The
    latter is measured at 8 lengths, between which it is interpolated (as a sum it would take hours).
    """
    length = 1000
    rows = {}
    for name, window in (("windowed", WINDOW), ("full attention", None)):
        model = random_model(size, device, dtype, window)
        states = _states(model, length)
        stream = UnitStream(model.speech_decoder)
        start = now(device)
        units = torch.cat([stream.push(state) for state in tqdm(states.split(1), desc=name)])
        rows[f"{name}, s"] = now(device) - start
    measured = {}
    for n in tqdm([1, 50, 100, 200, 350, 500, 750, length], desc="recomputing"):
        start = now(device)
        at_once = model.speak(states[:n])
        measured[n] = now(device) - start
    rows["same units at once as token by token"] = torch.equal(units, at_once)
    ns = list(measured)
    total = sum((b - a) * (measured[a] + measured[b]) / 2 for a, b in zip(ns, ns[1:]))
    rows["recomputing everything, s (interpolated)"] = total
    rows["recomputing once, s"] = measured
    rows["times as fast, windowed"] = total / rows["windowed, s"]
    rows["times as fast, full attention"] = total / rows["full attention, s"]
    return rows


def _states(model, length):
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(length, model.config.text_config.hidden_size, generator=generator)
    return states.to(model.device, model.dtype)


def _cache_bytes(stream: UnitStream) -> int:
    return sum(x.nbytes for layer in stream.cache.layers for x in layer.tensors().values() if x.ndim == 4)


def report(name: str, result: dict, arguments: argparse.Namespace) -> None:
    measured_on = {"size": arguments.size, "dtype": arguments.dtype, **environment()}
    if arguments.device.startswith("cuda"):
        measured_on["device"] = torch.cuda.get_device_name()
    print(json.dumps(result, indent=1))
    path = RESULTS / "streaming.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results[f"{name}, {arguments.size}, {arguments.device}"] = {"environment": measured_on, **result}
    store(path, results)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=("latency", "positions", "whole"))
    parser.add_argument("--size", choices=SIZES, default="mid")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    function = {"latency": latency, "positions": positions, "whole": whole}[arguments.benchmark]
    report(arguments.benchmark, function(arguments.size, arguments.device, arguments.dtype), arguments)
