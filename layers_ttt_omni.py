# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""The decoder layer of TTT-Omni: Llama's, with windowed attention and Test-Time Training."""

from typing import NamedTuple

import torch
from torch import nn
from transformers import Cache, LlamaConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_rope_utils import dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from .cache_ttt_omni import SEQUENCE_SHIFT, OwnedTensorsMixin, SlidingWindowLayer, WindowStep
from .configuration_ttt_omni import SLIDING_LAYER_TYPES, TTT_LAYER_TYPES, TTTOmniTextConfig
from .ops_ttt_omni import TTTLinearState, TTTMLPState, key_repeats, ttt_linear, ttt_mlp


# What of TTT is no projection, and small: adapters train and save it as it is, and no quantiser touches it.
TTT_MODULES_TO_SAVE = ("head_gate", "inner_model", "inner_norm", "lr_gate", "post_norm", "token_scale", "ttt_gate")
LR_ACTIVATIONS = {"sigmoid": torch.sigmoid, "hardsigmoid": nn.functional.hardsigmoid}


class TTTOmniRotaryEmbedding(LlamaRotaryEmbedding):
    """Llama's rotary embedding with angles in float64: in float32, position 10,000,000 is off by half a radian."""

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.LongTensor) -> tuple[torch.Tensor, torch.Tensor]:
        device = "cpu" if x.device.type == "mps" else x.device  # which has no float64
        freqs = position_ids[..., None].to(device, torch.float64) * self.inv_freq.to(device, torch.float64)
        emb = torch.cat((freqs, freqs), dim=-1)
        cos = emb.cos() * self.attention_scaling
        sin = emb.sin() * self.attention_scaling
        return cos.to(x.device, x.dtype), sin.to(x.device, x.dtype)


class TokenLayout(NamedTuple):
    """Where the B rows of T tokens of a forward pass stand, for all layers alike."""

    position_ids: torch.LongTensor  # [B, T], of the rotary embedding
    places: torch.LongTensor  # [B, T], see `SEQUENCE_SHIFT`
    mask: torch.Tensor | None = None  # [B, T], false for padding
    cu_seqlens: torch.LongTensor | None = None  # [n + 1], bounds of n packed sequences in the B * T tokens
    window_step: WindowStep | None = None  # of one token in each row, where windows are rings


def lay_out_tokens(
    batch_size: int,
    length: int,
    past_length: int | torch.Tensor,
    device: torch.device,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.LongTensor | None = None,
    cu_seqlens: torch.LongTensor | None = None,
    may_be_packed: bool = False,
) -> TokenLayout:
    """
    Args:
        past_length: of all rows, or `[B, 1]`.
        attention_mask: `[B, past_length + T]`, 0 for padding.
        position_ids: `[B, T]` or `[1, T]`; by default those of the tokens among the row's that are no padding.
        cu_seqlens: `[n + 1]`, bounds of packed sequences.
        may_be_packed: whether `position_ids` that restart tell where packed sequences begin.

    Raises:
        ValueError: if the mask is not that of these tokens and of all before.
    """
    if isinstance(past_length, torch.Tensor):
        past_length = past_length.to(device)
    mask, places = None, torch.arange(length, device=device).expand(batch_size, -1) + past_length
    if attention_mask is not None:
        past_length = int(past_length)
        if attention_mask.shape != (batch_size, past_length + length):
            raise ValueError(
                f"`attention_mask` must have the shape {(batch_size, past_length + length)} of the {past_length} "
                f"tokens in the cache and the {length} new ones, got {tuple(attention_mask.shape)}."
            )
        attention_mask = attention_mask.to(device, torch.bool)
        mask = attention_mask[:, past_length:]
        places = torch.where(mask, attention_mask.cumsum(1)[:, past_length:] - 1, -1)
        if not torch.compiler.is_compiling() and bool(mask.all()):
            mask = None
    if position_ids is None:
        return TokenLayout(places.clamp(min=0), places, mask, cu_seqlens)
    if may_be_packed:
        rows = position_ids.expand(batch_size, -1)
        sequences = (rows.diff(prepend=rows[:, :1] - 1) != 1).cumsum(1)  # [B, T]
        if torch.compiler.is_compiling() or bool(sequences[:, -1].any()):
            places = rows + (sequences << SEQUENCE_SHIFT)
            cu_seqlens = _bounds(sequences) if cu_seqlens is None else cu_seqlens
    return TokenLayout(position_ids, places, mask, cu_seqlens)


