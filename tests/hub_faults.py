"""What goes wrong between a Hub and its user, for `HubServer.faults`: it is asked before each request.

hub.faults = OneFault("/commit/", Fault("answer lost"))     # the first request of which the path has that
hub.faults = RandomFaults(seed=7)                           # many, of all kinds
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

Kind = Literal[
    "status",  # answers with an error and does nothing
    "late status",  # does what was asked, and answers with an error
    "request cut",  # reads so many bytes of the body, and resets the connection
    "answer cut",  # does what was asked, sends so many bytes of the answer, and resets the connection
    "answer lost",  # does what was asked, and closes the connection
    "no answer",  # does what was asked, and says nothing until the client hangs up
    "trickle",  # does what was asked, and after so many bytes of the answer, sends one in a tenth of a second
    "twice",  # gets the same request twice, as from a proxy that repeats
]


@dataclass(frozen=True)
class Fault:
    """One of them; `after_bytes` of what is cut, `status` and `headers` of what is answered."""

    kind: Kind
    after_bytes: int = 0
    status: int = 500
    headers: Mapping[str, str] = field(default_factory=dict)


class Faults(Protocol):
    """Decides of each request."""

    def __call__(self, method: str, path: str) -> Fault | None: ...


def no_faults(method: str, path: str) -> Fault | None:
    """A Hub as it should be."""
    return None


class OneFault:
    """The first `times` requests whose method and path have a text in them."""

    def __init__(self, text: str, fault: Fault, times: int = 1):
        self._text, self._fault, self._left = text, fault, times
        self._lock = threading.Lock()

    def __call__(self, method: str, path: str) -> Fault | None:
        with self._lock:
            if self._left and self._text in f"{method} {path}":
                self._left -= 1
                return self._fault
        return None


class RandomFaults:
    """A share of all requests, by seed. What was done is in `counts`, by kind."""

    def __init__(self, seed: int, share: float = 0.4):
        self._random = random.Random(seed)
        self._share = share
        self._lock = threading.Lock()
        self._never: tuple[Kind, ...] = ()
        self.counts: Counter[str] = Counter()

    def never(self, *kinds: Kind) -> None:
        """Leave these out."""
        self._never = kinds

    def __call__(self, method: str, path: str) -> Fault | None:
        with self._lock:
            if self._random.random() > self._share:
                return None
            fault = self._any()
            if fault.kind in self._never:
                return None
            self.counts[f"{fault.kind} {fault.status}" if "status" in fault.kind else fault.kind] += 1
            return fault

    def _any(self) -> Fault:
        kinds: tuple[Kind, ...] = ("status", "late status", "request cut", "answer cut", "answer lost", "twice")
        kind = self._random.choices((*kinds, "no answer"), weights=(4, 3, 3, 3, 3, 3, 1))[0]
        status = self._random.choice((408, 429, 500, 502, 503, 504))
        headers = {"Retry-After": "0"} if status in (429, 503) else {}
        return Fault(kind, self._random.choice((0, 1, 17, 100, 1000, 20_000)), status, headers)
