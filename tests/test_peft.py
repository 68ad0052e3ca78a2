# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
import json
import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from ttt_omni import TTTOmniForCausalLM, ttt_lora_config
from ttt_omni.training import TTT_MODULES_TO_SAVE


INPUT_IDS = torch.arange(150)[None] % 97 + 5


@pytest.fixture
def base(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=INPUT_IDS).logits


def disturb(model, seed=0, std=0.05):
    """Changes all that the active adapter trains, as training would."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += std * torch.randn_like(parameter)
    return model


def test_recommended_adapter(base):
    model = get_peft_model(base, ttt_lora_config(base, rank=2))
    trained = {name.replace(".default", "") for name, p in model.named_parameters() if p.requires_grad}
    expected = set()
    for layer in (2, 3):
        prefix = f"base_model.model.model.language_model.layers.{layer}."
        projections = [f"{mixer}.{x}_proj" for mixer in ("self_attn", "ttt") for x in "qkvo"]
        projections += [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
        expected |= {f"{prefix}{projection}.lora_{x}.weight" for projection in projections for x in "AB"}
        small = ["ttt.inner_model.W1", "ttt.inner_model.b1", "ttt_gate.weight", "ttt.token_scale.weight"]
        small += [
            f"ttt.{x}.{y}" for x in ("head_gate", "inner_norm", "lr_gate", "post_norm") for y in ("weight", "bias")
        ]
        expected |= {f"{prefix}{name}".replace(".W1", ".modules_to_save.W1") for name in small}
    trained = {name.replace(".modules_to_save", "") for name in trained}
    assert trained == {name.replace(".modules_to_save", "") for name in expected}


def test_every_trained_parameter_gets_a_gradient(base):
    model = disturb(get_peft_model(base, ttt_lora_config(base, rank=2)))
    model(input_ids=INPUT_IDS, labels=INPUT_IDS).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("kwargs", [{}, {"use_dora": True}, {"lora_dropout": 0.1, "r": 3}])
def test_all_linear(base, kwargs):
    config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **{"r": 2, **kwargs})
    before = logits(base)
    model = get_peft_model(base, config)
    adapted = {name.removesuffix(".base_layer") for name, _ in model.named_modules() if name.endswith(".base_layer")}
    linear = {
        f"base_model.model.{name}"
        for name, module in TTTOmniForCausalLM(base.config).named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    assert adapted == linear
    parts = ("ttt.q_proj", "self_attn.k_proj", "mlp.up_proj", "multi_modal_projector.linear_1", "speech_decoder")
    assert all(any(part in name for name in adapted) for part in parts)
    torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=0)
    assert (logits(disturb(model)) - before).abs().max() > 1e-2


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_default_targets(base, task_type):
    """What PEFT adapts of a Llama, in the language model alone."""
    model = get_peft_model(base, LoraConfig(task_type=task_type, r=2))
    adapted = {name.removesuffix(".base_layer") for name, _ in model.named_modules() if name.endswith(".base_layer")}
    attention = {f"layers.{index}.self_attn" for index in range(4)} | {f"layers.{index}.ttt" for index in (2, 3)}
    prefix = "base_model.model.model.language_model."
    assert adapted == {f"{prefix}{name}.{x}_proj" for name in attention for x in "qv"}
    with torch.no_grad():
        for layer in base.model.language_model.layers[2:]:
            layer.ttt_gate.weight.fill_(0.5)  # at 0, nothing reaches what stands before it
    disturb(model)(input_ids=INPUT_IDS, labels=INPUT_IDS).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_default_targets_without_heads(tiny_model_dir):
    model = get_peft_model(AutoModel.from_pretrained(tiny_model_dir), LoraConfig(r=2))
    assert sum(name.endswith(".base_layer") for name, _ in model.named_modules()) == 2 * (4 + 2)


def test_disable_merge_unmerge_unload(base, tmp_path):
    before = logits(base)
    model = get_peft_model(base, ttt_lora_config(base, rank=2))
    assert torch.equal(logits(model), before)
    adapted = logits(disturb(model))
    assert (adapted - before).abs().max() > 1e-2
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), adapted, atol=1e-4, rtol=0)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), adapted, atol=1e-4, rtol=0)

    plain = model.merge_and_unload()
    assert type(plain) is TTTOmniForCausalLM
    torch.testing.assert_close(logits(plain), adapted, atol=1e-4, rtol=0)
    plain.save_pretrained(tmp_path)
    loaded, info = TTTOmniForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(loaded), logits(plain))


def test_swap_and_stack(base, tiny_model_dir):
    model = disturb(get_peft_model(base, ttt_lora_config(base, rank=2)), seed=1)
    one = logits(model)
    model.add_adapter("other", ttt_lora_config(base, rank=4))
    model.set_adapter("other")
    other = logits(disturb(model, seed=2))
    assert (one - other).abs().max() > 1e-2
    model.set_adapter("default")
    assert torch.equal(logits(model), one)
    model.set_adapter("other")
    assert torch.equal(logits(model), other)
    with pytest.raises(ValueError, match="Only one adapter can be set at a time"):
        model.base_model.set_adapter(["default", "other"])  # two sets of TTT's own parameters have no sum

    fresh = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    stacked = get_peft_model(fresh, ttt_lora_config(fresh, rank=2, modules_to_save=None))
    one = logits(disturb(stacked, seed=1))
    stacked.add_adapter("other", ttt_lora_config(fresh, rank=2, modules_to_save=None))
    stacked.set_adapter("other")
    disturb(stacked, seed=2)
    stacked.base_model.set_adapter(["default", "other"])
    both = logits(stacked)
    assert (both - one).abs().max() > 1e-3
    stacked.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination_type="cat")
    stacked.set_adapter("sum")
    torch.testing.assert_close(logits(stacked), both, atol=1e-4, rtol=0)


REMOTE = """
import importlib.abc, sys
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("ttt_omni", "ttt_kernels"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
base, adapter, file = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules")
model = PeftModel.from_pretrained(model, adapter).eval()
ids = load_file(file)["input_ids"]
with torch.no_grad():
    logits = model(input_ids=ids).logits
    merged = model.merge_and_unload()(input_ids=ids).logits
save_file({"logits": logits, "merged": merged}, file)
model = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True)
assert get_peft_model(model, LoraConfig(task_type="CAUSAL_LM")).get_nb_trainable_parameters()[0] > 0
"""


def test_adapter_in_a_new_process_through_remote_code(base, tiny_model_dir, tmp_path):
    model = disturb(get_peft_model(base, ttt_lora_config(base, rank=2)))
    model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {name.split(".")[-2] for name in saved} >= {*TTT_MODULES_TO_SAVE, "lora_A", "lora_B"}
    assert sum(x.numel() for x in saved.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 2

    file = tmp_path / "logits.safetensors"
    save_file({"input_ids": INPUT_IDS}, file)
    command = [sys.executable, "-c", REMOTE, str(tiny_model_dir), str(tmp_path / "adapter"), str(file)]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run(command, check=True, capture_output=True, env=environment, cwd=tmp_path)
    remote = load_file(file)
    assert torch.equal(remote["logits"], logits(model))
    torch.testing.assert_close(remote["merged"], remote["logits"], atol=1e-4, rtol=0)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))


def test_generation_with_an_adapter(base):
    model = disturb(get_peft_model(base, ttt_lora_config(base, rank=2))).eval()
    arguments = {"max_new_tokens": 5, "do_sample": False, "return_audio": True}
    out = model.generate(input_ids=INPUT_IDS, **arguments)
    merged = model.merge_and_unload().generate(input_ids=INPUT_IDS, **arguments)
    assert torch.equal(out.sequences, merged.sequences) and out.waveform[0].shape == merged.waveform[0].shape


def test_nothing_to_adapt(base):
    del base.model.language_model.layers[2:]
    with pytest.raises(ValueError, match="no layer of the model has TTT"):
        ttt_lora_config(base)
