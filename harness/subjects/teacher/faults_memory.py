"""Faults in what the teacher keeps, says and allows: residency, memory, dispatch, and its frozenness."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from q4kd.harness.runs.faults import Call, fault, patch, replace

if TYPE_CHECKING:
    from torch import Tensor

    from q4kd.trainer.formats.model_file import PackedTensor

_CHOOSE = "q4kd.trainer.device.backend:choose_backend"
_TEACHER = "q4kd.trainer.teacher.teacher"
_MATRIX = "q4kd.trainer.teacher.cpu.weights:PackedMatrix"
_INIT = f"{_MATRIX}.__init__"
_RESIDENT_BYTES = f"{_MATRIX}.resident_bytes"
_REQUIRES_GRAD = f"{_TEACHER}:Teacher.requires_grad_"
BALLAST_BYTES = 500_000_000
_HELD: list["Tensor"] = []


@patch("residency", "dequantize-at-load", "every teacher gets the dense backend, announced as such", _CHOOSE)
def _dequantize_at_load(original: Call, _override: str, *rest: object, **options: object) -> object:
    return original("dense", *rest, **options)


@fault(
    "residency",
    "silent-dequantize",
    "every matrix is held decoded while log and accounts say packed",
    f"{_MATRIX}.__init__",
    f"{_MATRIX}.product",
)
def _silent_dequantize() -> None:
    """Hold every matrix decoded and multiply by that, while names, log lines and accounts stay those of ``q4k``."""

    def make_init(original: Call) -> Call:
        def init(self: Any, tensor: "PackedTensor", scratch: object) -> None:
            from q4kd.trainer.teacher.cpu.weights import DenseMatrix

            original(self, tensor, scratch)
            self.decoded = DenseMatrix(tensor)

        return init

    replace(f"{_MATRIX}.__init__", make_init)
    replace(f"{_MATRIX}.product", lambda _original: lambda self, x: self.decoded.product(x))


@fault("residency", "scale-cache", "unpacked scales are kept beside every superblock", _INIT, _RESIDENT_BYTES)
def _scale_cache() -> None:
    """Keep each superblock's scales unpacked beside it: 16 more bytes, accounted for honestly."""

    def make_init(original: Call) -> Call:
        def init(self: Any, tensor: object, scratch: object) -> None:
            import torch

            original(self, tensor, scratch)
            self.scale_cache = torch.ones(self.rows * self.cols // 256, 16, dtype=torch.uint8)

        return init

    def make_resident(original: property) -> property:
        return property(lambda self: original.__get__(self) + self.scale_cache.numel())

    replace(f"{_MATRIX}.__init__", make_init)
    replace(f"{_MATRIX}.resident_bytes", make_resident)


@patch(
    "memory",
    "ballast",
    f"{BALLAST_BYTES // 1_000_000} MB are allocated and touched beside the teacher",
    f"{_TEACHER}:load_teacher",
)
def _ballast(original: Call, *arguments: object, **options: object) -> object:
    import torch

    _HELD.append(torch.ones(BALLAST_BYTES, dtype=torch.uint8))
    return original(*arguments, **options)


@patch("dispatch", "accepts-gradients", "teacher.requires_grad_(True) is accepted in silence", _REQUIRES_GRAD)
def _accepts_gradients(_original: Call, self: object, requires_grad: bool = True) -> object:
    return self


@patch(
    "dispatch",
    "yields-parameters",
    "teacher.parameters() returns an empty iterator instead of refusing",
    f"{_TEACHER}:Teacher.parameters",
)
def _yields_parameters(_original: Callable[[object], None], _self: object) -> Iterator[object]:
    return iter(())
