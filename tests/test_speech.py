# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""`ttt-omni evaluate speech`, by ears whose right answer is known."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Processor,
)

from ttt_omni.commands.cli import main
from ttt_omni.evaluation import run, speech
from ttt_omni.evaluation.speech import evaluate_speech, recognizer, repetition, say_alone, say_on


SENTENCES = ["It rained all day.", "Nobody went out!", "The cat slept on the chair, and the soup was cold.", "Was it?"]


@pytest.fixture(scope="module")
def loaded(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir), AutoProcessor.from_pretrained(tiny_model_dir)


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(SENTENCES))
    return tmp_path / "text.txt"


@pytest.fixture
def quick(monkeypatch):
    """A vocoder that says a tone a tenth of a second long for each sentence, and knows what units it got."""
    units = []

    def synthesize(model, found):
        units.append(found)
        return np.sin(np.arange(model.config.vocoder_config.sampling_rate // 10)).astype(np.float32)

    monkeypatch.setattr(speech, "_synthesize", synthesize)
    return units


def test_what_is_not_heard_was_said_all_the_same(loaded, quick):
    """After so many tokens the units are those of an answer that was heard from its beginning."""
    model, processor = loaded
    (whole,) = say_on(*loaded, itertools.cycle(SENTENCES), [], 2.95)
    expected, quick[:] = list(quick), []
    first, later = say_on(*loaded, itertools.cycle(SENTENCES), [150], 0.25)
    assert len(expected) == len(whole.texts) == 30 and len(quick) == 6
    assert first.texts == SENTENCES[:3] and 150 <= later.length < 400
    tokens = [len(processor.tokenizer(f" {text}", add_special_tokens=False)["input_ids"]) for text in SENTENCES]
    ends = list(itertools.accumulate(itertools.islice(itertools.cycle(tokens), 30), initial=-1))
    assert later.length in ends  # the first sentence has no space before it
    number = ends.index(later.length)
    assert later.texts == whole.texts[number - 3 : number]
    for found, units in zip(quick, expected[:3] + expected[number - 3 : number]):
        assert torch.equal(found, units)


def test_sentences_alone_are_answers_of_their_own(loaded, quick):
    piece = say_alone(*loaded, SENTENCES, 0.35)
    alone, quick[:] = list(quick), []
    assert piece.length == 0 and piece.texts == SENTENCES and len(piece.sounds) == 4
    for text, units in zip(SENTENCES, alone):
        next(say_on(*loaded, [text], [], 0.05))
        assert torch.equal(quick.pop(), units)


RATE = 16000


def tone(pitch, loudness=0.1):
    """Half a second of it, of which a fifth is silent."""
    sound = loudness * np.sin(np.arange(RATE // 2) * 2 * np.pi * pitch / RATE) * 2**0.5
    sound[:1600] = 0
    return sound.astype(np.float32)


@pytest.fixture
def judge(loaded, text, monkeypatch):
    """The rows of pieces of a pitch each, in which the sentences are heard as given."""

    def evaluate(pitches, heard, **kwargs):
        pieces = [
            speech.Piece(number, SENTENCES, [tone(pitch)] * len(SENTENCES), RATE)
            for number, pitch in enumerate(pitches)
        ]
        monkeypatch.setattr(speech, "say_alone", lambda *args: pieces[0])
        monkeypatch.setattr(speech, "say_on", lambda *args: iter(pieces[1:]))
        heard = itertools.chain.from_iterable(heard)
        return evaluate_speech(*loaded, text, lambda samples, rate: next(heard), [9], 1, **kwargs)

    return evaluate


def pitch_of(samples, rate):
    """A vector of length 1 that turns with the pitch."""
    angle = np.abs(np.fft.rfft(samples)).argmax() * rate / len(samples) / 1000
    return np.array([np.cos(angle), np.sin(angle)])


def test_who_is_understood_goes_on(judge):
    rows = judge([200, 200, 210], [SENTENCES] * 3, embed=pitch_of)
    assert [(row["length"], row["wer"], row["fell"]) for row in rows] == [(0, 0, []), (1, 0, []), (2, 0, [])]
    assert [row["similarity"] for row in rows] == pytest.approx([1, 1, np.cos(0.01)], abs=1e-3)
    for row in rows:
        assert row["minutes"] == pytest.approx(2 / 60)
        assert row["loudness"] == pytest.approx(0.1 * 0.8**0.5, rel=1e-3)
        assert row["silence"] == pytest.approx(0.2, abs=0.01) and row["repetition"] == 0


def test_who_is_no_longer_understood_is_stopped(judge):
    """One word wrong of 18 is not enough, and two more than at the start are."""
    wrong = ["It rained all day", "nobody went in", *SENTENCES[2:]]
    more = ["It drained all day", "nobody went in", SENTENCES[2], "Is it"]
    rows = judge([200] * 4, [SENTENCES, wrong, more, SENTENCES])
    assert [row["wer"] for row in rows] == pytest.approx([0, 1 / 20, 3 / 20])
    assert [row["fell"] for row in rows] == [[], [], ["words"]]
    assert [row["similarity"] for row in rows] == [None] * 3
    rows = judge([200] * 2, [[""] * 4] * 2)  # whom nobody understood from the start
    assert [row["wer"] for row in rows] == [1, 1] and not rows[-1]["fell"]


def test_who_gets_another_voice_is_stopped(judge):
    rows = judge([200, 800, 200], [SENTENCES] * 3, embed=pitch_of)
    assert [row["fell"] for row in rows] == [[], ["voice"]]


def test_who_says_the_same_again_and_again(judge):
    (row,) = judge([200], [["no it is not"] * 4])
    assert row["repetition"] == pytest.approx(repetition(" ".join(["no it is not"] * 4))) == 9 / 13
    assert repetition("one two three") == repetition("") == 0


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"lengths": []}, "`lengths` must be at least 1 token"),
        ({"seconds": 0}, "`seconds` must be positive"),
        ({"lengths": [10**9]}, "made for fewer tokens than the length of 1000000000"),
    ],
)
def test_what_will_not_do(loaded, text, kwargs, message):
    with pytest.raises(ValueError, match=message):
        evaluate_speech(*loaded, text, None, **kwargs)


