# SPDX-License-Identifier: Apache-2.0
"""Owns what several processes agree on while they train: ranges, first scales, gradients of what is learned, failures.

With data parallelism (Trainer(devices=2, strategy="ddp")) every process runs the same model on its own share of a batch. PyTorch
averages the gradients of parameters; ranges and learned scales are not in the module tree, so that is done here.

In a forward a process observes as if it were alone: its range moves by its own values, and they are rounded on that. When the
batch is over, the processes exchange the least and greatest values of all tensors, in one packed maximum of (-least, greatest).
Every range goes back to where it was before the batch and moves by the ends of the union. Between batches, and so in
checkpoints, evaluation and conversion, ranges are the same numbers everywhere, and those of one process that observed the union
of the tensors. (What later layers observe within a batch was rounded on a range that each process had moved alone: there a run
differs from that of one process by rounding, most in the first batch. While nothing is rounded it does not differ at all.)

- `moving_average`, `minmax`, with one scale or one for each block: those of one process whose batch is the union, bit for bit. A
  layer that runs several times in a batch moves its range as often; the i-th calls of all processes are merged. Calls beyond as
  many as there were in its first batch count with the last of these.
- `percentile`, `entropy`, `mse`: the counts are those of one process, bit for bit (a second packed exchange, a sum). The range
  that training uses lags, as it does in one process, and is looked for in what was counted up to the batch before.
- learned scales (`lsq`, `lsq+`, `pact`) begin from the union of the first batch, before the first optimizer step; means are
  summed in another order (a relative 1e-6). In that one batch each process still rounds on its own.
- A batch with NaN or infinity in one process is left out in all.

Single numbers are agreed on by exchange of Python objects, while there are quantizers that no process has used yet: in the first
batch, as a rule. Afterwards a batch costs one exchange of a fixed size, whatever ran in which process.

What depends on weights alone (their grids, faint channels) needs nothing: weights are equal. Statistics of batch norm are
DistributedDataParallel's affair: it keeps those of the first process, or SyncBatchNorm merges them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_quant.blocks import BlockQuantizer
from lightning_quant.config import ConfigError
from lightning_quant.learned import LearnedActivation
from lightning_quant.observers import BINS, HistogramQuantizer
from lightning_quant.patterns import BatchNorm
from lightning_quant.prepare import learned_parameters, load_quantizer_state, quantizer_state, quantizers_of
from lightning_quant.quantizers import ActivationQuantizer
from lightning_quant.record import moved

Value = TypeVar("Value")
Ends = tuple[Any, Any]  # least and greatest values, as quantizers note them: numbers, or tensors

# What trains with one of these keeps whole weights in every process. The nearest of a strategy's classes decides, by its name:
# the classes of pytorch_lightning are others than those of lightning.
STRATEGIES = {"SingleDeviceStrategy": True, "DDPStrategy": True, "SingleDeviceXLAStrategy": False, "XLAStrategy": False}
SHARDED = {"FSDPStrategy": False, "ModelParallelStrategy": False, "DeepSpeedStrategy": False, "XLAFSDPStrategy": False}


def check_strategy(strategy: object) -> None:
    """Raise a ConfigError unless every process has whole weights and ranges can be merged under this strategy of a Trainer."""
    known = {**STRATEGIES, **SHARDED}
    nearest = next((cls.__name__ for cls in type(strategy).__mro__ if cls.__name__ in known), "")
    if known.get(nearest):
        return
    why = (
        "it gives a process only a part of each weight, whose grid is found from the whole"
        if nearest in SHARDED
        else "ranges are merged over processes with DistributedDataParallel only"
    )
    raise ConfigError(
        f"QuantFusionCallback: Trainer(strategy={type(strategy).__name__}) is not supported: {why}. Use "
        'Trainer(strategy="ddp") (also "ddp_spawn" or "ddp_notebook"), or one device.'
    )


# -- all processes at once ----------------------------------------------------------------------------------------------


def several() -> bool:
    """Whether there are other processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def from_all(value: Value) -> list[Value]:
    """What each process gives, in their order; anything that pickle takes. All have to call it."""
    if not several():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def from_first(value: Value) -> Value:
    """What the first process gives. All have to call it."""
    if not several():
        return value
    found = [value]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def together(work: Callable[[], Value]) -> Value:
    """What `work` returns, which every process runs; if it fails in one, it fails in all: none waits for another in vain.

    Raises:
        Exception: its own, where it failed; a ConfigError that names the process and tells the message in the others.
    """
    if not several():
        return work()
    failed: Exception | None = None
    result: list[Value] = []
    try:
        result.append(work())
    except Exception as error:  # noqa: BLE001  (whatever it is: the others have to know before it goes on)
        failed = error
    said = from_all(None if failed is None else f"{type(failed).__name__}: {failed}")
    if failed is not None:
        raise failed
    if (first := next((rank for rank, one in enumerate(said) if one is not None), None)) is not None:
        raise ConfigError(f"process {first} failed: {said[first]}")
    return result[0]


