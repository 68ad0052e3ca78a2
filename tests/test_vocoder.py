# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from ttt_omni.configuration_ttt_omni import TTTOmniVocoderConfig
from ttt_omni.conversion.vocoder import load_fairseq_vocoder, vocoder_config_from_fairseq
from ttt_omni.vocoder_ttt_omni import TTTOmniVocoder


SMALL = TTTOmniVocoderConfig(
    unit_vocab_size=20,
    unit_embed_dim=6,
    duration_predictor_hidden_dim=10,
    upsample_initial_channel=8,
    upsample_rates=[3, 2],
    upsample_kernel_sizes=[5, 4],
    resblock_kernel_sizes=[3, 5],
    resblock_dilation_sizes=[[1, 3], [2]],
)


@pytest.fixture(scope="module")
def golden(goldens) -> dict[str, torch.Tensor]:
    return load_file(goldens / "vocoder_golden.safetensors")


@pytest.fixture(scope="module")
def vocoder(goldens) -> TTTOmniVocoder:
    config = vocoder_config_from_fairseq(goldens / "vocoder_config.json")
    vocoder = TTTOmniVocoder(config).eval()
    vocoder.load_state_dict(load_fairseq_vocoder(goldens / "vocoder.pt", config))
    return vocoder


@st.composite
def configs(draw, of_fairseq: bool = False) -> TTTOmniVocoderConfig:
    upsample_rates = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    resblock_kernel_sizes = draw(st.lists(st.sampled_from([1, 3, 5, 7]), min_size=1, max_size=3))
    dilations = st.lists(st.integers(1, 5), min_size=1, max_size=3)
    return TTTOmniVocoderConfig(
        unit_vocab_size=draw(st.integers(1, 20)),
        unit_embed_dim=draw(st.integers(3, 12)),
        duration_predictor_hidden_dim=draw(st.integers(2, 12)),
        upsample_initial_channel=draw(st.integers(1, 3)) * 2 ** len(upsample_rates),
        upsample_rates=upsample_rates,
        upsample_kernel_sizes=[rate + 2 * draw(st.integers(0, 4)) for rate in upsample_rates],
        resblock_kernel_sizes=resblock_kernel_sizes,
        resblock_dilation_sizes=[draw(dilations) for _ in resblock_kernel_sizes],
        resblock="1" if of_fairseq else draw(st.sampled_from(["1", "2"])),
        num_frame_layers=0 if of_fairseq else draw(st.integers(0, 3)),
    )


@torch.no_grad()
def random_vocoder(config: TTTOmniVocoderConfig, seed: int) -> TTTOmniVocoder:
    """A vocoder with biases, whose units last 1 to about 20 frames and sound about as loud as speech."""
    torch.manual_seed(seed)
    vocoder = TTTOmniVocoder(config).eval()
    for name, parameter in vocoder.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(std=0.02)
    vocoder.dur_predictor.proj.weight.normal_(std=config.duration_predictor_hidden_dim**-0.5)
    vocoder.dur_predictor.proj.bias.fill_(1.0)
    peak = vocoder.synthesize(torch.randint(config.unit_vocab_size, (100,))).abs().max()
    vocoder.hifi_gan.conv_post.weight.div_(2 * torch.atanh(peak.clamp(max=1 - 1e-6)))
    return vocoder


def fairseq_state(vocoder: TTTOmniVocoder, weight_norm: bool) -> dict[str, torch.Tensor]:
    state = {}
    for name, tensor in vocoder.state_dict().items():
        name = name.removeprefix("hifi_gan.").replace("upsampler.", "ups.").replace("unit_embedding.", "dict.")
        if name.startswith("dur_predictor.conv"):
            state[name.replace("conv1.", "conv1.0.").replace("conv2.", "conv2.0.")] = tensor
        elif tensor.dim() == 3 and weight_norm:
            state[f"{name}_g"] = tensor.norm(dim=(1, 2), keepdim=True)
            state[f"{name}_v"] = tensor * (0.5 + torch.rand(len(tensor), 1, 1))
        else:
            state[name] = tensor
    return state


