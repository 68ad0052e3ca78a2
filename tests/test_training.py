# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""What a trainer gives `forward`, and what it gets back."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from ttt_omni.configuration_ttt_omni import TTTOmniSpeechDecoderConfig
from ttt_omni.modeling_ttt_omni import TTTOmniSpeechDecoder
from ttt_omni.processing_ttt_omni import TTTOmniProcessor
from ttt_omni.training import ConversationCollator, ConversationDataset


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="module")
def dataset(model, tiny_model_dir, spoken_corpus):
    return ConversationDataset(spoken_corpus, TTTOmniProcessor.from_pretrained(tiny_model_dir), model.config)


def test_predictions_are_logits(model, dataset, tmp_path):
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction)
        return {}

    arguments = TrainingArguments(tmp_path, per_device_eval_batch_size=1, report_to=[], remove_unused_columns=False)
    subset = torch.utils.data.Subset(dataset, [0])
    collator = ConversationCollator(0)
    Trainer(model, arguments, eval_dataset=subset, data_collator=collator, compute_metrics=compute_metrics).evaluate()
    (prediction,) = seen
    batch = collator([subset[0]])
    with torch.no_grad():
        logits = model.eval()(**batch).logits
    assert prediction.predictions.shape == logits.shape
    torch.testing.assert_close(torch.from_numpy(prediction.predictions), logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_placeholders_without_features(model, dataset, training):
    batch = ConversationCollator(0)([dataset[0]])
    features = {name: batch.pop(name) for name in ("input_features", "input_features_mask") if name in batch}
    placeholders = int((batch["input_ids"] == model.config.audio_token_id).sum())
    model.train(training)
    with pytest.raises(ValueError, match=f"{placeholders} audio placeholders and no `input_features`"):
        model(**batch)
    with torch.no_grad():
        assert model(**batch, **features).loss.isfinite()
        text = {name: batch[name] for name in ("input_ids", "attention_mask", "labels") if name in batch}
        text["input_ids"] = text["input_ids"].masked_fill(text["input_ids"] == model.config.audio_token_id, 5)
        assert model(**text).loss.isfinite()
    model.eval()


@torch.no_grad()
def test_placeholders_that_are_known(model, dataset):
    """Embeddings in place of ids, and a second turn whose first question is in the cache."""
    batch = ConversationCollator(0)([dataset[0]])
    inputs = {name: batch[name] for name in ("input_ids", "input_features", "input_features_mask") if name in batch}
    ids = inputs["input_ids"]
    model.eval()
    logits = model(**inputs).logits
    embeds = model.model.embed(**inputs)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, logits, rtol=0, atol=1e-5)

    greedy = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": 1}
    first = model.generate(**inputs, **greedy, return_dict_in_generate=True)
    history = torch.cat([first.sequences, torch.tensor([[7, 8, 9]])], dim=1)
    expected = model.generate(history, **{k: v for k, v in inputs.items() if k != "input_ids"}, **greedy)
    assert torch.equal(model.generate(history, cache=first.cache, **greedy), expected)
    text = ids[:, :8].masked_fill(ids[:, :8] == model.config.audio_token_id, 5)
    assert model.generate(text, **greedy).shape[1] > 8


def speech_decoder(dtype=torch.float32) -> TTTOmniSpeechDecoder:
    sizes = {"input_size": 6, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    torch.manual_seed(0)
    return TTTOmniSpeechDecoder(TTTOmniSpeechDecoderConfig(**sizes, unit_vocab_size=9, upsample_factor=3)).to(dtype)


def ctc_loss(decoder, units: list[list[int]], num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of responses of so many tokens, and its gradient by their hidden states."""
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(len(units), num_tokens, 6, generator=generator).requires_grad_()
    labels = torch.zeros(len(units), num_tokens, dtype=torch.long)
    longest = max(map(len, units))
    unit_labels = torch.tensor([row + [-100] * (longest - len(row)) for row in units])
    loss = decoder.ctc_loss(states, labels, unit_labels)
    loss.backward()
    return loss.detach(), states.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("units", [[5] * 7, [5, 5, 5, 6, 6, 6, 7, 7, 7], [1, 1], [1, 2, 3, 4, 5, 6, 7]])
def test_units_that_repeat(units, dtype):
    """Two tokens are 6 frames, and between two units that are the same must be a blank."""
    loss, gradient = ctc_loss(speech_decoder(dtype), [units], num_tokens=2)
    assert loss.dtype == torch.float32 and loss.isfinite() and loss > 0
    assert gradient.isfinite().all() and gradient.any(-1).all()


def test_one_alignment_is_left():
    """With just as many frames as are needed, the loss is that of the only path: unit, blank, unit, ..."""
    decoder, units = speech_decoder(), [5] * 7
    loss, _ = ctc_loss(decoder, [units], num_tokens=2)
    states = torch.randn(1, 2, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        scores = decoder(states, torch.tensor([2]), torch.tensor([13]))[0].log_softmax(-1)  # [13, 10]
    path = torch.tensor([unit for unit in units for unit in (unit, decoder.blank_id)][:-1])
    torch.testing.assert_close(loss, -scores.gather(1, path[:, None]).sum() / 7)


def test_repeats_of_one_row_change_no_other():
    """Frames are those of each row alone, and padding of units is no repeat."""
    decoder, rows = speech_decoder(), [[1, 2, 3], [4] * 9]
    states = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1))
    labels = torch.zeros(2, 4, dtype=torch.long)
    alone = [
        decoder.ctc_loss(states[i : i + 1], labels[:1], torch.tensor([units])) * len(units)
        for i, units in enumerate(rows)
    ]
    together = decoder.ctc_loss(states, labels, torch.tensor([rows[0] + [-100] * 6, rows[1]]))
    torch.testing.assert_close(together, sum(alone) / 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_units(dtype):
    decoder = speech_decoder(dtype)
    empty = torch.full((1, 3), -100)
    loss = decoder.ctc_loss(torch.randn(1, 4, 6), torch.zeros(1, 4).long(), empty)
    assert loss == 0 and loss.requires_grad and loss.dtype == torch.float32
    loss, gradient = ctc_loss(decoder, [[], [3, 3]], num_tokens=2)
    assert loss > 0 and not gradient[0].any() and gradient[1].any()
