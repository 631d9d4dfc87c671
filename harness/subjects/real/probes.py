"""Measurements beside q4kd: the logits of transformers and of llama.cpp over a GGUF that they read themselves."""

from pathlib import Path
from typing import Any

import numpy as np

from q4kd.harness.inputs.arrays import read_array
from q4kd.harness.runs.probes import probe


@probe("transformers-logits")
def transformers_logits(model: Path, ids: Path, out: Path) -> None:
    """Write transformers' logits over ``model``, float32 ``[T, V]``, for int ids ``[T]``.

    transformers reads names, shapes and hyperparameters of the file by its own tables, and the gguf package decodes. It
    multiplies in float64: in float32 its own error, by the processor, is up to 1e-5 of a position's logits.
    """
    import torch
    from transformers import AutoModelForCausalLM

    load: Any = AutoModelForCausalLM.from_pretrained
    loaded = load(model.parent, gguf_file=model.name, dtype=torch.float32, local_files_only=True).eval().double()
    with torch.inference_mode():
        logits_TV = loaded(torch.from_numpy(read_array(ids)).long().unsqueeze(0)).logits[0]
    np.save(out, logits_TV.float().numpy())


@probe("llamacpp-logits")
def llamacpp_logits(model: Path, ids: Path, out: Path) -> None:
    """Write llama.cpp's logits over ``model``, float32 ``[T, V]``, for int ids ``[T]``, on the CPU."""
    import llama_cpp

    tokens = [int(token) for token in read_array(ids)]
    sizes = {"n_ctx": len(tokens), "n_batch": len(tokens), "n_threads": 1, "n_gpu_layers": 0}
    engine = llama_cpp.Llama(str(model), logits_all=True, verbose=False, **sizes)
    engine.eval(tokens)
    np.save(out, np.array(engine.scores[: len(tokens)], np.float32))
