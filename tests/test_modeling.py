# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""The model on the golden checkpoint: the original's numbers, training, and the contract of the state."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import assert_close, expand, pad, random_rows
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig

from ttt_omni import TTTOmniConfig, TTTOmniForCausalLM


ALL_LAYERS = pytest.mark.parametrize("layers", ["hybrid", "replace", "mixed", "windowed", "ttt", "gated"])
properties = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


# The original's numbers


def test_golden_loss(golden_model, golden):
    labels = [
        x for i, label in zip(golden["input_ids"], golden["labels"]) for x in [label] * (300 if i == -200 else 1)
    ]
    output = golden_model(
        input_ids=expand(golden_model, golden["input_ids"]),
        input_features=golden["mel"].T[None],
        labels=torch.tensor([labels]),
        unit_labels=golden["tgt_units"][None],
    )
    assert_close(output.loss, golden["total_loss"][0], 1e-5)
    assert_close(output.lm_loss + output.ctc_loss, output.loss, 1e-6)


def test_golden_hidden_states(golden_model, golden):
    """The final-norm state that predicted each token, one per token."""
    input_ids = expand(golden_model, golden["input_ids"])
    whole = torch.cat([input_ids, golden["greedy_tokens"][None, :-1]], dim=1)
    output = golden_model(whole, input_features=golden["mel"].T[None])
    assert_close(output.last_hidden_state[0, input_ids.shape[1] - 1 :], golden["decoder_hidden"])
    frames = golden_model.speech_decoder(golden["decoder_hidden"][None])[0].argmax(-1)
    assert torch.equal(frames, golden["ctc_frames"])


def test_golden_answer(golden_model, golden):
    inputs = {"input_ids": expand(golden_model, golden["input_ids"]), "input_features": golden["mel"].T[None]}
    length = inputs["input_ids"].shape[1]
    for kwargs in ({}, {"use_cache": False}, {"prefill_chunk_size": 50}, {"input_features_mask": torch.ones(1, 3000)}):
        output = golden_model.generate(**inputs, **kwargs, max_new_tokens=24, return_audio=True, do_sample=False)
        assert torch.equal(output.sequences[0, length:], golden["greedy_tokens"])
        assert torch.equal(output.units[0], golden["units"])
        assert output.waveform[0].abs().max() > 0.01


# Saving and loading


def test_saved_model_is_the_same(golden_model, tmp_path):
    golden_model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    input_ids = random_rows(0, [20])[0][None]
    assert torch.equal(loaded(input_ids).logits, golden_model(input_ids).logits)
    auto_map = json.loads((tmp_path / "saved" / "config.json").read_text())["auto_map"]
    assert {"AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForMultimodalLM"} <= auto_map.keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(golden_model_dir, golden, dtype):
    model = AutoModelForCausalLM.from_pretrained(golden_model_dir, dtype=dtype)
    assert model.lm_head.weight.dtype == dtype
    assert model.model.language_model.layers[2].ttt.inner_model.W1.dtype == torch.float32
    assert model.vocoder.unit_embedding.weight.dtype == torch.float32
    cache = DynamicCache(config=model.config)
    inputs = {"input_ids": expand(model, golden["input_ids"]), "input_features": golden["mel"].T[None]}
    assert model(**inputs, cache=cache).logits.isfinite().all()
    assert cache.layers[2].ttt_state.W1.dtype == torch.float32
    assert len(model.generate(**inputs, max_new_tokens=8, return_audio=True).waveform) == 1


# Training


