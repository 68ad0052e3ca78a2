# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Unit HiFi-GAN of TTT-Omni: speech units to a waveform, at once or as a stream."""

import math
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.models.seamless_m4t_v2.modeling_seamless_m4t_v2 import (
    SeamlessM4Tv2HifiGan,
    SeamlessM4Tv2VariancePredictor,
)

from .configuration_ttt_omni import TTTOmniVocoderConfig


class TTTOmniVocoderResBlock2(nn.Module):
    """HiFi-GAN's residual block of the second kind: one dilated convolution at a time."""

    def __init__(self, channels: int, kernel_size: int, dilations: list[int], leaky_relu_slope: float):
        super().__init__()
        self.leaky_relu_slope = leaky_relu_slope
        self.convs = nn.ModuleList(
            nn.Conv1d(channels, channels, kernel_size, dilation=dilation, padding=(kernel_size - 1) * dilation // 2)
            for dilation in dilations
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # [B, C, T]
        for conv in self.convs:
            hidden_states = hidden_states + conv(nn.functional.leaky_relu(hidden_states, self.leaky_relu_slope))
        return hidden_states


class TTTOmniHifiGan(SeamlessM4Tv2HifiGan):
    """HiFi-GAN's generator, with residual blocks of either kind."""

    def __init__(self, config: TTTOmniVocoderConfig):
        super().__init__(config)
        if config.resblock == "2":
            sizes = list(zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes))
            channels = [config.upsample_initial_channel // 2 ** (i + 1) for i in range(self.num_upsamples)]
            self.resblocks = nn.ModuleList(
                TTTOmniVocoderResBlock2(width, kernel_size, dilations, config.leaky_relu_slope)
                for width in channels
                for kernel_size, dilations in sizes
            )


class TTTOmniVocoderFrameLayer(nn.Module):
    """A residual layer over frames: a depthwise convolution, then an MLP (ConvNeXt's block)."""

    KERNEL_SIZE = 7

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv1d(width, width, self.KERNEL_SIZE, padding=self.KERNEL_SIZE // 2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:  # [B, C, F]
        hidden_states = self.norm(self.conv(frames).transpose(1, 2))
        hidden_states = self.fc2(nn.functional.gelu(self.fc1(hidden_states)))
        return frames + hidden_states.transpose(1, 2)


class TTTOmniVocoder(PreTrainedModel):
    r"""
    Unit HiFi-GAN with duration predictor, fairseq's `CodeHiFiGANVocoder`: every unit is repeated for as many frames as
    it is predicted to last, and frames become `config.hop_length` samples each. Where `config.num_frame_layers` is not
    0, the generator is one of latents, as in VITS, which these layers make of the frames.

    Its parameters stay in float32 when the model that holds it is loaded in or cast to half precision.
    """

    config: TTTOmniVocoderConfig
    base_model_prefix = "vocoder"
    main_input_name = "units"
    _no_split_modules = []
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True  # it has no attention that could object
    _keep_in_fp32_modules_strict = ["unit_embedding", "dur_predictor", "frame_layers", "hifi_gan"]
    _keep_in_fp32_modules = [r".*\bdur_predictor\.proj", r".*\bframe_layers"]  # what quantisers would take

    def __init__(self, config: TTTOmniVocoderConfig):
        super().__init__(config)
        self.unit_embedding = nn.Embedding(config.unit_vocab_size, config.unit_embed_dim)
        self.dur_predictor = SeamlessM4Tv2VariancePredictor(
            config.unit_embed_dim,
            config.duration_predictor_hidden_dim,
            config.variance_predictor_kernel_size,
            config.var_pred_dropout,
        )
        self.frame_layers = nn.Sequential(
            *(TTTOmniVocoderFrameLayer(config.unit_embed_dim) for _ in range(config.num_frame_layers))
        )
        self.hifi_gan = TTTOmniHifiGan(config)
        self.float()
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):
            init.kaiming_normal_(module.weight)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True):
        def fn_in_full_precision(tensor: torch.Tensor) -> torch.Tensor:
            result = fn(tensor)
            return tensor.to(result.device) if result.dtype in (torch.float16, torch.bfloat16) else result

        return super()._apply(fn_in_full_precision, recurse)

    @property
    def unit_context(self) -> int:
        """Units on either side of a unit that its duration depends on."""
        return sum(conv.kernel_size[0] // 2 for conv in (self.dur_predictor.conv1, self.dur_predictor.conv2))

    @property
    def frame_context(self) -> int:
        """Frames on either side of a frame that its latents depend on."""
        return sum(layer.conv.padding[0] for layer in self.frame_layers)

    @property
    def latent_context(self) -> int:
        """Latents on either side of a latent that its samples depend on."""
        num_kernels = self.hifi_gan.num_kernels
        reach = self.hifi_gan.conv_post.padding[0]  # in positions of each stage in turn, from the last to the first
        for stage, upsampler in reversed(list(enumerate(self.hifi_gan.upsampler))):
            resblocks = self.hifi_gan.resblocks[stage * num_kernels : (stage + 1) * num_kernels]
            reach += max(
                sum(conv.padding[0] for conv in block.modules() if isinstance(conv, nn.Conv1d)) for block in resblocks
            )
            reach = math.ceil((reach + upsampler.padding[0]) / upsampler.stride[0])
        return reach + self.hifi_gan.conv_pre.padding[0]

    def check_units(self, units: torch.Tensor) -> None:
        """Raises `ValueError` unless `units` is one sequence of ids of this vocoder's units."""
        if units.dim() != 1 or (units.numel() and units.dtype not in (torch.int32, torch.int64)):
            raise ValueError(
                f"`units` must be one sequence of integer ids, got shape {list(units.shape)} and {units.dtype}."
            )
        if units.numel() and not 0 <= units.min() <= units.max() < self.config.unit_vocab_size:
            raise ValueError(
                f"`units` must lie between 0 and {self.config.unit_vocab_size - 1}, "
                f"got {units.min().item()} to {units.max().item()}."
            )

    def durations(self, units: torch.LongTensor) -> torch.LongTensor:
        """Predicts how many frames each of `units` [U] lasts, at least 1: `LongTensor` [U]."""
        if units.numel() == 0:
            return torch.zeros_like(units, dtype=torch.long)
        log_durations = self.dur_predictor(self.unit_embedding(units)[None])[0]
        return (log_durations.exp() - 1).round().long().clamp(min=1)

    def synthesize(self, frames: torch.LongTensor) -> torch.FloatTensor:
        """Turns `frames` [F], the unit of each, into a waveform [F * hop_length]."""
        return self.generate_samples(self.latents(frames[None])[0].T)

    def latents(self, frames: torch.LongTensor) -> torch.FloatTensor:
        """What the generator makes samples of, `[B, unit_embed_dim, F]`, for `frames` `[B, F]`, the unit of each."""
        latents = self.unit_embedding(frames.long()).transpose(1, 2)
        return self.frame_layers(latents) if frames.numel() else latents

    def generate_samples(self, latents: torch.FloatTensor) -> torch.FloatTensor:
        """The waveform [F * hop_length] of `latents` [F, unit_embed_dim]."""
        if len(latents) == 0:
            return torch.empty(0, device=latents.device)
        return self.hifi_gan(latents.T[None])[0]

    def forward(self, units: torch.LongTensor) -> torch.FloatTensor:
        r"""
        Speaks one sequence of units.

        Args:
            units (`torch.LongTensor` of shape `(num_units,)`):
                Ids in `[0, config.unit_vocab_size)`; there may be none.

        Returns:
            `torch.FloatTensor` of shape `(num_samples,)`: the waveform, in [-1, 1], at `config.sampling_rate`.

        Raises:
            `ValueError`: `units` is not one sequence of ids, or has ids that are out of range.
        """
        self.check_units(units)
        return self.synthesize(units.repeat_interleave(self.durations(units)))

    def stream(self) -> "VocoderStream":
        """Starts a stream: units in, samples out, chunk by chunk."""
        return VocoderStream(self)


class VocoderStream:
    r"""
    Speaks a sequence of units that arrives in chunks. The returned chunks of waveform, joined, equal `vocoder(units)`
    for the joined units. What depends on units to come is held back, and only what they depend on is kept, so that
    memory and the work per unit stay the same however long the sequence.
    """

    def __init__(self, vocoder: TTTOmniVocoder):
        self._vocoder = vocoder
        self._timed_units = _Overlap(
            lambda units: torch.stack((units, vocoder.durations(units)), dim=-1), vocoder.unit_context, 1
        )
        # One after the other, as the generator costs far more than its latents and sees less far.
        self._latents = _Overlap(lambda frames: vocoder.latents(frames[None])[0].T, vocoder.frame_context, 1)
        self._waveform = _Overlap(vocoder.generate_samples, vocoder.latent_context, vocoder.config.hop_length)
        self._device = "cpu"  # that of the units

    def push(self, units: torch.LongTensor) -> torch.FloatTensor:
        """
        Takes the next `units` [U], possibly none, and returns the next samples, possibly none. Raises `ValueError` for
        units that the vocoder refuses, and then is as before.
        """
        return self._advance(units, last=False)

    def flush(self) -> torch.FloatTensor:
        """Ends the sequence and returns its last samples. The next `push` starts another sequence."""
        return self._advance(torch.empty(0, dtype=torch.long, device=self._device), last=True)

    @torch.no_grad()
    def _advance(self, units: torch.LongTensor, last: bool) -> torch.FloatTensor:
        self._vocoder.check_units(units)
        self._device = units.device
        units, durations = self._timed_units(units.long(), last).unbind(-1)
        return self._waveform(self._latents(units.repeat_interleave(durations), last), last)


class _Overlap:
    """
    Applies a function from [N] to [N * rate, ...] to a sequence that arrives in chunks. Outputs depend on their own
    input and `context` inputs on either side, and on the padding where the sequence starts and ends.
    """

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor], context: int, rate: int):
        self.function = function
        self.context = context
        self.rate = rate
        self.inputs = None  # [num_done + inputs whose outputs are held back]
        self.num_done = 0

    def __call__(self, chunk: torch.Tensor, last: bool) -> torch.Tensor:
        inputs = chunk if self.inputs is None else torch.cat((self.inputs, chunk))
        num_ready = len(inputs) if last else max(len(inputs) - self.context, self.num_done)
        outputs = self.function(inputs if num_ready > self.num_done else inputs[:0])
        outputs = outputs[self.num_done * self.rate : num_ready * self.rate]
        start = num_ready if last else max(num_ready - self.context, 0)
        self.inputs, self.num_done = inputs[start:].clone(), num_ready - start
        return outputs.clone()


__all__ = ["TTTOmniVocoder", "VocoderStream"]
