# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""`ttt-omni evaluate`: what a model remembers, and how it speaks, as a table, and as JSON and PNG in a folder."""

import os
import sys
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from ..files_ttt_omni import new_folder
from ..processing_ttt_omni import TTTOmniProcessor
from .conditions import load
from .facts import read_facts
from .perplexity import evaluate_perplexity
from .recall import evaluate_recall
from .report import plot, table, write
from .speech import evaluate_speech, voice_encoder
from .speech import recognizer as find_recognizer


def recall(
    model: str,
    talk: str,
    output: str | os.PathLike,
    facts: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    **kwargs: Any,
) -> None:
    """`ttt-omni evaluate recall`; the further arguments are those of [`evaluate_recall`]."""
    own_facts = None if facts is None else read_facts(facts)
    with _folder(output) as folder:
        found, tokenizer = load(model, dtype, device)
        rows = evaluate_recall(found, tokenizer, talk, own_facts=own_facts, **kwargs)
        panels = {}
        for count in sorted({row["facts"] for row in rows}):
            label = f"right answers, {count} told"
            panels[label] = "recall", [row for row in rows if row["facts"] == count]
            print(f"\n{label}\n\n" + table(panels[label][1], "distance", "recall", "{:.0%}"))
        write(folder, "recall", _about(model) | {"facts": facts, "talk": str(talk), **kwargs, "rows": rows})
        plot(panels, folder / "recall.png", "distance", chance="chance")


def perplexity(
    model: str,
    text: str,
    output: str | os.PathLike,
    dtype: str = "auto",
    device: str = "auto",
    **kwargs: Any,
) -> None:
    """`ttt-omni evaluate perplexity`; the further arguments are those of [`evaluate_perplexity`]."""
    with _folder(output) as folder:
        found, tokenizer = load(model, dtype, device)
        rows = evaluate_perplexity(found, tokenizer, text, **kwargs)
        print(table(rows, "last", "perplexity", "{:.2f}"))
        write(folder, "perplexity", _about(model) | {"text": str(text), **kwargs, "rows": rows})
        panels = {"perplexity": "perplexity", "state_norm": "norm of the state"}
        panels = {label: (name, rows) for name, label in panels.items() if any(row[name] is not None for row in rows)}
        plot(panels, folder / "perplexity.png", "last", chance=None)


def speech(
    model: str,
    text: str,
    recognizer: str,
    output: str | os.PathLike,
    dtype: str = "auto",
    device: str = "auto",
    language: str = "en",
    **kwargs: Any,
) -> None:
    """`ttt-omni evaluate speech`; the further arguments are those of [`evaluate_speech`]."""
    if find_spec("jiwer") is None:
        raise ImportError("Word error rates need jiwer: pip install 'ttt-omni[evaluate]'.")
    with _folder(output) as folder:
        recognize, embed = find_recognizer(recognizer, language), voice_encoder()
        if embed is None:
            print("Voices are not compared: that needs Resemblyzer.", file=sys.stderr)
        found, processor = load(model, dtype, device)[0], TTTOmniProcessor.from_pretrained(model)
        rows = evaluate_speech(found, processor, text, recognize, language=language, embed=embed, **kwargs)
        print(speech_table(rows))
        if rows[-1]["fell"]:
            what = " and ".join(rows[-1]["fell"])
            print(f"Stopped at {rows[-1]['length']:,} tokens: {what} under 90 % of what sentences alone have.")
        about = _about(model) | {"text": str(text), "recognizer": str(recognizer), "language": language}
        write(folder, "speech", about | kwargs | {"rows": rows})
        panels = {"words wrong": "wer", "similarity of the voice": "similarity", "loudness": "loudness"}
        panels = {label: (name, rows[1:]) for label, name in panels.items() if rows[0][name] is not None}
        plot(panels, folder / "speech.png", "length", chance=None)


def speech_table(rows: list[dict[str, Any]]) -> str:
    """A line per piece, as Markdown."""
    columns = {
        "length": "{:,}",
        "minutes": "{:.1f}",
        "wer": "{:.0%}",
        "similarity": "{:.3f}",
        "loudness": "{:.4f}",
        "silence": "{:.0%}",
        "repetition": "{:.1%}",
    }
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        cells = [form.format(row[name]) if row[name] is not None else "–" for name, form in columns.items()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _folder(output: str | os.PathLike):
    if find_spec("matplotlib") is None:  # known before minutes are spent
        raise ImportError("The picture needs Matplotlib: pip install 'ttt-omni[evaluate]'.")
    return new_folder(output)


def _about(model: str) -> dict[str, str]:
    return {"model": str(model), **{name: version(name) for name in ("torch", "transformers")}}
