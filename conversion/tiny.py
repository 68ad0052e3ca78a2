# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""A small random checkpoint in LLaMA-Omni's layout, and the TTT-Omni model made from it, for tests and demos."""

import json
import math
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ..files_ttt_omni import new_folder
from .llama_omni import plan_conversion


SEED = 0
NUM_BPE_TOKENS = 384
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = """\
You are a helpful language and speech assistant. You are able to understand the speech content that the user provides,
and assist the user with a variety of tasks using natural language. Please directly answer the questions in the user's
speech. What did you hear, and what would you like to say about it? There is so much to remember in a long talk: the
names of people, the places where they live, the things that they want to do tomorrow, and the reason why they asked.
A small model learns from every word as it goes by, and so it does not forget what was said an hour ago.
"""

HIDDEN_SIZE = 64
NUM_LAYERS = 4
NUM_HEADS = 4
NUM_KV_HEADS = 2
INTERMEDIATE_SIZE = 128
PROJECTOR_SIZE = 128
ENCODER = {"n_mels": 128, "n_audio_ctx": 1500, "n_audio_state": 32, "n_audio_head": 4, "n_audio_layer": 2}
DOWNSAMPLE = 5
NUM_UNITS = 100
VOCODER = {
    "resblock": "1",
    "upsample_rates": [5, 4, 4, 2, 2],
    "upsample_kernel_sizes": [11, 8, 8, 4, 4],
    "upsample_initial_channel": 64,
    "resblock_kernel_sizes": [3, 7, 11],
    "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5], [1, 3, 5]],
    "num_embeddings": NUM_UNITS,
    "embedding_dim": 32,
    "model_in_dim": 32,
    "code_hop_size": 320,
    "f0": False,
    "sampling_rate": 16000,
    "dur_predictor_params": {
        "encoder_embed_dim": 32,
        "var_pred_hidden_dim": 32,
        "var_pred_kernel_size": 3,
        "var_pred_dropout": 0.5,
    },
}


def make_tiny(output: str | os.PathLike) -> None:
    """
    Makes a TTT-Omni model of a few hundred thousand random weights in the new folder `output`.

    Its source, a checkpoint in LLaMA-Omni's layout with `whisper.pt`, `vocoder.pt` and `vocoder_config.json`, is left
    in `output/llama-omni`. The same weights come out at every call.

    Raises:
        FileExistsError: `output` exists and is not empty.
    """
    with new_folder(output) as folder:
        source = folder / "llama-omni"
        source.mkdir()
        write_llama_omni(source)
        conversion = plan_conversion(
            source,
            whisper=source / "whisper.pt",
            vocoder=source / "vocoder.pt",
            vocoder_config=source / "vocoder_config.json",
            layers=range(NUM_LAYERS // 2, NUM_LAYERS),
            dtype="float32",
        )
        conversion.write(folder)


def write_llama_omni(folder: Path) -> None:
    """Writes the small random checkpoint in LLaMA-Omni's layout into the existing `folder`."""
    generator = torch.Generator().manual_seed(SEED)
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(_config(tokenizer), indent=2))
    save_file(_llama_omni(tokenizer, generator), folder / "model.safetensors", metadata={"format": "pt"})
    torch.save({"dims": ENCODER, "model_state_dict": _whisper(generator)}, folder / "whisper.pt")
    torch.save({"generator": _vocoder(generator)}, folder / "vocoder.pt")
    (folder / "vocoder_config.json").write_text(json.dumps(VOCODER, indent=2))


def llama3_special_tokens() -> list[str]:
    """Llama 3.1's 256 special tokens in the order of their ids."""
    named = {
        0: "begin_of_text",
        1: "end_of_text",
        4: "finetune_right_pad_id",
        6: "start_header_id",
        7: "end_header_id",
        8: "eom_id",
        9: "eot_id",
        10: "python_tag",
    }
    reserved = iter(range(256 - len(named)))
    return [f"<|{named.get(i) or f'reserved_special_token_{next(reserved)}'}|>" for i in range(256)]


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_BPE_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in llama3_special_tokens()]
    )
    bos = "<|begin_of_text|>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token="<|eot_id|>", model_max_length=131072
    )


