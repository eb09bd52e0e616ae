"""What a recipe says of a downstream task."""

from typing import Annotated

from vlmoe_core.config import Config, Plugin, plugin_field

TASKS = "vlmoe_core.tasks.kinds"
ALIASES = {"imagenet": "classification", "mnli": "nli"}
"""Other names of tasks, on the command line."""


class TaskConfig(Config):
    """What every task has; each file in vlmoe_core/tasks/kinds adds its own fields in a class `Config`."""

    name: str
    """The task: a file name in vlmoe_core/tasks/kinds (vqa, nlvr2, retrieval, classification, nli)."""


Task = Annotated[TaskConfig, *plugin_field(Plugin(TASKS, "name"))]