@pytest.mark.parametrize("layers", ["hybrid", "replace", "mixed", "windowed"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_ttt_parameter_learns(models, layers, checkpointing):
    model = models(layers).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    try:
        model.zero_grad()
        input_ids, attention_mask = pad(random_rows(0, [25, 14]), "right")
        labels = input_ids.masked_fill(attention_mask == 0, -100)
        units = torch.randint(0, 100, (2, 12))
        model(input_ids, attention_mask=attention_mask, labels=labels, unit_labels=units).loss.backward()
        for name, parameter in model.named_parameters():
            if ".ttt" in name:
                assert parameter.grad is not None and parameter.grad.isfinite().all(), name
                assert parameter.grad.abs().sum() > 0, name
    finally:
        model.zero_grad()
        model.activation_checkpointing_disable()
        model.eval()


@pytest.mark.parametrize("index", [0, 1])  # TTT-Linear and TTT-MLP
def test_a_layer_compiles_without_a_graph_break(models, index):
    layer = models("mixed").model.language_model.layers[index].ttt
    hidden_states = torch.randn(2, 15, layer.config.hidden_size, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 15, dtype=torch.long)
    mask[0, :4] = 0
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    (actual, actual_grad), (expected, expected_grad) = (
        (o, torch.autograd.grad(o.square().sum(), hidden_states)[0])
        for o in (compiled(hidden_states, mask), layer(hidden_states, mask))
    )
    assert_close(actual, expected, 1e-8)
    assert_close(actual_grad, expected_grad, 1e-8)


def test_activation_checkpointing_changes_no_gradient(models):
    model = models("mixed").train()
    input_ids = random_rows(0, [25])[0][None]
    gradients = []
    try:
        for enable in (model.activation_checkpointing_disable, model.activation_checkpointing_enable):
            enable()
            model.zero_grad()
            model(input_ids, labels=input_ids, use_cache=False).loss.backward()
            gradients.append([p.grad.clone() for n, p in model.named_parameters() if p.grad is not None])
    finally:
        model.zero_grad()
        model.activation_checkpointing_disable()
        model.eval()
    assert len(gradients[0]) == len(gradients[1]) > 0
    for one, other in zip(*gradients):
        assert_close(one, other, 1e-5)


def test_ctc_loss_of_nothing(golden_model):
    input_ids = random_rows(0, [10])[0][None]
    no_units = torch.full((1, 4), -100)
    assert golden_model(input_ids, labels=input_ids, unit_labels=no_units).ctc_loss == 0
    no_response = torch.full_like(input_ids, -100)
    assert golden_model.speech_decoder.ctc_loss(torch.randn(1, 10, 64), no_response, torch.ones(1, 4).long()) == 0
    more_units_than_frames = torch.randint(0, 100, (1, 400))
    assert golden_model(input_ids, labels=input_ids, unit_labels=more_units_than_frames).ctc_loss.isfinite()


def test_answers_without_units_have_no_part_in_the_ctc_loss(golden_model):
    hidden_states, labels = torch.randn(2, 12, 64), torch.randint(0, 100, (2, 12))
    labels[:, 5] = -100  # two responses in each row
    units = torch.full((4, 3), -100)
    units[2, :2] = torch.tensor([7, 9])
    alone = golden_model.speech_decoder.ctc_loss(hidden_states[1:, :5], labels[1:, :5], units[2:3])
    assert_close(golden_model.speech_decoder.ctc_loss(hidden_states, labels, units), alone, 1e-5)


# The contract of the state


@ALL_LAYERS
@properties
@given(
    seed=st.integers(0, 1000),
    lengths=st.lists(st.integers(1, 25), min_size=1, max_size=3),
    cuts=st.lists(st.integers(1, 24), max_size=4),
    side=st.sampled_from(["left", "right"]),
    new=st.integers(1, 8),
)
def test_tokens_may_arrive_in_any_way(models, layers, seed, lengths, cuts, side, new):
    """In padded batches, in chunks, then one by one: each row as if it were alone and at once."""
    model = models(layers)
    rows, next_rows = random_rows(seed, lengths), random_rows(seed + 1, [new] * len(lengths))
    input_ids, attention_mask = pad(rows, side)
    next_ids = torch.stack(next_rows)
    bounds = sorted({0, input_ids.shape[1], *(c for c in cuts if c < input_ids.shape[1])})
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        outputs = []
        for start, end in zip(bounds, bounds[1:]):
            mask = attention_mask[:, :end]
            outputs.append(model(input_ids[:, start:end], attention_mask=mask, cache=cache).logits)
        for column in next_ids.split(1, dim=1):
            attention_mask = torch.cat([attention_mask, torch.ones_like(column)], dim=1)
            position_ids = attention_mask.sum(1, keepdim=True) - 1
            outputs.append(model(column, attention_mask=attention_mask, position_ids=position_ids, cache=cache).logits)
        logits = torch.cat(outputs, dim=1)
        for row, (ids, next_row) in enumerate(zip(rows, next_rows)):
            alone = model(torch.cat([ids, next_row])[None]).logits[0]
            assert_close(logits[row, attention_mask[row] == 1], alone)


@ALL_LAYERS
@properties
@given(seed=st.integers(0, 1000), lengths=st.lists(st.integers(1, 20), min_size=2, max_size=4))
def test_packed_documents(models, layers, seed, lengths):
    model = models(layers)
    rows = random_rows(seed, lengths)
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = torch.cat(rows)[None]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    with torch.no_grad():
        alone = torch.cat([model(row[None]).logits[0] for row in rows])
        assert_close(model(packed, position_ids=position_ids, use_cache=False).logits[0], alone)
        flat = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        flat.update(max_length_q=max(lengths), max_length_k=max(lengths))
        assert_close(model(packed, position_ids=position_ids, use_cache=False, **flat).logits[0], alone)


@ALL_LAYERS
def test_cache_operations(models, layers):
    model = models(layers)
    rows = random_rows(0, [13, 13])
    next_ids = random_rows(1, [5])[0][None]

    def after(row):
        with torch.no_grad():
            return model(torch.cat([rows[row][None], next_ids], dim=1)).logits[0, -5:]

    def filled():
        cache = DynamicCache() if layers == "hybrid" else DynamicCache(config=model.config)
        with torch.no_grad():
            model(torch.stack(rows), cache=cache)
        return cache

    def check(cache, expected):
        with torch.no_grad():
            logits = model(next_ids.repeat(len(expected), 1), cache=cache).logits
        for actual, row in zip(logits, expected):
            assert_close(actual, after(row))

    cache = filled()
    cache.batch_repeat_interleave(2)
    check(cache, [0, 0, 1, 1])
    cache = filled()
    cache.reorder_cache(torch.tensor([1, 0]))
    check(cache, [1, 0])
    cache = filled()
    cache.batch_select_indices(torch.tensor([1]))
    check(cache, [1])
    cache = filled()
    for layer in cache.layers:
        layer.offload()
    check(cache, [0, 1])
    cache.reset()
    assert cache.get_seq_length() == 0
    with torch.no_grad():
        assert_close(model(torch.stack(rows), cache=cache).logits, model(torch.stack(rows)).logits)


def test_cropping(models):
    model = models("hybrid")
    ids, next_ids = random_rows(0, [15, 4])
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[None], cache=cache)
        cache.crop(-2)
        logits = model(next_ids[None], cache=cache).logits[0]
        assert_close(logits, model(torch.cat([ids[:-2], next_ids])[None]).logits[0, -4:])
    cache = DynamicCache(config=model.config)
    model(ids[None], cache=cache)
    with pytest.raises(RuntimeError, match="Cannot take back"):
        cache.crop(-4)  # 15 tokens, mini-batches of 6


@ALL_LAYERS
@torch.no_grad()
def test_cropping_of_a_recorded_past(models, layers):
    """Past the start of the mini-batch, and of the window: what is left is as if the rest had never come."""
    model = models(layers)
    tokens, following = random_rows(3, [40, 7])
    for length, chunk, columns in [(14, 5, 4), (14, 7, 6), (12, 6, 0), (25, 7, 3)]:  # of mini-batches of 6
        cache, expected = DynamicCache(config=model.config), DynamicCache(config=model.config)
        model(tokens[None, :length], cache=cache)
        cache.activate_past_recording()
        assert cache.is_croppable
        model(tokens[None, length : length + chunk], cache=cache)
        cache.crop(-columns)
        model(tokens[None, : length + chunk - columns], cache=expected)
        assert cache.get_seq_length() == expected.get_seq_length()
        logits = [model(following[None], cache=one).logits for one in (cache, expected)]
        torch.testing.assert_close(*logits, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("layers", ["hybrid", "windowed", "mixed"])
@torch.no_grad()
def test_prompt_lookup_decoding_is_greedy(models, layers):
    """Tokens that the prompt suggests are taken back where the model says others, from cache and state, too."""
    model = models(layers)
    (phrase,) = random_rows(4, [9])
    prompt = torch.cat([phrase, phrase, phrase[:4]])[None]
    options = {"max_new_tokens": 20, "do_sample": False}
    caches, sequences = [DynamicCache(config=model.config) for _ in range(2)], []
    for cache, lookup in zip(caches, (None, 4)):
        sequences.append(model.generate(prompt, cache=cache, prompt_lookup_num_tokens=lookup, **options))
    assert torch.equal(*sequences)
    logits = [model(phrase[None], cache=cache).logits for cache in caches]
    torch.testing.assert_close(*logits, rtol=1e-7, atol=1e-7)
    with pytest.raises(ValueError, match="cannot be spoken"):
        model.generate(prompt, prompt_lookup_num_tokens=4, return_audio=True)
    with pytest.raises(ValueError, match="pass an empty cache"):
        model.generate(prompt, prompt_lookup_num_tokens=4, cache=caches[1])


@torch.no_grad()
def test_cropping_stops_at_padding(models):
    """The last columns of a right-padded batch are not the same tokens in all rows."""
    model = models("hybrid")
    (short, long), next_ids = random_rows(0, [12, 14]), torch.stack(random_rows(1, [3, 3]))
    input_ids, attention_mask = pad([short, long], "right")
    longer_mask = torch.cat([attention_mask, torch.ones_like(next_ids)], dim=1)

    def filled():
        cache = DynamicCache(config=model.config)
        model(input_ids, attention_mask=attention_mask, cache=cache)
        return cache

    with pytest.raises(RuntimeError, match="only the last 0 are known to hold a token"):
        filled().crop(-1)
    cache = filled()
    model(next_ids, attention_mask=longer_mask, cache=cache)
    with pytest.raises(RuntimeError, match="only the last 3 are known to hold a token"):
        copy.deepcopy(cache).crop(-4)
    cache.crop(-2)
    logits = model(next_ids[:, 1:], attention_mask=longer_mask, cache=cache).logits
    for row, ids in enumerate((short, long)):
        assert_close(logits[row], model(torch.cat([ids, next_ids[row]])[None]).logits[0, -2:])


def test_cache_of_another_model(models):
    cache = DynamicCache()
    for layer_idx in range(4):
        cache.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), layer_idx)
    with pytest.raises(ValueError, match="start from an empty"):
        models("hybrid")(random_rows(0, [3])[0][None], cache=cache)