def _config(tokenizer: PreTrainedTokenizerFast) -> dict:
    return {
        "model_type": "omni_speech2s_llama",
        "architectures": ["OmniSpeech2SLlamaForCausalLM"],
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]),
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": INTERMEDIATE_SIZE,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "attention_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "speech_encoder": "whisper.pt",
        "speech_encoder_type": "whisper",
        "speech_encoder_ds_rate": DOWNSAMPLE,
        "speech_encoder_hidden_size": ENCODER["n_audio_state"],
        "speech_projector_type": "linear",
        "speech_generator_type": "ctc",
        "ctc_decoder_config": f"(2,{HIDDEN_SIZE},{NUM_HEADS},{INTERMEDIATE_SIZE})",
        "ctc_upsample_factor": 25,
        "ctc_loss_weight": 1.0,
        "unit_vocab_size": NUM_UNITS,
    }


class _Weights:
    """Random weights by name, scaled so that the variance of their input survives."""

    def __init__(self, generator: torch.Generator):
        self.generator = generator
        self.tensors = {}

    def add(self, name: str, *shape: int, bias: bool = True, fan_in: int | None = None, gain: float = 1.0) -> None:
        std = gain / math.sqrt(fan_in or math.prod(shape[1:]))
        self.tensors[f"{name}.weight"] = torch.randn(shape, generator=self.generator) * std
        if bias:
            self.tensors[f"{name}.bias"] = torch.randn(shape[0], generator=self.generator) * 0.02

    def add_norm(self, name: str, width: int, bias: bool = True) -> None:
        self.tensors[f"{name}.weight"] = torch.ones(width)
        if bias:
            self.tensors[f"{name}.bias"] = torch.zeros(width)


def _add_llama_layers(weights: _Weights, prefix: str, num_layers: int, num_kv_heads: int) -> None:
    kv_size = HIDDEN_SIZE // NUM_HEADS * num_kv_heads
    for layer in (f"{prefix}.layers.{i}" for i in range(num_layers)):
        weights.add_norm(f"{layer}.input_layernorm", HIDDEN_SIZE, bias=False)
        weights.add_norm(f"{layer}.post_attention_layernorm", HIDDEN_SIZE, bias=False)
        for name, rows, columns in (
            ("self_attn.q_proj", HIDDEN_SIZE, HIDDEN_SIZE),
            ("self_attn.k_proj", kv_size, HIDDEN_SIZE),
            ("self_attn.v_proj", kv_size, HIDDEN_SIZE),
            ("self_attn.o_proj", HIDDEN_SIZE, HIDDEN_SIZE),
            ("mlp.gate_proj", INTERMEDIATE_SIZE, HIDDEN_SIZE),
            ("mlp.up_proj", INTERMEDIATE_SIZE, HIDDEN_SIZE),
            ("mlp.down_proj", HIDDEN_SIZE, INTERMEDIATE_SIZE),
        ):
            weights.add(f"{layer}.{name}", rows, columns, bias=False, gain=2.0)


def _llama_omni(tokenizer: PreTrainedTokenizerFast, generator: torch.Generator) -> dict[str, torch.Tensor]:
    weights = _Weights(generator)
    weights.add("model.embed_tokens", len(tokenizer), HIDDEN_SIZE, bias=False, fan_in=1)
    _add_llama_layers(weights, "model", NUM_LAYERS, NUM_KV_HEADS)
    weights.add_norm("model.norm", HIDDEN_SIZE, bias=False)
    weights.add("lm_head", len(tokenizer), HIDDEN_SIZE, bias=False, gain=2.0)
    # Only tokens that read as text can win: an answer has no special tokens, and runs to its full length.
    texts = [tokenizer.decode(token) for token in range(NUM_BPE_TOKENS)]
    no_text = [not (text.isascii() and text.isprintable()) for text in texts] + [True] * (len(tokenizer) - len(texts))
    weights.tensors["lm_head.weight"][torch.tensor(no_text)] = 0
    weights.add("model.speech_projector.linear1", PROJECTOR_SIZE, ENCODER["n_audio_state"] * DOWNSAMPLE)
    weights.add("model.speech_projector.linear2", HIDDEN_SIZE, PROJECTOR_SIZE, gain=2.0)
    weights.add("speech_generator.input_proj", HIDDEN_SIZE, HIDDEN_SIZE)
    _add_llama_layers(weights, "speech_generator", 2, NUM_HEADS)
    weights.add("speech_generator.output_proj", NUM_UNITS + 1, HIDDEN_SIZE)
    return weights.tensors


