"""`vtr.testing.reference`, under the name that the tests know it by."""

from vtr.testing.reference import *  # noqa: F403
