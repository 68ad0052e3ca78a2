# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""TTT-Omni configuration."""

import math

import torch
from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, PreTrainedConfig, WhisperConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


TTT_LAYER_TYPES = ("hybrid", "hybrid_sliding", "linear_attention")
SLIDING_LAYER_TYPES = ("sliding_attention", "hybrid_sliding")
LAYER_TYPES = ("full_attention", "sliding_attention", *TTT_LAYER_TYPES)
# The classes that a saved folder carries, which Transformers completes for one Auto class only.
AUTO_MAP = {
    "AutoConfig": "configuration_ttt_omni.TTTOmniConfig",
    "AutoModel": "modeling_ttt_omni.TTTOmniModel",
    "AutoModelForCausalLM": "modeling_ttt_omni.TTTOmniForCausalLM",
    "AutoModelForMultimodalLM": "modeling_ttt_omni.TTTOmniForCausalLM",
}
INNER_MODELS = ("linear", "mlp")
BACKBONES = ("llama", "mistral", "qwen2", "qwen3")
MAX_SIZE = 2**31 - 1  # of a dimension, so that none overflows
MAX_SAMPLING_RATE = 192_000


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_sizes(config: PreTrainedConfig, *fields: str) -> None:
    """Check that fields, or all entries of those that are lists, are sizes that a tensor may have."""
    for field in fields:
        value = getattr(config, field)
        name = f"audio_config.{field}" if isinstance(config, WhisperConfig) else field
        for size in value if isinstance(value, (list, tuple)) else [value]:
            _require(type(size) is int, f"`{name}` must be an integer, got {size!r}.")
            _require(size >= 1, f"`{name}` must be at least 1, got {size}.")
            _require(size <= MAX_SIZE, f"`{name}` must be at most {MAX_SIZE}, got {size}.")


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -math.inf < value < math.inf


def _require_numbers(config: PreTrainedConfig, *fields: str, minimum: float = 0.0) -> None:
    """Check that fields, or all entries of those that are lists, are finite and not below `minimum`."""
    for field in fields:
        value = getattr(config, field)
        for number in value if isinstance(value, (list, tuple)) else [value]:
            _require(
                _is_number(number) and number >= minimum,
                f"`{field}` must be a finite number of at least {minimum}, got {number!r}.",
            )


def require_token_ids(config: PreTrainedConfig, vocab_size: int, *fields: str) -> None:
    """Check that fields are `None`, or ids, or lists of them, of a vocabulary of `vocab_size` tokens."""
    for field in fields:
        value = getattr(config, field)
        for token in value if isinstance(value, list) else [value]:
            _require(
                token is None or (type(token) is int and 0 <= token < vocab_size),
                f"`{field}` must be the id of one of {vocab_size} tokens, got {token!r}.",
            )


def _require_divisible(config: LlamaConfig) -> None:
    """Check what `head_dim` and lists with an entry per layer are made from."""
    _require_sizes(config, "hidden_size", "num_attention_heads", "num_hidden_layers")
    _require(
        config.hidden_size % config.num_attention_heads == 0,
        f"`hidden_size` ({config.hidden_size}) must be a multiple of `num_attention_heads` "
        f"({config.num_attention_heads}).",
    )


def _require_llama(config: LlamaConfig) -> None:
    """Check what Llama's own configuration leaves to its model to fail on."""
    _require(
        config.hidden_act in ACT2FN, f"`hidden_act` must be an activation of Transformers, got {config.hidden_act!r}."
    )
    _require_rope(config.rope_parameters)
    _require_divisible(config)
    _require_sizes(config, "intermediate_size", "num_key_value_heads", "head_dim", "max_position_embeddings")
    _require_numbers(config, "rms_norm_eps", "initializer_range", "attention_dropout")
    _require(
        config.num_attention_heads % config.num_key_value_heads == 0,
        f"`num_attention_heads` ({config.num_attention_heads}) must be a multiple of `num_key_value_heads` "
        f"({config.num_key_value_heads}).",
    )
    _require(config.head_dim % 2 == 0, f"`head_dim` ({config.head_dim}) must be even for rotary embeddings.")


