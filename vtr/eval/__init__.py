"""Evaluation: tasks, cells that are run on them, and what tables and reports make of the results."""
