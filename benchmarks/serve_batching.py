# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
Eight sessions at once against one after the other, and a session after an hour of talk against its first minute.

    python benchmarks/serve_batching.py [--model DIR]

By default the model is a small random one with windows in all layers, and TTT in half of them. The engine answers
spoken questions: first each session alone, one after the other, then all at once; tokens, units and samples must be
the same. Then, where all attention has a window, one session talks for an hour of sound, turn after turn, and the
time per token of its answers is compared. Repetitions alternate, and seconds are of the processor, so that what else
the machine does has less part in them. Prints a table, and writes `benchmarks/results/serve_batching.json`.
"""

import argparse
import queue
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from reporting import RESULTS, environment, store

from ttt_omni import TTTOmniConfig, TTTOmniForCausalLM, TTTOmniProcessor
from ttt_omni.conversion import make_tiny
from ttt_omni.serving.engine import Answer, Engine


SESSIONS, TOKENS = 8, 32
MINUTES = 60


def small_model(folder: Path, hidden_size: int, layers: int) -> tuple[TTTOmniForCausalLM, TTTOmniProcessor]:
    """A random model, larger than the tiny one, in which attention has windows and TTT is open."""
    make_tiny(folder)
    tiny = TTTOmniForCausalLM.from_pretrained(folder)
    config = tiny.config.to_dict()
    sizes = {"hidden_size": hidden_size, "intermediate_size": 3 * hidden_size, "head_dim": 64}
    sizes |= {"num_attention_heads": hidden_size // 64, "num_key_value_heads": hidden_size // 128}
    kinds = ["sliding_attention", "hybrid_sliding"] * (layers // 2)
    window = {"sliding_window": 256, "attention_sinks": 4}
    config["text_config"].update(sizes, num_hidden_layers=layers, layer_types=kinds, **window)
    speech = {"layer_types": ["sliding_attention"] * 2, "sliding_window": 100, "input_size": hidden_size}
    config["speech_decoder_config"].update(speech)
    torch.manual_seed(0)
    model = TTTOmniForCausalLM(TTTOmniConfig(**config)).eval()
    for name, parameter in model.named_parameters():
        if "ttt_gate" in name:
            parameter.data.uniform_(0.1, 0.3)
    model.generation_config = tiny.generation_config
    return model, TTTOmniProcessor.from_pretrained(folder)


def question(processor, session: int, turn: int = 0, seconds: float = 4.0) -> dict:
    noise = np.random.default_rng([session, turn]).standard_normal(int(16000 * seconds))
    audio = {"type": "audio", "audio": (0.05 * noise).astype(np.float32), "sampling_rate": 16000}
    return {"role": "user", "content": [audio, {"type": "text", "text": processor.speech_instruction}]}


class Timed:
    """An answer, and when its tokens came."""

    def __init__(self, engine: Engine, message: dict, memory=None, tokens: int = TOKENS):
        self.events, self.times, self.samples = queue.SimpleQueue(), [], []
        pieces = engine.processor.turn_pieces(message, None if memory is None else memory.input_ids)
        self.answer = Answer(pieces, memory, self._deliver, True, {"max_new_tokens": tokens, "do_sample": False})
        engine.submit(self.answer)

    def _deliver(self, event) -> None:
        if event is None:
            self.events.put(None)
            return
        if event.token is not None:
            self.times.append(time.thread_time())  # of the engine's thread
        if event.waveform is not None:
            self.samples.append(event.waveform)

    def wait(self) -> "Timed":
        self.events.get()
        if self.answer.error is not None:
            raise self.answer.error
        return self

    @property
    def waveform(self) -> torch.Tensor:
        return torch.cat(self.samples)

    @property
    def seconds_per_token(self) -> float:
        """Median over the answer's tokens after the first."""
        return statistics.median(np.diff(self.times))


