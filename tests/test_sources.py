# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Sources by their names on the Hub, GGUF and CTranslate2, and what a converted model says of where it comes from."""

import os
import shutil
import struct
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, ModelCard, RepoUrl
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import filter_repo_objects, httpx
from safetensors.torch import load_file
from test_backbones import BACKBONES, SIZES, write_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config
from transformers.utils import hub as transformers_hub

from ttt_omni import TTTOmniForCausalLM, TTTOmniProcessor, checkpoint
from ttt_omni.checkpoint import ConversionError, Source, find_source
from ttt_omni.conversion import convert_llama_omni, gguf
from ttt_omni.conversion.whisper import open_whisper


def card_of(folder):
    return ModelCard.load(folder / "README.md")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The Hub's cache, and a function that puts a repository into it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def put(repository, files, revision="main"):
        folder = tmp_path / "cache" / f"models--{repository.replace('/', '--')}"
        for name, file in files.items():
            (folder / "snapshots" / revision / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "snapshots" / revision / name).symlink_to(file)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / revision).write_text(revision)

    return put


@pytest.fixture
def text_source(tmp_path):
    """A folder of a small random model of Transformers' own class, for text alone."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(BACKBONES["qwen2"]).save_pretrained(tmp_path / "source")
    write_tokenizer(tmp_path / "source")
    return tmp_path / "source"


# By name


def test_all_parts_by_their_names(cache, goldens, parts, golden_model_dir, tmp_path):
    names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    cache("me/llama-omni", {name: goldens / name for name in names})
    cache("me/whisper", {"whisper.pt": parts["whisper"]}, revision="v2")
    cache("me/voice", {"of/me/g.pt": parts["vocoder"], "of/me/g.json": parts["vocoder_config"]})
    convert_llama_omni(
        "me/llama-omni",
        tmp_path / "out",
        whisper="me/whisper@v2/whisper.pt",
        vocoder="me/voice/of/me/g.pt",
        vocoder_config="me/voice/of/me/g.json",
        layers="2-3",
        dtype="float32",
    )
    tensors, others = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", golden_model_dir))
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    assert card_of(tmp_path / "out").data.base_model == "me/llama-omni"
    assert card_of(golden_model_dir).data.base_model == "llama_omni_tiny"


def test_what_is_downloaded(monkeypatch, tmp_path):
    """Of a repository what makes a model, once; of a file no more than it and the card."""
    there = [
        "README.md", "LICENSE", "config.json", "tokenizer.json", "chat_template.jinja", "pytorch_model.bin",
        "model-00001-of-00002.safetensors", "model.safetensors.index.json", "consolidated.safetensors",
        "model.fp32-00001-of-00002.safetensors", "original/params.json", "onnx/model.safetensors", "a/voice.pt",
    ]  # fmt: skip

    def snapshot_download(repo_id, *, revision, allow_patterns, ignore_patterns):
        asked.append((repo_id, revision))
        for name in filter_repo_objects(there, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
            got.append(name)
        return str(tmp_path)

    asked, got = [], []
    monkeypatch.setattr(checkpoint, "snapshot_download", snapshot_download)
    assert find_source("me/model@refs/pr/7", "--source") == Source(tmp_path, "me/model")
    assert sorted(got) == sorted(there[:5] + there[6:8])
    got.clear()
    assert find_source("me/voice@v1.0/a/voice.pt", "--vocoder").path == tmp_path / "a" / "voice.pt"
    assert sorted(got) == ["LICENSE", "README.md", "a/voice.pt"]
    assert asked == [("me/model", "refs/pr/7"), ("me/voice", "v1.0")]
    with pytest.raises(ConversionError, match="^--vocoder: me/voice on the Hub.* has no file b.pt.$"):
        find_source("me/voice/b.pt", "--vocoder")


def test_a_folder_that_is_there_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("me/model").mkdir(parents=True)
    assert find_source("me/model", "--source") == Source(Path("me/model"))


RESPONSE = httpx.Response(404, request=httpx.Request("GET", "https://huggingface.co/me/model"))
ERRORS = {
    "gated": (
        GatedRepoError("403\n\nCannot access", response=RESPONSE),
        "me/model is gated: ask for access at https://huggingface.co/me/model, and log in with `hf auth login`",
    ),
    "none": (
        RepositoryNotFoundError("401\n\nNot Found", response=RESPONSE),
        "me/model@v3 is neither here nor a repository on the Hub; for a private one, log in",
    ),
    "revision": (RevisionNotFoundError("404\n\nNo", response=RESPONSE), "me/model on the Hub has no revision 'v3'"),
    "broken": (httpx.ConnectError("refused\nby them"), "me/model@v3 on the Hub: refused by them"),
    "disk": (OSError(28, "No space left on device"), "me/model@v3 on the Hub: .*No space left on device"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_of_the_hub(case, monkeypatch):
    error, message = ERRORS[case]

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(checkpoint, "snapshot_download", fail)
    with pytest.raises(ConversionError, match=f"^--source: {message}") as raised:
        find_source("me/model@v3", "--source")
    assert "\n" not in str(raised.value)


def test_offline(cache, goldens, tmp_path):
    for name in ("me/none", "me/none/file.pt", "me/none@v1"):
        with pytest.raises(
            ConversionError,
            match=f"^--whisper: {name} is neither here nor in the Hub's cache, and HF_HUB_OFFLINE is set.$",
        ):
            find_source(name, "--whisper")
    cache("me/model", {"config.json": goldens / "config.json"})
    with pytest.raises(ConversionError, match="me/model.* has no file other.json"):
        find_source("me/model/other.json", "--source")
    for name in ("/me/none", "../me/none", "none", "me//none", "https://huggingface.co/me/none", "me/a@b@c"):
        with pytest.raises(ConversionError, match=f"^--source: {name} does not exist.$"):
            find_source(name, "--source")


# The card


CARD = """---
license: other
license_name: qwen-research
license_link: LICENSE
language: [en, zh]
base_model: Qwen/Qwen2-0.5B
tags: [chat]
---
# A model
"""


def test_the_card_carries_over_licence_and_languages(text_source, tmp_path):
    (text_source / "README.md").write_text(CARD)
    (text_source / "LICENSE").write_text("Do no harm.")
    convert_llama_omni(text_source, tmp_path / "out")
    card = card_of(tmp_path / "out")
    assert (card.data.license, card.data.license_name, card.data.license_link) == ("other", "qwen-research", "LICENSE")
    assert (tmp_path / "out" / "LICENSE").read_text() == "Do no harm."
    assert card.data.language == ["en", "zh"] and card.data.base_model == "Qwen/Qwen2-0.5B"
    assert card.data.pipeline_tag == "text-generation" and "speech" not in card.data.tags
    assert "names the licence `qwen-research` ([its text](LICENSE))" in card.text
    assert not {"LLaMA-Omni", "Whisper", "fairseq", "Llama", "audio"} & set(card.text.replace(",", " ").split())


def test_the_card_of_a_source_without_one(text_source, golden_model_dir, tmp_path):
    convert_llama_omni(text_source, tmp_path / "out")
    for folder, name in ((tmp_path / "out", "source"), (golden_model_dir, "llama_omni_tiny")):
        card = card_of(folder)
        assert card.data.license is None and card.data.language is None and card.data.base_model == name
        assert f"The card of {name} names no licence, or there is none" in card.text
        assert ("academic research only" in card.text) == (name == "llama_omni_tiny")


@pytest.mark.parametrize("head", ["license: [", "- a\n- b"])
def test_a_card_that_cannot_be_read(text_source, tmp_path, head):
    (text_source / "README.md").write_text(f"---\n{head}\n---\n")
    with pytest.raises(ConversionError, match="README.md: the head of the card is not readable"):
        convert_llama_omni(text_source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("is_there", [False, True])
def test_push_to_hub_keeps_the_card(text_source, tmp_path, monkeypatch, is_there):
    """A folder stands for the Hub, where somebody may have written another card already."""
    hub = tmp_path / "hub"
    (text_source / "README.md").write_text(CARD)
    convert_llama_omni(text_source, tmp_path / "out")

    def load(repo_id_or_path, **kwargs):
        if Path(repo_id_or_path).is_file():
            return load_card(repo_id_or_path, **kwargs)
        if not is_there:
            raise transformers_hub.EntryNotFoundError("none")
        return ModelCard("---\nlicense: mit\n---\nMine.")

    def create_commit(self, repo_id, operations, **kwargs):
        for operation in operations:
            (hub / operation.path_in_repo).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(operation.path_or_fileobj, hub / operation.path_in_repo)

    load_card = ModelCard.load
    monkeypatch.setattr(ModelCard, "load", load)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **kwargs: RepoUrl(f"https://hf.co/{repo_id}"))
    TTTOmniForCausalLM.from_pretrained(tmp_path / "out").push_to_hub("me/graft", tags=["mine", "long-context"])
    pushed = load_card(hub / "README.md")
    if is_there:
        assert pushed.text.strip() == "Mine." and pushed.data.license == "mit"
    else:
        ours = load_card(tmp_path / "out" / "README.md")
        assert pushed.text == ours.text and pushed.data.license_name == "qwen-research"
        assert pushed.data.tags == [*ours.data.tags, "mine"]


# What to do next


def test_the_last_line(text_source, goldens, parts, tmp_path, capsys):
    def line(source, name, **kwargs):
        capsys.readouterr()
        convert_llama_omni(source, tmp_path / name, **kwargs)
        out, err = capsys.readouterr()
        assert out == "" and err.endswith("\n")
        last = err.splitlines()[-1]
        assert last.startswith(f"Wrote {tmp_path / name}: ")
        return last

    text = line(text_source, "text", layers="1,3", dtype="float32")
    size = sum(x.numel() * x.itemsize for x in load_file(tmp_path / "text" / "model.safetensors").values())
    assert f": {size / 1e6:.1f} MB, text only, TTT (hybrid) in layers 1, 3. Next: `AutoModelForCausalLM" in text
    full = line(goldens, "full", **parts)
    assert ", listens and speaks, " in full and f"`ttt-omni chat --model {tmp_path / 'full'}`" in full
    fresh = line(text_source, "fresh", whisper=parts["whisper"], listen=True)
    assert ", listens, " in fresh and f"`ttt-omni calibrate --model {tmp_path / 'fresh'}" in fresh
    replaced = line(text_source, "replaced", mode="replace")
    assert "TTT (replace) in layers 3" in replaced and "ttt-omni distill" in replaced


# GGUF


def write_gguf(path, folder, architecture, strings=()):
    """The model in `folder`, as llama.cpp's converter writes it."""
    package = pytest.importorskip("gguf")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    config = model.config
    writer = package.GGUFWriter(path, architecture)
    for name, value in dict(strings).items():
        writer.add_string(name, value)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    tokens += ["12", *(f"<unused_{i}>" for i in range(config.vocab_size - len(tokens) - 1))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i < 3 else 1 for i in range(len(tokens))])
    writer.add_token_merges(["1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(tokenizer.chat_template)
    names = package.get_tensor_name_map(package.MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if architecture == "llama" and (".q_proj" in name or ".k_proj" in name):  # pairs beside each other
            tensor = tensor.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


GGUF_BACKBONES = {
    "llama": BACKBONES["llama"],
    "qwen2": BACKBONES["qwen2"],
    "qwen3": Qwen3Config(**SIZES, head_dim=128),  # Transformers reads no other from GGUF
}


@pytest.mark.parametrize("backbone", GGUF_BACKBONES)
@torch.no_grad()
def test_gguf(backbone, tmp_path):
    torch.manual_seed(0)
    source = AutoModelForCausalLM.from_config(GGUF_BACKBONES[backbone])
    for parameter in source.parameters():
        parameter.normal_(0.5, 0.2)
    source.save_pretrained(tmp_path / "source")
    write_tokenizer(tmp_path / "source")
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tmp_path / "source", backbone, {"general.license": "apache-2.0"})
    convert_llama_omni(path, tmp_path / "out", dtype="float32")
    graft = TTTOmniForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert graft.config.text_config.backbone == backbone and not hasattr(graft.config, "quantization_config")
    ids = torch.arange(5, 45)[None]
    torch.testing.assert_close(graft(ids).logits, source.eval()(ids).logits, rtol=1e-4, atol=1e-4)
    message = [{"role": "user", "content": "Hi"}]
    one, other = TTTOmniProcessor.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "source")
    assert one.apply_chat_template(message) == other.apply_chat_template(message, tokenize=False)
    card = card_of(tmp_path / "out")
    assert card.data.license == "apache-2.0" and card.data.base_model == "tiny.gguf"
    assert sorted(os.listdir(tmp_path)) == ["out", "source", "tiny.gguf"]


def test_gguf_that_will_not_do(text_source, tmp_path, monkeypatch):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, text_source, "qwen2")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConversionError, match=f"^{path} is no GGUF file, or damaged: "):
        convert_llama_omni(path, tmp_path / "out")
    path.write_bytes(b"not at all")
    with pytest.raises(ConversionError, match=f"^{path} is no GGUF file, or damaged: "):
        convert_llama_omni(path, tmp_path / "out")
    path.write_bytes(whole.replace(b"qwen2", b"gemma"))
    with pytest.raises(ConversionError, match=f"^{path} is of the architecture 'gemma', which is not supported"):
        convert_llama_omni(path, tmp_path / "out")
    path.write_bytes(whole.replace(b"blk.3.ffn_up.weight", b"blk.3.ffn_no.weight"))
    with pytest.raises(
        ConversionError, match=f"^{path}: the tensors for model.layers.3.mlp.up_proj.weight are missing"
    ):
        convert_llama_omni(path, tmp_path / "out")
    AutoModelForCausalLM.from_config(BACKBONES["llama with biases"]).save_pretrained(tmp_path / "biases")
    write_tokenizer(tmp_path / "biases")
    write_gguf(path, tmp_path / "biases", "llama")
    with pytest.raises(ConversionError, match=f"^{path} has 67 tensors, of which Transformers reads 39.$"):
        convert_llama_omni(path, tmp_path / "out")
    path.write_bytes(whole.replace(b"blk.0.attn_k.bias", b"rope_freqs.weight"))
    with pytest.raises(ConversionError, match=f"^{path} scales its rotary embedding"):
        convert_llama_omni(path, tmp_path / "out")
    write_gguf(path, text_source, "qwen2", {"qwen2.rope.scaling.type": "yarn"})
    with pytest.raises(ConversionError, match=f"^{path} scales its rotary embedding"):
        convert_llama_omni(path, tmp_path / "out")
    path.write_bytes(whole.replace(b"tokenizer.chat_template", b"tokenizer.some_template"))
    with pytest.raises(ConversionError, match=f"^{path}: the tokenizer has no chat template"):
        convert_llama_omni(path, tmp_path / "out")
    monkeypatch.setattr(gguf, "is_gguf_available", lambda: False)
    with pytest.raises(ConversionError, match=r"read by the package gguf: pip install 'ttt-omni\[gguf\]'"):
        convert_llama_omni(path, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["biases", "source", "tiny.gguf"]


# CTranslate2


CT2_NAMES = {
    "attn_ln": "self_attention/layer_norm",
    "attn.out": "self_attention/linear_1",
    "mlp_ln": "ffn/layer_norm",
    "mlp.0": "ffn/linear_0",
    "mlp.2": "ffn/linear_1",
}


def write_ctranslate2(path, whisper, version=6, spec="WhisperSpec", dtype=np.float32):
    """OpenAI's file `whisper` as CTranslate2's converter writes it."""
    content = torch.load(whisper, weights_only=True)
    state = {name.removeprefix("encoder."): x.float().numpy() for name, x in content["model_state_dict"].items()}
    arrays = {"encoder/num_heads": np.int16(content["dims"]["n_audio_head"]), "decoder/alignment": np.int8([1, 2])}
    for name in (f"{conv}.{x}" for conv in ("conv1", "conv2") for x in ("weight", "bias")):
        arrays[f"encoder/{name.replace('.', '/')}"] = state[name].astype(dtype)
    arrays["encoder/position_encodings/encodings"] = state["positional_embedding"].astype(dtype)
    norms = {"weight": "gamma", "bias": "beta"}
    for x in norms:
        arrays[f"encoder/layer_norm/{norms[x]}"] = state[f"ln_post.{x}"].astype(dtype)
    for i in range(content["dims"]["n_audio_layer"]):
        block = f"blocks.{i}."
        zeros = np.zeros_like(state[f"{block}attn.query.bias"])
        for x in ("weight", "bias"):
            three = [state.get(f"{block}attn.{part}.{x}", zeros) for part in ("query", "key", "value")]
            arrays[f"encoder/layer_{i}/self_attention/linear_0/{x}"] = np.concatenate(three).astype(dtype)
            for theirs, name in CT2_NAMES.items():
                parameter = norms[x] if "norm" in name else x
                arrays[f"encoder/layer_{i}/{name}/{parameter}"] = state[f"{block}{theirs}.{x}"].astype(dtype)

    def text(value):
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    numbers = {"float32": 0, "int8": 1, "int16": 2, "float16": 4}
    parts = [struct.pack("<I", version), text(spec), struct.pack("<II", 3, len(arrays))]
    for name, array in sorted(arrays.items()):
        shape = struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        parts += [text(name), shape, struct.pack("<BI", numbers[array.dtype.name], array.nbytes), array.tobytes()]
    parts += [struct.pack("<I", 1), text("decoder/b"), text("decoder/a")]
    path.write_bytes(b"".join(parts))


@pytest.mark.parametrize("form", ["file", "folder"])
def test_ctranslate2_is_openais(parts, tmp_path, form):
    write_ctranslate2(tmp_path / "model.bin", parts["whisper"])
    config, tensors = open_whisper(tmp_path / "model.bin" if form == "file" else tmp_path)
    expected_config, expected = open_whisper(parts["whisper"])
    assert config.to_dict() == expected_config.to_dict()
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].shape == tensor.shape and torch.equal(tensors[name].read(), tensor.read().float()), name


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"version": 7}, "is not a Whisper checkpoint in CTranslate2's format: its version is 7, not 4 to 6"),
        ({"spec": "TransformerSpec"}, "is not a Whisper.*: it holds a 'TransformerSpec'"),
        ({"dtype": np.int8}, "`encoder/conv1/bias` in .* is of dtype I8, not one of"),
    ],
)
def test_ctranslate2_that_will_not_do(parts, tmp_path, kwargs, message):
    write_ctranslate2(tmp_path / "model.bin", parts["whisper"], **kwargs)
    with pytest.raises(ConversionError, match=f"model.bin.* {message}|{message}"):
        open_whisper(tmp_path)


def test_ctranslate2_that_is_damaged(parts, tmp_path):
    path = tmp_path / "model.bin"
    write_ctranslate2(path, parts["whisper"])
    whole = path.read_bytes()
    for content in (b"", whole[:3], whole[:30], whole[: len(whole) // 2], b"\0" * 100, whole[:21] + b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(ConversionError, match="model.bin is not a Whisper checkpoint in CTranslate2's format"):
            open_whisper(path)
