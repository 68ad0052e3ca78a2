# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from layouts import text_model
from transformers import AutoModelForCausalLM, AutoProcessor

import ttt_omni
from ttt_omni.commands.cli import main
from ttt_omni.training import calibrate


def batch_of(lengths, padding_side):
    input_ids, mask = torch.zeros(2, len(lengths), max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        columns = slice(None, length) if padding_side == "right" else slice(max(lengths) - length, None)
        input_ids[row, columns] = torch.randint(1, 50, (length,))
        mask[row, columns] = 1
    return {"input_ids": input_ids, "attention_mask": mask}


def means(model, batches):
    """Mean over all tokens of what TTT's q and k projections give, by name."""
    outputs = {}
    hooks = [
        module.register_forward_hook(lambda _, args, output, name=name: outputs.setdefault(name, []).append(output))
        for name, module in model.named_modules()
        if name.endswith(("ttt.q_proj", "ttt.k_proj"))
    ]
    masks = []
    with torch.no_grad():
        for batch in batches:
            model(**batch)
            masks.append(batch["attention_mask"].flatten().bool())
    for hook in hooks:
        hook.remove()
    return {
        name: torch.cat([x.flatten(0, 1) for x in found])[torch.cat(masks)].mean(0) for name, found in outputs.items()
    }


def test_mean_of_queries_and_keys_becomes_zero():
    model = text_model(["hybrid", "full_attention", "hybrid"])
    batches = [batch_of([9, 3, 7], "right"), batch_of([2, 5], "left")]
    before = means(model, batches)
    assert len(before) == 4 and all(mean.abs().max() > 1e-3 for mean in before.values())
    input_ids = batches[0]["input_ids"]
    logits = model(input_ids).logits
    calibrate(model, batches)
    for mean in means(model, batches).values():
        torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-7, rtol=0)
    assert torch.equal(model(input_ids).logits, logits)  # behind a gate of 0

    biases = [p.clone() for n, p in model.named_parameters() if n.endswith("ttt.k_proj.bias")]
    calibrate(model, iter(batches))
    for bias, name in zip(biases, ("0", "2")):
        again = model.get_parameter(f"model.language_model.layers.{name}.ttt.k_proj.bias")
        torch.testing.assert_close(again, bias, atol=1e-7, rtol=0)


def test_padding_does_not_count():
    one, other = text_model(["linear_attention"]), text_model(["linear_attention"])
    batch = batch_of([6, 2], "right")
    calibrate(one, [batch])
    calibrate(other, [{"input_ids": batch["input_ids"][:1, :6]}, {"input_ids": batch["input_ids"][1:, :2]}])
    for p, q in zip(one.parameters(), other.parameters()):
        torch.testing.assert_close(p, q, atol=1e-7, rtol=0)


def test_nothing_to_calibrate():
    with pytest.raises(ValueError, match="no layer of the model has TTT"):
        calibrate(text_model(["full_attention"]), [])
    with pytest.raises(ValueError, match="no tokens"):
        calibrate(text_model(["hybrid"]), [])


def test_command(tiny_model_dir, tmp_path, spoken_corpus):
    arguments = ["--model", str(tiny_model_dir), "--data", str(spoken_corpus), "--output", str(tmp_path / "out")]
    command = [sys.executable, "-m", "ttt_omni", "calibrate", *arguments]
    subprocess.run(command, check=True, capture_output=True)
    before = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert AutoProcessor.from_pretrained(tmp_path / "out").audio_token == "<|reserved_special_token_0|>"
    changed = {name for name, x in after.state_dict().items() if not torch.equal(x, before.state_dict()[name])}
    assert changed == {
        f"model.language_model.layers.{layer}.ttt.{x}_proj.bias" for layer in (2, 3) for x in ("q", "k")
    }


def test_command_refuses_bad_lines(tiny_model_dir, tmp_path, capsys):
    manifest = tmp_path / "bad.jsonl"
    record = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": " "}]}
    manifest.write_text(json.dumps(record))
    with pytest.raises(SystemExit):
        main(["calibrate", "--model", str(tiny_model_dir), "--data", str(manifest), "--output", str(tmp_path / "out")])
    assert capsys.readouterr().err.splitlines()[-1].endswith("bad.jsonl, line 1: turn 2 is an empty answer.")
    assert not (tmp_path / "out").exists()


def test_recall_of_a_fresh_graft(monkeypatch):
    """The default graft gives back at least 80 % of 64 pairs after 448 other tokens, once calibrated."""
    monkeypatch.syspath_prepend(Path(ttt_omni.__file__).parent / "benchmarks")
    import recall

    torch.manual_seed(0)
    before, after = recall.measure(recall.random_keys(2.0), "1/sqrt(m)", "rms")
    assert before < 0.1 and after >= 0.8
