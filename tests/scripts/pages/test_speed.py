"""What docs/speed.md says of selections beside plain references, from a record."""

from scripts.pages.speed import page


def test_what_is_faster_or_slower_in_every_round_is_counted() -> None:
    facts = {"device": "x", "kind": "cpu", "threads": 1, "cores": 2, "load": 0.5, "clock": "process time", "date": "2026-11-29"}
    facts |= {"versions": {"torch": "2.14.1", "transformers": "5.24.0"}}
    row = {"tokens": 576, "batch": 1, "keep": 64, "map_bytes": 0, "plain_launches": 3, "plain_waits": 1, "launches": 4, "waits": 0}
    row |= {"plain_peak_bytes": 0, "peak_bytes": 0}
    rows = [
        row | {"method": "fast", "plain_ms": [2.0, 3.0, 2.0], "ms": [1.0, 1.0, 1.5]},
        row | {"method": "slow", "plain_ms": [1.0, 1.0, 1.0], "ms": [1.5, 2.0, 1.25]},
        row | {"method": "even", "plain_ms": [1.0, 1.0, 1.0], "ms": [0.5, 1.5, 1.0]},
        row | {"method": "long", "left_out": "more than 5 s for the reference"},
    ]
    record = {"kind": "ops", "environment": facts, "width": 1024, "dtype": "float32", "rows": [], "selections": rows}
    said = page([("cpu", record)])
    assert "Faster in every round in 1 of 3 cases, slower in every round in 1: slow at 576 x 1 by 0.50 ms." in said
