# SPDX-License-Identifier: Apache-2.0
"""Owns what a report of a quantized model is made of, and how it is shown: as text, in a notebook, as rows, as a picture."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lightning_quant.config import ConfigError
from lightning_quant.monitor import effective_bits
from lightning_quant.tables import Cell, html_table, text_table
from lightning_quant.targets import is_activation, is_input


@dataclass(frozen=True, kw_only=True)
class TensorReport:
    """One quantized tensor of a layer. None: not known, or nothing of the kind.

    `dtype`: the grid's (`uint8`); of a deployed activation `int1` or unsigned, of a deployed parameter what is stored. `bits`: of
    the grid; of a deployed parameter those that its integers need. `low`, `high`: of a parameter its least and greatest value
    before rounding (stored value where that is gone), of an activation the ends of its grid. `scale`, `zero_point`: (least,
    greatest) over channels or blocks. `signal_to_noise`: dB; of a parameter what ships against the float value, norms folded into
    both; of an activation the quantized model against the float one. `clipped`: share of values cut off. Of parameters:
    `zero_channels` output channels have nothing but zeros, `dead_channels` of them in float, too; `zeros`: share of values that
    are zero.
    """

    target: str
    dtype: str
    bits: int
    scheme: str | None = None
    granularity: str | None = None
    low: float | None = None
    high: float | None = None
    scale: tuple[float, float] | None = None
    zero_point: tuple[int, int] | None = None
    signal_to_noise: float | None = None
    clipped: float | None = None
    channels: int | None = None
    zero_channels: int | None = None
    dead_channels: int | None = None
    zeros: float | None = None

    @property
    def effective_bits(self) -> float | None:
        """By the signal-to-noise ratio: (dB - 1.76) / 6.02 (IEEE Std 1241)."""
        return None if self.signal_to_noise is None else effective_bits(self.signal_to_noise)


@dataclass(frozen=True, kw_only=True)
class Before:
    """What a float layer, or model, cost before pruning removed channels of it; the fields are those of its report."""

    parameters: int
    float_bytes: int
    multiply_adds: int | None = None


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One layer that is quantized or pruned: a module or operator with what is fused with it.

    `parameters`: numbers that training moves, fused norms' included. `float_bytes`: theirs and those of running statistics.
    `stored_bytes`: what the deployed layer holds, scales and biases included; 4-bit integers take a byte each, 9 to 16 bits two;
    None before ranges are known. `multiply_adds`: of one call with the example input; None without one, or for an operator.
    `sparsity`: the share of its weights (parameters with two or more dimensions) as they came that are 0 in float, or removed;
    None where none is, or float weights are gone without a note. `before`: what it was where channels of the model were removed.
    """

    name: str
    type: str
    fused: tuple[str, ...]
    tensors: Mapping[str, TensorReport]
    parameters: int
    float_bytes: int
    stored_bytes: int | None
    multiply_adds: int | None = None
    sparsity: float | None = None
    before: Before | None = None

    def of(self, kind: str) -> list[TensorReport]:
        """The tensors of a kind: "input", "output" or "weight" (any parameter)."""
        kinds = {name: "input" if is_input(name) else "output" if is_activation(name) else "weight" for name in self.tensors}
        return [tensor for name, tensor in self.tensors.items() if kinds[name] == kind]

    def worst(self, kind: str) -> TensorReport | None:
        """Of the tensors of a kind the one with the least signal-to-noise ratio; the first where none is known."""
        known = [one for one in self.of(kind) if one.signal_to_noise is not None]
        return min(known, key=lambda one: one.signal_to_noise or 0.0, default=next(iter(self.of(kind)), None))


