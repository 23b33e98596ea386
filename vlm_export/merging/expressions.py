"""Regular expressions of an adapter's settings, which anybody may have written: whether they end.

Python's take time that doubles with each character of a name where repetitions stand in repetitions, and nothing but
the end of a process stops them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Collection, Iterable
from pathlib import Path

from vlm_export.errors import InputError, shown

LONGEST_EXPRESSION = 10_000  # characters
_SECONDS = 3  # for all names of a model together; usual ones take milliseconds
_REPEATS = re.compile(r"[*+?{]")
_PROGRAM = """
import json, re, sys
expressions, names = json.load(sys.stdin)
for number, expression in enumerate(expressions):
    print(number, flush=True)
    compiled = [re.compile(expression), re.compile(rf"(.*\\.)?({expression})$")]
    for name in names:
        for each in compiled:
            each.fullmatch(name) or each.match(name)
"""


def check_end(source: Path, expressions: Iterable[tuple[str, str]], names: Collection[str]) -> None:
    """Raises InputError where an expression, of the setting that is given with it, does not end for these names.

    PEFT compares so: a name with the whole expression, or what follows one of its dots.
    """
    repeating = [(key, each) for key, each in expressions if len(_REPEATS.findall(each)) > 1]
    if not repeating:
        return
    program = [sys.executable, "-I", "-c", _PROGRAM]
    asked = json.dumps([[each for _, each in repeating], sorted(names)])
    try:
        subprocess.run(program, input=asked, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        begun = (error.stdout or b"0").split()
        key, expression = repeating[int(begun[-1]) if begun else 0]
        raise InputError(
            f"{source}: {key}: {shown(expression)} takes more than {_SECONDS} s: "
            "leave repetitions of repetitions out, or list the names"
        ) from None
