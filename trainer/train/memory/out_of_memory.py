"""An error of an allocator, explained: what was asked, who holds what, and which setting helps by how much."""

import contextlib
import mmap
import re
import traceback
from collections.abc import Callable, Iterator

from q4kd.trainer.config.settings import DistillConfig
from q4kd.trainer.device.memory_report import Residency, measure, sized
from q4kd.trainer.device.placement import TeacherPlacement
from q4kd.trainer.errors import InputError, OutOfMemoryError, is_out_of_memory
from q4kd.trainer.train.run.folder import kept

# torch on CUDA: "Tried to allocate 1.50 GiB."; torch on the CPU: "you tried to allocate 4096 bytes"; NumPy: "Unable to
# allocate 1.50 GiB for an array"; CuPy: "Out of memory allocating 4,096 bytes".
_ASKED = re.compile(r"(?:tried to allocate|unable to allocate|allocating) ([\d.,]{1,24}) ?([KMGTP]iB|bytes)", re.I)
_UNITS = {"bytes": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40, "pib": 1 << 50}
# Address space kept back for the explanation, which shapes students.
_RESERVE = 256 << 20


def bytes_asked(message: str) -> int | None:
    """Return the bytes of the allocation that failed, when the message says."""
    match = _ASKED.search(message)
    if match is None or match[2].lower() not in _UNITS:
        return None
    return int(float(match[1].replace(",", "")) * _UNITS[match[2].lower()])


@contextlib.contextmanager
def explaining_memory(
    config: DistillConfig, placement: TeacherPlacement | None, residency: Callable[[], Residency | None]
) -> Iterator[None]:
    """Turn an allocation that fails inside into an error that explains it; ``residency`` says what the teacher holds.

    Raises:
        OutOfMemoryError: for an allocation that failed; other errors pass.
    """
    # No page of it is touched: it takes address space, not memory.
    reserve = mmap.mmap(-1, _RESERVE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        # Explaining takes memory too: what the failed step held hangs on its frames.
        traceback.clear_frames(error.__traceback__)
        reserve.close()
        raise OutOfMemoryError(explain(config, placement, str(error), residency())) from error
    finally:
        reserve.close()


def explain(
    config: DistillConfig, placement: TeacherPlacement | None, message: str, residency: Residency | None
) -> str:
    """Return one line: asked, held, which setting helps, which checkpoints there are."""
    asked = bytes_asked(message)
    try:
        held = measure(residency, cuda=config.device == "cuda").sentence()
    except (OSError, RuntimeError) as error:
        held = f"unknown ({error})"
    return (
        f"out of memory on {config.device}: asked for {sized(asked) if asked else 'an unknown amount'}; held: {held}; "
        f"what helps: {_helps(config, placement)}; {kept(config.out)}"
    )


def _helps(config: DistillConfig, placement: TeacherPlacement | None) -> str:
    from q4kd.trainer.train.memory.planner import plan_run, savings

    try:
        found = savings(config, plan_run(config, placement), placement)
    except (InputError, RuntimeError, MemoryError, OSError):
        return "a smaller batch_size, gradient_checkpointing, loss_mode low"
    useful = [f"{name} (saves {sized(saved)})" for name, saved in found.items() if saved > 0]
    return ", ".join(useful) or "a smaller student, or another machine"
