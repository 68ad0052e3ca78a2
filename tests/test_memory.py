# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Conversations on disk: what loads, whatever represents the weights, and what is refused."""

import json
import random
import resource
import struct
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache

from ttt_omni import TTTOmniConfig, TTTOmniForCausalLM
from ttt_omni.memory_ttt_omni import _checksum, memory_metadata


LENGTH = 18
INPUT_IDS = (torch.arange(46) * 7 % 40).view(2, 23)


def make_model(seed: int = 0, **kwargs) -> TTTOmniForCausalLM:
    """One with all kinds of layers and weights that are made without a generator of random numbers."""
    text_config = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 4,
        "layer_types": ["hybrid_sliding", "hybrid", "linear_attention", "full_attention"],
        "ttt_layer_type": ["linear", "mlp", "linear", "linear"],
        "ttt_mini_batch_size": 8,
        "ttt_gate_init": 0.5,
        "sliding_window": 6,
        "attention_sinks": 2,
        "max_position_embeddings": 64,
    }
    model = TTTOmniForCausalLM(
        TTTOmniConfig(
            text_config=text_config | kwargs, audio_config=None, speech_decoder_config=None, vocoder_config=None
        )
    )
    with torch.no_grad():
        for index, (name, parameter) in enumerate(model.named_parameters()):
            values = (torch.arange(parameter.numel()) * 7919 + 104729 * index + seed) % 257 - 128
            mean = 1 if name.endswith("norm.weight") else 0
            parameter.copy_((values / 512 + mean).view_as(parameter))
    return model.eval()


@torch.no_grad()
def remember(model, path, **kwargs):
    cache = DynamicCache(config=model.config)
    model(INPUT_IDS[:, :LENGTH], cache=cache)
    model.save_memory(path, cache, input_ids=INPUT_IDS[:, :LENGTH], **kwargs)
    return cache


@torch.no_grad()
def go_on(model, cache) -> torch.Tensor:
    return model(INPUT_IDS[:, LENGTH:], cache=cache).logits.float()


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def expected(model, tmp_path_factory):
    """The logits after the memory in float32."""
    return go_on(model, remember(model, tmp_path_factory.mktemp("expected") / "memory.safetensors"))


@pytest.fixture
def path(model, tmp_path):
    path = tmp_path / "memory.safetensors"
    remember(model, path, metadata={"model": "tiny"})
    return path


def test_same_model(model, path, expected):
    memory = model.load_memory(path)
    assert torch.equal(go_on(model, memory.cache), expected)
    assert torch.equal(memory.input_ids, INPUT_IDS[:, :LENGTH])
    assert memory_metadata(path) == {"model": "tiny"}


TOLERANCES = {torch.float64: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_other_dtype(model, path, expected, dtype, tmp_path):
    model.save_pretrained(tmp_path / "model")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype).eval()
    memory = other.load_memory(path)
    assert {layer.keys.dtype for layer in memory.cache.layers if getattr(layer, "keys", None) is not None} == {dtype}
    torch.testing.assert_close(go_on(other, memory.cache), expected, rtol=0, atol=TOLERANCES[dtype])
    remember(other, tmp_path / "back.safetensors")  # and the other way round
    back = model.load_memory(tmp_path / "back.safetensors")
    torch.testing.assert_close(go_on(model, back.cache), expected, rtol=0, atol=TOLERANCES[dtype])


@pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
def test_quantised(bits, tmp_path):
    config = {"hidden_size": 64, "intermediate_size": 128}
    model = make_model(**config)
    model.save_pretrained(tmp_path / "model")
    remember(model, tmp_path / "memory.safetensors")
    quantisation = {bits: True} | ({"bnb_4bit_compute_dtype": torch.float32} if bits == "load_in_4bit" else {})
    other = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", quantization_config=BitsAndBytesConfig(**quantisation)
    ).eval()
    logits = go_on(other, other.load_memory(tmp_path / "memory.safetensors").cache)
    own = go_on(other, remember(other, tmp_path / "own.safetensors"))
    correlation = torch.stack([logits.flatten(), own.flatten()]).corrcoef()[0, 1]
    assert correlation > (0.99 if bits == "load_in_8bit" else 0.7)
    own = model.load_memory(tmp_path / "own.safetensors")
    assert go_on(model, own.cache).isfinite().all()
    remember(make_model(seed=1, **config), tmp_path / "strange.safetensors")
    with pytest.raises(ValueError, match="another model"):
        other.load_memory(tmp_path / "strange.safetensors")


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_model_of_another_seed(path, seed):
    with pytest.raises(ValueError, match="another model"):
        make_model(seed).load_memory(path)


