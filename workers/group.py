"""What a worker group is, and what people are told of its life. Values only; light to import."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headrace.errors import ConfigError, HeadraceError
from headrace.workers.config import EngineConfig
from headrace.workers.start_report import StartReport

__all__ = ["ENGINE", "EVENT_KINDS", "GroupEvent", "GroupSpec"]

ENGINE = "headrace.workers.engines:load_engine"

EVENT_KINDS = ("starting", "loading", "warming", "ready", "lost", "restarting", "failed", "stopped")


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSpec:
    """One worker group: processes that serve one model together.

    Attributes:
        name: unique in the pool; the same after a restart.
        folder: of the model, ready to serve.
        model_name: what clients call it.
        config: of its engine.
        tensor_parallel: processes in the group, called ranks.
        threads: CPU threads of each; None divides the cores among all processes of the launcher.
        engine: `module:function` that loads the engine in each rank, called as `load_engine` is.

    Raises:
        ConfigError: a value is out of range.
    """

    name: str
    folder: Path
    model_name: str
    config: EngineConfig
    tensor_parallel: int = 1
    threads: int | None = None
    engine: str = ENGINE

    def __post_init__(self) -> None:
        for field in ("name", "model_name"):
            value = getattr(self, field)
            if not 0 < len(value) <= 200 or not value.isprintable():
                raise ConfigError(f"{field} is {value!r}; give 1 to 200 printable characters.", param=field)
        for field in ("tensor_parallel", "threads"):
            value = getattr(self, field)
            if value is None and field == "threads":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1024:
                raise ConfigError(f"{field} is {value!r}; give a whole number from 1 to 1024.", param=field)
        if self.tensor_parallel > 1 and self.engine == ENGINE:
            raise ConfigError(
                f"tensor_parallel is {self.tensor_parallel}, but this version serves a model from one process per "
                "group; leave it 1, and start more groups to use more of the machine.",
                param="tensor_parallel",
            )

    def to_wire(self) -> dict[str, Any]:
        """Plain values, for the pipe to a rank."""
        return asdict(self) | {"folder": str(self.folder)}

    @classmethod
    def from_wire(cls, fields: dict[str, Any]) -> GroupSpec:
        """The inverse of `to_wire`."""
        return cls(**fields | {"folder": Path(fields["folder"]), "config": EngineConfig(**fields["config"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupEvent:
    """Something happened to a group.

    Attributes:
        group: its name.
        kind: one of EVENT_KINDS. A group is `ready` when its model is warm and the broker knows it; `failed` is final.
        text: for people.
        done: bytes of weights loaded, when loading.
        total: bytes of weights in all, when loading.
        error: why, when lost or failed, if that is known.
        start: where the time of the start went, when ready for the first time since.
    """

    group: str
    kind: str
    text: str
    done: int = 0
    total: int = 0
    error: HeadraceError | None = None
    start: StartReport | None = None
