"""Push over a bad line, hundreds of times, and compare what the Hub has with what was pushed.

    python scripts/reliability/pushes.py --times 200

The Hub is the tests', on the loopback interface; `tests/faulty_pushes.py` says what is pushed and what goes wrong. The
same seed gives the same pushes and faults, but for the order in which files are uploaded at once. Exit status 1 says
that something was lost, changed, made twice, or never arrived.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from faulty_pushes import soak  # noqa: E402


def main() -> int:
    """Push, and print the figures."""
    parser = argparse.ArgumentParser(description="Push over a bad line, and compare.")
    parser.add_argument("--times", type=int, default=200, help="pushes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of files and faults (default: %(default)s)")
    parser.add_argument("--share", type=float, default=0.4, help="of requests with a fault (default: %(default)s)")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="pushes-") as folder:
        found = soak(Path(folder), options.times, options.seed, options.share)
    figures = {
        "pushes": found.pushes,
        "downloads": found.downloads,
        "requests": found.requests,
        **{f"fault: {kind}": count for kind, count in sorted(found.faults.items())},
        "lines that said `waiting`": found.waits_told,
        "gave up, and were run again": found.run_again,
        "never arrived": len(found.failed),
        "other bytes on the Hub": len(found.differing),
        "commits or pull requests made twice": len(found.twice),
        "lines with the token": len(found.token_shown),
        "seconds": round(time.monotonic() - began),
    }
    print("| | |\n|---|---|")
    for name, value in figures.items():
        print(f"| {name} | {value:,} |")
    for line in found.wrong:
        print(line, file=sys.stderr)
    return bool(found.wrong)


if __name__ == "__main__":
    sys.exit(main())
