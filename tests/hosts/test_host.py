"""Facts that hosts of several families share."""

import pytest

from vtr.hosts._protocol import feature_layers


@pytest.mark.parametrize(("asked", "layers"), [(-1, (5,)), (-2, (4,)), (1, (0,)), (6, (5,)), ([-2, 3], (2, 4)), ((-4, -2), (2, 4))])
def test_feature_layers_are_the_0_based_layers_behind_the_hidden_states(asked, layers):
    assert feature_layers(asked, 6) == layers
