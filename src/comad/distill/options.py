"""What a distillation does with the machine: it changes cost, not the method."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from comad.distill.config import DistillConfig
from comad.distill.teacher_store import Storage


@dataclass(frozen=True, kw_only=True)
class Distillation(DistillConfig):
    """Distil several frozen teachers into one student.

    Args:
        teachers_in: ``memory`` keeps all teachers there; ``offload`` keeps one at a time, and the others in a file on
            the disk of the run (beside a GPU in host memory), for the same result in less memory.
        cache_folder: where --cache-teachers keeps what the teachers said. A folder that is named stays, and other runs
            use what they share with this one; empty: in the run's folder, and removed when the run is done.
        cache_storage: ``computed`` keeps the teachers' precision; ``int8`` rounds each token to half the room of bf16.
    """

    teachers_in: Literal["memory", "offload"] = "memory"
    cache_folder: str = ""
    cache_storage: Storage = "computed"

    @classmethod
    def of(cls, config: DistillConfig) -> Distillation:
        """A config with the default options, or itself if it has its own."""
        return config if isinstance(config, cls) else cls(**{f.name: getattr(config, f.name) for f in fields(config)})

    @property
    def cache_in(self) -> Path:
        """Folder of the teacher cache."""
        return Path(self.cache_folder or Path(self.run.out) / "teacher-cache").expanduser()

    @property
    def offload_to(self) -> Path | None:
        """Folder where offloaded teachers wait: the nearest one that exists above the run."""
        if self.teachers_in == "memory":
            return None
        return next(folder for folder in Path(self.run.out).absolute().parents if folder.is_dir())