def test_a_long_window_is_full_attention(models, golden_model):
    config = golden_model.config.to_dict()
    config["text_config"].update(layer_types=["sliding_attention"] * 4, sliding_window=64)
    windowed = TTTOmniForCausalLM(TTTOmniConfig(**config)).eval()
    windowed.load_state_dict({k: v for k, v in golden_model.state_dict().items() if ".ttt" not in k})
    ids = random_rows(0, [60])[0][None]
    with torch.no_grad():
        assert_close(windowed(ids).logits, golden_model(ids).logits)  # its gate is 0


def test_window_is_bounded_and_keeps_the_sinks(models):
    model = models("windowed")
    cache = DynamicCache(config=model.config)
    sizes = set()
    with torch.no_grad():
        for ids in random_rows(0, [40] * 5):
            model(ids[None], cache=cache)
            sizes.add(sum(layer.keys.numel() for layer in cache.layers if layer.keys is not None))
            places = cache.layers[0].places[0].tolist()
            assert places[:2] == [0, 1]
            assert places[2:] == list(range(cache.get_seq_length() - 8, cache.get_seq_length()))
    assert len(sizes) == 1


def test_angles_at_position_10_million(golden_model):
    rotary = golden_model.model.language_model.rotary_emb
    position = torch.tensor([[10_000_019]])
    cos, sin = rotary(torch.zeros(1, dtype=torch.float64), position)
    angles = position.double() * rotary.inv_freq.double()
    assert_close(cos[0, 0], torch.cat([angles, angles], -1).cos()[0], 1e-9)
    assert_close(sin[0, 0], torch.cat([angles, angles], -1).sin()[0], 1e-9)


# Generation


@ALL_LAYERS
def test_a_batch_answers_as_each_alone(models, golden, layers):
    model = models(layers)
    prompt = expand(model, golden["input_ids"])[0]
    questions = [torch.cat([row, prompt]) for row in random_rows(0, [9, 1, 4])]
    features = torch.stack([golden["mel"].T * scale for scale in (1.0, 0.5, 0.8)])
    input_ids, attention_mask = pad(questions, "left")
    kwargs = {"max_new_tokens": 12, "return_audio": True, "do_sample": False, "eos_token_id": None}
    batch = model.generate(input_ids, attention_mask=attention_mask, input_features=features, **kwargs)
    for row, question in enumerate(questions):
        alone = model.generate(question[None], input_features=features[row : row + 1], **kwargs)
        assert torch.equal(batch.sequences[row, -12:], alone.sequences[0, -12:])
        assert torch.equal(batch.units[row], alone.units[0])
        assert_close(batch.waveform[row], alone.waveform[0], 1e-5)


@ALL_LAYERS
def test_chunked_prefill(models, golden, layers):
    model = models(layers)
    inputs = {"input_ids": expand(model, golden["input_ids"]), "input_features": golden["mel"].T[None]}
    config = GenerationConfig(max_new_tokens=10, do_sample=False)
    expected = model.generate(**inputs, generation_config=config)
    for chunk_size in (7, 64):
        config = GenerationConfig(max_new_tokens=10, do_sample=False, prefill_chunk_size=chunk_size)
        assert torch.equal(model.generate(**inputs, generation_config=config), expected)


