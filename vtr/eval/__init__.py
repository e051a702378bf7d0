"""Evaluation: tasks, batched greedy answers, one result file per cell, intervals."""
