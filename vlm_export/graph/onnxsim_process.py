"""onnxsim in a process of its own, which a time budget can end."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import IO

# onnxsim tries for PPQ, which imports torch: a second to load and half of one to leave; and for sympy, half a second,
# which counts operations. Neither is used here.
_SIMPLIFY = """
import os, sys
sys.modules["torch"] = sys.modules["sympy"] = None
import onnx, onnxsim
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
while source := sys.stdin.readline().rstrip():
    target, answer = sys.stdin.readline().rstrip(), "done"
    try:
        onnx.save(onnxsim.simplify(source)[0], target)
    except Exception as error:
        answer = " ".join(f"{type(error).__name__}: {error}".split())
    print(answer, file=answers, flush=True)
os._exit(0)
"""


class Onnxsim:
    """The process: it simplifies one graph after another, and ends with the context.

    It is started beside the tracing that comes before, since its imports take half a second.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._answers: SimpleQueue[str] = SimpleQueue()
        self._errors: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed on leaving

    def __enter__(self) -> Onnxsim:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._errors.close()

    def start(self) -> subprocess.Popen[str]:
        """The process, started unless it runs."""
        if self._process is None or self._process.poll() is not None:
            self._stop()
            self._process = subprocess.Popen(
                [sys.executable, "-c", _SIMPLIFY],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
            )
            self._answers = SimpleQueue()
            Thread(target=_pass_on, args=(self._process.stdout, self._answers), daemon=True).start()
        return self._process

    def run(self, source: Path, target: Path, seconds: float) -> str:
        """Simplify one file into another. Returns what went wrong, if anything did."""
        process = self.start()
        assert process.stdin is not None
        try:
            process.stdin.write(f"{source}\n{target}\n")
            process.stdin.flush()
            answer = self._answers.get(timeout=seconds)
        except BrokenPipeError:
            answer = ""
        except Empty:
            self._stop()
            return f"took more than {seconds:g} s"
        if answer == "done" and target.is_file():
            return ""
        if answer in ("", "done"):  # it died
            status = process.wait()
            self._errors.seek(0)
            answer = (self._errors.read().strip() or f"exit status {status}").splitlines()[-1]
        return answer

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _pass_on(lines: IO[str], queue: SimpleQueue[str]) -> None:
    """Put every line of a stream into a queue, and an empty one at its end: a queue can be read with a timeout."""
    try:
        for line in lines:
            queue.put(line.strip())
    except ValueError:  # closed
        pass
    queue.put("")
