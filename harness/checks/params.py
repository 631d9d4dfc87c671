"""JSON Schemas of the parameters of checks, with the parts that several of them have."""

from typing import Any

ARRAY_PARAM = {"type": "string", "pattern": "^[a-z0-9_-]{1,40}$", "description": "Name of the npz in arrays/."}
# Texts that must all occur in one line.
FRAGMENTS = {"type": "array", "minItems": 1, "maxItems": 8, "items": {"type": "string", "minLength": 2}}
_ARM_PARAM = {"type": "string", "description": "Which arm of the experiment; may be left out when it has one run."}


def closed(required: list[str], **properties: object) -> dict[str, Any]:
    """Return the schema of an object that has these properties and no others."""
    return {"type": "object", "additionalProperties": False, "required": required, "properties": properties}


def arm_params(required: list[str], **properties: object) -> dict[str, Any]:
    """Return the schema of the parameters of a check that judges one arm, which they may name."""
    return closed(required, arm=_ARM_PARAM, **properties)
