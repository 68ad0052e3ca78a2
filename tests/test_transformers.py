# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
What TTT-Omni takes from inside Transformers, name by name, and that generation is the same by every way through it.

A release that renames or moves something shows it here first. CI runs this file on the newest release as well.
"""

import ast
import importlib
import inspect
from operator import attrgetter
from pathlib import Path

import pytest
import torch
import transformers
from layouts import LAYERS, expand, pad, random_rows
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.models.llama import modeling_llama
from transformers.utils import TransformersKwargs

import ttt_omni
from ttt_omni import TTTOmniForCausalLM
from ttt_omni.modeling_ttt_omni import FORWARD_KWARGS


ROOT = Path(ttt_omni.__file__).parent

# What is not at the top of Transformers, and the first arguments of what is called by position or overridden.
TAKEN = {
    "transformers.activations.ACT2FN": None,
    "transformers.audio_utils.load_audio": "audio, sampling_rate",
    "transformers.Cache.activate_past_recording": "",
    "transformers.Cache.get_query_offset": "layer_idx",
    "transformers.Cache.get_seq_length": "layer_idx",
    "transformers.cache_utils.DynamicLayer": "",
    "transformers.cache_utils.DynamicLayer.lazy_initialization": "key_states, value_states",
    "transformers.cache_utils.DynamicLayer.crop": "tokens_to_remove",
    "transformers.cache_utils.StaticLayer": "max_cache_len",
    "transformers.distributed.tensor_parallel.ALL_PARALLEL_STYLES": None,
    "transformers.distributed.tensor_parallel.TensorParallelLayer.shard_param": "module, param, mesh",
    "transformers.distributed.tensor_parallel.TensorParallelLayer.should_use_local_tensors": "module",
    "transformers.distributed.tensor_parallel.TensorParallelLayer.transform_inputs_pre_forward": (
        "module, args, kwargs, mesh"
    ),
    "transformers.hf_argparser.HfArg": None,
    "transformers.initialization.constant_": "tensor, val",
    "transformers.initialization.copy_": "tensor, other",
    "transformers.initialization.kaiming_normal_": "tensor",
    "transformers.initialization.normal_": "tensor, mean, std",
    "transformers.initialization.ones_": "tensor",
    "transformers.initialization.zeros_": "tensor",
    "transformers.masking_utils.create_causal_mask": "config, inputs_embeds, attention_mask, cache, position_ids",
    "transformers.masking_utils.create_masks_for_generate": (
        "config, inputs_embeds, attention_mask, cache, position_ids"
    ),
    "transformers.modeling_layers.GradientCheckpointingLayer": "",
    "transformers.modeling_outputs.BaseModelOutputWithPast": "last_hidden_state, cache",
    "transformers.modeling_outputs.BaseModelOutputWithPooling": "last_hidden_state, pooler_output",
    "transformers.modeling_outputs.CausalLMOutputWithPast": "loss, logits, cache, hidden_states, attentions",
    "transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS": None,
    "transformers.modeling_rope_utils.dynamic_rope_update": "rope_forward",
    "transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS": None,
    "transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": None,
    "transformers.models.llama.modeling_llama.LlamaAttention": "config, layer_idx",
    "transformers.models.llama.modeling_llama.LlamaAttention.forward": (
        "hidden_states, position_embeddings, attention_mask, cache"
    ),
    "transformers.models.qwen2.modeling_qwen2.Qwen2Attention.forward": (
        "hidden_states, position_embeddings, attention_mask, cache"
    ),
    "transformers.models.qwen3.modeling_qwen3.Qwen3Attention.forward": (
        "hidden_states, position_embeddings, attention_mask, cache"
    ),
    "transformers.models.llama.modeling_llama.LlamaMLP": "config",
    "transformers.models.llama.modeling_llama.LlamaRMSNorm": "hidden_size, eps",
    "transformers.models.llama.modeling_llama.LlamaRotaryEmbedding": "config",
    "transformers.models.llama.modeling_llama.apply_rotary_pos_emb": "q, k, cos, sin",
    "transformers.models.llama.modeling_llama.eager_attention_forward": (
        "module, query, key, value, attention_mask, scaling, dropout"
    ),
    "transformers.models.seamless_m4t_v2.modeling_seamless_m4t_v2.SeamlessM4Tv2HifiGan": "config",
    "transformers.models.seamless_m4t_v2.modeling_seamless_m4t_v2.SeamlessM4Tv2VariancePredictor": (
        "embed_dim, hidden_dim, kernel_size, var_pred_dropout"
    ),
    "transformers.models.whisper.modeling_whisper.WhisperEncoder.forward": "input_features",
    "transformers.models.whisper.english_normalizer.BasicTextNormalizer": None,
    "transformers.models.whisper.english_normalizer.EnglishTextNormalizer": "english_spelling_mapping",
    "transformers.models.whisper.modeling_whisper.sinusoids": "length, channels",
    "transformers.processing_utils.AudioKwargs": None,
    "transformers.processing_utils.ProcessingKwargs": None,
    "transformers.processing_utils.ProcessorMixin.prepare_inputs_layout": "images, text, videos, audio",
    "transformers.processing_utils.ProcessorMixin.validate_inputs": "images, text, videos, audio",
    "transformers.processing_utils.ProcessorMixin._process_audio": "audio",
    "transformers.processing_utils.ProcessorMixin.replace_audio_token": "audio_inputs, audio_idx",
    "transformers.processing_utils.Unpack": None,
    "transformers.tokenization_utils_base.TextInput": None,
    "transformers.utils.ModelOutput": None,
    "transformers.utils.SAFE_WEIGHTS_INDEX_NAME": None,
    "transformers.utils.SAFE_WEIGHTS_NAME": None,
    "transformers.utils.TransformersKwargs": None,
    "transformers.utils.cached_file": "path_or_repo_id, filename",
    "transformers.utils.can_return_tuple": "func",
    "transformers.utils.deprecation.deprecate_kwarg": "old_name, version, new_name",
    "transformers.utils.generic.merge_with_config_defaults": "func",
    "transformers.utils.hub.PushToHubMixin._upload_modified_files": "working_dir, repo_id, files_timestamps",
    "transformers.utils.is_gguf_available": None,
    "transformers.utils.is_torch_bf16_gpu_available": "",
    "transformers.utils.logging": None,
    "transformers.utils.output_capturing.capture_outputs": "func",
    "transformers.PreTrainedModel._init_weights": "module",
    "transformers.PreTrainedModel.get_compiled_call": "compile_config",
    "transformers.GenerationMixin._valid_auto_compile_criteria": "model_kwargs, generation_config",
    "transformers.GenerationMixin._prefill": "input_ids, generation_config, model_kwargs",
    "transformers.GenerationMixin._prepare_cache_for_generation": "generation_config, model_kwargs",
    "transformers.GenerationMixin._update_model_kwargs_for_generation": "outputs, model_kwargs",
    "transformers.GenerationMixin.prepare_inputs_for_generation": "input_ids, next_sequence_length, cache",
}


def find(path: str):
    """What stands at a dotted path, whose first names are those of a module."""
    module, rest = path, []
    while True:
        try:
            found = importlib.import_module(module)
            return attrgetter(".".join(rest))(found) if rest else found
        except ModuleNotFoundError:
            module, _, name = module.rpartition(".")
            rest.insert(0, name)


@pytest.mark.parametrize("path", TAKEN)
def test_what_is_taken(path):
    found, expected = find(path), TAKEN[path]
    if expected is not None:
        names = [name for name in inspect.signature(found).parameters if name != "self"]
        expected = expected.split(", ") if expected else []
        assert names[: len(expected)] == expected


def test_nothing_else_is_taken():
    """All imports from within Transformers are in the list above."""
    listed = {".".join(path.split(".")[:count]) for path in TAKEN for count in range(2, path.count(".") + 2)}
    files = [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] not in NOT_OURS]
    assert len(files) > 20
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "transformers":
                for alias in node.names:
                    is_public = node.module == "transformers" and hasattr(transformers, alias.name)
                    assert is_public or f"{node.module}.{alias.name}" in listed, f"{file}: {node.module}.{alias.name}"


NOT_OURS = {".venv", ".venv-newest", "tests", "benchmarks", "build", "demo"}


def test_fields_and_flags():
    assert "allow_is_causal_skip" in inspect.signature(transformers.masking_utils.create_causal_mask).parameters
    assert {"layers", "get_seq_length", "is_compileable"} <= set(dir(DynamicCache()))
    for layer in (DynamicLayer(), StaticLayer(max_cache_len=4)):
        assert {"keys", "values", "is_initialized", "is_sliding"} <= set(dir(layer))
    assert FORWARD_KWARGS <= TransformersKwargs.__annotations__.keys()
    assert callable(transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS.get_interface)


# Generation is the same by every way


@pytest.mark.parametrize("layers", LAYERS)
def test_every_way_gives_the_same_answer(models, golden, layers):
    """Greedy tokens and units with a cache of any kind, without, in chunks, streamed, and in a left-padded batch."""
    model = models(layers)
    questions = [torch.cat([row, expand(model, golden["input_ids"])[0]]) for row in random_rows(0, [9, 2])]
    features = torch.stack([golden["mel"].T * scale for scale in (1.0, 0.5)])
    kwargs = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    inputs = {"input_ids": questions[0][None], "input_features": features[:1]}
    expected = model.generate(**inputs, **kwargs, use_cache=False, return_audio=True)
    tokens = expected.sequences[0, -8:].tolist()
    assert len(set(tokens)) > 1 and len(expected.units[0]) > 0

    ways = {
        "cache": {},
        "own cache": {"cache": DynamicCache()},
        "cache of the config": {"cache": DynamicCache(config=model.config)},
        "static cache": {"cache_implementation": "static"},
        "chunks": {"generation_config": GenerationConfig(prefill_chunk_size=7)},
    }
    for way, arguments in ways.items():
        found = model.generate(**inputs, **kwargs, **arguments, return_audio=True)
        assert found.sequences[0, -8:].tolist() == tokens, way
        assert torch.equal(found.units[0], expected.units[0]), way

    input_ids, attention_mask = pad(questions, "left")
    batch = model.generate(
        input_ids, attention_mask=attention_mask, input_features=features, return_audio=True, **kwargs
    )
    assert batch.sequences[0, -8:].tolist() == tokens
    assert torch.equal(batch.units[0], expected.units[0])
    alone = model.generate(questions[1][None], input_features=features[1:], return_audio=True, **kwargs)
    assert batch.sequences[1, -8:].tolist() == alone.sequences[0, -8:].tolist()
    assert torch.equal(batch.units[1], alone.units[0])

    events = list(model.stream(**inputs, **kwargs, first_chunk_size=1, chunk_size=1))
    assert [event.token for event in events if event.token is not None] == tokens
    waveform = torch.cat([event.waveform for event in events if event.waveform is not None])
    torch.testing.assert_close(waveform, expected.waveform[0], rtol=0, atol=1e-5)


# The next rename


def test_a_renamed_argument_of_forward_raises(models):
    """What 5.24 did: `generate` passes the cache by another name, which `**kwargs` would swallow."""

    class Renamed(TTTOmniForCausalLM):
        def prepare_inputs_for_generation(self, *args, **kwargs):
            inputs = super().prepare_inputs_for_generation(*args, **kwargs)
            return {"memory" if name == "cache" else name: value for name, value in inputs.items()}

    model = Renamed(models("hybrid").config).double().eval()
    with pytest.raises(TypeError, match=r"unexpected keyword arguments \['memory'\]"):
        model.generate(random_rows(0, [9])[0][None], max_new_tokens=3)


@pytest.mark.parametrize("layers", ["full", "hybrid", "mixed"])
def test_a_renamed_argument_of_attention_changes_nothing(models, layers, monkeypatch):
    model, ids = models(layers), random_rows(0, [9])[0][None]
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    forward = modeling_llama.LlamaAttention.forward

    def renamed(self, hidden_states, position_embeddings=None, attention_mask=None, memory=None, **kwargs):
        return forward(self, hidden_states, position_embeddings, attention_mask, memory, **kwargs)

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", renamed)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), expected)


@pytest.mark.parametrize("layers", ["full", "hybrid", "mixed"])
def test_attention_that_takes_the_cache_elsewhere_raises(models, layers, monkeypatch):
    forward = modeling_llama.LlamaAttention.forward

    def moved(self, hidden_states, position_embeddings=None, attention_mask=None, scale=None, memory=None, **kwargs):
        return forward(self, hidden_states, position_embeddings, attention_mask, memory, **kwargs)

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", moved)
    with pytest.raises(RuntimeError, match="does not fill it as TTT-Omni expects"):
        models(layers).generate(random_rows(0, [9])[0][None], max_new_tokens=3)


@pytest.mark.parametrize("part", ["whole", "model", "language model", "speech decoder", "encoder"])
def test_nothing_unknown_is_swallowed(golden_model, golden, part):
    ids = random_rows(0, [9])[0][None]
    call = {
        "whole": lambda **kwargs: golden_model(ids, **kwargs),
        "model": lambda **kwargs: golden_model.model(ids, **kwargs),
        "language model": lambda **kwargs: golden_model.model.language_model(ids, **kwargs),
        "speech decoder": lambda **kwargs: golden_model.speech_decoder(torch.zeros(1, 2, 64), **kwargs),
        "encoder": lambda **kwargs: golden_model.get_audio_features(golden["mel"].T[None], **kwargs),
    }[part]
    for unknown in ("kv_cache", "attention_maks", "is_causal"):
        with pytest.raises(TypeError, match=unknown):
            call(**{unknown: torch.ones(1, 9)})
    with pytest.raises(ValueError, match="kv_cache"):
        golden_model.generate(ids, kv_cache=DynamicCache(), max_new_tokens=2)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_the_old_word_for_the_cache(models):
    model, (first, second) = models("hybrid"), random_rows(0, [9, 4])
    logits = []
    for name in ("cache", "past_key_values"):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            output = model(first[None], **{name: cache})
            assert getattr(output, name) is cache
            logits.append(model(second[None], **{name: cache}).logits)
    assert torch.equal(*logits)


def test_a_cache_that_is_none(models):
    ids = random_rows(0, [9])[0][None]
    with pytest.raises(TypeError, match="must be a cache of Transformers"):
        models("hybrid")(ids, cache=((torch.zeros(1), torch.zeros(1)),))
    with pytest.raises(ValueError, match="has 5 layers and the model 4"):
        models("hybrid")(ids, cache=transformers.Cache(layers=[DynamicLayer() for _ in range(5)]))


def test_masks_that_do_not_fit(models):
    ids = random_rows(0, [9])[0][None]
    prepared = torch.zeros(1, 1, 9, 9, dtype=torch.float64)
    for layers in ("hybrid", "windowed", "ttt"):
        with pytest.raises(ValueError, match="which tokens are padding"):
            models(layers)(ids, attention_mask=prepared)
        with pytest.raises(ValueError, match=r"must have the shape \(1, 9\)"):
            models(layers)(ids, attention_mask=torch.ones(1, 8))
    causal = torch.full((9, 9), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    with torch.no_grad():
        torch.testing.assert_close(models("full")(ids, attention_mask=causal).logits, models("full")(ids).logits)
        torch.testing.assert_close(
            models("full")(ids, attention_mask={"full_attention": causal}).logits, models("full")(ids).logits
        )
