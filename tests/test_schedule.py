# SPDX-License-Identifier: Apache-2.0
"""Owns the checks of `schedule.py`: every way to write a moment, and the phase of every step as a pure function."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import pytest

from lightning_quant.config import ConfigError
from lightning_quant.schedule import Clock, Moment, Phase, Schedule

NEVER = Schedule(observe_start=None, observe_stop=None, quantize_start=None, freeze_batch_norm=None)


def at(step: int, epoch: int = 0, total: float = 100) -> Clock:
    return Clock(step=step, epoch=epoch, done=step, length=total)


# -- one moment ---------------------------------------------------------------------------------------------------------

MOMENTS = [
    # moment, the clock just before it, the clock at it
    (1, at(0), at(1)),
    (30, at(29), at(30)),
    (0.5, at(49), at(50)),
    (0.9, at(89), at(90)),
    (1.0, at(99), at(100)),
    (0.501, at(50), at(51)),
    ("step 30", at(29), at(30)),
    ("30%", at(29), at(30)),
    ("12.5%", at(12), at(13)),
    ("100%", at(99), at(100)),
    ("  80 % ", at(79), at(80)),
    ("step   7", at(6), at(7)),
    ("epoch 3", at(10_000, epoch=2), at(0, epoch=3)),
]


@pytest.mark.parametrize(("moment", "before", "then"), MOMENTS, ids=[repr(row[0]) for row in MOMENTS])
def test_a_phase_begins_with_the_step_at_its_moment(moment: Moment, before: Clock, then: Clock) -> None:
    schedule = dataclasses.replace(NEVER, quantize_start=moment)
    assert not schedule.phase_at(before).quantize
    assert schedule.phase_at(then).quantize


@pytest.mark.parametrize("moment", [0, 0.0, "step 0", "0%", "epoch 0"], ids=repr)
@pytest.mark.parametrize("total", [100, math.inf], ids=["known length", "unknown length"])
def test_the_beginning_is_reached_at_once(moment: Moment, total: float) -> None:
    assert dataclasses.replace(NEVER, quantize_start=moment).phase_at(at(0, total=total)).quantize


@pytest.mark.parametrize("percent", [7, 14, 28, 29, 55, 56, 57, 58])
def test_a_share_begins_at_its_step_whatever_floats_do(percent: int) -> None:
    """0.07 * 100 is 7.000000000000001 in floats; step 7 of 100 is 7 %."""
    for moment in (f"{percent}%", percent / 100):
        schedule = dataclasses.replace(NEVER, quantize_start=moment)
        reached = [step for step in range(101) if schedule.phase_at(at(step)).quantize]
        assert reached[0] == percent


@pytest.mark.parametrize("clock", [at(0), at(100), at(10**9, epoch=10**6), at(5, total=math.inf)], ids=str)
def test_none_is_never(clock: Clock) -> None:
    assert NEVER.phase_at(clock) == Phase(observe=False, quantize=False, freeze_batch_norm=False)


@pytest.mark.parametrize("share", [0.1, 1.0, "50%"], ids=repr)
def test_a_share_of_an_unknown_run_is_never_reached(share: Moment) -> None:
    schedule = dataclasses.replace(NEVER, freeze_batch_norm=share)
    assert not schedule.phase_at(at(10**9, epoch=99, total=math.inf)).freeze_batch_norm


@pytest.mark.parametrize(("moment", "reached"), [("epoch 2", True), ("epoch 3", False), (5, True), ("step 6", False)])
def test_epochs_and_steps_need_no_length(moment: Moment, reached: bool) -> None:
    schedule = dataclasses.replace(NEVER, quantize_start=moment)
    assert schedule.phase_at(at(5, epoch=2, total=math.inf)).quantize is reached


@pytest.mark.parametrize("step", [0, 9_000])
def test_a_share_counts_what_is_done_and_not_steps(step: int) -> None:
    schedule = dataclasses.replace(NEVER, quantize_start=0.5)
    reached = [done for done in range(20) if schedule.phase_at(Clock(step=step, epoch=0, done=done, length=20)).quantize]
    assert reached == list(range(10, 20))


# -- the phase: one field moves one flag --------------------------------------------------------------------------------

PHASES = [
    # schedule, step, observe, quantize, freeze_batch_norm
    ("defaults", Schedule(), 0, True, True, False),
    ("defaults", Schedule(), 89, True, True, False),
    ("defaults", Schedule(), 90, False, True, False),
    ("late observer", Schedule(observe_start=10), 9, False, True, False),
    ("late observer", Schedule(observe_start=10), 10, True, True, False),
    ("early stop", Schedule(observe_stop=10), 9, True, True, False),
    ("early stop", Schedule(observe_stop=10), 10, False, True, False),
    ("endless observer", Schedule(observe_stop=None), 99, True, True, False),
    ("late quantization", Schedule(quantize_start=50), 49, True, False, False),
    ("late quantization", Schedule(quantize_start=50), 50, True, True, False),
    ("late batch norm", Schedule(freeze_batch_norm=0.9), 90, False, True, True),
    ("frozen at once", Schedule(freeze_batch_norm=0), 0, True, True, True),
    ("ranges of an earlier fit", Schedule(observe_stop=0), 0, False, True, False),
]


WEIGHTS_FIRST = [
    # quantize_start, activations_start, {step: (quantize, quantize_activations)}
    (0, "with weights", {0: (True, True), 99: (True, True)}),
    ("30%", "with weights", {29: (False, False), 30: (True, True)}),
    (None, "with weights", {0: (False, False), 99: (False, False)}),
    (0, 40, {0: (True, False), 39: (True, False), 40: (True, True)}),
    (20, "60%", {19: (False, False), 20: (True, False), 59: (True, False), 60: (True, True)}),
    (20, 20, {19: (False, False), 20: (True, True)}),
    (20, 0.1, {10: (False, False), 19: (False, False), 20: (True, True)}),  # never before the weights
    (0, None, {0: (True, False), 99: (True, False)}),
    (0, "epoch 1", {99: (True, False)}),
]


@pytest.mark.parametrize(
    ("weights", "activations", "expected"), WEIGHTS_FIRST, ids=[f"{row[0]} {row[1]}" for row in WEIGHTS_FIRST]
)
def test_weights_first(weights: Moment, activations: Moment, expected: dict[int, tuple[bool, bool]]) -> None:
    schedule = Schedule(quantize_start=weights, activations_start=activations)
    phases = {step: schedule.phase_at(at(step)) for step in expected}
    assert {step: (phase.quantize, phase.quantize_activations) for step, phase in phases.items()} == expected


def test_a_phase_rounds_no_activations_without_weights() -> None:
    assert not Phase(quantize=False).quantize_activations
    assert Phase(quantize=False, quantize_activations=True) == Phase(quantize=False, quantize_activations=False)
    assert Phase().quantize_activations
    assert not Phase(quantize_activations=False).quantize_activations
    assert Phase(quantize_activations=False).quantize
    assert dataclasses.replace(Phase(), quantize=False) == Phase(quantize=False)


@pytest.mark.parametrize(("weights", "activations"), [(10, 9), (10, 0), ("epoch 2", "epoch 1"), (0.5, "40%"), ("epoch 1", 0.0)])
def test_activations_before_weights_are_refused(weights: Moment, activations: Moment) -> None:
    text = f"activations_start={activations!r} comes before quantize_start={weights!r}: activations are never rounded before"
    with pytest.raises(ConfigError, match=f"{re.escape(text)} weights; let them start later, or 'with weights'"):
        Schedule(quantize_start=weights, activations_start=activations)


def test_activations_without_weights_are_refused() -> None:
    with pytest.raises(
        ConfigError, match="activations_start=5 without quantize_start: activations are rounded where weights are"
    ):
        Schedule(quantize_start=None, activations_start=5)
    assert Schedule(quantize_start=None, activations_start=None).phase_at(at(99)) == Phase(observe=False, quantize=False)


# -- layer by layer -----------------------------------------------------------------------------------------------------

LAYERS = [
    # quantize_start, progressive, layers, the clock's steps, how many layers have begun at each
    (0, 8, 4, {0: 1, 1: 1, 2: 2, 3: 2, 4: 3, 6: 4, 8: 4, 99: 4}),
    (10, 20, 5, {0: 0, 9: 0, 10: 1, 11: 1, 12: 2, 17: 4, 18: 5, 20: 5}),
    (0, 10, 3, {0: 1, 3: 1, 4: 2, 6: 2, 7: 3, 10: 3}),  # 3 1/3 and 6 2/3: the first step that has reached them
    (0, 3, 9, {0: 1, 1: 4, 2: 7, 3: 9}),  # more layers than steps
    (0, 50, 1, {0: 1}),
    ("20%", "80%", 6, {19: 0, 20: 1, 29: 1, 30: 2, 69: 5, 70: 6, 80: 6}),
    (0, 0.7, 7, {step: min(step // 10 + 1, 7) for step in range(100)}),
    (0.0, "step 4", 2, {0: 1, 1: 1, 2: 2}),
    (0, 9, 0, {0: 0}),
    (0, None, 4, {0: 4}),
    (50, None, 4, {0: 4}),  # all layers are in one phase, whichever it is
]


@pytest.mark.parametrize(
    ("start", "stop", "layers", "expected"), LAYERS, ids=[f"{row[0]} to {row[1]}, {row[2]}" for row in LAYERS]
)
def test_layers_begin_one_after_the_other(start: Moment, stop: Moment, layers: int, expected: dict[int, int]) -> None:
    schedule = Schedule(quantize_start=start, progressive=stop)
    assert {step: schedule.layers_at(at(step), layers) for step in expected} == expected


def test_layers_in_epochs_begin_with_the_first_epoch_that_has_reached_them() -> None:
    schedule = Schedule(quantize_start="epoch 1", progressive="epoch 3")
    begun = [schedule.layers_at(at(10 * epoch, epoch), 4) for epoch in range(5)]
    assert begun == [0, 1, 3, 4, 4], "layers at epochs 1, 1.5, 2 and 2.5"


def test_layers_at_shares_of_an_unknown_run() -> None:
    assert Schedule(progressive=0.5).layers_at(at(10**6, total=math.inf), 4) == 1


@pytest.mark.parametrize(("start", "stop"), [(5, "50%"), ("epoch 1", 20), (0.2, "epoch 3"), (None, 10)], ids=str)
def test_progressive_needs_the_unit_of_quantize_start(start: Moment, stop: Moment) -> None:
    text = (
        f"progressive={stop!r} and quantize_start={start!r} are not of one unit, and the layers begin between them; give both as"
    )
    with pytest.raises(ConfigError, match=re.escape(text)):
        Schedule(quantize_start=start, progressive=stop)


@pytest.mark.parametrize(("start", "stop"), [(5, 5), (5, "step 4"), (0, 0), ("epoch 2", 0), (0.5, "40%")], ids=str)
def test_progressive_needs_time(start: Moment, stop: Moment) -> None:
    text = f"progressive={stop!r} comes no later than quantize_start={start!r}: no time is left between the layers; let it come"
    with pytest.raises(ConfigError, match=re.escape(text)):
        Schedule(quantize_start=start, progressive=stop)


@pytest.mark.parametrize(("epochs", "steps"), [(3, 4), (3, 2000), (90, 5000)])
def test_by_default_ranges_stand_still_for_the_last_tenth_of_any_run(epochs: int, steps: int) -> None:
    total = epochs * steps
    phases = [Schedule().phase_at(at(step, step // steps, total)) for step in range(0, total, max(total // 1000, 1))]
    assert 0.08 <= sum(not phase.observe for phase in phases) / len(phases) <= 0.1
    assert phases[0].observe
    assert not phases[-1].observe
    assert all(phase.quantize and phase.quantize_activations and not phase.freeze_batch_norm for phase in phases)


@pytest.mark.parametrize(("start", "stop"), [(20, 10), (10, 10), (0.5, "20%"), ("epoch 3", "epoch 2")], ids=str)
def test_an_observer_that_stops_before_it_starts_is_refused(start: Any, stop: Any) -> None:
    with pytest.raises(ConfigError, match="no range would ever be observed; let it stop later, or never"):
        Schedule(observe_start=start, observe_stop=stop)


@pytest.mark.parametrize(
    ("schedule", "step", "observe", "quantize", "freeze"),
    [row[1:] for row in PHASES],
    ids=[f"{row[0]} at {row[2]}" for row in PHASES],
)
def test_phase_at(schedule: Schedule, step: int, observe: bool, quantize: bool, freeze: bool) -> None:
    assert schedule.phase_at(at(step)) == Phase(observe=observe, quantize=quantize, freeze_batch_norm=freeze)


def test_the_phase_depends_on_the_clock_alone() -> None:
    schedule = Schedule(observe_start=3, quantize_start="50%")
    forward = {step: schedule.phase_at(at(step)) for step in range(100)}
    backward = {step: schedule.phase_at(at(step)) for step in reversed(range(100))}
    assert forward == backward
    assert len(set(forward.values())) == 4  # nothing, observing, quantizing, frozen


def test_a_schedule_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Schedule().observe_start = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("moment", "needs"), [(0.5, True), ("50%", True), (5, False), ("epoch 5", False), ("step 5", False), (None, False)]
)
def test_only_shares_need_the_length_of_the_run(moment: Moment, needs: bool) -> None:
    assert dataclasses.replace(NEVER, observe_stop=moment).needs_total_steps is needs


# -- errors and the dict form -------------------------------------------------------------------------------------------

WRONG: list[Any] = [
    -1, -0.1, 1.5, 5.0, 101.0, math.nan, math.inf, True, False, "", "epoch", "epoch -1", "epoch 1.5", "step x", "80", "101%",
    "-5%", "half", "Epoch 3", b"80%", [3], {"step": 3},
]  # fmt: skip


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("observe_start", "'80%' or None (never)"),
        ("observe_stop", "'80%' or None (never)"),
        ("quantize_start", "'80%' or None (never)"),
        ("activations_start", "'80%', 'with weights' or None (never)"),
        ("progressive", "'80%' or None (all at once)"),
        ("freeze_batch_norm", "'80%' or None (never)"),
    ],
)
@pytest.mark.parametrize("moment", [*WRONG, "with weight"], ids=repr)
def test_what_is_no_moment_is_refused_by_name(field: str, words: str, moment: Any) -> None:
    text = (
        f"schedule: {field}={moment!r} is no moment; give an int (step), a float in [0, 1] (share of the run), "
        f"'epoch 3', 'step 500', {words}."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(text)}$"):
        Schedule(**{field: moment})


def test_make_takes_a_schedule_as_it_is_and_none_for_the_defaults() -> None:
    schedule = Schedule(quantize_start=7)
    assert Schedule.make(schedule) is schedule
    assert Schedule.make(None) == Schedule()
    assert Schedule.make({}) == Schedule()


def test_make_reads_a_dict_of_fields() -> None:
    got = Schedule.make({"observe_start": "epoch 1", "activations_start": 5, "progressive": "step 9", "freeze_batch_norm": None})
    assert got == Schedule(observe_start="epoch 1", activations_start=5, progressive="step 9", freeze_batch_norm=None)
    assert got.observe_stop == 0.9


@pytest.mark.parametrize(("key", "hint"), [("observe_stopp", " Did you mean 'observe_stop'?"), ("zzz", ""), (3, "")])
def test_make_refuses_an_unknown_key(key: Any, hint: str) -> None:
    allowed = "observe_start, observe_stop, quantize_start, activations_start, progressive, freeze_batch_norm"
    text = f"schedule: unknown key {key!r}; allowed: {allowed}.{hint}"
    with pytest.raises(ConfigError, match=f"^{re.escape(text)}$"):
        Schedule.make({key: 3})


@pytest.mark.parametrize("given", ["80%", 3, [("observe_start", 3)]], ids=repr)
def test_make_refuses_other_types(given: Any) -> None:
    text = f"schedule: expected a Schedule, a dict of its fields or None, got {given!r}."
    with pytest.raises(ConfigError, match=re.escape(text)):
        Schedule.make(given)


def test_make_checks_the_moments_of_a_dict() -> None:
    with pytest.raises(ConfigError, match="quantize_start='soon' is no moment"):
        Schedule.make({"quantize_start": "soon"})
