"""Time told to people: how much is done, how long it may take, when it is given up. No estimate without history, none that is no longer true."""

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from repave.api.batch_views import estimate_json, when_given_up
from repave.domain.model import Step
from repave.domain.timing import done_share, eta_s, slow_durations, usual_durations
from repave.folding import counts_line, time_left, unfold

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
HISTORY = [{"boot-ramdisk": float(s), "write-image": 100.0} for s in (50, 52, 54, 56, 58, 60, 62, 64, 66, 120)]
USUAL = usual_durations(HISTORY)


def test_a_step_counts_as_much_as_it_usually_lasts_and_a_late_one_holds_at_its_end() -> None:
    assert done_share(Step.BOOT_RAMDISK, 29.5, USUAL) == pytest.approx(29.5 / 159)
    assert done_share(Step.BOOT_RAMDISK, 9999, USUAL) == pytest.approx(59 / 159)
    assert done_share(Step.WRITE_IMAGE, 1, USUAL, written=0.5) == pytest.approx((59 + 50) / 159)
    assert done_share(Step.WRITE_IMAGE, 1, {}) == pytest.approx(4 / 8), "without history each step counts the same"


def test_the_far_end_of_an_estimate_is_slower_than_nine_of_ten_and_needs_history() -> None:
    assert USUAL["boot-ramdisk"] < slow_durations(HISTORY)["boot-ramdisk"] < 120
    assert slow_durations(HISTORY[:4]) == {}


def run(state: str, eta: float | None = None, high: float | None = None, done: int = 0) -> dict[str, Any]:
    return {"state": state, "eta_s": eta, "eta_high_s": high, "done_percent": done}


def test_a_batch_is_estimated_by_its_slowest_run_and_not_at_all_while_one_is_late_or_waits() -> None:
    two = [run("working", 60, 90, 40), run("working", 30, 100, 60), run("running", done=100)]
    assert estimate_json(two) == {"percent": 67, "eta_s": 60, "eta_high_s": 100}
    assert time_left(estimate_json(two)) == ["about 1:00 to 1:40 left"]
    assert time_left({"eta_s": 60, "eta_high_s": 62}) == ["about 1:00 left"]
    for gone in ("working", "waiting"):  # late; not begun
        assert estimate_json([*two, run(gone)])["eta_s"] is None
    assert time_left({"eta_s": None, "eta_high_s": None}) == []
    assert eta_s(Step.BOOT_RAMDISK, 500, USUAL) is None


@pytest.mark.parametrize(
    ("setting_s", "alike", "left_s", "expected_s"),
    [
        (1800, [], 7200, 1800),  # nothing learnt: the site's setting
        (1800, [60.0] * 8, 7200, 660),  # learnt: ten minutes more than the slowest
        (300, [60.0] * 8, 7200, 300),  # the setting is the ceiling
        (1800, [60.0] * 8, 100, 100),  # the run's deadline comes first
    ],
)
def test_a_run_is_given_up_by_whichever_limit_comes_first(setting_s: float, alike: list[float], left_s: float, expected_s: float) -> None:
    waiting: Any = SimpleNamespace(step=Step.FIRST_BOOT, past_the_line=True, deadline_at=NOW + timedelta(seconds=left_s))
    given_up = when_given_up(waiting, 40.0, NOW + timedelta(seconds=40), waits_s={Step.FIRST_BOOT: setting_s}, alike_s=alike)
    assert (given_up - NOW).total_seconds() == expected_s


def test_every_count_fits_where_the_bar_makes_room() -> None:
    batch = {"percent": 70, "counts": {"running": 3, "working": 8, "waiting": 0, "failed": 1, "cancelled": 0}, "max_failed": 2}
    wide, narrow = counts_line(batch, 200), counts_line(batch, 60)
    assert wide.count("█") == 21 and "█" not in narrow
    assert all(word in narrow for word in ("70 %", "running 3", "working 8", "waiting 0", "failed 1 (stops above 2)")) and "cancelled" not in narrow


@pytest.mark.parametrize("text", ["b[1-200000]", "b[ 1-200000]", "b[200000-1]", "b[1-200000],a[1-0]", "a[1-400]b[1-400]", "b[1-200000"])
def test_a_nodeset_of_too_many_names_is_refused_before_any_is_made(text: str) -> None:
    with pytest.raises(ValueError, match="more than"):
        unfold(text)
