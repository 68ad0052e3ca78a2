# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""
Parent to hybrid graft with LoRA: a short run of the tiny model on a spoken corpus, and what becomes of its adapter.

    python benchmarks/finetuning.py [--steps 200] [--output benchmarks/results/finetuning.json]

espeak-ng (a Debian package) speaks examples/conversations.jsonl; a random HuBERT, and clusters fitted to it, make
units of the answers; then the graft is calibrated and fine-tuned, all by the programs that a user has. The adapter is
loaded in a new process that knows the model by its remote code alone. Needs what ".[train]" installs.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from reporting import RESULTS, environment, store
from safetensors.torch import save_file
from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

from ttt_omni import TTTOmniForCausalLM
from ttt_omni.conversion.tiny import NUM_UNITS
from ttt_omni.training import ConversationCollator, stages


ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
STAGE = {
    "length": 400,
    "drop_audio_padding": True,
    "learning_rate": 1e-2,
    "memory_learning_rate": 2e-2,
    "warmup_steps": 10,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "activation_checkpointing": False,
    "use_cpu": True,
    "save_strategy": "no",
    "report_to": "none",
}

# Arguments: base, adapter, file of inputs and logits of the model that was trained, folder for the merged model.
REMOTE_CODE = """
import json, sys, torch
sys.modules.update({"ttt_omni": None, "ttt_kernels": None})  # importing them fails
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

def fresh(path):
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)

base, adapter, tensors, folder = sys.argv[1:]
inputs = load_file(tensors)
trained = inputs.pop("logits")  # [B, T, vocabulary]
with torch.no_grad():
    before = fresh(base)(**inputs).logits
    model = PeftModel.from_pretrained(fresh(base), adapter).eval()
    loaded = model(**inputs).logits
    model = model.merge_and_unload()
    merged = model(**inputs).logits
    model.save_pretrained(folder)
    saved = fresh(folder)(**inputs).logits
assert type(model).__module__.startswith("transformers_modules."), type(model)
print(json.dumps({
    "trained - base": (trained - before).abs().max().item(),
    "trained - loaded": (trained - loaded).abs().max().item(),
    "trained - merged": (trained - merged).abs().max().item(),
    "merged - merged, saved and loaded": (merged - saved).abs().max().item(),
}))
"""


def make_speech_model(folder: Path, num_layers: int = 2) -> None:
    """A small random HuBERT."""
    torch.manual_seed(0)
    config = HubertConfig(
        hidden_size=32,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        intermediate_size=64,
        conv_dim=(16,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    )
    HubertModel(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder)


def make_corpus(folder: Path) -> Path:
    """The manifest of the spoken conversations, with units."""
    spoken, hubert = folder / "spoken", folder / "hubert"
    manifest = spoken / "units.jsonl"
    make_speech_model(hubert)
    run(EXAMPLES / "speak.py", EXAMPLES / "conversations.jsonl", spoken, "--answer-voice", "en-us")
    arguments = ("--model", hubert, "--layer", 1, "--kmeans", folder / "kmeans.npy", "--fit", NUM_UNITS)
    run(EXAMPLES / "extract_units.py", spoken / "corpus.jsonl", manifest, *arguments)
    return manifest


def run(*arguments) -> str:
    """What `python` with these arguments prints; where it fails, so do we, after what it said."""
    result = subprocess.run([sys.executable, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    if result.returncode != 0:
        sys.exit(f"finetuning.py: error: `python {' '.join(map(str, arguments[:3]))} …` failed.")
    return result.stdout


@torch.no_grad()
def losses(model: torch.nn.Module, batches: list[dict]) -> dict[str, float]:
    """Those of text and speech, as means over the batches."""
    outputs = [model(**batch) for batch in batches]
    return {
        "text": sum(output.lm_loss.item() for output in outputs) / len(outputs),
        "speech": sum(output.ctc_loss.item() for output in outputs) / len(outputs),
    }


@torch.no_grad()
def compare(trained: torch.nn.Module, batch: dict, base: Path, adapter: Path) -> dict[str, float]:
    """Largest differences of the logits of the model that was trained from those of its adapter in a new process."""
    inputs = {name: batch[name] for name in batch if name not in ("labels", "unit_labels")}
    with TemporaryDirectory() as folder:
        tensors = Path(folder, "tensors.safetensors")
        save_file({**inputs, "logits": trained(**inputs).logits}, tensors)
        return json.loads(run("-c", REMOTE_CODE, base, adapter, tensors, Path(folder, "merged")).splitlines()[-1])


def fine_tune(loss: str, steps: int, model: Path, manifest: Path, output: Path) -> dict:
    """What `ttt-omni finetune` makes of the graft `model`: its losses, and its adapter's logits."""
    values = STAGE | {"loss": loss, "max_steps": steps, "model": model, "manifest": manifest, "output_dir": output}
    flags = [f"--{name}={value}" for name, value in values.items()]
    trainer = stages.train(*stages.parse(["8k", *flags]))
    trained = trainer.model.eval()
    dataset = trainer.train_dataset
    collate = ConversationCollator(trainer.data_collator.pad_token_id)
    batches = [collate([item]) for item in dataset]
    return {
        "loss": loss,
        "curve": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "before": losses(TTTOmniForCausalLM.from_pretrained(model), batches),
        "after": losses(trained, batches),
        "differences": compare(trained, collate([dataset[0], dataset[len(dataset) - 1]]), model, output),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", type=Path, default=RESULTS / "finetuning.json")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        folder = Path(folder)
        os.environ["HF_MODULES_CACHE"] = str(folder / "modules")
        graft, calibrated = folder / "graft", folder / "calibrated"
        manifest = make_corpus(folder)
        run("-m", "ttt_omni", "make-tiny", graft)
        run("-m", "ttt_omni", "calibrate", "--model", graft, "--data", manifest, "--output", calibrated)
        runs = [fine_tune(loss, arguments.steps, calibrated, manifest, folder / loss) for loss in ("both", "lm")]

    print(f"\nstep | {' | '.join('loss=' + run['loss'] for run in runs)}")
    for step in sorted({*range(0, arguments.steps, 20), arguments.steps - 1}):
        print(f"{step + 1} | {' | '.join(format(run['curve'][step], '.2f') for run in runs)}")
    print("\nlosses on the corpus | text | speech")
    for name, row in [("parent", runs[0]["before"]), *((f"after loss={run['loss']}", run["after"]) for run in runs)]:
        print(f"{name} | {row['text']:.2f} | {row['speech']:.2f}")
    print(f"\nlargest difference of logits, in a new process | {' | '.join('loss=' + run['loss'] for run in runs)}")
    for name in runs[0]["differences"]:
        print(f"{name} | {' | '.join(format(run['differences'][name], '.1e') for run in runs)}")
    store(arguments.output, {"environment": environment(), "stage": STAGE, "runs": runs})


if __name__ == "__main__":
    main()
