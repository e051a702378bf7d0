"""Running an evaluation: cells of a task, batched greedy answers, one result file per cell."""
