"""The memory plan of a run: its items (``items.py``) and the room there is; as a table, or as a refusal.

Beside it: what the run writes (``disk.py``), and the copy of the state that lets steps follow while it is written. The
copy is kept in the host's memory, which on the CPU is what the plan is about: it is an item there, in every phase.
"""

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from q4kd.trainer.config.settings import DistillConfig
from q4kd.trainer.device.memory_report import sized
from q4kd.trainer.errors import InputError
from q4kd.trainer.student.shape import StudentShape
from q4kd.trainer.train.memory.disk import DiskPlan
from q4kd.trainer.train.memory.items import PHASES, Item, Phase, TeacherShape

_COLUMNS = 80
COPY = "copy for checkpoints"


@dataclass(frozen=True)
class MemoryPlan:
    """What a run takes, and what the machine has.

    Attributes:
        device: name of the device.
        items: everything that is counted, the copy for checkpoints too where it takes the same memory.
        room: bytes that may be taken now.
        room_basis: where ``room`` comes from.
        flops: floating-point operations of one optimiser step in this process.
        disk: what the run writes.
        copy_room: bytes of the host's memory that are left for a copy of the state, see ``DiskPlan.copy``.
    """

    device: str
    items: tuple[Item, ...]
    room: int
    room_basis: str
    flops: float
    disk: DiskPlan
    copy_room: int

    @property
    def copies_checkpoints(self) -> bool:
        """Whether there is memory for such a copy; without it the steps wait for the writing."""
        return self.disk.copy <= self.copy_room

    @property
    def copy(self) -> int:
        """Bytes of the host's memory that the copy takes, from the first checkpoint that steps follow; 0 for none."""
        return self.disk.copy if self.copies_checkpoints else 0

    def with_copy(self) -> "MemoryPlan":
        """Return this plan with the copy among its items, for a device whose memory is the host's."""
        if not self.copy:
            return self
        basis = "the state as it was, while it is written beside the steps, and kept"
        return replace(self, items=(*self.items, Item(COPY, self.copy, basis)))

    def phase_bytes(self) -> dict[Phase, int]:
        """Return the bytes live in each phase."""
        return {phase: sum(item.bytes for item in self.items if phase in item.phases) for phase in PHASES}

    @property
    def peak(self) -> int:
        """Bytes of the largest phase."""
        return self.phase_bytes()[self.peak_phase]

    @property
    def peak_phase(self) -> Phase:
        """The largest phase, the first of equal ones."""
        phases = self.phase_bytes()
        return max(PHASES, key=lambda phase: phases[phase])

    @property
    def needed(self) -> int:
        """Bytes of the peak that can neither be dropped and read again nor, as the copy can, be left out."""
        return self.peak - sum(item.bytes for item in self.items if item.is_mapped or item.name == COPY)

    @property
    def fits(self) -> bool:
        """Return whether there is room."""
        return self.needed <= self.room

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "device": self.device,
            "items": [{**vars(item), "phases": list(item.phases)} for item in self.items],
            "phases": self.phase_bytes(),
            "peak_bytes": self.peak,
            "needed_bytes": self.needed,
            "room_bytes": self.room,
            "room_basis": self.room_basis,
            "fits": self.fits,
            "flops_per_step": self.flops,
            "seconds_per_step": None,
            "disk": self.disk.to_json(),
            "copy_bytes": self.copy,
            "copy_room_bytes": self.copy_room,
            "copies_checkpoints": self.copies_checkpoints,
        }


def count_flops(config: DistillConfig, student: StudentShape, teacher: TeacherShape | None) -> float:
    """Return the floating-point operations of a step in products with weights (attention left out)."""
    tokens = config.batch_size * config.seq_len * config.accumulation
    again = 2 if config.gradient_checkpointing else 0
    return float(tokens) * ((6 + again) * student.linear_weights + (2 * teacher.weights if teacher else 0))


