"""Whether a repo says what its users may do with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NO_LICENCE = (
    "no licence: say in the recipe which one users get, as `hub: {license: apache-2.0}`; `license: other` takes "
    "`license_name` and `license_link` too"
)


def is_missing(front: Mapping[str, Any]) -> bool:
    """Whether front matter, or the recipe's `hub`, has no licence, or one of its own without a name and a link."""
    licence = front.get("license")
    return not licence or (licence == "other" and not (front.get("license_name") and front.get("license_link")))
