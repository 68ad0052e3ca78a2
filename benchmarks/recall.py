# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
How much a TTT layer remembers before it is trained: pairs of key and value given back after other tokens.

    python benchmarks/recall.py [--train-steps 400] [--output benchmarks/results/recall.json]

64 pairs are stored, 448 other tokens follow, then each stored key is asked for: a pair is given back if, of the 64
stored values, the layer's output is nearest to the one stored with it. Values are random, of spread 1. The keys are

- random: independent normal numbers,
- with a mean: random, plus a mean common to all keys of twice their spread,
- trained: those of a small Llama, trained here on the source text of Python's standard library.

Each is measured with the biases of q and k as they are and after calibration on other data. "least squares" is what
the best linear memory gives back of the same pairs, fitted to all 512 at once: the trained Llama's keys repeat and
resemble each other. "rms, whitened" has keys that a linear map of the calibration data gave a covariance of 1.

A second table has the pairs after a start of 300 tokens that are all alike, as silence is, and the norm that this
leaves the memory's weights with, without and with `ttt_divide_repeats`; the keys are random.
"""

import argparse
import itertools
import sysconfig
from pathlib import Path

import torch
from reporting import RESULTS, environment, store
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tqdm import trange
from transformers import LlamaConfig, LlamaForCausalLM

from ttt_omni import TTTOmniConfig, TTTOmniForCausalLM, TTTOmniTextConfig
from ttt_omni.cache_ttt_omni import TTTLayer
from ttt_omni.layers_ttt_omni import TTTOmniTTT
from ttt_omni.training import calibrate


HEAD_DIM = 128
STORED, OTHERS = 64, 448
SILENCE = 300  # tokens, as half a minute of sound gives
ROWS = 4
VOCAB_SIZE = 2048


def make_model(**ttt) -> TTTOmniForCausalLM:
    """One TTT layer of one head, whose q and k read the first half of its input, and v the second half."""
    config = TTTOmniTextConfig(
        vocab_size=2,
        hidden_size=2 * HEAD_DIM,
        intermediate_size=2,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=HEAD_DIM,
        layer_types=["linear_attention"],
        **ttt,
    )
    model = TTTOmniForCausalLM(TTTOmniConfig(text_config=config)).eval()
    layer = model.model.language_model.layers[0]
    layer.input_layernorm = torch.nn.Identity()
    ttt = layer.ttt
    with torch.no_grad():
        for projection, half in ((ttt.q_proj, 0), (ttt.k_proj, 0), (ttt.v_proj, 1)):
            projection.weight.zero_()[:, half * HEAD_DIM :].fill_diagonal_(1)
    return model


@torch.no_grad()
def recall(ttt: TTTOmniTTT, tokens: torch.Tensor, cache_layer: TTTLayer | None = None) -> float:
    """
    Share of the first `STORED` of the tokens `[B, T, 2 * D]` that are given back after all of them; `cache_layer`
    holds what was before.
    """
    cache_layer = cache_layer or TTTLayer()
    ttt(tokens, cache_layer=cache_layer)
    stored = tokens[:, :STORED]
    q, k, v = ttt._project(stored, cache_layer.ttt_state, None, None)
    lr = torch.zeros(q.shape[:3])  # asking teaches nothing
    o, _ = ttt.op(q, k, v, lr, ttt.token_scale(), *ttt.inner_norm(), cache_layer.ttt_state)  # [B, 1, 64, D]
    values = torch.nn.functional.normalize(stored[:, None, :, HEAD_DIM:], dim=-1)
    nearest = (o @ values.mT).argmax(-1)  # [B, 1, 64]
    return (nearest == torch.arange(STORED)).float().mean().item()


def random_keys(mean: float) -> torch.Tensor:
    """Keys `[2 * ROWS, T, D]` of spread 1; the latter half of the rows is for calibration."""
    keys = torch.randn(2 * ROWS, STORED + OTHERS, HEAD_DIM)
    return keys + mean * torch.randn(HEAD_DIM)


def trained_keys(num_steps: int) -> dict[str, torch.Tensor]:
    """Keys `[2 * ROWS, T, D]` of each layer of a small Llama of one key head, after training on source text."""
    torch.manual_seed(0)
    files = [str(path) for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.train(files, trainers.BpeTrainer(vocab_size=VOCAB_SIZE, show_progress=False))
    texts = [Path(file).read_text(encoding="utf-8") for file in files]
    text = torch.tensor([token for encoding in tokenizer.encode_batch(texts) for token in encoding.ids])
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HEAD_DIM,
        intermediate_size=3 * HEAD_DIM,
        num_hidden_layers=3,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=HEAD_DIM,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=max(num_steps, 1))

    def batch(rows, length):
        starts = torch.randint(len(text) - length, (rows, 1))
        return text[starts + torch.arange(length)]

    for step in (progress := trange(num_steps, desc="Training a Llama")):
        input_ids = batch(8, 128)
        loss = model(input_ids, labels=input_ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 20 == 0:
            progress.set_postfix(loss=loss.item())

    keys = {}
    hooks = [
        layer.self_attn.k_proj.register_forward_hook(
            lambda _, args, output, name=f"trained, layer {index}": keys.update({name: output})
        )
        for index, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        model(batch(2 * ROWS, STORED + OTHERS))
    for hook in hooks:
        hook.remove()
    return keys


def least_squares(keys: torch.Tensor) -> tuple[float, float]:
    """Recall of the linear map that fits all values best, of the keys as they are and less their mean."""
    results = []
    for mean in (0, keys[ROWS:].mean((0, 1))):
        torch.manual_seed(0)
        k = torch.nn.functional.normalize(keys[:ROWS] - mean, dim=-1)
        v = torch.randn_like(keys)[:ROWS]
        o = k[:, :STORED] @ torch.linalg.lstsq(k, v).solution  # [ROWS, 64, D]
        nearest = (o @ torch.nn.functional.normalize(v[:, :STORED], dim=-1).mT).argmax(-1)
        results.append((nearest == torch.arange(STORED)).float().mean().item())
    return tuple(results)


def table_row(row: dict, sources: dict) -> str:
    """`row` as Markdown."""
    cells = [f"{100 * before:3.0f} → {100 * after:3.0f}" for before, after in (row[name] for name in sources)]
    return "| " + " | ".join([row["type"], row["scale"], row["norm"], str(row["base_lr"]), *cells]) + " |"


def whiten(keys: torch.Tensor) -> torch.Tensor:
    """Keys with the mean 0 and the covariance of 1, up to a hundredth of its trace, of the calibration data."""
    data = keys[ROWS:].flatten(0, 1)
    values, vectors = torch.linalg.eigh(data.T.cov())
    values = values.clamp(min=0) + 0.01 * values.mean()
    return (keys - data.mean(0)) @ vectors @ torch.diag(values.rsqrt()) @ vectors.T


def measure(keys: torch.Tensor, scale: str, norm: str, **ttt) -> tuple[float, float]:
    """Recall before and after calibration."""
    torch.manual_seed(0)
    if norm == "rms, whitened":
        keys, norm = whiten(keys), "rms"
    model = make_model(ttt_qk_norm=norm, **ttt)
    layer = model.model.language_model.layers[0]
    if scale == "mean":
        torch.nn.init.zeros_(layer.ttt.token_scale.weight)
    tokens = torch.cat([keys, torch.randn_like(keys)], dim=-1)
    before = recall(layer.ttt, tokens[:ROWS])
    calibrate(model, [{"inputs_embeds": tokens[ROWS:]}])
    return before, recall(layer.ttt, tokens[:ROWS])


@torch.no_grad()
def after_silence(**ttt) -> tuple[float, float]:
    """Recall after a silent start, and the norm of `W1` that this leaves."""
    torch.manual_seed(0)
    layer = make_model(**ttt).model.language_model.layers[0].ttt
    silence = torch.randn(ROWS, 1, 2 * HEAD_DIM) + 1e-3 * torch.randn(ROWS, SILENCE, 2 * HEAD_DIM)
    cache_layer = TTTLayer()
    layer(silence, cache_layer=cache_layer)
    norm = cache_layer.ttt_state.W1.norm(dim=(-2, -1)).mean().item()
    return recall(layer, torch.randn(ROWS, STORED + OTHERS, 2 * HEAD_DIM), cache_layer), norm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-steps", type=int, default=400)
    parser.add_argument("--output", type=Path, default=RESULTS / "recall.json")
    arguments = parser.parse_args()

    sources = trained_keys(arguments.train_steps)
    torch.manual_seed(1)
    sources = {"random": random_keys(0.0), "with a mean": random_keys(2.0)} | sources
    ceiling = {"type": "least squares", "scale": "", "norm": "", "base_lr": ""}
    rows = [ceiling | {name: least_squares(keys) for name, keys in sources.items()}]
    print("| type | scale | norm | base_lr | " + " | ".join(sources) + " |")
    print("|" + " --- |" * (4 + len(sources)))
    print(table_row(rows[0], sources), flush=True)
    learning_rates = {"linear": (0.5, 1.0, 2.0, 4.0), "mlp": (0.1, 0.4, 1.0, 1.6)}
    for ttt_type, scale, norm in itertools.product(
        learning_rates, ("mean", "1/sqrt(m)"), ("rms", "rms, whitened", "l2")
    ):
        for base_lr in learning_rates[ttt_type]:
            row = {"type": ttt_type, "scale": scale, "norm": norm, "base_lr": base_lr}
            for name, keys in sources.items():
                row[name] = measure(keys, scale, norm, ttt_layer_type=ttt_type, ttt_base_lr=base_lr)
            rows.append(row)
            print(table_row(row, sources), flush=True)
    silent_starts = []
    print("\n| type | head gate | repeats divided | recall after silence | norm of W1 |")
    print("|" + " --- |" * 5)
    for ttt_type, head_gate, divide in itertools.product(learning_rates, (False, True), (False, True)):
        kwargs = {"ttt_layer_type": ttt_type, "ttt_head_gate": head_gate, "ttt_divide_repeats": divide}
        found, norm = after_silence(**kwargs)
        silent_starts.append(kwargs | {"recall": found, "norm": norm})
        print(f"| {ttt_type} | {head_gate} | {divide} | {100 * found:.0f} | {norm:.1f} |", flush=True)
    result = {
        "stored": STORED,
        "others": OTHERS,
        "head_dim": HEAD_DIM,
        "train_steps": arguments.train_steps,
        "columns": "share given back [before, after] calibration",
        "rows": rows,
        "silent_starts": silent_starts,
        **environment(),
    }
    store(arguments.output, result)


if __name__ == "__main__":
    main()
