"""Feed the package random bad input, thousands of times, and count what comes of it.

    python scripts/reliability/mutations.py --count 10000 --out build/mutations.jsonl

An input is a file of a work folder (recipe, config, weights, adapter, golden, exported repo), or a request to the
server, with bits, values or tensors changed; `tests/bad/mutated.py` says how. It has a number, and comes out the same
whenever it is made of that number and the seed. Each outcome is a line of the file; what is there is not run again, so
that the run can be stopped and gone on with. Exit status 1 says that something was neither done nor refused in one
line: a traceback, a hang, growth, something left behind, the end of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
PIECE = 1000  # inputs of one process
FINE = ("done", "refused")


def main() -> int:
    """Run what is left of the inputs, and print the figures of all."""
    options = _options()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.worker:
        _work(options)
        return 0
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        places = options.places or Path(folder) / "places"
        _run(options, places)
    found = list(_outcomes(options.out))
    print(_table(found))
    for one in found:
        if one["what"] not in FINE:
            print(f"{one['number']}: {one['what']}: {one['entry']}: {one['file']}: {one['change']}: {one['seen']}")
    return int(any(one["what"] not in FINE for one in found))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000, help="how many inputs")
    parser.add_argument("--begin", type=int, default=0, help="the number of the first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="where outcomes are written, and looked for")
    parser.add_argument("--door", default="", help="only doors that have a text in them: `gemma3`, `run work/repo`")
    parser.add_argument("--places", type=Path, help="a folder that keeps the work folders that are spoiled")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def _run(options: argparse.Namespace, places: Path) -> None:
    """In processes of their own, so that the end of one is an outcome too."""
    while left := _left(options):
        piece = left[:PIECE]
        command = [sys.executable, str(Path(__file__)), "--worker", "--begin", str(piece[0]), "--count"]
        command += [str(piece[-1] - piece[0] + 1), "--seed", str(options.seed), "--out", str(options.out)]
        command += ["--door", options.door]
        done = subprocess.run([*command, "--places", str(places)], check=False, stdout=subprocess.DEVNULL)
        if done.returncode:
            still = _left(options)
            if not still or still[0] < piece[0] or not places.exists():
                raise SystemExit(done.returncode)
            died = {"number": still[0], "entry": "", "file": "", "change": "", "what": "died"}
            _append(options.out, died | {"seen": f"exit status {done.returncode}", "resident_bytes": 0})


def _left(options: argparse.Namespace) -> list[int]:
    known = {one["number"] for one in _outcomes(options.out)}
    return [number for number in range(options.begin, options.begin + options.count) if number not in known]


def _work(options: argparse.Namespace) -> None:
    from bad import mutated, place
    from bad.requests import served

    os.environ.update(HF_HUB_OFFLINE="1", HF_TOKEN="hf_nobody", OMP_NUM_THREADS="1")
    import torch

    from vlm_export.runtime.sessions import Sessions

    torch.set_num_threads(1)
    if options.door:
        mutated.ENTRIES = tuple(entry for entry in mutated.ENTRIES if options.door in f"{entry.command} {entry.place}")
        mutated.REQUESTS = 0.0
    Sessions.__init__.__defaults__ = (1,)
    made = {name: options.places / name for name in place.NAMES}
    for name, folder in made.items():
        if not (folder / "made").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            getattr(place, name)(folder)
            (folder / "made").touch()
    with tempfile.TemporaryDirectory(prefix="mutated-") as work:
        model = served(Path(work) / "served")
        for number in _left(options):
            found = mutated.outcome(number, options.seed, made, model, Path(work))
            _append(options.out, asdict(found) | {"resident_bytes": _resident()})


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _outcomes(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _resident() -> int:
    """The most that this process has had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _table(found: list[dict[str, Any]]) -> str:
    kinds = [*FINE, *sorted({one["what"] for one in found} - {*FINE})]
    counted = Counter((one["entry"], one["what"]) for one in found)
    lines = [f"| door | inputs | {' | '.join(kinds)} |", "|---" * (len(kinds) + 2) + "|"]
    for entry in [*sorted({one["entry"] for one in found}), "all"]:
        numbers = [sum(n for (e, k), n in counted.items() if entry in (e, "all") and k == kind) for kind in kinds]
        lines.append(f"| {entry} | {sum(numbers):,} | {' | '.join(f'{number:,}' for number in numbers)} |")
    most = max((one["resident_bytes"] for one in found), default=0)
    return "\n".join([*lines, "", f"The most that a process had in memory: {most / 1e9:.2f} GB."])


if __name__ == "__main__":
    sys.exit(main())
