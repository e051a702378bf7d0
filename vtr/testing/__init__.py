"""The oracles and the contract, for authors of methods and hosts.

vtr.testing.check_method("my_method")          # contract and oracles of a registered method, on small random models
vtr.testing.tiny_models, .reference, .oracles  # the models, what a reduced one must compute, and comparisons with it

Nothing here needs pytest; transformers is imported by the first model that is built. docs/testing.md is the page.
"""
