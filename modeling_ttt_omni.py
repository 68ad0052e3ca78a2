# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""TTT-Omni: LLaMA-Omni whose language model remembers through Test-Time Training."""

import functools
import os
from contextlib import suppress
from dataclasses import dataclass

import torch
from huggingface_hub import ModelCard
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import StaticLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.whisper.modeling_whisper import WhisperEncoder, sinusoids
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, cached_file, can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cache_ttt_omni import BatchedCache, add_ttt_layers, has_fixed_size
from .configuration_ttt_omni import (
    SLIDING_LAYER_TYPES,
    TTTOmniConfig,
    TTTOmniSpeechDecoderConfig,
    TTTOmniTextConfig,
    audio_embedding_lengths,
)
from .generation_ttt_omni import TTTOmniGenerationMixin
from .layers_ttt_omni import (
    TTTInnerNorm,
    TTTLinearModel,
    TTTMLPModel,
    TTTOmniAttention,
    TTTOmniDecoderLayer,
    TTTOmniRotaryEmbedding,
    TTTOmniSlidingRotaryEmbedding,
    TTTOutputGate,
    TTTTokenScale,
    lay_out_tokens,
    windowed_attention_implementation,
)
from .memory_ttt_omni import TTTOmniMemoryMixin
from .vocoder_ttt_omni import TTTOmniVocoder


# What PEFT adapts if it is told no `target_modules`: as of a Llama, and nothing of encoder and speech decoder.
LORA_TARGET_MODULES = r"(.*\.)?language_model\.layers\.\d+\.(self_attn|ttt)\.[qv]_proj"
# Windows of 30 s that the encoder takes at once outside of training.
AUDIO_WINDOWS_PER_PASS = 8
# Of what `TransformersKwargs` lists, what has a meaning here.
FORWARD_KWARGS = {
    "cu_seq_lens_k",
    "cu_seq_lens_q",
    "max_length_k",
    "max_length_q",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
}


class TTTOmniPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation of all parts of TTT-Omni."""

    config: TTTOmniConfig
    base_model_prefix = "model"
    input_modalities = ("audio", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["TTTOmniDecoderLayer", "WhisperEncoderLayer"]
    _skip_keys_device_placement = ["cache"]
    _keep_in_fp32_modules_strict = ["inner_model", "inner_norm", "token_scale", "ttt_gate"]
    # What no quantiser touches either, whatever else it is told to skip: patterns of modules' and parameters' names.
    _keep_in_fp32_modules = [r".*\b(lr|head)_gate"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        if {"distributed_config", "tp_plan", "tp_size"} & kwargs.keys():
            from .parallel_ttt_omni import register_parallel_styles

            register_parallel_styles()
        try:
            from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as lora_targets

            lora_targets[TTTOmniConfig.model_type] = LORA_TARGET_MODULES
        except ImportError:  # PEFT is optional, and takes time to import
            pass
        return super().from_pretrained(*args, **kwargs)

    def _upload_modified_files(self, working_dir, repo_id, *args, **kwargs):
        """Where `push_to_hub` makes up a card, takes that of the folder or repository that the model came from."""
        path = os.path.join(working_dir, "README.md")
        made_up = ModelCard.load(path)
        if self.name_or_path and "has been automatically generated" in made_up.text:
            with suppress(OSError):  # there is none
                card = ModelCard.load(cached_file(self.name_or_path, "README.md"))
                card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *(made_up.data.tags or [])]))
                card.save(path)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, (TTTLinearModel, TTTMLPModel)):
            for name, parameter in module.named_parameters(recurse=False):
                if name.startswith("W"):
                    init.normal_(parameter, mean=0.0, std=0.02)  # as ttt-lm-pytorch
                else:
                    init.zeros_(parameter)
        elif isinstance(module, TTTInnerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, TTTTokenScale):
            init.copy_(module.weight, module.initial_weight(module.weight.shape[0]))
        elif isinstance(module, TTTOutputGate):
            init.constant_(module.weight, getattr(self.config.get_text_config(), "ttt_gate_init", 0.0))


class TTTOmniDecoderStack(TTTOmniPreTrainedModel):
    """The layers that the language model and the speech decoder have in common."""

    _can_record_outputs = {"hidden_states": TTTOmniDecoderLayer, "attentions": TTTOmniAttention}

    def __init__(self, config: TTTOmniTextConfig | TTTOmniSpeechDecoderConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(
            [TTTOmniDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.rotary_emb = TTTOmniRotaryEmbedding(config)
        self.has_sliding_layers = bool(set(SLIDING_LAYER_TYPES) & set(config.layer_types))
        if self.has_sliding_layers:
            self.sliding_rotary_emb = TTTOmniSlidingRotaryEmbedding(config)
        self.gradient_checkpointing = False

    def run_layers(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: `[B, T, hidden_size]`.
            attention_mask: `[B, past + T]`, 0 for padding. Where all layers have full attention, also what
                Transformers prepares of it.
            position_ids: `[B, T]`; where they restart without a mask and a cache, several sequences are packed.
            cache: of the tokens before.
            kwargs: `cu_seq_lens_q` `[n + 1]`, bounds of n sequences packed in one row, as Transformers' collators
                give them, and what else Transformers' attention takes.

        Returns:
            `[B, T, hidden_size]`.

        Raises:
            TypeError: an argument that is not known, or a cache that is none.
            ValueError: a mask of another shape, or a cache that cannot be used.
        """
        check_forward_kwargs(self, kwargs)
        past_length = 0
        if cache is not None:
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                raise ValueError(
                    "Gradient checkpointing runs layers twice, which a cache cannot take back: pass none."
                )
            add_ttt_layers(cache, self.config)
            past_length = cache.get_seq_length()  # a tensor, if the cache is static, or its rows differ
            if hidden_states.shape[1] == 1 and attention_mask is None and position_ids is None:
                past_length = self._row_lengths(cache, past_length)
            if isinstance(cache, BatchedCache) and (attention_mask is not None or position_ids is not None):
                raise ValueError("A `BatchedCache` knows the places of its rows: pass neither mask nor positions.")
        if isinstance(attention_mask, dict):
            attention_mask = attention_mask["full_attention"]
        padding = attention_mask
        if isinstance(attention_mask, BlockMask) or getattr(attention_mask, "ndim", 2) != 2:
            if set(self.config.layer_types) != {"full_attention"}:
                raise ValueError(
                    "`attention_mask` must be [batch, past + new tokens]: layers with TTT or a window have to know "
                    "which tokens are padding, which a prepared mask does not tell."
                )
            padding = None
        batch_size, length = hidden_states.shape[:2]
        layout = lay_out_tokens(
            batch_size,
            length,
            past_length,
            hidden_states.device,
            padding,
            position_ids,
            kwargs.get("cu_seq_lens_q"),
            may_be_packed=attention_mask is None and cache is None,
        )
        causal_mask = None
        if {"full_attention", "hybrid"} & set(self.config.layer_types):
            # A buffer of fixed length has places behind the last token, which no mask would leave visible.
            is_static = cache is not None and any(isinstance(layer, StaticLayer) for layer in cache.layers)
            if isinstance(cache, BatchedCache):
                attention_mask = cache.attention_mask(length, hidden_states.device)
            causal_mask = create_causal_mask(
                self.config,
                hidden_states,
                attention_mask,
                cache,
                layout.position_ids,
                allow_is_causal_skip=not is_static,
            )
        rotations = {}  # by whether they are a window's
        if set(self.config.layer_types) - {"linear_attention", *SLIDING_LAYER_TYPES}:
            rotations[False] = self.rotary_emb(hidden_states, layout.position_ids)
        if self.has_sliding_layers:
            layout = layout._replace(window_step=self._plan_window_step(hidden_states, layout, cache))
            rotate = self.sliding_rotary_emb if layout.window_step is None else self.sliding_rotary_emb.of_step
            rotations[True] = rotate(hidden_states, layout.places)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states, causal_mask, rotations.get(layer.is_sliding), layout, cache=cache, **kwargs
            )
        if cache is not None:
            _check_written(cache, past_length + length)
        return hidden_states

    @property
    def _first_window(self) -> int:
        return next(layer.layer_idx for layer in self.layers if layer.is_sliding)

    def _row_lengths(self, cache, length):
        """What a step that is compiled knows of the past: tensors, as it would be compiled anew for each number."""
        if cache.is_compileable and self.has_sliding_layers and has_fixed_size(cache) and length > 0:
            return cache.layers[self._first_window].row_lengths[:, None]  # [B, 1]
        return length

    def _plan_window_step(self, hidden_states, layout, cache):
        """Of a token that goes into the windows' rings, `None` where tokens are appended."""
        if cache is None or hidden_states.shape[1] != 1 or windowed_attention_implementation(self.config) == "eager":
            return None
        first = cache.layers[self._first_window]
        first.prefetch()
        rotate = functools.partial(self.sliding_rotary_emb.of_distance, hidden_states)
        return first.plan_step(layout.places, layout.mask is not None, rotate)


