"""What an earlier verification found of the same graphs, in the same runtime, by the same code: it holds still.

Only what passed is taken over: what failed is looked at anew, since its causes may lie outside the files.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

from vlm_export.dtypes import FP32
from vlm_export.files import file_hashes, read_json, sha256
from vlm_export.manifest import MANIFEST, ONNX
from vlm_export.targets import Target
from vlm_export.verify import limits
from vlm_export.verify.report import Check, Report
from vlm_export.verify.verification import Verification

_PACKAGE = Path(__file__).parents[1]
_VERSIONS = ("onnxruntime", "torch", "transformers", "numpy", "pillow")
_WRITTEN_BY_VERIFY = (MANIFEST, "README.md", "quality.svg")
_CONFIG, _DEVICES = "config.json", "transformers.js_config"  # the latter says which dtypes passed
# Of the repo's own files, which are looked at every time.
_OF_FILES = (limits.ENDS, limits.PROMPT_IDS, limits.PIXELS, limits.PIXELS_IN_GRAPH)


@dataclass(frozen=True)
class Reuse:
    """An earlier report, and what this verification's parts depend on.

    Attributes:
        run: this verification.
        earlier: the report, if there is one.
        digests: sha256 of every file in onnx/, by name.
    """

    run: Verification
    earlier: Report | None
    digests: Mapping[str, str]

    @classmethod
    def of(cls, run: Verification, earlier: Report | None) -> Reuse:
        """With the files' digests, read once."""
        return cls(run, earlier, {path.name: sha256(path) for path in sorted((run.repo / ONNX).iterdir())})

    def take(self, dtypes: Sequence[str], target: Target, versions: Mapping[str, str]) -> list[str]:
        """Take over what was found of dtypes in a runtime of these versions. Returns the dtypes that are left to do.

        In ONNX Runtime float32 comes along with any other: those are compared with it.
        """
        left = [dtype for dtype in dtypes if not self._holds(dtype, target, versions)]
        if left and target == "ort" and FP32.name in dtypes:
            left = [dtype for dtype in dtypes if dtype in (*left, FP32.name)]
        for dtype in dtypes:
            if dtype not in left:
                self._take(dtype, target)
        return left

    def done(self, dtype: str, target: Target, versions: Mapping[str, str]) -> None:
        """Note what a part that was looked at now depends on."""
        self.run.fingerprints[_key(dtype, target)] = self._fingerprint(dtype, versions)

    def _holds(self, dtype: str, target: Target, versions: Mapping[str, str]) -> bool:
        found = self._checks(dtype, target)
        same = self.earlier and self.earlier.fingerprints.get(_key(dtype, target)) == self._fingerprint(dtype, versions)
        return bool(same and found) and all(check.verdict not in ("fail", "left-out") for check in found)

    def _take(self, dtype: str, target: Target) -> None:
        earlier, key = self.earlier, _key(dtype, target)
        assert earlier is not None
        self.run.checks += self._checks(dtype, target)
        self.run.captions += [each for each in earlier.captions if (each.dtype, each.runtime) == (dtype, target)]
        self.run.from_files += [each for each in earlier.from_files if (each.dtype, each.runtime) == (dtype, target)]
        self.run.versions |= {name: of for name, of in earlier.versions.items() if name.startswith(f"{target}: ")}
        self.run.fingerprints[key] = earlier.fingerprints[key]
        self.run.reused.append(key)

    def _checks(self, dtype: str, target: Target) -> list[Check]:
        checks = self.earlier.checks if self.earlier else []
        own = (check for check in checks if (check.dtype, check.runtime) == (dtype, target))
        return [check for check in own if target != "ort" or check.metric not in _OF_FILES]

    def _fingerprint(self, dtype: str, versions: Mapping[str, str]) -> str:
        run = self.run
        names = {*run.dtypes_of(dtype), FP32.name}
        files = tuple(graph.file for graph in run.manifest.graphs if graph.dtype in names)
        facts = {
            "code": _code(),
            "versions": {name: version(name) for name in _VERSIONS} | dict(versions),
            "machine": (platform.platform(), platform.processor()),
            "graphs": {name: digest for name, digest in self.digests.items() if name.startswith(files)},
            "files": _files(run.repo),
            "golden": [sha256(path) for path in sorted(run.golden.path.glob("golden.*"))],
            "inputs": run.manifest.inputs_sha256,
            "tolerances": repr(run.tolerances),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _key(dtype: str, target: Target) -> str:
    return f"{dtype} in {target}"


@cache
def _code() -> dict[str, str]:
    """Digests of this package's own files."""
    return {name: digest for name, digest in file_hashes(_PACKAGE).items() if not name.endswith(".pyc")}


def _files(repo: Path) -> dict[str, str]:
    """Digests of what a client reads beside the graphs."""
    paths = [path for path in sorted(repo.iterdir()) if path.is_file() and path.name not in _WRITTEN_BY_VERIFY]
    found = {path.name: sha256(path) for path in paths}
    config = {key: value for key, value in read_json(repo / _CONFIG).items() if key != _DEVICES}
    return found | {_CONFIG: json.dumps(config, sort_keys=True)}