@pytest.mark.parametrize("part", [".ttt.", "ttt_gate", "mlp.up_proj", "embed_tokens"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_after_one_step_of_training(path, part, dtype):
    model = make_model()
    trained = [x for name, x in model.named_parameters() if part in name]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    model(INPUT_IDS, labels=INPUT_IDS).loss.backward()
    optimizer.step()
    with pytest.raises(ValueError, match="another model"):
        model.to(dtype).load_memory(path)


def test_model_of_other_layers(path):
    for change in ({"ttt_base_lr": 0.5}, {"sliding_window": 7}, {"ttt_qk_norm": "l2"}, {"rms_norm_eps": 1e-5}):
        with pytest.raises(ValueError, match="another model"):
            make_model(**change).load_memory(path)


def test_what_cannot_be_saved(model, tmp_path):
    path = tmp_path / "memory.safetensors"
    cache = remember(model, path)
    content = path.read_bytes()
    for metadata in ({"a": 1}, [("a", "b")], {"a": None}):
        with pytest.raises(TypeError, match="dictionary of strings"):
            model.save_memory(path, cache, metadata=metadata)
    for input_ids in (INPUT_IDS[:, : LENGTH - 1], INPUT_IDS[:1], INPUT_IDS + 40, INPUT_IDS.float()):
        with pytest.raises(ValueError, match="input_ids"):
            model.save_memory(path, cache, input_ids=input_ids)
    assert path.read_bytes() == content and [*tmp_path.iterdir()] == [path]
    model.save_memory(path, cache, attention_mask=torch.ones(2, LENGTH, dtype=torch.bool))
    assert model.load_memory(path).attention_mask.all()


def test_file_of_version_1(goldens, model):
    """Written by the code before version 2, under Transformers 5.23."""
    folder = goldens.parent / "memory_1"
    memory = model.load_memory(folder / "memory.safetensors")
    assert torch.equal(memory.input_ids, INPUT_IDS[:, :LENGTH])
    continued = load_file(folder / "next.safetensors")
    assert torch.equal(continued["input_ids"], INPUT_IDS[:, LENGTH:])
    torch.testing.assert_close(go_on(model, memory.cache), continued["logits"], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="another model"):
        make_model(seed=1).load_memory(folder / "memory.safetensors")


def load_damaged(model, path) -> None:
    """Fails unless `path` is refused, in one line."""
    with pytest.raises(ValueError) as raised:
        model.load_memory(path)
    assert str(raised.value).count("\n") == 0 and path.name in str(raised.value)


@pytest.mark.parametrize("version", ["1", "2"])
def test_every_bit_of_the_header(model, path, version, goldens):
    if version == "1":
        path.write_bytes((goldens.parent / "memory_1" / "memory.safetensors").read_bytes())
    content = path.read_bytes()
    header = 8 + struct.unpack("<Q", content[:8])[0]
    metadata = slice(content.index(b'"__metadata__"'), content.index(b"}", content.index(b'"__metadata__"')) + 2)
    places = [*range(8), *range(metadata.start, metadata.stop), *range(metadata.stop, header, 7)]
    damaged = bytearray(content)
    for place in places:
        for bit in range(8):
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            load_damaged(model, path)
            damaged[place] ^= 1 << bit


def test_bits_of_the_tensors(model, path):
    content = path.read_bytes()
    header = 8 + struct.unpack("<Q", content[:8])[0]
    damaged = bytearray(content)
    for place in random.Random(0).sample(range(header, len(content)), 200):
        bit = 1 << place % 8
        damaged[place] ^= bit
        path.write_bytes(damaged)
        load_damaged(model, path)
        damaged[place] ^= bit


def test_any_truncation(model, path):
    content = path.read_bytes()
    for length in [*range(0, 20), *range(20, len(content), 997), len(content) - 1]:
        path.write_bytes(content[:length])
        load_damaged(model, path)
    path.write_bytes(content + b"\0")
    load_damaged(model, path)


def forge(path, tensors=None, **fields) -> None:
    """Change tensors (`None` to leave one out) and metadata of a file, and give it a checksum that fits."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        content = {name: file.get_tensor(name) for name in file.keys()}
    content |= tensors or {}
    content = {name: x.contiguous().clone() for name, x in content.items() if x is not None}
    metadata.pop("checksum")
    metadata = {name: x for name, x in (metadata | fields).items() if x is not None}
    save_file(content, path, metadata | {"checksum": _checksum(content, metadata)})


LENGTHS = ["3", "0", "-9", "17", "19", "1" + "0" * 30, "9" * 5000, "x", "", "1.5", "NaN", " 18", "1_8", "٣", "[18]"]
FIELDS = [{"length": length} for length in LENGTHS]
FIELDS += [{name: None} for name in ("format", "version", "fingerprint", "length", "metadata")]
FIELDS += [{"version": "3"}, {"version": "1"}, {"format": "pt"}, {"fingerprint": "0" * 64}, {"another": "field"}]


@pytest.mark.parametrize("fields", FIELDS, ids=lambda fields: f"{[*fields][0]}-{str([*fields.values()][0])[:9]}")
def test_forged_metadata(model, path, fields):
    forge(path, **fields)
    load_damaged(model, path)


@pytest.mark.parametrize("metadata", ["x", "", "[1]", "7", "null", '{"a": 1}', "[" * 100_000, '{"a": NaN}'])
def test_forged_metadata_of_the_user(path, metadata):
    forge(path, metadata=metadata)
    with pytest.raises(ValueError) as raised:
        memory_metadata(path)
    assert path.name in str(raised.value) and len(str(raised.value)) < 500


TENSORS = {
    "missing state": {"layers.1.ttt.W1": None},
    "missing places": {"layers.0.places": None},
    "missing keys": {"layers.3.keys": None},
    "missing values": {"layers.3.values": None},
    "missing weights": {"weights": None},
    "weights of another shape": {"weights": torch.zeros(3, 64)},
    "weights of no shape": {"weights": torch.tensor(0.0)},
    "weights of integers": {"weights": torch.zeros(73, 64, dtype=torch.int64)},
    "weights that are not finite": {"weights": torch.full((73, 64), torch.nan)},
    "unknown part of a state": {"layers.1.ttt.evil": torch.ones(1)},
    "name of Python's": {"layers.1.ttt.__class__": torch.ones(1)},
    "layer too many": {"layers.99.keys": torch.ones(3)},
    "layer of no number": {"layers.-1.keys": torch.ones(3)},
    "scalar": {"layers.0.keys": torch.tensor(1.0)},
    "state of an MLP": {"layers.2.ttt.W2": torch.zeros(2, 2, 32, 8)},
    "state of another shape": {"layers.2.ttt.W1": torch.zeros(2, 2, 3, 3)},
    "state of NaN": {"layers.2.ttt.W1": torch.full((2, 2, 8, 8), torch.nan)},
    "infinite state": {"layers.2.ttt.W1": torch.full((2, 2, 8, 8), torch.inf)},
    "state of integers": {"layers.2.ttt.W1": torch.zeros(2, 2, 8, 8, dtype=torch.int8)},
    "state of 8 bits": {"layers.2.ttt.W1": torch.zeros(2, 2, 8, 8, dtype=torch.float8_e4m3fn)},
    "state of complex numbers": {"layers.2.ttt.W1": torch.zeros(2, 2, 8, 8, dtype=torch.complex64)},
    "state of booleans": {"layers.2.ttt.W1": torch.zeros(2, 2, 8, 8, dtype=torch.bool)},
    "other batch": {"layers.3.keys": torch.zeros(3, 1, LENGTH, 8), "layers.3.values": torch.zeros(3, 1, LENGTH, 8)},
    "no batch": {"layers.3.keys": torch.zeros(0, 1, LENGTH, 8), "layers.3.values": torch.zeros(0, 1, LENGTH, 8)},
    "other length": {"layers.3.keys": torch.zeros(2, 1, 17, 8), "layers.3.values": torch.zeros(2, 1, 17, 8)},
    "position of m": {"layers.2.ttt.position": torch.tensor([8, 8])},
    "position before all": {"layers.2.ttt.position": torch.tensor([-1, 2])},
    "position far away": {"layers.2.ttt.position": torch.tensor([10**9, 2])},
    "position of floats": {"layers.2.ttt.position": torch.tensor([1.5, 1.5])},
    "places far away": {"layers.0.places": torch.full((2, 7), 2**62)},
    "places before all": {"layers.0.places": torch.full((2, 7), -2)},
    "tokens of floats": {"input_ids": torch.ones(2, LENGTH)},
    "tokens of booleans": {"input_ids": torch.ones(2, LENGTH, dtype=torch.bool)},
    "tokens out of the vocabulary": {"input_ids": torch.full((2, LENGTH), 40)},
    "tokens before the vocabulary": {"input_ids": torch.full((2, LENGTH), -1)},
    "tokens of another batch": {"input_ids": torch.ones(3, LENGTH, dtype=torch.int64)},
    "tokens of one row": {"input_ids": torch.ones(LENGTH, dtype=torch.int64)},
    "fewer tokens than remembered": {"input_ids": torch.ones(2, LENGTH - 1, dtype=torch.int64)},
    "mask of twos": {"attention_mask": torch.full((2, LENGTH), 2)},
    "mask of floats": {"attention_mask": torch.ones(2, LENGTH)},
    "mask of another length": {"attention_mask": torch.ones(2, LENGTH - 1, dtype=torch.int64)},
}


@pytest.mark.parametrize("name", TENSORS)
def test_forged_tensors(model, path, name):
    forge(path, TENSORS[name])
    load_damaged(model, path)


def test_no_allocation_out_of_proportion(model, path):
    """A small file that announces much, or a whole number of terabytes."""
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for shape in ([2, 1, 2**40, 8], [2**31, 2**31, 2**31], [0, 2**62]):
        header["layers.3.keys"]["shape"] = shape
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
        load_damaged(model, path)
    for length in (2**63, 2**40, 2**24):
        path.write_bytes(struct.pack("<Q", length) + content[8:])
        load_damaged(model, path)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 1024)
    assert grown < 2**26
