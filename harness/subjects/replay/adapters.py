"""What a replayed run with LoRA adapters left: the adapters as peft reads them, and the model they are merged into."""

from pathlib import Path

import numpy as np

from q4kd.harness.inputs.arrays import Array, Arrays, seeded_columns
from q4kd.harness.inputs.collect import Comparators, save_pairs
from q4kd.harness.subjects.replay.recipes import Leg
from q4kd.trainer.files import read_json

# Weights of a row, whose movement is compared as one vector.
_ROW = 16
# Of the weights with an update so many rows are compared.
_ROWS = 96


def compare_merged(run_dir: Path, name: str, leg: Leg, expected: Arrays) -> tuple[Comparators, dict[str, object]]:
    """Compare what merging added to each weight, and list what was trained, and what peft is told of it."""
    from safetensors.torch import load_file

    from q4kd.harness.oracles.adapters import merged

    folder = run_dir / name
    paths = [folder / "model" / "model.safetensors", folder / "adapter" / "adapter_model.safetensors"]
    loaded, adapter = (load_file(path) if path.is_file() else {} for path in paths)
    model = {key: value.double().numpy() for key, value in loaded.items()}
    start = {key.removeprefix("start:"): value for key, value in expected.items() if key.startswith("start:")}
    trained = {key.removeprefix("weight:"): value for key, value in expected.items() if key.startswith("weight:")}
    added = merged(trained, leg.settings["lora_alpha"] / leg.settings["lora_rank"])
    moved: list[list[Array]] = [
        [
            (model[key] - start[key] if key in model else np.full_like(update, np.nan)).reshape(-1, _ROW)
            for key, update in added.items()
        ],
        [update.reshape(-1, _ROW) for update in added.values()],
    ]
    subject, reference = (np.concatenate(parts) for parts in moved)
    chosen = seeded_columns(len(reference), _ROWS)
    pairs = {f"{name}-merged": (subject[chosen], reference[chosen])}
    changed = {key for key, value in model.items() if key not in start or not np.array_equal(value, start[key])}
    said = folder / "adapter" / "adapter_config.json"
    told = read_json(said) if said.is_file() else {}
    table: dict[str, object] = {
        "matrices of adapters": len(adapter),
        "weights of the model": len(model),
        "changed beside those with an adapter": len(changed - set(added)),
        "peft is told rank": told.get("r"),
        "peft is told alpha": str(told.get("lora_alpha")),
        "peft is told dropout": str(told.get("lora_dropout")),
        "peft is told targets": ", ".join(sorted(map(str, told.get("target_modules") or ()))),
    }
    sources = ("written model", "float64 replay of its adapters, merged")
    return save_pairs(run_dir, pairs, sources), {f"{name}-model": table}
