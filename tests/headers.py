"""Headers of ONNX Runtime's C and C++ API, which its Python package leaves out.

They are MIT-licensed, as their first lines say, and taken from a package of npm for Unity that has them among 150 MB of
libraries; that is downloaded once, its hash pinned, and the headers alone are kept, in the user's cache. A library
takes the headers of older releases, so that the version here need not be its own.
"""

from __future__ import annotations

import base64
import hashlib
import subprocess
import tarfile
import tempfile
from pathlib import Path

from vlm_export.atomic import new_folder
from vlm_export.files import cache_folder

NAME, VERSION = "com.github.asus4.onnxruntime", "0.4.9"
SHA512 = "BkzxduSZ9IkeDP6Q8lz2TFU2ie7hSSvS7ZIfzMooExoq0CNzJnuuGaUJ7IsojBgqO4ouD1jXah8OYyJbCN29Fg=="
HEADERS = "package/Plugins/iOS~/onnxruntime.xcframework/ios-arm64/onnxruntime.framework/Headers/"


def onnxruntime_headers() -> Path:
    """The folder that holds `onnxruntime_cxx_api.h` and what that includes."""
    home = cache_folder() / f"onnxruntime-headers-{VERSION}"
    if not home.is_dir():
        with new_folder(home) as staging, tempfile.TemporaryDirectory() as folder:
            if staging is not None:
                _fill(staging, Path(folder))
    return home


def _fill(staging: Path, folder: Path) -> None:
    subprocess.run(["npm", "pack", "--silent", f"{NAME}@{VERSION}"], cwd=folder, check=True, capture_output=True)
    [archive] = folder.glob("*.tgz")
    assert base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode() == SHA512
    with tarfile.open(archive) as packed:
        for member in packed:
            if member.isfile() and member.name.startswith(HEADERS) and member.name.endswith(".h"):
                content = packed.extractfile(member)
                assert content is not None
                (staging / Path(member.name).name).write_bytes(content.read())
