# SPDX-License-Identifier: Apache-2.0
"""Owns the comparison of a file with the model it came from: integer by integer inside, value by value at its outputs.

What onnxruntime's kernels of a file give, against the deployed model (tests/test_kernels.py holds it on all pairs of integers):

    QLinearConv, QGemm; QLinearConcat, -Sigmoid, -LeakyRelu, pools of maxima        equal, always
    QLinearAdd        fma(a, s_a/s_y, fma(b, s_b/s_y, z_y - (s_a/s_y z_a + s_b/s_y z_b)))
    QLinearMul        (a - z_a)(b - z_b) * (s_a s_b / s_y) + z_y
    QLinearMatMul     sum (a - z_a)(b - z_b) * (s_a s_b / s_y), then + z_y
    QLinearGlobalAveragePool    sum (a - z_a) * (s_a / (s_y n)), then + z_y
    QLinearAveragePool          (sum of (a - z_a) s_a) / n / s_y + z_y
    Softmax           in float: its int8 kernel overflows (see onnx_graph.py)

each in float32, in this order, rounded half to even; ours is the operator in float32 on dequantized values, then / s_y, rounded,
+ z_y. Those differ, by 1, where the exact value lies within 1e-4 of the middle of two integers. These are the rules on x86 with
AVX2; other CPUs have others (ARM adds in fixed point), so no model equals all. LayerNorm, Gelu, Softmax and other float
operators between grids differ by their last bit, which may tip an integer in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_quant.program import INTEGERS, MAKE_INTEGERS, Tap
from lightning_quant.record import copied, split_example
from lightning_quant.tables import html_table, text_table
from lightning_quant.targets import tensors_in


class ParityError(RuntimeError):
    """A file does not do what was asked of it: it computes something else, or too little of it in int8; none was written."""


# -- what a comparison found ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LayerParity:
    """The integers that one layer makes, in the file and in the deployed model.

    `name`: of the module or operator; `value`: of the tensor in the file. `values` were compared, `different` of them differ,
    by `most` and, over all values, by `mean` integers. `wrong`: those that do not follow from the file's own integers before this
    layer (see `wrong_integers`); `allowed`: the share of those that an honest file may have.
    """

    name: str
    value: str
    values: int
    different: int
    most: float
    mean: float
    wrong: int = 0
    allowed: float = 0.0

    @property
    def equal(self) -> float:
        """The share of equal integers."""
        return 1 - self.different / max(self.values, 1)


@dataclass(frozen=True, kw_only=True)
class OutputParity:
    """One output of the model against what another way of computing it gives.

    `pair`: the two that are compared. `most`, `mean`: of the absolute differences, in steps of the output's grid if it has a
    `step`, else relative to the largest finite absolute value; `relative`: the largest by that value in either case. `classes`:
    rows of classes, dimension 1 of (N, C) and (N, C, H, W), whose largest entry was compared, `same` of them agree; 0 for other
    shapes.
    """

    pair: str
    index: int
    most: float
    mean: float
    relative: float
    step: float | None
    values: int
    classes: int
    same: int

    @property
    def agreement(self) -> float | None:
        """The share of rows with the same largest entry; None where there are no such rows."""
        return self.same / self.classes if self.classes else None


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """A file compared with the model that it came from; `print(report)` is a table of it, and so is a cell of a notebook.

    `layers` are compared on the first samples alone, `outputs` on all. `own`: the file's outputs against those that the deployed
    model makes of the file's integers.
    """

    file: str
    layers: tuple[LayerParity, ...]
    outputs: tuple[OutputParity, ...]
    own: tuple[OutputParity, ...] = ()

    @property
    def first(self) -> LayerParity | None:
        """The first layer whose integers differ."""
        return next((layer for layer in self.layers if layer.different), None)

    @property
    def integers(self) -> int:
        """How many integers were compared."""
        return sum(layer.values for layer in self.layers)

    @property
    def different(self) -> int:
        """How many of them differ."""
        return sum(layer.different for layer in self.layers)

    def __str__(self) -> str:
        return "\n\n".join(text_table(head, rows, right=right, notes=notes) for head, rows, right, notes in self._tables())

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What IPython shows as text."""
        printer.text("..." if cycle else str(self))

    def _repr_html_(self) -> str:
        """The same tables, for notebooks."""
        return "".join(html_table(head, rows, right=right, notes=notes) for head, rows, right, notes in self._tables())

    def summary(self) -> str:
        """One line, of the file."""
        of_file = [one for one in self.outputs if one.pair == self.outputs[0].pair]
        worst = max(of_file, key=lambda one: one.relative, default=None)
        words = [f"{self.integers - self.different:,} of {self.integers:,} integers equal"] if self.layers else []
        if self.first is not None:
            words[0] += f", first other ones in {self.first.name!r}"
        if worst is not None:
            apart = f"within {worst.relative:.2g} of the largest value"
            words.append(f"outputs {apart if worst.relative else 'equal'}")
        return "; ".join(words)

    def _tables(self) -> list[tuple[list[str], list[list[str]], set[str], list[str]]]:
        outputs = [
            [
                one.pair,
                str(one.index),
                f"{one.most:.3g}",
                f"{one.mean:.3g}",
                "relative" if one.step is None else "steps",
                "" if one.agreement is None else f"{one.agreement:.2%}",
            ]
            for one in self.outputs
        ]
        head = ["compared", "output", "max", "mean", "in", "same class"]
        tables = [(head, outputs, {"output", "max", "mean", "same class"}, [] if self.layers else [f"file: {self.file}"])]
        if self.layers:
            rows = [
                [one.name or "(model)", one.value, f"{one.values:,}", f"{one.equal:.4%}", f"{one.most:g}", f"{one.mean:.2g}"]
                for one in self.layers
            ]
            first = "none" if self.first is None else repr(self.first.name)
            notes = [f"file: {self.file}; first layer that differs: {first}"]
            head = ["layer", "tensor", "integers", "equal", "max", "mean"]
            tables.append((head, rows, {"integers", "equal", "max", "mean"}, notes))
        return tables


