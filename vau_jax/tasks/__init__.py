"""The tasks of video anomaly understanding, one file each; `vau_jax.tasks.base` defines what a task provides."""

from collections.abc import Mapping

from vau_jax.tasks import classification, description, grounding, qa
from vau_jax.tasks.base import Task
from vau_jax.tasks.columns import Column

# Their order numbers the tasks in arrays (`Columns.task`): add new ones at the end.
TASKS: dict[str, Task] = {task.name: task for task in (qa.TASK, grounding.TASK, classification.TASK, description.TASK)}


def columns_of_all() -> Mapping[str, Column]:
    """The columns of all tasks' answers; tasks may share a column."""
    return {name: column for task in TASKS.values() for name, column in task.columns.items()}