def fairseq_json(config: TTTOmniVocoderConfig) -> dict:
    return {
        "resblock": "1",
        "upsample_rates": config.upsample_rates,
        "upsample_kernel_sizes": config.upsample_kernel_sizes,
        "upsample_initial_channel": config.upsample_initial_channel,
        "resblock_kernel_sizes": config.resblock_kernel_sizes,
        "resblock_dilation_sizes": config.resblock_dilation_sizes,
        "num_embeddings": config.unit_vocab_size,
        "embedding_dim": config.unit_embed_dim,
        "model_in_dim": config.unit_embed_dim,
        "sampling_rate": config.sampling_rate,
        "f0": False,
        "dur_predictor_params": {
            "encoder_embed_dim": config.unit_embed_dim,
            "var_pred_hidden_dim": config.duration_predictor_hidden_dim,
            "var_pred_kernel_size": 3,
            "var_pred_dropout": 0.5,
        },
    }


@torch.no_grad()
def test_golden(vocoder, golden):
    assert torch.equal(vocoder.durations(golden["units"]), golden["durations"])
    torch.testing.assert_close(vocoder(golden["units"]), golden["waveform"], rtol=0, atol=1e-5)
    waveform = vocoder.synthesize(golden["units"])  # a frame of each
    torch.testing.assert_close(waveform, golden["waveform_no_duration"], rtol=0, atol=1e-5)


@torch.no_grad()
def test_no_units_are_silent(vocoder):
    for units in (torch.tensor([], dtype=torch.long), torch.tensor([])):
        for waveform in (vocoder(units), vocoder.synthesize(units), vocoder.stream().push(units)):
            assert waveform.shape == (0,) and waveform.dtype == torch.float32
    assert vocoder.stream().flush().shape == (0,)


def test_parameter_count_of_the_released_sizes():
    with torch.device("meta"):
        vocoder = TTTOmniVocoder(TTTOmniVocoderConfig())
    embedding = 1000 * 128
    conv, layer_norm, projection = 128 * 128 * 3 + 128, 2 * 128, 128 + 1
    durations = 2 * conv + 2 * layer_norm + projection
    pre_and_post = (128 * 512 * 7 + 512) + (16 * 1 * 7 + 1)
    upsamplers = sum(2 * c * c * k + c for c, k in zip((256, 128, 64, 32, 16), (11, 8, 8, 4, 4)))
    resblocks = sum(6 * (c * c * k + c) for c in (256, 128, 64, 32, 16) for k in (3, 7, 11))
    assert vocoder.num_parameters() == embedding + durations + pre_and_post + upsamplers + resblocks == 13_475_010
    # From the waveform back, in samples per frame 320, 160, 80, 20, 5: a stage's widest resblock reaches 60 positions.
    assert (vocoder.unit_context, vocoder.frame_context, vocoder.latent_context) == (2, 0, 21)
    assert vocoder.config.hop_length == 320


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stays_in_float32(vocoder, golden, tmp_path, dtype):
    vocoder.save_pretrained(tmp_path)
    made = TTTOmniVocoder._from_config(vocoder.config, dtype=dtype)
    assert {parameter.dtype for parameter in made.parameters()} == {torch.float32}
    cast = TTTOmniVocoder.from_pretrained(tmp_path)
    torch.nn.ModuleList([cast]).to(dtype)
    for loaded in (TTTOmniVocoder.from_pretrained(tmp_path, dtype=dtype), cast):
        with torch.no_grad():
            assert torch.equal(loaded(golden["units"]), vocoder(golden["units"]))


@pytest.mark.parametrize(
    "units, message",
    [
        (torch.tensor([3, 100]), "between 0 and 99, got 3 to 100"),
        (torch.tensor([-1, 5]), "got -1 to 5"),
        (torch.tensor([[1, 2]]), r"one sequence of integer ids, got shape \[1, 2\]"),
        (torch.tensor([1.0]), "torch.float32"),
    ],
)
@torch.no_grad()
def test_refuses_bad_units(vocoder, golden, units, message):
    with pytest.raises(ValueError, match=message):
        vocoder(units)
    stream = vocoder.stream()
    stream.push(golden["units"][:5])
    with pytest.raises(ValueError, match=message):
        stream.push(units)
    torch.testing.assert_close(stream.flush(), vocoder(golden["units"][:5]), rtol=0, atol=1e-5)


@settings(max_examples=100, deadline=None)
@given(
    config=configs(),
    num_units=st.integers(0, 60),
    cuts=st.lists(st.integers(0, 60), max_size=12) | st.just(list(range(60))),
    seed=st.integers(0, 2**31),
)
@torch.no_grad()
def test_stream_equals_one_shot(config, num_units, cuts, seed):
    vocoder = random_vocoder(config, seed)
    stream = vocoder.stream()
    for _ in range(2):  # a flushed stream starts over
        units = torch.randint(config.unit_vocab_size, (num_units,))
        chunks = [stream.push(chunk) for chunk in units.tensor_split(sorted(cuts))]
        torch.testing.assert_close(torch.cat([*chunks, stream.flush()]), vocoder(units), rtol=0, atol=1e-5)


