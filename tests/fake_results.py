"""Results without a run behind them."""

from __future__ import annotations

from dataclasses import fields

from vla_spec.results import Results, Row, Series


def a_row(**changes):
    values = {
        "mode": "exact", "engine": "toy", "drafter": "ngram", "rule": "greedy", "controller": "fixed",
        "is_exact": True, "episodes": 4, "success_rate": 0.75, "success_ci95": (0.3, 0.95), "chunks": 9,
        "deadline_ms": 50.0,
    }  # fmt: skip
    values |= {f.name: 1.5 for f in fields(Row) if f.name not in values}
    return Row(**(values | changes))


def some_results(**changes):
    values = {
        "kind": "run", "rows": (a_row(),), "seeds": (10, 11), "tasks": ("reach",), "model_hash": "abc",
        "series": {"exact": Series((1.0, 2.0), (1.0,), (0.0,), (3, 1))}, "configs": {"exact": {"drafter": "ngram"}},
    }  # fmt: skip
    return Results(**(values | changes))