@ALL_LAYERS
def test_beam_search_equals_brute_force(models, layers):
    """Every hypothesis of every step scored anew, without a cache."""
    model = models(layers)
    prompt = random_rows(11, [11])[0]  # none of whose continuations is audio
    beams, steps = 3, 6
    hypotheses = [(0.0, prompt)]
    for _ in range(steps):
        with torch.no_grad():
            logits = model(torch.stack([ids for _, ids in hypotheses])).logits[:, -1].log_softmax(-1)
        candidates = [
            (score + float(row[token]), torch.cat([ids, token[None]]))
            for (score, ids), row in zip(hypotheses, logits)
            for token in row.topk(2 * beams).indices
        ]
        hypotheses = sorted(candidates, key=lambda candidate: -candidate[0])[:beams]
    output = model.generate(
        prompt[None],
        num_beams=beams,
        num_return_sequences=beams,
        max_new_tokens=steps,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_scores=True,
        return_audio=True,
    )
    for (score, ids), found, found_score, units in zip(
        hypotheses, output.sequences, output.sequences_scores, output.units
    ):
        assert torch.equal(found, ids)
        assert_close(found_score, torch.tensor(score / steps), 1e-4)
        with torch.no_grad():
            states = model(ids[None]).last_hidden_state[0, len(prompt) - 1 : -1]
        assert torch.equal(units, model.speak(states))


def test_two_windows_per_row_and_several_sequences(models, golden):
    """Each row keeps its own windows when rows are repeated."""
    model = models("hybrid")
    prompts = [expand(model, torch.tensor([384, -200, 20, -200, 30 + row])) for row in range(2)]
    features = torch.stack([golden["mel"].T * scale for scale in (1.0, 0.5, 0.8, 0.3)])
    kwargs = {"max_new_tokens": 4, "num_beams": 2, "num_return_sequences": 2, "do_sample": False, "eos_token_id": None}
    both = model.generate(torch.cat(prompts), input_features=features, **kwargs)
    for row in range(2):
        alone = model.generate(prompts[row], input_features=features[2 * row : 2 * row + 2], **kwargs)
        assert torch.equal(both[2 * row : 2 * row + 2], alone)


