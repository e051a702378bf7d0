"""Shortens sequences of visual tokens inside a model: the hooks, what they remember during a call, and the Views that methods see."""
