# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Models whose projections are quantised: what stays as it is, what they say, and how they train."""

import copy
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from ttt_omni import TTTOmniConfig, TTTOmniForCausalLM, ttt_lora_config
from ttt_omni.commands.cli import main
from ttt_omni.loading import quantization
from ttt_omni.training import make_parent


logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of each cast

ROOT = Path(__file__).parent.parent
BITS = {
    "8 bit": {"load_in_8bit": True, "llm_int8_threshold": 1e-4},
    "4 bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
}
SKIP_NOTHING = {"llm_int8_skip_modules": ["nothing"]}  # a list of the user's own, in place of Transformers' default
# Nothing else is left, so that a model gets small.
KEPT = {
    "lm_head",
    *(f"model.language_model.layers.{index}.ttt.{x}_gate" for index in (1, 2, 3) for x in ("head", "lr")),
    *(f"speech_decoder.{name}" for name in ("input_proj", "output_proj")),
    "vocoder.dur_predictor.proj",
}
AUDIO_TOKEN_ID = 319
INPUT_IDS = torch.arange(150)[None] % 97 + 5
LABELS = torch.where(torch.arange(150) < 100, -100, INPUT_IDS)


def make_model(**kwargs) -> TTTOmniForCausalLM:
    """One with widths that are multiples of the 64 weights that 4-bit kernels for the CPU take at once."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2}
    text_config = {
        "vocab_size": 320,
        "num_hidden_layers": 4,
        "layer_types": ["full_attention", "hybrid", "hybrid_sliding", "linear_attention"],
        "ttt_layer_type": ["linear", "mlp", "linear", "linear"],
        "ttt_mini_batch_size": 16,
        "ttt_gate_init": 0.5,
        "ttt_head_gate": True,
        "sliding_window": 16,
        "eos_token_id": 1,
    }
    audio_config = {"d_model": 64, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 128}
    config = TTTOmniConfig(
        text_config=sizes | text_config,
        audio_config=audio_config | {"num_mel_bins": 80, "max_source_positions": 1500},
        speech_decoder_config=sizes | {"input_size": 128, "unit_vocab_size": 20, "upsample_factor": 5},
        vocoder_config={
            "unit_vocab_size": 20,
            "unit_embed_dim": 16,
            "duration_predictor_hidden_dim": 16,
            "upsample_initial_channel": 32,
        },
        audio_token_id=AUDIO_TOKEN_ID,
        projector_hidden_size=128,
        **kwargs,
    )
    torch.manual_seed(0)
    model = TTTOmniForCausalLM(config)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):  # so that all say something
            torch.nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide")
    make_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def full(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def quantised(folder, bits, **kwargs):
    config = BitsAndBytesConfig(**BITS[bits], **kwargs)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config).eval()


def kept(model) -> set[str]:
    """Names of the projections that are not quantised."""
    return {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}


def edit_distance(a: list[int], b: list[int]) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def test_what_any_quantiser_leaves(full):
    patterns = HfQuantizer.get_modules_to_not_convert(full, ["nothing"], full._keep_in_fp32_modules)
    linear = {name for name, module in full.named_modules() if isinstance(module, torch.nn.Linear)}
    # Some quantisers ask by the names of modules, some by those of parameters.
    assert {name for name in linear if not should_convert_module(name, patterns)} == KEPT - {"lm_head"}
    assert {name for name in linear if not should_convert_module(f"{name}.weight", patterns)} == KEPT - {"lm_head"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_quantisers_leave_has_the_dtype_of_the_model(folder, dtype):
    """In bfloat16; in float16 it is in float32, which is what Transformers' list of it means."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    in_float32 = {name for name, x in model.named_parameters() if x.dtype == torch.float32}
    parts = ["ttt.inner_model.", "ttt.inner_norm.", "ttt.token_scale.", "ttt_gate.", "vocoder."]
    parts += ["head_gate.", "lr_gate.", "input_proj.", "output_proj."] if dtype == torch.float16 else []
    assert in_float32 == {name for name, _ in model.named_parameters() if any(part in name for part in parts)}
    assert {x.dtype for x in model.parameters()} == {dtype, torch.float32}
    output = model(INPUT_IDS, labels=LABELS, unit_labels=torch.arange(10)[None])
    assert output.loss.isfinite() and output.ctc_loss > 0


@pytest.mark.parametrize("kwargs", [{}, SKIP_NOTHING], ids=["default", "own list"])
@pytest.mark.parametrize("bits", BITS)
def test_what_is_quantised(folder, full, bits, kwargs):
    model = quantised(folder, bits, **kwargs)
    assert kept(model) == KEPT - ({"lm_head"} if kwargs else set())
    storage = torch.int8 if bits == "8 bit" else torch.uint8
    assert {x.dtype for x in model.parameters()} == {torch.float32, storage}
    with torch.no_grad():
        logits, expected = (m(INPUT_IDS).logits.flatten() for m in (model, full))
    assert torch.stack([logits, expected]).corrcoef()[0, 1] > (0.99 if bits == "8 bit" else 0.8)


@pytest.mark.parametrize("bits", BITS)
def test_tied_embeddings(tmp_path, bits):
    config = make_model().config
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    torch.manual_seed(0)
    TTTOmniForCausalLM(config).save_pretrained(tmp_path)
    model = quantised(tmp_path, bits)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model(INPUT_IDS).logits.isfinite().all()


