"""Tables of oracles that ran under several releases."""

import pytest

from scripts.pages.oracles import merged

TABLE = "transformers {}, torch 2.14.1, CPU, 2026-11-29; worst of a, b.\n\n| kind | boundary | decoding |\n|---|---|---|\n| `a` | equal | {} |\n"


def test_a_number_is_written_once_where_all_agree():
    first, second, third = TABLE.format("5.24.0", "1e-07"), TABLE.format("5.23.0", "1e-07"), TABLE.format("5.17.0", "2e-07")
    assert merged([first, second]) == TABLE.format("5.24.0 / 5.23.0 (one number where they agree)", "1e-07")
    assert merged([first, second, third]).endswith("| `a` | equal | 1e-07 / 1e-07 / 2e-07 |\n")


def test_tables_of_different_days_are_no_one_table():
    with pytest.raises(ValueError, match="one torch and one day"):
        merged([TABLE.format("5.24.0", "equal"), TABLE.format("5.23.0", "equal").replace("-29", "-28")])