def _bounds(sequences: torch.LongTensor) -> torch.LongTensor:
    """`cu_seqlens` of the flattened rows from the index `[B, T]` of each token's sequence in its row."""
    starts = sequences.diff(prepend=sequences[:, :1] - 1).flatten().nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([sequences.numel()])])


def _index(places: torch.LongTensor) -> torch.LongTensor:
    """Index of tokens in their sequence."""
    return places & ((1 << SEQUENCE_SHIFT) - 1)


class TTTOmniSlidingRotaryEmbedding(TTTOmniRotaryEmbedding):
    """Rotations for windowed attention: of each token, and of each token as it sees the sinks."""

    def __init__(self, config):
        super().__init__(config)
        self.max_distance = config.sliding_window + config.attention_sinks - 1

    def forward(self, x: torch.Tensor, places: torch.LongTensor) -> tuple[torch.Tensor, ...]:
        index = _index(places.clamp(min=0))
        return *super().forward(x, index), *super().forward(x, index.clamp(max=self.max_distance))

    def of_step(self, x: torch.Tensor, places: torch.LongTensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each token, where a ring turns the sinks instead."""
        return super().forward(x, places.clamp(min=0))

    def of_distance(self, x: torch.Tensor, distance: torch.LongTensor) -> tuple[torch.Tensor, torch.Tensor]:
        """To turn keys by, which have been scaled already."""
        cos, sin = super().forward(x, distance)
        return cos / self.attention_scaling, sin / self.attention_scaling


def project(module: nn.Module, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v `[B, H, T, D]` of `[B, T, hidden_size]`, normalised as by the backbone's attention."""
    hidden_shape = (*hidden_states.shape[:-1], -1, module.head_dim)
    q, k, v = (
        projection(hidden_states).view(hidden_shape).transpose(1, 2)
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    if hasattr(module, "q_norm"):
        q, k = module.q_norm(q), module.k_norm(k)
    return q, k, v


class TTTOmniAttention(nn.Module):
    """Full attention of a backbone, and what windowed attention is made of as well."""


class TTTOmniSlidingAttention(TTTOmniAttention):
    """
    A backbone's attention over the last `sliding_window` and the first `attention_sinks` tokens of the sequence.

    The sinks are seen from no farther than the window's end, so that no distance exceeds what the model was trained
    on (as in StreamingLLM, arXiv 2309.17453).
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, ...],
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        *,
        places: torch.LongTensor,
        step: WindowStep | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        window = self.config.sliding_window
        if cache is None:
            layer = SlidingWindowLayer(window, self.config.attention_sinks)
        else:
            layer = cache.layers[self.layer_idx]
            layer.prefetch()
        query, key, value = project(self, hidden_states)  # [B, H, T, D]
        if step is not None:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
            keys, values = layer.update_step(key, value, step)
            output, weights = self._attention(query, keys, values, step.visible, **kwargs)
            return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights
        # In blocks, so that the scores of T tokens take T * window memory; the cache makes that the same attention.
        outputs, weights = [], []
        for start in range(0, hidden_states.shape[1], window):
            block = slice(start, start + window)
            output, weight = self._attend(
                *(x[:, :, block] for x in (query, key, value)),
                [x[:, block] for x in position_embeddings],
                places[:, block],
                layer,
                **kwargs,
            )
            outputs.append(output)
            weights.append(weight)
        output = torch.cat(outputs, dim=1)  # [B, T, H, D]
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights[0] if len(weights) == 1 else None

    def _attend(self, query, key, value, position_embeddings, places, layer, **kwargs):
        cos, sin, sink_cos, sink_sin = position_embeddings
        query_to_sinks, _ = apply_rotary_pos_emb(query, query[:, :0], sink_cos, sink_sin)
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        keys, values, key_places = layer.update_window(key, value, places)  # [B, H, L + T, D], [B, L + T]

        # One attention over both rotations: a key takes the first half of the width, a sink the second one.
        is_sink = (key_places >= 0) & (_index(key_places) < self.config.attention_sinks)  # [B, L + T]
        query = torch.cat([query, query_to_sinks], dim=-1)
        halves = torch.stack([~is_sink, is_sink], dim=-1)[:, None, :, :, None]  # [B, 1, L + T, 2, 1]
        keys = (keys.unsqueeze(-2) * halves).flatten(-2)

        key_places, query_places = key_places[:, None, :], places[:, :, None]
        in_window = query_places - key_places < self.config.sliding_window
        in_sequence = (key_places >= query_places - _index(query_places)) & (key_places <= query_places)
        visible = in_sequence & (in_window | is_sink[:, None, :])
        visible = (visible | (query_places < 0))[:, None]  # padding sees something, or its softmax would be NaN
        return self._attention(query, keys, values, visible, **kwargs)

    def _attention(self, query, keys, values, visible, **kwargs):
        """Over `visible` `[B, 1, T, L]` keys, or all of them: `[B, T, H, D]`, and the weights where they are known."""
        implementation = windowed_attention_implementation(self.config)
        width = values.shape[-1]
        if implementation == "eager" and visible is not None:
            hidden = torch.zeros_like(visible, dtype=query.dtype)
            visible = hidden.masked_fill(~visible, torch.finfo(query.dtype).min)
        elif query.device.type == "cpu" and width < keys.shape[-1]:  # whose quick attention takes one width
            values = nn.functional.pad(values, (0, keys.shape[-1] - width))
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        output, weights = attention(
            self,
            query,
            keys,
            values,
            visible,
            dropout=0.0 if not self.training else self.attention_dropout,
            scaling=self.scaling,
            **kwargs,
        )
        return output[..., :width], weights


def windowed_attention_implementation(config: LlamaConfig) -> str:
    """That of Transformers' implementations which windowed attention takes."""
    return "eager" if config._attn_implementation == "eager" else "sdpa"


# Attention is all in which the layers of these models differ from Llama's.
_ATTENTION = {
    "llama": LlamaAttention,
    "mistral": LlamaAttention,
    "qwen2": Qwen2Attention,
    "qwen3": Qwen3Attention,
}
FULL_ATTENTION = {name: type(f"Full{cls.__name__}", (TTTOmniAttention, cls), {}) for name, cls in _ATTENTION.items()}
SLIDING_ATTENTION = {
    name: type(f"Sliding{cls.__name__}", (TTTOmniSlidingAttention, cls), {}) for name, cls in _ATTENTION.items()
}


def make_attention(config: LlamaConfig, layer_idx: int) -> TTTOmniAttention:
    """The attention of a layer, full or windowed, as the backbone has it."""
    is_sliding = config.layer_types[layer_idx] in SLIDING_LAYER_TYPES
    return (SLIDING_ATTENTION if is_sliding else FULL_ATTENTION)[config.backbone](config, layer_idx)


class TTTLinearModel(nn.Module):
    """Learned initial weights of TTT-Linear's inner model."""

    def __init__(self, num_heads: int, head_dim: int):
        super().__init__()
        self.W1 = nn.Parameter(torch.empty(num_heads, head_dim, head_dim, dtype=torch.float32))
        self.b1 = nn.Parameter(torch.empty(num_heads, 1, head_dim, dtype=torch.float32))

    def forward(self, batch_size: int) -> TTTLinearState:
        return TTTLinearState.initial(self.W1, self.b1, batch_size)


class TTTMLPModel(nn.Module):
    """Learned initial weights of TTT-MLP's inner model."""

    def __init__(self, num_heads: int, head_dim: int):
        super().__init__()
        self.W1 = nn.Parameter(torch.empty(num_heads, head_dim, 4 * head_dim, dtype=torch.float32))
        self.b1 = nn.Parameter(torch.empty(num_heads, 1, 4 * head_dim, dtype=torch.float32))
        self.W2 = nn.Parameter(torch.empty(num_heads, 4 * head_dim, head_dim, dtype=torch.float32))
        self.b2 = nn.Parameter(torch.empty(num_heads, 1, head_dim, dtype=torch.float32))

    def forward(self, batch_size: int) -> TTTMLPState:
        return TTTMLPState.initial(self.W1, self.b1, self.W2, self.b2, batch_size)


class TTTInnerNorm(nn.Module):
    """Weight and bias of the inner LayerNorm, one per head."""

    def __init__(self, num_heads: int, head_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_heads, head_dim, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(num_heads, head_dim, dtype=torch.float32))

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.weight, self.bias


class TTTTokenScale(nn.Module):
    """Scale of the inner step by position i in the mini-batch, max(0, 1 / (i + 1) + weight_i)."""

    def __init__(self, mini_batch_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(mini_batch_size, dtype=torch.float32))

    @staticmethod
    def initial_weight(mini_batch_size: int) -> torch.Tensor:
        """The weight `[m]` with which the scale is max(1 / (i + 1), 1 / sqrt(m)): a graft's starting point."""
        mean = 1 / torch.arange(1, mini_batch_size + 1)
        return mean.clamp(min=mini_batch_size**-0.5) - mean

    def forward(self) -> torch.Tensor:
        mean = 1 / torch.arange(1, self.weight.shape[0] + 1, device=self.weight.device, dtype=self.weight.dtype)
        return (mean + self.weight).clamp(min=0)


class TTTOutputGate(nn.Module):
    """tanh(weight) * x, over the width."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=torch.float32))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.weight).to(hidden_states.dtype) * hidden_states


class TTTOmniTTT(nn.Module):
    """
    A Test-Time Training layer (arXiv 2407.04620): sequence mixing whose memory is a small model, trained on the
    sequence as it goes by. Its projections have the biases and norms of `attention`, that of the same layer.
    """

    def __init__(self, config: TTTOmniTextConfig, layer_idx: int, attention: TTTOmniAttention):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.head_dim = config.head_dim
        self.base_lr = config.get_ttt_base_lr(layer_idx)
        width = self.num_heads * self.head_dim

        # q and k have biases for calibration to centre them by
        self.q_proj = nn.Linear(config.hidden_size, width, bias=True)
        self.k_proj = nn.Linear(config.hidden_size, width, bias=True)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=attention.v_proj.bias is not None)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=attention.o_proj.bias is not None)
        if hasattr(attention, "q_norm"):
            self.q_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.lr_gate = nn.Linear(config.hidden_size, self.num_heads, bias=True)
        self.token_scale = TTTTokenScale(config.ttt_mini_batch_size)
        self.inner_norm = TTTInnerNorm(self.num_heads, self.head_dim)
        if config.get_ttt_layer_type(layer_idx) == "linear":
            self.inner_model, self.op = TTTLinearModel(self.num_heads, self.head_dim), ttt_linear
        else:
            self.inner_model, self.op = TTTMLPModel(self.num_heads, self.head_dim), ttt_mlp
        self.post_norm = nn.LayerNorm(width, eps=1e-6)
        if config.ttt_head_gate:
            self.head_gate = nn.Linear(config.hidden_size, self.num_heads, bias=True)

    def write_strength(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The share of `base_lr` with which a head learns a token: `[B, T, hidden_size]` to `[B, T, H]`, 0 to 1."""
        strength = self.lr_gate(hidden_states.to(self.lr_gate.bias.dtype))
        dtype = torch.promote_types(self.inner_model.W1.dtype, torch.float32)
        return LR_ACTIVATIONS[self.config.ttt_lr_activation](strength.to(dtype))

    def forward(
        self,
        hidden_states: torch.Tensor,
        token_mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        cache_layer: OwnedTensorsMixin | None = None,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: `[B, T, hidden_size]`.
            token_mask: `[B, T]`, 0 for padding.
            cu_seqlens: `[n + 1]`, bounds of n packed sequences in the B * T tokens.
            cache_layer: holds the state before these tokens, if there were any, and receives the one after them.

        Returns:
            `[B, T, hidden_size]`.
        """
        input_shape = hidden_states.shape
        if cu_seqlens is not None:
            hidden_states = hidden_states.reshape(1, -1, input_shape[-1])
        # The cache's state is its own, so that without gradients its memory may be used again.
        inplace = cache_layer is not None and not torch.is_grad_enabled()
        state = None if cache_layer is None else cache_layer.ttt_state
        if state is None:
            rows = hidden_states.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            state = self.inner_model(rows)
            state = state.clone() if inplace else state
        elif inplace and cache_layer.is_state_saved:
            state = state.clone()
        state = state.to(hidden_states.device)

        q, k, v = self._project(hidden_states, state, token_mask, cu_seqlens)
        lr = self.base_lr / self.head_dim * self.write_strength(hidden_states)  # [B, T, H]
        token_scale, inner_norm = self.token_scale(), self.inner_norm()

        def run(state, columns=slice(None)):
            return self.op(
                *(x[:, :, columns] for x in (q, k, v, lr)),
                token_scale,
                *inner_norm,
                state,
                attention_mask=None if token_mask is None else token_mask[:, columns],
                cu_seqlens=cu_seqlens,
                checkpoint_group_size=self.config.ttt_scan_checkpoint_group_size,
                inplace=inplace,
            )

        lr, earlier = lr.transpose(1, 2), None  # [B, H, T]
        if self.config.ttt_divide_repeats:
            lr = lr / key_repeats(k, state, self.config.ttt_mini_batch_size, token_mask, cu_seqlens)
        cut = self._last_step(state, token_mask, input_shape) if getattr(cache_layer, "record_past", False) else None
        if cut is None:
            o, new_state = run(state)
        else:  # so that `crop` can come back to the state before its last step
            first, state = run(state, slice(cut))
            earlier = state.clone(), input_shape[1] - cut
            last, new_state = run(state, slice(cut, None))
            o = torch.cat([first, last], dim=2)
        if cache_layer is not None:
            cache_layer.update_ttt_state(new_state, token_mask, input_shape[1], earlier)
            cache_layer.is_state_saved = not inplace
        o = self.post_norm(o.transpose(1, 2).reshape(*input_shape[:-1], -1))  # [B, T, H * D]
        if self.config.ttt_head_gate:
            gate = torch.sigmoid(self.head_gate(hidden_states.to(self.head_gate.bias.dtype)))
            gate = gate.view(*input_shape[:-1], -1, 1).to(o.dtype)  # [B, T, H, 1]
            o = (gate * o.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        return self.o_proj(o)

    def _last_step(self, state, token_mask, shape) -> int | None:
        """The column of the token with which the state makes its last step, in one row of T tokens, if it does."""
        if shape[0] > 1 or (token_mask is not None and not bool(token_mask.all())):
            return None
        size, position = self.config.ttt_mini_batch_size, int(state.position[0])
        last = (position + shape[1]) // size * size - position - 1
        return last if last >= 0 else None

    def _project(self, hidden_states, state, token_mask, cu_seqlens):
        """q, k and v of the inner loop, `[B, H, T, D]`."""
        q, k, v = project(self, hidden_states)
        if self.config.ttt_qk_norm != "none":
            norm = self.head_dim**0.5 if self.config.ttt_qk_norm == "rms" else 1.0
            q, k = (norm * nn.functional.normalize(x, dim=-1, eps=1e-6) for x in (q, k))
        if self.config.ttt_rope_theta is not None:
            q, k = self._rotate(q, k, state, token_mask, cu_seqlens)
        if self.config.ttt_standardize_target:
            weight, bias = (x.unsqueeze(1).to(v.dtype) for x in self.inner_norm())
            v = nn.functional.layer_norm(v - k, (self.head_dim,), eps=1e-6) * weight + bias + k
        return q, k, v

    def _rotate(self, q, k, state, token_mask, cu_seqlens):
        """Rotary embedding by the position in the mini-batch, in Llama's pairs, whose projections TTT copies."""
        index = torch.arange(q.shape[2], device=q.device)
        if cu_seqlens is not None:
            cu_seqlens = cu_seqlens.to(index)
            index = index - cu_seqlens[torch.searchsorted(cu_seqlens, index, right=True) - 1]
            index = index[None]
        else:
            index = index[None] if token_mask is None else token_mask.cumsum(1) - 1
            index = index + state.position[:, None]
        position = index.clamp(min=0) % self.config.ttt_mini_batch_size  # [B, T]
        exponents = torch.arange(0, self.head_dim, 2, device=q.device, dtype=torch.float32) / self.head_dim
        angles = position[..., None] * self.config.ttt_rope_theta**-exponents  # [B, T, D / 2]
        angles = torch.cat([angles, angles], dim=-1)
        return apply_rotary_pos_emb(q, k, angles.cos().to(q.dtype), angles.sin().to(q.dtype))


class TTTOmniDecoderLayer(GradientCheckpointingLayer):
    """Llama's layer with what `config.layer_types` says of it: attention, full or windowed, TTT, or both."""

    def __init__(self, config: TTTOmniTextConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.layer_type = config.layer_types[layer_idx]
        self.self_attn = make_attention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if self.layer_type in TTT_LAYER_TYPES:
            self.ttt = TTTOmniTTT(config, layer_idx, self.self_attn)
            if self.layer_type == "linear_attention":
                self.self_attn = None
            else:
                self.ttt_gate = TTTOutputGate(config.hidden_size)

    @property
    def is_sliding(self) -> bool:
        """Whether its attention has a window, and takes the rotations of [`TTTOmniSlidingRotaryEmbedding`]."""
        return self.layer_type in SLIDING_LAYER_TYPES

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, ...],
        layout: TokenLayout,
        cache: Cache | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: `[B, T, hidden_size]`.
            attention_mask: what Transformers' attention takes; a window makes its own.
            position_embeddings: rotations of the kind that the layer's attention takes.
            layout: where the tokens stand.
            cache: of the tokens before, which is written to.
        """
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        mixed = self._attend(hidden_states, attention_mask, position_embeddings, layout, cache, **kwargs)
        if self.layer_type in TTT_LAYER_TYPES:
            cache_layer = None if cache is None else cache.layers[self.layer_idx]
            remembered = self.ttt(hidden_states, layout.mask, layout.cu_seqlens, cache_layer)
            mixed = remembered if mixed is None else mixed + self.ttt_gate(remembered)
        hidden_states = residual + mixed

        residual = hidden_states
        hidden_states = self.post_attention_layernorm(hidden_states)
        return residual + self.mlp(hidden_states)

    def _attend(self, hidden_states, attention_mask, position_embeddings, layout, cache, **kwargs):
        """Attention's part `[B, T, hidden_size]`, `None` in a layer without."""
        if self.self_attn is None:
            return None
        if self.is_sliding:
            kwargs |= {"places": layout.places, "step": layout.window_step}
        else:
            kwargs["position_ids"] = layout.position_ids
        # By position: an argument that is renamed would disappear in the attention's `**kwargs`.
        return self.self_attn(hidden_states, position_embeddings, attention_mask, cache, **kwargs)[0]
