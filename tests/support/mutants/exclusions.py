"""What is not planted, each with its reason: a change there is no change of what the program does.

What remains is judged. A survivor that turns out to change nothing is entered in ``equivalent.json`` with its reason.
"""

import ast
from collections.abc import Set
from fnmatch import fnmatch

# Modules that no machine without a GPU runs, and modules whose product is a time or was made once.
MODULES: dict[str, str] = {
    "trainer/cli/bench.py": "the command of trainer/bench",
    "trainer/bench/*": "measures times beside other engines; nothing that a run computes passes through it",
    "trainer/*/cuda/*": "runs on a CUDA device only",
    "trainer/kernels/compile.py": "runs on a CUDA device only",
    "trainer/kernels/launch.py": "runs on a CUDA device only",
    "trainer/kernels/plans.py": "runs on a CUDA device only",
    "trainer/kernels/teacher_kernels.py": "runs on a CUDA device only",
    "trainer/demo/make_teacher.py": "made the shipped teacher once; claims read the file that it left",
    "trainer/demo/train.py": "made the shipped teacher once; claims read the file that it left",
}
# Definitions whose value is read by people, never by the program.
SHOWN_ONLY = frozenset({"__repr__", "__str__", "__rich__"})
# Functions that only a machine with a GPU runs, in modules that others run too.
GPU_FUNCTIONS = frozenset(
    {"_apply_liger", "_bitsandbytes_class", "_cuda_loss_shape", "_liger_saves", "cuda_facts", "_no_cuda",
     "nvml_process_bytes"}
)  # fmt: skip
# Arguments by name: texts for people, names of threads and files, and guards that a correct caller never meets.
KEYWORDS = frozenset(
    {
        "help", "metavar", "description", "epilog", "title", "prog",  # texts of the command line
        "expected", "got", "remedy", "name", "stacklevel",  # texts of errors, names of threads
        "device",  # without a GPU the default is right as well
        "encoding",  # of files: UTF-8 is what every supported system has anyway
        "strict", "check",  # zip and subprocess: they matter only where another error has been made
        "ensure_ascii", "indent", "prefix", "suffix", "ignore_errors", "daemon", "flush", "copy", "non_blocking",
    }
)  # fmt: skip
# Calls that give something back sooner than the interpreter would.
_RELEASES = frozenset({"close", "empty_cache", "collect", "unlink", "rmtree", "setdefault", "filterwarnings", "warn"})
# Functions whose first two arguments may change places.
_SYMMETRIC = frozenset({"max", "min", "maximum", "minimum", "add", "equal", "array_equal", "allclose", "multiply"})
# Constants of a module on which only speed and memory depend: sizes of pieces, of kept buffers, of waits.
_PIECES = "the size of a piece of work: results are the same to rounding"
PERFORMANCE: dict[str, dict[str, str]] = {
    "trainer/data/chats/template.py": {"_BATCH": _PIECES, "_BATCH_BYTES": _PIECES},
    "trainer/data/corpus.py": {"_SAY_EVERY_TOKENS": "how often progress is said"},
    "trainer/data/encoding.py": {"_GROUP": _PIECES, "_GROUP_BYTES": _PIECES},
    "trainer/data/shards.py": {"_ROWS": _PIECES},
    "trainer/data/token_set.py": {"SPILL_BYTES": _PIECES, "_HASHED": _PIECES},
    "trainer/device/memory_watchdog.py": {"_INTERVAL_S": "how often memory is looked at"},
    "trainer/export/fidelity.py": {"CHUNK_TOKENS": _PIECES, "_TOKENS_AT_ONCE": _PIECES},
    "trainer/export/to_gguf.py": {"_PIECE_WEIGHTS": _PIECES},
    "trainer/formats/apr/header.py": {"_CHUNK": _PIECES},
    "trainer/formats/blocks/decode.py": {"_WEIGHTS_AT_ONCE": _PIECES},
    "trainer/formats/blocks/quantize.py": {"_CHUNK_WEIGHTS": _PIECES},
    "trainer/formats/blocks/scales.py": {"_CHUNK_BYTES": _PIECES},
    "trainer/kernels/attention.py": {"_BLOCK": _PIECES, "_SCORES": _PIECES, "_LONG": _PIECES},
    "trainer/formats/safetensors_writer.py": {"_PIECE_BYTES": _PIECES, "_SYNC_BYTES": _PIECES},
    "trainer/kernels/gemm.py": {"_LARGEST_KEPT": "from which size malloc maps a buffer"},
    "trainer/loss/config.py": {"_CPU_CHUNK_BYTES": _PIECES, "_CPU_LIVE": _PIECES, "_CPU_MAX_CHUNK": _PIECES},
    "trainer/loss/divergence.py": {"_COPIED": _PIECES},
    "trainer/loss/sums.py": {"_SLAB": _PIECES},
    "trainer/loss/tiled.py": {"DEFAULT_TILE": _PIECES, "_DEFAULT_CHUNK": _PIECES},
    "trainer/loss/topk.py": {"_CUDA_CHUNK": _PIECES},
    "trainer/student/stored_head.py": {"_ROWS": _PIECES},
    "trainer/teacher/cache/writer.py": {"_SAY_EVERY_S": "how often progress is said"},
    "trainer/teacher/cpu/weights.py": {
        "DEFAULT_SCRATCH_BYTES": _PIECES,
        "_RUN_WEIGHTS": _PIECES,
        "_TILE_ROWS": _PIECES,
    },
    "trainer/train/evaluate.py": {"CHUNK_TOKENS": _PIECES},
    "trainer/train/hang_watchdog.py": {"_CHECKS": "how often it looks", "_LONGEST_INTERVAL_S": "how often it looks"},
    "trainer/train/optimizer.py": {"SLICE_ELEMENTS": _PIECES},
}


def why_not(module: str) -> str | None:
    """Return why a module has no mutants, None when it has."""
    return next((reason for pattern, reason in MODULES.items() if fnmatch(module, pattern)), None)


def needs_gpu(test: ast.expr) -> bool:
    """Return whether what a condition guards runs on a CUDA device only."""
    text = ast.unparse(test)
    return "cuda" in text and not text.startswith("not ") and "!=" not in text


def is_performance_only(module: str, names: Set[str]) -> bool:
    """Return whether an assignment of a module defines constants on which no result depends."""
    return bool(names) and names <= PERFORMANCE.get(module, {}).keys()


def is_release(call: ast.Call) -> bool:
    """Return whether a call as a statement only gives something back or warns."""
    return _called(call) in _RELEASES


def is_symmetric(call: ast.Call) -> bool:
    """Return whether the order of a call's arguments has no meaning."""
    return _called(call) in _SYMMETRIC


def _called(call: ast.Call) -> str:
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
