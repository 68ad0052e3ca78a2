# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Unit HiFi-GAN of TTT-Omni: speech units to a waveform, at once or as a stream."""

import math
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.models.seamless_m4t_v2.modeling_seamless_m4t_v2 import SeamlessM4Tv2VariancePredictor

from .configuration_ttt_omni import TTTOmniVocoderConfig


Window = Callable[[torch.Tensor, int], torch.Tensor]


def pad(x: torch.Tensor, context: int) -> torch.Tensor:
    """
    The window of a sequence `[B, T, C]` that is there as a whole: it, and zeros for so many positions on either side.
    The layers below take any such function, and give as many positions as they are given less those it adds; so that
    a stream can have the positions around its pieces there.
    """
    return nn.functional.pad(x, (0, 0, context, context))


def middle(x: torch.Tensor, context: int) -> torch.Tensor:
    """`[B, T, C]` without so many positions on either side."""
    return x[:, context : x.shape[1] - context]


# Over `[B, T, C]`: with the channels last, which PyTorch has in 2D only, a CPU takes little more than half the time.
class TTTOmniVocoderConv1d(nn.Conv1d):
    """A convolution of `[B, context + T + context, C]` to `[B, T, C]`."""

    @property
    def context(self) -> int:
        return (self.kernel_size[0] - 1) * self.dilation[0] // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, weight = x.transpose(1, 2).unsqueeze(2), self.weight.unsqueeze(2)
        x = nn.functional.conv2d(x, weight, self.bias, dilation=(1, *self.dilation), groups=self.groups)
        return x.squeeze(2).transpose(1, 2)


