"""Faults in mixtures of experts: another choice, other weights, and experts that leave tokens out at some loads."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from q4kd.harness.runs.faults import patch

if TYPE_CHECKING:
    from torch import Tensor

_EXPERTS = "q4kd.trainer.teacher.cpu.experts"
Route = Callable[..., tuple["Tensor", "Tensor"]]
Products = Callable[..., "Tensor"]


@patch(
    "dispatch", "shares-not-renormalised", "the chosen experts' shares are not made to sum to one", f"{_EXPERTS}:route"
)
def _not_renormalised(original: Route, logits: "Tensor", per_token: int) -> tuple["Tensor", "Tensor"]:
    chosen, _weights = original(logits, per_token)
    return chosen, logits.softmax(-1).gather(-1, chosen)


@patch(
    "dispatch", "one-expert-fewer", "every token is given to one expert fewer than the file says", f"{_EXPERTS}:route"
)
def _one_fewer(original: Route, logits: "Tensor", per_token: int) -> tuple["Tensor", "Tensor"]:
    return original(logits, per_token - 1)


@patch("dispatch", "next-expert-chosen", "every token is given to the experts behind its own", f"{_EXPERTS}:route")
def _next_chosen(original: Route, logits: "Tensor", per_token: int) -> tuple["Tensor", "Tensor"]:
    chosen, weights = original(logits, per_token)
    return (chosen + 1) % logits.shape[-1], weights


@patch("dispatch", "router-rounded", "what the router says is rounded to bfloat16", f"{_EXPERTS}:route")
def _router_rounded(original: Route, logits: "Tensor", per_token: int) -> tuple["Tensor", "Tensor"]:
    return original(logits.bfloat16().float(), per_token)


@patch(
    "dispatch",
    "expert-weights-exchanged",
    "the weights of a token's experts are exchanged among them",
    f"{_EXPERTS}:expert_products",
)
def _weights_exchanged(
    original: Products, x: "Tensor", chosen: "Tensor", weights: "Tensor", experts: Any, activate: Any
) -> "Tensor":
    return original(x, chosen, weights.flip(-1), experts, activate)


@patch(
    "dispatch",
    "expert-capacity",
    "an expert takes no more than 1.25 times its share of the tokens, and leaves the others out",
    f"{_EXPERTS}:expert_products",
)
def _capacity(
    original: Products, x: "Tensor", chosen: "Tensor", weights: "Tensor", experts: Any, activate: Any
) -> "Tensor":
    import torch

    flat, most = chosen.flatten(), max(4, int(1.25 * chosen.numel() / experts.count))
    place = torch.nn.functional.one_hot(flat, experts.count).cumsum(0).gather(1, flat[:, None])
    return original(x, chosen, weights * (place <= most).view_as(weights), experts, activate)


@patch(
    "dispatch",
    "experts-counted-if-chosen",
    "experts without a token are not counted, so that those behind them get the tokens of others",
    f"{_EXPERTS}:expert_products",
)
def _counted_if_chosen(
    original: Products, x: "Tensor", chosen: "Tensor", weights: "Tensor", experts: Any, activate: Any
) -> "Tensor":
    has_tokens = chosen.flatten().bincount(minlength=experts.count) > 0
    return original(x, (has_tokens.cumsum(0) - 1)[chosen], weights, experts, activate)


@patch("dispatch", "lone-token-left-out", "an expert of a single token computes nothing", f"{_EXPERTS}:_expert")
def _lone_token(original: Products, x: "Tensor", expert: int, experts: Any, activate: Any) -> "Tensor":
    return original(x, expert, experts, activate) if len(x) > 1 else x.new_zeros(x.shape)


@patch(
    "dispatch",
    "idle-experts-decoded",
    "experts that no token chose are decoded too",
    f"{_EXPERTS}:expert_products",
)
def _idle_decoded(
    original: Products, x: "Tensor", chosen: "Tensor", weights: "Tensor", experts: Any, activate: Any
) -> "Tensor":
    from q4kd.trainer.teacher.cpu.experts import _expert

    for expert in range(experts.count):
        _expert(x[:1], expert, experts, activate)
    return original(x, chosen, weights, experts, activate)


@patch(
    "residency",
    "experts-held-decoded",
    "every expert is held decoded beside its blocks while log and accounts say packed",
    "q4kd.trainer.teacher.cpu.weights:PackedMatrix.__init__",
)
def _held_decoded(original: Callable[..., None], self: Any, tensor: Any, scratch: object) -> None:
    from q4kd.trainer.teacher.cpu.weights import DenseMatrix

    original(self, tensor, scratch)
    if len(tensor.shape) == 3:
        self.copy = DenseMatrix(tensor)
