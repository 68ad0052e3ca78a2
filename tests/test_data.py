# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
import copy
import json
import shutil

import numpy as np
import pytest
import soundfile
import torch
from layouts import CHATML, write_tokenizer
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    PreTrainedTokenizerFast,
    WhisperFeatureExtractor,
)

from ttt_omni import TTTOmniProcessor, processing_ttt_omni
from ttt_omni.conversion.backbone import make_chat_template
from ttt_omni.training import ConversationCollator, ConversationDataset, ManifestError


@pytest.fixture(scope="module")
def processor(tiny_model_dir):
    return AutoProcessor.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="module")
def config(tiny_model_dir):
    return AutoConfig.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="module")
def dataset(spoken_corpus, processor, config):
    return ConversationDataset(spoken_corpus, processor, config)


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        for layer in model.model.language_model.layers[2:]:
            layer.ttt_gate.weight.fill_(0.5)  # so that a memory of other sequences would show
    return model


def conversation(*turns, **fields):
    roles = ("human", "gpt")
    turns = [{"from": roles[i % 2], "value": turn} for i, turn in enumerate(turns)]
    return {"conversations": turns} | fields


def spoken(path, units=None, value="Yes."):
    record = conversation("<speech>", value, speech=path)
    if units is not None:
        record["conversations"][1]["units"] = units
    return record


# What is read


def test_labels_are_the_answers(dataset, processor):
    item = dataset[3]
    text = processor.decode(item["input_ids"][item["labels"] != -100])
    assert text == "I heard tone 3 in turn 0.<|eot_id|>I heard tone 3 in turn 1.<|eot_id|>"
    assert torch.equal(item["labels"][item["labels"] != -100], item["input_ids"][item["labels"] != -100])
    assert item["input_features"].shape == (2, 128, 3000)
    assert [answer.tolist() for answer in item["unit_labels"]] == [[21, 24, 27, 30, 33, 36, 39, 42]] * 2


def test_prompt_is_the_original_one(tmp_path, golden_model_dir, goldens):
    shutil.copyfile(goldens.parents[2] / "examples" / "question.wav", tmp_path / "question.wav")
    question = "<speech>\nPlease directly answer the questions in the user's speech."
    (tmp_path / "one.jsonl").write_text(json.dumps(conversation(question, "Yes.", speech="question.wav")))
    config = AutoConfig.from_pretrained(golden_model_dir)
    item = ConversationDataset(tmp_path / "one.jsonl", AutoProcessor.from_pretrained(golden_model_dir), config)[0]
    golden = json.loads((goldens / "prompt_golden.json").read_text())["prompt_ids_with_speech_at_minus_200"]
    golden = [i for token in golden for i in ([config.audio_token_id] * 300 if token == -200 else [token])]
    assert item["input_ids"].tolist()[: len(golden)] == golden
    assert (item["labels"][: len(golden)] == -100).all() and (item["labels"][len(golden) :] != -100).all()


def test_labels_are_those_that_the_template_marks(dataset, spoken_corpus, processor):
    """LLaMA-Omni's prompt says itself which tokens are an answer's."""
    for item, line in zip(dataset, spoken_corpus.read_text().splitlines()):
        record = json.loads(line)
        speech = iter([record["speech"]] if isinstance(record["speech"], str) else record["speech"])
        messages = [
            {
                "role": "user",
                "content": [
                    {"type": "audio", "audio": str(spoken_corpus.parent / next(speech))},
                    {"type": "text", "text": turn["value"].removeprefix("<speech>\n")},
                ],
            }
            if turn["from"] == "human"
            else {"role": "assistant", "content": turn["value"]}
            for turn in record["conversations"]
        ]
        inputs = processor.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            sanitize_control_tokens=False,
        )
        is_answer = torch.as_tensor(inputs["assistant_masks"])[0].bool()
        assert torch.equal(item["input_ids"], inputs["input_ids"][0])
        assert torch.equal(item["labels"], item["input_ids"].masked_fill(~is_answer, -100))
        assert torch.equal(item["input_features"], inputs["input_features"])


THINKING = CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n' }}")
TEMPLATES = {"ChatML": CHATML, "a space before answers": CHATML.replace("'\n' + message", "'\n ' + message")}


