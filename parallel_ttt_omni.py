# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Tensor parallelism of TTT, in the styles that `TTTOmniTextConfig.base_model_tp_plan` names."""

from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer


class TTTHeadsParallel(TensorParallelLayer):
    """Tensor parallelism of what has one entry per head: each process holds those of its heads."""

    def should_use_local_tensors(self, module):
        return True

    def shard_param(self, module, param, mesh):
        parameter = module._parameters[param]
        sharded = distribute_tensor(parameter, mesh, [Shard(0)], src_data_rank=None)
        module._parameters[param] = nn.Parameter(sharded, requires_grad=parameter.requires_grad)


class GatherHeadsParallel(TensorParallelLayer):
    """Tensor parallelism of a norm over the whole width: each process gets the heads of all."""

    def transform_inputs_pre_forward(self, module, args, kwargs, mesh):
        return (DTensor.from_local(args[0], mesh, [Shard(-1)]).full_tensor(),), kwargs


def register_parallel_styles() -> None:
    """Make the styles known to Transformers."""
    ALL_PARALLEL_STYLES.register("ttt_heads", TTTHeadsParallel())
    ALL_PARALLEL_STYLES.register("ttt_gather_heads", GatherHeadsParallel())
