# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
import itertools
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoConfig, AutoProcessor, HubertModel, Wav2Vec2FeatureExtractor, WhisperFeatureExtractor

import ttt_omni
from ttt_omni import TTTOmniConfig, TTTOmniForCausalLM
from ttt_omni.examples import extract_units, speak
from ttt_omni.training import ConversationDataset, ManifestError


EXAMPLES = Path(ttt_omni.__file__).parent / "examples"
QUESTION = "<speech>\nPlease directly answer the questions in the user's speech."
NASTY = """"Don't" 'say' $(touch pwned) `touch pwned`; touch pwned | {output} {voice} \\ * – ok"""

# A stand-in for a text-to-speech program: 10 ms of a tone per character, in stereo at 22,050 Hz.
PROGRAM = """
import json, sys
import numpy as np, soundfile
output, voice, *texts = sys.argv[1:]
text = texts[0] if texts else sys.stdin.buffer.read().decode()
with open("log.jsonl", "a") as log:
    log.write(json.dumps([voice, text]) + "\\n")
if "fail" in text:
    sys.exit("cannot say\\nthat")
if "nothing" in text:
    sys.exit()
tone = 0.27 * np.sin(0.03 * (np.arange(220 * len(text) * ("silence" not in text)) + len(text)))
soundfile.write(output, np.stack([tone, tone], axis=1), 22050)
"""


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "program.py").write_text(PROGRAM)
    return shlex.join([sys.executable, "program.py", "{output}", "{voice}"])


def write_texts(path, *conversations):
    """A file of conversations, each given as its texts, with an empty line between them."""
    roles = ("human", "gpt")
    turns = [[{"from": roles[i % 2], "value": text} for i, text in enumerate(texts)] for texts in conversations]
    path.write_text("\n\n".join(json.dumps({"conversations": conversation}) for conversation in turns))
    return path


