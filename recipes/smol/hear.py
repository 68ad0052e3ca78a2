# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
Teaches the projector to hear: by CTC, its embeddings spell the words of a question in the language model's own tokens.

    python hear.py graft corpus features work

No pass through the language model is needed: a frame says the token whose embedding it is nearest to, or nothing.
"""

import argparse
import random
from pathlib import Path

import jiwer
import numpy as np
import torch
from loop import pad, read_corpus, run, train
from torch import nn
from transformers import AutoTokenizer
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

from ttt_omni import TTTOmniConfig, TTTOmniForCausalLM
from ttt_omni.files_ttt_omni import new_file
from ttt_omni.modeling_ttt_omni import TTTOmniMultiModalProjector


BATCH_SIZE = 48
DROPOUT = 0.1
OTHERS = 1000  # tokens that a batch's are told apart from


class Features:
    """The encoder's hidden states of all readings of all questions, and the questions."""

    def __init__(self, corpus: Path, folder: Path):
        self.records = read_corpus(corpus / "questions.jsonl")
        self.of = {}  # question -> reading -> copies
        for path in sorted(folder.glob("*.npz")):
            with np.load(path) as file:
                for key in file.files:
                    question, reading, _ = map(int, key.split())
                    self.of.setdefault(question, {}).setdefault(reading, []).append(torch.from_numpy(file[key]))
        self.training, self.held_out, self.spelling = (
            [index for index in self.of if self.records[index]["split"] == split]
            for split in ("train", "held_out", "spelling")
        )
        self.said = self.training + self.spelling

    def draw(self, index: int, draw: random.Random) -> torch.Tensor:
        """One of the readings `[n, 5 * d_model]` of a question."""
        return draw.choice(draw.choice(list(self.of[index].values())))

    def text(self, index: int) -> str:
        return self.records[index]["text"]


class Normalized(nn.Module):
    """A projector of hidden states that are brought to mean 0 and variance 1, which is folded into it at the end."""

    def __init__(self, projector: TTTOmniMultiModalProjector, mean: torch.Tensor, std: torch.Tensor):
        super().__init__()
        self.projector = projector
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        states = nn.functional.dropout((states.float() - self.mean) / self.std, DROPOUT, self.training)
        return self.projector.linear_2(self.projector.act(self.projector.linear_1(states)))

    @torch.no_grad()
    def folded(self) -> dict[str, torch.Tensor]:
        """The projector's tensors, for hidden states as they come."""
        first, second = self.projector.linear_1, self.projector.linear_2
        weight = first.weight / self.std
        return {
            "linear_1.weight": weight,
            "linear_1.bias": first.bias - weight @ self.mean,
            "linear_2.weight": second.weight,
            "linear_2.bias": second.bias,
        }