@dataclass(frozen=True, kw_only=True)
class Report:
    """A quantized or pruned model, layer by layer; `print(report)` is a table of it, and so is a cell of a notebook.

    `parameters`, `float_bytes`, `stored_bytes`: of the whole model, what is not quantized included; `other_bytes`: of that part
    alone, float in either. `multiply_adds`: of one call of the whole model. `signal_to_noise`: of its outputs, in dB.
    `sparsity`: of all weights of these layers. `before`, `other_bytes_before`: what the whole model, and that part, were before
    channels were removed.
    """

    model: str
    layers: tuple[LayerReport, ...]
    parameters: int
    float_bytes: int
    stored_bytes: int | None
    other_bytes: int
    multiply_adds: int | None = None
    signal_to_noise: float | None = None
    sparsity: float | None = None
    before: Before | None = None
    other_bytes_before: int | None = None
    notes: tuple[str, ...] = ()

    def rows(self) -> list[dict[str, Any]]:
        """One flat dict a layer, all with the same keys: `pandas.DataFrame(report.rows())`. Of several inputs, parameters or
        outputs the worst is shown; `to_dict` has all.
        """
        return [_flat(layer) for layer in self.layers]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as dicts, lists and numbers. An infinite signal-to-noise ratio (nothing is lost) is `math.inf`."""
        own = {key: value for key, value in vars(self).items() if key not in ("layers", "notes", "before")}
        return {**own, **_came(self), "notes": list(self.notes), "layers": [_nested(layer) for layer in self.layers]}

    def __str__(self) -> str:
        head, rows, total = self._table()
        return text_table(head, [*rows, total], right=_RIGHT, notes=self._remarks)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What IPython shows as text."""
        printer.text("..." if cycle else str(self))

    def _repr_html_(self) -> str:
        """The same table, for notebooks."""
        head, rows, total = self._table()
        return html_table(head, rows, right=_RIGHT, notes=self._remarks, total=total)

    @property
    def _remarks(self) -> list[str]:
        said = [f"note: {note}" for note in self.notes]
        if self.stored_bytes:
            first, came = (self.float_bytes, "as") if self.before is None else (self.before.float_bytes, "as it came in")
            stored = f"{_size(self.stored_bytes)} as stored: {first / self.stored_bytes:.2f} times smaller"
            said.insert(0, f"{_size(first)} {came} float, {stored}")
        if self.signal_to_noise is not None:
            said.insert(0, f"signal-to-noise ratio of the model's outputs: {_decimal(self.signal_to_noise)} dB")
        return said

    def _table(self) -> tuple[list[str], list[list[str | Cell]], list[str | Cell]]:
        """(head, a row for each layer, the row of sums), without columns that are empty."""
        most = max((layer.stored_bytes or 0 for layer in self.layers), default=0)
        rows = [_cells(layer, most) for layer in self.layers]
        sums: dict[str, str | Cell] = {"layer": "total", **_costs(self), "stored": _size(self.stored_bytes)}
        if self.other_bytes:
            name = "(not quantized)" if any(layer.tensors for layer in self.layers) else "(other layers)"
            rest = {"layer": name, "stored": _size(self.other_bytes)}
            rest["float"] = _size(self.other_bytes if self.other_bytes_before is None else self.other_bytes_before)
            rows.append({**dict.fromkeys(_HEAD, ""), **rest})
        head = [name for name in _HEAD if any(_shown(row[name]) for row in rows) or _shown(sums.get(name, ""))]
        return head, [[row[name] for name in head] for row in rows], [sums.get(name, "") for name in head]

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """A picture: signal-to-noise ratios, the ends of the grids of activations, and bytes, for each layer.

        Returns the matplotlib Figure; with `path` it is also written there, in the format of its suffix.

        Raises:
            ConfigError: if matplotlib is not installed.
        """
        return _plot(self, path)


# -- rows and cells ---------------------------------------------------------------------------------------------------

_HEAD = (
    "layer",
    "type",
    "fused with",
    "input",
    "weight",
    "output",
    "weight dB",
    "bits",
    "clipped",
    "zero channels",
    "output range",
    "output dB",
    "output clipped",
    "sparsity",
    "parameters",
    "mult-adds",
    "float",
    "stored",
)
_RIGHT = frozenset(_HEAD[6:10] + _HEAD[11:])
_KINDS = ("input", "weight", "output")


def _nested(layer: LayerReport) -> dict[str, Any]:
    own = {key: value for key, value in vars(layer).items() if key not in ("fused", "tensors", "before")}
    return {**own, **_came(layer), "fused": list(layer.fused), "tensors": [_tensor(one) for one in layer.tensors.values()]}


def _came(one: LayerReport | Report) -> dict[str, int | None]:
    """What it was before removal, under the names of what it is; what it is where nothing was removed."""
    return {f"{key.name}_before": getattr(one.before or one, key.name) for key in fields(Before)}


def _tensor(one: TensorReport) -> dict[str, Any]:
    lists = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(one).items()}
    return {**lists, "effective_bits": one.effective_bits}