def _require_rope(parameters: dict) -> None:
    """Check `rope_parameters`, of which Transformers checks the names, and warns of values."""
    rope_type = parameters.get("rope_type")
    rope_types = ["default", *ROPE_INIT_FUNCTIONS]
    _require(
        isinstance(rope_type, str) and rope_type in rope_types,
        f"`rope_type` must be one of {rope_types}, got {rope_type!r}.",
    )
    for name, value in parameters.items():
        if name in ("rope_type", "type", "truncate", "attention_factor", "mscale", "mscale_all_dim") or value is None:
            continue
        for number in value if isinstance(value, list) and name in ("short_factor", "long_factor") else [value]:
            _require(_is_number(number) and number > 0, f"`{name}` must be a positive number, got {number!r}.")


def _require_window(config: LlamaConfig) -> None:
    """Check `sliding_window` and `attention_sinks` against the positions that the model was trained on."""
    if config.sliding_window is None:
        _require(
            not set(SLIDING_LAYER_TYPES) & set(config.layer_types),
            "`sliding_window` must be set when `layer_types` has sliding layers.",
        )
        return
    _require(config.sliding_window >= 1, f"`sliding_window` must be at least 1, got {config.sliding_window}.")
    _require(config.attention_sinks >= 0, f"`attention_sinks` must be at least 0, got {config.attention_sinks}.")
    _require(
        config.sliding_window + config.attention_sinks <= config.max_position_embeddings,
        f"`sliding_window` ({config.sliding_window}) + `attention_sinks` ({config.attention_sinks}) must not exceed "
        f"`max_position_embeddings` ({config.max_position_embeddings}).",
    )


