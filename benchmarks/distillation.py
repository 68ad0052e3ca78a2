# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
What replacing attention by TTT costs, and what distillation gives back.

    python benchmarks/distillation.py [--layers 3] [--no-rope] [--output FILE]

A small Llama, the parent, is trained on the source text of Python's standard library, converted in replace mode,
calibrated, matched layer by layer to the parent's attention, and distilled from the parent's logits, as
`ttt-omni distill` does: TTT is trained in full, all else by LoRA. After each step, the perplexity per token of
windows of 512 tokens from files that no model was trained on, and what TTT misses of attention, as a share of it.
"no memory" is the parent with the output of the same layers' attention set to 0, "64 tokens" the parent on windows of
64.

`--folder` keeps the parent and takes it up again.
"""

import argparse
import math
import shutil
import sysconfig
import tempfile
import time
from pathlib import Path

import torch
from peft import get_peft_model
from reporting import RESULTS, environment, store
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import trange
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ttt_omni import TTTOmniConfig, TTTOmniForCausalLM, ttt_lora_config
from ttt_omni.conversion import convert_llama_omni
from ttt_omni.conversion.graft import select_layers
from ttt_omni.training import calibrate, layer_matching_loss, logit_matching_loss, make_parent


VOCAB_SIZE = 1024
HIDDEN_SIZE = 128
HEAD_DIM = 64
NUM_LAYERS = 4
LENGTH = 512
PARENT_ROWS, ROWS = 8, 4  # of a batch
LEARNING_RATES = {"parent": 3e-3, "layer matching": 3e-3, "distillation of logits": 2e-3}
HELD_OUT = 20  # every so many files
EVALUATED = 64  # windows


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE - 1, show_progress=False, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(["<|reserved_special_token_0|>"])  # Llama's, which the conversion asks for
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def read_corpus() -> list[str]:
    """The source files of Python's standard library, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "test", "tests"}
    paths = (path for path in sorted(root.rglob("*.py")) if not left_out & set(path.relative_to(root).parts))
    return [path.read_text(encoding="utf-8", errors="replace") for path in paths]


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.LongTensor:
    return torch.tensor([token for ids in tokenizer(texts).input_ids for token in ids])


def batch_of(text: torch.LongTensor, generator: torch.Generator, rows: int = ROWS) -> dict[str, torch.Tensor]:
    """Windows from anywhere in `text`."""
    starts = torch.randint(len(text) - LENGTH, (rows, 1), generator=generator)
    input_ids = text[starts + torch.arange(LENGTH)]
    return {"input_ids": input_ids, "labels": input_ids}


def optimize(name: str, parameters, loss_of, text: torch.LongTensor, num_steps: int, rows: int = ROWS) -> None:
    """AdamW with a warm-up and a cosine decay on random windows of `text`."""
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATES[name], total_steps=num_steps, pct_start=0.1, cycle_momentum=False
    )
    generator = torch.Generator().manual_seed(0)
    for _ in (progress := trange(num_steps, desc=f"Training: {name}", mininterval=10)):
        loss = loss_of(batch_of(text, generator, rows))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        progress.set_postfix(loss=loss.item(), refresh=False)


def train_parent(folder: Path, text: torch.LongTensor, num_steps: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=3 * HIDDEN_SIZE,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=HIDDEN_SIZE // HEAD_DIM,
        num_key_value_heads=1,
        head_dim=HEAD_DIM,
    )
    model = LlamaForCausalLM(config)
    optimize("parent", model.parameters(), lambda batch: model(**batch).loss, text, num_steps, PARENT_ROWS)
    model.save_pretrained(folder)


@torch.no_grad()
def perplexity(model, windows: torch.LongTensor) -> float:
    """Per token of `windows` `[N, T]`, but the first of each."""
    losses = [model(input_ids=rows, labels=rows, use_cache=False).loss.item() for rows in windows.split(ROWS)]
    return math.exp(sum(losses) / len(losses))


