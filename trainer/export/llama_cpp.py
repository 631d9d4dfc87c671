"""What llama.cpp computes otherwise than a model is defined, though the file that it reads says it right."""

from collections.abc import Mapping
from typing import Any

from q4kd.trainer.formats.architecture import TeacherConfig
from q4kd.trainer.formats.gguf.pre_tokenizers import steps


def differences(config: TeacherConfig, tokenizer: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each, without the exporter's own rounding; q4kd reads the file as it is meant.

    Args:
        config: what the model computes.
        tokenizer: content of tokenizer.json.
    """
    found = []
    # Its loader says "Phi SWA is currently disabled" (src/models/phi3.cpp).
    if config.architecture == "phi3" and config.windows:
        window = max(config.windows)
        found.append(
            f"llama.cpp leaves out the window of Phi-3: from position {window} on (counted from 0), its logits are not "
            "this model's"
        )
    cuts = steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
    if any(cut.get("type") == "Metaspace" and cut.get("prepend_scheme") == "first" for cut in cuts):
        found.append(
            "a GGUF puts a space before the text after every special token, this tokenizer only where a text begins: "
            "ids differ behind special tokens"
        )
    return found
