# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""The README's and the model card's code runs as it stands, beside what `make demo` makes."""

import re
import shlex
from pathlib import Path

import pytest
import soundfile
import torch

from serving import running
from ttt_omni import TTTOmniForCausalLM, TTTOmniProcessor
from ttt_omni.commands.cli import _parser, main
from ttt_omni.training import distill_stage, stages


ROOT = Path(__file__).parent.parent


def code_blocks(document, language):
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture
def after_demo(tiny_model_dir, tmp_path, monkeypatch):
    (tmp_path / "demo").symlink_to(tiny_model_dir)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)


def test_python(after_demo, capsys, tmp_path):
    names = {}
    model = TTTOmniForCausalLM.from_pretrained("demo").eval()
    (tmp_path / "sessions").mkdir()
    with running(model, TTTOmniProcessor.from_pretrained("demo"), tmp_path / "sessions", name="demo") as (address, _):
        for block in code_blocks(ROOT / "README.md", "python"):
            exec(compile(block.replace("127.0.0.1:8000", address), "README.md", "exec"), names)
    assert names["answer"].choices[0].message.audio.data
    assert Path("converted/model.safetensors").exists()
    assert len(names["out"].waveform[0]) > 0 and len(names["play"]) > 0
    first, second = names["first"], names["second"]
    assert torch.equal(second.sequences[:, : first.shape[1]], first) and len(second.waveform[0]) > 0
    assert names["o"].shape == names["q"].shape


def test_model_card(golden_model_dir, after_demo, monkeypatch, tmp_path):
    (tmp_path / "question.wav").symlink_to(ROOT / "examples" / "question.wav")
    (block,) = code_blocks(golden_model_dir / "README.md", "python")
    names = {}
    block = block.replace("path/to/this/folder", str(golden_model_dir)).replace(
        "max_new_tokens=256", "max_new_tokens=8"
    )
    exec(compile(block, "model_card.md", "exec"), names)
    assert len(names["out"].waveform[0]) > 0


def test_shell(after_demo):
    readme = ROOT / "README.md"
    in_tables = re.findall(r"^\|.*`(ttt-omni .*)` \|$", readme.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(in_tables) == 6
    text = "\n".join([*code_blocks(readme, "sh"), *in_tables]).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in text.splitlines() if line]
    commands = [words[1:] for words in lines if words[0] == "ttt-omni"]
    for command in commands:
        _parser().parse_args(command)
    (answer,) = (command for command in commands if command[0] == "answer")
    main([*answer, "--max-new-tokens=4"])
    assert soundfile.info("answer.wav").frames > 0
    lengths = [stages.parse(words[words.index("finetune") + 1 :])[0].length for words in lines if "finetune" in words]
    assert lengths == [8192, 16384, 8192]
    steps = [distill_stage.parse(words[2:])[0].objective for words in lines if words[:2] == ["ttt-omni", "distill"]]
    assert steps == ["layers", "logits"]
    assert all((ROOT / words[1]).is_file() for words in lines if words[0] == "python")
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    makes = [words[1] for words in lines if words[0] == "make"]
    assert makes == ["demo", "test"] and set(makes) <= set(targets)
