"""Settings of a run that no file is read for."""

from q4kd.trainer.config.settings import DistillConfig, make_config


def settings(**values: object) -> DistillConfig:
    base: dict[str, object] = {"teacher": "t", "student": "s", "data": "d", "out": "o", "lr": 0.01, "warmup_steps": 2}
    return make_config({**base, **values})
