# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.serialization import skip_data
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb, repeat_kv

from ttt_omni import TTTOmniForCausalLM
from ttt_omni.commands.cli import main
from ttt_omni.conversion import ConversionError, convert_llama_omni, tiny
from ttt_omni.conversion.graft import select_layers
from ttt_omni.conversion.llama_omni import plan_conversion
from ttt_omni.streaming_ttt_omni import UnitStream


def load_tensors(folder):
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def assert_same_tensors(folder, other):
    tensors, others = load_tensors(folder), load_tensors(other)
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == others[name].dtype and torch.equal(tensor, others[name]), name


def edit_json(path, **values):
    """Sets fields of a JSON file, and removes those that are `...`."""
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


def edit_tensors(folder, **edits):
    """Applies a function to tensors of `model.safetensors`; what it makes `None` is removed."""
    tensors = load_file(folder / "model.safetensors")
    for name, edit in edits.items():
        tensors[name] = edit(tensors.get(name))
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def shard(folder, count):
    """Splits `model.safetensors` into `count` shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i in range(count):
        file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        names = list(tensors)[i::count]
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def put_encoder_inside(folder, whisper):
    encoder = torch.load(whisper, weights_only=True)["model_state_dict"]
    names = [name for name in encoder if name.startswith("encoder.")]
    edit_tensors(folder, **{f"model.speech_{name}": lambda _, name=name: encoder[name] for name in names})


@pytest.fixture
def source(goldens, tmp_path):
    """A copy of the golden checkpoint to change."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(goldens / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def model(golden_model_dir):
    model, info = AutoModelForCausalLM.from_pretrained(golden_model_dir, output_loading_info=True)
    assert not any(info.values()), info
    return model


# What is written


def test_original_numbers(model, goldens):
    golden = load_file(goldens / "golden.safetensors")
    audio_token = model.config.audio_token_id
    ids = [
        audio_token if i == -200 else i for i in golden["input_ids"].tolist() for _ in range(300 if i == -200 else 1)
    ]
    inputs = {"input_ids": torch.tensor([ids]), "input_features": golden["mel"].T[None]}
    with torch.no_grad():
        logits = model(**inputs).logits[0, -32:]
    torch.testing.assert_close(logits, golden["prefill_logits_last32"], atol=1e-3, rtol=0)
    out = model.generate(**inputs, max_new_tokens=24, do_sample=False, return_audio=True)
    assert out.sequences[0, -24:].tolist() == golden["greedy_tokens"].tolist()
    assert out.units[0].tolist() == golden["units"].tolist()


