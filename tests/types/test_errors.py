"""Errors say which setting they blame, also after a trip between processes."""

import pickle

import pytest

from vtr.types.errors import SettingError, VtrError, setting_of


@pytest.mark.parametrize("kind", [VtrError, SettingError])
def test_the_setting_to_blame_is_kept(kind):
    error = pickle.loads(pickle.dumps(kind("fastv: keep=900 is above 36", setting="keep")))
    assert type(error) is kind and str(error) == "fastv: keep=900 is above 36" and setting_of(error) == "keep"


def test_other_errors_blame_no_setting():
    assert setting_of(ValueError("keep=900")) is None and setting_of(VtrError("no tower")) is None
