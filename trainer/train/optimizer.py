"""AdamW over float32 master weights, for students whose own weights are float32 or bfloat16.

A bfloat16 weight has 8 significant bits, so an update below 1/256 of it would be lost. Each trained weight therefore
has a float32 master, which the update moves and of which the weight is one rounding. Gradients become float32 at the
step, a slice of the parameters at a time: no float32 copy of all gradients exists. A float32 weight is its own master.

Under FSDP each process holds and updates its shard of masters and moments.
"""

import functools
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from q4kd.trainer.config.settings import DistillConfig, OptimizerName
from q4kd.trainer.errors import InputError
from q4kd.trainer.train.distributed import is_sharded, local, shard_like, whole

# Gradients that are float32 at one time: 128 MiB, or one parameter's where that is more.
SLICE_ELEMENTS = 1 << 25
MASTER = "master"
MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


class MasterWeightOptimizer:
    """Wraps an optimizer of float32 masters.

    Args:
        parameters: named parameters of the student; those without gradient are left out.
        make: makes the optimizer from its parameter groups.
        weight_decay: weight decay of matrices; norms and biases (fewer than two dimensions) get none.
    """

    def __init__(
        self, parameters: Iterable[tuple[str, nn.Parameter]], make: MakeOptimizer, *, weight_decay: float = 0.0
    ) -> None:
        self.parameters = {name: parameter for name, parameter in parameters if parameter.requires_grad}
        self.masters: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            # float() copies no float32 weight, so that such a weight is its own master.
            self.masters[name] = local(parameter.detach()).float().requires_grad_(True)
        decayed = [name for name, parameter in self.parameters.items() if parameter.ndim >= 2]
        plain = [name for name in self.parameters if name not in set(decayed)]
        groups = [
            {"params": [self.masters[name] for name in names], "weight_decay": decay}
            for names, decay in ((decayed, weight_decay), (plain, 0.0))
            if names
        ]
        self.inner = make(groups)
        self._coefficient: Tensor | None = None
        # An event of the GPU, behind which a copy of this state is made: the next update waits for it.
        self.reader: Any = None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the wrapped optimizer; ``lr`` is set here."""
        return self.inner.param_groups

    @torch.no_grad()
    def clip(self, limit: float) -> Tensor:
        """Return the gradient norm, float32 scalar on the device; ``step`` will scale gradients down to ``limit``.

        The norm is that of the whole student, over all shards; nothing is read back from the device.
        """
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        device = next(iter(self.masters.values())).device
        # bfloat16 sums stop growing at 256 times a term. On the CPU, whose sums are not trees, float32 keeps five
        # digits of a large matrix's norm, and shards would not agree with the whole.
        kind = torch.float64 if device.type == "cpu" else torch.float32
        norms = [torch.linalg.vector_norm(local(gradient), dtype=kind) for gradient in gradients]
        square = torch.stack(norms).square().sum() if norms else torch.zeros((), device=device)
        if any(local(gradient) is not gradient for gradient in gradients):
            torch.distributed.all_reduce(square)
        norm = square.sqrt().float()
        self._coefficient = (limit / (norm + 1e-6)).clamp(max=1.0)
        return norm

    def _slices(self) -> Iterator[list[str]]:
        """Yield names of parameters with a gradient, at most ``SLICE_ELEMENTS`` at a time or a single one."""
        names: list[str] = []
        size = 0
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            elements = self.masters[name].numel()
            if names and size + elements > SLICE_ELEMENTS:
                yield names
                names, size = [], 0
            names.append(name)
            size += elements
        if names:
            yield names

    @torch.no_grad()
    def step(self) -> None:
        """Update masters and moments from the gradients, scaled by the last ``clip``, and round masters to weights."""
        if self.reader is not None:
            torch.cuda.current_stream().wait_event(self.reader)
            self.reader = None
        for names in self._slices():
            masters = [self.masters[name] for name in names]
            gradients = [local(self.parameters[name].grad).float() for name in names]  # type: ignore[arg-type]
            if self._coefficient is not None:
                torch._foreach_mul_(gradients, self._coefficient)
            for master, gradient in zip(masters, gradients, strict=True):
                master.grad = gradient
            # The wrapped optimizer passes over what has no gradient.
            self.inner.step()
            for master in masters:
                master.grad = None
            weights = [local(self.parameters[name].detach()) for name in names]
            rounded = [pair for pair in zip(weights, masters, strict=True) if pair[0].dtype != pair[1].dtype]
            if rounded:
                torch._foreach_copy_([weight for weight, _ in rounded], [master for _, master in rounded])
        self._coefficient = None

    def zero_grad(self) -> None:
        """Drop the gradients, and their memory."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of the state, whole (gathered over shards), as ``NAME|KEY``.

        KEY is ``step``, a moment, or ``master`` where the weight is rounded. All processes must iterate together.
        A tensor that several parameters share, as 8-bit moments do their table of values, is given to each as a copy:
        a file holds no tensor twice.
        """
        given: set[int] = set()
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if parameter.dtype != master.dtype:
                yield f"{name}|{MASTER}", whole(parameter, master.detach())
            for key, value in self.inner.state[master].items():
                if isinstance(value, Tensor):
                    storage = value.untyped_storage().data_ptr()
                    value = value.clone() if storage in given else value
                    given.add(storage)
                    yield f"{name}|{key}", whole(parameter, value) if value.shape == master.shape else value
                elif isinstance(value, int | float):
                    yield f"{name}|{key}", torch.tensor(value)

    @torch.no_grad()
    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Take over the state that ``tensors`` gave.

        Raises:
            KeyError: for a parameter that this student does not train.
            ValueError: for a tensor of another shape.
        """
        for label, value in tensors:
            name, _, key = label.rpartition("|")
            parameter, master = self.parameters[name], self.masters[name]
            # Quantised moments have shapes of their own; torch's, and masters, have their weight's.
            is_like_weight = key == MASTER or (isinstance(self.inner, torch.optim.AdamW) and key != "step")
            if is_like_weight and value.shape != parameter.shape:
                raise ValueError(f"{label}: shape {tuple(value.shape)}, expected {tuple(parameter.shape)}")
            if is_like_weight:
                value = shard_like(parameter, value)
            if key == MASTER:
                master.copy_(value)
            elif key == "step":
                self.inner.state[master][key] = self._step_counter(value, master)
            else:
                self.inner.state[master][key] = value.to(master.device)

    def _step_counter(self, value: Tensor, master: Tensor) -> Any:
        """Return the count as the wrapped optimizer keeps it: an int, or float32 beside the weights when fused."""
        if not isinstance(self.inner, torch.optim.AdamW):
            return int(value)
        is_fused = any(group.get("fused") for group in self.inner.param_groups)
        return value.to(master.device if is_fused else "cpu", torch.float32)


