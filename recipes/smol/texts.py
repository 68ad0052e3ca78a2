# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
The texts of the corpus: questions written for it and questions that the language model makes up, with its own answers.

    python texts.py smollm2 texts.jsonl --made-up 8000

A line is a conversation in LLaMA-Omni's form, its questions as text, with `"split"`, `"train"` or `"held_out"`, and
where one word of the answer must be right, `"kind"` and `"word"`. The questions with one right answer come with it;
all other answers are the first sentence that the language model itself says, so that nothing of its skill is lost.
Lines of the split `"spelling"` are questions with words by chance in them, without answers: what is said there cannot
be guessed, only heard.
"""

import argparse
import json
import random
import re
from pathlib import Path

import torch
from facts import facts, open_questions
from loop import run
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ttt_omni.files_ttt_omni import new_file


SYSTEM_PROMPT = "You are a voice assistant. Answer in one short sentence."
# Before a question that the model makes up itself.
ASKING_PROMPTS = (
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    "You answer short everyday questions that people ask aloud.",
    SYSTEM_PROMPT,
)
COMMON_WORDS = 8000  # of the tokenizer's, whose order is that of how common they are
MAX_QUESTION_WORDS, MAX_ANSWER_WORDS = 14, 24
BATCH_SIZE = 96
SPEAKABLE = re.compile(r"[A-Za-z][A-Za-z',;: -]*[.?!]")


def sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.?!])\s+", text.strip())


def is_speakable(text: str, max_words: int) -> bool:
    """Whether it is one sentence of plain words, in which nothing has to be read in another way than it is spelt."""
    words = text.split()
    is_plain = SPEAKABLE.fullmatch(text) and not re.search(r"[A-Z]{2}", text) and ":" not in text
    return bool(is_plain) and 1 <= len(words) <= max_words and max(map(len, words)) <= 16


@torch.no_grad()
def complete(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], **kwargs) -> list[str]:
    """What the model says after each of `prompts`."""
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    made = model.generate(**batch, **kwargs)[:, batch.input_ids.shape[1] :]
    return tokenizer.batch_decode(made, skip_special_tokens=True)


def made_up_questions(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int) -> list[str]:
    """`count` different questions that the model expects from its user."""
    prompts = [f"<|im_start|>system\n{prompt}<|im_end|>\n<|im_start|>user\n" for prompt in ASKING_PROMPTS]
    found, progress = {}, tqdm(total=count, desc="Questions", unit=" questions")
    while len(found) < count:
        for text in complete(
            model, tokenizer, prompts * (BATCH_SIZE // len(prompts)), max_new_tokens=20, do_sample=True
        ):
            for question in sentences(text)[:2]:
                if is_speakable(question, MAX_QUESTION_WORDS) and len(question.split()) >= 3:
                    found.setdefault(question)
        progress.update(min(len(found), count) - progress.n)
    return list(found)[:count]


def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: list[str]) -> dict[str, str]:
    """The model's own answers, of those `questions` that it answers in a speakable sentence."""
    found = {}
    questions = sorted(questions, key=len)
    for start in tqdm(range(0, len(questions), BATCH_SIZE), desc="Answers", unit=" batches"):
        batch = questions[start : start + BATCH_SIZE]
        prompts = [prompt(tokenizer, question) for question in batch]
        for question, text in zip(batch, complete(model, tokenizer, prompts, max_new_tokens=36, do_sample=False)):
            if is_speakable(sentences(text)[0], MAX_ANSWER_WORDS):
                found[question] = sentences(text)[0]
    return found


def prompt(tokenizer: PreTrainedTokenizerBase, *turns: str) -> str:
    """A question, and before it those that were asked and answered."""
    messages = [{"role": "system", "content": SYSTEM_PROMPT}]
    messages += [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def unguessable(tokenizer: PreTrainedTokenizerBase, questions: list[str], count: int) -> list[str]:
    """`count` of `questions`, in which other words, common in English, stand for some or for all."""
    draw = random.Random(0)
    pieces = sorted((index, piece) for piece, index in tokenizer.get_vocab().items())
    words = [piece[1:] for _, piece in pieces if re.fullmatch("Ġ[a-z]{3,12}", piece)][:COMMON_WORDS]
    found = []
    for question in draw.choices(questions, k=count):
        kept = draw.choice([0.0, 0.6, 0.8])
        said = [word if draw.random() < kept else draw.choice(words) for word in question[:-1].split()[:10]]
        found.append(" ".join(said).capitalize() + question[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or repository of the language model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--made-up", type=int, default=8000, help="questions of the model's own (default: 8000)")
    parser.add_argument("--unguessable", type=int, default=4000, help="questions of words by chance (default: 4000)")
    parser.add_argument("--written", type=int, default=10_000, help="at most so many of those written for this")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16)

    shuffle = random.Random(0).shuffle
    written = list({fact.question: fact for fact in facts()}.values())
    asked = list(dict(open_questions()).items())
    shuffle(written), shuffle(asked)
    written, asked = written[: arguments.written], asked[: arguments.written]
    made_up = made_up_questions(model, tokenizer, arguments.made_up)
    splits = dict(asked) | {question: index % 40 == 0 for index, question in enumerate(made_up)}
    own = answers(model, tokenizer, list(splits))
    records = [
        {
            "kind": fact.kind,
            "word": fact.word,
            "split": fact.held_out,
            "question": fact.question,
            "answer": fact.answer,
        }
        for fact in written
    ]
    records += [
        {"split": splits[question], "question": question, "answer": answer} for question, answer in own.items()
    ]
    shuffle(records)
    asked = [record["question"] for record in records if not record["split"]]
    records += [
        {"split": "spelling", "question": question}
        for question in unguessable(tokenizer, asked, arguments.unguessable)
    ]
    with new_file(arguments.output) as path, open(path, "w", encoding="utf-8") as file:
        for index, record in enumerate(records):
            turns = [{"from": "human", "value": record.pop("question")}]
            if "answer" in record:
                turns.append({"from": "gpt", "value": record.pop("answer")})
                record["split"] = "held_out" if record["split"] else "train"
            file.write(json.dumps({"id": str(index), **record, "conversations": turns}) + "\n")
    print(f"{arguments.output}: {len(records)} conversations")


if __name__ == "__main__":
    run(main)