def merged(reports: Sequence[ParityReport]) -> ParityReport:
    """Reports of the same file on several batches, as one."""
    layers: list[LayerParity] = []
    for parts in zip(*(report.layers for report in reports), strict=True):
        number = sum(part.values for part in parts)
        layers.append(
            LayerParity(
                name=parts[0].name,
                value=parts[0].value,
                values=number,
                different=sum(part.different for part in parts),
                most=max(part.most for part in parts),
                mean=sum(part.mean * part.values for part in parts) / max(number, 1),
                wrong=sum(part.wrong for part in parts),
                allowed=parts[0].allowed,
            )
        )
    file, outputs, own = reports[0].file, _together([r.outputs for r in reports]), _together([r.own for r in reports])
    return ParityReport(file=file, layers=tuple(layers), outputs=outputs, own=own)


def _together(reports: Sequence[Sequence[OutputParity]]) -> tuple[OutputParity, ...]:
    outputs: list[OutputParity] = []
    for ends in zip(*reports, strict=True):
        number = sum(end.values for end in ends)
        outputs.append(
            OutputParity(
                pair=ends[0].pair,
                index=ends[0].index,
                most=max(end.most for end in ends),
                mean=sum(end.mean * end.values for end in ends) / max(number, 1),
                relative=max(end.relative for end in ends),
                step=ends[0].step,
                values=number,
                classes=sum(end.classes for end in ends),
                same=sum(end.same for end in ends),
            )
        )
    return tuple(outputs)


# -- the integers of a program ----------------------------------------------------------------------------------------------


class _Recorder(TorchDispatchMode):
    """Collects what our operators make, in order; None for what is no tensor of integers.

    `instead`: integers by place, given back there in the place of those; `wrong` counts, by place, those that the operator would
    not have made of what it was given.
    """

    def __init__(self, instead: Mapping[int, Tensor] | None = None, *, exact: Collection[int] = ()) -> None:
        super().__init__()
        self.made: list[Tensor | None] = []
        self.instead, self.exact = instead or {}, exact
        self.wrong: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if str(func) not in MAKE_INTEGERS:
            return result
        place, known = len(self.made), result.dtype in INTEGERS
        self.made.append(result if known else None)
        given = self.instead.get(place) if known else None
        if given is None:
            return result
        self.wrong[place] = result.numel()
        if given.shape != result.shape:
            return result
        near = (given == result.to(torch.int32)) if place in self.exact else _may_round_to(given, func, args)
        self.wrong[place] = int(torch.count_nonzero(~near))
        return given.to(result.dtype)


