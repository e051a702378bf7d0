"""Sweeps: a grid of models x methods x budgets x settings x tasks x seeds from one YAML file. Needs pydantic (the extra `eval`)."""
