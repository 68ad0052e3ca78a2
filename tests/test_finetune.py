# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard, RepoUrl
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from short_stages import EXAMPLES, TEXTS, losses, shorten
from transformers import AutoModelForCausalLM, TrainingArguments

from ttt_omni import TTTOmniProcessor, ttt_lora_config
from ttt_omni.commands.cli import main
from ttt_omni.training import (
    ConversationCollator,
    ConversationDataset,
    arguments,
    distill_stage,
    stages,
    truncation,
)


def parse(*words):
    return stages.parse([str(word) for word in words])


def train(*words):
    return stages.train(*parse(*words))


@pytest.fixture(scope="module")
def stage(tmp_path_factory, tiny_model_dir, spoken_corpus):
    """A short stage in the form of those in `examples/stages`, whose corpus has text beside the speech."""
    folder = tmp_path_factory.mktemp("stage")
    manifest = spoken_corpus.with_name("mixed.jsonl")
    manifest.write_text("\n".join([*TEXTS, *spoken_corpus.read_text().splitlines()]))
    values = {
        "model": str(tiny_model_dir),
        "manifest": str(manifest),
        "length": 512,
        "loss": "lm",
        "drop_audio_padding": True,
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 3e-2,
        "memory_learning_rate": 6e-2,
        "lr_scheduler_type": "constant",
    }
    shorten(EXAMPLES / "stages" / "8k.yaml", folder / "stage.yaml", **values)
    return folder / "stage.yaml"


@pytest.fixture(scope="module")
def unkilled(stage, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unkilled") / "adapter"
    train(stage, f"--output_dir={folder}")
    return folder


def test_loss_falls(unkilled):
    curve = losses(unkilled)
    assert len(curve) == 4 and curve[-1] < 0.8 * curve[0], curve


def test_card_names_the_base_and_the_stage(unkilled, tiny_model_dir):
    card = ModelCard.load(unkilled / "README.md")
    assert card.data.base_model == str(tiny_model_dir) and card.data.library_name == "peft"
    assert "| tokens | 512 |" in card.text


def test_killed_and_resumed_run_ends_the_same(unkilled, stage, tmp_path):
    folder = tmp_path / "adapter"
    command = [sys.executable, "-m", "ttt_omni", "finetune", str(stage), f"--output_dir={folder}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (folder / "checkpoint-2" / "trainer_state.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / "adapter_model.safetensors").exists()
    subprocess.run(command, check=True, capture_output=True)
    assert losses(folder) == pytest.approx(losses(unkilled), rel=1e-5)
    resumed, straight = (load_file(path / "adapter_model.safetensors") for path in (folder, unkilled))
    for name, tensor in straight.items():
        torch.testing.assert_close(resumed[name], tensor, atol=1e-5, rtol=1e-4)


def test_adapter_on_the_hub(stage, tiny_model_dir, tmp_path, monkeypatch):
    """A folder stands for the Hub, from whose cache the base comes."""
    cache, hub = tmp_path / "cache" / "models--me--base", tmp_path / "hub"
    (cache / "snapshots").mkdir(parents=True)
    (cache / "snapshots" / "1").symlink_to(tiny_model_dir)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache.parent))

    def upload_folder(self, *, repo_id, folder_path, ignore_patterns, **kwargs):
        shutil.copytree(folder_path, hub / repo_id, ignore=shutil.ignore_patterns(*ignore_patterns))

    monkeypatch.setattr(
        HfApi, "create_repo", lambda self, repo_id, **kwargs: RepoUrl(f"https://huggingface.co/{repo_id}")
    )
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    overrides = [
        "--model=me/base",
        "--push_to_hub=true",
        "--hub_model_id=me/adapter",
        "--hub_strategy=end",
        "--max_steps=1",
    ]
    train(stage, f"--output_dir={tmp_path / 'adapter'}", *overrides)

    card = ModelCard.load(hub / "me" / "adapter" / "README.md")
    assert card.data.base_model == "me/base" and "| tokens | 512 |" in card.text and "PeftModel" in card.text
    base = AutoModelForCausalLM.from_pretrained("me/base")
    model = PeftModel.from_pretrained(base, hub / "me" / "adapter")
    assert model.peft_config["default"].base_model_name_or_path == "me/base"


