"""Period errors by hand."""

from vla_spec.nodes._tick_statistics import TickStatistics

MS = 1_000_000


def test_errors_are_of_the_period_and_of_the_window():
    ticks = TickStatistics(10 * MS, window=3)
    assert ticks.summary() == {"ticks": 0}
    for now in (0, 10, 21, 29, 39):
        ticks.begin(now * MS)
    said = ticks.summary()  # 11, 8 and 10 ms: the first period has left the window
    assert (said["ticks"], said["pauses"]) == (5, 0)
    assert said["period_error_p50_ms"] == 1.0
    assert said["period_error_max_ms"] == 2.0


def test_a_pause_is_counted_and_in_no_other_number():
    ticks = TickStatistics(10 * MS, pause_ns=100 * MS)
    for now in (0, 10, 500, 510):
        ticks.begin(now * MS)
    assert ticks.summary() == {
        "ticks": 4, "pauses": 1, "period_error_p50_ms": 0.0, "period_error_p99_ms": 0.0, "period_error_max_ms": 0.0,
    }  # fmt: skip
