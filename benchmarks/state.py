# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
The TTT state on a CPU: speed of the inner loop, memory of long conversations, memory of training.

    python benchmarks/state.py speed [--ttt-lm DIR]      DIR: a checkout of test-time-training/ttt-lm-pytorch
    python benchmarks/state.py conversation
    python benchmarks/state.py training

Each prints a table and writes benchmarks/results/state_<name>.json.
"""

import argparse
import re
import subprocess
import sys
import time

import torch
import transformers
from reporting import RESULTS, environment, store
from tqdm import tqdm
from transformers import DynamicCache

from ttt_omni import TTTLinearState, TTTOmniTextConfig, ttt_linear
from ttt_omni.modeling_ttt_omni import TTTOmniTextModel


HEADS, HEAD_DIM, MINI_BATCH = 32, 128, 64


def best_of(functions: dict, repeats: int) -> dict[str, float]:
    """Seconds of each one's fastest call; they take turns, as machines have slow minutes."""
    times = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: min(values) for name, values in times.items()}


def report(name: str, rows: list[dict]) -> None:
    columns = list(rows[0])
    print(" | ".join(columns))
    for row in rows:
        print(" | ".join(f"{row[c]:.4g}" if isinstance(row[c], float) else str(row[c]) for c in columns))
    store(RESULTS / f"state_{name}.json", {"environment": environment(), "rows": rows})


def inner_loop_inputs(length: int):
    shape = (1, length, HEADS, HEAD_DIM)
    q, k, v = (torch.nn.functional.normalize(torch.randn(shape), dim=-1).transpose(1, 2) for _ in range(3))
    lr = torch.rand(1, HEADS, length) / HEAD_DIM
    scale = 1 / torch.arange(1, MINI_BATCH + 1)
    norm = torch.ones(HEADS, HEAD_DIM), torch.zeros(HEADS, HEAD_DIM)
    initial = 0.02 * torch.randn(HEADS, HEAD_DIM, HEAD_DIM), torch.zeros(HEADS, 1, HEAD_DIM)
    return (q, k, v, lr), (scale, *norm), initial