def test_a_graft_starts_from_the_attention_and_the_values_that_remember_best(model):
    for index, layer in enumerate(model.model.language_model.layers):
        assert hasattr(layer, "ttt") == (index in (2, 3))
    layer = model.model.language_model.layers[2]
    ttt, attention = layer.ttt, layer.self_attn
    heads, groups = ttt.num_heads, attention.num_key_value_groups

    def repeated(weight):
        return repeat_kv(weight.view(1, heads // groups, ttt.head_dim, -1), groups).view(-1, weight.shape[-1])

    assert groups == 2
    assert torch.equal(ttt.q_proj.weight, attention.q_proj.weight)
    assert torch.equal(ttt.k_proj.weight, repeated(attention.k_proj.weight))
    assert torch.equal(ttt.v_proj.weight, repeated(attention.v_proj.weight))
    assert torch.equal(ttt.o_proj.weight, attention.o_proj.weight)

    for zero in (ttt.q_proj.bias, ttt.k_proj.bias, ttt.lr_gate.bias, ttt.inner_norm.bias, ttt.post_norm.bias):
        assert not zero.any()
    assert not ttt.inner_model.b1.any() and not layer.ttt_gate.weight.any()
    assert (ttt.inner_norm.weight == 1).all() and (ttt.post_norm.weight == 1).all()
    for random in (ttt.inner_model.W1, ttt.lr_gate.weight):
        assert random.std().item() == pytest.approx(0.02, rel=0.2)
    scale = [max(1 / (i + 1), 1 / 8) for i in range(64)]
    torch.testing.assert_close(ttt.token_scale(), torch.tensor(scale))
    assert not torch.equal(ttt.inner_model.W1, model.model.language_model.layers[3].ttt.inner_model.W1)


def test_the_folder_is_complete(golden_model_dir, goldens):
    config = json.loads((golden_model_dir / "config.json").read_text())
    assert config["architectures"] == ["TTTOmniForCausalLM"]
    assert config["dtype"] == "float32"
    assert config["auto_map"].keys() == {"AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForMultimodalLM"}
    assert config["audio_token_id"] == 386
    assert config["text_config"]["layer_types"] == ["full_attention"] * 2 + ["hybrid"] * 2
    for part in (config["text_config"], config["speech_decoder_config"]):
        assert part["rope_parameters"]["rope_type"] == "llama3"
        assert part["rope_parameters"]["rope_theta"] == 500000.0
        assert part["rms_norm_eps"] == 1e-5
        assert part["max_position_embeddings"] == 131072
    generation = json.loads((golden_model_dir / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["pad_token_id"]) == (384, 388)
    assert generation["eos_token_id"] == [385, 392, 393]
    processor = AutoProcessor.from_pretrained(golden_model_dir)
    assert processor.feature_extractor.feature_size == 128
    assert processor.tokenizer.model_max_length == 131072
    card = (golden_model_dir / "README.md").read_text()
    assert card.startswith("---\n") and "base_model: llama_omni_tiny\n" in card and "$" not in card
    code = {path.name for path in golden_model_dir.glob("*.py")}
    assert {"configuration_ttt_omni.py", "modeling_ttt_omni.py", "processing_ttt_omni.py"} <= code


def test_the_same_at_every_run_from_shards_and_into_shards(golden_model_dir, source, parts, tmp_path):
    shard(source, 3)
    convert_llama_omni(source, tmp_path / "out", **parts, layers=[3, 2], dtype="float32", max_shard_size=400_000)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 3
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert_same_tensors(tmp_path / "out", golden_model_dir)
    _, info = TTTOmniForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())


def test_the_given_encoder_wins_over_the_one_inside(golden_model_dir, source, parts, tmp_path):
    put_encoder_inside(source, parts["whisper"])
    edit_tensors(source, **{"model.speech_encoder.conv1.weight": torch.zeros_like})
    convert_llama_omni(source, tmp_path / "out", **parts, layers="2,3", dtype="float32")
    assert_same_tensors(tmp_path / "out", golden_model_dir)


@pytest.mark.parametrize("model_class", ["WhisperModel", "WhisperForConditionalGeneration"])
def test_an_encoder_in_the_format_of_transformers(golden_model_dir, source, parts, model, tmp_path, model_class):
    config = WhisperConfig.from_dict(
        model.config.audio_config.to_dict()
        | {"vocab_size": 60000, "decoder_layers": 1, "decoder_ffn_dim": 8, "decoder_attention_heads": 1}
    )
    whisper = WhisperForConditionalGeneration(config)
    whisper.model.encoder.load_state_dict(model.model.audio_tower.state_dict())
    saved = whisper if model_class == "WhisperForConditionalGeneration" else whisper.model
    saved.save_pretrained(tmp_path / "whisper", max_shard_size="2MB")
    assert (tmp_path / "whisper" / "model.safetensors.index.json").exists()
    convert_llama_omni(
        source, tmp_path / "out", **parts | {"whisper": tmp_path / "whisper"}, layers="2-3", dtype="float32"
    )
    assert_same_tensors(tmp_path / "out", golden_model_dir)


def test_an_encoder_inside_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(tiny.ENCODER, "n_audio_state", 64)
    monkeypatch.setitem(tiny.ENCODER, "n_audio_head", 1)
    tiny.write_llama_omni(tmp_path)
    vocoder = {"vocoder": tmp_path / "vocoder.pt", "vocoder_config": tmp_path / "vocoder_config.json"}
    convert_llama_omni(tmp_path, tmp_path / "given", whisper=tmp_path / "whisper.pt", **vocoder)
    put_encoder_inside(tmp_path, tmp_path / "whisper.pt")
    convert_llama_omni(tmp_path, tmp_path / "inside", **vocoder)
    assert_same_tensors(tmp_path / "inside", tmp_path / "given")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("given", "inside")]
    assert configs[0]["audio_config"] == configs[1]["audio_config"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("ttt_type", ["linear", "mlp"])
@pytest.mark.parametrize("mode", ["hybrid", "replace"])
def test_modes_types_and_dtypes(goldens, parts, tmp_path, mode, ttt_type, dtype):
    convert_llama_omni(
        goldens, tmp_path / "out", **parts, mode=mode, ttt_type=ttt_type, dtype=dtype, mini_batch_size=16
    )
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    layer = model.model.language_model.layers[3]
    assert layer.ttt.token_scale.weight.shape == (16,)
    assert hasattr(layer.ttt.inner_model, "W2") == (ttt_type == "mlp")
    if ttt_type == "mlp":
        assert layer.ttt.inner_model.W2.std().item() == pytest.approx(0.02, rel=0.1)
    assert (layer.self_attn is not None) == (mode == "hybrid")
    assert [hasattr(layer, "ttt") for layer in model.model.language_model.layers] == [False, False, False, True]

    kept = ("inner_model", "inner_norm", "token_scale", "ttt_gate", "vocoder")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        for name in file.keys():
            expected = "F32" if any(part in name.split(".") for part in kept) else {"b": "BF16", "f": "F16"}[dtype[0]]
            assert file.get_slice(name).get_dtype() == expected, name
    kept += (
        ("head_gate", "lr_gate", "input_proj", "output_proj") if dtype == "float16" else ()
    )  # as Transformers loads them
    for name, parameter in model.named_parameters():
        kept_in_float32 = any(part in name.split(".") for part in kept)
        assert parameter.dtype == (torch.float32 if kept_in_float32 else getattr(torch, dtype)), name


def test_what_replaces_attention_compares_as_attention_did(golden_model_dir, goldens, parts, tmp_path):
    """Within a mini-batch, the products of TTT's queries and keys are attention's (but for long-range scaling)."""
    convert_llama_omni(goldens, tmp_path / "out", **parts, mode="replace", dtype="float32", mini_batch_size=32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    full = AutoModelForCausalLM.from_pretrained(golden_model_dir)
    assert full.config.text_config.ttt_rope_theta is None
    attention = full.model.language_model.layers[3].self_attn
    ttt = model.model.language_model.layers[3].ttt
    hidden_states = torch.randn(1, 64, attention.config.hidden_size, generator=torch.Generator().manual_seed(0))
    shape = (1, 64, -1, attention.head_dim)
    with torch.no_grad():
        q, k, _ = ttt._project(hidden_states, ttt.inner_model(1), None, None)
        theta = attention.config.rope_parameters["rope_theta"]
        unscaled = LlamaConfig(
            head_dim=attention.head_dim, rope_parameters={"rope_type": "default", "rope_theta": theta}
        )
        rotation = LlamaRotaryEmbedding(unscaled)(hidden_states, torch.arange(64)[None])
        heads = (projection(hidden_states).view(shape) for projection in (attention.q_proj, attention.k_proj))
        rotated = apply_rotary_pos_emb(*(x.transpose(1, 2) for x in heads), *rotation)
    query, key = (torch.nn.functional.normalize(x, dim=-1) * attention.head_dim**0.5 for x in rotated)
    key = repeat_kv(key, attention.num_key_value_groups)
    for piece in (slice(0, 32), slice(32, 64)):
        expected = query[:, :, piece] @ key[:, :, piece].mT
        torch.testing.assert_close(q[:, :, piece] @ k[:, :, piece].mT, expected, rtol=1e-4, atol=1e-4)


def test_a_window(golden_model_dir, goldens, parts, tmp_path):
    """One longer than the conversation changes nothing; one of a wrong size is refused before anything is written."""
    window = {"layers": "2-3", "dtype": "float32", "attention_sinks": 2}
    convert_llama_omni(goldens, tmp_path / "out", **parts, **window, attention_window=64)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    config = model.config.text_config
    assert config.layer_types == ["sliding_attention"] * 2 + ["hybrid_sliding"] * 2
    assert (config.sliding_window, config.attention_sinks) == (64, 2)
    ids = torch.randint(0, 640, (1, 60), generator=torch.Generator().manual_seed(0))
    full = AutoModelForCausalLM.from_pretrained(golden_model_dir)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, full(ids).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="`sliding_window`"):
        convert_llama_omni(goldens, tmp_path / "none", **parts, **window, attention_window=0)
    assert not (tmp_path / "none").exists()


def test_a_window_bounds_speech_too(golden_model_dir, source, parts, tmp_path):
    """2,000 tokens with the memory of 100, and what is said of the first 100 is what the original says of them."""
    convert_llama_omni(source, tmp_path / "out", **parts, attention_window=64, dtype="float32")
    windowed = AutoModelForCausalLM.from_pretrained(tmp_path / "out").speech_decoder
    full = AutoModelForCausalLM.from_pretrained(golden_model_dir).speech_decoder
    assert full.config.sliding_window is None and windowed.config.sliding_window == 100 * 25
    hidden_states = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    stream, units, sizes = UnitStream(windowed), [], []
    for piece in hidden_states.split(50):
        units.append(stream.push(piece))
        sizes.append([layer.keys.shape[2] for layer in stream.cache.layers])
    assert sizes[2:] == [[4 + 100 * 25 - 1] * 2] * 38
    assert torch.equal(torch.cat(units[:2]), UnitStream(full).push(hidden_states[:100]))
    assert len(torch.cat(units)) > 2000

    edit_json(source / "config.json", max_position_embeddings=1000)
    convert_llama_omni(source, tmp_path / "short", **parts, attention_window=64)
    config = json.loads((tmp_path / "short" / "config.json").read_text())["speech_decoder_config"]
    assert config["sliding_window"] + config["attention_sinks"] == 1000


@pytest.mark.parametrize("tied, bias", [(False, False), (True, True)])
def test_a_text_only_llama(goldens, tmp_path, tied, bias):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=640, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, attention_bias=bias, tie_word_embeddings=tied, initializer_range=0.2,
        bos_token_id=384, eos_token_id=393,
    )  # fmt: skip
    llama = LlamaForCausalLM(config).eval()
    for name, parameter in llama.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter)
    llama.save_pretrained(tmp_path / "llama")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(goldens)
    tokenizer.chat_template = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "llama")

    convert_llama_omni(tmp_path / "llama", tmp_path / "out", dtype="float32")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.audio_config is None and model.config.vocoder_config is None
    assert model.model.language_model.layers[2].ttt.q_proj.bias.any() == bias
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": "What did you hear?"}]
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    expected = tokenizer.apply_chat_template(messages, return_tensors="pt")
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, llama(inputs["input_ids"]).logits, atol=1e-5, rtol=0)