def test_end_of_sequence(models):
    """After its end a row says nothing; a row that ends at once says nothing at all; text prompts are answered too."""
    model = models("hybrid")
    prompts = torch.stack(random_rows(5, [8, 8, 8]))
    kwargs = {"max_new_tokens": 8, "return_audio": True, "do_sample": False}
    free = model.generate(prompts, eos_token_id=None, **kwargs)
    answers = free.sequences[:, 8:].tolist()
    ends = {answers[0][0], answers[1][4]}
    output = model.generate(prompts, eos_token_id=list(ends), pad_token_id=9, **kwargs)
    lengths = [next((i + 1 for i, t in enumerate(answer) if t in ends), 8) for answer in answers]
    assert lengths[0] == 1 and output.units[0].numel() == 0 and output.waveform[0].numel() == 0
    for row in (1, 2):
        assert output.sequences[row, 8 : 8 + lengths[row]].tolist() == answers[row][: lengths[row]]
        with torch.no_grad():
            whole = torch.cat([prompts[row], free.sequences[row, 8 : 8 + lengths[row] - 1]])
            states = model(whole[None]).last_hidden_state[0, 7:]
        assert torch.equal(output.units[row], model.speak(states))


def test_sampling_and_plain_generation(models):
    model = models("hybrid")
    prompt = random_rows(5, [8])[0][None]
    torch.manual_seed(0)
    sampled = model.generate(prompt, do_sample=True, max_new_tokens=6, num_return_sequences=3, eos_token_id=None)
    assert isinstance(sampled, torch.Tensor) and sampled.shape == (3, 14)
    assert len({tuple(row) for row in sampled.tolist()}) > 1


def test_another_model_may_not_assist(models):
    with pytest.raises(ValueError, match="No other model may assist"):
        models("hybrid").generate(random_rows(0, [5])[0][None], assistant_model=models("hybrid"), max_new_tokens=3)


def test_speech_asked_of_a_model_without(golden_model):
    config = golden_model.config.to_dict()
    config.update(audio_config=None, speech_decoder_config=None, vocoder_config=None)
    model = TTTOmniForCausalLM(TTTOmniConfig(**config))
    prompt = random_rows(0, [5])[0][None]
    assert model.generate(prompt, max_new_tokens=2, eos_token_id=None).shape == (1, 7)
    with pytest.raises(ValueError, match="no speech decoder"):
        model.generate(prompt, return_audio=True)
    with pytest.raises(ValueError, match="no audio encoder"):
        model.generate(prompt, input_features=torch.zeros(1, 128, 3000))


def test_generation_mode(models):
    """As Transformers' pipelines ask for speech."""
    model, prompt = models("hybrid"), random_rows(0, [5])[0][None]
    kwargs = {"max_new_tokens": 4, "do_sample": False}
    assert model.output_modalities == ("text", "audio")
    spoken = model.generate(prompt, **kwargs, return_audio=True)
    output = model.generate(prompt, **kwargs, generation_mode="audio")
    assert torch.equal(output.waveform[0], spoken.waveform[0])
    assert torch.equal(model.generate(prompt, **kwargs, generation_mode="text"), spoken.sequences)
    with pytest.raises(ValueError, match="got 'image'"):
        model.generate(prompt, **kwargs, generation_mode="image")


def test_placeholders_that_do_not_fit(golden_model, golden):
    input_ids = expand(golden_model, golden["input_ids"])[:, :-200]
    with pytest.raises(ValueError, match="placeholders for 300 audio embeddings"):
        golden_model(input_ids, input_features=golden["mel"].T[None])


# Conversations


def three_turns(model, golden):
    """Three spoken questions: ids of each turn, and the mel of each."""
    turns = [expand(model, torch.tensor([384, 20 + i, -200, 30 + 3 * i, 40])) for i in range(3)]
    return turns, [(golden["mel"].T * scale)[None] for scale in (1.0, 0.5, 0.8)]


