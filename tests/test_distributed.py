# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
import os
import subprocess
import sys

from transformers import AutoModelForCausalLM


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
assert isinstance(parallel.model.language_model.layers[0].mlp.up_proj.weight, DTensor)
with torch.no_grad():
    torch.testing.assert_close(parallel(input_ids).logits, logits, atol=1e-4, rtol=0)

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
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(tmp_path / "model")], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("equal") == 2
