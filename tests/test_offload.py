# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Parts of a model on disk or moved in for each call: the same numbers as with all of it in memory."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoProcessor, DynamicCache

from ttt_omni.training import calibrate


QUESTION = Path(__file__).parent.parent / "examples" / "question.wav"
MESSAGE = {"role": "user", "content": [{"type": "audio", "audio": str(QUESTION)}, {"type": "text", "text": "hi"}]}
GREEDY = {"max_new_tokens": 6, "do_sample": False}

PARTS = ("model.audio_tower", "model.multi_modal_projector", "lm_head", "speech_decoder", "vocoder")
PARTS += tuple(f"model.language_model.{name}" for name in ("embed_tokens", "norm", "rotary_emb"))
LAYERS = tuple(f"model.language_model.layers.{index}" for index in range(4))
OF_A_LAYER = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm", "ttt", "ttt_gate")


def on_disk(*names: str) -> dict[str, str]:
    """A device map with these modules on disk and all others in memory."""
    modules = [*PARTS, *LAYERS[:2], *(f"{layer}.{name}" for layer in LAYERS[2:] for name in OF_A_LAYER)]
    return {module: "disk" if module.startswith(names) else "cpu" for module in modules}


MAPS = {
    "speech decoder": {"device_map": on_disk("speech_decoder")},
    "vocoder": {"device_map": on_disk("vocoder")},
    "language model": {"device_map": {"model": "disk", "lm_head": "disk", "speech_decoder": "cpu", "vocoder": "cpu"}},
    "upper layers": {"device_map": dict.fromkeys(PARTS, "cpu") | dict(zip(LAYERS, ["cpu", "cpu", "disk", "disk"]))},
    "TTT": {"device_map": on_disk(*(f"{layer}.ttt" for layer in LAYERS))},
    "all": {"device_map": dict.fromkeys([*PARTS, *LAYERS], "disk")},
    "what does not fit": {"device_map": "auto", "max_memory": {"cpu": "1MB"}},
}


@pytest.fixture(scope="module")
def whole(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()


@pytest.fixture(scope="module")
def processor(tiny_model_dir):
    return AutoProcessor.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="module")
def inputs(processor):
    return processor.apply_chat_template(
        [MESSAGE], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


@pytest.fixture(scope="module", params=MAPS)
def offloaded(request, tiny_model_dir, tmp_path_factory):
    model = AutoModelForCausalLM.from_pretrained(
        tiny_model_dir, offload_folder=tmp_path_factory.mktemp("offload"), **MAPS[request.param]
    )
    assert any(x.device.type == "meta" for x in model.parameters())
    return model.eval()


@pytest.fixture(scope="module")
def answer(whole, inputs):
    return whole.generate(**inputs, **GREEDY, return_audio=True)


def test_generate(offloaded, inputs, answer):
    out = offloaded.generate(**inputs, **GREEDY, return_audio=True)
    assert torch.equal(out.sequences, answer.sequences) and torch.equal(out.units[0], answer.units[0])
    torch.testing.assert_close(out.waveform[0], answer.waveform[0], rtol=0, atol=1e-5)


def test_stream(offloaded, inputs, answer):
    events = list(offloaded.stream(**inputs, **GREEDY))
    tokens = [event.token for event in events if event.token is not None]
    assert tokens == answer.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    waveform = torch.cat([event.waveform for event in events if event.waveform is not None])
    torch.testing.assert_close(waveform, answer.waveform[0], rtol=0, atol=1e-5)


def test_listen(offloaded, processor, answer):
    *_, memory = offloaded.listen(processor.turn_pieces(MESSAGE))
    assert torch.equal(offloaded.generate(**vars(memory), **GREEDY), answer.sequences)


def test_memory(offloaded, whole, inputs, answer, tmp_path):
    """Saved by either, loaded by either."""
    next_ids = torch.tensor([[7, 8, 9]])
    expected = None
    for writer in (whole, offloaded):
        cache = DynamicCache(config=writer.config)
        with torch.no_grad():
            writer(**inputs, cache=cache)
        writer.save_memory(tmp_path / "memory.safetensors", cache)
        for reader in (whole, offloaded):
            memory = reader.load_memory(tmp_path / "memory.safetensors")
            with torch.no_grad():
                logits = reader(next_ids, cache=memory.cache).logits
            expected = logits if expected is None else expected
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)


def test_loss(offloaded, whole, inputs):
    labels = inputs["input_ids"].clone()
    labels[:, :-10] = -100
    losses = []
    for model in (offloaded, whole):
        with torch.no_grad():
            output = model(**inputs, labels=labels, unit_labels=torch.tensor([[3, 3, 4]]))
        losses.append(torch.stack([output.lm_loss, output.ctc_loss]))
    torch.testing.assert_close(*losses)


def test_calibration_of_what_is_not_there(whole, inputs, tiny_model_dir, tmp_path):
    """Biases on disk cannot be changed in place."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, offload_folder=tmp_path, **MAPS["TTT"])
    with pytest.raises(ValueError, match="offloaded model cannot be calibrated"):
        calibrate(model, [inputs])