def ttt_lm_inner_loop(folder: str, tokens, parameters, initial):
    """The same inner loop in ttt-lm-pytorch, as a function without arguments that returns `[1, T, H * D]`."""
    sys.path.insert(0, folder)
    transformers.utils.import_utils.is_causal_conv1d_available = lambda: False
    from ttt import TTTConfig, TTTLinear

    (q, k, v, lr), (scale, weight, bias) = tokens, parameters
    config = TTTConfig(hidden_size=HEADS * HEAD_DIM, num_attention_heads=HEADS, mini_batch_size=MINI_BATCH)
    layer = TTTLinear(config, layer_idx=0)
    layer.W1.data, layer.b1.data = initial
    layer.ttt_norm_weight.data, layer.ttt_norm_bias.data = weight, bias
    grid = (1, HEADS, q.shape[2] // MINI_BATCH, MINI_BATCH)
    inputs = {name: x.reshape(*grid, HEAD_DIM) for name, x in (("XQ", q), ("XK", k), ("XV", v))}
    inputs["token_eta"] = scale.view(1, 1, 1, MINI_BATCH, 1).expand(*grid, 1)
    inputs["ttt_lr_eta"] = lr.reshape(*grid[:3], 1, MINI_BATCH)

    def run():
        eta = inputs["token_eta"] * inputs["ttt_lr_eta"]  # part of its layer's forward
        return layer.ttt({**inputs, "eta": eta}, MINI_BATCH, None, None)[0]

    return run


@torch.no_grad()
def speed(ttt_lm: str | None) -> None:
    """Prefill of H 32, D 128, m 64 against ttt-lm-pytorch and against products of equal FLOPs; decode against W."""
    rows = []
    for length in (1024, 4096):
        torch.manual_seed(0)
        tokens, parameters, initial = inner_loop_inputs(length)
        state = TTTLinearState.initial(*initial, batch_size=1)
        flops = HEADS * length * (6 * HEAD_DIM**2 + 4 * MINI_BATCH * HEAD_DIM)
        # one batched product: all heads' k W of one mini-batch, as often as gives the same FLOPs
        left, right = tokens[0][:, :, :MINI_BATCH].flatten(0, 1).contiguous(), initial[0]
        products = round(flops / (2 * HEADS * MINI_BATCH * HEAD_DIM**2))
        functions = {
            "seconds": lambda: ttt_linear(*tokens, *parameters, state),  # noqa: B023
            "products of equal FLOPs": lambda: [torch.bmm(left, right) for _ in range(products)],  # noqa: B023
        }
        if ttt_lm:
            functions["ttt-lm-pytorch"] = theirs = ttt_lm_inner_loop(ttt_lm, tokens, parameters, initial)
            o = ttt_linear(*tokens, *parameters, state)[0].transpose(1, 2).flatten(2)
            difference = (theirs() - o).abs().max().item()
        row = {"T": length, **best_of(functions, 10)}
        row["ours / products"] = row["seconds"] / row["products of equal FLOPs"]
        if ttt_lm:
            row["ttt-lm-pytorch / ours"] = row["ttt-lm-pytorch"] / row["seconds"]
            row["ttt-lm-pytorch / products"] = row["ttt-lm-pytorch"] / row["products of equal FLOPs"]
            row["max difference"] = difference
        rows.append(row)
    one = [x[:, :, :1] for x in tokens]
    _, state = ttt_linear(*(x[:, :, :100] for x in tokens), *parameters, state)
    decode = best_of(
        {
            "decode, seconds": lambda: ttt_linear(*one, *parameters, state),
            "q W, reading the state": lambda: torch.bmm(one[0].flatten(0, 1), state.W1.flatten(0, 1)),
        },
        100,
    )
    rows = [row | decode for row in rows]
    report("speed", rows)


@torch.no_grad()
def conversation() -> None:
    """Bytes of cache and state, and time per token, at growing positions: windowed against full attention."""
    rows = []
    for name, layer_types in (
        ("windowed", ["sliding_attention", "hybrid_sliding"]),
        ("full", ["full_attention", "hybrid"]),
    ):
        torch.manual_seed(0)
        config = TTTOmniTextConfig(
            vocab_size=256,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            layer_types=layer_types,
            sliding_window=1024,
        )
        model, cache = TTTOmniTextModel(config).eval(), DynamicCache(config=config)
        step = 1024
        with tqdm(total=65536, desc=name, unit="token") as progress:
            while cache.get_seq_length() < 65536:
                model(torch.randint(0, 256, (1, step)), cache=cache)
                progress.update(step)
                position = cache.get_seq_length()
                if position in (4096, 16384, 65536):
                    token = torch.randint(0, 256, (1, 1))
                    one = {"token": lambda: model(token, cache=cache)}  # noqa: B023
                    times = sorted(best_of(one, 1)["token"] for _ in range(31))
                    size = sum(x.nbytes for layer in cache.layers for x in layer.tensors().values())
                    rows.append({"attention": name, "T": position, "bytes": size, "ms per token": 1e3 * times[15]})
                    if position < 65536:  # back to a multiple, for the next lines to be at round positions
                        model(torch.randint(0, 256, (1, step - 31)), cache=cache)
                        progress.update(step)
    report("conversation", rows)


TRAINING_STEP = """
import re, sys, torch
from ttt_omni import TTTLinearState, ttt_linear
H, D, T, group = 8, 64, 16384, int(sys.argv[1])
torch.manual_seed(0)
q, k, v = (torch.nn.functional.normalize(torch.randn(1, H, T, D), dim=-1).requires_grad_() for _ in range(3))
lr, scale = torch.rand(1, H, T) / D, 1 / torch.arange(1, 65)
state = TTTLinearState.initial(0.02 * torch.randn(H, D, D), torch.zeros(H, 1, D), 1)
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
before = peak()
o, _ = ttt_linear(q, k, v, lr, scale, torch.ones(H, D), torch.zeros(H, D), state, checkpoint_group_size=group)
o.square().sum().backward()
print(peak() - before, q.grad.double().norm().item())
"""


def training() -> None:
    """Peak memory of forward and backward over 16,384 tokens (H 8, D 64, m 64) by checkpoint group size."""
    rows = []
    for group in (0, 4, 16, 64):
        start = time.perf_counter()
        result = subprocess.run(
            [sys.executable, "-c", TRAINING_STEP, str(group)], capture_output=True, text=True, check=True
        )
        peak, norm = map(float, re.findall(r"\S+", result.stdout))
        seconds = time.perf_counter() - start
        rows.append({"mini-batches per group": group, "MB": peak / 1e6, "gradient norm": norm, "seconds": seconds})
    report("training", rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=("speed", "conversation", "training"))
    parser.add_argument("--ttt-lm", help="a checkout of ttt-lm-pytorch, to compare with")
    arguments = parser.parse_args()
    if arguments.benchmark == "speed":
        speed(arguments.ttt_lm)
    else:
        {"conversation": conversation, "training": training}[arguments.benchmark]()
