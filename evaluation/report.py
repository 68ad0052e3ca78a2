# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Results as a table, a JSON file and a picture."""

import json
from pathlib import Path
from typing import Any

from .conditions import CONDITIONS


LABELS = CONDITIONS | {"state": "state alone", "nothing told": "nothing told"}


def table(rows: list[dict[str, Any]], column: str, value: str, form: str) -> str:
    """
    Markdown with a line per condition, and a column per value of `column`.

    Args:
        form: of `value`, as in `"{:.0%}"`.
    """
    columns = sorted({row[column] for row in rows})
    lines = [f"| {column} | " + " | ".join(f"{x:,}" for x in columns) + " |", "|" + " --- |" * (1 + len(columns))]
    for condition in dict.fromkeys(row["condition"] for row in rows):
        found = {row[column]: row[value] for row in rows if row["condition"] == condition}
        cells = [form.format(found[x]) if found.get(x) is not None else "–" for x in columns]
        lines.append(f"| {LABELS[condition]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(panels: dict[str, tuple[str, list[dict[str, Any]]]], path: Path, column: str, chance: str | None) -> None:
    """
    A picture with a line per condition.

    Args:
        panels: what each panel shows: of which rows which value, by what it is called.
        path: of the PNG file.
        column: of the horizontal axis, in tokens.
        chance: what is shown beside it in grey, of the first condition.
    """
    from matplotlib.figure import Figure  # an optional dependency

    figure = Figure(figsize=(7 * len(panels), 4), layout="constrained")
    for axes, (label, (value, rows)) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for condition in dict.fromkeys(row["condition"] for row in rows):
            found = [row for row in rows if row["condition"] == condition and row[value] is not None]
            if found:
                points = [row[column] for row in found], [row[value] for row in found]
                axes.plot(*points, marker="o", label=LABELS[condition])
        if chance is not None:
            found = [row for row in rows if row["condition"] == rows[0]["condition"]]
            points = [row[column] for row in found], [row[chance] for row in found]
            axes.plot(*points, color="grey", linestyle=":", label="always the same answer")
            axes.set_ylim(-0.02, 1.02)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({row[column] for row in rows}))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel(f"{column}, tokens")
        axes.set_ylabel(label)
        axes.legend()
    figure.savefig(path, dpi=150)


def write(folder: Path, name: str, result: dict[str, Any]) -> None:
    """`result` as JSON in `folder`."""
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