def _flat(layer: LayerReport) -> dict[str, Any]:
    row: dict[str, Any] = {"name": layer.name, "type": layer.type, "fused": ", ".join(layer.fused)}
    for kind in _KINDS:
        one = layer.worst(kind)
        known = {} if one is None else {**vars(one), "effective_bits": one.effective_bits}
        for key in [own.name for own in fields(TensorReport)] + ["effective_bits"]:
            if key in ("scale", "zero_point"):
                ends = known.get(key) or (None, None)
                row.update({f"{kind}_{key}_least": ends[0], f"{kind}_{key}_greatest": ends[1]})
            elif key != "target":
                row[f"{kind}_{key}"] = known.get(key)
    own = ("sparsity", "parameters", "multiply_adds", "float_bytes", "stored_bytes")
    return {**row, **{key: getattr(layer, key) for key in own}, **_came(layer)}


def _cells(layer: LayerReport, most: int) -> dict[str, str | Cell]:
    """The cells of a row by the names of their columns. `most`: the bytes of the largest layer."""
    weight, output = layer.worst("weight"), layer.worst("output")
    cells: dict[str, str | Cell] = {"layer": layer.name, "type": layer.type, "fused with": ", ".join(layer.fused)}
    for kind in _KINDS:
        tensors = layer.of(kind)
        words = dict.fromkeys(one.dtype for one in tensors)
        cells[kind] = Cell(", ".join(words), title="\n".join(map(_details, tensors)))
    cells.update(dict.fromkeys(_HEAD[6:13], ""))
    if weight is not None:
        cells["weight dB"] = _ratio(weight.signal_to_noise)
        cells["bits"] = "" if weight.effective_bits is None else _decimal(weight.effective_bits)
        cells["clipped"] = _share(weight.clipped)
        if weight.zero_channels is not None:
            dead = f" ({weight.dead_channels} in float, too)" if weight.dead_channels else ""
            cells["zero channels"] = f"{weight.zero_channels}/{weight.channels}{dead}" if weight.zero_channels else "0"
    if output is not None:
        known = output.low is not None and output.high is not None
        cells["output range"] = f"{output.low:.4g} .. {output.high:.4g}" if known else ""
        cells["output dB"] = _ratio(output.signal_to_noise)
        cells["output clipped"] = _share(output.clipped)
    share = (layer.stored_bytes or 0) / most if most else 0.0
    return {**cells, **_costs(layer), "stored": Cell(_size(layer.stored_bytes), bar=share, good=1.0)}


def _costs(one: LayerReport | Report) -> dict[str, str | Cell]:
    """The cells of what pruning changes: "as it came -> as it is", where these differ; float bytes as it came."""
    before = one.before or one
    pairs = {"parameters": (before.parameters, one.parameters), "mult-adds": (before.multiply_adds, one.multiply_adds)}
    cells: dict[str, str | Cell] = {
        name: _count(now) if was in (None, now) else f"{_count(was)} -> {_count(now)}" for name, (was, now) in pairs.items()
    }
    share = one.sparsity
    cells["sparsity"] = "" if share is None else Cell(f"{100 * share:.1f} %", bar=share)
    return {**cells, "float": _size(before.float_bytes)}


def _details(one: TensorReport) -> str:
    """What a table has no column for, in a line."""
    words = [one.target, *(str(word) for word in (one.dtype, one.scheme, one.granularity) if word is not None)]
    if one.low is not None and one.high is not None:
        words.append(f"range {one.low:.4g} .. {one.high:.4g}")
    for name, ends in (("scale", one.scale), ("zero point", one.zero_point)):
        if ends is not None:
            words.append(f"{name} {ends[0]:.4g}" if ends[0] == ends[1] else f"{name} {ends[0]:.4g} .. {ends[1]:.4g}")
    return " ".join(words)


def _shown(cell: str | Cell) -> str:
    return cell if isinstance(cell, str) else cell.text


def _decimal(value: float) -> str:
    return "exact" if value == math.inf else f"{value:.1f}"


def _ratio(decibels: float | None) -> str | Cell:
    """A bar that is full at 50 dB, red at 10 dB and below, green at 40 dB and above."""
    if decibels is None:
        return ""
    if math.isinf(decibels):
        return Cell(_decimal(decibels), bar=float(decibels > 0))
    return Cell(_decimal(decibels), bar=decibels / 50, good=(decibels - 10) / 30)


