"""Faults in mixtures of experts on a CUDA device: in routing, in their loads, and in what is decoded and held."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from q4kd.harness.runs.faults import Call, patch

if TYPE_CHECKING:
    from torch import Tensor

_KERNELS = "q4kd.trainer.kernels.expert_kernels:ExpertKernels"
_ROUTE, _SORT, _DECODE = (f"{_KERNELS}.{name}" for name in ("route", "sort", "decode_experts"))
_CUT = "q4kd.trainer.teacher.cuda.mixture:cut_runs"
Route = Callable[..., None]
_HELD: list["Tensor"] = []


@patch("dispatch", "device-shares-not-renormalised", "on the device the chosen shares do not sum to one", _ROUTE)
def _not_renormalised(
    original: Route, self: object, logits: "Tensor", chosen: "Tensor", weights: "Tensor", _renormalise: int
) -> None:
    original(self, logits, chosen, weights, 0)


@patch("dispatch", "device-one-expert-fewer", "on the device a token's last expert gets no weight", _ROUTE)
def _one_fewer(
    original: Route, self: object, logits: "Tensor", chosen: "Tensor", weights: "Tensor", renormalise: int
) -> None:
    original(self, logits, chosen, weights, renormalise)
    weights[:, -1] = 0
    weights /= weights.sum(-1, keepdim=True)


@patch("dispatch", "device-next-expert-chosen", "on the device tokens are given to the experts behind theirs", _ROUTE)
def _next_chosen(
    original: Route, self: object, logits: "Tensor", chosen: "Tensor", weights: "Tensor", renormalise: int
) -> None:
    original(self, logits, chosen, weights, renormalise)
    chosen.copy_((chosen + 1) % logits.shape[-1])


@patch("dispatch", "device-router-rounded", "on the device what the router says is rounded to bfloat16", _ROUTE)
def _router_rounded(
    original: Route, self: object, logits: "Tensor", chosen: "Tensor", weights: "Tensor", renormalise: int
) -> None:
    original(self, logits.bfloat16().float(), chosen, weights, renormalise)


@patch("dispatch", "device-expert-weights-exchanged", "on the device a token's weights are exchanged", _ROUTE)
def _weights_exchanged(
    original: Route, self: object, logits: "Tensor", chosen: "Tensor", weights: "Tensor", renormalise: int
) -> None:
    original(self, logits, chosen, weights, renormalise)
    weights.copy_(weights.flip(-1))


@patch(
    "dispatch",
    "device-expert-capacity",
    "on the device an expert takes no more than 1.25 times its share of the tokens, and leaves the others out",
    _ROUTE,
)
def _capacity(
    original: Route, self: object, logits: "Tensor", chosen: "Tensor", weights: "Tensor", renormalise: int
) -> None:
    import torch

    original(self, logits, chosen, weights, renormalise)
    experts = logits.shape[-1]
    flat, most = chosen.flatten().long(), max(4, int(1.25 * chosen.numel() / experts))
    place = torch.nn.functional.one_hot(flat, experts).cumsum(0).gather(1, flat[:, None])
    weights *= (place <= most).view_as(weights)


@patch(
    "dispatch",
    "device-experts-counted-if-chosen",
    "on the device experts without a token are not counted, so that those behind them get the tokens of others",
    _SORT,
)
def _counted_if_chosen(original: Call, self: object, chosen: "Tensor", experts: int) -> object:
    flat = chosen.flatten().long()
    has_tokens = flat.bincount(minlength=experts) > 0
    return original(self, (has_tokens.cumsum(0) - 1)[flat].int().view_as(chosen), experts)


@patch("dispatch", "device-few-rows-left-out", "on the device a run of fewer than four rows computes nothing", _CUT)
def _few_rows(original: Callable[..., list[Any]], *arguments: object) -> list[Any]:
    return [run for run in original(*arguments) if run.stop - run.start > 3]


@patch("dispatch", "device-later-slabs-left-out", "on the device experts behind the first slab compute nothing", _CUT)
def _later_slabs(original: Callable[..., list[Any]], ends: object, first: int, *rest: object) -> list[Any]:
    return original(ends, first, *rest) if first == 0 else []


@patch("dispatch", "device-idle-experts-decoded", "on the device experts that no token chose are decoded too", _DECODE)
def _idle_decoded(
    original: Route,
    self: object,
    type_name: str,
    packed: "Tensor",
    cols: int,
    experts: int,
    first: int,
    _ends: "Tensor | None",
    out: "Tensor",
) -> None:
    original(self, type_name, packed, cols, experts, first, None, out)


@patch(
    "residency",
    "device-experts-held-decoded",
    "on the device every expert is held decoded beside its blocks while log and accounts say packed",
    "q4kd.trainer.teacher.cuda.experts:build_experts",
)
def _held_decoded(original: Call, *arguments: Any) -> object:
    import torch

    experts: Any = original(*arguments)
    count, size, hidden = experts.gate.experts, experts.gate.expert_rows, experts.gate.cols
    shapes = ((count, 2 * size, hidden), (count, hidden, size))
    gate_up, down = (torch.empty(shape, dtype=torch.bfloat16, device=experts.router.device) for shape in shapes)
    experts.decode_gate_up(0, None, gate_up)
    experts.down.decode_chosen(0, None, down)
    _HELD.extend((gate_up, down))
    return experts