_TIE, _OF_RANGE = 1e-2, 1e-5


def _may_round_to(given: Tensor, func: Any, args: Any) -> Tensor:
    """Where integers are what a call of an operator of ours may round to, ties either way.

    A tie: within `_TIE` of a level of the middle of two, or `_OF_RANGE` of all levels: float32's last bits in 16-bit grids.
    """
    if len(args) == 5:  # x, scale, zero point, low, high
        real, (low, high) = args[0].double() / args[1] + args[2], args[3:5]
    else:
        scale, zero, low, high, is_wide = args[-5:]
        real = func(*args[:-5], None, 0, 0, 0, is_wide).double() / scale + zero
    room = 0.5 + max(_TIE, _OF_RANGE * (high - low))
    gap = (given.double() - real.clamp(low, high)).abs()
    near: Tensor = (gap <= room) | gap.isnan()
    return near


def call_watched(model: nn.Module | Callable[..., Any], example: Any) -> tuple[list[Tensor], list[Tensor | None]]:
    """(outputs, what our operators made, in order) of a call without gradients."""
    args, kwargs = split_example(copied(example))
    with torch.no_grad(), _Recorder() as recorder:
        outputs = list(tensors_in(model(*args, **kwargs)))
    return outputs, recorder.made


def outputs_of(model: nn.Module, example: Any) -> list[Tensor]:
    """The tensors that a call without gradients returns."""
    args, kwargs = split_example(copied(example))  # a forward may write to what it is given
    with torch.no_grad():
        return list(tensors_in(model(*args, **kwargs)))


def wrong_integers(
    model: nn.Module | Callable[..., Any], example: Any, found: Mapping[int, Tensor], exact: Collection[int]
) -> tuple[list[Tensor], dict[int, int]]:
    """What a model makes of the integers of a file: no layer answers for those before it.

    Args:
        model: the deployed model; example: what it is called with.
        found: the file's integers by their places among those that the model makes, moved to an unsigned grid.
        exact: the places where a runtime can only agree; elsewhere both may round what lies by a tie.

    Returns:
        (outputs, how many integers at each place do not follow from the file's own before it).
    """
    args, kwargs = split_example(copied(example))
    with torch.no_grad(), _Recorder(found, exact=exact) as recorder:
        outputs = list(tensors_in(model(*args, **kwargs)))
    return outputs, recorder.wrong


# -- differences --------------------------------------------------------------------------------------------------------------


def unsigned(found: Tensor) -> Tensor:
    """Integers as int32; those of a signed grid in a file are the same as ours, moved by half its levels."""
    shift = {torch.int8: 2**7, torch.int16: 2**15}.get(found.dtype, 0)
    return found.to(torch.int32) + shift


STEPS_ALLOWED = 0.02  # of a layer's integers, where what makes them jumps


def layer_parity(tap: Tap, found: Tensor, wanted: Tensor) -> LayerParity:
    """Compare integers; all that differ count as wrong until `wrong_integers` has told which are."""
    a, b = unsigned(found), wanted.to(torch.int32)
    if a.shape != b.shape:
        number, inf = b.numel(), math.inf
        return LayerParity(name=tap.layer, value=tap.value, values=number, different=number, most=inf, mean=inf, wrong=number)
    gap = (a - b).abs_()
    return LayerParity(
        name=tap.layer,
        value=tap.value,
        values=gap.numel(),
        different=int(torch.count_nonzero(gap)),
        allowed=STEPS_ALLOWED if tap.steps else 0.0,
        most=float(gap.max()) if gap.numel() else 0.0,
        mean=float(gap.double().mean()) if gap.numel() else 0.0,
    )


