"""`vtr.testing.probes`, under the name that the tests know it by."""

from vtr.testing.probes import *  # noqa: F403
