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
    return Clock(step=step, epoch=epoch, total_steps=total)


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


@pytest.mark.parametrize("field", ["observe_start", "observe_stop", "quantize_start", "freeze_batch_norm"])
@pytest.mark.parametrize("moment", WRONG, ids=repr)
def test_what_is_no_moment_is_refused_by_name(field: str, moment: Any) -> None:
    text = (
        f"schedule: {field}={moment!r} is no moment; give an int (step), a float in [0, 1] (share of the run), "
        "'epoch 3', 'step 500', '80%' or None (never)."
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(text)}$"):
        Schedule(**{field: moment})


def test_make_takes_a_schedule_as_it_is_and_none_for_the_defaults() -> None:
    schedule = Schedule(quantize_start=7)
    assert Schedule.make(schedule) is schedule
    assert Schedule.make(None) == Schedule()
    assert Schedule.make({}) == Schedule()


def test_make_reads_a_dict_of_fields() -> None:
    got = Schedule.make({"observe_start": "epoch 1", "freeze_batch_norm": None})
    assert got == Schedule(observe_start="epoch 1", freeze_batch_norm=None)
    assert got.observe_stop == 0.9


@pytest.mark.parametrize(("key", "hint"), [("observe_stopp", " Did you mean 'observe_stop'?"), ("zzz", ""), (3, "")])
def test_make_refuses_an_unknown_key(key: Any, hint: str) -> None:
    allowed = "observe_start, observe_stop, quantize_start, freeze_batch_norm"
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