def interleaved(parts: Sequence[Sequence[Value]], number: int) -> list[Value]:
    """The first `number` of what several processes have: the first of each, the second of each, and so on."""
    rows = [[part[row] for part in parts if row < len(part)] for row in range(max(map(len, parts)))]
    return [*chain.from_iterable(rows)][:number]


def calls_of_all(calls: list[Value] | str, number: int, device: torch.device) -> list[Value] | str:
    """The calls that calibration takes: `number` of all processes', interleaved, the same everywhere; or why there are none."""
    if not several():
        return calls
    parts = from_all(calls if isinstance(calls, str) else moved(calls, "cpu"))
    if (why := next((part for part in parts if isinstance(part, str)), None)) is not None:
        return why
    found: list[Value] = moved(interleaved([part for part in parts if not isinstance(part, str)], number), device)
    return found


def share_of(number: int) -> int:
    """Of how many batches a process provides its part."""
    return math.ceil(number / dist.get_world_size()) if several() else number


def check_same_plan(model: nn.Module) -> None:
    """Raise a ConfigError in all processes if their recorded forwards led to different quantizers."""
    own = list(quantizer_state(model))
    for rank, names in enumerate(from_all(own)):
        if names != own:
            differ = sorted(set(own) ^ set(names)) or ["their order"]
            raise ConfigError(
                f"process {rank} has other quantizers than process {dist.get_rank()}: {', '.join(differ[:5])}. The forward took "
                "another branch on its first batch. Give example_input, the same in all processes."
            )


def begin_alike(model: nn.Module, *, parameters: bool = False) -> None:
    """Have all processes go on from the first one's ranges, and with `parameters` from its weights, where those have changed."""
    load_quantizer_state(model, from_first(quantizer_state(model)))
    if parameters:
        with torch.no_grad():
            for parameter in model.parameters():
                dist.broadcast(parameter.data, src=0)


def statistics_of_first(model: nn.Module) -> dict[str, Tensor]:
    """The first process's statistics of batch norm, which DistributedDataParallel hands on in the next forward only."""
    if not several():
        return {}
    norms = {name: module for name, module in model.named_modules() if isinstance(module, BatchNorm)}
    return from_first({f"{name}.{key}": one.cpu() for name, norm in norms.items() for key, one in norm.named_buffers()})


# -- a training run -----------------------------------------------------------------------------------------------------


