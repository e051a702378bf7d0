"""`vtr.testing.caches`, under the name that the tests know it by."""

from vtr.testing.caches import *  # noqa: F403
