# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

import ttt_omni


ROOT = Path(__file__).parent.parent
FLAT_FILES = {path.name for path in ROOT.glob("*_ttt_omni.py")}

# Loads a folder by the Auto classes alone, where the packages cannot be imported, speaks, and saves it elsewhere.
REMOTE_CODE = """
import sys

class Blocker:
    def find_spec(self, name, *args):
        if name.split(".")[0] in ("ttt_omni", "ttt_kernels"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocker())
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoProcessor

source, target = sys.argv[1:]
for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM):
    model = auto_class.from_pretrained(source, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
assert AutoConfig.from_pretrained(source, trust_remote_code=True).model_type == "ttt_omni"
processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
message = {"role": "user", "content": [{"type": "text", "text": "Hello"}]}
inputs = processor.apply_chat_template(
    [message], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
assert any(event.text for event in model.stream(**inputs, max_new_tokens=8, do_sample=False))
model.save_pretrained(target)
processor.save_pretrained(target)
assert not any(name.split(".")[0] in ("ttt_omni", "ttt_kernels") for name in sys.modules)
"""


def test_auto_classes(tiny_model_dir):
    assert type(AutoConfig.from_pretrained(tiny_model_dir)) is ttt_omni.TTTOmniConfig
    assert type(AutoModel.from_pretrained(tiny_model_dir)) is ttt_omni.TTTOmniModel
    for auto_class in (AutoModelForCausalLM, AutoModelForMultimodalLM):
        assert type(auto_class.from_pretrained(tiny_model_dir)) is ttt_omni.TTTOmniForCausalLM
    assert type(AutoProcessor.from_pretrained(tiny_model_dir)) is ttt_omni.TTTOmniProcessor


def test_remote_code_without_the_package(tiny_model_dir, tmp_path, monkeypatch):
    """From a converted folder, and from what that saved, with the same weights and code files."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folders = [tiny_model_dir, tmp_path / "first", tmp_path / "second"]
    for source, target in zip(folders, folders[1:]):
        command = [sys.executable, "-c", REMOTE_CODE, source, target]
        done = subprocess.run(command, cwd=tmp_path, check=True, stdout=subprocess.PIPE)
        assert done.stdout == b""  # nor is the user asked again whether the code is trusted
        assert {path.name for path in target.glob("*.py")} == FLAT_FILES
    models = [ttt_omni.TTTOmniForCausalLM.from_pretrained(folder).state_dict() for folder in (folders[0], folders[2])]
    for name, tensor in models[0].items():
        assert torch.equal(tensor, models[1][name]), name


def test_a_model_of_the_package_saves_its_code(tiny_model_dir, tmp_path):
    config = AutoConfig.from_pretrained(tiny_model_dir)
    fresh = ttt_omni.TTTOmniConfig(
        text_config=config.text_config.to_dict(),
        audio_config=config.audio_config.to_dict(),
        audio_token_id=config.audio_token_id,
    )
    ttt_omni.TTTOmniForCausalLM(fresh).save_pretrained(tmp_path)
    saved = AutoConfig.from_pretrained(tmp_path)
    assert saved.auto_map == config.auto_map
    of_the_processor = {"audio_ttt_omni.py", "processing_ttt_omni.py"}
    assert {path.name for path in tmp_path.glob("*.py")} == FLAT_FILES - of_the_processor


def test_flat_files_import_only_what_the_loader_of_remote_code_can_carry():
    for name in FLAT_FILES:
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
            code = line.strip()
            if code.startswith("from ."):
                module = code.removeprefix("from .").split()[0]
                assert f"{module}.py" in FLAT_FILES, f"{name}: {code}"
            assert not code.startswith(("import ttt_omni", "from ttt_omni", "import conversion")), f"{name}: {code}"


def test_the_wheel(tmp_path):
    source = tmp_path / "source"
    excluded = shutil.ignore_patterns(
        ".*", "tests", "benchmarks", "demo", "build", "dist", "*.egg-info", "__pycache__"
    )
    shutil.copytree(ROOT, source, ignore=excluded)
    (source / "tests").mkdir()
    (source / "tests" / "__init__.py").touch()
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, source],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"ttt_omni-{ttt_omni.__version__}-")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if name.startswith("ttt_omni/") and name.count("/") == 1} == {
        "ttt_omni/__init__.py",
        "ttt_omni/__main__.py",
        "ttt_omni/checkpoint.py",
        "ttt_omni/conversation_file.py",
        "ttt_omni/loading.py",
        "ttt_omni/model_card.md",
        "ttt_omni/registration.py",
        *(f"ttt_omni/{name}" for name in FLAT_FILES),
    }
    assert {"ttt_omni/serving/engine.py", "ttt_omni/serving/page.html"} <= set(names)
    assert {"ttt_omni/commands/cli.py", "ttt_omni/training/__init__.py", "ttt_kernels/__init__.py"} <= set(names)
    recipes = {f"ttt_omni/examples/{path.parent.name}/{path.name}" for path in ROOT.glob("examples/[sd]*/*.yaml")}
    assert len(recipes) == 6 and {name for name in names if "/examples/" in name} == recipes
    assert not any("tests" in name for name in names)


def read_lock() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = [re.fullmatch(r"([\w.-]+)==(\d[\w.]*)", line).groups() for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pins}


def test_the_lock_is_within_the_ranges():
    """And holds nothing but versions, which any machine's pip can take."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    names = ("evaluate", "gguf", "kernels", "quantize", "serve", "train", "test")
    requirements = project["dependencies"] + [requirement for name in names for requirement in extras[name]]
    lock = read_lock()
    for requirement in map(Requirement, requirements):
        if requirement.name != project["name"]:
            assert requirement.specifier.contains(lock[canonicalize_name(requirement.name)]), requirement


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_what_make_takes_of_the_lock(tmp_path):
    """Another PyTorch or Transformers, and its own environment."""
    lock = read_lock()
    unlocked, stamps = {}, set()
    for values in ((), ("TORCH=torch",), ("TRANSFORMERS=transformers",), ("TRANSFORMERS=transformers==5.23.0",)):
        command = ["make", "--dry-run", "test", f"VENV={tmp_path}", *values]
        environment = {"PATH": os.environ["PATH"]}  # without the variables of a `make` that runs this test
        done = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        (pattern,) = re.findall(r"grep -vE '(.*?)'", done.stdout)
        unlocked[values] = {name for name, version in lock.items() if re.search(pattern, f"{name}=={version}")}
        stamps.add(re.search(r"touch (\S+)", done.stdout)[1])
    assert list(unlocked.values()) == [set(), {"torch", "triton"}, set(lock), set(lock)]
    assert len(stamps) == len(unlocked)