class Ranks:
    """Keeps the ranges and learned scales of a prepared model equal in all processes, from now to `leave`.

    Args:
        model: prepared in the same way in every process, with the same ranges.
        device: where tensors are exchanged: the model's.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        # On the host, ends are numbers; those of blocks are tensors anywhere.
        self.device, self.host = device, device.type == "cpu"
        quantizers = [one for one in quantizers_of(model).values() if one.spec.method != "ptq"]  # those training leaves alone
        self.learned = [one for one in quantizers if isinstance(one, LearnedActivation) and not one.started]
        self.counted = [one for one in quantizers if isinstance(one, HistogramQuantizer)]
        self.ranged = [one for one in quantizers if one.spec.method == "qat" and not isinstance(one, HistogramQuantizer)]
        self.parameters = list(learned_parameters(model).values())
        self.slots: dict[str, int] = {}  # how many calls of a quantizer are told apart in a batch
        self.shapes: dict[str, tuple[int, ...]] = {}  # of the ranges of those with a scale for each block
        for one in (*self.learned, *self.counted, *self.ranged):
            one.noted = []

    def watch(self, observe: bool) -> None:
        """Note what is observed, or nothing, while ranges do not move: a compiler can follow the layers then. Between batches."""
        for one in (*self.counted, *self.ranged):
            one.noted = (one.noted or []) if observe else None

    def leave(self) -> None:
        """Have every quantizer observe for itself again."""
        for one in (*self.learned, *self.counted, *self.ranged):
            one.noted = None

    def end_batch(self) -> None:
        """Make the ranges those of the union of this batch. Every process calls it after every batch that may observe."""
        self.begin_learned()
        self._meet()
        self._merge_ranges()
        self._merge_counts()

    # -- what is learned --------------------------------------------------------------------------------------------

    def begin_learned(self) -> None:
        """Have learned grids that some process began in this batch begin from the union; nothing once all have begun."""
        if not self.learned:
            return
        found = from_all({one.name: one.noted or [] for one in self.learned})
        for one in list(self.learned):
            if one.begin_together([noted[one.name] for noted in found], self.device):
                one.noted = None
                self.learned.remove(one)

    def average_gradients(self) -> None:
        """Average the gradients of what is learned over the processes, as DistributedDataParallel does for parameters.

        To average what is averaged already changes nothing, so gradients may accumulate. Where no process has one there is none.
        """
        self.begin_learned()
        if not self.parameters:
            return
        given = [parameter.grad is not None for parameter in self.parameters]
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        packed = torch.cat(
            [*(part.detach().flatten().to(self.device) for part in parts), torch.tensor(given, device=self.device)]
        )
        dist.all_reduce(packed)
        *gradients, flags = packed.split([*(part.numel() for part in parts), len(parts)])
        world = dist.get_world_size()
        somewhere = given if all(given) else [bool(flag) for flag in flags.tolist()]
        for parameter, gradient, some in zip(self.parameters, gradients, somewhere, strict=True):
            if some:
                mean = (gradient / world).view_as(parameter).to(parameter)
                parameter.grad = mean if parameter.grad is None else parameter.grad.copy_(mean)

    # -- ranges -----------------------------------------------------------------------------------------------------

    def _meet(self) -> None:
        """Agree on how much room each quantizer takes, once some process has used it."""
        unknown = [one for one in self.ranged if one.name not in self.slots]
        if unknown:
            used = {one.name: (len(one.noted), _shape(one.noted[0])) for one in unknown if one.noted}
            slots, shapes = room(from_all(used))
            self.slots.update(slots)
            self.shapes.update(shapes)

    def _merge_ranges(self) -> None:
        """Exchange (-least, greatest) of every quantizer and call in one tensor; -infinity where nothing was observed."""
        known = [one for one in self.ranged if one.name in self.slots]
        if not known:
            return
        calls = {one.name: folded(one.noted or [], self.slots[one.name]) for one in known}
        numbers = [one for one in known if self.host and not isinstance(one, BlockQuantizer)]
        tensors = [one for one in known if not self.host or isinstance(one, BlockQuantizer)]
        plain = [side for one in numbers for low, high in calls[one.name] for side in (-low, high)]
        parts = [torch.tensor(plain, dtype=torch.float64)] if plain else []
        for one in tensors:
            parts += [self._ends(one, ends) for ends in calls[one.name]]
        packed = torch.cat(parts).nan_to_num_(nan=math.inf, posinf=math.inf, neginf=-math.inf)
        dist.all_reduce(packed, op=dist.ReduceOp.MAX)
        merged, place = packed[: len(plain)].tolist(), 0
        for one in numbers:
            ends = [(-merged[i], merged[i + 1]) for i in range(place, place + 2 * self.slots[one.name], 2)]
            place += 2 * self.slots[one.name]
            one.move_together([(low, high) for low, high in ends if low <= high])
        for one in tensors:
            place = self._move_tensors(one, packed, place)

    def _ends(self, one: ActivationQuantizer, ends: Ends) -> Tensor:
        """(-least, greatest) of a call on the device, flat."""
        if not isinstance(ends[0], Tensor):
            return torch.full((2 * math.prod(self.shapes[one.name]),), -math.inf, dtype=torch.float64, device=self.device)
        return torch.cat([-ends[0].flatten(), ends[1].flatten()]).to(self.device, torch.float64)

    def _move_tensors(self, one: ActivationQuantizer, packed: Tensor, place: int) -> int:
        shape = self.shapes[one.name]
        size = math.prod(shape)
        moves: list[Ends] = []
        for _ in range(self.slots[one.name]):
            low = -packed[place : place + size].view(shape).float()
            high = packed[place + size : place + 2 * size].view(shape).float()
            # What nobody observed is left out by its infinite ends; on the host that would be reported.
            if not self.host or bool((low <= high).any()):
                moves.append((low, high))
            place += 2 * size
        one.move_together(moves)
        return place

    def _merge_counts(self) -> None:
        """Exchange the ends that histograms have to cover, then their counts, each in one tensor."""
        if not self.counted:
            return
        rows = []
        for one in self.counted:
            noted = one.noted or []
            ends = (min(low for low, _ in noted), max(high for _, high in noted)) if noted else (math.inf, -math.inf)
            rows.append([-ends[0], ends[1], float(len(noted))])
        packed = torch.tensor(rows, dtype=torch.float64, device=self.device)
        dist.all_reduce(packed, op=dist.ReduceOp.MAX)
        merged = [(-low, high, int(number)) for low, high, number in packed.tolist()]
        counts = torch.zeros(len(self.counted), BINS + 1, dtype=torch.int64)
        for row, one, (low, high, _) in zip(counts, self.counted, merged, strict=True):
            if low <= high and math.isfinite(high - low):
                one.observer.histogram.cover(low, high)
                row.copy_(one.fresh.counts_in(one.observer.histogram))
        counts = counts.to(self.device)
        dist.all_reduce(counts)
        for row, one, (low, high, number) in zip(counts.cpu(), self.counted, merged, strict=True):
            one.count_together(row, number if low <= high and math.isfinite(high - low) else 0)


def _shape(ends: Ends) -> tuple[int, ...] | None:
    return tuple(ends[0].shape) if isinstance(ends[0], Tensor) else None


def room(found: Iterable[Mapping[str, tuple[int, tuple[int, ...] | None]]]) -> tuple[dict[str, int], dict[str, tuple[int, ...]]]:
    """(calls, shape of the ranges) by quantizer, from what each process says of those it has used.

    Raises:
        ConfigError: if the shapes of two processes differ; in all of them.
    """
    slots: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for used in found:
        for name, (calls, shape) in used.items():
            slots[name] = max(calls, slots.get(name, 0))
            if shape is not None and shapes.setdefault(name, shape) != shape:
                raise ConfigError(
                    f"{name}: its ranges have the shape {shapes[name]} in one process and {shape} in another. A scale for each "
                    "block needs dimensions of one size; use 'per_tensor' or -1 for those that change."
                )
    return slots, shapes


def folded(noted: Sequence[Ends], slots: int) -> list[Ends]:
    """The ends of so many calls: where there were more, the last of them has those of all the rest; where fewer, nothing."""
    kept = list(noted[: slots - 1])
    if rest := noted[slots - 1 :]:
        kept.append(reduce(_widest, rest))
    return kept + [(math.inf, -math.inf)] * (slots - len(kept))


def _widest(a: Ends, b: Ends) -> Ends:
    if isinstance(a[0], Tensor):
        return torch.minimum(a[0], b[0]), torch.maximum(a[1], b[1])
    if not all(map(math.isfinite, (*a, *b))):  # Python's min and max pass NaN by
        return -math.inf, math.inf
    return min(a[0], b[0]), max(a[1], b[1])
