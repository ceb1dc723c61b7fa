"""A week of crawls of a site that moves, in small: see benchmarks/bench_week.py."""

from __future__ import annotations

from pathlib import Path

from benchmarks.bench_week import DAYS, Week, World


def test_a_week_loses_and_doubles_nothing(tmp_path: Path) -> None:
    week = Week(World(150, 1_500), tmp_path, seed=1, kills=1, kill_within=3.0, share=0.2)
    days = list(week.run())  # raises when a record is lost, doubled, stale or wrongly gone
    assert [day["day"] for day in days] == list(range(DAYS + 1))
    last = days[-1]
    assert last["salvaged"] is not None, "its snapshot was damaged the day before"
    assert last["rows"]["models"] == week.world.all_models
    assert last["gone"]["models"] and last["gone"]["images"]
    assert sum(day["refused"] for day in days) > 0
    assert 0 < last["recall"]["images"] < 1
    assert max(day["peak_mb"] for day in days) < 300
