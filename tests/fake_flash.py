"""`vtr.testing.fake_flash`, under the name that the tests know it by."""

from vtr.testing.fake_flash import *  # noqa: F403
