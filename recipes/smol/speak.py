# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
Teaches the speech decoder to say in units what the language model says in words, by CTC.

    python speak.py work/adapted corpus work --units 200

Its input are the language model's hidden states: for each token of an answer the one that predicted it. They are
computed once, and kept.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from loop import pad, read_corpus, run, train
from safetensors.torch import save_file
from texts import prompt
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from ttt_omni.configuration_ttt_omni import TTTOmniSpeechDecoderConfig
from ttt_omni.files_ttt_omni import new_file
from ttt_omni.modeling_ttt_omni import TTTOmniSpeechDecoder


BATCH_SIZE = 24
IN_A_ROW = (1, 1, 2, 3)  # answers, so that a long one is not lost at its second sentence
NOISE = 0.15  # of the hidden states, which differ a little with how a question was asked
SIZES = {
    "num_hidden_layers": 4,
    "hidden_size": 320,
    "intermediate_size": 1024,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "rms_norm_eps": 1e-5,
    "sliding_window": 480,  # frames, which no answer of the corpus has: it goes on as it was trained for ever
}


@torch.no_grad()
def hidden_states(model_folder: Path, records: list[dict], path: Path) -> list[torch.Tensor | None]:
    """
    Of each record's last answer, the end of the turn included, `[T, hidden]` in bfloat16; kept in the file `path`.
    `None` for what was to be repeated, and the language model would say in other words.
    """
    if path.exists():
        return torch.load(path, weights_only=True)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    states = []
    for start in tqdm(range(0, len(records), 32), desc="Hidden states", unit=" batches"):
        rows, lengths = [], []
        for record in records[start : start + 32]:
            *turns, answer = (turn["value"] for turn in record["conversations"])
            asked, said = (
                tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt(tokenizer, *turns), answer)
            )
            rows.append(torch.tensor(asked + said))
            lengths.append((len(asked), len(turns) > 1))
        hidden = model.model(pad(rows)).last_hidden_state
        for row, (first, is_repeated), ids in zip(hidden, lengths, rows):
            row = row[first - 1 : len(ids)].clone()
            says_it = not is_repeated or model.lm_head(row[:-1]).argmax(-1).equal(ids[first:])
            states.append(row if says_it else None)
    with new_file(path) as made:
        torch.save(states, made)
    return states


def joined(answers: list[tuple[str, torch.Tensor, torch.Tensor]]) -> tuple[str, torch.Tensor, torch.Tensor]:
    """Answers, each its split, hidden states and units, as one."""
    splits, rows, units = zip(*answers)
    return splits[0], torch.cat(rows), torch.cat(units)


def edit_distance(a: list[int], b: list[int]) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the language model, as `adapt.py` left it")
    parser.add_argument("corpus", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--units", type=int, required=True, help="how many different ones there are")
    parser.add_argument("--upsample", type=int, default=12, help="frames a token (default: 12)")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    records = [r for r in read_corpus(arguments.corpus / "units.jsonl") if "units" in r["conversations"][-1]]
    states = hidden_states(arguments.model, records, arguments.folder / "states.pt")
    spoken = [
        (record["split"], row, torch.tensor(record["conversations"][-1]["units"]))
        for record, row in zip(records, states)
        if row is not None
    ]
    spoken = [item for item in spoken if len(item[2]) < arguments.upsample * len(item[1])]
    training = [item for item in spoken if item[0] == "train"]
    held_out = [item for item in spoken if item[0] == "held_out"][:64]
    width = spoken[0][1].shape[1]
    config = TTTOmniSpeechDecoderConfig(
        input_size=width, upsample_factor=arguments.upsample, unit_vocab_size=arguments.units, **SIZES
    )
    torch.manual_seed(0)
    decoder = TTTOmniSpeechDecoder(config)
    training.sort(key=lambda item: len(item[1]))

    def loss_of(draw: random.Random) -> torch.Tensor:
        start = draw.randint(0, max(0, len(training) - 4 * BATCH_SIZE))
        chosen = draw.sample(training[start : start + 4 * BATCH_SIZE], min(BATCH_SIZE, len(training)))
        count = draw.choice(IN_A_ROW)
        batch = [joined(chosen[place : place + count]) for place in range(0, len(chosen), count)]
        rows, labels = pad((row.float() for _, row, _ in batch)), pad((units for *_, units in batch), -100)
        rows = rows + NOISE * rows.std() * torch.randn_like(rows)
        is_answer = pad(torch.zeros(len(row), dtype=torch.long) for _, row, _ in batch)
        for place, (_, row, _) in enumerate(batch):
            is_answer[place, len(row) :] = -100
        return decoder.ctc_loss(rows, is_answer, labels)

    def evaluate() -> dict:
        wrong = total = 0
        for _, row, units in held_out:
            said = decoder.collapse(decoder(row[None].float())[0].argmax(-1)).tolist()
            wrong, total = wrong + edit_distance(said, units.tolist()), total + len(units)
        return {"unit_error_rate": wrong / max(total, 1)}

    train(arguments.folder / "speak.pt", decoder, loss_of, steps=arguments.steps, lr=arguments.lr, evaluate=evaluate)
    kept = {"input_size": width, "upsample_factor": arguments.upsample, "unit_vocab_size": arguments.units, **SIZES}
    (arguments.folder / "speak.json").write_text(json.dumps(kept, indent=2))
    with new_file(arguments.folder / "speak.safetensors") as path:
        save_file({name: tensor.contiguous() for name, tensor in decoder.state_dict().items()}, path)


if __name__ == "__main__":
    run(main)