def audio_embedding_lengths(input_features_mask: torch.Tensor, audio_downsample: int) -> torch.LongTensor:
    """
    Number of audio embeddings of each window, the same for the processor's placeholders and the model.

    Args:
        input_features_mask: `[W, frames]`, 1 for mel frames that hold sound.
        audio_downsample: encoder frames per embedding.

    Returns:
        `[W]`. All frames of a 30 s window give as many as the original, 300; part of one gives as many as it reaches.
    """
    mel_frames = input_features_mask.sum(-1).long()
    encoder_frames = (mel_frames + 1) // 2
    whole = (input_features_mask.shape[-1] + 1) // 2 // audio_downsample
    return (-(-encoder_frames // audio_downsample)).clamp(max=whole)


@strict
class TTTOmniTextConfig(LlamaConfig):
    r"""
    Configuration of the language model: one of Llama's shape, whose layers may hold Test-Time Training (TTT).

    Args:
        backbone (`str`, defaults to `"llama"`):
            The model whose attention the layers have: `"llama"`, `"mistral"`, `"qwen2"` or `"qwen3"`.
        layer_types (`list[str]`, *optional*):
            One of `full_attention`, `sliding_attention`, `hybrid` (full attention + TTT), `hybrid_sliding` (windowed
            attention + TTT) or `linear_attention` (TTT alone) per layer. By default the upper quarter is `hybrid`.
        ttt_layer_type (`str` or `list[str]`, defaults to `"linear"`):
            Inner model, `"linear"` (TTT-Linear) or `"mlp"` (TTT-MLP), for all layers or one per layer.
        ttt_mini_batch_size (`int`, defaults to 64):
            Tokens per inner mini-batch.
        ttt_base_lr (`float` or `list[float]`, defaults to 1.0):
            Inner base learning rate, for all layers or one per layer. With 0.1, ttt-lm-pytorch's for TTT-MLP, a fresh
            graft gives back a quarter of what it does with 1.0 (`benchmarks/recall.py`).
        ttt_qk_norm (`str`, defaults to `"rms"`):
            Normalisation of q and k over the head dimension: `"rms"`, `"l2"` (ttt-video-dit) or `"none"` (ttt-lm).
        ttt_standardize_target (`bool`, defaults to `True`):
            Whether the inner target is LN(v - k) with the inner LayerNorm's parameters rather than v - k.
        ttt_rope_theta (`float`, *optional*):
            Base of TTT's rotary embedding over the position in the mini-batch; `None` turns it off.
        ttt_lr_activation (`str`, defaults to `"sigmoid"`):
            What makes the inner learning rate's gate a factor from 0 to 1: `"sigmoid"`, as in the references, or
            `"hardsigmoid"`, with which a token may write nothing at all.
        ttt_head_gate (`bool`, defaults to `False`):
            Whether each head's output is multiplied by a sigmoid gate computed from the layer's input, so that a
            memory may be silent where nothing of it is asked for.
        ttt_divide_repeats (`bool`, defaults to `False`):
            Whether the inner learning rate of a token is divided by how often its key was there in the mini-batch,
            itself included, as the squares of positive cosines sum it up. Without, a start of tokens that are all
            alike, such as silence, makes a step so large that for thousands of tokens little else is given back.
        ttt_gate_init (`float`, defaults to 0.0):
            Initial value of the output gate of hybrid layers.
        ttt_scan_checkpoint_group_size (`int`, defaults to 16):
            In training, mini-batches per gradient checkpoint of the inner loop; 0 keeps every activation.
        sliding_window (`int`, *optional*):
            Tokens seen by windowed attention, the current one included, besides the sinks.
        attention_sinks (`int`, defaults to 4):
            First tokens of a sequence that windowed attention never evicts.
    """

    model_type = "ttt_omni_text"
    base_config_key = "text_config"
    base_model_tp_plan = LlamaConfig.base_model_tp_plan | {
        "layers.*.ttt.q_proj": "colwise",
        "layers.*.ttt.k_proj": "colwise",
        "layers.*.ttt.v_proj": "colwise",
        "layers.*.ttt.lr_gate": "colwise",
        "layers.*.ttt.inner_model": "ttt_heads",
        "layers.*.ttt.inner_norm": "ttt_heads",
        "layers.*.ttt.post_norm": "ttt_gather_heads",
        "layers.*.ttt.o_proj": "rowwise_split_input",
    }

    backbone: str = "llama"
    max_position_embeddings: int = 131072
    layer_types: list[str] | None = None
    ttt_layer_type: str | list[str] = "linear"
    ttt_mini_batch_size: int = 64
    ttt_base_lr: float | int | list[float] = 1.0
    ttt_qk_norm: str = "rms"
    ttt_standardize_target: bool = True
    ttt_rope_theta: float | int | None = None
    ttt_lr_activation: str = "sigmoid"
    ttt_head_gate: bool = False
    ttt_divide_repeats: bool = False
    ttt_gate_init: float | int = 0.0
    ttt_scan_checkpoint_group_size: int = 16
    sliding_window: int | None = None
    attention_sinks: int = 4

    def __post_init__(self, **kwargs):
        if self.backbone == "qwen3":
            norms = {
                f"layers.*.{x}.{y}_norm": "replicated_with_grad_allreduce" for x in ("self_attn", "ttt") for y in "qk"
            }
            self.base_model_tp_plan = self.base_model_tp_plan | norms
        if self.ttt_head_gate:
            gate = {"layers.*.ttt.head_gate": "replicated_with_grad_allreduce"}
            self.base_model_tp_plan = self.base_model_tp_plan | gate
        _require_divisible(self)
        if self.layer_types is None:
            ttt_layers = self.num_hidden_layers // 4
            self.layer_types = ["full_attention"] * (self.num_hidden_layers - ttt_layers) + ["hybrid"] * ttt_layers
        super().__post_init__(**kwargs)
        # Also run by `@strict`, which would wrap the `ValueError` in an exception that is none.
        self.validate_architecture()

    def validate_architecture(self):
        """Part of `@strict`-powered validation. Raises `ValueError` naming the field that is wrong."""
        _require_llama(self)
        _require(self.backbone in BACKBONES, f"`backbone` must be one of {BACKBONES}, got {self.backbone!r}.")
        _require_sizes(self, "vocab_size", "ttt_mini_batch_size")
        _require_numbers(self, "ttt_base_lr")
        _require_numbers(self, "ttt_gate_init", minimum=-math.inf)
        require_token_ids(self, self.vocab_size, "pad_token_id")
        unknown = sorted(set(self.layer_types) - set(LAYER_TYPES))
        _require(not unknown, f"`layer_types` has unknown entries {unknown}; choose from {list(LAYER_TYPES)}.")
        _require(
            len(self.layer_types) == self.num_hidden_layers,
            f"`layer_types` has {len(self.layer_types)} entries for `num_hidden_layers` ({self.num_hidden_layers}).",
        )
        for field in ("ttt_layer_type", "ttt_base_lr"):
            value = getattr(self, field)
            _require(
                not isinstance(value, list) or len(value) == self.num_hidden_layers,
                f"`{field}` must have one entry per layer ({self.num_hidden_layers}), got {value}.",
            )
        for ttt_type in self.ttt_layer_type if isinstance(self.ttt_layer_type, list) else [self.ttt_layer_type]:
            _require(
                ttt_type in INNER_MODELS,
                f"`ttt_layer_type` must be one of {list(INNER_MODELS)}, got {ttt_type!r}.",
            )
        _require(
            self.ttt_mini_batch_size <= self.max_position_embeddings,
            f"`ttt_mini_batch_size` ({self.ttt_mini_batch_size}) must not exceed `max_position_embeddings` "
            f"({self.max_position_embeddings}).",
        )
        _require(
            self.ttt_scan_checkpoint_group_size >= 0,
            f"`ttt_scan_checkpoint_group_size` must be at least 0, got {self.ttt_scan_checkpoint_group_size}.",
        )
        _require(
            self.ttt_qk_norm in ("rms", "l2", "none"),
            f"`ttt_qk_norm` must be 'rms', 'l2' or 'none', got {self.ttt_qk_norm!r}.",
        )
        _require(
            self.ttt_lr_activation in ("sigmoid", "hardsigmoid"),
            f"`ttt_lr_activation` must be 'sigmoid' or 'hardsigmoid', got {self.ttt_lr_activation!r}.",
        )
        _require(
            self.ttt_rope_theta is None or (_is_number(self.ttt_rope_theta) and self.ttt_rope_theta > 0),
            f"`ttt_rope_theta` must be positive or None, got {self.ttt_rope_theta}.",
        )
        _require_window(self)

    def get_ttt_layer_type(self, layer_idx: int) -> str:
        """Inner model of layer `layer_idx`, `"linear"` or `"mlp"`."""
        return self.ttt_layer_type[layer_idx] if isinstance(self.ttt_layer_type, list) else self.ttt_layer_type

    def get_ttt_base_lr(self, layer_idx: int) -> float:
        """Inner base learning rate of layer `layer_idx`."""
        return self.ttt_base_lr[layer_idx] if isinstance(self.ttt_base_lr, list) else self.ttt_base_lr


@strict
class TTTOmniSpeechDecoderConfig(LlamaConfig):
    r"""
    Configuration of the CTC speech decoder: causal Llama layers over upsampled hidden states of the language model.

    Args:
        input_size (`int`, defaults to 4096):
            Width of the language model's hidden states.
        upsample_factor (`int`, defaults to 25):
            Frames per token.
        unit_vocab_size (`int`, defaults to 1000):
            Number of speech units; the blank's id is `unit_vocab_size`.
        ctc_loss_weight (`float`, defaults to 1.0):
            Weight of the CTC loss beside the LM loss.
        sliding_window (`int`, *optional*):
            Frames seen by a frame, itself included, besides the sinks; `None` is the original's full attention.
            Conversion with a window for attention sets the frames of 100 tokens.
        attention_sinks (`int`, defaults to 4):
            First frames that a windowed decoder never evicts.
    """

    model_type = "ttt_omni_speech_decoder"
    base_config_key = "speech_decoder_config"
    backbone = "llama"

    num_hidden_layers: int = 2
    max_position_embeddings: int = 131072
    input_size: int = 4096
    upsample_factor: int = 25
    unit_vocab_size: int = 1000
    ctc_loss_weight: float | int = 1.0
    sliding_window: int | None = None
    attention_sinks: int = 4
    layer_types: list[str] | None = None

    def __post_init__(self, **kwargs):
        _require_divisible(self)
        layer_type = "full_attention" if self.sliding_window is None else "sliding_attention"
        self.layer_types = [layer_type] * self.num_hidden_layers
        super().__post_init__(**kwargs)
        self.validate_architecture()

    def validate_architecture(self):
        """Part of `@strict`-powered validation. Raises `ValueError` naming the field that is wrong."""
        _require_llama(self)
        _require_sizes(self, "input_size", "upsample_factor", "unit_vocab_size")
        _require_numbers(self, "ctc_loss_weight")
        _require(
            self.upsample_factor <= self.max_position_embeddings,
            f"`upsample_factor` ({self.upsample_factor}) must not exceed `max_position_embeddings` "
            f"({self.max_position_embeddings}).",
        )
        _require_window(self)


@strict
class TTTOmniVocoderConfig(PreTrainedConfig):
    r"""
    Configuration of the unit HiFi-GAN with duration predictor, in the field names of `SeamlessM4THifiGan`.

    Args:
        unit_vocab_size (`int`, defaults to 1000):
            Number of speech units.
        unit_embed_dim (`int`, defaults to 128):
            Width of a unit's embedding.
        duration_predictor_hidden_dim (`int`, defaults to 128):
            Width of the duration predictor.
        variance_predictor_kernel_size (`int`, defaults to 3):
            Kernel size of the duration predictor.
        resblock (`str`, defaults to `"1"`):
            HiFi-GAN's kind of residual block, `"1"` or `"2"`.
        num_frame_layers (`int`, defaults to 0):
            Layers over frames between the units' embeddings and the generator.
        sampling_rate (`int`, defaults to 16000):
            Samples per second of the waveform.
    """

    model_type = "ttt_omni_vocoder"
    base_config_key = "vocoder_config"

    unit_vocab_size: int = 1000
    unit_embed_dim: int = 128
    duration_predictor_hidden_dim: int = 128
    variance_predictor_kernel_size: int = 3
    var_pred_dropout: float | int = 0.5
    upsample_initial_channel: int = 512
    upsample_rates: list[int] | tuple[int, ...] = (5, 4, 4, 2, 2)
    upsample_kernel_sizes: list[int] | tuple[int, ...] = (11, 8, 8, 4, 4)
    resblock_kernel_sizes: list[int] | tuple[int, ...] = (3, 7, 11)
    resblock_dilation_sizes: list | tuple = ((1, 3, 5), (1, 3, 5), (1, 3, 5))
    resblock: str = "1"
    num_frame_layers: int = 0
    leaky_relu_slope: float = 0.1
    sampling_rate: int = 16000
    initializer_range: float = 0.02

    # `SeamlessM4THifiGan` also concatenates embeddings of a language and a speaker, which this vocoder lacks.
    lang_embed_dim = 0
    spkr_embed_dim = 0

    @property
    def hop_length(self) -> int:
        """Samples per frame."""
        return math.prod(self.upsample_rates)

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.validate_architecture()

    def validate_architecture(self):
        """Part of `@strict`-powered validation. Raises `ValueError` naming the field that is wrong."""
        for field in ("upsample_rates", "resblock_kernel_sizes"):
            _require(len(getattr(self, field)) > 0, f"`{field}` must not be empty.")
        _require(
            len(self.upsample_rates) == len(self.upsample_kernel_sizes),
            f"`upsample_kernel_sizes` must have one entry per entry of `upsample_rates` ({len(self.upsample_rates)}), "
            f"got {len(self.upsample_kernel_sizes)}.",
        )
        _require_sizes(
            self, "unit_vocab_size", "unit_embed_dim", "duration_predictor_hidden_dim", "upsample_initial_channel",
            "upsample_rates", "upsample_kernel_sizes", "resblock_kernel_sizes", "sampling_rate",
        )  # fmt: skip
        _require(
            self.sampling_rate <= MAX_SAMPLING_RATE,
            f"`sampling_rate` must be at most {MAX_SAMPLING_RATE}, got {self.sampling_rate}.",
        )
        _require_numbers(self, "var_pred_dropout", "leaky_relu_slope", "initializer_range")
        _require(self.resblock in ("1", "2"), f"`resblock` must be '1' or '2', got {self.resblock!r}.")
        _require(
            type(self.num_frame_layers) is int and 0 <= self.num_frame_layers <= 100,
            f"`num_frame_layers` must be an integer from 0 to 100, got {self.num_frame_layers!r}.",
        )
        _require(
            all(size % 2 == 1 for size in self.resblock_kernel_sizes),
            f"`resblock_kernel_sizes` must be odd, got {list(self.resblock_kernel_sizes)}.",
        )
        for rate, kernel_size in zip(self.upsample_rates, self.upsample_kernel_sizes):
            _require(
                kernel_size >= rate and (kernel_size - rate) % 2 == 0,
                f"`upsample_kernel_sizes` ({kernel_size}) must exceed `upsample_rates` ({rate}) by an even number.",
            )
        _require(
            len(self.resblock_kernel_sizes) == len(self.resblock_dilation_sizes),
            "`resblock_dilation_sizes` must have one entry per entry of `resblock_kernel_sizes`.",
        )
        for kernel_size, dilations in zip(self.resblock_kernel_sizes, self.resblock_dilation_sizes):
            _require(
                isinstance(dilations, (list, tuple))
                and all(
                    type(dilation) is int and 1 <= dilation and (kernel_size - 1) * dilation <= self.sampling_rate
                    for dilation in dilations
                ),
                "`resblock_dilation_sizes` must be lists of integers that stretch a kernel to a second at most, got "
                f"{dilations!r}.",
            )
        _require(
            self.upsample_initial_channel % 2 ** len(self.upsample_rates) == 0,
            f"`upsample_initial_channel` ({self.upsample_initial_channel}) must be a multiple of "
            f"2**{len(self.upsample_rates)}, as it is halved once per entry of `upsample_rates`.",
        )
        _require(
            self.variance_predictor_kernel_size == 3,
            "`variance_predictor_kernel_size` must be 3: fairseq pads the second convolution for no other size.",
        )


@strict
class TTTOmniConfig(PreTrainedConfig):
    r"""
    Configuration of a [`TTTOmniForCausalLM`].

    A text-only model has no `audio_config`; one that does not speak has neither `speech_decoder_config` nor
    `vocoder_config`.

    Args:
        text_config (`TTTOmniTextConfig` or `dict`, *optional*):
            The language model's.
        audio_config (`WhisperConfig` or `dict`, *optional*):
            The Whisper encoder's.
        speech_decoder_config (`TTTOmniSpeechDecoderConfig` or `dict`, *optional*):
            The CTC speech decoder's.
        vocoder_config (`TTTOmniVocoderConfig` or `dict`, *optional*):
            The unit HiFi-GAN's.
        audio_token_id (`int`, *optional*):
            Id of the placeholder that stands for one audio embedding.
        audio_downsample (`int`, defaults to 5):
            Encoder frames concatenated into one audio embedding.
        projector_hidden_size (`int`, defaults to 2048):
            Width of the projector's hidden layer.
    """

    model_type = "ttt_omni"
    sub_configs = {
        "text_config": TTTOmniTextConfig,
        "audio_config": WhisperConfig,
        "speech_decoder_config": TTTOmniSpeechDecoderConfig,
        "vocoder_config": TTTOmniVocoderConfig,
    }
    keys_to_ignore_at_inference = ["cache", "ctc_loss", "last_hidden_state", "lm_loss"]

    text_config: dict | PreTrainedConfig | None = None
    audio_config: dict | PreTrainedConfig | None = None
    speech_decoder_config: dict | PreTrainedConfig | None = None
    vocoder_config: dict | PreTrainedConfig | None = None
    audio_token_id: int | None = None
    audio_downsample: int = 5
    projector_hidden_size: int = 2048
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        if self.text_config is None:
            self.text_config = TTTOmniTextConfig()
        for name, config_class in self.sub_configs.items():
            if isinstance(getattr(self, name), dict):
                setattr(self, name, config_class(**getattr(self, name)))
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        super().__post_init__(**kwargs)
        self.validate_architecture()

    @property
    def speaks(self) -> bool:
        """Whether the model has all that makes speech: a speech decoder and a vocoder."""
        return self.speech_decoder_config is not None and self.vocoder_config is not None

    def validate_architecture(self):
        """Part of `@strict`-powered validation. Raises `ValueError` naming the field that is wrong."""
        _require_sizes(self, "audio_downsample", "projector_hidden_size")
        audio, speech_decoder, vocoder = self.audio_config, self.speech_decoder_config, self.vocoder_config
        if audio is not None:
            _require(self.audio_token_id is not None, "`audio_token_id` must be set when there is an `audio_config`.")
            require_token_ids(self, self.text_config.vocab_size, "audio_token_id")
            _require_sizes(
                audio, "d_model", "encoder_attention_heads", "encoder_layers", "encoder_ffn_dim", "num_mel_bins",
                "max_source_positions",
            )  # fmt: skip
            _require(
                audio.activation_function in ACT2FN,
                f"`audio_config.activation_function` must be an activation of Transformers, got "
                f"{audio.activation_function!r}.",
            )
            _require(
                audio.d_model % audio.encoder_attention_heads == 0,
                f"`audio_config.d_model` ({audio.d_model}) must be a multiple of "
                f"`audio_config.encoder_attention_heads` ({audio.encoder_attention_heads}).",
            )
        if speech_decoder is not None:
            _require(
                speech_decoder.input_size == self.text_config.hidden_size,
                f"`speech_decoder_config.input_size` ({speech_decoder.input_size}) must equal "
                f"`text_config.hidden_size` ({self.text_config.hidden_size}).",
            )
        if speech_decoder is not None and vocoder is not None:
            _require(
                speech_decoder.unit_vocab_size == vocoder.unit_vocab_size,
                f"`speech_decoder_config.unit_vocab_size` ({speech_decoder.unit_vocab_size}) must equal "
                f"`vocoder_config.unit_vocab_size` ({vocoder.unit_vocab_size}).",
            )


__all__ = ["TTTOmniConfig", "TTTOmniSpeechDecoderConfig", "TTTOmniTextConfig", "TTTOmniVocoderConfig"]
