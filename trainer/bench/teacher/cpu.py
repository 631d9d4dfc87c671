"""The engines compared on the CPU, each a worker process:

q4k             this project's forward over the packed file
dense           the same forward over weights decoded at load
transformers    Qwen2ForCausalLM holding the same weights, decoded at load (qwen2 files)
llama.cpp       through llama-cpp-python; the better of its physical batches of 512 and 1,024 for each shape

python -m q4kd.trainer.bench.teacher.cpu ENGINE --model FILE --threads N [--dtype DTYPE] [--clock wall|processor]
"""

import argparse
import ctypes
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from q4kd.trainer.bench.interleave import Ids
from q4kd.trainer.bench.teacher.worker import WorkerArm, serve

if TYPE_CHECKING:
    from torch import Tensor

ENGINES = ("q4k", "dense", "transformers", "llama.cpp")
_UBATCHES = (512, 1024)
# Processor seconds do not count waiting for a core that others use; those of several threads count their spinning.
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def worker_arm(engine: str, model: Path, threads: int, dtype: str, clock: str = "wall") -> WorkerArm:
    """Return an engine as an arm of a comparison."""
    arguments = [engine, "--model", str(model), "--threads", str(threads), "--dtype", dtype, "--clock", clock]
    name = engine if engine == "llama.cpp" else f"{engine}-{dtype}"
    return WorkerArm(name, "q4kd.trainer.bench.teacher.cpu", arguments, threads)


class _InProcessArm:
    """An arm of torch's, whose weights go when its process does."""

    def __init__(self, name: str, model: Path, threads: int, dtype: str, clock: str = "wall") -> None:
        self.name, self._model, self._threads, self._dtype = name, model, threads, dtype
        self._clock = CLOCKS[clock]

    def close(self) -> None:
        """Nothing is held beyond the process."""


class TeacherArm(_InProcessArm):
    """This project's teacher with the backend that names the arm: ``q4k`` or ``dense``."""

    _logits: "Tensor | None" = None

    def prepare(self) -> dict[str, Any]:
        """Load the file."""
        import torch

        from q4kd.trainer.device.placement import place_teacher
        from q4kd.trainer.events import EventLog
        from q4kd.trainer.teacher.teacher import load_teacher

        torch.set_num_threads(self._threads)
        started = time.perf_counter()
        placement = place_teacher(self._model, backend=self.name, dtype=self._dtype)
        self._teacher = load_teacher(placement, events=EventLog(None), announce=lambda _line: None)
        held = self._teacher.residency()
        return {
            "engine": f"q4kd {self.name}",
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "dtype": self._dtype,
            "load_seconds": time.perf_counter() - started,
            "resident_bytes": held.resident_bytes,
            "scratch_bytes": held.scratch_bytes,
        }

    def run(self, ids_BT: Ids, save: Path | None = None) -> float:
        """Return the seconds of one pass with logits at every position, in a buffer kept as llama.cpp keeps its own."""
        import torch

        ids = torch.from_numpy(ids_BT)
        shape = (*ids.shape, self._teacher.vocab_size)
        if self._logits is None or self._logits.shape != shape:
            self._logits = torch.from_numpy(np.empty(shape, np.float32))
        started = self._clock()
        self._teacher.logits(ids, out=self._logits)
        seconds = self._clock() - started
        if save is not None:
            np.save(save, self._logits.numpy(), allow_pickle=False)
        return seconds


