"""What may stand behind --model_args, and what is said about the rest."""

from dataclasses import fields

import pytest

from vtr.eval.lmms.arguments import NAMES, read_count, read_method
from vtr.registry import list_methods, method_class


def test_settings_become_a_method():
    assert read_method("fastv", {"keep": 64, "layer": 3}) == method_class("fastv")(keep=64, layer=3)
    assert read_method("full", {}) is None
    assert read_method("sparsevlm+", {"keep": 64}).name == "sparsevlm_plus"


def test_lists_and_null_are_read_from_text():
    layers = read_method("shortv", {"layers": "[1, 2]"}).layers
    assert list(layers) == [1, 2]
    assert read_method("fastv", {"keep": 64, "newlines": "all", "keep_ratio": "None"}) == method_class("fastv")(keep=64, newlines="all")


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("fast-v", {}, "unknown method 'fast-v'; did you mean 'fastv'"),
        ("fastv", {"kep": 64}, "vtr: unknown entry 'kep' in model_args for method 'fastv'; did you mean 'keep'"),
        ("fastv", {"pretraind": "x"}, "vtr: unknown entry 'pretraind' in model_args for method 'fastv'; did you mean 'pretrained'"),
        ("full", {"keep": 64}, "vtr: unknown entry 'keep' in model_args for method 'full'"),
        ("fastv", {"keep": 64, "keep_ratio": 0.5}, "keep"),
        ("fastv", {"keep": 0}, "keep"),
    ],
)
def test_what_makes_no_sense_is_refused(method, settings, message):
    with pytest.raises(ValueError, match=message):
        read_method(method, settings)


@pytest.mark.parametrize("value", ["auto", 0, -1, "1.5", 2.5, None])
def test_counts_are_whole_numbers(value):
    with pytest.raises(ValueError, match="vtr: batch_size must be a whole number from 1 on, got"):
        read_count("batch_size", value)


def test_counts_may_be_text():
    assert read_count("batch_size", "8") == 8


def test_no_method_has_a_setting_that_the_model_takes_for_itself():
    taken = {name: {f.name for f in fields(method_class(name))} & set(NAMES) for name in list_methods()}
    assert not {name: both for name, both in taken.items() if both}
