# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DeepSpeedPlugin
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import ttt_omni
from ttt_omni import TTTOmniForCausalLM
from ttt_omni.training import stages


EXAMPLES = Path(ttt_omni.__file__).parent / "examples"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


TWO_PROCESSES = """
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from ttt_omni import TTTOmniForCausalLM

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
input_ids = torch.randint(0, 380, (2, 70))


def gradient_norm(model):
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


model = TTTOmniForCausalLM.from_pretrained(sys.argv[1])
output = model(input_ids, labels=input_ids, use_cache=False)
output.loss.backward()
loss, logits, norm = output.loss.detach(), output.logits.detach(), gradient_norm(model)
model.zero_grad(set_to_none=True)

parallel = TTTOmniForCausalLM.from_pretrained(sys.argv[1], distributed_config=DistributedConfig(tp_plan="auto"))
layers = parallel.model.language_model.layers
assert isinstance(layers[0].mlp.up_proj.weight, DTensor)
heads = parallel.config.text_config.num_attention_heads
assert layers[3].ttt.inner_model.W1.to_local().shape[0] == heads // 2
with torch.no_grad():
    torch.testing.assert_close(parallel(input_ids).logits, logits, atol=1e-4, rtol=0)
    cache, pieces = None, []
    for piece in input_ids.split([40, 25, 1, 1, 1, 1, 1], dim=1):
        output = parallel(piece, cache=cache, use_cache=True)
        cache = output.cache
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), logits, atol=1e-4, rtol=0)
assert cache.layers[3].ttt_state.W1.shape[1] == heads // 2
try:
    parallel.save_memory(sys.argv[1] + ".memory", cache)
    raise AssertionError("a part of a conversation was saved")
except ValueError as error:
    assert "only some heads" in str(error)

mesh = init_device_mesh("cpu", (2,))
for layer in model.model.language_model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
assert isinstance(model.model.language_model.layers[3].ttt.inner_model.W1, DTensor)
row = input_ids[rank : rank + 1]
sharded_loss = model(row, labels=row, use_cache=False).loss
sharded_loss.backward()
sharded_norm = gradient_norm(model).full_tensor()
sharded_loss = sharded_loss.detach()
dist.all_reduce(sharded_loss)
torch.testing.assert_close(sharded_loss / 2, loss, atol=1e-4, rtol=0)
torch.testing.assert_close(sharded_norm, norm, atol=1e-4, rtol=0)
dist.destroy_process_group()
print("equal")
"""


def test_sharded_step_and_tensor_parallel_logits_equal_those_of_one_process(tiny_model_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    for layer in model.model.language_model.layers[2:]:
        layer.ttt_gate.weight.data.fill_(0.5)  # so that TTT takes part
    model.save_pretrained(tmp_path / "model")
    script = tmp_path / "two_processes.py"
    script.write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run([*command, str(tmp_path / "model")], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("equal") == 2


# Accelerate shards only what is on accelerators: the processes pass for such.
FINE_TUNING = """
import json, sys
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from ttt_omni.commands.cli import main
from ttt_omni.training import stages

start = PartialState.__init__

def start_with_accelerator(self, *args, **kwargs):
    start(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU

PartialState.__init__ = start_with_accelerator
run, trainers = stages.run, []
stages.run = lambda trainer: trainers.append(run(trainer))
truncated = ["--activation_checkpointing=false", "--backpropagate_length=40"]
for arguments in (sys.argv[1:], [*sys.argv[1:], *truncated]):
    main(arguments)
    trainer = trainers[-1]
    W1 = next(p for name, p in trainer.model.named_parameters() if name.endswith("default.W1"))
    assert isinstance(W1, DTensor) and W1.to_local().shape[0] == W1.shape[0] // 2
    if trainer.is_world_process_zero():
        print("history", json.dumps(trainer.state.log_history))
"""


# How often each is logged in two steps and an evaluation.
LOGGED = {"loss": 2, "lm_loss": 2, "ctc_loss": 2, "eval_loss": 1, "eval_lm_loss": 1, "eval_ctc_loss": 1}


def test_fine_tuning_under_accelerate_with_fsdp2(tiny_model_dir, spoken_corpus, tmp_path):
    values = yaml.safe_load((EXAMPLES / "stages" / "8k.yaml").read_text())
    lines = spoken_corpus.read_text().splitlines()
    texts = [
        {"conversations": [{"from": "human", "value": "Say."}, {"from": "gpt", "value": "Said " * i}]} for i in (1, 9)
    ]
    manifest = spoken_corpus.with_name("distributed.jsonl")
    manifest.write_text("\n".join([*map(json.dumps, texts), *lines]))
    values |= {"model": str(tiny_model_dir), "manifest": str(manifest), "length": 180, "drop_audio_padding": True}
    values |= {"use_cpu": True, "bf16": False, "report_to": "none", "rank": 2, "max_steps": 2, "save_strategy": "no"}
    values |= {"warmup_steps": 0, "learning_rate": 1e-2, "memory_learning_rate": 2e-2}
    values |= {"gradient_accumulation_steps": 1, "lr_scheduler_type": "constant"}
    (tmp_path / "stage.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "run.py").write_text(FINE_TUNING)
    command = ["finetune", str(tmp_path / "stage.yaml"), f"--eval_manifest={manifest}"]

    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=2", "--mixed_precision=no"]
    launch += ["--config_file", f"{EXAMPLES}/accelerate/fsdp2.yaml", str(tmp_path / "run.py"), *command]
    launch += [
        "--per_device_train_batch_size=1",
        "--per_device_eval_batch_size=1",
        f"--output_dir={tmp_path / 'sharded'}",
    ]
    done = subprocess.run(launch, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    sharded = [json.loads(words) for words in re.findall(r"^history (.*)$", done.stdout, re.MULTILINE)]

    whole = []
    command += [
        "--per_device_train_batch_size=2",
        "--per_device_eval_batch_size=2",
        f"--output_dir={tmp_path / 'whole'}",
    ]
    for truncated in ([], ["--activation_checkpointing=false", "--backpropagate_length=40"]):
        whole.append(stages.train(*stages.parse([*command[1:], *truncated])).state.log_history)
    for name, number in LOGGED.items():
        one, two = ([[entry[name] for entry in log if name in entry] for log in logs] for logs in (whole, sharded))
        assert [len(values) for values in one] == [number, number]
        assert [pytest.approx(values, rel=1e-4) for values in one] == two, name
    assert whole[0][0]["loss"] == pytest.approx(whole[1][0]["loss"], rel=1e-4)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "sharded"))
    assert {name: x.shape for name, x in one.items()} == {name: x.shape for name, x in two.items()}
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), tmp_path / "sharded")


def test_configurations_for_accelerate(tiny_model_dir):
    modules = {type(module).__name__ for module in TTTOmniForCausalLM.from_pretrained(tiny_model_dir).modules()}
    fsdp = load_config_from_file(f"{EXAMPLES}/accelerate/fsdp2.yaml").fsdp_config
    assert fsdp["fsdp_transformer_layer_cls_to_wrap"] in modules & set(TTTOmniForCausalLM._no_split_modules)
    deepspeed = load_config_from_file(f"{EXAMPLES}/accelerate/deepspeed_zero3.yaml").deepspeed_config
    assert deepspeed.pop("deepspeed_moe_layer_cls_names") in modules
    plugin = DeepSpeedPlugin(**deepspeed)
    assert plugin.hf_ds_config.is_zero3()