def test_parameters_of_the_real_sizes(tmp_path, tiny_model_dir):
    """Files of the released layout and sizes that hold nothing, as they are planned from their headers alone."""
    hidden, inner, vocab, kv = 4096, 14336, 128256, 1024
    shapes = {"model.embed_tokens.weight": (vocab, hidden), "lm_head.weight": (vocab, hidden)}
    shapes["model.norm.weight"] = (hidden,)

    def add_layers(prefix, count, kv, inner):
        for i in range(count):
            for name, *shape in (
                ("self_attn.q_proj", hidden, hidden),
                ("self_attn.k_proj", kv, hidden),
                ("self_attn.v_proj", kv, hidden),
                ("self_attn.o_proj", hidden, hidden),
                ("mlp.gate_proj", inner, hidden),
                ("mlp.up_proj", inner, hidden),
                ("mlp.down_proj", hidden, inner),
                ("input_layernorm", hidden),
                ("post_attention_layernorm", hidden),
            ):
                shapes[f"{prefix}.layers.{i}.{name}.weight"] = tuple(shape)

    add_layers("model", 32, kv, inner)
    add_layers("speech_generator", 2, hidden, 11008)
    for name, rows, columns in (
        ("model.speech_projector.linear1", 2048, 5 * 1280),
        ("model.speech_projector.linear2", hidden, 2048),
        ("speech_generator.input_proj", hidden, hidden),
        ("speech_generator.output_proj", 1001, hidden),
    ):
        shapes |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}

    source = tmp_path / "source"
    source.mkdir()
    weight_map = {}
    for i in range(4):
        names, header, end = sorted(shapes)[i::4], {}, 0
        for name in names:
            start, end = end, end + 2 * math.prod(shapes[name])
            header[name] = {"dtype": "F16", "shape": shapes[name], "data_offsets": [start, end]}
        header = json.dumps(header).encode()
        with open(source / f"model-{i}.safetensors", "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + end)
        weight_map |= dict.fromkeys(names, f"model-{i}.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    tiny_source = tiny_model_dir / "llama-omni"
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny_source / name, source / name)
    edit_json(
        source / "config.json", vocab_size=vocab, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, speech_encoder_hidden_size=1280,
        ctc_decoder_config="(2,4096,32,11008)", unit_vocab_size=1000,
    )  # fmt: skip

    nothing = torch.empty

    encoder = {"conv1.weight": (1280, 128, 3), "conv1.bias": (1280,), "conv2.weight": (1280, 1280, 3)}
    encoder |= {"conv2.bias": (1280,), "positional_embedding": (1500, 1280)}
    encoder |= {"ln_post.weight": (1280,), "ln_post.bias": (1280,)}
    for block in (f"blocks.{i}" for i in range(32)):
        for name in ("attn.query", "attn.value", "attn.out"):
            encoder |= {f"{block}.{name}.weight": (1280, 1280), f"{block}.{name}.bias": (1280,)}
        encoder |= {f"{block}.attn.key.weight": (1280, 1280)}
        encoder |= {f"{block}.mlp.0.weight": (5120, 1280), f"{block}.mlp.0.bias": (5120,)}
        encoder |= {f"{block}.mlp.2.weight": (1280, 5120), f"{block}.mlp.2.bias": (1280,)}
        for name in ("attn_ln", "mlp_ln"):
            encoder |= {f"{block}.{name}.weight": (1280,), f"{block}.{name}.bias": (1280,)}
    dims = {"n_mels": 128, "n_audio_ctx": 1500, "n_audio_state": 1280, "n_audio_head": 20, "n_audio_layer": 32}
    state = {f"encoder.{name}": nothing(*shape) for name, shape in encoder.items()}
    with skip_data():
        torch.save({"dims": dims, "model_state_dict": state}, tmp_path / "large-v3.pt")

    released = {"num_embeddings": 1000, "embedding_dim": 128, "model_in_dim": 128, "upsample_initial_channel": 512}
    predictor = {
        "encoder_embed_dim": 128,
        "var_pred_hidden_dim": 128,
        "var_pred_kernel_size": 3,
        "var_pred_dropout": 0.5,
    }
    (tmp_path / "vocoder.json").write_text(json.dumps(tiny.VOCODER | released | {"dur_predictor_params": predictor}))
    state = {"dict.weight": nothing(1000, 128)}
    for name, shape, bias in [
        ("conv_pre", (512, 128, 7), 512),
        *((f"ups.{i}", (512 >> i, 256 >> i, kernel), 256 >> i) for i, kernel in enumerate((11, 8, 8, 4, 4))),
        *(
            (f"resblocks.{3 * i + j}.convs{n}.{k}", (256 >> i, 256 >> i, kernel), 256 >> i)
            for i in range(5) for j, kernel in enumerate((3, 7, 11)) for n in (1, 2) for k in range(3)
        ),
        ("conv_post", (1, 16, 7), 1),
    ]:  # fmt: skip
        state |= {f"{name}.weight_v": nothing(*shape), f"{name}.weight_g": nothing(shape[0], 1, 1)}
        state[f"{name}.bias"] = nothing(bias)
    for i in (1, 2):
        state |= {
            f"dur_predictor.conv{i}.0.weight": nothing(128, 128, 3),
            f"dur_predictor.conv{i}.0.bias": nothing(128),
        }
        state |= {f"dur_predictor.ln{i}.weight": nothing(128), f"dur_predictor.ln{i}.bias": nothing(128)}
    state |= {"dur_predictor.proj.weight": nothing(1, 128), "dur_predictor.proj.bias": nothing(1)}
    with skip_data():
        torch.save({"generator": state}, tmp_path / "vocoder.pt")

    conversion = plan_conversion(
        source,
        whisper=tmp_path / "large-v3.pt",
        vocoder=tmp_path / "vocoder.pt",
        vocoder_config=tmp_path / "vocoder.json",
    )
    with torch.device("meta"):
        model = TTTOmniForCausalLM(conversion.config)

    attention = 2 * 4096 * 4096 + 2 * 1024 * 4096  # q and o, k and v of 8 heads
    llama = 2 * 128256 * 4096 + 32 * (attention + 3 * 4096 * 14336 + 2 * 4096) + 4096
    assert llama == 8_030_261_248  # as Llama-3.1-8B's card says
    whisper_layer = 4 * 1280 * 1280 + 3 * 1280 + (1280 * 5120 + 5120) + (5120 * 1280 + 1280) + 2 * 2 * 1280
    whisper = (1280 * 128 * 3 + 1280) + (1280 * 1280 * 3 + 1280) + 1500 * 1280 + 32 * whisper_layer + 2 * 1280
    projector = (6400 * 2048 + 2048) + (2048 * 4096 + 4096)
    ttt_projections = 4 * 4096 * 4096 + 2 * 4096  # q, k, v and o of 32 heads; biases of q and k
    ttt_inner = 32 * (128 * 128 + 128) + 2 * 32 * 128 + 64  # W1 and b1, inner LayerNorm, token scale
    gates = 2 * (32 * 4096 + 32) + 4096  # lr_gate and head_gate, and that of the channels
    ttt = ttt_projections + ttt_inner + gates + 2 * 4096  # post_norm
    speech_layer = 4 * 4096 * 4096 + 3 * 4096 * 11008 + 2 * 4096
    speech = (4096 * 4096 + 4096) + 2 * speech_layer + (4096 * 1001 + 1001)
    hifi_gan = (128 * 512 * 7 + 512) + (16 * 7 + 1)
    for width, kernel in ((256, 11), (128, 8), (64, 8), (32, 4), (16, 4)):
        hifi_gan += 2 * width * width * kernel + width  # upsampling
        hifi_gan += 6 * (width * width * (3 + 7 + 11) + 3 * width)  # three blocks of six convolutions
    duration_predictor = 2 * (128 * 128 * 3 + 128 + 2 * 128) + (128 + 1)
    expected = llama + whisper + projector + 8 * ttt + speech + 1000 * 128 + hifi_gan + duration_predictor

    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    assert sum(math.prod(tensor.shape) for tensor in conversion.tensors.values()) == expected
    assert model.config.text_config.layer_types == ["full_attention"] * 24 + ["hybrid"] * 8


# Which layers


@pytest.mark.parametrize(
    "layers, num_layers, expected",
    [
        (None, 32, range(24, 32)),
        (None, 2, [1]),
        ("24-31", 32, range(24, 32)),
        ("0,2,5-7", 8, [0, 2, 5, 6, 7]),
        (" 3 , 1 - 2,2", 4, [1, 2, 3]),
        ([5, 0, 5], 6, [0, 5]),
    ],
)
def test_layers(layers, num_layers, expected):
    assert select_layers(layers, num_layers) == list(expected)


@given(st.sets(st.integers(0, 40), min_size=1), st.integers(1, 41))
def test_a_layer_outside_the_model_is_refused(layers, num_layers):
    if max(layers) < num_layers:
        assert select_layers(",".join(map(str, layers)), num_layers) == sorted(layers)
    else:
        with pytest.raises(ConversionError, match="outside the model"):
            select_layers(",".join(map(str, layers)), num_layers)


@pytest.mark.parametrize("layers", ["", "a", "1-", "-1", "1;2", "3-1", "1.5", "0-9"])
def test_bad_layers(layers):
    with pytest.raises(ConversionError):
        select_layers(layers, 4)


# Bad input


def truncate(path):
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 1000)