def measure(arguments: argparse.Namespace, folder: Path) -> dict:
    """Perplexity after each step, and what the steps took."""
    texts = read_corpus()
    tokenizer = make_tokenizer(texts[::5])
    train_text = tokenize(tokenizer, [x for i, x in enumerate(texts) if i % HELD_OUT])
    held_out = tokenize(tokenizer, texts[::HELD_OUT])
    windows = held_out[: len(held_out) // LENGTH * LENGTH].view(-1, LENGTH)
    windows = windows[:: max(1, len(windows) // EVALUATED)][:EVALUATED]
    source, graft = folder / "source", folder / f"graft-{arguments.layers}-{arguments.ttt_type}"
    tokenizer.save_pretrained(source)
    if not (source / "config.json").exists():
        train_parent(source, train_text, arguments.parent_steps)
    shutil.rmtree(graft, ignore_errors=True)
    options = {"layers": arguments.layers, "ttt_type": arguments.ttt_type}
    convert_llama_omni(source, graft, mode="replace", dtype="float32", **options)
    config = TTTOmniConfig.from_pretrained(graft)
    config.text_config.ttt_scan_checkpoint_group_size = 0
    if not arguments.rope:
        config.text_config.ttt_rope_theta = None
    config.text_config.ttt_base_lr = arguments.base_lr
    student = TTTOmniForCausalLM.from_pretrained(graft, config=config)
    parent = make_parent(student, source)
    rows = []

    def report(name: str, model=student, windows=windows, **more) -> None:
        row = {"after": name, "perplexity": perplexity(model, windows), **more}
        rows.append(row)
        ratio = row["perplexity"] / rows[0]["perplexity"] - 1
        missed = f"{row['missed']:.3f}" if "missed" in row else ""
        print(f"| {name} | {row['perplexity']:.3f} | {100 * ratio:+.1f} % | {missed} |", flush=True)

    def missed() -> float:
        with torch.no_grad():
            return layer_matching_loss(student, parent, {"input_ids": windows[:ROWS]}).item()

    print("| | perplexity | to the parent's | missed of attention |")
    print("| --- | --- | --- | --- |")
    report("parent", parent)
    report("parent, 64 tokens", parent, windows.reshape(-1, 64))
    layers = [student.model.language_model.layers[index] for index in select_layers(arguments.layers, NUM_LAYERS)]
    hooks = [layer.ttt.register_forward_hook(lambda module, args, output: 0 * output) for layer in layers]
    report("no memory")
    for hook in hooks:
        hook.remove()
    report("graft", missed=missed())
    generator = torch.Generator().manual_seed(1)
    calibrate(student, [batch_of(train_text, generator) for _ in range(4)])
    report("calibration", missed=missed())

    projections = r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
    adapter = ttt_lora_config(student, modules_to_save=["ttt"], target_modules=projections)
    model = get_peft_model(student, adapter)

    def match(batch):
        return layer_matching_loss(model, parent, batch)

    def distill(batch):
        states = model.model.model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
        return logit_matching_loss(states, parent, batch)

    for name, loss_of, num_steps in (
        ("layer matching", match, arguments.matching_steps),
        ("distillation of logits", distill, arguments.distillation_steps),
    ):
        start = time.process_time()
        optimize(name, model.parameters(), loss_of, train_text, num_steps)
        report(name, missed=missed(), steps=num_steps, seconds=time.process_time() - start)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {
        **{name: value for name, value in vars(arguments).items() if name not in ("folder", "output")},
        "hidden_size": HIDDEN_SIZE,
        "head_dim": HEAD_DIM,
        "num_layers": NUM_LAYERS,
        "tokens_per_step": LENGTH * ROWS,
        "tokens_of_corpus": len(train_text),
        "tokens_held_out": windows.numel(),
        "trained_parameters": trained,
        "rows": rows,
        **environment(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="3", help="whose attention is replaced, of 0-3")
    parser.add_argument("--ttt-type", default="linear")
    parser.add_argument("--base-lr", type=float, default=1.0, help="TTT's inner base learning rate")
    parser.add_argument("--no-rope", dest="rope", action="store_false", help="no rotary embedding in TTT")
    parser.add_argument("--parent-steps", type=int, default=900)
    parser.add_argument("--matching-steps", type=int, default=200)
    parser.add_argument("--distillation-steps", type=int, default=600)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--output", type=Path, default=RESULTS / "distillation.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        result = measure(arguments, arguments.folder or Path(temporary))
    store(arguments.output, result)


if __name__ == "__main__":
    main()