def said(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# Speech


def test_spoken_conversations(command, tmp_path):
    conversations = (NASTY, "Yes."), ("Hi\n there", "-h", "And?", "No."), ("Hello", "Ho")
    texts = write_texts(tmp_path / "texts.jsonl", *conversations)
    options = ["--command", command, "--voices", "a b", "c", "--answer-voice", "d"]
    subprocess.run([sys.executable, EXAMPLES / "speak.py", texts, "spoken", *options], check=True, capture_output=True)
    turns = [["a b", NASTY], ["d", "Yes."], ["c", "Hi there"], ["d", "-h"], ["c", "And?"], ["d", "No."]]
    turns += [["a b", "Hello"], ["d", "Ho"]]
    assert said(tmp_path) == [[voice, f"{text}\n"] for voice, text in turns]

    lines = [json.loads(line) for line in (tmp_path / "spoken" / "corpus.jsonl").read_text().splitlines()]
    questions = [lines[0]["speech"], *lines[1]["speech"], lines[2]["speech"]]
    spoken = [turn for line in lines for turn in line["conversations"]]
    assert [turn["value"] for turn in spoken[1::2]] == ["Yes.", "-h", "No.", "Ho"]
    assert [turn["value"] for turn in spoken[::2]] == [QUESTION] * 4
    recordings = [path for pair in zip(questions, (turn["speech"] for turn in spoken[1::2])) for path in pair]
    for path, (_, text) in zip(recordings, turns):
        info = soundfile.info(tmp_path / "spoken" / path)
        assert (info.samplerate, info.channels, info.subtype) == (16000, 1, "PCM_16")
        assert info.duration == pytest.approx(220 * (len(text) + 1) / 22050, abs=1e-3)
    assert {path.name for path in (tmp_path / "spoken").iterdir()} == {"corpus.jsonl", *recordings}
    assert {path.name for path in tmp_path.iterdir()} == {"program.py", "log.jsonl", "texts.jsonl", "spoken"}


@pytest.mark.parametrize("text", [NASTY, "-version"])
def test_text_as_an_argument(command, tmp_path, text):
    texts = write_texts(tmp_path / "texts.jsonl", (text, "Yes."))
    speak.speak(texts, tmp_path / "spoken", f"{command} {{text}}", ["v"], None)
    ((voice, heard),) = said(tmp_path)
    assert voice == "v" and heard.strip() == text and not heard.startswith("-")
    assert not (tmp_path / "pwned").exists()
    (line,) = (tmp_path / "spoken" / "corpus.jsonl").read_text().splitlines()
    assert "speech" not in json.loads(line)["conversations"][1]


def test_recordings_are_kept(command, tmp_path):
    folder = tmp_path / "spoken"

    def run(*conversations, voice="v"):
        speak.speak(write_texts(tmp_path / "texts.jsonl", *conversations), folder, command, [voice], None)

    with pytest.raises(ManifestError, match="line 3"):
        run(("One", "Yes."), ("Now fail", "Yes."))
    (kept,) = folder.iterdir()  # no manifest, and nothing half done
    run(("Zero", "Yes."), ("One", "Yes."), ("One", "No."))
    assert [text for _, text in said(tmp_path)] == ["One\n", "Now fail\n", "Zero\n"]
    manifest = (folder / "corpus.jsonl").read_text()
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*.wav")}
    assert manifest.count(kept.name) == 2
    run(("Zero", "Yes."), ("One", "Yes."), ("One", "No."))
    assert (folder / "corpus.jsonl").read_text() == manifest and len(said(tmp_path)) == 3
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    run(("One", "Yes."), voice="w")
    assert said(tmp_path)[3:] == [["w", "One\n"]]


@pytest.mark.parametrize(
    "texts, message",
    [
        (("Hi", "Ho", "Please fail", "Ho"), r"line 1: \S*python\S* exited with 1 for 'Please fail': cannot say that$"),
        (("Say nothing", "Ho"), r"line 1: \S*python\S* wrote no {output} for 'Say nothing': it said nothing\.$"),
        (("silence", "Ho"), r"line 1: \S*made.wav is empty"),
        (("Hi",), "line 1: `conversations` has 1 turns"),
        ((" ", "Ho"), "line 1: there is a turn without text"),
        ((QUESTION, "Ho"), "line 1: 1 <speech> for 0 recordings"),
        ((), "line 1: `conversations` has 0 turns"),
        ("no json", "line 1: not JSON"),
        ("", "texts.jsonl has no conversations"),
        (None, "No such file.*texts.jsonl"),
    ],
)
def test_texts_that_cannot_be_spoken(command, tmp_path, monkeypatch, capsys, texts, message):
    path = tmp_path / "texts.jsonl"
    if isinstance(texts, str):
        path.write_text(texts)
    elif texts is not None:
        write_texts(path, texts)
    monkeypatch.setattr(sys, "argv", ["speak.py", str(path), "spoken", "--command", command])
    with pytest.raises(SystemExit, match=rf"^speak.py: error: .*{message}") as error:
        speak.main()
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("spoken/*.jsonl")) and not list(tmp_path.glob("spoken/.*"))


@pytest.mark.parametrize(
    "command, message",
    [
        ("no-such-program {output}", "no-such-program is not installed; install it, or name another"),
        ("echo {voice}", "has no {output}"),
        ("echo '{output}", "cannot be split into words: No closing quotation"),
    ],
)
def test_commands_that_will_not_do(tmp_path, command, message):
    texts = write_texts(tmp_path / "texts.jsonl", ("Hi", "Ho"))
    with pytest.raises((ValueError, OSError), match=message):
        speak.speak(texts, tmp_path / "spoken", command, ["v"], None)
    assert not (tmp_path / "spoken").exists()