@settings(max_examples=5, deadline=None)
@given(cuts=st.lists(st.integers(0, 60), max_size=20))
def test_stream_equals_golden(vocoder, golden, cuts):
    stream = vocoder.stream()
    chunks = [stream.push(chunk) for chunk in golden["units"].tensor_split(sorted(cuts))]
    torch.testing.assert_close(torch.cat([*chunks, stream.flush()]), golden["waveform"], rtol=0, atol=1e-5)


@torch.no_grad()
def test_streams_do_not_mix():
    vocoder = random_vocoder(SMALL, seed=0)
    rows = [torch.randint(SMALL.unit_vocab_size, (length,)) for length in (40, 0, 7)]
    streams = [vocoder.stream() for _ in rows]
    waveforms = [[] for _ in rows]
    for start in range(0, 40, 4):
        for stream, waveform, row in zip(streams, waveforms, rows):
            waveform.append(stream.push(row[start : start + 4]))
    for stream, waveform, row in zip(streams, waveforms, rows):
        torch.testing.assert_close(torch.cat([*waveform, stream.flush()]), vocoder(row), rtol=0, atol=1e-5)


@torch.no_grad()
def test_stream_works_on_bounded_windows():
    vocoder = random_vocoder(SMALL, seed=0)
    num_units, num_frames = [], []
    vocoder.dur_predictor.register_forward_pre_hook(lambda _, inputs: num_units.append(inputs[0].shape[1]))
    vocoder.hifi_gan.register_forward_pre_hook(lambda _, inputs: num_frames.append(inputs[0].shape[2]))
    units = torch.randint(SMALL.unit_vocab_size, (300,))
    longest = vocoder.durations(units).max().item()
    num_units.clear()
    stream = vocoder.stream()
    for unit in units.split(1):
        chunk = stream.push(unit)
        assert chunk.untyped_storage().nbytes() == chunk.nbytes
    assert max(num_units) == 2 * vocoder.unit_context + 1
    assert longest > 1 and max(num_frames) <= 2 * vocoder.latent_context + longest


@settings(max_examples=50, deadline=None)
@given(config=configs(), seed=st.integers(0, 2**31))
def test_contexts_are_the_receptive_fields(config, seed):
    """Of a latent among frames, and of a latent's samples among latents."""
    vocoder, rate = random_vocoder(config, seed).double(), config.hop_length
    stages = [(vocoder.frame_layers, vocoder.frame_context, 1), (vocoder.hifi_gan, vocoder.latent_context, rate)]
    for stage, context, rate in stages:
        middle = context + 2
        frames = torch.randint(config.unit_vocab_size, (1, 2 * middle + 1))
        inputs = vocoder.unit_embedding(frames).transpose(1, 2).detach().requires_grad_()
        outputs = stage(inputs)[..., middle * rate : (middle + 1) * rate]
        (gradient,) = torch.autograd.grad(outputs.sum(), inputs)
        seen = gradient[0].abs().sum(0).ne(0).tolist()
        assert seen == [False] * 2 + [True] * (2 * context + 1) + [False] * 2


@torch.no_grad()
def test_residual_block_of_the_second_kind():
    """One dilated convolution after the other, each beside its input: jik876/hifi-gan's `ResBlock2`."""
    torch.manual_seed(0)
    block = TTTOmniVocoder(TTTOmniVocoderConfig(**SMALL.to_dict() | {"resblock": "2"})).hifi_gan.resblocks[0]
    x = torch.randn(1, 4, 30)
    expected = x
    for conv, dilation in zip(block.convs, (1, 3), strict=True):
        padded = torch.nn.functional.pad(torch.nn.functional.leaky_relu(expected, 0.1), (dilation, dilation))
        taps = [padded[..., dilation * tap : dilation * tap + 30] for tap in range(3)]
        added = sum(torch.einsum("oi,bit->bot", conv.weight[:, :, tap], taps[tap]) for tap in range(3))
        expected = expected + added + conv.bias[:, None]
    torch.testing.assert_close(block(x), expected)


def test_unit_context_is_the_receptive_field(vocoder):
    inputs = vocoder.unit_embedding(torch.arange(9))[None].detach().requires_grad_()
    (gradient,) = torch.autograd.grad(vocoder.dur_predictor(inputs)[0, 4], inputs)
    assert gradient.abs().sum(2).squeeze(0).ne(0).tolist() == [False] * 2 + [True] * 5 + [False] * 2
    assert vocoder.unit_context == 2


