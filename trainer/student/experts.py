"""A student that is a mixture of experts: which loss its router gets, said before it is trained.

transformers adds a loss for the router, ``router_aux_loss_coef`` times the balance of its choices (Fedus et al.,
https://arxiv.org/abs/2101.03961, equation 4), where the config says ``output_router_logits: true``. Here the loss is
the distillation's alone, so that such a config is refused. Any other is trained as transformers trains it.
"""

from dataclasses import dataclass
from typing import Any

from q4kd.trainer.errors import InputError

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts")
ROUTER_LOSS = "none"


@dataclass(frozen=True)
class StudentExperts:
    """The experts of a student.

    Attributes:
        count: in a layer.
        per_token: experts that a token is given to; None where the config does not say it by a known name.
        router_loss: always ``none``.
        trained: whether the experts' own weights change.
    """

    count: int
    per_token: int | None
    router_loss: str
    trained: bool

    def describe(self) -> str:
        """Return one line for people."""
        each = f", {self.per_token} a token" if self.per_token is not None else ""
        change = "experts are trained" if self.trained else "experts stay as they are, adapters have none of them"
        return f"student: {self.count} experts a layer{each}; no router loss balances them; {change}"


def find_experts(student: Any, *, adapted: bool) -> StudentExperts | None:
    """Return the experts of a causal LM, or None for one without.

    ``adapted`` says whether it has adapters, beside which its own weights are frozen.
    """
    count, per_token = (_setting(student.config, names) for names in (_COUNTS, _PER_TOKEN))
    names = [name for name, _ in student.named_parameters() if ".experts." in name]
    if count is None or not names:
        return None
    return StudentExperts(count, per_token, ROUTER_LOSS, not adapted or any(".lora_" in name for name in names))


def check_router_loss(model: Any) -> None:
    """Refuse a config by which transformers would add a loss for the router, which is not added here.

    Raises:
        InputError: naming the setting.
    """
    text = model.config.get_text_config()
    if getattr(text, "output_router_logits", False) and _setting(model.config, _COUNTS) is not None:
        got = f"output_router_logits: true, router_aux_loss_coef: {getattr(text, 'router_aux_loss_coef', None)}"
        remedy = "set output_router_logits to false in its config.json; its router then learns from distillation alone"
        raise InputError("student", expected="experts without a router loss", got=got, remedy=remedy)


def _setting(config: Any, names: tuple[str, ...]) -> int | None:
    text = config.get_text_config()
    found = [getattr(text, name, None) for name in names]
    return next((value for value in found if isinstance(value, int) and value > 0), None)
