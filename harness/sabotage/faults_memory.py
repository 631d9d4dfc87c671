"""Faults in what the teacher keeps, says and allows: residency, memory, dispatch, and its frozenness."""

from collections.abc import Callable
from typing import Any

from q4kd.harness.sabotage.registry import declare, replace

_TEACHER = "q4kd.trainer.teacher"
_WEIGHTS = "q4kd.trainer.weights"
BALLAST_BYTES = 500_000_000
_HELD: list[Any] = []


def _dequantize_at_load() -> None:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def choose(_override: str, types: Any, *rest: Any, **options: Any) -> Any:
            return original("dense", types, *rest, **options)

        return choose

    replace("q4kd.trainer.backend:choose_backend", make)


def _silent_dequantize() -> None:
    """Hold every matrix decoded and multiply by that, while names, log lines and accounts stay those of ``q4k``."""

    def make_init(original: Callable[..., None]) -> Callable[..., None]:
        def init(self: Any, tensor: Any, scratch: Any) -> None:
            from q4kd.trainer.weights import DenseMatrix

            original(self, tensor, scratch)
            self.decoded = DenseMatrix(tensor)

        return init

    replace(f"{_WEIGHTS}:PackedMatrix.__init__", make_init)
    replace(f"{_WEIGHTS}:PackedMatrix.product", lambda _original: lambda self, x: self.decoded.product(x))


def _scale_cache() -> None:
    """Keep each superblock's scales unpacked beside it: 16 more bytes, accounted for honestly."""

    def make_init(original: Callable[..., None]) -> Callable[..., None]:
        def init(self: Any, tensor: Any, scratch: Any) -> None:
            import torch

            original(self, tensor, scratch)
            self.scale_cache = torch.ones(self.rows * self.cols // 256, 16, dtype=torch.uint8)

        return init

    def make_resident(original: property) -> property:
        return property(lambda self: original.__get__(self) + self.scale_cache.numel())

    replace(f"{_WEIGHTS}:PackedMatrix.__init__", make_init)
    replace(f"{_WEIGHTS}:PackedMatrix.resident_bytes", make_resident)


def _ballast() -> None:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def load(*args: Any, **options: Any) -> Any:
            import torch

            _HELD.append(torch.ones(BALLAST_BYTES, dtype=torch.uint8))
            return original(*args, **options)

        return load

    replace(f"{_TEACHER}:load_teacher", make)


def _accepts_gradients() -> None:
    replace(f"{_TEACHER}:Teacher.requires_grad_", lambda _original: lambda self, requires_grad=True: self)


def _yields_parameters() -> None:
    replace(f"{_TEACHER}:Teacher.parameters", lambda _original: lambda self: iter(()))


declare(
    "residency",
    "dequantize-at-load",
    "every teacher gets the dense backend, announced as such",
    _dequantize_at_load,
    "q4kd.trainer.backend:choose_backend",
)
declare(
    "residency",
    "silent-dequantize",
    "every matrix is held decoded while log and accounts say packed",
    _silent_dequantize,
    f"{_WEIGHTS}:PackedMatrix.__init__",
    f"{_WEIGHTS}:PackedMatrix.product",
)
declare(
    "residency",
    "scale-cache",
    "unpacked scales are kept beside every superblock",
    _scale_cache,
    f"{_WEIGHTS}:PackedMatrix.__init__",
    f"{_WEIGHTS}:PackedMatrix.resident_bytes",
)
declare(
    "memory",
    "ballast",
    f"{BALLAST_BYTES // 1_000_000} MB are allocated and touched beside the teacher",
    _ballast,
    f"{_TEACHER}:load_teacher",
)
declare(
    "dispatch",
    "accepts-gradients",
    "teacher.requires_grad_(True) is accepted in silence",
    _accepts_gradients,
    f"{_TEACHER}:Teacher.requires_grad_",
)
declare(
    "dispatch",
    "yields-parameters",
    "teacher.parameters() returns an empty iterator instead of refusing",
    _yields_parameters,
    f"{_TEACHER}:Teacher.parameters",
)