def reliefs(config: DistillConfig) -> list[tuple[str, DistillConfig]]:
    """Return settings that take less memory, with a text for each, in the order in which to try them."""
    found = []
    if config.batch_size > 1:
        half = config.batch_size // 2
        more = -(-config.batch_size * config.accumulation // half)
        said = f"batch_size {half} with accumulation {more} (the same batch)"
        found.append((said, replace(config, batch_size=half, accumulation=more)))
    if not config.gradient_checkpointing:
        found.append(("gradient_checkpointing", replace(config, gradient_checkpointing=True)))
    if config.loss_mode != "low" and config.teacher_cache is None:
        found.append(("loss_mode low", replace(config, loss_mode="low")))
    if config.device == "cuda" and config.optimizer == "adamw":
        found.append(("optimizer adamw_8bit", replace(config, optimizer="adamw_8bit")))
    if config.seq_len > 64:
        found.append((f"seq_len {config.seq_len // 2}", replace(config, seq_len=config.seq_len // 2)))
    return found


def format_plan(plan: MemoryPlan) -> str:
    """Return the plan as a table of at most 80 columns: bytes, and what they are computed from."""
    lines = [f"memory plan: {sized(plan.peak)} above the program itself, on {plan.device}"]
    for item in plan.items:
        mark = "*" if plan.peak_phase in item.phases else " "
        start = f" {mark} {item.name:<31} {sized(item.bytes):>8}  "
        lines += _wrapped(item.basis, start, " " * len(start))
    phases = ", ".join(f"{phase} {sized(size)}" for phase, size in plan.phase_bytes().items())
    lines += _wrapped(f"{plan.peak_phase} phase (what is marked *); {phases}", "peak: ")
    mapped = sum(item.bytes for item in plan.items if item.is_mapped)
    copied = sum(item.bytes for item in plan.items if item.name == COPY)
    parts = [f"{sized(mapped)} are pages of a file, which the kernel may drop"] if mapped else []
    parts += [f"{sized(copied)} a copy, which is made because there is room"] if copied else []
    if parts:
        lines += _wrapped(f"of it {', '.join(parts)}: {sized(plan.needed)} must fit", "      ")
    lines += _wrapped(f"{sized(plan.room)} ({plan.room_basis})", "room: ")
    lines += _wrapped(f"{plan.disk.describe()}{_copy_said(plan)}", "disk: ")
    said = f"not estimated; {plan.flops / 1e12:.3g} TFLOP a step; a smoke run (--max-steps 20) measures it"
    return "\n".join([*lines, *_wrapped(said, "time: ")])


def _copy_said(plan: MemoryPlan) -> str:
    if not plan.copies_checkpoints:
        return "; no memory for a copy, so that steps wait while a checkpoint is written"
    if plan.copy and all(item.name != COPY for item in plan.items):
        return f"; {sized(plan.copy)} of the host's memory for a copy, so that steps go on beside the writing"
    return ""


def _wrapped(text: str, first: str, rest: str = "      ") -> list[str]:
    return textwrap.wrap(text, _COLUMNS, initial_indent=first, subsequent_indent=rest, break_long_words=False)


def refuse(plan: MemoryPlan, helpful: Mapping[str, int]) -> InputError:
    """Return the refusal of a plan that does not fit; ``helpful`` are the bytes that changed settings would save."""
    # The copy for checkpoints is no item of a plan without room.
    counted = [item for item in plan.items if plan.peak_phase in item.phases and not item.is_mapped]
    largest = sorted(counted, key=lambda item: -item.bytes)[:4]
    helps = "; ".join(f"{name} saves {sized(saved)}" for name, saved in helpful.items() if saved > 0)
    expected = f"at most {sized(plan.room)} ({plan.room_basis})"
    got = f"{sized(plan.needed)}, of which " + ", ".join(f"{item.name} {sized(item.bytes)}" for item in largest)
    remedy = f"{helps or 'use a smaller student or another machine'} (q4kd plan shows all)"
    return InputError("memory plan", expected=expected, got=got, remedy=remedy)