class Speller(nn.Module):
    """From embeddings to CTC logits `[..., 1 + V]`, the blank first: their cosines with the tokens' embeddings."""

    def __init__(self, table: torch.Tensor):
        super().__init__()
        self.register_buffer("table", nn.functional.normalize(table.float(), dim=-1))
        self.blank = nn.Linear(table.shape[1], 1)
        self.scale = nn.Parameter(torch.tensor(12.0))
        self.bias = nn.Parameter(torch.zeros(len(table)))

    def forward(self, embeddings: torch.Tensor, among: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """`among`: the numbers of the tokens to tell apart, from 0; by default all of them."""
        cosines = nn.functional.normalize(embeddings.float(), dim=-1) @ self.table[among].T
        return torch.cat([self.blank(embeddings), self.scale * cosines.float() + self.bias[among]], -1).float()


def spell(logits: torch.Tensor, tokens: list[int]) -> list[int]:
    """The tokens that the frames `[n, 1 + V]` say: repeats merged, blanks dropped."""
    return [tokens[index - 1] for index in logits.argmax(-1).unique_consecutive().tolist() if index]


def ctc_loss(
    speller: Speller, embeddings: torch.Tensor, sizes: list[int], targets: list[torch.Tensor]
) -> torch.Tensor:
    """
    Of embeddings `[B, n, hidden]`, of which each row has so many frames, and the numbers of the tokens said, which are
    told apart from each other and from some more, drawn anew each time.
    """
    lengths = [torch.tensor(sizes), torch.tensor(list(map(len, targets)))]
    among, targets = torch.cat([torch.cat(targets), torch.randperm(len(speller.table))[:OTHERS]]).unique(
        return_inverse=True
    )
    log_probs = speller(embeddings, among).log_softmax(-1).transpose(0, 1)
    return nn.functional.ctc_loss(log_probs, 1 + targets[: lengths[1].sum()], *lengths, zero_infinity=True)


class Spelling:
    """What is said in those recordings that are long enough for their words, and how well that is heard."""

    def __init__(self, features: Features, tokenizer, tokens: list[int] | None = None):
        """`tokens`: those that may be said; by default all that are."""
        ids = {i: tokenizer(features.text(i), add_special_tokens=False)["input_ids"] for i in features.said}
        self.features = features
        self.tokens = tokens or sorted({token for said in ids.values() for token in said})
        number = {token: index for index, token in enumerate(self.tokens)}
        self.targets = {
            index: torch.tensor([number[token] for token in said])
            for index, said in ids.items()
            if len(said) + 2 < min(len(states) for copies in features.of[index].values() for states in copies)
        }

    def loss(
        self, ear: Normalized, speller: Speller, size: int, draw: random.Random
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of `size` recordings, drawn anew each time; and what the ear makes of them, `[size, n, hidden]`."""
        chosen = draw.sample(list(self.targets), min(size, len(self.targets)))
        frames = [self.features.draw(index, draw) for index in chosen]
        embeddings = ear(pad(frames))
        targets = [self.targets[index] for index in chosen]
        return ctc_loss(speller, embeddings, list(map(len, frames)), targets), embeddings


def statistics(features: Features) -> tuple[torch.Tensor, torch.Tensor]:
    draw = random.Random(0)
    sample = torch.cat([features.draw(index, draw).float() for index in draw.choices(features.said, k=500)])
    return sample.mean(0), sample.std(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the model of ours that is to hear")
    parser.add_argument("corpus", type=Path)
    parser.add_argument("features", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--lr", type=float, default=2e-3)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    config = TTTOmniConfig.from_pretrained(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    table = TTTOmniForCausalLM.from_pretrained(arguments.model).get_input_embeddings().weight.detach()
    features = Features(arguments.corpus, arguments.features)
    spelling = Spelling(features, tokenizer)
    tokens = spelling.tokens
    length = table[tokens].float().norm(dim=-1).mean()

    torch.manual_seed(0)
    hearing = nn.ModuleDict(
        {
            "ear": Normalized(TTTOmniMultiModalProjector(config), *statistics(features)),
            "speller": Speller(table[tokens]),
        }
    )
    normalize = EnglishTextNormalizer({})

    def loss_of(draw: random.Random) -> torch.Tensor:
        ctc, embeddings = spelling.loss(hearing["ear"], hearing["speller"], BATCH_SIZE, draw)
        return ctc + 0.01 * ((embeddings.float().norm(dim=-1) - length) ** 2 / length**2).mean()

    def evaluate() -> dict:
        heard = {}
        for index in features.held_out:
            for reading, (states, *_) in features.of[index].items():
                voice = features.records[index]["voices"][reading]
                said = tokenizer.decode(spell(hearing["speller"](hearing["ear"](states)), tokens))
                reserved = "reserved" if voice.startswith("j") and voice != "joe" else "trained"
                heard.setdefault(reserved, []).append((normalize(features.text(index)), normalize(said)))
        figures = {f"wer_{kind}": jiwer.wer(*map(list, zip(*pairs))) for kind, pairs in heard.items()}
        return figures | {"heard": [pair for pairs in heard.values() for pair in pairs[:3]]}

    state = arguments.folder / "hear.pt"
    train(state, hearing, loss_of, steps=arguments.steps, lr=arguments.lr, evaluate=evaluate)
    kept = {"ear": hearing["ear"].state_dict(), "speller": hearing["speller"].state_dict(), "tokens": tokens}
    with new_file(arguments.folder / "heard.pt") as path:
        torch.save(kept, path)


if __name__ == "__main__":
    run(main)
