"""`vtr.testing.oracles` and `vtr.testing.compare`, under the name that the tests know them by."""

from vtr.testing.compare import *  # noqa: F403
from vtr.testing.oracles import *  # noqa: F403
