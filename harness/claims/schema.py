"""The schema for editors: the contract's structure, and the names and parameters that the registries hold.

``contracts/contract.schema.json`` is what ``q4kd contracts schema`` prints. The loader uses its structure alone and
asks the registries for the rest; a project with checks or experiments of its own prints the schema that knows them.
"""

import json

from q4kd.harness.checks import CHECKS
from q4kd.harness.claims.rules import read_schema, registered_names
from q4kd.harness.records.json_types import JsonObject, JsonRecord, JsonValue

_WHOLE = ("required", "oneOf", "anyOf", "allOf", "if", "then", "else", "minProperties")


def editor_schema() -> JsonObject:
    """Return the installed schema with ``$defs.registered`` made from the registries as they are now."""
    return read_schema(_registered())


def render_schema() -> str:
    """Return ``editor_schema`` as the text of ``contract.schema.json``."""
    return json.dumps(editor_schema(), indent=1, ensure_ascii=False) + "\n"


def _registered() -> JsonObject:
    names = registered_names()
    check = {"description": "A check.", "enum": sorted(CHECKS)}
    whole = {name: {"$ref": f"#/$defs/registered/$defs/{name}"} for name in sorted(CHECKS)}
    part = {name: {"$ref": f"#/$defs/registered/$defs/{name}-override"} for name in sorted(CHECKS)}
    overrides = {name: {"additionalProperties": {"properties": {"params": part[name]}}} for name in part}
    use: JsonValue = {"properties": {"check": check}, "allOf": [_when(name, {"params": whole[name]}) for name in whole]}
    return {
        "description": "Made by `q4kd contracts schema`: the registered names, and the parameters of each check.",
        "properties": {
            "check": check,
            "experiment": {"description": "An experiment.", "enum": sorted(names.experiments)},
            "sabotage": {"description": "Faults.", "uniqueItems": True, "items": {"enum": sorted(names.faults)}},
            "needs": {"description": "Capabilities.", "uniqueItems": True},
            "also": {"description": "Further checks.", "items": use},
        },
        "allOf": [_when(name, {"params": whole[name], "profiles": overrides[name]}) for name in whole],
        "$defs": {
            **{name: CHECKS[name].PARAMS for name in whole},
            **{f"{name}-override": _part(CHECKS[name].PARAMS) for name in whole},
        },
    }


def _when(check: str, properties: JsonObject) -> JsonValue:
    return {
        "if": {"required": ["check"], "properties": {"check": {"const": check}}},
        "then": {"properties": properties},
    }


def _part(schema: JsonRecord) -> JsonObject:
    """Return the schema of an override: any of the keys, null to remove one, and nothing that asks for all of them."""
    part: dict[str, JsonValue] = {key: value for key, value in schema.items() if key not in _WHOLE}
    if "properties" in part:
        part["properties"] = {
            name: {"description": below.get("description", ""), "anyOf": [_part(below), {"type": "null"}]}
            for name, below in schema["properties"].items()
        }
    return part