@settings(max_examples=20, deadline=None)
@given(config=configs(of_fairseq=True), weight_norm=st.booleans(), seed=st.integers(0, 2**31))
def test_converts_other_sizes(tmp_path_factory, config, weight_norm, seed):
    vocoder = random_vocoder(config, seed)
    folder = tmp_path_factory.mktemp("vocoder")
    (folder / "config.json").write_text(json.dumps(fairseq_json(config)))
    torch.save({"generator": fairseq_state(vocoder, weight_norm)}, folder / "vocoder.pt")
    converted = vocoder_config_from_fairseq(folder / "config.json")
    assert converted.to_dict() == config.to_dict()
    state = load_fairseq_vocoder(folder / "vocoder.pt", converted)
    torch.testing.assert_close(state, vocoder.state_dict(), rtol=1e-5, atol=1e-7)


def test_half_precision_checkpoint_becomes_float32(tmp_path):
    state = fairseq_state(random_vocoder(SMALL, seed=0).half(), weight_norm=True)
    torch.save({"generator": {name: tensor.half() for name, tensor in state.items()}}, tmp_path / "vocoder.pt")
    tensors = load_fairseq_vocoder(tmp_path / "vocoder.pt", SMALL)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"resblock": "2"}, "`resblock` is '2'; only '1' is supported"),
        ({"f0": True}, "`f0` is set"),
        ({"multispkr": "from_input_file"}, "`multispkr` is set"),
        ({"model_in_dim": 99}, "`model_in_dim` is 99; only 6 is supported"),
        ({"num_embeddings": None}, r"lacks \['num_embeddings'\]"),
        ({"dur_predictor_params": None}, r"lacks \['encoder_embed_dim', 'var_pred_dropout'"),
        ({"dur_predictor_params": 3}, "`dur_predictor_params` must be an object, got 3"),
        ({"upsample_rates": [5]}, "`upsample_kernel_sizes` must have one entry per entry of `upsample_rates`"),
        ({"upsample_rates": "54"}, "upsample_rates"),
    ],
)
def test_refuses_bad_json(tmp_path, change, message):
    source = {name: value for name, value in (fairseq_json(SMALL) | change).items() if value is not None}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(source))
    with pytest.raises(ValueError, match=message) as error:
        vocoder_config_from_fairseq(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\x00", b""])
def test_refuses_what_is_no_json(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="config.json (is not readable as JSON|holds no JSON object)"):
        vocoder_config_from_fairseq(path)


@pytest.mark.parametrize(
    "name, shape, message",
    [
        ("conv_pre.weight_v", None, "lacks the tensor `conv_pre.weight_v`"),
        ("conv_post.bias", None, "lacks the tensor `conv_post.bias`"),
        ("dict.weight", (21, 6), r"`dict.weight` has the shape \[21, 6\], expected \[20, 6\]"),
        ("ups.0.weight_g", (4, 8, 1), r"`ups.0.weight_g` has the shape \[4, 8, 1\], expected \[8, 1, 1\]"),
        ("resblocks.0.convs1.0.weight_v", (4, 4, 5), r"`resblocks.0.convs1.0.weight_v` has the shape \[4, 4, 5\]"),
        ("spkr.weight", (200, 6), r"does not call for: \['spkr.weight'\]"),
    ],
)
def test_refuses_bad_tensors(tmp_path, name, shape, message):
    state = fairseq_state(random_vocoder(SMALL, seed=0), weight_norm=True)
    state.pop(name, None)
    if shape is not None:
        state[name] = torch.zeros(shape)
    path = tmp_path / "vocoder.pt"
    torch.save({"generator": state}, path)
    with pytest.raises(ValueError, match=message) as error:
        load_fairseq_vocoder(path, SMALL)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [{}, [1], {"generator": 3}, {"generator": {"a": 1}}, Path("x"), b"text", b""])
def test_refuses_what_is_no_checkpoint(tmp_path, content):
    path = tmp_path / "vocoder.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match="vocoder.pt is not a fairseq vocoder") as error:
        load_fairseq_vocoder(path, SMALL)
    assert "\n" not in str(error.value)


def test_refuses_a_truncated_checkpoint(goldens, tmp_path):
    path = tmp_path / "vocoder.pt"
    path.write_bytes((goldens / "vocoder.pt").read_bytes()[:-1000])
    with pytest.raises(ValueError, match="vocoder.pt is not a fairseq vocoder"):
        load_fairseq_vocoder(path, SMALL)
