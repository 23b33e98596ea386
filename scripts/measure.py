"""Wall time and peak memory of merge, onnx and verify on the bundled captioner: the figures of the README.

python scripts/measure.py       # medians of three runs, in a folder of its own
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing import Process, Queue

COMMANDS = ("merge", "onnx --quantize int8 --retrace", "onnx --quantize int8", "verify")
RUNS = 3


def main() -> None:
    """Print a Markdown table."""
    print("| command | wall time | peak memory |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for command in COMMANDS:
            runs = [_measure(command, folder) for _ in range(RUNS)]
            seconds, mib = (statistics.median(column) for column in zip(*runs, strict=True))
            print(f"| `vlm-export {command}` | {seconds:.1f} s | {mib:.0f} MiB |", flush=True)


def _measure(command: str, folder: str) -> tuple[float, float]:
    """Seconds and MiB of one run. A process in between, because the peak is kept of all children that ever ended."""
    results: Queue[tuple[float, float]] = Queue()
    process = Process(target=_run, args=(command, folder, results))
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(process.exitcode)
    return results.get()


def _run(command: str, folder: str, results: Queue[tuple[float, float]]) -> None:
    started = time.monotonic()
    environ = os.environ | {"VLM_EXPORT_STRUCTURES": f"{folder}/structures"}
    subprocess.run(["vlm-export", *command.split()], cwd=folder, env=environ, stdout=subprocess.DEVNULL, check=True)
    peak_kib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    results.put((time.monotonic() - started, peak_kib / 1024))


if __name__ == "__main__":
    main()