class TTTOmniVocoderUpsampler(nn.ConvTranspose1d):
    """A transposed convolution of `[B, context + T + context, C]` to `[B, T * rate, C]`."""

    @property
    def context(self) -> int:
        return math.ceil(self.padding[0] / self.stride[0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, weight = x.transpose(1, 2).unsqueeze(2), self.weight.unsqueeze(2)
        stride, padding = (1, *self.stride), (0, *self.padding)
        x = nn.functional.conv_transpose2d(x, weight, self.bias, stride, padding)
        return middle(x.squeeze(2).transpose(1, 2), self.context * self.stride[0])


class TTTOmniVocoderResBlock1(nn.Module):
    """HiFi-GAN's residual block of the first kind: after each dilated convolution one that is not."""

    def __init__(self, channels: int, kernel_size: int, dilations: list[int], leaky_relu_slope: float):
        super().__init__()
        self.leaky_relu_slope = leaky_relu_slope
        self.convs1 = nn.ModuleList(
            TTTOmniVocoderConv1d(channels, channels, kernel_size, dilation=dilation) for dilation in dilations
        )
        self.convs2 = nn.ModuleList(TTTOmniVocoderConv1d(channels, channels, kernel_size) for _ in dilations)

    @property
    def context(self) -> int:
        return sum(conv.context for conv in (*self.convs1, *self.convs2))

    def forward(self, x: torch.Tensor, window: Window) -> torch.Tensor:  # [B, T, C]
        for conv1, conv2 in zip(self.convs1, self.convs2):
            x = window(x, conv1.context)
            hidden_states = conv1(nn.functional.leaky_relu(x, self.leaky_relu_slope))
            hidden_states = window(hidden_states, conv2.context)
            hidden_states = conv2(nn.functional.leaky_relu(hidden_states, self.leaky_relu_slope))
            x = middle(window(middle(x, conv1.context), conv2.context), conv2.context)
            x = hidden_states.add_(x)
        return x


class TTTOmniVocoderResBlock2(nn.Module):
    """HiFi-GAN's residual block of the second kind: one dilated convolution at a time."""

    def __init__(self, channels: int, kernel_size: int, dilations: list[int], leaky_relu_slope: float):
        super().__init__()
        self.leaky_relu_slope = leaky_relu_slope
        self.convs = nn.ModuleList(
            TTTOmniVocoderConv1d(channels, channels, kernel_size, dilation=dilation) for dilation in dilations
        )

    @property
    def context(self) -> int:
        return sum(conv.context for conv in self.convs)

    def forward(self, x: torch.Tensor, window: Window) -> torch.Tensor:  # [B, T, C]
        for conv in self.convs:
            x = window(x, conv.context)
            hidden_states = conv(nn.functional.leaky_relu(x, self.leaky_relu_slope))
            x = hidden_states.add_(middle(x, conv.context))
        return x


class TTTOmniHifiGan(nn.Module):
    """HiFi-GAN's generator: latents to a waveform."""

    def __init__(self, config: TTTOmniVocoderConfig):
        super().__init__()
        self.leaky_relu_slope = config.leaky_relu_slope
        channels = [config.upsample_initial_channel // 2**stage for stage in range(len(config.upsample_rates) + 1)]
        block = {"1": TTTOmniVocoderResBlock1, "2": TTTOmniVocoderResBlock2}[config.resblock]
        sizes = list(zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes))
        self.num_kernels = len(sizes)
        self.conv_pre = TTTOmniVocoderConv1d(config.unit_embed_dim, channels[0], 7)
        self.upsampler = nn.ModuleList(
            TTTOmniVocoderUpsampler(*channels[stage : stage + 2], kernel_size, rate, padding=(kernel_size - rate) // 2)
            for stage, (rate, kernel_size) in enumerate(zip(config.upsample_rates, config.upsample_kernel_sizes))
        )
        self.resblocks = nn.ModuleList(
            block(width, kernel_size, dilations, config.leaky_relu_slope)
            for width in channels[1:]
            for kernel_size, dilations in sizes
        )
        self.conv_post = TTTOmniVocoderConv1d(channels[-1], 1, 7)

    def stages(self) -> list[tuple[TTTOmniVocoderUpsampler, nn.ModuleList]]:
        """What upsamples, and the residual blocks behind it."""
        starts = range(0, len(self.resblocks), self.num_kernels)
        return [(up, self.resblocks[start : start + self.num_kernels]) for up, start in zip(self.upsampler, starts)]

    @property
    def context(self) -> int:
        """Latents on either side of a latent that its samples depend on."""
        reach = self.conv_post.context  # in positions of each stage in turn, from the last to the first
        for upsampler, blocks in reversed(self.stages()):
            reach += max(block.context for block in blocks)
            reach = math.ceil((reach + upsampler.padding[0]) / upsampler.stride[0])
        return reach + self.conv_pre.context

    def forward(self, latents: torch.Tensor, window: Window = pad) -> torch.Tensor:
        """The samples `[B, F * hop_length]` of `latents` `[B, unit_embed_dim, F]`."""
        x = self.conv_pre(window(latents.transpose(1, 2), self.conv_pre.context))
        for upsampler, blocks in self.stages():
            x = upsampler(window(nn.functional.leaky_relu(x, self.leaky_relu_slope), upsampler.context))
            longest, outputs = max(block.context for block in blocks), []
            for block in blocks:
                wait = longest - block.context  # so that of a stream all blocks give the same positions
                outputs.append(block(middle(window(x, wait), wait) if wait else x, window))
            x = sum(outputs[1:], outputs[0]) / self.num_kernels
        x = self.conv_post(window(nn.functional.leaky_relu(x), self.conv_post.context))
        return torch.tanh(x).squeeze(2)


class TTTOmniVocoderFrameLayer(nn.Module):
    """A residual layer over frames: a depthwise convolution, then an MLP (ConvNeXt's block)."""

    KERNEL_SIZE = 7

    def __init__(self, width: int):
        super().__init__()
        self.conv = TTTOmniVocoderConv1d(width, width, self.KERNEL_SIZE, groups=width)
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor, window: Window) -> torch.Tensor:  # [B, F, C]
        x = window(x, self.conv.context)
        hidden_states = self.norm(self.conv(x))
        hidden_states = self.fc2(nn.functional.gelu(self.fc1(hidden_states)))
        return middle(x, self.conv.context) + hidden_states


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
        self.frame_layers = nn.ModuleList(
            TTTOmniVocoderFrameLayer(config.unit_embed_dim) for _ in range(config.num_frame_layers)
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
        """Frames on either side of a frame that its samples depend on."""
        return sum(layer.conv.context for layer in self.frame_layers) + self.hifi_gan.context

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

    def synthesize(self, frames: torch.LongTensor, window: Window = pad) -> torch.FloatTensor:
        """Turns `frames` [F], the unit of each, into a waveform [F * hop_length]."""
        if window is pad and len(frames) == 0:
            return torch.empty(0, device=frames.device)
        return self.hifi_gan(self.latents(frames[None], window), window)[0]

    def latents(self, frames: torch.LongTensor, window: Window = pad) -> torch.FloatTensor:
        """What the generator makes samples of, `[B, unit_embed_dim, F]`, for `frames` `[B, F]`, the unit of each."""
        latents = self.unit_embedding(frames.long())
        for layer in self.frame_layers:
            latents = layer(latents, window)
        return latents.transpose(1, 2)

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
    Speaks a sequence of units that arrives in pieces. The returned pieces of waveform, joined, equal `vocoder(units)`
    for the joined units. What depends on units to come is held back. All is computed once, and in blocks of frames, so
    that memory and the work per unit stay the same however long the sequence, and however small the pieces.
    """

    def __init__(self, vocoder: TTTOmniVocoder):
        self._vocoder = vocoder
        self._timed_units = _Overlap(
            lambda units: torch.stack((units, vocoder.durations(units)), dim=-1), vocoder.unit_context
        )
        self._waveform = _Blocks(vocoder.synthesize, vocoder.frame_context)
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
        return self._waveform(units.repeat_interleave(durations), last)


class _Overlap:
    """
    Applies a function from [N] to [N, ...] to a sequence that arrives in pieces. Outputs depend on their own input and
    `context` inputs on either side, and on the padding where the sequence starts and ends.
    """

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor], context: int):
        self.function = function
        self.context = context
        self.inputs = None  # [num_done + inputs whose outputs are held back]
        self.num_done = 0

    def __call__(self, piece: torch.Tensor, last: bool) -> torch.Tensor:
        inputs = piece if self.inputs is None else torch.cat((self.inputs, piece))
        num_ready = len(inputs) if last else max(len(inputs) - self.context, self.num_done)
        outputs = self.function(inputs if num_ready > self.num_done else inputs[:0])[self.num_done : num_ready]
        start = num_ready if last else max(num_ready - self.context, 0)
        self.inputs, self.num_done = inputs[start:].clone(), num_ready - start
        return outputs.clone()


# Frames of a stream's first blocks and of all that follow: few, so that the first sound comes soon, then as many as a
# processor's cache holds. There are no other sizes, as convolutions are prepared anew for each.
BLOCK_SIZES = (8, 16, 32, 48)


class _Blocks:
    """
    Applies a function of [F] and a window to a sequence that arrives in pieces, block by block. Of each window that
    the function takes, the end is kept for the next block, so that nothing is computed twice. Outputs depend on
    `context` inputs on either side.
    """

    def __init__(self, function: Callable[[torch.Tensor, Window], torch.Tensor], context: int):
        self.function = function
        self.context = context
        self._start()

    def _start(self):
        self.waiting = None  # inputs of the next block
        self.num_blocks = 0
        self.pasts = []  # the end of each window, in their order

    def __call__(self, piece: torch.Tensor, last: bool) -> torch.Tensor:
        waiting = piece if self.waiting is None else torch.cat((self.waiting, piece))
        outputs = [torch.empty(0, device=piece.device)]
        while len(waiting) >= (size := self._size_of_next()):
            outputs.append(self._advance(waiting[:size], last=False))
            waiting = waiting[size:]
        self.waiting = waiting.clone()
        if last:
            if self.num_blocks > 0 or len(waiting) > 0:
                outputs.append(self._advance(waiting, last=True))
            self._start()
        return torch.cat(outputs)

    def _size_of_next(self) -> int:
        if self.num_blocks == 0:  # then all windows must have something to give
            return self.context + BLOCK_SIZES[0]
        return BLOCK_SIZES[min(self.num_blocks, len(BLOCK_SIZES) - 1)]

    def _advance(self, block: torch.Tensor, last: bool) -> torch.Tensor:
        pasts, self.pasts = self.pasts, []

        def window(x, context):
            zeros = None if pasts and not last else x.new_zeros(x.shape[0], context, x.shape[2])
            x = torch.cat([pasts[len(self.pasts)] if pasts else zeros, x, *([zeros] if last else [])], dim=1)
            self.pasts.append(x[:, x.shape[1] - 2 * context :].clone())
            return x

        self.num_blocks += 1
        return self.function(block, window)


__all__ = ["TTTOmniVocoder", "VocoderStream"]