def test_next_stage_goes_on_from_the_last_one(stage, unkilled, tiny_model_dir, tmp_path):
    overrides = [
        f"--output_dir={tmp_path}",
        f"--previous={unkilled}",
        "--length=1024",
        "--max_steps=1",
        "--save_steps=10",
    ]
    trainer = train(stage, *overrides)
    first = trainer.state.log_history[0]["loss"]
    assert first < 0.8 * losses(unkilled)[0]
    assert max(len(item["input_ids"]) for item in trainer.train_dataset) > 512
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), tmp_path)
    assert model.peft_config["default"].r == 4


def test_groups_of_parameters(stage, tmp_path):
    trainer = train(stage, f"--output_dir={tmp_path}", "--max_steps=1")
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    groups = [(group["initial_lr"], names[id(p)]) for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len(groups) == sum(p.requires_grad for p in trainer.model.parameters())
    for learning_rate, name in groups:
        assert learning_rate == (6e-2 if ".ttt." in name or ".ttt_gate." in name else 3e-2), name


@pytest.mark.parametrize("loss", ["both", "ctc"])
def test_loss_of_speech(stage, spoken_corpus, tmp_path, loss):
    overrides = [
        f"--output_dir={tmp_path}",
        "--max_steps=1",
        f"--loss={loss}",
        f"--manifest={spoken_corpus}",
        "--length=800",
    ]
    trainer = train(stage, *overrides)
    gate = trainer.model.get_parameter(
        "base_model.model.model.language_model.layers.3.ttt_gate.modules_to_save.default.weight"
    )
    assert gate.any()


# Truncated backpropagation


AUDIO, TEXT, ANSWER = range(3)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.data())
def test_pieces(length, data):
    config = SimpleNamespace(audio_token_id=AUDIO, audio_downsample=5)
    kinds, position_ids, windows = [], [], []
    for _ in range(data.draw(st.integers(1, 3))):
        start = len(kinds)
        for _ in range(data.draw(st.integers(1, 3))):
            speech = data.draw(st.lists(st.integers(1, 12), max_size=3))
            windows += speech
            question, answer = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 30))
            kinds += [TEXT] + [AUDIO] * sum(speech) + [TEXT] * question + [ANSWER] * answer
        position_ids += range(len(kinds) - start)
    kinds = torch.tensor(kinds)
    batch = {
        "input_ids": kinds[None],
        "labels": torch.where(kinds == ANSWER, kinds, -100)[None],
        "position_ids": torch.tensor(position_ids)[None],
    }
    if windows:
        batch["input_features"] = torch.zeros(len(windows), 1, 200)
        batch["input_features_mask"] = torch.arange(200) < 10 * torch.tensor(windows)[:, None]
    window = torch.full_like(kinds, -1)
    window[kinds == AUDIO] = torch.repeat_interleave(torch.arange(len(windows)), torch.tensor(windows, dtype=int))
    pieces = truncation.find_pieces(batch, length, config)
    assert [piece.stop for piece in pieces] == [*(piece.start for piece in pieces[1:]), len(kinds)]

    def may_cut(t):
        return position_ids[t] == 0 or (kinds[t] != ANSWER and (window[t] < 0 or window[t] != window[t - 1]))

    for piece in pieces:
        assert may_cut(piece.start)
        inner = [t for t in range(piece.start + 1, piece.stop) if may_cut(t)]
        assert piece.stop - piece.start <= length or not inner
        assert all(position_ids[t] > 0 for t in inner)
        if piece.stop < len(kinds) and position_ids[piece.stop] > 0:  # the next one would not have fitted
            following = [t for t in range(piece.stop + 1, len(kinds)) if may_cut(t)]
            assert min(following, default=len(kinds)) - piece.start > length