def test_already_spoken(command, tmp_path):
    texts = write_texts(tmp_path / "texts.jsonl", (QUESTION, "Yes."))
    texts.write_text(json.dumps(json.loads(texts.read_text()) | {"speech": "a.wav"}))
    with pytest.raises(ManifestError, match="line 1: it has <speech> already"):
        speak.speak(texts, tmp_path / "spoken", command, ["v"], None)


def test_corpus_of_the_examples():
    lines = [line["conversations"] for _, line in speak.conversations(EXAMPLES / "conversations.jsonl")]
    assert len(lines) == 40 and sum(len(turns) > 2 for turns in lines) >= 5
    assert all(turn["value"].strip() for turns in lines for turn in turns)


# Units


@pytest.fixture(scope="module")
def hubert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hubert")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(EXAMPLES.parent / "benchmarks")
        from finetuning import make_speech_model
    make_speech_model(folder, num_layers=3)
    return folder


@pytest.fixture
def answers(tmp_path):
    """A manifest of two conversations, the first of two turns, whose second answer is unspoken; and the recordings."""
    noise = np.random.default_rng(0).standard_normal(42000)
    recordings = {"a.wav": 0.3 * noise[:8000], "b.wav": 0.1 * noise[8000:] + 0.2}
    for name, samples in recordings.items():
        soundfile.write(tmp_path / name, samples, 16000, subtype="FLOAT")
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "A", "speech": "a.wav"}]
    turns += [{"from": "human", "value": "<speech>"}, {"from": "gpt", "value": "–"}]
    lines = [{"id": "x", "speech": "a.wav", "conversations": turns}]
    lines.append({"conversations": [turns[0], {"from": "gpt", "value": "B", "speech": "b.wav"}]})
    manifest = tmp_path / "corpus.jsonl"
    manifest.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return manifest, {name: torch.from_numpy(samples).float() for name, samples in recordings.items()}


@pytest.fixture
def kmeans(tmp_path):
    path = tmp_path / "km.npy"
    np.save(path, np.random.default_rng(1).standard_normal((20, 32)).astype(np.float32))
    return path


@torch.no_grad()
def frames_by_hand(hubert, samples, layer, piece=None):
    """`[T, 32]`: each module of the model called in its turn, on each piece of the normalised samples."""
    model = HubertModel.from_pretrained(hubert).eval()
    samples = (samples - samples.mean()) / (samples.var(correction=0) + 1e-7).sqrt()
    frames = []
    for part in samples.split(piece or len(samples)):
        if len(part) >= 400:  # what a frame sees
            hidden = model.feature_projection(model.feature_extractor(part[None]).transpose(1, 2))
            hidden = model.encoder.layer_norm(hidden + model.encoder.pos_conv_embed(hidden))
            for block in model.encoder.layers[:layer]:
                hidden = block(hidden)
            frames.append(hidden[0])
    return torch.cat(frames)


def units_by_hand(frames, centroids):
    nearest = [int(((frame - centroids) ** 2).sum(1).argmin()) for frame in frames]
    return [unit for unit, _ in itertools.groupby(nearest)]


def units_in(manifest):
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    return [turn["units"] for line in lines for turn in line["conversations"] if "units" in turn]