def output_parity(pair: str, index: int, found: Tensor, wanted: Tensor, step: float | None) -> OutputParity:
    """Compare one output; where both are NaN, or the same infinity, they are equal."""
    none = OutputParity(
        pair=pair,
        index=index,
        most=math.inf,
        mean=math.inf,
        relative=math.inf,
        step=step,
        values=wanted.numel(),
        classes=0,
        same=0,
    )
    if found.shape != wanted.shape:
        return none
    a, b = found.double(), wanted.double()
    equal = (a == b) | (a.isnan() & b.isnan())
    gap = torch.where(equal, 0.0, (a - b).abs())
    finite = b[b.isfinite()].abs()
    largest = max(float(finite.max()), 1e-12) if finite.numel() else 1.0
    most = math.inf if bool(gap.isnan().any()) else float(gap.max()) if gap.numel() else 0.0
    mean = math.inf if math.isinf(most) else float(gap.mean()) if gap.numel() else 0.0
    rows = (b.dim() == 2 or b.dim() > 3) and b.shape[1] > 1 and b.numel() > 0  # of (N, A, B) either may be classes
    unit = step or largest
    return OutputParity(
        pair=pair,
        index=index,
        most=most / unit,
        mean=mean / unit,
        relative=most / largest,
        step=step,
        values=gap.numel(),
        classes=b.numel() // b.shape[1] if rows else 0,
        same=int((a.argmax(1) == b.argmax(1)).sum()) if rows else 0,
    )


def outputs_parity(
    pair: str, found: Sequence[Tensor], wanted: Sequence[Tensor], steps: Sequence[float | None]
) -> list[OutputParity]:
    """Compare all outputs; another number of them is a difference of the first that only one side has."""
    if len(found) != len(wanted):
        empty = torch.empty(0)
        return [output_parity(pair, min(len(found), len(wanted)), empty, empty.reshape(0, 1), None)]
    known = steps if len(steps) == len(wanted) else [None] * len(wanted)
    rows = zip(found, wanted, known, strict=True)
    return [output_parity(pair, index, a, b, step) for index, (a, b, step) in enumerate(rows)]


def raise_unless(report: ParityReport, *, target: str, pair: str, atol: float, min_equal: float, why: str) -> None:
    """Raise a ParityError that names the first layer that differs, unless the report keeps the bounds."""
    ends = [one for one in report.outputs if one.pair == pair]
    worst = max(ends, key=lambda one: one.relative, default=None)
    place = _place(report)
    if worst is not None and not worst.relative <= atol:
        raise ParityError(
            f"{target}: output {worst.index} differs from the deployed model's by {worst.relative:.3g} of its largest value "
            f"(allowed {atol:g}) on the example input; {why}.{place} Raise atol only if that is acceptable."
        )
    short = next((layer for layer in report.layers if layer.equal < min_equal), None)
    if short is not None:
        raise ParityError(
            f"{target}: in layer {short.name!r} only {short.equal:.4%} of the integers equal the deployed model's (at least "
            f"{min_equal:.4%} are asked for); {why}.{place} Lower min_equal only if that is acceptable."
        )


def raise_if_wrong(report: ParityReport, *, target: str, atol: float, why: str) -> None:
    """Raise a ParityError for the first layer, or output, that does not follow from the file's own integers before it."""
    remedy = "If that is acceptable, give min_equal (the least share of equal integers in any layer) or atol."
    for layer in report.layers:
        if layer.wrong > layer.allowed * layer.values:
            raise ParityError(
                f"{target}: layer {layer.name!r} computes something else: {layer.wrong:,} of its {layer.values:,} integers do "
                f"not follow from the file's own before it, ties of rounding aside; {why}.{_place(report)} {remedy}"
            )
    worst = max(report.own, key=lambda one: one.relative, default=None)
    if worst is not None and not worst.relative <= atol:
        raise ParityError(
            f"{target}: output {worst.index} differs by {worst.relative:.3g} of its largest value (allowed {atol:g}) from what "
            f"the deployed model makes of the file's own integers; {why}.{_place(report)} {remedy}"
        )


def _place(report: ParityReport) -> str:
    """A sentence on the first layer that differs, if one does."""
    first = report.first
    if first is None:
        return ""
    return (
        f" The first layer that differs is {first.name!r} ({first.different:,} of {first.values:,} integers, by at most "
        f"{first.most:g})."
    )