def test_who_does_not_speak(loaded, text):
    mute = SimpleNamespace(speech_decoder=None, vocoder=None)
    with pytest.raises(ValueError, match="does not speak"):
        evaluate_speech(mute, loaded[1], text, None)


def test_command(tiny_model_dir, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "find_recognizer", lambda source, language: lambda samples, rate: "it rained")
    monkeypatch.setattr(run, "voice_encoder", lambda: None)
    words = ["evaluate", "speech", "--model", tiny_model_dir, "--text", text, "--recognizer", "ears"]
    words += ["--lengths", "60", "--seconds", "0.5", "--output", tmp_path / "out"]
    main([str(word) for word in words])
    captured = capsys.readouterr()
    assert "| length | minutes | wer |" in captured.out and "Resemblyzer" in captured.err
    result = json.loads((tmp_path / "out" / "speech.json").read_text())
    assert len(result["rows"]) == 3 and result["rows"][2]["length"] >= 60
    assert (tmp_path / "out" / "speech.png").read_bytes()[:4] == b"\x89PNG"


def test_recogniser_of_transformers(tmp_path):
    """One that says what it was made to say, of sound at any rate."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    kernels = {"conv_dim": (8, 8), "conv_kernel": (10, 8), "conv_stride": (40, 8), "num_conv_pos_embeddings": 8}
    model = Wav2Vec2ForCTC(Wav2Vec2Config(vocab_size=4, num_conv_pos_embedding_groups=2, **sizes, **kernels))
    model.lm_head.weight.data.zero_()
    model.lm_head.bias.data = torch.tensor([0.0, 0.0, 1.0, 0.0])
    model.save_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({"<pad>": 0, "<unk>": 1, "A": 2, "|": 3}))
    tokenizer = Wav2Vec2CTCTokenizer(tmp_path / "vocab.json", bos_token=None, eos_token=None)
    Wav2Vec2Processor(Wav2Vec2FeatureExtractor(), tokenizer).save_pretrained(tmp_path)
    recognize = recognizer(tmp_path)
    assert recognize(tone(200), RATE) == recognize(tone(200), 22050) == "A"
