"""Tasks by name. Importing this package registers those of the toolkit and the source `lmms:NAME`, the tasks of lmms-eval."""

from vtr.eval.tasks import benchmarks, shapes  # noqa: F401  each registers itself
from vtr.eval.tasks.registry import get_task, list_tasks, name_in_source, register_task, register_task_source
from vtr.eval.tasks.task import Sample, Task

__all__ = ["Sample", "Task", "get_task", "list_tasks", "name_in_source", "register_task", "register_task_source"]
