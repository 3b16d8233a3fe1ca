"""Heads of tasks, such as telling the class of a text: small, and left as transformers wrote them.

A task's class of transformers is a base model and a head. It is made without weights and without its base model, gets
the weights of the head, and in place of the base model something of ours that is called and answers like it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from headrace.errors import UnsupportedModelError

__all__ = ["blank_task", "head_parts", "put_under", "task_class"]


def task_class(architecture: str) -> type[nn.Module]:
    """The class of transformers.

    Raises:
        UnsupportedModelError: the installed version has none of that name.
    """
    import transformers

    found = getattr(transformers, architecture, None)
    if found is None:
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} has no class {architecture}, whose head is to run. Install a "
            "version that has it, or give a module.",
            param="model",
        )
    task: type[nn.Module] = found
    return task


def blank_task(task: type[nn.Module], config: Any) -> nn.Module:
    """A task's module on the meta device, its base model taken out."""
    with torch.device("meta"):
        blank = task(copy.deepcopy(config)).eval().requires_grad_(False)
    setattr(blank, _base_name(blank), None)
    return blank


def put_under(task: nn.Module, base: nn.Module) -> nn.Module:
    """The task's module, with a base model."""
    setattr(task, _base_name(task), base)
    return task


def head_parts(task: nn.Module) -> tuple[str, ...]:
    """The names of a task's parts that have weights of their own."""
    base = _base_name(task)
    return tuple(name for name, part in task.named_children() if name != base and any(True for _ in part.parameters()))


def _base_name(task: nn.Module) -> str:
    name = task.base_model_prefix
    assert isinstance(name, str)
    assert name in task._modules, "a task is a head on a base model"
    return name
