# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
A million tokens through a windowed graft, and what rounding does to its state.

    python benchmarks/endurance.py tokens MODEL --talk talk.txt --text held_out.txt [--tokens 1000000]
    python benchmarks/endurance.py drift MODEL --talk talk.txt [--tokens 200000]

`tokens` reads the talk, which goes round, and after 10,000, 100,000 … tokens takes the perplexity of the same text, of
at most 10,000 tokens, on a copy of the cache, so that the figures may be compared. Beside it stand the norm of the
state, the bytes of the cache, and the peak memory of the process; and, up to the first of these places, the same model
without TTT, and without sinks too, as a ring buffer.

`drift` records what each TTT layer gets from 4,096 tokens of the talk, and lets it go by again and again, in blocks of
512 whose order is another each time, with a state in float32 and one in float64: how far weights and outputs are
apart, relative to their norm.

Each prints a table and writes benchmarks/results/endurance_<name>.json.
"""

import argparse
import math
import resource
from pathlib import Path

import torch
from reporting import RESULTS, environment, store
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ttt_omni.evaluation.conditions import conditions_of, copies, empty_cache, load, num_bytes, read, under
from ttt_omni.evaluation.perplexity import read_losses, state_norm
from ttt_omni.ops_ttt_omni import key_repeats


PASSAGE, RECORDED, BLOCK = 10_000, 4_096, 512  # tokens


def token_ids(tokenizer: PreTrainedTokenizerBase, path: Path, length: int) -> torch.Tensor:
    """The first tokens `[1, T]` of a text."""
    ids = tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([ids[:length]])


def tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, talk: Path, text: Path, length: int
) -> list[dict]:
    talk_ids, passage = token_ids(tokenizer, talk, length), token_ids(tokenizer, text, PASSAGE)
    rows = []
    for condition in ("model", "window", "ring"):
        if condition not in conditions_of(model):
            continue
        with under(condition, model) as current:
            cache, position = empty_cache(current), 0
            places = [10**power for power in range(4, 8) if 10**power < length] + [length]
            for place in places if condition == "model" else places[:1]:
                for _ in tqdm(range(position, place, BLOCK), desc=f"{condition} to {place:,}", unit=" blocks"):
                    count = min(BLOCK, place - position)
                    index = torch.arange(position, position + count) % talk_ids.shape[1]
                    read(current, talk_ids[:, index], cache)
                    position += count
                loss = torch.cat(list(read_losses(current, passage.to(model.device), copies(cache)))).mean().item()
                row = {"condition": condition, "tokens": position, "perplexity": math.exp(loss)}
                row |= {"state_norm": state_norm(cache), "cache_mb": num_bytes(cache) / 2**20}
                row["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
                rows.append(row)
                print(row, flush=True)
    return rows


@torch.no_grad()
def drift(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, talk: Path, length: int) -> list[dict]:
    layers = {
        index: layer.ttt for index, layer in enumerate(model.model.language_model.layers) if hasattr(layer, "ttt")
    }
    recorded = {index: [] for index in layers}
    hooks = [
        ttt.register_forward_hook(lambda module, args, output, index=index: recorded[index].append(args[0].clone()))
        for index, ttt in layers.items()
    ]
    read(model, token_ids(tokenizer, talk, RECORDED), empty_cache(model))
    for hook in hooks:
        hook.remove()
    rows = []
    for index, ttt in layers.items():
        ttt.float()
        single = ttt.inner_model(1)
        double = single.map(lambda x: x.double() if x.is_floating_point() else x)
        blocks, generator = [], torch.Generator().manual_seed(0)
        for block in torch.cat(recorded[index], dim=1).float().split(BLOCK, dim=1):
            q, k, v = ttt._project(block, single, None, None)
            lr = (ttt.base_lr / ttt.head_dim * ttt.write_strength(block)).transpose(1, 2)
            if ttt.config.ttt_divide_repeats:
                lr = lr / key_repeats(k, single, ttt.config.ttt_mini_batch_size)
            blocks.append((q, k, v, lr))
        position, place = 0, RECORDED
        progress = tqdm(total=length, desc=f"layer {index}", unit=" tokens")
        while position < length:
            for block in torch.randperm(len(blocks), generator=generator).tolist():
                parameters = ttt.token_scale(), *ttt.inner_norm()
                output, single = ttt.op(*blocks[block], *parameters, single)
                expected, double = ttt.op(*(x.double() for x in blocks[block]), *parameters, double)
                position += BLOCK
                progress.update(BLOCK)
                if position >= min(place, length):
                    row = {"layer": index, "tokens": position, "norm": double.W1.norm().item()}
                    row |= {"weights": relative(single.W1, double.W1), "outputs": relative(output, expected)}
                    rows.append(row)
                    place *= 2
                if position >= length:
                    break
        progress.close()
        print(rows[-1], flush=True)
    return rows


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measure", choices=["tokens", "drift"])
    parser.add_argument("model", help="folder of a graft, or of an adapter of one")
    parser.add_argument("--talk", type=Path, required=True)
    parser.add_argument("--text", type=Path, help="whose perplexity is taken (for `tokens`)")
    parser.add_argument("--tokens", type=int, help="default: 1,000,000, and 200,000 for `drift`")
    arguments = parser.parse_args()
    if arguments.measure == "tokens" and arguments.text is None:
        parser.error("`tokens` needs --text.")

    model, tokenizer = load(arguments.model)
    if arguments.measure == "tokens":
        rows = tokens(model, tokenizer, arguments.talk, arguments.text, arguments.tokens or 1_000_000)
    else:
        rows = drift(model, tokenizer, arguments.talk, arguments.tokens or 200_000)
    columns = list(rows[0])
    print("| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
    for row in rows:
        print("| " + " | ".join(f"{x:.4g}" if isinstance(x, float) else str(x) for x in row.values()) + " |")
    store(
        RESULTS / f"endurance_{arguments.measure}.json",
        {"model": arguments.model, "talk": arguments.talk.name, "rows": rows, **environment()},
    )


if __name__ == "__main__":
    main()