class TransformersArm(_InProcessArm):
    """transformers' dense model of the same weights."""

    def prepare(self) -> dict[str, Any]:
        """Decode the file into the model."""
        import torch
        import transformers

        from q4kd.trainer.bench.teacher.dense_twin import build_twin
        from q4kd.trainer.formats.open import open_model
        from q4kd.trainer.teacher.cuda.weights import DeviceTensor

        torch.set_num_threads(self._threads)
        model = open_model(self._model)
        tensors = {
            name: DeviceTensor(name, tensor.type, tensor.shape, torch.from_numpy(tensor.data), tensor.scale)
            for name, tensor in model.tensors.items()
        }
        tensors.setdefault("output.weight", tensors["token_embd.weight"])
        self._twin = build_twin(model.config, tensors, getattr(torch, self._dtype))
        return {"engine": f"transformers {transformers.__version__}", "torch": torch.__version__, "dtype": self._dtype}

    def run(self, ids_BT: Ids, save: Path | None = None) -> float:
        """Return the seconds of one pass with logits at every position."""
        import torch

        ids = torch.from_numpy(ids_BT)
        with torch.no_grad():
            started = self._clock()
            logits = self._twin(input_ids=ids, use_cache=False).logits
            seconds = self._clock() - started
        if save is not None:
            np.save(save, logits.float().numpy(), allow_pickle=False)
        return seconds


class LlamaCppArm:
    """llama.cpp on the same file: ``llama_decode`` to logits in its own buffer, no Python copy inside the clock."""

    name = "llama.cpp"

    def __init__(self, model: Path, threads: int, clock: str = "wall") -> None:
        self._model, self._threads, self._clock = model, threads, CLOCKS[clock]
        self._engines: dict[tuple[int, int], Any] = {}
        self._best: dict[int, int] = {}

    def prepare(self) -> dict[str, Any]:
        """Import the engine; contexts are made for each length when it is first run."""
        import llama_cpp

        self._library: Any = llama_cpp
        system = llama_cpp.llama_print_system_info().decode(errors="replace")
        return {"engine": f"llama-cpp-python {llama_cpp.__version__}", "threads": self._threads, "system": system}

    def run(self, ids_BT: Ids, save: Path | None = None) -> float:
        """Return the seconds of one pass over ``[1, T]`` ids with logits at every position.

        Raises:
            ValueError: for more than one sequence.
        """
        if len(ids_BT) != 1:
            raise ValueError(f"one sequence is compared with llama.cpp, got {len(ids_BT)}")
        tokens = ids_BT[0].tolist()
        if len(tokens) not in self._best:
            trials = {ubatch: min(self._decode(tokens, ubatch)[0] for _ in range(3)) for ubatch in _UBATCHES}
            self._best[len(tokens)] = min(trials, key=trials.__getitem__)
        seconds, logits = self._decode(tokens, self._best[len(tokens)])
        if save is not None:
            shape = (len(tokens), self._vocab_size)
            view = np.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), shape)
            np.save(save, view[None], allow_pickle=False)
        return seconds

    def close(self) -> None:
        """Free the contexts."""
        self._engines.clear()

    def _decode(self, tokens: list[int], ubatch: int) -> tuple[float, Any]:
        library, engine = self._library, self._engine(len(tokens), ubatch)
        batch = library.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for place, token in enumerate(tokens):
                batch.token[place], batch.pos[place], batch.logits[place] = token, place, 1
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
            library.llama_memory_clear(library.llama_get_memory(engine.ctx), False)
            started = self._clock()
            code = library.llama_decode(engine.ctx, batch)
            logits = library.llama_get_logits(engine.ctx)  # This waits for the computation.
            seconds = self._clock() - started
        finally:
            library.llama_batch_free(batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        return seconds, logits

    def _engine(self, length: int, ubatch: int) -> Any:
        if (length, ubatch) not in self._engines:
            self._engines[length, ubatch] = engine = self._library.Llama(
                str(self._model),
                n_ctx=length,
                n_batch=length,
                n_ubatch=ubatch,
                n_threads=self._threads,
                n_threads_batch=self._threads,
                logits_all=True,
                verbose=False,
            )
            self._vocab_size = int(engine.n_vocab())
        return self._engines[length, ubatch]


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve one engine as a worker process."""
    parser = argparse.ArgumentParser(prog="python -m q4kd.trainer.bench.teacher.cpu")
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    options = parser.parse_args(arguments)
    if options.engine == "llama.cpp":
        return serve(LlamaCppArm(options.model, options.threads, options.clock))
    kind = TransformersArm if options.engine == "transformers" else TeacherArm
    return serve(kind(options.engine, options.model, options.threads, options.dtype, options.clock))


if __name__ == "__main__":
    raise SystemExit(main())