def _whisper(generator: torch.Generator) -> dict[str, torch.Tensor]:
    weights = _Weights(generator)
    width = ENCODER["n_audio_state"]
    weights.add("encoder.conv1", width, ENCODER["n_mels"], 3)
    weights.add("encoder.conv2", width, width, 3)
    for block in (f"encoder.blocks.{i}" for i in range(ENCODER["n_audio_layer"])):
        for name in ("query", "key", "value", "out"):
            weights.add(f"{block}.attn.{name}", width, width, bias=name != "key")
        weights.add_norm(f"{block}.attn_ln", width)
        weights.add(f"{block}.mlp.0", 4 * width, width)
        weights.add(f"{block}.mlp.2", width, 4 * width)
        weights.add_norm(f"{block}.mlp_ln", width)
    weights.add_norm("encoder.ln_post", width)
    frames = torch.arange(ENCODER["n_audio_ctx"])[:, None]
    angles = frames * 10000 ** -torch.linspace(0, 1, width // 2)
    weights.tensors["encoder.positional_embedding"] = torch.cat([angles.sin(), angles.cos()], dim=1)
    return weights.tensors


def _vocoder(generator: torch.Generator) -> dict[str, torch.Tensor]:
    weights = _Weights(generator)
    unit_width, channels = VOCODER["embedding_dim"], VOCODER["upsample_initial_channel"]

    def add_normed(name, *shape, out_channels=None, **kwargs):
        """A convolution under weight norm: fairseq keeps its direction in `weight_v` and its norm in `weight_g`."""
        weights.add(name, *shape, **kwargs)
        weight = weights.tensors.pop(f"{name}.weight")
        weights.tensors[f"{name}.weight_v"] = weight
        weights.tensors[f"{name}.weight_g"] = torch.linalg.vector_norm(weight, dim=(1, 2), keepdim=True)
        if out_channels is not None:
            weights.tensors[f"{name}.bias"] = torch.zeros(out_channels)

    add_normed("conv_pre", channels, unit_width, 7)
    kernels = VOCODER["resblock_kernel_sizes"]
    for i, (rate, kernel) in enumerate(zip(VOCODER["upsample_rates"], VOCODER["upsample_kernel_sizes"])):
        fan_in = channels * kernel // rate  # of a transposed convolution, whose first dimension is its input
        channels //= 2
        add_normed(f"ups.{i}", 2 * channels, channels, kernel, out_channels=channels, fan_in=fan_in, gain=1.4)
        for j, size in enumerate(kernels):
            for k in range(3):
                for convs in ("convs1", "convs2"):
                    add_normed(f"resblocks.{i * len(kernels) + j}.{convs}.{k}", channels, channels, size, gain=0.7)
    add_normed("conv_post", 1, channels, 7, gain=0.2)
    weights.add("dict", NUM_UNITS, unit_width, bias=False, fan_in=1)
    for i in (1, 2):
        weights.add(f"dur_predictor.conv{i}.0", unit_width, unit_width, 3)
        weights.add_norm(f"dur_predictor.ln{i}", unit_width)
    weights.add("dur_predictor.proj", 1, unit_width)
    weights.tensors["dur_predictor.proj.bias"] += 1.0  # log(1 + frames): units of about two frames
    return weights.tensors
