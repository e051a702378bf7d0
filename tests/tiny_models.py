"""`vtr.testing.tiny_models`, under the name that the tests know it by."""

import torch

from vtr.testing.families import *  # noqa: F403
from vtr.testing.tiny_models import *  # noqa: F403

torch.set_num_threads(1)  # tensors this small are only slowed down by a second thread, badly so when the other core is busy