def _share(share: float | None) -> str | Cell:
    """Red from a hundredth on."""
    if share is None:
        return ""
    text = "0" if share == 0 else "< 0.01 %" if share < 1e-4 else f"{100 * share:.2f} %"
    return Cell(text, bar=min(1.0, 100 * share), good=1 - 100 * share)


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def _size(number: int | None) -> str:
    """Bytes, in thousands."""
    if number is None:
        return ""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} B"


# -- picture ----------------------------------------------------------------------------------------------------------

_BLUE, _ORANGE, _GREEN, _GREY = "#3b75af", "#e58a35", "#3f9a6b", "#9a9a9a"


def _plot(report: Report, path: str | os.PathLike[str] | None) -> Any:
    try:
        from matplotlib.figure import Figure  # not pyplot: no window, no state
    except ImportError as error:
        raise ConfigError("plot: needs matplotlib; install lightning_quant[report], or matplotlib itself.") from error

    class Picture(Figure):  # type: ignore[misc, unused-ignore]
        """Shows itself in notebooks without pyplot."""

        def _repr_png_(self) -> bytes:
            written = io.BytesIO()
            self.savefig(written, dpi=80, metadata={"Software": None})  # the same bytes with any matplotlib
            return written.getvalue()

    layers = report.layers
    figure = Picture(figsize=(11, 1.6 + 0.34 * len(layers)), layout="constrained")
    ratios, ranges, sizes = figure.subplots(1, 3, sharey=True, width_ratios=(3, 3, 2))
    places = list(range(len(layers)))
    _draw_ratios(ratios, report)
    _draw_ranges(ranges, report)
    stored = [(layer.stored_bytes or 0) / 1000 for layer in layers]
    floats = [(layer.before or layer).float_bytes / 1000 for layer in layers]
    sizes.barh(places, floats, height=0.72, color=_GREY, alpha=0.45, label="as float")
    sizes.barh(places, stored, height=0.4, color=_GREEN, label="as stored")
    sizes.set(xlabel="kB", title="size")
    ratios.set_yticks(places, [layer.name for layer in layers])
    ratios.set_ylim(len(layers) - 0.4, -0.6)
    for axes in (ratios, ranges, sizes):
        axes.grid(axis="x", color=_GREY, alpha=0.3, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.title.set_fontsize("medium")
    found = {label: bar for axes in (ratios, ranges, sizes) for bar, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=len(found), fontsize="small", frameon=False)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _draw_ratios(axes: Any, report: Report) -> None:
    """Bars of the weight's ratio and of the output's, where it was measured."""
    kinds = [kind for kind in ("weight", "output") if any(_finite(layer, kind) is not None for layer in report.layers)]
    height = 0.76 / max(len(kinds), 1)
    for i, kind in enumerate(kinds):
        found = [(place, _finite(layer, kind)) for place, layer in enumerate(report.layers)]
        known = [(place + (i - (len(kinds) - 1) / 2) * height, ratio) for place, ratio in found if ratio is not None]
        ends = [place for place, _ in known], [ratio for _, ratio in known]
        bars = axes.barh(*ends, height=height * 0.92, color=(_BLUE, _ORANGE)[kind == "output"], label=kind)
        axes.bar_label(bars, fmt="%.0f", padding=2, fontsize="x-small")
    axes.set(xlabel="dB", title="signal-to-noise ratio")
    axes.margins(x=0.12)
    if not kinds:
        axes.text(0.5, 0.5, "not known of a deployed model", transform=axes.transAxes, ha="center", va="center", color=_GREY)


def _finite(layer: LayerReport, kind: str) -> float | None:
    one = layer.worst(kind)
    ratio = None if one is None else one.signal_to_noise
    return ratio if ratio is not None and math.isfinite(ratio) else None


def _draw_ranges(axes: Any, report: Report) -> None:
    """What the grid of each layer's output reaches, and of its input in front."""
    for kind, colour, height in (("input", _GREY, 0.7), ("output", _ORANGE, 0.3)):
        found = [(place, layer.worst(kind)) for place, layer in enumerate(report.layers)]
        known = [(place, one.low, one.high) for place, one in found if one is not None and one.low is not None]
        if known:
            places, lows, highs = zip(*known, strict=True)
            widths = [high - low for low, high in zip(lows, highs, strict=True)]
            axes.barh(places, widths, left=lows, height=height, color=colour, alpha=0.9 if kind == "output" else 0.4, label=kind)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(xlabel="value", title="ends of the grids of activations")
