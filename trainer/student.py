"""The student: a Hugging Face causal LM, and the module that turns its hidden states into the distillation loss."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from q4kd.trainer.errors import InputError
from q4kd.trainer.kd_loss import KDLossConfig, LossTerms, kd_loss

# Nothing is fetched: a student is a folder. Set before transformers is imported, which reads it once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")


def quiet_transformers() -> None:
    """Keep transformers' own progress bars out of this program's output."""
    from transformers.utils import logging

    quiet: Any = logging.disable_progress_bar
    quiet()


def _refuse(folder: Path, error: Exception) -> InputError:
    return InputError(
        f"student {folder}",
        expected="a Hugging Face causal LM folder (config.json, tokenizer.json, safetensors weights or none)",
        got=f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}",
        remedy="check --student",
    )


def has_weights(folder: Path) -> bool:
    """Whether the folder holds safetensors weights; without them a student starts from its seed."""
    return any((folder / name).is_file() for name in WEIGHT_FILES)


def load_student(folder: Path, seed: int) -> nn.Module:
    """Load a student in float32, or make a fresh one from config.json and ``seed``.

    Raises:
        InputError: when the folder is not a causal LM, or holds only weights in a format that needs pickle.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    quiet_transformers()
    if not (folder / "config.json").is_file():
        raise InputError(
            f"student {folder}",
            expected="a folder with config.json",
            got="none",
            remedy="pass a Hugging Face model folder",
        )
    if not has_weights(folder) and any(folder.glob("*.bin")):
        raise InputError(
            f"student {folder}",
            expected="weights as safetensors",
            got="pickled .bin files, which may run code",
            remedy="convert them with transformers' save_pretrained(safe_serialization=True)",
        )
    try:
        if has_weights(folder):
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, trust_remote_code=False
            )
        else:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            torch.manual_seed(seed)
            make: Any = AutoModelForCausalLM.from_config
            model = make(config, dtype=torch.float32, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise _refuse(folder, error) from error
    module: nn.Module = model
    return module


def load_tokenizer(folder: Path) -> Any:
    """Load the student's tokenizer.

    Raises:
        InputError: when there is none or it names no end-of-text token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise _refuse(folder, error) from error
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"student {folder}",
            expected="an end-of-text token",
            got="none",
            remedy="set eos_token in tokenizer_config.json",
        )
    return tokenizer


def encoder(tokenizer: Any) -> Callable[[list[str]], list[list[int]]]:
    """Return a function from texts to token ids, without special tokens and without length warnings."""

    def encode(texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    return encode


class DistillationModel(nn.Module):
    """Student plus loss in one module, so that data-parallel wrappers see a forward that returns the loss.

    Args:
        student: a Hugging Face causal LM whose output embedding has no bias.

    Raises:
        InputError: when the output embedding has a bias.
    """

    def __init__(self, student: Any, config: KDLossConfig) -> None:
        super().__init__()
        self.student = student
        self.config = config
        if getattr(student.get_output_embeddings(), "bias", None) is not None:
            raise InputError(
                "student", expected="an output head without bias", got="one with bias", remedy="use another student"
            )

    @property
    def head_weight(self) -> Tensor:
        """The student's head ``[V, H]``."""
        weight: Tensor = self.student.get_output_embeddings().weight
        return weight

    def hidden(self, ids_BT: Tensor) -> Tensor:
        """Return the student's final hidden states, float ``[B, T, H]``."""
        outputs = self.student.base_model(input_ids=ids_BT, use_cache=False)
        hidden: Tensor = outputs.last_hidden_state
        return hidden

    def forward(
        self,
        ids_BT: Tensor,
        labels_BT: Tensor,
        teacher_hidden: Tensor | None,
        teacher_head: Callable[[Tensor], Tensor] | None,
        num_targets: float,
    ) -> LossTerms:
        """Return the loss of a batch; see ``kd_loss`` for the arguments."""
        return kd_loss(
            self.hidden(ids_BT).flatten(0, 1),
            self.head_weight,
            labels_BT.flatten(),
            teacher_hidden=None if teacher_hidden is None else teacher_hidden.flatten(0, 1),
            teacher_head=teacher_head,
            num_targets=num_targets,
            config=self.config,
        )