def chatml_processor(folder, template=CHATML):
    write_tokenizer(folder, ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|audio|>"], template)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    template = make_chat_template(tokenizer, "<|audio|>", folder)
    extractor = WhisperFeatureExtractor(feature_size=80)
    return TTTOmniProcessor(extractor, tokenizer, "<|audio|>", chat_template=template)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_labels_by_any_template(tmp_path, spoken_corpus, config, template):
    """One that does not mark answers: the prompt is that of inference, and each answer what comes behind it."""
    processor = chatml_processor(tmp_path, template)
    (tmp_path / "t.jsonl").write_text(json.dumps(conversation("Hi", " Ho\n", "And\n<b>?", "No, no.", "Oh", "Yes")))
    dataset = ConversationDataset(tmp_path / "t.jsonl", processor, config)
    answers = ["Ho", "No, no.", "Yes"]
    messages = []
    for question, answer in zip(["Hi", "And\n<b>?", "Oh"], answers):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    item = dataset[0]
    whole = processor.apply_chat_template(messages)
    assert whole == processor.decode(item["input_ids"]) + "\n"  # behind the last answer's end
    begin = " " if "a space" in next(name for name, other in TEMPLATES.items() if other == template) else ""
    said = item["labels"][item["labels"] != -100]
    assert processor.decode(said) == "".join(f"{begin}{answer}<|im_end|>" for answer in answers)
    assert (item["labels"] == item["input_ids"])[item["labels"] != -100].all()

    length = len(item["input_ids"])
    ConversationDataset(tmp_path / "t.jsonl", processor, config, join_to_length=length)
    with pytest.raises(ManifestError, match=f"has {length} tokens"):
        ConversationDataset(tmp_path / "t.jsonl", processor, config, join_to_length=length - 1)

    item = ConversationDataset(spoken_corpus, processor, config)[3]
    text = processor.decode(item["input_ids"]).replace("<|audio|>" * 300, "<|audio|>")
    question = f"<|im_end|>\n<|im_start|>user\n{begin}<|audio|>\nPlease directly answer.<|im_end|>\n"
    assert text.count(question[len("<|im_end|>\n") :]) == 2 and question in text
    assert processor.decode(item["labels"][item["labels"] != -100]) == "".join(
        f"{begin}I heard tone 3 in turn {turn}.<|im_end|>" for turn in (0, 1)
    )
    assert item["input_features"].shape == (2, 80, 3000)


def test_a_template_without_labels(tmp_path, spoken_corpus, config):
    with pytest.raises(ValueError, match="does not write an answer behind its own prompt"):
        ConversationDataset(spoken_corpus, chatml_processor(tmp_path, THINKING), config)


def test_each_recording_is_read_once(spoken_corpus, dataset, monkeypatch):
    opened, read = [], processing_ttt_omni.read_audio
    monkeypatch.setattr(
        processing_ttt_omni, "read_audio", lambda audio, *args: (opened.append(audio), read(audio, *args))[1]
    )
    dataset[3]
    assert opened == [str(spoken_corpus.parent / f"3-{turn}.wav") for turn in (0, 1)]


def test_items_are_read_when_taken(tmp_path, processor, config):
    soundfile.write(tmp_path / "a.wav", np.zeros(1600), 16000)
    manifest = tmp_path / "lazy.jsonl"
    manifest.write_text("\n".join(json.dumps(r) for r in (conversation("Hi", "Ho"), spoken("a.wav"))) + "\n\n")
    dataset = ConversationDataset(manifest, processor, config)
    (tmp_path / "a.wav").unlink()
    assert len(dataset) == 2
    assert processor.decode(dataset[0]["input_ids"]).endswith("Ho<|eot_id|>")
    assert "input_features" not in dataset[0]
    with pytest.raises(FileNotFoundError, match="a.wav"):
        dataset[1]


def test_joined_conversations(spoken_corpus, processor, config, dataset):
    lengths = [len(item["input_ids"]) for item in dataset]
    joined = ConversationDataset(spoken_corpus, processor, config, join_to_length=lengths[3] + 100)
    assert joined.groups == [(0, 2), (2, 3), (3, 4)] and joined.num_spoken == 4
    assert [len(joined[i]["input_ids"]) for i in (1, 2)] == lengths[2:]
    assert len(joined[0]["input_ids"]) < sum(lengths[:2])  # the system prompt comes once
    item = joined[0]
    assert len(item["unit_labels"]) == len(item["input_features"]) == 2
    assert processor.decode(item["input_ids"]).count("<|begin_of_text|>") == 2  # the doubled one of one conversation

    short = {"processor_kwargs": {"drop_audio_padding": True}}
    last = len(ConversationDataset(spoken_corpus, processor, config, **short)[3]["input_ids"])
    assert last < lengths[3]
    ConversationDataset(spoken_corpus, processor, config, join_to_length=last, **short)
    with pytest.raises(ManifestError, match=rf"line 4: the conversation has {last} tokens"):
        ConversationDataset(spoken_corpus, processor, config, join_to_length=last - 1, **short)
    with pytest.raises(ManifestError, match=rf"line 4: the conversation has {lengths[3]} tokens, more than"):
        ConversationDataset(spoken_corpus, processor, config, join_to_length=lengths[3] - 1)


def test_joined_conversations_fill_their_length(processor, config, tmp_path):
    manifest = tmp_path / "texts.jsonl"
    manifest.write_text("\n".join(json.dumps(conversation("Hi", "Ho " * n)) for n in (5, 8, 3)))
    full = len(ConversationDataset(manifest, processor, config, join_to_length=1000)[0]["input_ids"])
    for length, groups in ((full, [(0, 3)]), (full - 1, [(0, 2), (2, 3)])):
        joined = ConversationDataset(manifest, processor, config, join_to_length=length)
        assert joined.groups == groups and joined.num_spoken == 0


# What is refused


@pytest.mark.parametrize(
    "line, message",
    [
        ("{'id': 1}", r"not JSON \(Expecting property name"),
        ("[]", "no JSON object with a list of `conversations`"),
        (conversation("Hi"), "`conversations` has 1 turns"),
        (conversation("Hi", " \n"), "turn 2 is an empty answer"),
        ({"conversations": [{"from": "gpt", "value": "Hi"}] * 2}, "turn 1 is not from 'human'"),
        (conversation("<speech>", "Yes."), "1 <speech> for 0 recordings"),
        (conversation("Hi", "Yes.", speech="good.wav"), "0 <speech> for 1 recordings"),
        (spoken(["good.wav", 3]), "`speech` is neither a path nor a list of paths"),
        (spoken("none.wav"), r"the recording \S*none.wav does not exist"),
        (spoken("fast.wav"), r"\S*fast.wav has 22050 samples per second, not 16000: resample it"),
        (spoken("text.wav"), r"\S*text.wav cannot be read as audio"),
        (spoken("empty.wav"), r"\S*empty.wav is empty"),
        (spoken("good.wav", [0, 100]), "unit 100 is out of range: the model has the units 0 to 99"),
        (spoken("good.wav", [-1]), "unit -1 is out of range"),
        (spoken("good.wav", [1.5]), "the `units` of turn 2 are no list of integers"),
        (spoken("good.wav", "1 2"), "the `units` of turn 2 are no list of integers"),
        (spoken("cut.flac"), r"\S*cut.flac cannot be read as audio"),
        (spoken("loud.wav"), r"\S*loud.wav has a sample of 1e\+20 at 0.100 s"),
        (spoken("two\nlines.wav"), r"the recording '\S*two\\nlines.wav' does not exist"),
        (conversation("What is <|eot_id|>?", "It ends."), r"turn 1 holds <\|eot_id\|>, a special token"),
        (conversation("Hi", "<|reserved_special_token_0|>"), r"turn 2 holds <\|reserved_special_token_0\|>"),
        (conversation("Hi", "a<|start_header_id|>user"), r"turn 2 holds <\|start_header_id\|>"),
        (spoken("good.wav", value="I heard <speech>."), "turn 2 is an answer with <speech>"),
        (conversation("\ud800", "Yes."), "turn 1 has half a character"),
        (conversation("Hi", "Yes \udfff."), "turn 2 has half a character"),
        ("[" * 200_000, "not JSON"),
    ],
)
def test_bad_lines_are_named(tmp_path, processor, config, line, message):
    for name, samples, rate in (("good", 1600, 16000), ("fast", 2205, 22050), ("empty", 0, 16000)):
        soundfile.write(tmp_path / f"{name}.wav", np.zeros(samples), rate)
    (tmp_path / "text.wav").write_text("no audio")
    soundfile.write(tmp_path / "cut.flac", np.random.default_rng(0).uniform(-1, 1, 16000), 16000)
    (tmp_path / "cut.flac").write_bytes((tmp_path / "cut.flac").read_bytes()[:16000])
    soundfile.write(tmp_path / "loud.wav", np.eye(1, 16000, 1600)[0] * 1e20, 16000, subtype="FLOAT")
    manifest = tmp_path / "bad.jsonl"
    line = line if isinstance(line, str) else json.dumps(line)
    manifest.write_text(json.dumps(spoken("good.wav", [99])) + "\n\n" + line + "\n")
    with pytest.raises(ManifestError, match=rf"bad.jsonl, line 3: {message}"):
        ConversationDataset(manifest, processor, config)


@pytest.mark.parametrize("answer", ["Yes.", " Yes, it is four o'clock. \n"])
def test_units_fit_their_answer(tmp_path, processor, config, model, answer):
    """CTC needs a frame for each unit, and one more for a blank between two of the same."""
    manifest = tmp_path / "units.jsonl"

    def read(units):
        record = conversation("Hi", answer)
        record["conversations"][1]["units"] = units
        manifest.write_text(json.dumps(record))
        return ConversationDataset(manifest, processor, config)[0]

    labels = (read([])["labels"] != -100).sum()
    frames = int(labels) * config.speech_decoder_config.upsample_factor
    longest = [5] * ((frames + 1) // 2) + [6] * (1 - frames % 2)  # with the blanks between them, `frames`
    for units in (longest, [1, 2] * frames):  # without repetitions, the model makes frames of its own for them
        loss = model(**ConversationCollator(3)([read(units)])).ctc_loss
        assert loss.isfinite() and loss > 0
    for units in (longest + [7], [5, *longest], [1, 2] * frames + [2]):
        message = rf"line 1: an answer of {labels} tokens has {len(units)} units, of which \d+ repeat the one before"
        with pytest.raises(ManifestError, match=message):
            read(units)


def sound(path, seconds, **kwargs):
    samples = np.zeros(int(16000 * seconds), np.float32)
    samples[:16000] = 0.1 * np.random.default_rng(0).standard_normal(16000)
    soundfile.write(path, samples, 16000, **kwargs)
    return bytearray(path.read_bytes())


def unsized_mp3(path):
    data = sound(path, 35, bitrate_mode="VARIABLE", compression_level=0.5)
    path.write_bytes(data[data.index(data[:2], 50) :])  # without the frame that says how many there are


def unsized_flac(path):
    data = sound(path, 35)
    data[21:26] = bytes([data[21] & 0xF0, 0, 0, 0, 0])
    path.write_bytes(data)


def unsized_wav(path):
    data = sound(path, 35)
    data[40:44] = bytes(4)
    path.write_bytes(data)


@pytest.mark.parametrize("name, write", [("a.mp3", unsized_mp3), ("a.flac", unsized_flac), ("a.wav", unsized_wav)])
def test_speech_is_counted_rather_than_announced(tmp_path, processor, config, name, write):
    write(tmp_path / name)
    (tmp_path / "m.jsonl").write_text(json.dumps(spoken(name)))
    announced = soundfile.info(tmp_path / name).duration
    assert not 30 < announced < 60
    for kwargs in ({}, {"processor_kwargs": {"drop_audio_padding": True}}):
        length = len(ConversationDataset(tmp_path / "m.jsonl", processor, config, **kwargs)[0]["input_ids"])
        ConversationDataset(tmp_path / "m.jsonl", processor, config, join_to_length=length, **kwargs)
        with pytest.raises(ManifestError, match=f"the conversation has {length} tokens"):
            ConversationDataset(tmp_path / "m.jsonl", processor, config, join_to_length=length - 1, **kwargs)


def test_headers_of_wavs_are_enough(tmp_path, processor, config, monkeypatch):
    sound(tmp_path / "a.wav", 2)
    sound(tmp_path / "b.flac", 2)
    read = []
    monkeypatch.setattr(
        soundfile.SoundFile, "read", lambda file, *_, **__: read.append(file.format) or np.zeros((0, 1))
    )
    (tmp_path / "m.jsonl").write_text(json.dumps(spoken("a.wav")))
    ConversationDataset(tmp_path / "m.jsonl", processor, config)
    assert not read
    (tmp_path / "m.jsonl").write_text(json.dumps(spoken("b.flac")))
    with pytest.raises(ManifestError, match="b.flac is empty"):
        ConversationDataset(tmp_path / "m.jsonl", processor, config)
    assert read == ["FLAC"]


def test_a_model_without_ears_or_mouth(spoken_corpus, processor, config, tmp_path):
    deaf, dumb = copy.deepcopy(config), copy.deepcopy(config)
    deaf.audio_config = dumb.speech_decoder_config = None
    with pytest.raises(ManifestError, match="line 1: the model has no audio encoder"):
        ConversationDataset(spoken_corpus, processor, deaf)
    with pytest.raises(ManifestError, match="line 1: the model has no speech decoder"):
        ConversationDataset(spoken_corpus, processor, dumb)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ManifestError, match="has no conversations"):
        ConversationDataset(tmp_path / "empty.jsonl", processor, config)
    with pytest.raises(FileNotFoundError):
        ConversationDataset(tmp_path / "none.jsonl", processor, config)


# Batches


def losses_and_gradients(model, batches):
    """The sum over batches, each weighed by its number of targets or units, and its gradient."""
    model.zero_grad()
    lm, ctc, tokens, units = 0, 0, 0, 0
    for batch in batches:
        output = model(**batch)
        num_tokens, num_units = (batch["labels"][:, 1:] != -100).sum(), (batch["unit_labels"] != -100).sum()
        lm, ctc = lm + output.lm_loss * num_tokens, ctc + output.ctc_loss * num_units
        tokens, units = tokens + num_tokens, units + num_units
    lm, ctc = lm / tokens, ctc / units
    (lm + ctc).backward()
    return lm.detach(), ctc.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_packed_and_padded_batches_equal_separate_sequences(dataset, model):
    model = copy.deepcopy(model).double()
    items = [dataset[i] for i in (3, 0)]
    separate = losses_and_gradients(model, [ConversationCollator(3)([item]) for item in items])
    packed = ConversationCollator(3, packing=True)(items)
    assert packed["input_ids"].shape[0] == 1 and "attention_mask" not in packed
    for batch in (packed, ConversationCollator(3)(items)):
        together = losses_and_gradients(model, [batch])
        torch.testing.assert_close(together[:2], separate[:2], atol=1e-4, rtol=1e-5)
        assert together[2].keys() == separate[2].keys()
        for name, gradient in separate[2].items():
            error = (together[2][name] - gradient).norm() / gradient.norm().clamp(min=1e-3)
            assert error < 1e-5, (name, error)


def test_chunked_loss(dataset, model):
    batch = ConversationCollator(3)([dataset[0], dataset[3]])
    outputs = [model(**batch, loss_chunk_size=size) for size in (None, 5)]
    assert outputs[0].logits is not None and outputs[1].logits is None
    torch.testing.assert_close(outputs[1].loss, outputs[0].loss)
    gradients = [torch.autograd.grad(output.lm_loss, model.lm_head.weight)[0] for output in outputs]
    torch.testing.assert_close(gradients[1], gradients[0])
    outputs = [model(**batch, loss_chunk_size=size, num_items_in_batch=100).lm_loss for size in (None, 5)]
    torch.testing.assert_close(outputs[1], outputs[0])


def test_golden_loss(goldens, golden_model_dir):
    """The loss of the original through the collator."""
    golden = load_file(goldens / "golden.safetensors")
    model = AutoModelForCausalLM.from_pretrained(golden_model_dir)
    audio = golden["input_ids"] == -200
    repeats = torch.where(audio, 300, 1)
    item = {
        "input_ids": torch.where(audio, model.config.audio_token_id, golden["input_ids"]).repeat_interleave(repeats),
        "labels": golden["labels"].repeat_interleave(repeats),
        "input_features": golden["mel"].T[None],
        "unit_labels": [golden["tgt_units"]],
    }
    for packing in (False, True):
        with torch.no_grad():
            loss = model(**ConversationCollator(3, packing)([item])).loss
        torch.testing.assert_close(loss.view(1), golden["total_loss"].view(1), atol=1e-3, rtol=0)