def converse(model, turns, features, cache=None, history=None, start=0):
    """Answers of turns from `start` on, with the cache carried over, or recomputed at each turn where it is None."""
    kwargs = {"max_new_tokens": 6, "return_audio": True, "do_sample": False, "eos_token_id": None}
    answers = []
    for turn in range(start, len(turns)):
        history = turns[turn] if history is None else torch.cat([history, turns[turn]], dim=1)
        output = model.generate(
            history,
            attention_mask=torch.ones_like(history),
            input_features=torch.cat(features[: turn + 1]),
            cache=cache,
            **kwargs,
        )
        history = output.sequences
        answers.append((history, output.units[0]))
    return answers


@ALL_LAYERS
def test_a_conversation_may_reuse_its_cache(models, golden, layers):
    model = models(layers)
    turns, features = three_turns(model, golden)
    recomputed = converse(model, turns, features)
    reused = converse(model, turns, features, cache=DynamicCache(config=model.config))
    for (ids, units), (expected_ids, expected_units) in zip(reused, recomputed):
        assert torch.equal(ids, expected_ids)
        assert torch.equal(units, expected_units)


@pytest.mark.parametrize("layers", ["mixed", "windowed"])
def test_a_conversation_may_go_on_in_another_process(models, golden, layers, goldens, tmp_path):
    model = models(layers)
    turns, features = three_turns(model, golden)
    cache = DynamicCache(config=model.config)
    whole = converse(model, turns, features, cache=cache)
    cache = DynamicCache(config=model.config)
    (history, _), _ = converse(model, turns[:2], features, cache=cache)[-1], None
    model.save_memory(tmp_path / "memory.safetensors", cache, input_ids=history)
    model.save_pretrained(tmp_path / "model")
    program = f"""
import sys, torch
sys.path.insert(0, {str(goldens.parent.parent)!r})
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from test_modeling import converse, three_turns
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r}, trust_remote_code=True)
turns, features = three_turns(model, load_file({str(goldens / "golden.safetensors")!r}))
memory = model.load_memory({str(tmp_path / "memory.safetensors")!r})
(ids, units), = converse(model, turns, features, memory.cache, memory.input_ids, start=2)
print(ids.tolist(), units.tolist())
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    ids, units = whole[-1]
    assert result.stdout.strip().splitlines()[-1] == f"{ids.tolist()} {units.tolist()}"


@ALL_LAYERS
def test_memory_on_disk(models, layers, tmp_path):
    model = models(layers)
    ids, next_ids = random_rows(0, [20, 5])
    cache = DynamicCache(config=model.config)
    path = tmp_path / "memory.safetensors"
    with torch.no_grad():
        model(ids[None], cache=cache)
        model.save_memory(path, cache, input_ids=ids[None])
        memory = model.load_memory(path)
        loaded = model(next_ids[None], cache=memory.cache).logits
        assert torch.equal(loaded, model(next_ids[None], cache=cache).logits)
    assert torch.equal(memory.input_ids, ids[None])
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_memory_that_is_refused(models, tmp_path):
    model = models("hybrid")
    cache = DynamicCache(config=model.config)
    path = tmp_path / "memory.safetensors"
    with pytest.raises(ValueError, match="empty"):
        model.save_memory(path, cache)
    model(random_rows(0, [20])[0][None], cache=cache)
    model.save_memory(path, cache)
    content = path.read_bytes()
    with pytest.raises(ValueError, match="another model"):
        models("replace").load_memory(path)
    with pytest.raises(FileNotFoundError):
        model.load_memory(tmp_path / "missing.safetensors")
    layer = model.model.language_model.layers[0]
    weight = layer.mlp.up_proj.weight.data.clone()
    layer.mlp.up_proj.weight.data.mul_(1.5)
    with pytest.raises(ValueError, match="another model"):
        model.load_memory(path)
    layer.mlp.up_proj.weight.data.copy_(weight)
    for damage in (content[:-1], content[: len(content) // 2], b"", b"text", content[:-9] + b"\x01" + content[-8:]):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match="damaged|no conversation"):
            model.load_memory(path)
