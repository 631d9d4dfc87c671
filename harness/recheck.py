"""Parts of verification: judging a bundle's sabotaged runs again, and saying where two records differ."""

import json
import math
from collections.abc import Mapping
from typing import Any

from q4kd.harness.contract import Claim
from q4kd.harness.interchange import digest_of
from q4kd.harness.raw import Store, TarStore, read_runs
from q4kd.harness.store import read_object
from q4kd.harness.yaml_lines import printable
from q4kd.trainer.errors import InputError


def recheck_sabotage(
    claim: Claim, profile: str, store: Store, recorded: list[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Judge the sabotaged runs kept in a bundle again.

    A record whose code has changed since is still judged: its raw runs are what was seen then. A fault recorded without
    a record stays as it was recorded, which cannot support a corroboration.

    Returns:
        The sabotage entries that the bundle should hold for this claim, one for each fault it names.

    Raises:
        InputError: a record is missing, or is for another claim, or its archive is not the one recorded.
    """
    from q4kd.harness.kills import judge_faulted
    from q4kd.harness.sabotage.registry import get_fault

    assert claim.falsifier is not None
    by_fault = {str(entry["fault"]): entry for entry in recorded}
    results: list[dict[str, Any]] = []
    for name in claim.falsifier.sabotage:
        entry = by_fault.get(name)
        if entry is None:
            raise InputError(
                claim.key, expected=f"a record for the fault {name}", got="none", remedy="run falsify again"
            )
        if entry["record"] is None:
            results.append({**entry, "caught": False, "verdict": None})
            continue
        records = read_object(store, "sabotage/kills.json").get("records", {})
        record = records.get(entry["record"])
        identity = (claim.contract, claim.id, name, claim.falsifier.experiment)
        if record is None or tuple(record.get(part) for part in ("contract", "id", "fault", "experiment")) != identity:
            raise InputError(
                "sabotage/kills.json", expected=f"a record of {identity}", got="none", remedy="run falsify again"
            )
        archive = f"sabotage/{record['raw']}"
        if digest_of(store, archive) != record.get("raw_sha256"):
            raise InputError(archive, expected="the archive recorded", got="another", remedy="run falsify again")
        runs = read_runs(TarStore(store.read(archive), archive))
        outcome = judge_faulted(claim, get_fault(name), profile, runs)
        results.append({"fault": name, "record": entry["record"], **outcome})
    return results


def as_json(value: object) -> Any:
    """Return ``value`` as it reads after being written to JSON."""
    return json.loads(json.dumps(value, allow_nan=False))


def difference(recorded: Any, recomputed: Any, path: str = "") -> str | None:
    """Return where two JSON values differ, or None. Numbers may differ by rounding across machines (1e-9 relative)."""
    if isinstance(recorded, dict) and isinstance(recomputed, dict):
        for key in sorted({*recorded, *recomputed}):
            if key not in recorded or key not in recomputed:
                return f"{path}.{key}: only in the {'record' if key in recorded else 'recomputation'}"
            found = difference(recorded[key], recomputed[key], f"{path}.{key}")
            if found is not None:
                return found
        return None
    if isinstance(recorded, list) and isinstance(recomputed, list):
        if len(recorded) != len(recomputed):
            return f"{path}: {len(recorded)} recorded, {len(recomputed)} recomputed"
        pairs = enumerate(zip(recorded, recomputed, strict=True))
        return next((d for i, (a, b) in pairs if (d := difference(a, b, f"{path}[{i}]")) is not None), None)
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (recorded, recomputed))
    if numbers:
        same = math.isclose(recorded, recomputed, rel_tol=1e-9, abs_tol=1e-15)
    else:
        same = recorded == recomputed and isinstance(recorded, bool) == isinstance(recomputed, bool)
    return None if same else f"{path}: recorded {_shown(recorded)}, recomputed {_shown(recomputed)}"


def _shown(value: object) -> str:
    return printable(json.dumps(value, ensure_ascii=False), 120)
