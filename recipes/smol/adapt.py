# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
Teaches the language model, with LoRA, to answer as the texts do: in one short sentence, and right where we know.

    python adapt.py smollm2 texts.jsonl work
"""

import argparse
import random
from pathlib import Path

import torch
from loop import pad, read_corpus, run, train
from peft import LoraConfig, get_peft_model
from texts import SYSTEM_PROMPT, complete, prompt
from transformers import AutoModelForCausalLM, AutoTokenizer

from ttt_omni.files_ttt_omni import new_folder


BATCH_SIZE = 16
SEVERAL = 0.15  # share of the batches of conversations that have several turns
RANK = 10
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def token_ids(tokenizer, turns: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """A conversation `[T]` of questions and answers, and its labels, -100 outside of the answers."""
    messages = [{"role": "system", "content": SYSTEM_PROMPT}]
    ids, labels = [], []
    for question, answer in turns:
        messages.append({"role": "user", "content": question})
        asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        said = tokenizer(f"{answer}{tokenizer.eos_token}", add_special_tokens=False)["input_ids"]
        labels += [-100] * (len(asked) - len(ids)) + said
        ids = asked + said
        messages.append({"role": "assistant", "content": answer})
    return torch.tensor(ids), torch.tensor(labels)


def draw_batch(items: list, size: int, draw: random.Random) -> list[list]:
    """Conversations of one turn each, or now and then of several: of one kind, so that little is padding."""
    turns = draw.randint(2, 3) if draw.random() < SEVERAL else 1
    return [draw.sample(items, turns) for _ in range(max(1, size // turns))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or repository of the language model")
    parser.add_argument("texts", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--lr", type=float, default=1e-3)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16, attn_implementation="eager")
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS))
    records = read_corpus(arguments.texts)
    training = [record for record in records if record["split"] == "train"]
    judged = [record for record in records if record["split"] == "held_out" and "word" in record][:100]

    def loss_of(draw: random.Random) -> torch.Tensor:
        batch = [
            token_ids(tokenizer, [tuple(turn["value"] for turn in record["conversations"]) for record in turns])
            for turns in draw_batch(training, BATCH_SIZE, draw)
        ]
        ids, labels = pad([ids for ids, _ in batch]), pad([labels for _, labels in batch], -100)
        hidden_states = model.get_base_model().model(ids).last_hidden_state[:, :-1]
        is_target = labels[:, 1:] != -100
        logits = model.get_base_model().lm_head(hidden_states[is_target]).float()
        return torch.nn.functional.cross_entropy(logits, labels[:, 1:][is_target])

    def evaluate() -> dict:
        said = complete(
            model,
            tokenizer,
            [prompt(tokenizer, record["conversations"][0]["value"]) for record in judged],
            max_new_tokens=24,
            do_sample=False,
        )
        right = sum(record["word"].lower() in text.lower() for record, text in zip(judged, said))
        return {"right": right / max(len(judged), 1), "said": said[:5]}

    train(arguments.folder / "adapt.pt", model, loss_of, steps=arguments.steps, lr=arguments.lr, evaluate=evaluate)
    if not (arguments.folder / "adapter").exists():
        with new_folder(arguments.folder / "adapter") as folder:
            model.save_pretrained(folder)
    merged = model.merge_and_unload()
    with new_folder(arguments.folder / "adapted") as folder:
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    run(main)