def check_forward_kwargs(module: nn.Module, kwargs: dict) -> None:
    """Raises `TypeError` for what no part of a `forward` would take: Transformers' own layers would swallow it."""
    unknown = sorted(kwargs.keys() - FORWARD_KWARGS)
    if unknown:
        raise TypeError(f"{type(module).__name__}.forward() got unexpected keyword arguments {unknown}.")


def _check_written(cache: Cache, length: int | torch.Tensor) -> None:
    """Raises unless all layers of `cache` hold `length` tokens; those that count on a device are not waited for."""
    for index, layer in enumerate(cache.layers):
        held = layer.get_seq_length()
        if isinstance(held, int) and isinstance(length, int) and held != length:
            raise RuntimeError(
                f"Layer {index} of the cache holds {held} tokens where {length} were read: this version of "
                "Transformers does not fill it as TTT-Omni expects. Install one that TTT-Omni was tested with."
            )


class TTTOmniTextModel(TTTOmniDecoderStack):
    """The language model: Llama with TTT in chosen layers, without a head."""

    config: TTTOmniTextConfig
    input_modalities = ("text",)

    def __init__(self, config: TTTOmniTextConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_init()

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """As [`LlamaModel`]; see `run_layers` for masks and packed sequences."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        hidden_states = self.run_layers(inputs_embeds, attention_mask, position_ids, cache, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), cache=cache)


class TTTOmniSpeechDecoder(TTTOmniDecoderStack):
    """Causal layers from the language model's hidden states, upsampled, to CTC logits of speech units."""

    config: TTTOmniSpeechDecoderConfig
    base_model_prefix = "speech_decoder"
    _keep_in_fp32_modules = [r".*\binput_proj", r".*\boutput_proj"]

    def __init__(self, config: TTTOmniSpeechDecoderConfig):
        super().__init__(config)
        self.input_proj = nn.Linear(config.input_size, config.hidden_size)
        self.output_proj = nn.Linear(config.hidden_size, config.unit_vocab_size + 1)
        self.post_init()

    @property
    def blank_id(self) -> int:
        """Id of CTC's blank."""
        return self.config.unit_vocab_size

    def forward(
        self,
        hidden_states: torch.Tensor,
        lengths: torch.LongTensor | None = None,
        num_frames: torch.LongTensor | None = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: `[B, T, input_size]`, of the language model after its final norm, one per token.
            lengths: `[B]`, tokens of each right-padded row; `T` by default.
            num_frames: `[B]`, frames to stretch each row to; `upsample_factor` per token by default.
            cache: cache of the frames before these tokens.

        Returns:
            Logits `[B, max(num_frames), unit_vocab_size + 1]` in float32; those of padding are meaningless.
        """
        # A weight that is quantised says nothing of the dtype to compute in, its bias does.
        hidden_states = self.input_proj(hidden_states.to(self.input_proj.bias.dtype))
        hidden_states = hidden_states.to(self.layers[0].input_layernorm.weight.dtype)
        frame_mask = None
        if lengths is None and num_frames is None:
            hidden_states = hidden_states.repeat_interleave(self.config.upsample_factor, dim=1)
        else:
            if num_frames is None:
                num_frames = lengths * self.config.upsample_factor
            frames = torch.arange(int(num_frames.max()), device=hidden_states.device)
            frame_mask = frames < num_frames[:, None]  # [B, F]
            # in floating point, as the original rounds
            source = (frames / (num_frames / lengths.clamp(min=1))[:, None].clamp(min=1e-6)).long()
            source = torch.where(frame_mask, source, 0)[..., None].expand(-1, -1, hidden_states.shape[2])
            hidden_states = hidden_states.gather(1, source)
        hidden_states = self.run_layers(hidden_states, frame_mask, cache=cache)
        return self.output_proj(hidden_states.to(self.output_proj.bias.dtype)).float()

    def collapse(self, frames: torch.LongTensor, previous: torch.LongTensor | None = None) -> torch.LongTensor:
        """
        The units `[U]` that the frames `[F]` of one row say: repeats merged, blanks dropped. `previous` `[1]` is the
        frame before, whose unit goes on without being said again.
        """
        if previous is None:
            previous = frames.new_tensor([self.blank_id])
        begins = frames != torch.cat([previous, frames[:-1]])
        return frames[begins & (frames != self.blank_id)]

    def ctc_loss(
        self, hidden_states: torch.Tensor, labels: torch.LongTensor, unit_labels: torch.LongTensor
    ) -> torch.Tensor:
        """
        CTC loss per unit, of the hidden states at the positions of each response, unshifted as in the original.

        Args:
            hidden_states: `[B, T, input_size]`.
            labels: `[B, T]`, -100 outside of the responses.
            unit_labels: `[B, U]`, for each row as in the original, or `[N, U]`, for each unbroken run of labels in
                the rows' order, a row without any counting as one; padded with -100. A response without units has
                no part in the loss.

        Returns:
            A float32 scalar, 0 where there is nothing to say.

        Raises:
            ValueError: if there are more responses than rows of units, or fewer.
        """
        if len(unit_labels) == len(labels):
            responses = [states[label != -100] for states, label in zip(hidden_states, labels)]
        else:
            responses = [response for row in zip(hidden_states, labels) for response in _responses(*row)]
        if len(responses) != len(unit_labels):
            raise ValueError(f"`unit_labels` has {len(unit_labels)} rows for {len(responses)} responses in `labels`.")
        num_units = (unit_labels != -100).sum(1)
        spoken = [i for i, states in enumerate(responses) if len(states) > 0 and num_units[i] > 0]
        if not spoken:
            return 0.0 * self(hidden_states[:1, :1]).sum()  # through all layers, which may be sharded over processes
        responses, unit_labels, num_units = [responses[i] for i in spoken], unit_labels[spoken], num_units[spoken]
        lengths = torch.tensor([len(states) for states in responses])
        repeats = ((unit_labels[:, 1:] == unit_labels[:, :-1]) & (unit_labels[:, 1:] != -100)).sum(1)
        needed = (num_units + repeats).cpu()  # a blank stands between two that are the same
        num_frames = torch.maximum(lengths * self.config.upsample_factor, needed).to(hidden_states.device)
        lengths, num_units = lengths.to(hidden_states.device), num_units.to(hidden_states.device)
        logits = self(nn.utils.rnn.pad_sequence(responses, batch_first=True), lengths, num_frames)
        targets = unit_labels[unit_labels != -100].to(logits.device)
        loss = nn.functional.ctc_loss(
            logits.log_softmax(-1).transpose(0, 1),
            targets,
            num_frames,
            num_units,
            blank=self.blank_id,
            reduction="sum",
            zero_infinity=True,
        )
        return loss / num_units.sum()


def _responses(hidden_states: torch.Tensor, labels: torch.LongTensor) -> tuple[torch.Tensor, ...]:
    """The hidden states `[R, D]` of each response in a row, an unbroken run of labels; an empty one if it has none."""
    index = (labels != -100).nonzero().flatten()
    starts = (index.diff() != 1).nonzero().flatten() + 1
    return hidden_states[index.to(hidden_states.device)].tensor_split(starts.cpu())


class TTTOmniAudioEncoder(WhisperEncoder):
    """Whisper's encoder."""

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        # Transformers skips modules without parameters of their own, as this encoder, in models outside of its source.
        if module is self.embed_positions:
            init.copy_(module.weight, sinusoids(*module.weight.shape))


class TTTOmniMultiModalProjector(nn.Module):
    """Concatenates `audio_downsample` frames of the encoder into one embedding of the language model."""

    def __init__(self, config: TTTOmniConfig):
        super().__init__()
        self.downsample = config.audio_downsample
        self.linear_1 = nn.Linear(config.audio_config.d_model * config.audio_downsample, config.projector_hidden_size)
        self.act = nn.ReLU()
        self.linear_2 = nn.Linear(config.projector_hidden_size, config.text_config.hidden_size)

    def forward(self, audio_features: torch.Tensor) -> torch.Tensor:
        """`[W, F, d_model]` to `[W, F // audio_downsample, hidden_size]`; frames left over are dropped."""
        windows, frames, width = audio_features.shape
        length = frames // self.downsample
        audio_features = audio_features[:, : length * self.downsample].reshape(windows, length, -1)
        return self.linear_2(self.act(self.linear_1(audio_features)))


class TTTOmniModel(TTTOmniPreTrainedModel):
    """Whisper encoder, projector and language model, without heads."""

    def __init__(self, config: TTTOmniConfig):
        super().__init__(config)
        if config.audio_config is not None:
            self.audio_tower = TTTOmniAudioEncoder._from_config(config.audio_config)
            self.multi_modal_projector = TTTOmniMultiModalProjector(config)
        self.language_model = TTTOmniTextModel._from_config(config.text_config)
        self.post_init()

    @can_return_tuple
    def get_audio_features(
        self,
        input_features: torch.Tensor,
        input_features_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """
        Encode speech, each window on its own.

        Args:
            input_features: `[W, n_mels, 3000]`, log-mel spectrograms of 30 s windows.
            input_features_mask: `[W, 3000]`, 0 for padding whose embeddings are dropped; by default all are kept.

        Returns:
            `last_hidden_state` `[W, 1500, d_model]` of the encoder, and in `pooler_output` the embeddings
            `[N, hidden_size]` of all windows, joined.

        Raises:
            ValueError: if the model has no audio encoder.
        """
        if self.config.audio_config is None:
            raise ValueError("This model has no audio encoder (`audio_config` is None): it takes text only.")
        check_forward_kwargs(self, kwargs)
        windows_per_pass = input_features.shape[0] if self.training else AUDIO_WINDOWS_PER_PASS
        outputs = [
            self.audio_tower(to_module(features, self.audio_tower), return_dict=True, **kwargs)
            for features in input_features.split(max(windows_per_pass, 1))
        ]
        output = outputs[0]
        if len(outputs) > 1:
            output = type(output)({name: _cat([o[name] for o in outputs]) for name in output})
        embeds = self.multi_modal_projector(output.last_hidden_state)  # [W, L, hidden_size]
        if input_features_mask is None:
            embeds = embeds.flatten(0, 1)
        else:
            lengths = audio_embedding_lengths(input_features_mask, self.config.audio_downsample).to(embeds.device)
            embeds = embeds[torch.arange(embeds.shape[1], device=embeds.device) < lengths[:, None]]
        return BaseModelOutputWithPooling(
            last_hidden_state=output.last_hidden_state,
            pooler_output=embeds,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    def embed(
        self,
        input_ids: torch.LongTensor | None = None,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Embeddings `[B, T, hidden_size]` of a prompt, speech in the place of its placeholders.

        Raises:
            ValueError: if the number of placeholders is not that of the audio embeddings.
        """
        embed_tokens = self.get_input_embeddings()
        if inputs_embeds is None:
            inputs_embeds = embed_tokens(input_ids)
        if input_features is None:
            # A token of an answer is not looked at, for which the host would have to wait.
            if input_ids is not None and input_ids.shape[1] > 1 and not torch.compiler.is_compiling():
                self._require_no_audio(input_ids)
            return inputs_embeds
        audio_token_id = torch.tensor(self.config.audio_token_id, device=inputs_embeds.device)
        if input_ids is None:
            is_audio = (inputs_embeds == embed_tokens(audio_token_id)).all(-1)
        else:
            is_audio = input_ids.to(inputs_embeds.device) == audio_token_id
        audio_embeds = self.get_audio_features(input_features, input_features_mask, return_dict=True).pooler_output
        if not torch.compiler.is_compiling() and int(is_audio.sum()) != audio_embeds.shape[0]:
            raise ValueError(
                f"The prompt has {int(is_audio.sum())} audio placeholders for {audio_embeds.shape[0]} audio "
                "embeddings: make both with the same processor call."
            )
        audio_embeds = audio_embeds.to(inputs_embeds.device, inputs_embeds.dtype)
        return inputs_embeds.masked_scatter(is_audio.unsqueeze(-1), audio_embeds)

    def _require_no_audio(self, input_ids):
        placeholders = (
            int((input_ids == self.config.audio_token_id).sum()) if self.config.audio_token_id is not None else 0
        )
        if placeholders:
            raise ValueError(
                f"The prompt has {placeholders} audio placeholders and no `input_features`: pass all that the "
                "processor made of it."
            )

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """As [`TTTOmniForCausalLM.forward`], up to the final norm."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
        inputs_embeds = self.embed(input_ids, input_features, input_features_mask, inputs_embeds)
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )


def to_module(x: torch.Tensor, module: PreTrainedModel) -> torch.Tensor:
    """`x` in the dtype of `module`, and on its device; where its weights are offloaded, their hooks move it."""
    return x.to(module.dtype) if module.device.type == "meta" else x.to(module.device, module.dtype)


def _cat(values):
    """Join what several passes of the encoder return: tensors, or tuples of them."""
    if isinstance(values[0], torch.Tensor):
        return torch.cat(values)
    return tuple(torch.cat(value) for value in zip(*values))


@dataclass
class TTTOmniCausalLMOutputWithPast(CausalLMOutputWithPast):
    """
    Args:
        loss: `lm_loss + ctc_loss_weight * ctc_loss`, with `labels`.
        lm_loss, ctc_loss: the two parts; `ctc_loss` only with `unit_labels`.
        last_hidden_state: `[B, T, hidden_size]` after the final norm, what the speech decoder reads.
    """

    lm_loss: torch.FloatTensor | None = None
    ctc_loss: torch.FloatTensor | None = None
    last_hidden_state: torch.FloatTensor | None = None


class TTTOmniForCausalLM(TTTOmniPreTrainedModel, TTTOmniGenerationMixin, TTTOmniMemoryMixin):
    """TTT-Omni with its language-model head, speech decoder and vocoder."""

    _keep_in_fp32_modules_strict = [*TTTOmniPreTrainedModel._keep_in_fp32_modules_strict, "vocoder"]
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: TTTOmniConfig):
        super().__init__(config)
        self.model = TTTOmniModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        if config.speech_decoder_config is not None:
            self.speech_decoder = TTTOmniSpeechDecoder._from_config(config.speech_decoder_config)
        if config.vocoder_config is not None:
            self.vocoder = TTTOmniVocoder._from_config(config.vocoder_config).requires_grad_(False)  # no loss has it
        self.post_init()

    def get_audio_features(self, *args, **kwargs) -> BaseModelOutputWithPooling:
        return self.model.get_audio_features(*args, **kwargs)

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        unit_labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        loss_chunk_size: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TTTOmniCausalLMOutputWithPast:
        """
        Args:
            input_ids: `[B, T]`, with one `audio_token_id` per audio embedding.
            input_features: `[W, n_mels, 3000]`, the windows of all speech of the batch, in the order of the prompts.
            input_features_mask: `[W, 3000]`, 0 for padding whose embeddings the prompts have no placeholders for.
            attention_mask: `[B, past + T]`, 0 for padding, on the left or on the right.
            position_ids: `[B, T]`; where they restart without a mask and a cache, several sequences are packed.
            cache: a `DynamicCache` of the tokens before.
            inputs_embeds: `[B, T, hidden_size]` in place of `input_ids`.
            labels: `[B, T]`, aligned with `input_ids`, -100 for what is not predicted.
            unit_labels: `[B, U]`, speech units of each row's response, padded with -100; needs `labels`. Or `[N, U]`,
                where rows hold several responses: one for each unbroken run of `labels`, a row without any counting
                as one.
            logits_to_keep: compute the logits of the last so many positions only, 0 for all.
            loss_chunk_size: with `labels`, never hold the logits of more positions, and return none.
            kwargs: `shift_labels` `[B, T]`, what each position predicts, in place of `labels` shifted by one, and what
                else `TransformersKwargs` lists.

        Raises:
            TypeError: an argument that is not known.
            ValueError: inputs that do not fit together, or a part that this model does not have.
        """
        shift_labels = kwargs.pop("shift_labels", None)  # no parameter, as a trainer would ask for it in every batch
        outputs = self.model(
            input_ids=input_ids,
            input_features=input_features,
            input_features_mask=input_features_mask,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        logits = lm_loss = ctc_loss = None
        if labels is not None and loss_chunk_size is not None:
            num_items_in_batch = kwargs.get("num_items_in_batch")
            lm_loss = self._chunked_lm_loss(hidden_states, labels, shift_labels, loss_chunk_size, num_items_in_batch)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, kept])
            if labels is not None:
                vocab_size = self.config.text_config.vocab_size
                lm_loss = self.loss_function(
                    logits=logits, labels=labels, vocab_size=vocab_size, shift_labels=shift_labels, **kwargs
                )
        loss = lm_loss
        if unit_labels is not None:
            ctc_loss = self._ctc_loss(hidden_states, labels, unit_labels, kwargs.get("num_items_in_batch"))
            loss = lm_loss + self.config.speech_decoder_config.ctc_loss_weight * ctc_loss
        return TTTOmniCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            lm_loss=lm_loss,
            ctc_loss=ctc_loss,
            last_hidden_state=hidden_states,
        )

    def _chunked_lm_loss(self, hidden_states, labels, shift_labels, chunk_size, num_items_in_batch):
        """The loss of `loss_function`; the backward pass computes the logits of each chunk again."""

        def summed_loss(states, targets):
            return nn.functional.cross_entropy(self.lm_head(states).float(), targets, reduction="sum")

        if shift_labels is None:
            shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        labels = shift_labels.to(hidden_states.device)
        is_target = labels != -100
        chunks = zip(hidden_states[is_target].split(chunk_size), labels[is_target].split(chunk_size))
        loss = sum(checkpoint(summed_loss, *chunk, use_reentrant=False) for chunk in chunks)
        return loss / (is_target.sum() if num_items_in_batch is None else num_items_in_batch)

    def _ctc_loss(self, hidden_states, labels, unit_labels, num_items_in_batch):
        if self.config.speech_decoder_config is None:
            raise ValueError("`unit_labels` need a speech decoder, which this model lacks (`speech_decoder_config`).")
        if labels is None:
            raise ValueError("`unit_labels` need `labels`, which say where the response is.")
        loss = self.speech_decoder.ctc_loss(hidden_states, labels, unit_labels)
        if num_items_in_batch is not None:  # the share of this step in one of accumulated gradients
            loss = loss * ((labels[:, 1:] != -100).sum().to(loss.device) / num_items_in_batch)
        return loss


__all__ = ["TTTOmniForCausalLM", "TTTOmniModel", "TTTOmniPreTrainedModel", "TTTOmniSpeechDecoder", "TTTOmniTextModel"]
