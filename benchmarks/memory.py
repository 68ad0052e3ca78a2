# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
What trained memories hold, and what they write: recall by distance, and the write strength on facts and on other talk.

    python benchmarks/memory.py today=out/today/taught gated=out/gated/taught --talk talk.txt

The models, or adapters, are what `recipes/memory` leaves. The write strength is the share of `ttt_base_lr` with which
a token is learnt, mean over the heads, per TTT layer; "nothing" is the share of tokens and heads at which it is 0.
"""

import argparse
import random
from pathlib import Path

import torch
from reporting import RESULTS, environment, store
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ttt_omni.evaluation.conditions import load
from ttt_omni.evaluation.corpus import read_talk
from ttt_omni.evaluation.facts import draw_facts
from ttt_omni.evaluation.recall import evaluate_recall
from ttt_omni.training.stages import record_write_strengths


@torch.no_grad()
def write_strengths(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, talk: Path) -> dict[str, dict]:
    """Per layer, on 32 facts and on as many sentences of the talk."""
    facts = [fact.told for seed in range(8) for fact in draw_facts(random.Random(seed), 4)]
    texts = {"facts": facts, "talk": random.Random(0).sample(read_talk(talk), 32)}
    found = {}
    for name, sentences in texts.items():
        with record_write_strengths(model) as strengths:
            ids = tokenizer(" ".join(sentences), return_tensors="pt", add_special_tokens=False)["input_ids"]
            model.model(ids)
        means = [round(x.mean().item(), 3) for x in strengths]
        nothing = [round((x == 0).float().mean().item(), 3) for x in strengths]
        found[name] = {"mean": means, "nothing": nothing}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--talk", type=Path, required=True)
    parser.add_argument("--distances", default="256,1024,4096,16384")
    parser.add_argument("--conditions", default="model,window,state,nothing told")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--output", type=Path, default=RESULTS / "memory.json")
    arguments = parser.parse_args()

    distances, rows = [int(word) for word in arguments.distances.split(",")], []
    conditions = arguments.conditions.split(",")
    print("| model | condition | " + " | ".join(f"{distance:,}" for distance in distances) + " |")
    print("|" + " --- |" * (2 + len(distances)))
    for name, folder in (word.split("=") for word in arguments.models):
        model, tokenizer = load(folder)
        results = evaluate_recall(
            model, tokenizer, arguments.talk, distances, rounds=arguments.rounds, conditions=conditions
        )
        for condition in dict.fromkeys(row["condition"] for row in results):
            cells = [f"{row['recall']:.0%}" for row in results if row["condition"] == condition]
            print(f"| {name} | {condition} | " + " | ".join(cells) + " |", flush=True)
        strengths = write_strengths(model, tokenizer, arguments.talk)
        print(f"{name}: {strengths}", flush=True)
        rows.append({"model": name, "recall": results, "write_strength": strengths})
    store(arguments.output, {"facts": 8, "rounds": arguments.rounds, "rows": rows, **environment("peft")})


if __name__ == "__main__":
    main()