def wrong_whisper(source, arguments):
    checkpoint = torch.load(arguments["--whisper"], weights_only=True)
    checkpoint["dims"]["n_audio_state"] = 16
    torch.save(checkpoint, source / "whisper.pt")
    arguments["--whisper"] = source / "whisper.pt"


def damaged_whisper(source, arguments):
    checkpoint = torch.load(arguments["--whisper"], weights_only=True)
    checkpoint["model_state_dict"]["encoder.blocks.1.mlp.0.weight"] = torch.zeros(3, 3)
    torch.save(checkpoint, source / "whisper.pt")
    arguments["--whisper"] = source / "whisper.pt"


def truncated_whisper(source, arguments):
    arguments["--whisper"] = Path(shutil.copy(arguments["--whisper"], source))
    truncate(arguments["--whisper"])


def missing_shard(source, arguments):
    shard(source, 3)
    (source / "model-00002-of-00003.safetensors").unlink()


def lost_tensor(source, arguments):
    shard(source, 2)
    index = source / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map=weight_map | {"model.extra": "model-00001-of-00002.safetensors"})


def without_reserved_tokens(source, arguments):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = (source / name).read_text()
        (source / name).write_text(content.replace("<|reserved_special_token_0|>", "<|something_else|>"))


def with_vocoder(source, arguments, **values):
    arguments["--vocoder-config"] = Path(shutil.copy(arguments["--vocoder-config"], source))
    edit_json(arguments["--vocoder-config"], **values)


