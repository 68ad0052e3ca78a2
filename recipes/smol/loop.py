# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""What the stages have in common: a loop that goes on where it was interrupted, to the same end."""

import json
import random
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ttt_omni.files_ttt_omni import new_file


SAVE_EVERY, LOG_EVERY = 100, 20


def train(
    state: Path,
    modules: nn.Module,
    loss_of: Callable[[random.Random], torch.Tensor],
    *,
    steps: int,
    lr: float,
    evaluate: Callable[[], dict[str, Any]] | None = None,
    evaluate_every: int = 500,
) -> None:
    """
    Trains those parameters of `modules` that require gradients, in bfloat16 where that is safe, with AdamW and a
    learning rate that warms up and decays.

    Args:
        state: file that holds all that is needed to go on; its `.jsonl` neighbour has the losses.
        loss_of: the loss of a step, which draws its batch by the generator that it gets, the same for the same step.
        evaluate: figures to log on the way and at the end.
    """
    parameters = {name: p for name, p in modules.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr, weight_decay=0.01, betas=(0.9, 0.98))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps + 1, pct_start=min(0.1, 300 / steps)
    )
    modules.train()
    begun = 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        begun = saved["step"]
        if saved["steps"] != steps or saved["parameters"].keys() != parameters.keys():
            raise ValueError(f"{state} is of another run, of {saved['steps']} steps: delete it to begin anew.")
        for name, value in saved["parameters"].items():
            parameters[name].data.copy_(value)
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
    log, since, losses = state.with_suffix(".jsonl"), time.monotonic(), []
    for step in (progress := tqdm(range(begun, steps), initial=begun, total=steps, desc=state.stem)):
        torch.manual_seed(step)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(random.Random(step))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        is_last = step + 1 == steps
        if is_last or (step + 1) % LOG_EVERY == 0:
            entry = {"step": step + 1, "loss": sum(losses) / len(losses), "seconds": time.monotonic() - since}
            losses = []
            if evaluate is not None and (is_last or (step + 1) % evaluate_every == 0):
                modules.eval()
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                    entry |= evaluate()
                modules.train()
            progress.set_postfix_str(f"loss {entry['loss']:.3f}")
            with open(log, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        if is_last or (step + 1) % SAVE_EVERY == 0:
            kept = {"step": step + 1, "steps": steps, "parameters": {n: p.detach() for n, p in parameters.items()}}
            kept |= {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
            with new_file(state) as path:
                torch.save(kept, path)


def run(main: Callable[[], None]) -> None:
    """Runs a script; what a user can get wrong is said in a line."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}")


def read_corpus(path: Path) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def pad(rows: Iterable[torch.Tensor], value: float = 0) -> torch.Tensor:
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