@pytest.fixture(scope="module")
def trainer_and_batch(stage, tiny_model_dir, tmp_path_factory):
    """A trainer of a model whose memory takes part, and two conversations in a row, spoken and not."""
    overrides = [
        "--loss=both",
        "--activation_checkpointing=false",
        f"--output_dir={tmp_path_factory.mktemp('truncated')}",
    ]
    stage_arguments, arguments = parse(stage, *overrides)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir).double()
    for layer in base.model.language_model.layers[2:]:
        layer.ttt_gate.weight.data.fill_(0.5)
    lines = Path(stage_arguments.manifest).read_text().splitlines()
    manifest = Path(stage_arguments.manifest).with_name("two.jsonl")
    manifest.write_text("\n".join([*lines[:4], *lines[-2:], *lines[4:8]]))
    processor = TTTOmniProcessor.from_pretrained(tiny_model_dir)
    dataset = ConversationDataset(manifest, processor, base.config, 400, {"drop_audio_padding": True})
    batch = ConversationCollator(3, packing=True)([dataset[0], dataset[1]])
    assert len(dataset) == 2 and len(batch["unit_labels"]) == 11 and len(batch["input_features"]) == 3
    model = get_peft_model(base, ttt_lora_config(base, rank=2))
    base.model.language_model.norm.weight.requires_grad_()
    trainer = stages.StageTrainer(model, arguments, stage=stage_arguments)
    trainer.current_gradient_accumulation_steps = 1
    return trainer, batch


