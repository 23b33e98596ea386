"""A limit in time for one run of a graph: a loop in it need not end, and ONNX Runtime has no limit of its own.

It looks between two nodes, those within loops included, whether it is to stop. One thread, which begins with the first
run, sets that for all runs of the process that are past their time.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import onnxruntime

from vlm_export.errors import InputError

RUN_SECONDS = 1800.0  # the longest seen is a float32 prefill of 7 billion weights on two cores, in minutes


class _Watch:
    """Runs, and when each must have ended."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._ends: dict[onnxruntime.RunOptions, float] = {}
        self._looks = math.inf  # when the thread looks next
        self._thread: threading.Thread | None = None

    def begin(self, run: onnxruntime.RunOptions, end: float) -> None:
        with self._changed:
            self._ends[run] = end
            if self._thread is None:
                self._thread = threading.Thread(target=self._look, name="run limit", daemon=True)
                self._thread.start()
            if end < self._looks:
                self._changed.notify()

    def over(self, run: onnxruntime.RunOptions) -> None:
        with self._changed:
            self._ends.pop(run, None)

    def _look(self) -> None:
        with self._changed:
            while True:
                now = time.monotonic()
                for run in [run for run, end in self._ends.items() if end <= now]:
                    run.terminate = True
                    del self._ends[run]
                self._looks = min(self._ends.values(), default=math.inf)
                self._changed.wait(None if math.isinf(self._looks) else self._looks - now)


_WATCH = _Watch()


@contextmanager
def limited(component: str, seconds: float) -> Iterator[onnxruntime.RunOptions]:
    """Options for one run of a component's graph, which ends it after so many seconds.

    Raises:
        InputError: in place of what ONNX Runtime raises then.
    """
    run = onnxruntime.RunOptions()
    run.log_severity_level = 4  # the error is raised too
    _WATCH.begin(run, time.monotonic() + seconds)
    try:
        yield run
    except Exception as error:
        if run.terminate:
            raise InputError(
                f"{component}: one run of the graph took more than {seconds:,g} s, and was ended: ask for less, or do "
                "not trust the graph"
            ) from error
        raise
    finally:
        _WATCH.over(run)