def measure_batching(engine: Engine, repetitions: int) -> dict:
    questions = [question(engine.processor, session) for session in range(SESSIONS)]
    # Heard before, so that the tokens alone are timed: the first answer's memory is that of the next turn.
    memories = []
    for message in questions:
        answer = Timed(engine, message, tokens=2).wait().answer
        memories.append(answer.conversation(engine.processor.answer_end_id))
    texts = [{"role": "user", "content": f"And what is {session}?"} for session in range(SESSIONS)]
    rates = {"one after the other": [], "at once": []}
    for _ in range(repetitions):
        begin, one_by_one = time.process_time(), []
        for message, memory in zip(texts, memories):
            one_by_one.append(Timed(engine, message, memory).wait())
        rates["one after the other"].append(SESSIONS * TOKENS / (time.process_time() - begin))
        begin = time.process_time()
        at_once = [Timed(engine, message, memory) for message, memory in zip(texts, memories)]
        at_once = [answer.wait() for answer in at_once]
        rates["at once"].append(SESSIONS * TOKENS / (time.process_time() - begin))
        for one, other in zip(one_by_one, at_once):
            same = one.answer.tokens == other.answer.tokens
            same &= torch.equal(torch.cat(one.answer.units), torch.cat(other.answer.units))
            difference = float((one.waveform - other.waveform).abs().max()) if same else float("inf")
            if difference > 1e-4:
                raise SystemExit(f"A session in the batch is not as it is alone: samples differ by {difference}.")
    rates = {name: statistics.median(values) for name, values in rates.items()}
    rates["ratio"] = rates["at once"] / rates["one after the other"]
    return rates


def measure_hour(engine: Engine, minutes: float) -> dict:
    """The time per token of answers in the first minute and after so many of sound."""
    first = Timed(engine, question(engine.processor, 0, seconds=30)).wait()
    early = first.answer.conversation(engine.processor.answer_end_id)
    late, turn = early, 0
    while (heard := int((late.input_ids == engine.model.config.audio_token_id).sum()) / 600) < minutes:
        turn += 1
        message = question(engine.processor, 0, turn, seconds=min(600, 60 * (minutes - heard)))
        late = Timed(engine, message, late, tokens=8).wait().answer.conversation(engine.processor.answer_end_id)
        print(f"  {heard:.0f} minutes heard", flush=True)
    times = {"minute 1": [], f"minute {minutes:g}": []}
    for _ in range(7):
        for name, memory in zip(times, (early, late)):
            message = {"role": "user", "content": "And then?"}
            times[name].append(Timed(engine, message, memory).wait().seconds_per_token)
    times = {name: 1000 * statistics.median(values) for name, values in times.items()}
    first, last = times.values()
    bytes_ = [sum(x.nbytes for layer in m.cache.layers for x in layer.tensors().values()) for m in (early, late)]
    return {"ms_per_token": times, "ratio": last / first, "bytes": bytes_, "tokens": late.input_ids.shape[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description="Eight sessions at once, and one after an hour.")
    parser.add_argument("--model", metavar="DIR", help="default: a random one")
    parser.add_argument("--hidden-size", type=int, default=128, metavar="N", help="of that; default: 128")
    parser.add_argument("--layers", type=int, default=4, metavar="N", help="of that; default: 4")
    parser.add_argument("--repetitions", type=int, default=3, metavar="N", help="default: 3")
    parser.add_argument("--minutes", type=float, default=MINUTES, metavar="N", help="default: 60")
    parser.add_argument("--output", type=Path, default=RESULTS / "serve_batching.json", metavar="FILE")
    arguments = parser.parse_args()
    if arguments.model is None:
        from tempfile import TemporaryDirectory

        with TemporaryDirectory() as folder:
            model, processor = small_model(Path(folder, "tiny"), arguments.hidden_size, arguments.layers)
    else:
        model = TTTOmniForCausalLM.from_pretrained(arguments.model).eval()
        processor = TTTOmniProcessor.from_pretrained(arguments.model)
    model.generation_config.eos_token_id = None  # all answers have the same length
    parameters = sum(x.numel() for x in model.parameters())
    engine = Engine(model, processor)
    batching = measure_batching(engine, arguments.repetitions)
    print(f"{parameters / 1e6:.1f} M parameters, {torch.get_num_threads()} threads")
    print(f"{SESSIONS} sessions one after the other: {batching['one after the other']:7.1f} tokens/s")
    print(
        f"{SESSIONS} sessions at once:             {batching['at once']:7.1f} tokens/s, {batching['ratio']:.2f} times"
    )
    results = {"parameters": parameters, **environment(), "batching": batching}
    if not {"full_attention", "hybrid"} & set(model.config.get_text_config().layer_types):
        hour = results["hour"] = measure_hour(engine, arguments.minutes)
        for name, milliseconds in hour["ms_per_token"].items():
            print(f"{name:>10}: {milliseconds:6.2f} ms per token")
        print(f"ratio {hour['ratio']:.3f}, after {hour['tokens']} tokens; bytes of the memory: {hour['bytes']}")
    engine.close()
    store(arguments.output, results)


if __name__ == "__main__":
    main()