@pytest.mark.parametrize("layer, piece", [(1, None), (3, None), (2, 16000)])
def test_units_equal_a_plain_computation(hubert, answers, kmeans, monkeypatch, layer, piece):
    """Pieces: of the second answer's 34,000 samples, two of 49 frames, and one of 6."""
    manifest, recordings = answers
    if piece is not None:
        monkeypatch.setattr(extract_units, "PIECE_SECONDS", piece // 16000)
    output = manifest.with_name("units.jsonl")
    extract_units.extract(manifest, output, str(hubert), layer, kmeans, fit=None)
    centroids = torch.from_numpy(np.load(kmeans))
    frames = [frames_by_hand(hubert, samples, layer, piece) for samples in recordings.values()]
    assert len(frames[0]) == 24 and len(frames[1]) == (106 if piece is None else 49 + 49 + 6)
    expected = [units_by_hand(answer, centroids) for answer in frames]
    assert units_in(output) == expected and len(set(expected[1])) > 3
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    for turn in (turn for line in lines for turn in line["conversations"]):
        turn.pop("units", None)
    assert lines == [json.loads(line) for line in manifest.read_text().splitlines()]


def test_a_piece_too_short_for_a_frame(hubert, tmp_path, monkeypatch):
    monkeypatch.setattr(extract_units, "PIECE_SECONDS", 1)
    samples = torch.randn(16399, generator=torch.Generator().manual_seed(0))
    soundfile.write(tmp_path / "a.wav", samples.numpy(), 16000, subtype="FLOAT")
    frames = extract_units.Encoder(str(hubert), 2)(tmp_path / "a.wav")
    torch.testing.assert_close(frames, frames_by_hand(hubert, samples, 2, 16000), atol=1e-5, rtol=1e-5)
    assert len(frames) == 49


def test_other_rates_and_channels(hubert, tmp_path):
    tone = np.sin(np.arange(16000) * 0.05)
    soundfile.write(tmp_path / "a.wav", tone, 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "b.wav", np.sin(np.arange(44100) * 0.05 * 16 / 44.1)[:, None].repeat(2, 1), 44100)
    frames = [extract_units.Encoder(str(hubert), 1)(tmp_path / name) for name in ("a.wav", "b.wav")]
    torch.testing.assert_close(frames[1][5:-5], frames[0][5:-5], atol=0.05, rtol=0.05)


@torch.no_grad()
def test_units_of_whisper(tiny_model_dir, answers, kmeans):
    manifest, recordings = answers
    output = manifest.with_name("units.jsonl")
    extract_units.extract(manifest, output, str(tiny_model_dir), 1, kmeans, fit=None, keep_frames=True)
    turns = [turn for line in output.read_text().splitlines() for turn in json.loads(line)["conversations"]]
    spoken = {turn["speech"]: turn for turn in turns if "units" in turn}

    tower = TTTOmniForCausalLM.from_pretrained(tiny_model_dir).model.audio_tower.eval()
    centroids = torch.from_numpy(np.load(kmeans))
    for name, samples in recordings.items():
        mel = WhisperFeatureExtractor(feature_size=128)(samples.numpy(), sampling_rate=16000, return_tensors="pt")
        states = torch.nn.functional.gelu(tower.conv1(mel.input_features))
        states = torch.nn.functional.gelu(tower.conv2(states)).transpose(1, 2) + tower.embed_positions.weight
        states = tower.layers[0](states, None)
        states = states[0] if isinstance(states, tuple) else states
        distances = ((states[0, : len(samples) // 320, None] - centroids) ** 2).sum(-1)  # [T, clusters]
        expected = distances.argmin(1).tolist()
        assert spoken[name]["frames"] == expected
        assert spoken[name]["units"] == [unit for unit, _ in itertools.groupby(expected)]


def test_a_model_that_does_not_hear_has_no_units(tmp_path, answers, kmeans):
    config = TTTOmniConfig(text_config={"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1})
    config.text_config.vocab_size = 10
    TTTOmniForCausalLM(config).save_pretrained(tmp_path / "deaf")
    with pytest.raises(ValueError, match="has no audio encoder"):
        extract_units.extract(answers[0], tmp_path / "units.jsonl", str(tmp_path / "deaf"), 1, kmeans, fit=None)


def test_units_are_trained_on(hubert, answers, kmeans, tiny_model_dir):
    manifest, _ = answers
    output = manifest.with_name("units.jsonl")
    extract_units.extract(manifest, output, str(hubert), 2, kmeans, fit=None)
    config, processor = (auto.from_pretrained(tiny_model_dir) for auto in (AutoConfig, AutoProcessor))
    dataset = ConversationDataset(output, processor, config)
    assert dataset.num_spoken == 1
    labels = [dataset[0]["unit_labels"][0].tolist(), dataset[0]["unit_labels"][1].tolist()]
    assert labels == [units_in(output)[0], []]


def test_sampled_frames():
    """5,000 of 20,000 frames, none twice, of which every tenth of them has about 500 (19 is a standard deviation)."""
    frames = np.arange(20000, dtype=np.float32)[:, None] * [1, -1]
    recordings = np.split(frames, (3, 400, 7000, 7001))
    sample = extract_units.sample_frames(recordings, 5000)
    assert sample.shape == (5000, 2) and (sample[:, 0] == -sample[:, 1]).all()
    assert len(np.unique(sample[:, 0])) == 5000
    counts, _ = np.histogram(sample[:, 0], bins=10, range=(0, 20000))
    assert 400 < counts.min() and counts.max() < 600
    assert np.array_equal(extract_units.sample_frames(recordings, 30000), frames)


def test_fitted_clusters(hubert, answers, tmp_path):
    pytest.importorskip("sklearn")
    manifest, recordings = answers
    output, kmeans = manifest.with_name("units.jsonl"), tmp_path / "fitted.npy"
    extract_units.extract(manifest, output, str(hubert), 2, kmeans, fit=12)
    centroids = torch.from_numpy(np.load(kmeans))
    assert centroids.shape == (12, 32)
    frames = [frames_by_hand(hubert, samples, 2) for samples in recordings.values()]
    assert units_in(output) == [units_by_hand(answer, centroids) for answer in frames]
    everything = torch.cat(frames)
    nearest = torch.cdist(everything, centroids).argmin(1)
    assert nearest.unique().numel() == 12
    spread = (everything - centroids[nearest]).square().sum()
    assert spread < 0.6 * (everything - everything.mean(0)).square().sum()
    with pytest.raises(ValueError, match="fitted.npy exists: name a new file, or leave out --fit"):
        extract_units.extract(manifest, output, str(hubert), 2, kmeans, fit=12)
    with pytest.raises(ValueError, match="200 clusters cannot be made of the 130 frames"):
        extract_units.extract(manifest, output, str(hubert), 2, tmp_path / "new.npy", fit=200)
    assert not (tmp_path / "new.npy").exists()


def test_fitting_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ValueError, match="needs scikit-learn .*pip install scikit-learn"):
        extract_units.fit_centroids(np.zeros((4, 2)), 2)


# Units, interrupted


@pytest.fixture
def many_answers(tmp_path):
    """A manifest of 40 answers of 2 s, and what makes all recordings others, under the same names."""

    def record(numbers, seed):
        for number in numbers:
            noise = np.random.default_rng([seed, number]).standard_normal(32000)
            soundfile.write(tmp_path / f"{number}.wav", 0.1 * noise, 16000)

    record(range(40), seed=0)
    manifest = tmp_path / "corpus.jsonl"
    question, answer = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}
    lines = [{"conversations": [question, answer | {"speech": f"{number}.wav"}]} for number in range(40)]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return manifest, record


@pytest.fixture
def interrupt(monkeypatch):
    """Makes units as `extract` does, but ends as by Ctrl-C when `number` recordings have been encoded."""

    def interrupt(number, *arguments, **options):
        def encode(self, path, encode=extract_units.Encoder.__call__):
            nonlocal number
            number -= 1
            if number < 0:
                raise KeyboardInterrupt
            return encode(self, path)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(extract_units.Encoder, "__call__", encode)
            extract_units.extract(*arguments, **options)

    return interrupt


def test_killed_and_resumed_units_are_the_same(hubert, many_answers, kmeans, monkeypatch):
    manifest, record = many_answers
    whole, output = manifest.with_name("whole.jsonl"), manifest.with_name("units.jsonl")
    partial = output.with_name("units.jsonl.partial")
    extract_units.extract(manifest, whole, str(hubert), 3, kmeans, fit=None)
    command = [str(EXAMPLES / "extract_units.py"), str(manifest), str(output)]
    command += ["--model", str(hubert), "--layer", "3", "--kmeans", str(kmeans)]
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (partial.exists() and partial.read_bytes().count(b"\n") > 3) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists()
    finished = partial.read_bytes().count(b"\n") - 1
    assert 3 <= finished < 40
    record(range(finished), seed=1)  # so that it would show if they were encoded again
    monkeypatch.setattr(sys, "argv", command)
    extract_units.main()
    assert output.read_bytes() == whole.read_bytes()
    assert not partial.exists() and not list(manifest.parent.glob(".*"))


@pytest.mark.parametrize("cut", [1, 30, 10000])
def test_half_a_line_is_made_again(interrupt, hubert, many_answers, kmeans, cut):
    """As where the disk was full: the last of three lines ends early, or all of them, and the settings, are lost."""
    manifest, _ = many_answers
    whole, output = manifest.with_name("whole.jsonl"), manifest.with_name("units.jsonl")
    partial = output.with_name("units.jsonl.partial")
    arguments = (str(hubert), 2, kmeans, None)
    extract_units.extract(manifest, whole, *arguments)
    interrupt(3, manifest, output, *arguments)
    text = partial.read_bytes()
    assert text.count(b"\n") == 4
    partial.write_bytes(text[:-cut])
    interrupt(10, manifest, output, *arguments)
    assert partial.read_bytes().startswith(text) and partial.read_bytes().count(b"\n") == (11 if cut == 10000 else 13)
    extract_units.extract(manifest, output, *arguments)
    assert output.read_bytes() == whole.read_bytes()


def test_fitted_and_interrupted(interrupt, hubert, many_answers, tmp_path):
    pytest.importorskip("sklearn")
    manifest, record = many_answers
    whole, output = manifest.with_name("whole.jsonl"), manifest.with_name("units.jsonl")
    extract_units.extract(manifest, whole, str(hubert), 2, tmp_path / "whole.npy", fit=8)
    fitted = (str(hubert), 2, tmp_path / "fitted.npy")
    interrupt(30, manifest, output, *fitted, fit=8)
    assert not fitted[2].exists() and not output.with_name("units.jsonl.partial").exists()
    interrupt(45, manifest, output, *fitted, fit=8)
    record(range(5), seed=1)
    with pytest.raises(ValueError, match="units.jsonl.partial was begun with another .* or --fit: repeat"):
        extract_units.extract(manifest, output, *fitted, fit=7)
    with pytest.raises(ValueError, match="units.jsonl.partial was begun with another file than .*new.npy: delete it"):
        extract_units.extract(manifest, output, str(hubert), 2, tmp_path / "new.npy", fit=8)
    extract_units.extract(manifest, output, *fitted, fit=8)
    assert output.read_bytes() == whole.read_bytes()


def test_begun_with_something_else(interrupt, hubert, many_answers, kmeans, tmp_path):
    manifest, _ = many_answers
    output, partial = manifest.with_name("units.jsonl"), manifest.with_name("units.jsonl.partial")
    interrupt(3, manifest, output, str(hubert), 2, kmeans, fit=None)
    begun = partial.read_bytes()

    def refused(match, manifest=manifest, model=hubert, layer=2, kmeans=kmeans):
        with pytest.raises(ValueError, match=match):
            extract_units.extract(manifest, output, str(model), layer, kmeans, fit=None)
        assert partial.read_bytes() == begun and not output.exists()

    settings = "units.jsonl.partial was begun with another model, --layer, --kmeans or --fit: repeat .*or delete it"
    refused(settings, layer=1)
    np.save(tmp_path / "other.npy", np.load(kmeans) + 0.01)
    refused(settings, kmeans=tmp_path / "other.npy")
    model = HubertModel.from_pretrained(hubert)
    with torch.no_grad():
        model.encoder.layers[0].final_layer_norm.bias[0] += 0.01
    shutil.copytree(hubert, tmp_path / "other")
    model.save_pretrained(tmp_path / "other")
    refused(settings, model=tmp_path / "other")
    shutil.copytree(hubert, tmp_path / "raw")
    Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(tmp_path / "raw")
    refused(settings, model=tmp_path / "raw")
    lines = manifest.read_text().splitlines(keepends=True)
    other = tmp_path / "other.jsonl"
    other.write_text("".join([lines[0], "\n", lines[2], lines[1], *lines[3:]]))
    refused("line 3: .*units.jsonl.partial was begun with another manifest, which had 1.wav in the", manifest=other)

    moved = shutil.copytree(hubert, tmp_path / "moved")
    other.write_text("".join(lines[:5]))  # as for a line that had to be left out
    extract_units.extract(other, output, str(moved), 2, kmeans, fit=None)
    assert len(units_in(output)) == 5 and not partial.exists()


# What has no units


@pytest.mark.parametrize(
    "change, message",
    [
        ({"output": "elsewhere/units.jsonl"}, "elsewhere/units.jsonl must be in the folder of .*corpus.jsonl"),
        ({"layer": "4"}, "has the layers 1 to 3, not 4"),
        ({"kmeans": "pickle.bin"}, "pickle.bin is no .npy file of centroids; --help says how"),
        ({"kmeans": "objects.npy"}, "objects.npy is no .npy file of centroids"),
        ({"kmeans": "narrow.npy"}, r"narrow.npy does not hold centroids of the shape \[clusters, 32\]"),
        ({"kmeans": "none.npy"}, "No such file.*none.npy"),
        ({"manifest": "short.jsonl"}, r"short.jsonl, line 2: \S*short.wav has 399 samples, too few for a unit"),
        ({"manifest": "lost.jsonl"}, "lost.jsonl, line 1: the recording lost.wav of an answer does not exist"),
        ({"manifest": "unspoken.jsonl"}, "unspoken.jsonl has no spoken answers"),
        ({"manifest": "bad.jsonl"}, "bad.jsonl, line 1: not JSON"),
    ],
)
def test_what_has_no_units(hubert, answers, kmeans, tmp_path, monkeypatch, capsys, change, message):
    monkeypatch.chdir(tmp_path)
    soundfile.write("short.wav", np.zeros(399), 16000)
    Path("pickle.bin").write_bytes(b"\x80\x04\x95 no numbers")
    np.save("objects.npy", np.array([{}]), allow_pickle=True)
    np.save("narrow.npy", np.zeros((20, 31)))
    line = answers[0].read_text().splitlines()[1]
    Path("short.jsonl").write_text("\n" + line.replace("b.wav", "short.wav"))
    Path("lost.jsonl").write_text(line.replace("b.wav", "lost.wav"))
    write_texts(Path("unspoken.jsonl"), ("Hi", "Ho"))
    Path("bad.jsonl").write_text("?")
    arguments = {"manifest": "corpus.jsonl", "output": "units.jsonl", "kmeans": "km.npy", "layer": "2"} | change
    words = [arguments.pop("manifest"), arguments.pop("output"), "--model", str(hubert)]
    words += [word for name, value in arguments.items() for word in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["extract_units.py", *words])
    before = set(tmp_path.iterdir())
    with pytest.raises(SystemExit, match=rf"^extract_units.py: error: .*{message}"):
        extract_units.main()
    assert set(tmp_path.iterdir()) - {tmp_path / "units.jsonl.partial"} == before


def test_a_model_of_spectrograms(tmp_path):
    from transformers import Speech2TextConfig, Speech2TextModel

    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 8, "max_source_positions": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    Speech2TextModel(Speech2TextConfig(**sizes, **heads, conv_channels=8)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="takes input_features: a model of waveforms, or Whisper, is needed"):
        extract_units.Encoder(str(tmp_path), 1)