def step(trainer, batch, length):
    """Loss and gradients of one training step."""
    trainer.stage.backpropagate_length = length
    trainer.model.zero_grad()
    (batch,), num_items_in_batch = trainer.get_batch_samples(iter([batch]), 1, "cpu")
    loss = trainer.training_step(trainer.model, dict(batch), num_items_in_batch)
    return loss, {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def test_loss_of_pieces_is_that_of_the_whole(trainer_and_batch, monkeypatch):
    trainer, batch = trainer_and_batch
    loss, gradients = step(trainer, batch, None)

    def error(others, name):
        return (others[name] - gradients[name]).norm() / gradients[name].norm().clamp(min=1e-6)

    whole_loss, whole = step(trainer, batch, 400)  # sequence by sequence
    torch.testing.assert_close(whole_loss, loss, rtol=1e-6, atol=0)
    assert whole.keys() == gradients.keys() and max(error(whole, name) for name in gradients) < 1e-5

    truncated_loss, truncated = step(trainer, batch, 60)
    torch.testing.assert_close(truncated_loss, loss, rtol=1e-6, atol=0)
    late = [name for name in gradients if ".norm." in name or "layers.3.mlp" in name]  # no later piece reads these
    assert len(late) == 7 and max(error(truncated, name) for name in late) < 1e-5
    early = [name for name in gradients if "ttt.k_proj" in name or "inner_model" in name or "self_attn.v" in name]
    assert len(early) == 12 and max(error(truncated, name) for name in early) > 0.1

    def forget(cache, detach=truncation._detach):
        detach(cache)
        for layer in cache.layers[2:]:
            layer.ttt_state = None

    monkeypatch.setattr(truncation, "_detach", forget)
    assert (step(trainer, batch, 60)[0] - loss).abs() > 1e-3


def test_activations_of_a_piece_are_freed(trainer_and_batch):
    trainer, batch = trainer_and_batch
    kept, passes = weakref.WeakSet(), []

    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor
            kept.add(self)

    def before_a_piece(module, args, kwargs):
        gc.collect()
        passes.append((kwargs["cache"].get_seq_length(), len(kept)))

    model = trainer.model.base_model.model.model.language_model
    hook = model.register_forward_pre_hook(before_a_piece, with_kwargs=True)
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        step(trainer, batch, 60)
    hook.remove()
    lengths, num_kept = zip(*passes)
    assert lengths.count(0) == 2 and max(lengths) > 200 and not any(num_kept), passes


def test_bad_arguments(stage, tmp_path):
    output = f"--output_dir={tmp_path / 'adapter'}"
    with pytest.raises(ValueError, match="`loss` must be one of both, lm, ctc, got 'asr'"):
        parse(stage, "--loss=asr", output)
    for name in ("backpropagate_length", "length", "rank", "loss_chunk_size"):
        with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
            parse(stage, f"--{name}=0", output)
    with pytest.raises(ValueError, match="needs `packing: true`"):
        parse(stage, "--backpropagate_length=8", "--no_packing", output)
    with pytest.raises(ValueError, match="needs `activation_checkpointing: false`"):
        parse(stage, "--backpropagate_length=8", output)
    with pytest.raises(ValueError, match="An adapter on the Hub needs a base there"):
        train(stage, "--push_to_hub", output)
    with pytest.raises(ValueError, match="too few conversations with `units` for `loss=ctc`"):
        train(stage, "--loss=ctc", output, "--max_steps=1")


@pytest.mark.parametrize("path", sorted((EXAMPLES / "stages").glob("*.yaml")), ids=lambda path: path.stem)
def test_stages_are_valid(path, tmp_path):
    overrides = ["--model=x", "--manifest=y", f"--output_dir={tmp_path}"]
    stage, arguments = parse(path, *overrides)
    assert stage.length == 1024 * (64 if path.stem == "65k" else int(path.stem.removesuffix("k")))
    assert arguments.activation_checkpointing and stage.memory_learning_rate > arguments.learning_rate


# The command


@pytest.mark.parametrize("module, recipe", [(stages, "8k"), (distill_stage, "logits")])
def test_help_lists_all_fields(module, recipe, capsys):
    with pytest.raises(SystemExit) as exit:
        module.parse(["--help"])
    text = capsys.readouterr().out
    assert exit.value.code == 0 and "example" in text and recipe in text
    stage_class = distill_stage.DistillationArguments if module is distill_stage else stages.StageArguments
    for field in [*fields(stage_class), *fields(TrainingArguments)]:
        assert f"--{field.name}" in text or not field.init, field.name


def test_missing_fields_are_named_in_one_line(capsys):
    for words, missing in (
        ([], ["--model", "--manifest", "--length", "--output_dir"]),
        (["8k", "--model=x"], ["--manifest", "--output_dir"]),
    ):
        with pytest.raises(SystemExit) as exit:
            parse(*words)
        (line,) = capsys.readouterr().err.splitlines()
        assert exit.value.code == 2 and line.startswith("ttt-omni: error: the following arguments are required: ")
        assert re.findall(r"(?<![/`])--[a-z_]+", line.partition(". See")[0]) == missing


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    path = tmp_path / "stage.yaml"
    path.write_text(
        "model: a\nmanifest: b\nlength: 512\nrank: 8\nlearning_rate: 1e-4\npacking: false\nsave_strategy: no\n"
        "warmup_steps: 3\noptim_target_modules: [q, v]\nlr_scheduler_type: cosine\nprevious: null\n"
    )
    for words in (
        [path, "--rank=2", "--model", "c"],
        ["--rank=2", "--model=c", path],
        ["--model=c", "--rank=2", path],
    ):
        stage, arguments = parse(*words, "--save_steps=7", f"--output_dir={tmp_path}")
        assert (stage.model, stage.manifest, stage.length, stage.rank, stage.packing) == ("c", "b", 512, 2, False)
        assert stage.previous is None and stage.loss == "both"
        assert (arguments.learning_rate, arguments.save_steps, arguments.warmup_steps) == (1e-4, 7, 3)
        assert arguments.save_strategy == "no" and arguments.lr_scheduler_type == "cosine"
        assert arguments.optim_target_modules == ["q", "v"] and not arguments.remove_unused_columns
    assert parse(path, "--packing", f"--output_dir={tmp_path}")[0].packing
    assert parse("16k", "--model=a", "--manifest=b", f"--output_dir={tmp_path}")[0].length == 16384


def assert_fails(capsys, message, *words, status=1):
    """With one line."""
    with pytest.raises(SystemExit) as exit:
        main(["finetune", *map(str, words)])
    *_, line = capsys.readouterr().err.splitlines()
    assert exit.value.code == status and line.startswith("ttt-omni: error: ") and message in line, line


def test_what_a_user_can_get_wrong(stage, tiny_model_dir, spoken_corpus, tmp_path, capsys):
    path = tmp_path / "wrong.yaml"
    good = {
        "model": str(tiny_model_dir),
        "manifest": str(spoken_corpus),
        "length": 512,
        "output_dir": str(tmp_path / "a"),
    }
    for name, value, message in (
        ("lenght", 512, "wrong.yaml: unknown field `lenght`, did you mean `length`?"),
        ("length", "many", "wrong.yaml: `length` is 'many', expected int."),
        ("length", [1, 2], "wrong.yaml: `length` is [1, 2], expected int."),
        ("length", 1.5, "wrong.yaml: `length` is 1.5, expected int."),
        ("length", None, "wrong.yaml: `length` is None, expected int."),
        ("packing", "maybe", "wrong.yaml: `packing` is 'maybe', expected bool."),
        ("model", {"a": 1}, "wrong.yaml: `model` is {'a': 1}, expected str."),
        ("learning_rate", "fast", "wrong.yaml: `learning_rate` is 'fast', expected float."),
        ("lr_scheduler_type", "cosin", "cosin is not a valid SchedulerType"),
        ("model", str(tmp_path / "none"), "none is neither a folder with a config.json nor found on the Hub."),
        ("model", str(tiny_model_dir / "llama-omni"), "llama-omni is no TTT-Omni model but 'omni_speech2s_llama'"),
        ("manifest", str(tmp_path / "none"), f"The manifest {tmp_path / 'none'} does not exist."),
        ("eval_manifest", str(tmp_path / "none"), f"The manifest {tmp_path / 'none'} does not exist."),
        ("eval_strategy", "steps", "`eval_strategy: steps` needs an `eval_manifest`."),
        ("previous", str(tiny_model_dir), "holds no adapter"),
        ("output_dir", str(path), "File exists"),
        ("output_dir", str(path / "a"), "Not a directory"),
    ):
        path.write_text(yaml.safe_dump({**good, name: value}))
        assert_fails(capsys, message, path)
    for text in ("a: [", "- a", "just text", ""):
        path.write_text(text)
        assert_fails(capsys, "wrong.yaml", path)
    assert_fails(capsys, "9k is neither a YAML file nor one of ours: 8k, ", "9k")
    output = f"--output_dir={tmp_path / 'a'}"
    unknown = "unrecognized arguments: --lenght=3, did you mean `length`?"
    assert_fails(capsys, unknown, stage, output, "--lenght=3", status=2)
    assert_fails(capsys, "--length: invalid int value: 'x'", stage, output, "--length=x", status=2)
    assert not (tmp_path / "a" / "adapter_model.safetensors").exists()


def test_bfloat16_only_where_the_device_has_it(tmp_path, monkeypatch):
    words = ["8k", "--model=a", "--manifest=b", f"--output_dir={tmp_path}", "--use_cpu"]
    assert not parse(*words)[1].bf16
    assert parse(*words, "--bf16")[1].bf16  # as asked for
    monkeypatch.setattr(arguments, "find_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(arguments, "is_torch_bf16_gpu_available", lambda: False)
    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda self: None)
    _, parsed = parse(*words[:-1])
    assert not parsed.bf16 and not parsed.use_cpu
    monkeypatch.setattr(arguments, "is_torch_bf16_gpu_available", lambda: True)
    assert parse(*words[:-1])[1].bf16


def test_a_bfloat16_model_trains_in_float32_without_autocast(stage, tiny_model_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.bfloat16)
    shutil.copytree(tiny_model_dir, tmp_path / "half", ignore=shutil.ignore_patterns("*.safetensors", "llama-omni"))
    model.save_pretrained(tmp_path / "half")
    trainer = train(stage, f"--model={tmp_path / 'half'}", f"--output_dir={tmp_path / 'a'}", "--max_steps=1")
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    trainer = train(stage, f"--model={tmp_path / 'half'}", f"--output_dir={tmp_path / 'b'}", "--max_steps=1", "--bf16")
    trained, kept = (
        {p.dtype for p in trainer.model.parameters() if p.requires_grad is grad} for grad in (True, False)
    )
    assert trained == {torch.float32} and torch.bfloat16 in kept


# The log


@torch.no_grad()
def parts_of(model, batch):
    """Losses of text and speech of all that is in the batch, by the model's own means."""
    output = model(**batch)
    return output.lm_loss.item(), output.ctc_loss.item()


def test_log_has_the_parts_of_the_loss(stage, tiny_model_dir, spoken_corpus, tmp_path):
    """Over two steps of two batches each, which change nothing."""
    lines = spoken_corpus.read_text().splitlines()
    manifest = spoken_corpus.with_name("four.jsonl")
    manifest.write_text("\n".join([*lines[:3], lines[0]]))
    words = ["--loss=both", f"--manifest={manifest}", f"--eval_manifest={manifest}", "--length=125"]
    words += ["--learning_rate=0", "--memory_learning_rate=0", "--logging_steps=2", "--max_steps=2"]
    words += ["--per_device_train_batch_size=1", "--per_device_eval_batch_size=1", f"--output_dir={tmp_path}"]
    trainer = train(stage, *words)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    items = [trainer.train_dataset[index] for index in range(len(trainer.train_dataset))]
    assert len(items) == 4  # one epoch
    collate = ConversationCollator(3, packing=True)
    steps = []
    log, evaluation = trainer.state.log_history[0], trainer.state.log_history[-1]

    # Whatever the order: text's and speech's means over the batches of each step, as one packed batch has them.
    pairs = [(0, 1, 2, 3), (0, 2, 1, 3), (0, 3, 1, 2)]
    for a, b, c, d in pairs:
        two = [parts_of(model, collate([items[i], items[j]])) for i, j in ((a, b), (c, d))]
        steps.append([sum(parts) / 2 for parts in zip(*two)])
    found = log["lm_loss"], log["ctc_loss"]
    assert any(found == pytest.approx(step, rel=1e-4) for step in steps), (found, steps)
    weight = model.config.speech_decoder_config.ctc_loss_weight
    assert log["loss"] == pytest.approx(found[0] + weight * found[1], rel=1e-4)

    alone = [parts_of(model, collate([item])) for item in items]
    lm_loss, ctc_loss = (sum(parts) / 4 for parts in zip(*alone))
    assert (evaluation["eval_lm_loss"], evaluation["eval_ctc_loss"]) == pytest.approx((lm_loss, ctc_loss), rel=1e-4)
    assert evaluation["eval_loss"] == pytest.approx(lm_loss + weight * ctc_loss, rel=1e-4)


def test_a_penalty_on_what_is_written(stage, tmp_path):
    """The loss has the mean write strength times its weight, and a graft trained with it writes less."""
    strengths = {}
    for penalty in (0, 10):
        words = ["--activation_checkpointing=false", f"--write_penalty={penalty}", "--logging_steps=1"]
        trainer = train(stage, f"--output_dir={tmp_path / str(penalty)}", *words)
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        for entry in log:
            added = penalty * entry.get("write_strength", 0)
            assert entry["loss"] == pytest.approx(entry["lm_loss"] + added, rel=1e-3)
        with stages.record_write_strengths(trainer.model) as found, torch.no_grad():
            trainer.model(torch.arange(40)[None] + 10)
        assert len(found) == 2 and found[0].shape == (1, 40, 4)
        strengths[penalty] = torch.stack(found).mean()
        assert ("write_strength" in log[0]) == (penalty > 0)
    assert strengths[10] < 0.8 * strengths[0]
    with pytest.raises(ValueError, match="`write_penalty` needs"):
        parse(stage, f"--output_dir={tmp_path}", "--write_penalty=1")


def test_evaluation_on_the_way(stage, spoken_corpus, tmp_path):
    words = ["--eval_strategy=steps", "--eval_steps=2", f"--eval_manifest={spoken_corpus}", f"--output_dir={tmp_path}"]
    trainer = train(stage, *words, "--load_best_model_at_end", "--metric_for_best_model=eval_lm_loss")
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "eval_lm_loss" in entry] == [2, 4]
    assert not any("ctc_loss" in name for entry in log for name in entry)  # of text alone, as the stage is
    best = min(entry["eval_lm_loss"] for entry in log if "eval_lm_loss" in entry)
    assert trainer.state.best_metric == best
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-5)
