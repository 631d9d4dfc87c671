"""The room that a run takes on the disk of its folder, counted before anything is trained.

A checkpoint holds the trained weights, their float32 masters where the weights are rounded, and the moments. While one
is written, those that it will displace are still there.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from q4kd.trainer.config.settings import DistillConfig
from q4kd.trainer.device.memory_report import sized
from q4kd.trainer.errors import InputError
from q4kd.trainer.student.shape import StudentShape
from q4kd.trainer.train.memory.items import MOMENT_BYTES

# What a run writes and a resumed one replaces.
_OWN = ("checkpoints", "model", "adapter")


@dataclass(frozen=True)
class DiskPlan:
    """What a run writes, in bytes, and what there is room for.

    Attributes:
        checkpoint: one whole checkpoint.
        checkpoints: whole checkpoints that are there at one time, the one that is being written included.
        best: what is kept of the best evaluation, while a better one takes its place; 0 without evaluations between.
        model: the final model, with its adapters; 0 for a smoke run.
        copy: what of the state is copied to the host's memory, so that steps can follow while it is written; it is kept
            from one checkpoint to the next. 0 where no step follows one.
        room: free bytes of the disk, and those of an earlier leg of this run; None where the system does not say.
    """

    checkpoint: int
    checkpoints: int
    best: int
    model: int
    copy: int
    room: int | None

    @property
    def needed(self) -> int:
        """Bytes of everything at the time when most is there."""
        return self.checkpoints * self.checkpoint + self.best + self.model

    @property
    def fits(self) -> bool:
        """Return whether there is room."""
        return self.room is None or self.needed <= self.room

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {**vars(self), "needed": self.needed, "fits": self.fits}

    def describe(self) -> str:
        """Return the plan in words."""
        parts = [f"{self.checkpoints} checkpoint{'s' * (self.checkpoints > 1)} of {sized(self.checkpoint)}"]
        parts += [f"best weights {sized(self.best)}"] if self.best else []
        parts += [f"final model {sized(self.model)}"] if self.model else []
        room = "" if self.room is None else f" of {sized(self.room)} free"
        return f"{sized(self.needed)}{room}: {', '.join(parts)}"


def plan_disk(config: DistillConfig, student: StudentShape) -> DiskPlan:
    """Count what a run of these settings writes, and look how much room there is."""
    trained = config.lora_rank * student.lora_parameters if config.lora_rank else student.parameters
    size = student.weight_bytes
    weights = trained * size
    checkpoint = weights + trained * (4 if size < 4 else 0) + int(trained * MOMENT_BYTES[config.optimizer])
    best = 0
    if config.eval_every:
        # The worse one is removed when the better one is written.
        best = 2 * (checkpoint if config.best_resumable else weights)
    model = 0
    if config.max_steps is None:
        model = student.parameters * size + (weights if config.lora_rank else 0)
    copy = checkpoint if _steps_follow(config, config.checkpoint_every) else 0
    if config.eval_tokens and _steps_follow(config, config.eval_every):
        copy = max(copy, checkpoint if config.best_resumable else weights)
    return DiskPlan(checkpoint, _checkpoints(config), best, model, copy, _room(config.out))


def _steps_follow(config: DistillConfig, every: int) -> bool:
    """Return whether what is done every so many steps is done before the last one."""
    last = config.max_steps or config.steps
    # How many steps the epochs have is known when the data are read.
    return bool(every) and (not last or every < last)


def _checkpoints(config: DistillConfig) -> int:
    """Return how many whole checkpoints are there at one time; one is written after the last step."""
    last, every = config.max_steps or config.steps, config.checkpoint_every
    if not every:
        return 1
    # How many steps the epochs have is known when the data are read.
    return min(config.keep + 1, 1 + (last - 1) // every) if last else config.keep + 1


def _room(out: Path) -> int | None:
    """Return the bytes that this user may write into a folder that need not be there yet."""
    place = out.absolute()
    while not place.is_dir() and place != place.parent:
        place = place.parent
    try:
        free = shutil.disk_usage(place).free
        own = sum(path.lstat().st_size for name in _OWN for path in (out / name).rglob("*") if not path.is_symlink())
    except OSError:
        return None
    return free + own


def check_disk(config: DistillConfig, plan: DiskPlan) -> None:
    """Refuse a run for which the disk has no room.

    Raises:
        InputError: with the arithmetic, and what helps.
    """
    if plan.fits:
        return
    helps = ["make room", "choose another --out"]
    helps += [f"set keep below {config.keep}"] * (plan.checkpoints > 2)
    helps += ["set checkpoint_every to 0"] * (plan.checkpoints > 1)
    assert plan.room is not None
    expected, got = f"at most {sized(plan.room)} to write", plan.describe()
    raise InputError(f"--out {config.out}", expected=expected, got=got, remedy=" or ".join(helps))
