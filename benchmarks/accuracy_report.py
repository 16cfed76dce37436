# SPDX-License-Identifier: Apache-2.0
"""Owns how results of accuracy.py are shown: a Markdown table and a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Cell = dict[str, Any]  # net, setting, lane, seed and, once run, accuracy (percent) and seconds
Settings = Mapping[str, Mapping[str, Sequence[str]]]  # net -> bits ("W3A8") -> lanes
Found = Mapping[tuple[str, str, str], list[float]]  # (net, setting, lane) -> accuracy of each seed
BASE = "float"


def grouped(results: Sequence[Cell]) -> dict[tuple[str, str, str], list[float]]:
    """Accuracies of all seeds by (net, setting, lane)."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for cell in results:
        found.setdefault((cell["net"], cell["setting"], cell["lane"]), []).append(cell["accuracy"])
    return found


def said(values: Sequence[float]) -> str:
    """Mean, and half the distance between the best and the worst seed."""
    mean = f"{statistics.fmean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:.1f}"


def table(results: Sequence[Cell], settings: Settings, lanes: Sequence[str]) -> str:
    """Markdown: for each net with several bits a table with a column for each; one for all other nets. A row for each lane."""
    found = grouped(results)
    several: list[str] = []
    single: list[tuple[str, str]] = []
    for net, by_bits in settings.items():
        keys = [(net, bits) for bits in by_bits if any(key[:2] == (net, bits) for key in found)]
        if len(keys) > 1:
            several.append(_block(found, _headed(found, net), [(bits, (net, bits)) for _, bits in keys], lanes))
        single += keys if len(keys) == 1 else []
    last = [(f"{_headed(found, net)} {bits}", (net, bits)) for net, bits in single]
    return "\n\n".join([*several, *([_block(found, "", last, lanes)] if last else [])])


def _headed(found: Found, net: str) -> str:
    return f"{net} (float {said(found[net, BASE, BASE])})"


def _block(found: Found, corner: str, columns: Sequence[tuple[str, tuple[str, str]]], lanes: Sequence[str]) -> str:
    rows = [lane for lane in lanes if any((*key, lane) in found for _, key in columns)]
    lines = ["| " + " | ".join([corner, *(title for title, _ in columns)]) + " |", "|" + "---|" * (len(columns) + 1)]
    for lane in rows:
        values = [found.get((*key, lane)) for _, key in columns]
        lines.append("| " + " | ".join([lane, *(said(one) if one else "" for one in values)]) + " |")
    return "\n".join(lines)


def draw(results: Sequence[Cell], settings: Settings, lanes: Sequence[str], path: Path) -> None:
    """Accuracy by bits of the weights, activations with 8: a panel for each net with several of them, a line for each lane."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    found = grouped(results)
    curves: dict[str, dict[str, list[tuple[int, list[float]]]]] = {}
    for (net, bits, lane), values in found.items():
        if bits.endswith("A8"):
            curves.setdefault(net, {}).setdefault(lane, []).append((int(bits[1:-2]), values))
    names = [net for net in settings if any(len(points) > 1 for points in curves.get(net, {}).values())]
    figure, panels = plt.subplots(
        1, max(len(names), 1), figsize=(4.4 * max(len(names), 1), 3.8), squeeze=False, layout="constrained"
    )
    for net, axes in zip(names, panels[0], strict=False):
        for index, lane in enumerate(lanes):
            points = sorted(curves[net].get(lane, []))
            if len(points) > 1:
                means = [statistics.fmean(values) for _, values in points]
                # A mean of equal numbers may be rounded past them.
                below = [max(0.0, mean - min(values)) for mean, (_, values) in zip(means, points, strict=True)]
                above = [max(0.0, max(values) - mean) for mean, (_, values) in zip(means, points, strict=True)]
                place = [math.log2(bits) for bits, _ in points]
                axes.errorbar(
                    place, means, yerr=[below, above], label=lane, color=f"C{index}", marker="o", markersize=3, capsize=2
                )
        axes.axhline(statistics.fmean(found[net, BASE, BASE]), color="grey", linestyle=":", label=BASE)
        axes.set_xticks([math.log2(bits) for bits in (2, 3, 4, 8)], ["2", "3", "4", "8"])
        axes.set(title=net, xlabel="bits of weights (activations: 8)", ylabel="test accuracy, %")
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=90)


__all__ = ["BASE", "Cell", "draw", "table"]
