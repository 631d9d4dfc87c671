"""A measurement beside q4kd: the logits of transformers over a GGUF that it decodes itself."""

from pathlib import Path
from typing import Any

import numpy as np

from q4kd.harness.inputs.arrays import read_array
from q4kd.harness.runs.probes import probe


@probe("transformers-logits")
def transformers_logits(model: Path, ids: Path, out: Path) -> None:
    """Write transformers' logits over ``model``, float32 ``[T, V]``, for int ids ``[T]``.

    transformers reads names, shapes and hyperparameters of the file by its own tables, and the gguf package decodes.
    """
    import torch
    from transformers import AutoModelForCausalLM

    load: Any = AutoModelForCausalLM.from_pretrained
    loaded = load(model.parent, gguf_file=model.name, dtype=torch.float32, local_files_only=True).eval()
    with torch.inference_mode():
        logits_TV = loaded(torch.from_numpy(read_array(ids)).long().unsqueeze(0)).logits[0]
    np.save(out, logits_TV.numpy())
