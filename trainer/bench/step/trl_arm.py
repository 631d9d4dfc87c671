"""TRL's GKDTrainer as an arm of ``q4kd bench step``: the same student, the same windows, a dense teacher.

Off-policy (lmbda = 0) and with beta = 0, its loss is the forward KL, which is q4kd's with alpha = 0 and temperature 1.
The student's weights are float32 and computed in bfloat16 by autocast, which is TRL's way to what q4kd does with
bfloat16 weights and float32 masters.
"""

import importlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from q4kd.trainer.bench.device_probes import wall_seconds
from q4kd.trainer.bench.interleave import Ids


class TrlArm:
    """One step of GKDTrainer: ``training_step``, clip, fused AdamW.

    Both models are made as transformers causal LMs on the device, the student in float32, their heads equally wide.
    """

    def __init__(
        self, name: str, make_student: Callable[[], Any], make_teacher: Callable[[], Any], *, lr: float, clip: float
    ) -> None:
        self.name, self._make_student, self._make_teacher = name, make_student, make_teacher
        self._lr, self._clip = lr, clip
        self._folder = tempfile.TemporaryDirectory(prefix="q4kd-trl-")

    def prepare(self) -> dict[str, Any]:
        """Build the trainer.

        Raises:
            ImportError: when trl or its requirements are not installed.
        """
        gkd: Any = importlib.import_module("trl.experimental.gkd")
        datasets: Any = importlib.import_module("datasets")
        on_cuda = torch.cuda.is_available()
        settings = gkd.GKDConfig(
            output_dir=self._folder.name,
            lmbda=0.0,
            beta=0.0,
            temperature=1.0,
            bf16=on_cuda,
            use_cpu=not on_cuda,
            optim="adamw_torch_fused" if on_cuda else "adamw_torch",
            learning_rate=self._lr,
            max_grad_norm=self._clip,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
        )
        self._trainer = gkd.GKDTrainer(
            model=self._make_student(),
            teacher_model=self._make_teacher(),
            args=settings,
            data_collator=lambda rows: rows,
            train_dataset=datasets.Dataset.from_dict({"input_ids": [[0, 1]]}),
            processing_class=_any_tokenizer(),
        )
        self._trainer.create_optimizer()
        accelerator = self._trainer.accelerator
        self._model, self._optimizer = accelerator.prepare(self._trainer.model, self._trainer.optimizer)
        self._trainer.model_wrapped = self._model
        # Trainer.train, which is bypassed, would set it.
        self._trainer.current_gradient_accumulation_steps = 1
        version = importlib.import_module("trl").__version__
        return {"trl": version, "lmbda": 0.0, "beta": 0.0, "autocast": "bfloat16" if on_cuda else "none"}

    def run(self, ids_BT: Ids, save: Path | None = None) -> float:
        """Take one step on int64 windows ``[B, T + 1]`` and return its seconds."""
        device = self._trainer.accelerator.device
        ids = torch.from_numpy(ids_BT).to(device)
        # The window's last token has a label but is no input of q4kd's; here, too, T positions are learnt.
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
        self._model.train()

        def step() -> None:
            self._trainer.training_step(self._model, inputs)
            self._trainer.accelerator.clip_grad_norm_(self._model.parameters(), self._clip)
            self._optimizer.step()
            self._model.zero_grad()

        return wall_seconds(step, device)

    def close(self) -> None:
        """Drop the trainer with its models and its folder."""
        for name in ("_trainer", "_model", "_optimizer"):
            self.__dict__.pop(name, None)
        self._folder.cleanup()


def _any_tokenizer() -> Any:
    """Return the demo's tokenizer: GKDTrainer wants one with a pad token, though ids are given."""
    from transformers import AutoTokenizer

    from q4kd.trainer import demo

    tokenizer = AutoTokenizer.from_pretrained(demo.student_path(), local_files_only=True)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer
