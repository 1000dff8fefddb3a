"""When decisions are due, and how far they look back."""

from collections.abc import Iterable, Iterator
from itertools import pairwise, repeat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_eplb.balancer.schedule import RearrangementState, Schedule


def decisions(step_interval: int, values: Iterable[float]) -> list[int]:
    """The steps, counted from 1, after which the policy is asked."""
    schedule = Schedule(step_interval)
    return [step for step, value in enumerate(values, start=1) if schedule.step(value)]


def level_but(steps: range, value: float, count: int = 400) -> Iterator[float]:
    """0.95, and another value after these steps, which are counted from 1."""
    return (value if step in steps else 0.95 for step in range(1, count + 1))


@pytest.mark.parametrize(
    ("step_interval", "expected"),
    [
        (100, [25, 125, 225, 325]),
        (50, [12, 62, 112, 162, 212, 262, 312, 362]),
        (300, [75, 375]),
    ],
)
def test_schedule_of_steady_load_decides_after_a_quarter_and_then_every_interval(
    step_interval: int, expected: list[int]
) -> None:
    assert decisions(step_interval, repeat(0.9, 400)) == expected


def test_schedule_of_short_interval_starts_at_step_one() -> None:
    assert decisions(1, [1.0, 0.1, 1.0, 0.1]) == [1, 2, 3, 4]
    assert decisions(3, repeat(1.0, 8)) == [1, 4, 7]


def test_schedule_after_lasting_drop_decides_early() -> None:
    """Ten steps, a tenth of the interval, must be below the ten after the decision; then all intervals move."""
    assert decisions(100, level_but(range(171, 401), 0.8)) == [25, 125, 180, 280, 380]


def test_schedule_after_shallow_drop_does_not_decide_early() -> None:
    assert decisions(100, level_but(range(171, 401), 0.86)) == [25, 125, 225, 325]
    assert decisions(100, level_but(range(171, 401), 0.84)) == [25, 125, 180, 280, 380]


@pytest.mark.parametrize("length", [1, 5, 9])
def test_schedule_after_burst_does_not_decide_early(length: int) -> None:
    assert decisions(100, level_but(range(171, 171 + length), 0.2)) == [25, 125, 225, 325]


def test_schedule_with_one_good_step_in_ten_does_not_decide_early() -> None:
    bad_but_every_tenth = [0.5 if step >= 140 and step % 10 else 0.95 for step in range(1, 401)]
    assert decisions(100, bad_but_every_tenth) == [25, 125, 225, 325]


def test_schedule_after_drop_in_first_quarter_waits_for_its_end() -> None:
    assert decisions(100, level_but(range(136, 401), 0.8))[:3] == [25, 125, 150]


def test_schedule_after_drop_before_first_decision_is_on_time() -> None:
    assert decisions(100, level_but(range(12, 25), 0.1))[:2] == [25, 125]


def test_schedule_of_low_balancedness_from_start_does_not_decide_early() -> None:
    assert decisions(100, level_but(range(26, 401), 0.3)) == [25, 125, 225, 325]


def test_schedule_after_early_decision_compares_with_new_level() -> None:
    falling = [0.95] * 160 + [0.8] * 100 + [0.6] * 140
    assert decisions(100, falling) == [25, 125, 170, 270, 370]
    assert decisions(100, [0.95] * 160 + [0.8] * 70 + [0.6] * 170) == [25, 125, 170, 240, 340]


@given(st.integers(1, 19), st.lists(st.floats(0.01, 1.0), min_size=1, max_size=200))
def test_schedule_of_interval_below_twenty_never_decides_early(step_interval: int, values: list[float]) -> None:
    first = max(1, step_interval // 4)
    assert decisions(step_interval, values) == list(range(first, len(values) + 1, step_interval))


@given(st.integers(20, 60), st.lists(st.floats(0.01, 1.0), min_size=60, max_size=300))
def test_schedule_of_any_load_keeps_a_quarter_to_an_interval_between_decisions(
    step_interval: int, values: list[float]
) -> None:
    found = decisions(step_interval, values)
    assert found[0] == step_interval // 4
    for before, after in pairwise([*found, len(values)]):
        assert after - before <= step_interval
    for before, after in pairwise(found):
        assert after - before >= step_interval // 4


def test_look_back_after_early_decision_covers_the_drift_alone() -> None:
    schedule = Schedule(100)
    seen = {}
    for step, value in enumerate(level_but(range(171, 401), 0.8), start=1):
        if schedule.step(value):
            seen[step] = [schedule.look_back(in_window) for in_window in (3, 20, 100)]
    assert seen == {25: [3, 20, 100], 125: [3, 20, 100], 180: [3, 20, 20], 280: [3, 20, 100], 380: [3, 20, 100]}


def test_steps_to_go_count_down_and_can_be_set() -> None:
    schedule = Schedule(40)
    assert schedule.steps_to_go == 10
    assert [schedule.step(1.0) for _ in range(3)] == [False] * 3
    assert schedule.steps_to_go == 7
    schedule.steps_to_go = 1
    assert schedule.step(1.0)
    assert schedule.steps_to_go == 40


IDLE, DUE, PLANNED, IN_FLIGHT, IN_FLIGHT_AND_DUE = RearrangementState


@pytest.mark.parametrize(
    ("state", "when_due", "without_plan"),
    [
        (IDLE, DUE, IDLE),
        (DUE, DUE, DUE),
        (PLANNED, PLANNED, DUE),
        (IN_FLIGHT, IN_FLIGHT_AND_DUE, IDLE),
        (IN_FLIGHT_AND_DUE, IN_FLIGHT_AND_DUE, DUE),
    ],
)
def test_state_without_plan_keeps_due_rearrangement(
    state: RearrangementState, when_due: RearrangementState, without_plan: RearrangementState
) -> None:
    assert state.when_due() is when_due
    assert state.without_plan() is without_plan


def test_schedule_of_models_that_take_turns_compares_each_with_itself() -> None:
    """Ten steps of one model, then ten of another that is less balanced, are no drift; one that drops is."""

    def decided(drops_after: int) -> list[int]:
        schedule, steps = Schedule(100, num_models=2), []
        for step in range(1, 401):
            is_first = step // 10 % 2 == 0
            level = 0.95 if step <= drops_after else 0.7
            if schedule.step(level if is_first else None, None if is_first else 0.6):
                steps.append(step)
                assert schedule.look_back(100, 0) == (20 if step == 189 else 100)
                assert schedule.look_back(100, 1) == 100
        return steps

    assert decided(drops_after=400) == [25, 125, 225, 325]
    assert decided(drops_after=175) == [25, 125, 189, 289, 389]


def test_schedule_of_model_that_rests_does_not_decide_early() -> None:
    schedule = Schedule(100, num_models=2)
    steps = [step for step in range(1, 300) if schedule.step(0.9, 0.9 if step < 130 else None)]
    assert steps == [25, 125, 225]
