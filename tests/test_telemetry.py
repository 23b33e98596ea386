"""ONNX Runtime reports to its maker from the moment that it is imported. From our processes it does not."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnxruntime
import pytest
from node_repo import write_repo
from PIL import Image

from vlm_export.files import cache_folder

COMMAND = Path(sys.executable).with_name("vlm-export")
COLLECTOR = b"mobile.events.data.microsoft.com:443"
LONGEST_SECONDS = 60  # a process was seen to call after 9
LATER_SECONDS = 2
ALONE = "import onnxruntime"
OURS = "from vlm_export import load"
WAITING = "; import sys; sys.stdin.read()"
EXPORT = """
from pathlib import Path
import vlm_export.quantize.variants, vlm_export.verify.verify
from vlm_export.graph.onnxsim_process import Onnxsim
Onnxsim().run(Path("a"), Path("b"), 60)
"""
BENCH = """
import sys
from pathlib import Path
from vlm_export.measure import bench
if __name__ == "__main__":
    bench.WARM_UP_SECONDS = bench.MEASURED_SECONDS = 0.0
    done = bench.bench(Path(sys.argv[1]), [Path(sys.argv[2])], new_tokens=2, rounds=1, threads=1)
    assert [row.runtime for row in done.rows if row.failure is None] == ["ort", "node", "wasm"], done.failures
"""

telemetry = pytest.mark.skipif(
    not any(
        b"OneCollector" in library.read_bytes()
        for library in Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so*")
    ),
    reason="this build of ONNX Runtime holds no telemetry that could be seen",
)


def environment(home: Path, **more: str) -> dict[str, str]:
    """Of a user who set nothing: no CI, in which ONNX Runtime is silent by itself, and a home of their own."""
    (home / "tmp").mkdir(parents=True)
    return {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join(sys.path),
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / "cache"),
        "TMPDIR": str(home / "tmp"),
        "VLM_EXPORT_CACHE": str(cache_folder()),
        **more,
    }


def left_by_telemetry(home: Path) -> list[str]:
    """What it keeps for its next report: it is there as soon as it has started."""
    return sorted(path.name for path in home.rglob("*") if path.name in ("deviceid", "onnxruntime.db", ".ses"))


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_repo(tmp_path_factory.mktemp("repo"), "captioner")


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "0.png"
    Image.new("RGB", (64, 64)).save(path)
    return path


@telemetry
def test_without_us_it_starts_at_the_import(tmp_path: Path) -> None:
    """What the other tests look for is really left where nothing stops it, in Python and in Node."""
    subprocess.run([sys.executable, "-c", ALONE], env=environment(tmp_path / "python"), check=True)
    assert left_by_telemetry(tmp_path / "python") == [".ses", "deviceid", "onnxruntime.db"]
    modules = next(cache_folder().glob("node-*/node_modules/onnxruntime-node/dist/index.js"), None)
    if modules is None:
        pytest.skip("of Node: the packages are not installed yet")
    code = f"require({str(modules)!r}).InferenceSession.create(new Uint8Array(1)).catch(() => 0)"
    subprocess.run(["node", "-e", code], env=environment(tmp_path / "node"), check=True)
    assert "deviceid" in left_by_telemetry(tmp_path / "node")


@telemetry
@pytest.mark.parametrize(
    ("code", "asked_for"), [(OURS, {}), (OURS, {"ORT_DISABLE_TELEMETRY": "0"}), (EXPORT, {})], ids=["", "on", "export"]
)
def test_with_us_it_never_starts(code: str, asked_for: dict[str, str], tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", code], env=environment(tmp_path / "home", **asked_for), check=True)
    assert left_by_telemetry(tmp_path / "home") == []


@telemetry
def test_nor_in_the_command(repo: Path, picture: Path, tmp_path: Path) -> None:
    command = [str(COMMAND), "run", str(repo), str(picture), "--dtype", "fp32"]
    subprocess.run(command, env=environment(tmp_path / "home"), check=True)
    assert left_by_telemetry(tmp_path / "home") == []


@telemetry
def test_nor_in_the_processes_of_bench(repo: Path, picture: Path, tmp_path: Path) -> None:
    """One of Python, one of Node, one of WASM in Node."""
    script = tmp_path / "measure.py"
    script.write_text(BENCH)
    subprocess.run([sys.executable, script, repo, picture], env=environment(tmp_path / "home"), check=True)
    assert left_by_telemetry(tmp_path / "home") == []


@contextmanager
def idling(code: str, home: Path) -> Iterator[socket.socket]:
    """A process that runs this and then waits, and the proxy that it would go through to reach anybody."""
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        settings = environment(home, https_proxy=address, http_proxy=address)
        process = subprocess.Popen([sys.executable, "-c", code + WAITING], env=settings, stdin=subprocess.PIPE)
        try:
            yield proxy
            assert process.poll() is None, "it ended before it could call"
        finally:
            process.communicate()


@telemetry
def test_nobody_is_called(tmp_path: Path) -> None:
    """Of two processes, by the time that one reached for the collector, and a while later, ours reached for nobody."""
    with idling(ALONE, tmp_path / "alone") as to_collector, idling(OURS, tmp_path / "ours") as to_nobody:
        to_collector.settimeout(LONGEST_SECONDS)
        with to_collector.accept()[0] as calling:
            assert calling.recv(4096).startswith(b"CONNECT " + COLLECTOR)
        to_nobody.settimeout(LATER_SECONDS)
        with pytest.raises(TimeoutError):
            to_nobody.accept()
