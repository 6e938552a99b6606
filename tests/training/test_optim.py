"""The guard: which steps it refuses, by hand and for any course of a training run."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isonext.training.optim import MAX_LEAP, MAX_NORMS, MAX_SKIPPED, MIN_NORMS, Guard

norms = st.one_of(st.floats(1e-6, 1e6), st.sampled_from([math.nan, math.inf, -math.inf]))


def steady(count: int, norm: float = 2.0) -> Guard:
    guard = Guard()
    assert all(guard.passes(norm) for _ in range(count))
    return guard


@pytest.mark.parametrize("norm", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_never_passes(norm):
    assert not Guard().passes(norm)
    assert not steady(200).passes(norm)


def test_a_leap_is_one_only_against_enough_others():
    assert steady(MIN_NORMS - 1).passes(1e9)
    guard = steady(MIN_NORMS)
    assert guard.passes(MAX_LEAP * 2.0) and not guard.passes(MAX_LEAP * 2.0 * 1.001)
    assert (guard.skipped, guard.in_a_row) == (1, 1)


def test_the_median_is_of_the_last_steps_that_were_taken():
    guard = steady(MAX_NORMS, 100.0)
    for _ in range(MAX_NORMS // 2 + 1):  # now most of the window is small
        assert guard.passes(1.0)
    assert len(guard.norms) == MAX_NORMS
    assert not guard.passes(100.0)
    assert guard.passes(10.0)
    assert guard.in_a_row == 0 and guard.skipped == 1
    assert (
        100.0 in guard.norms and guard.norms.count(100.0) == MAX_NORMS - MAX_NORMS // 2 - 2
    )  # the refused one is not there


def test_it_gives_up_after_that_many_in_a_row_and_not_in_all():
    guard = steady(3)
    for _ in range(MAX_SKIPPED - 1):
        guard.passes(math.nan)
    assert not guard.has_given_up
    guard.passes(1.0)
    for _ in range(MAX_SKIPPED - 1):
        guard.passes(math.nan)
    assert not guard.has_given_up and guard.skipped == 2 * MAX_SKIPPED - 2
    guard.passes(math.nan)
    assert guard.has_given_up


@given(before=st.lists(norms, max_size=150), after=st.lists(norms, max_size=30))
def test_a_guard_from_its_record_judges_as_the_one_that_went_on(before, after):
    guard = Guard()
    for norm in before:
        guard.passes(norm)
    again = Guard(json.loads(json.dumps(guard.record)))
    assert [again.passes(norm) for norm in after] == [guard.passes(norm) for norm in after]
    assert again.record == guard.record
    assert guard.skipped + len(guard.norms) >= min(MAX_NORMS, len(before) + len(after))
    assert all(math.isfinite(norm) for norm in guard.norms)