@pytest.mark.parametrize("bits, share", [("8 bit", 0.1), ("4 bit", 0.4)])
def test_speech(folder, full, bits, share):
    model = quantised(folder, bits)
    states = torch.randn(200, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        units, expected = (m.speak(states).tolist() for m in (model, full))
    assert len(expected) > 150 and edit_distance(units, expected) <= share * len(expected)
    assert torch.equal(model.vocoder(torch.tensor(expected)), full.vocoder(torch.tensor(expected)))


@pytest.mark.parametrize("bits", BITS)
def test_stream_is_generate(folder, bits):
    model = quantised(folder, bits)
    ids = torch.cat([INPUT_IDS[:, :10], torch.full((1, 300), AUDIO_TOKEN_ID), INPUT_IDS[:, :10]], dim=1)
    features = torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "input_features": features, "max_new_tokens": 8, "do_sample": False}
    out = model.generate(**inputs, return_audio=True)
    events = list(model.stream(**inputs, tokenizer=SimpleNamespace(decode=lambda tokens, **kwargs: "")))
    assert [event.token for event in events if event.token is not None] == out.sequences[0, ids.shape[1] :].tolist()
    waveform = torch.cat([event.waveform for event in events if event.waveform is not None])
    torch.testing.assert_close(waveform, out.waveform[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("prepare", [False, True], ids=["as it is", "prepared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", BITS)
def test_adapter_on_a_quantised_model(folder, bits, dtype, prepare):
    config = BitsAndBytesConfig(**BITS[bits] | ({"bnb_4bit_compute_dtype": dtype} if bits == "4 bit" else {}))
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config)
    if prepare:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    model = get_peft_model(base, ttt_lora_config(base, rank=4)).train()
    trained = {name: x for name, x in model.named_parameters() if x.requires_grad}
    torch.manual_seed(0)
    with torch.no_grad():
        for name, x in trained.items():
            if "lora_B" in name:
                x.normal_(std=0.02)  # from 0, no gradient would reach A
    units = torch.randint(20, (1, 60), generator=torch.Generator().manual_seed(0))

    def step():
        return model(input_ids=INPUT_IDS, labels=LABELS, unit_labels=units)

    step().ctc_loss.backward()
    assert len(trained) > 60
    for name, x in trained.items():
        assert x.grad is not None and x.grad.isfinite().all() and x.grad.any(), name
    optimizer, losses = torch.optim.AdamW(trained.values(), lr=1e-2), []
    for _ in range(8):
        optimizer.zero_grad()
        losses.append(step().loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("bits", BITS)
def test_gradients_are_those_of_the_full_model(folder, full, bits):
    """Of the CTC loss, by the states that the speech decoder reads."""
    states = torch.randn(1, 50, 128, generator=torch.Generator().manual_seed(1))
    units = torch.randint(20, (1, 60), generator=torch.Generator().manual_seed(2))
    losses, gradients = [], []
    for model in (full, quantised(folder, bits)):
        leaf = states.clone().requires_grad_()
        loss = model.speech_decoder.ctc_loss(leaf, torch.zeros(1, 50, dtype=torch.long), units)
        losses.append(loss.item())
        gradients.append(torch.autograd.grad(loss, leaf)[0].flatten())
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert torch.stack(gradients).corrcoef()[0, 1] > (0.98 if bits == "8 bit" else 0.3)


@pytest.mark.parametrize("bits", BITS)
def test_saved_and_loaded(folder, bits, tmp_path):
    model = quantised(folder, bits)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert kept(loaded) == KEPT
    with torch.no_grad():
        torch.testing.assert_close(loaded(INPUT_IDS).logits, model(INPUT_IDS).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("bits", BITS)
def test_parent_of_a_quantised_graft(folder, tmp_path, bits):
    """All attention of the parent is the student's, quantised, but that which the student lacks."""
    student = quantised(folder, bits)
    config = copy.deepcopy(student.config)
    del config.quantization_config
    config.text_config.layer_types = ["full_attention"] * 4
    whole = TTTOmniForCausalLM(config)
    whole.save_pretrained(tmp_path)
    parent = make_parent(student, tmp_path)
    attention = parent.model.language_model.layers[3].self_attn
    assert torch.equal(attention.q_proj.weight, whole.model.language_model.layers[3].self_attn.q_proj.weight)
    for index in (0, 1, 2):
        projections = [m.model.language_model.layers[index].self_attn.q_proj for m in (parent, student)]
        assert projections[0].weight is projections[1].weight
    assert parent(INPUT_IDS).logits.isfinite().all()


def test_quantize_of_the_commands(tiny_model_dir, folder, tmp_path, monkeypatch):
    """Of what is loaded for `answer`, `chat` and `serve`; the tiny model's widths are too small for 4 bit."""
    assert quantization(None, folder) == {}
    with pytest.raises(ValueError, match="int8 or int4, not 'int3'"):
        quantization("int3", folder)
    four_bit = TTTOmniForCausalLM.from_pretrained(folder, **quantization("int4", folder))
    assert kept(four_bit) == KEPT and torch.uint8 in {x.dtype for x in four_bit.parameters()}
    models, load = [], TTTOmniForCausalLM.from_pretrained

    def remember(*args, **kwargs):
        models.append(load(*args, **kwargs))
        return models[-1]

    monkeypatch.setattr(TTTOmniForCausalLM, "from_pretrained", remember)
    question, answer = str(ROOT / "examples" / "question.wav"), tmp_path / "answer.wav"
    arguments = [f"--output={answer}", "--max-new-tokens=3"]
    main(["answer", f"--model={tiny_model_dir}", question, "--quantize=int8", *arguments])
    layer = models[0].model.language_model.layers[3]
    assert layer.mlp.up_proj.weight.dtype == torch.int8 and layer.ttt.inner_model.W1.dtype == torch.float32
    assert answer.exists()
