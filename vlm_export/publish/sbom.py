"""A bill of materials, as CycloneDX 1.6 has it (https://cyclonedx.org/docs/1.6/json): what a thing was made of.

It holds neither a time nor a random number: of the same it is the same.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_export.manifest import Manifest

SBOM = "sbom.cdx.json"
Component = dict[str, Any]


def of_export(manifest: Manifest, files: Mapping[str, str]) -> dict[str, Any]:
    """Of an exported repo.

    Args:
        manifest: its `export.json`.
        files: the sha256 of each of its files, by its path in it.
    """
    sources = [_of_hub(reference) for reference in dict.fromkeys(manifest.commits.values())]
    inputs = [_file(f"input/{name}", digest, "data") for name, digest in manifest.inputs_sha256.items()]
    libraries = [library(name, number) for name, number in manifest.versions.items()]
    made = [_file(name, digest, "file") for name, digest in files.items()]
    subject: Component = {"type": "machine-learning-model", "bom-ref": "repo", "name": manifest.recipe}
    return document({**subject, "components": made}, [*sources, *inputs, *libraries])


def document(subject: Component, parts: Sequence[Component]) -> dict[str, Any]:
    """A bill of materials of a component, which has a `bom-ref`, and of all that it was made of."""
    references = [part["bom-ref"] for part in parts]
    content: dict[str, Any] = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": subject},
        "components": list(parts),
        "dependencies": [{"ref": subject["bom-ref"], "dependsOn": references}],
    }
    number = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(content, sort_keys=True))
    return {"serialNumber": f"urn:uuid:{number}", **content}


def library(name: str, version: str, *, kind: str = "pypi", hashes: Sequence[Component] = ()) -> Component:
    """A package of PyPI or, of the kind `npm`, of npm; `hashes` are those of its files."""
    address = f"pkg:{kind}/{name.lower() if kind == 'pypi' else name.replace('@', '%40')}@{version.replace('+', '%2B')}"
    made: Component = {"type": "library", "bom-ref": address, "name": name, "version": version, "purl": address}
    return made | ({"hashes": list(hashes)} if hashes else {})


def digest(content: str, algorithm: str = "SHA-256") -> Component:
    """A hash as CycloneDX writes it; `content` is hexadecimal."""
    return {"alg": algorithm, "content": content}


def _file(name: str, sha256: str, kind: str) -> Component:
    return {"type": kind, "bom-ref": name, "name": name.removeprefix("input/"), "hashes": [digest(sha256)]}


def _of_hub(reference: str) -> Component:
    """`org/model@commit`."""
    name, _, commit = reference.partition("@")
    address = f"pkg:huggingface/{name}@{commit}"
    kind = "machine-learning-model"
    return {"type": kind, "bom-ref": address, "name": name, "version": commit, "purl": address}
