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
    """Markdown: a block of rows for each net, a column for each of its bits, a row for each lane."""
    found, blocks = grouped(results), []
    for net, by_bits in settings.items():
        columns = [bits for bits in by_bits if any(key[:2] == (net, bits) for key in found)]
        rows = [lane for lane in lanes if any((net, bits, lane) in found for bits in columns)]
        if rows:
            base = f"{net} (float {said(found[net, BASE, BASE])})"
            lines = ["| " + " | ".join([base, *columns]) + " |", "|" + "---|" * (len(columns) + 1)]
            for lane in rows:
                values = [found.get((net, bits, lane)) for bits in columns]
                lines.append("| " + " | ".join([lane, *(said(one) if one else "" for one in values)]) + " |")
            blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


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
                below = [mean - min(values) for mean, (_, values) in zip(means, points, strict=True)]
                above = [max(values) - mean for mean, (_, values) in zip(means, points, strict=True)]
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