def edit_pt(source, arguments, option, edit):
    content = torch.load(arguments[option], weights_only=True)
    edit(content)
    arguments[option] = source / "edited.pt"
    torch.save(content, arguments[option])


def with_index_entry(source, arguments, file):
    shard(source, 2)
    index = source / "model.safetensors.index.json"
    edit_json(index, weight_map=json.loads(index.read_text())["weight_map"] | {NORM: file})


def tensor_in_two_shards(source, arguments):
    shard(source, 2)
    paths = sorted(source.glob("*.safetensors"))
    first, second = map(load_file, paths)
    name = next(iter(first))
    save_file(second | {name: torch.full_like(first[name], 7.0)}, paths[1], metadata={"format": "pt"})


def compressed_vocoder(source, arguments):
    with zipfile.ZipFile(arguments["--vocoder"]) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    arguments["--vocoder"] = source / "compressed.pt"
    with zipfile.ZipFile(arguments["--vocoder"], "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


NORM = "model.norm.weight"
UP = "model.layers.1.mlp.up_proj.weight"
K = "model.layers.3.self_attn.k_proj.weight"
BAD_INPUT = {
    "missing shard": (missing_shard, "model-00002-of-00003.safetensors"),
    "tensor lost from its shard": (lost_tensor, "model.extra"),
    "truncated safetensors": (lambda s, a: truncate(s / "model.safetensors"), "damaged or truncated"),
    "no weights": (lambda s, a: (s / "model.safetensors").unlink(), "has neither"),
    "wrong shape": (lambda s, a: edit_tensors(s, **{UP: lambda t: t[:7]}), r"up_proj.*\[7, 64\], expected \[128, "),
    "wrong shape under TTT": (lambda s, a: edit_tensors(s, **{K: lambda t: t[:16]}), r"k_proj.*\[16, 64\], expected"),
    "missing tensor": (lambda s, a: edit_tensors(s, **{NORM: lambda t: None}), "lacks tensors for .*norm.weight"),
    "unknown tensor": (lambda s, a: edit_tensors(s, **{"model.new": lambda t: torch.ones(1)}), "model.new"),
    "no speech fields": (
        lambda s, a: edit_json(
            s / "config.json", speech_encoder_type=..., speech_encoder_ds_rate=..., speech_encoder_hidden_size=...,
            speech_generator_type=..., ctc_decoder_config=..., ctc_upsample_factor=..., unit_vocab_size=...,
            ctc_loss_weight=...,
        ),
        "lacks speech_encoder_type",
    ),
    "no unit_vocab_size": (lambda s, a: edit_json(s / "config.json", unit_vocab_size=...), "lacks unit_vocab_size"),
    "no speech weights": (
        lambda s, a: edit_tensors(s, **{f"model.speech_projector.linear{i}.{p}": lambda t: None
                                        for i in (1, 2) for p in ("weight", "bias")}),
        "lacks the tensors model.speech_projector",
    ),
    "no number": (lambda s, a: edit_json(s / "config.json", speech_encoder_ds_rate="5"), "speech_encoder_ds_rate"),
    "unknown activation": (lambda s, a: edit_json(s / "config.json", hidden_act="bogus"), "`hidden_act` .*'bogus'"),
    "unknown rope": (
        lambda s, a: edit_json(s / "config.json", rope_scaling={"rope_type": "bogus", "factor": 2.0}),
        "`rope_type`.*'bogus'",
    ),
    "bad decoder sizes": (lambda s, a: edit_json(s / "config.json", ctc_decoder_config="2,64"), "ctc_decoder_config"),
    "other projector": (lambda s, a: edit_json(s / "config.json", speech_projector_type="mlp"), "projector 'mlp'"),
    "other architecture": (lambda s, a: edit_json(s / "config.json", model_type="gpt2"), "'gpt2'"),
    "field of a wrong type": (lambda s, a: edit_json(s / "config.json", rms_norm_eps="small"), "rms_norm_eps"),
    "indivisible size": (lambda s, a: edit_json(s / "config.json", num_attention_heads=5), "num_attention_heads"),
    "config that is no JSON": (lambda s, a: (s / "config.json").write_text("{"), "not readable as JSON"),
    "no config": (lambda s, a: (s / "config.json").unlink(), "config.json does not exist"),
    "no tokenizer": (lambda s, a: (s / "tokenizer.json").unlink(), "no tokenizer.json"),
    "truncated tokenizer": (lambda s, a: truncate(s / "tokenizer.json"), "tokenizer cannot be read"),
    "truncated Whisper": (truncated_whisper, "not a Whisper checkpoint"),
    "tokenizer without a placeholder": (without_reserved_tokens, "reserved_special_token_0"),
    "tokenizer too large": (lambda s, a: edit_json(s / "config.json", vocab_size=600), "640 tokens"),
    "Whisper of another size": (wrong_whisper, "16 wide.* of 32"),
    "damaged Whisper": (damaged_whisper, r"blocks.1.mlp.0.weight.*\[3, 3\], expected \[128, 32\]"),
    "Whisper that is none": (lambda s, a: a.update({"--whisper": s / "config.json"}), "not a Whisper checkpoint"),
    "Whisper of other weights": (lambda s, a: a.update({"--whisper": a["--vocoder"]}), "not a Whisper checkpoint"),
    "Whisper folder that is none": (lambda s, a: a.update({"--whisper": s}), "no Whisper model"),
    "missing Whisper": (lambda s, a: a.update({"--whisper": s / "none.pt"}), "none.pt does not exist"),
    "no Whisper": (lambda s, a: a.pop("--whisper"), "--whisper"),
    "encoder inside of unknown heads": (
        lambda s, a: put_encoder_inside(s, a.pop("--whisper")), "32 wide, no multiple of 64.*--whisper"
    ),
    "no vocoder": (lambda s, a: a.pop("--vocoder"), "--vocoder"),
    "missing vocoder": (lambda s, a: a.update({"--vocoder": s / "none.pt"}), "none.pt"),
    "units that do not match": (lambda s, a: edit_json(s / "config.json", unit_vocab_size=99), "unit_vocab_size"),
    "layer outside": (lambda s, a: a.update({"--layers": "2-4"}), "Layer 4 is outside the model.*0-3"),
    "layers that are none": (lambda s, a: a.update({"--layers": "2:3"}), "no list of numbers"),
    "mini-batch of 0": (lambda s, a: a.update({"--mini-batch-size": 0}), "ttt_mini_batch_size"),
    "missing source": (lambda s, a: a.update({"--source": s / "none"}), "--source: .*none does not exist"),
}  # fmt: skip

CONV = "encoder.conv1.weight"
ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# Fields of config.json: a value, and what the error says of it.
BAD_VALUES = [
    ("num_hidden_layers", 10**9, "`num_hidden_layers` is 1000000000, but there are 4 layers"),
    ("num_hidden_layers", 10**13, "`num_hidden_layers`"),
    ("num_hidden_layers", 3, "`num_hidden_layers` is 3, but there are 4 layers"),
    ("num_hidden_layers", True, "no number num_hidden_layers"),
    ("vocab_size", 10**12, "`vocab_size`"),
    ("vocab_size", 2**70, "`vocab_size`"),
    ("hidden_size", 2**62, "`hidden_size`"),
    ("hidden_size", 64.0, "hidden_size"),
    ("intermediate_size", 10**9, "`intermediate_size` must be 1 to 2048, as the weights are, got 1000000000"),
    ("head_dim", 10**9, "`head_dim`"),
    ("head_dim", 0, "`head_dim` must be at least 1, got 0"),
    ("num_attention_heads", 0, "`num_attention_heads` must be at least 1, got 0"),
    ("num_key_value_heads", 0, "`num_key_value_heads` must be at least 1, got 0"),
    ("max_position_embeddings", -1, "`max_position_embeddings` must be at least 1, got -1"),
    ("max_position_embeddings", 10**30, "`max_position_embeddings` must be at most"),
    ("rms_norm_eps", -1.0, "`rms_norm_eps`"),
    ("rms_norm_eps", math.nan, "`rms_norm_eps`.*nan"),
    ("rope_theta", "x", "`rope_theta` must be a positive number, got 'x'"),
    ("rope_theta", True, "`rope_theta`.*True"),
    ("rope_theta", math.nan, "`rope_theta`.*nan"),
    ("rope_theta", -5.0, "`rope_theta`.*-5"),
    ("rope_theta", [1], "rope_theta|rope_parameters"),
    ("rope_scaling", [1], "rope_parameters"),
    ("rope_scaling", {"rope_type": "llama3"}, "factor"),
    ("rope_scaling", ROPE | {"factor": 0.0}, "`factor` must be a positive number, got 0.0"),
    ("rope_scaling", ROPE | {"rope_type": {"a": 1}}, "`rope_type`"),
    ("eos_token_id", 2**63, "`eos_token_id` must be the id of one of 640 tokens"),
    ("eos_token_id", [1, 640], "`eos_token_id` must be the id of one of 640 tokens, got 640"),
    ("bos_token_id", -7, "`bos_token_id`"),
    ("speech_encoder_ds_rate", 0, "`speech_encoder_ds_rate`"),
    ("speech_encoder_ds_rate", 10**18, "`speech_encoder_ds_rate`"),
    ("speech_encoder_ds_rate", True, "speech_encoder_ds_rate is no number: True"),
    ("speech_encoder_type", "glm", "speech encoder 'glm'"),
    ("speech_generator_type", "ar", "speech generator 'ar'"),
    ("ctc_decoder_config", "(1000000000,64,4,128)", "`ctc_decoder_config` is 1000000000, but there are 2 layers"),
    ("ctc_decoder_config", "(2,64,4,1000000000)", "`ctc_decoder_config` must be 1 to 2048"),
    ("ctc_decoder_config", "(2,64,0,128)", "`num_attention_heads` must be at least 1"),
    ("ctc_decoder_config", "(" + "9" * 5000 + ",64,4,128)", "`ctc_decoder_config`"),
    ("ctc_decoder_config", [2, 64, 4, 128], "`ctc_decoder_config`"),
    ("ctc_upsample_factor", 10**18, "`upsample_factor`"),
    ("ctc_loss_weight", math.nan, "`ctc_loss_weight`"),
    ("unit_vocab_size", 2**62, "`unit_vocab_size`"),
]
for field, value, message in BAD_VALUES:
    BAD_INPUT[f"{field}={str(value)[:24]}"] = (
        lambda s, a, field=field, value=value: edit_json(s / "config.json", **{field: value}),
        f"config.json.*{message}",
    )
for field, value, message in [
    ("upsample_rates", [], "`upsample_rates` must not be empty"),
    ("upsample_rates", [True] * 5, "upsample_rates"),
    ("upsample_kernel_sizes", [10**9 + 1, 8, 8, 4, 4], "`upsample_kernel_sizes`"),
    ("num_embeddings", 2**60, "`unit_vocab_size`"),
    ("upsample_initial_channel", 2**30, "`upsample_initial_channel`"),
    ("sampling_rate", 10**9, "`sampling_rate` must be at most 192000"),
    ("resblock_dilation_sizes", [1, 3, 5], "`resblock_dilation_sizes`"),
    ("resblock_dilation_sizes", [[1, 3, 10**9]] * 3, "`resblock_dilation_sizes`"),
    ("resblock_dilation_sizes", [[1] * 10**5] * 3, "`resblock_dilation_sizes`"),
    ("dur_predictor_params", None, "`dur_predictor_params` must be an object"),
]:
    BAD_INPUT[f"vocoder: {field}={str(value)[:24]}"] = (
        lambda s, a, field=field, value=value: with_vocoder(s, a, **{field: value}),
        message,
    )
for field, value in [("n_audio_layer", 10**9), ("n_audio_head", 0), ("n_mels", "80"), ("n_audio_state", 10**9),
                     ("n_audio_ctx", None), ("n_mels", True), ("n_audio_head", -1)]:  # fmt: skip
    BAD_INPUT[f"Whisper: {field}={value}"] = (
        lambda s, a, field=field, value=value: edit_pt(s, a, "--whisper", lambda x: x["dims"].update({field: value})),
        f"`{field}`.*{value}",
    )
for option, part, name in (("--whisper", "model_state_dict", CONV), ("--vocoder", "generator", "conv_pre.weight_v")):
    for case, value, message in [
        ("a number", 3, f"{name}.* is no tensor"),
        ("sparse", torch.eye(3).to_sparse(), f"{name}.*not a plain one"),
        ("larger than its file", torch.zeros(1).expand(10**11), f"{name}.*has fewer numbers"),
        ("integers", torch.ones(32, 128, 3, dtype=torch.int8), name),
    ]:
        BAD_INPUT[f"{option}: {case}"] = (
            lambda s, a, o=option, p=part, n=name, v=value: edit_pt(s, a, o, lambda x: x[p].update({n: v})),
            message,
        )
    BAD_INPUT[f"{option}: no dict"] = (
        lambda s, a, o=option, p=part: edit_pt(s, a, o, lambda x: x.update({p: "abc"})),
        f"{part} must be",
    )
    BAD_INPUT[f"{option}: a number for a name"] = (
        lambda s, a, o=option, p=part: edit_pt(s, a, o, lambda x: x[p].update({7: torch.ones(1)})),
        "7 is no name",
    )
for file in (7, None, ["a"], True, "../a.safetensors", "/a.safetensors", "a/../../b.safetensors"):
    BAD_INPUT[f"index: {file}"] = (
        lambda s, a, file=file: with_index_entry(s, a, file),
        f"`weight_map` has no file.*'{NORM}'.*{re.escape(str(file))}",
    )
for name, value in [("temperature", "x"), ("top_k", True), ("do_sample", 7), ("temperature", math.inf),
                    ("eos_token_id", "x"), ("pad_token_id", 640), ("eos_token_id", [-1])]:  # fmt: skip
    BAD_INPUT[f"generation: {name}={value}"] = (
        lambda s, a, name=name, value=value: (s / "generation_config.json").write_text(json.dumps({name: value})),
        f"generation_config.json: `{name}`",
    )
for dtype, called in ((torch.int8, "I8"), (torch.uint8, "U8"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.bool, "BOOL")):
    BAD_INPUT[f"weights in {called}"] = (
        lambda s, a, dtype=dtype: edit_tensors(s, **{UP: lambda t: t.to(dtype)}),
        f"`{UP}`.* is of dtype {called}",
    )
for value in (math.nan, math.inf, -math.inf):
    BAD_INPUT[f"a weight of {value}"] = (
        lambda s, a, value=value: edit_tensors(s, **{UP: lambda t: t.index_fill(0, torch.tensor(5), value)}),
        f"`{UP}` .* has NaN or infinity",
    )
BAD_INPUT |= {
    "a weight too large": (
        lambda s, a: (edit_tensors(s, **{UP: lambda t: t * 1e6}), a.update({"--dtype": "float16"})),
        f"`{UP}` .* has numbers too large for F16",
    ),
    "tensor in two shards": (tensor_in_two_shards, "in .*model-00001-of-00002.safetensors is in model-00002-of-00002"),
    "compressed vocoder": (compressed_vocoder, "compressed.pt is not a fairseq vocoder.*compressed"),
    "field twice": (
        lambda s, a: (s / "config.json").write_text('{"vocab_size": 1, "vocab_size": 2}'),
        "'vocab_size' is there twice",
    ),
    "deep config": (lambda s, a: (s / "config.json").write_text("[" * 10**5), "config.json is not readable as JSON"),
    "mini-batch of a million millions": (
        lambda s, a: a.update({"--mini-batch-size": 10**12}), "`ttt_mini_batch_size` must be at most"
    ),
    "mini-batch longer than the context": (
        lambda s, a: a.update({"--mini-batch-size": 10**6}), "`ttt_mini_batch_size` .1000000. must not exceed"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case, source, parts, tmp_path, capsys):
    arguments = {f"--{name.replace('_', '-')}": path for name, path in parts.items()}
    arguments |= {"--source": source, "--output": tmp_path / "out" / "model"}
    spoil, message = BAD_INPUT[case]
    spoil(source, arguments)
    assert_fails(["convert", *(str(x) for pair in arguments.items() for x in pair)], message, capsys)
    assert os.listdir(tmp_path) == ["source"]


def assert_fails(arguments, message, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 1
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("ttt-omni: error: ")]
    assert len(errors) == 1 and lines[-1] == errors[0]
    assert re.search(message, errors[0]), errors[0]


def test_what_a_text_only_checkpoint_has_no_use_for(source, parts, tmp_path):
    names = [name for name in load_file(source / "model.safetensors") if "speech" in name]
    edit_tensors(source, **dict.fromkeys(names, lambda _: None))
    fields = [
        name for name in json.loads((source / "config.json").read_text()) if name.startswith(("speech_", "ctc_"))
    ]
    edit_json(source / "config.json", **dict.fromkeys([*fields, "unit_vocab_size"], ...))
    for name, path in parts.items():
        with pytest.raises(ConversionError, match="has no use|--listen adds one"):
            convert_llama_omni(source, tmp_path / "out", **{name: path})
    convert_llama_omni(source, tmp_path / "out")


def test_an_output_that_exists(goldens, parts, tmp_path, capsys):
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious").write_text("data")
    arguments = [f"--source={goldens}", f"--whisper={parts['whisper']}", f"--output={output}"]
    arguments += [f"--vocoder={parts['vocoder']}", f"--vocoder-config={parts['vocoder_config']}"]
    assert_fails(["convert", *arguments], "not empty", capsys)
    assert os.listdir(tmp_path) == ["out"] and os.listdir(output) == ["precious"]
    (output / "precious").unlink()
    main(["convert", *arguments])
    assert (output / "model.safetensors").exists()
    arguments[2] = f"--output={output / 'config.json'}"
    assert_fails(["convert", *arguments], "not a folder", capsys)


def test_a_failure_while_writing_leaves_nothing(goldens, parts, tmp_path, monkeypatch):
    def fail(folder, *_):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("ttt_omni.conversion.llama_omni.write_checkpoint", fail)
    with pytest.raises(OSError, match="No space"):
        convert_llama_omni(goldens, tmp_path / "out", **parts)
    assert os.listdir(tmp_path) == []


INTERRUPTED = """
import sys, time
from ttt_omni.commands import cli
from ttt_omni.conversion import llama_omni

def write(folder, *_):
    (folder / "model.safetensors").write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(100)

llama_omni.write_checkpoint = write
cli.main(sys.argv[1:])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_nothing(goldens, parts, tmp_path, number):
    arguments = [f"--{name.replace('_', '-')}={path}" for name, path in parts.items()]
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            INTERRUPTED,
            "convert",
            f"--source={goldens}",
            f"--output={tmp_path / 'out'}",
            *arguments,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    assert process.stdout.readline() == "writing\n"
    assert len(os.listdir(tmp_path)) == 1
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == "ttt-omni: error: interrupted"
    assert os.listdir(tmp_path) == []


# Memory


def test_memory_is_that_of_one_tensor(tmp_path):
    benchmark = Path(__file__).parent.parent / "benchmarks" / "conversion_memory.py"
    output = tmp_path / "results.json"
    subprocess.run([sys.executable, benchmark, "--gigabytes=0.5", f"--output={output}"], check=True)
    results = json.loads(output.read_text())
    assert results["shards"] == 4
    assert results["peak"] < results["limit"]
    assert results["peak"] - results["libraries alone"] < 1.5 * results["largest shard"]
