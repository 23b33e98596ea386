"""Write the bill of materials of this package: what `requirements/tested.txt` and its lock files of npm pin.

python scripts/sbom.py dist/sbom.cdx.json
"""

from __future__ import annotations

import base64
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlm_export import __version__
from vlm_export.files import write_json
from vlm_export.publish.sbom import Component, digest, document, library

ROOT = Path(__file__).parents[1]
LOCKS = ("vlm_export/node/package-lock.json", "vlm_export/browser/package-lock.json")  # what the package starts


def main() -> int:
    """Write it to the file that is named."""
    write_json(Path(sys.argv[1]), of_package())
    return 0


def of_package() -> dict[str, Any]:
    """Of the package in its tested set."""
    npm = {part["bom-ref"]: part for lock in LOCKS for part in of_lock(ROOT / lock)}
    subject = {"type": "application", "bom-ref": "vlm-export", "name": "vlm-export", "version": __version__}
    licence = {"licenses": [{"license": {"id": "Apache-2.0"}}]}
    return document(subject | licence, [*of_requirements(ROOT / "requirements" / "tested.txt"), *npm.values()])


def of_requirements(path: Path) -> Iterator[Component]:
    """The packages of a file of requirements with hashes; a package has several files, any of which may be meant."""
    for line in path.read_text(encoding="utf-8").replace("\\\n", "").splitlines():
        if pinned := re.match(r"([A-Za-z0-9._-]+)==([^\s;]+)", line):
            found = re.findall(r"--hash=sha256:([0-9a-f]{64})", line)
            yield library(pinned[1], pinned[2], hashes=[digest(one) for one in found])


def of_lock(path: Path) -> Iterator[Component]:
    """The packages of a lock file of npm."""
    for place, package in json.loads(path.read_text(encoding="utf-8"))["packages"].items():
        if place:
            name = place.rpartition("node_modules/")[2]
            algorithm, _, content = package["integrity"].partition("-")
            found = digest(base64.b64decode(content).hex(), algorithm.upper().replace("SHA", "SHA-"))
            yield library(name, package["version"], kind="npm", hashes=[found])


if __name__ == "__main__":
    sys.exit(main())
