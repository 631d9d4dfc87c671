"""Which function of its head's products a student's logits are, found by numbers and not by an architecture's name.

The fused loss makes logits itself, from hidden states and head. Some models scale or cap what the head gives. So the
head's output is replaced once by known numbers, and what the model makes of them is read: their scale near zero, their
cap far away. Everything else (numbers that follow no such function, or logits of other hidden states than the
loss has) is refused, since the student would be trained as another function than the one that is written.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from q4kd.trainer.errors import InputError, first_line
from q4kd.trainer.loss.config import LastStep
from q4kd.trainer.loss.last_step import apply_last_step
from q4kd.trainer.student.lora import effective_weight

_POSITIONS = 2  # the fewest that a run may have
# Known products: tiny ones give the scale, huge ones the cap, and all must follow the function found.
_TINY, _HUGE = 2.0**-10, 2.0**24
_GRID = (0.0, _TINY, 0.25, 1.0, 3.0, 11.0, 29.0, 75.0, 700.0, _HUGE)
# The probe is float32, but a model may round its logits to its own type.
_ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
# Two passes over the same tokens in the model's own type, the second by way of its inner model.
_APART = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 6e-2, torch.float16: 1e-2}


class _Seen:
    """What the head was given and gave, and what the model made of ``products`` in place of it."""

    def __init__(self) -> None:
        self.products_N = torch.tensor([sign * value for value in _GRID for sign in (1.0, -1.0)])
        self.inputs: Tensor | None = None
        self.outputs: Tensor | None = None

    def __call__(self, _head: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        self.inputs, self.outputs = inputs[0].detach(), output.detach()
        return self.replacement(output)

    def replacement(self, output: Tensor) -> Tensor:
        """Return the known numbers in the output's shape, float32, another one of them at every place."""
        places = torch.arange(output.numel(), device=output.device) % len(self.products_N)
        return self.products_N.to(output.device)[places].view(output.shape)


@torch.no_grad()
def find_last_step(student: Any, hidden_of: Any) -> LastStep:
    """Return the last step of a student's logits.

    Args:
        student: a Hugging Face causal LM; it is left in the mode it was in.
        hidden_of: maps ids int64 ``[1, T]`` to the hidden states ``[1, T, H]`` that the loss takes.

    Raises:
        InputError: when its logits are no scale, nor cap, of those hidden states' products with its head, or it fails.
    """
    head = student.get_output_embeddings()
    weight_VH = effective_weight(head)
    ids_1T = torch.arange(_POSITIONS, device=weight_VH.device)[None] % len(weight_VH)
    was_training, seen = student.training, _Seen()
    hook = head.register_forward_hook(seen)
    student.eval()
    try:
        hidden_TH = hidden_of(ids_1T)[0]
        logits_TV = student(input_ids=ids_1T, use_cache=False).logits[0]
    except Exception as error:  # Whatever a model's own code raises says something of the model, but for this.
        if isinstance(error, MemoryError) or "memory" in str(error).lower():
            raise
        raise _refuse(student, f"a forward pass that fails ({first_line(error)})") from error
    finally:
        hook.remove()
        student.train(was_training)
    products_TV = hidden_TH @ weight_VH.T
    if seen.inputs is None or seen.outputs is None:  # The head is multiplied without being called.
        _check_same("logits", logits_TV, products_TV, student)
        return LastStep()
    _check_same("input of its head", seen.inputs.reshape(hidden_TH.shape), hidden_TH, student)
    _check_same("products of its head", seen.outputs.reshape(products_TV.shape), products_TV, student)
    return _fit(seen.replacement(products_TV), logits_TV.float(), student)


def _check_same(what: str, found: Tensor, expected: Tensor, student: Any) -> None:
    """Refuse a student whose own numbers are not those that the loss has."""
    if found.shape == expected.shape:
        apart = float((found.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-30))
        if apart <= _APART[expected.dtype]:
            return
        got = f"an {what}" if what.startswith("input") else what
        raise _refuse(student, f"{got} that differ from the inner model's by {apart:.2g} of their size")
    raise _refuse(student, f"{what} of another shape, {list(found.shape)}")


def _fit(products_TV: Tensor, logits_TV: Tensor, student: Any) -> LastStep:
    """Return the scale and cap by which known products became logits.

    Raises:
        InputError: when no scale and cap say it.
    """
    if logits_TV.shape != products_TV.shape:
        raise _refuse(student, f"logits of another shape, {list(logits_TV.shape)}")
    scale = float((logits_TV[products_TV == _TINY] / _TINY).median())
    top = float(logits_TV[products_TV == _HUGE].median())
    bound = _ROUNDING[student.dtype]
    if not (math.isfinite(scale) and math.isfinite(top) and scale > 0 and top > 0):
        raise _refuse(student, f"1 becoming {scale:.6g} and {_HUGE:.3g} becoming {top:.6g}")
    is_capped = abs(top / (scale * _HUGE) - 1) > bound
    exact = _exact_numbers(student.config)
    found = LastStep(_nearest(scale, exact, bound), _nearest(top, exact, bound) if is_capped else 0.0)
    expected_TV = apply_last_step(products_TV.clone(), found)
    wrong = (logits_TV - expected_TV).abs() > bound * expected_TV.abs() + 1e-30
    if bool(wrong.any() | logits_TV.isnan().any()):
        place = tuple((wrong | logits_TV.isnan()).nonzero()[0].tolist())
        raise _refuse(student, f"{float(products_TV[place]):.6g} becoming {float(logits_TV[place]):.6g}")
    return found


def _nearest(value: float, exact: list[float], bound: float) -> float:
    """Return the exact number that a rounded one stands for, else itself."""
    best = min(exact, key=lambda number: abs(number - value))
    return best if abs(best - value) <= bound * abs(value) else value


def _exact_numbers(config: Any) -> list[float]:
    """Return 1, and every number of a config and its reciprocal: what scales and caps are written as."""
    numbers = [1.0]
    for value in _values(config.to_dict()):
        if type(value) in (int, float) and math.isfinite(value) and value > 0:
            numbers += [float(value), 1 / value]
    return numbers


def _values(settings: Any) -> Iterator[Any]:
    for value in settings.values():
        if isinstance(value, dict):
            yield from _values(value)
        else:
            yield value


def _refuse(student: Any, got: str) -> InputError:
    name = type(student).__name__
    return InputError(
        f"student {name}",
        expected="logits that are its head's products with its hidden states, scaled or capped by tanh",
        got=got,
        remedy="the loss would train another function than this model's: choose another student",
    )