REMOTE_ANSWER = """
import sys, torch
sys.modules.update({"ttt_omni": None, "ttt_kernels": None})  # importing them fails
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, AutoProcessor

path, golden = sys.argv[1], load_file(sys.argv[2])
processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
features = processor(text=processor.audio_token, audio=golden["waveform"].numpy(), sampling_rate=16000)
torch.testing.assert_close(features["input_features"][0].T, golden["mel"], rtol=0, atol=1e-4)
model = AutoModelForMultimodalLM.from_pretrained(path, trust_remote_code=True)
audio = [model.config.audio_token_id] * 300
ids = torch.tensor([[x for i in golden["input_ids"].tolist() for x in (audio if i == -200 else [i])]])
inputs = {"input_ids": ids, "input_features": features["input_features"]}
embeds = model.get_audio_features(features["input_features"]).pooler_output
torch.testing.assert_close(embeds, golden["speech_embeds"], rtol=1e-4, atol=1e-4)
torch.testing.assert_close(model(**inputs).logits[0, -32:], golden["prefill_logits_last32"], rtol=1e-3, atol=1e-3)
out = model.generate(**inputs, max_new_tokens=24, return_audio=True, do_sample=False)
assert torch.equal(out.sequences[0, ids.shape[1]:], golden["greedy_tokens"])
assert torch.equal(out.units[0], golden["units"])
assert out.waveform[0].abs().max() > 0.01
events = model.stream(**inputs, max_new_tokens=24, do_sample=False, tokenizer=processor.tokenizer)
streamed = torch.cat([event.waveform for event in events if event.waveform is not None])
torch.testing.assert_close(streamed, out.waveform[0], rtol=0, atol=1e-5)
"""


def test_the_originals_numbers_without_the_package(golden_model_dir, goldens, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    arguments = [golden_model_dir, goldens / "golden.safetensors"]
    subprocess.run([sys.executable, "-c", REMOTE_ANSWER, *arguments], cwd=tmp_path, check=True)