def make_optimizer(config: DistillConfig, parameters: Iterable[tuple[str, nn.Parameter]]) -> MasterWeightOptimizer:
    """Make the optimizer that the settings name.

    Raises:
        InputError: when it needs a package or a device that is not there, or cannot be sharded.
    """
    named = list(parameters)
    options: dict[str, Any] = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    if config.optimizer == "adamw":
        # One kernel for all parameters. On the CPU the plain loop's rounding is kept: resumed runs repeat it.
        kind: Any = functools.partial(torch.optim.AdamW, fused=config.device == "cuda" or None)
    else:
        kind = _bitsandbytes_class(config.optimizer, config.device)
        if any(is_sharded(parameter) for _, parameter in named):
            expected = "a student that is whole in every process"
            got = "one sharded by FSDP, whose blocks of moments cannot be gathered"
            remedy = "use optimizer adamw, or torchrun without FSDP"
            raise InputError(f"optimizer {config.optimizer}", expected=expected, got=got, remedy=remedy)
    return MasterWeightOptimizer(named, lambda groups: kind(groups, **options), weight_decay=config.weight_decay)


def _bitsandbytes_class(name: OptimizerName, device: str) -> Any:
    subject = f"optimizer {name}"
    if name != "adamw_8bit" and device != "cuda":
        # Pages move between a GPU and its host. On the CPU bitsandbytes would go on without them.
        remedy = "use optimizer adamw_8bit or adamw"
        raise InputError(subject, expected="bitsandbytes and device cuda", got=f"device {device}", remedy=remedy)
    if importlib.util.find_spec("bitsandbytes") is None:
        remedy = "pip install 'q4kd[bnb]', or use optimizer adamw"
        raise InputError(subject, expected="bitsandbytes", got="no bitsandbytes", remedy=remedy)
    import bitsandbytes

    kinds = {"adamw_8bit": "AdamW8bit", "paged_adamw": "PagedAdamW", "paged_adamw_8bit": "PagedAdamW8bit"}
    return getattr(bitsandbytes.optim, kinds[name])
