"""Looks for the method, the budget and the layer that meet a target: so many times faster, or at most so many points lost."""
