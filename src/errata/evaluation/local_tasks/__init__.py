"""Public benchmarks of general abilities as tasks of lm-evaluation-harness, read from files on this machine.

The YAML files say how each is asked and scored, `items` which file it is read from and what must stand in it.
"""

from errata.evaluation.local_tasks.items import LOCAL_TASKS, documents, tasks_in

__all__ = ["LOCAL_TASKS", "documents", "tasks_in"]
