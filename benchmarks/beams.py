"""Beam search of vlm_export/js in Node: what k beams cost, beside its greedy search and that of transformers.js.

python benchmarks/beams.py

The repo is the bundled recipe's, exported as captioner. Every run makes as many tokens, with the end of text forbidden
until then, so that every search takes as many steps. A token's time is that between the first and the last, without
image and prefill. Greedy tokens are compared with those of transformers.js, which generates greedily whatever
`num_beams` says.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import harness
from harness import Row

import vlm_export
from vlm_export import bundled, pipeline
from vlm_export.files import Work
from vlm_export.recipe import find_recipe
from vlm_export.wanted import parse
from vlm_export.web.node_runtime import node_home

STOCK = "transformers.js, greedy"
GREEDY = "greedy"
RECIPE = find_recipe(bundled.DEFAULT_RECIPE)
IMAGES = 8

Run = dict[str, Any]


def export(folder: Path, dtype: str) -> Path:
    """The bundled recipe's repo."""
    work = Work(folder / "beams" / dtype)
    if not work.repo.is_dir():
        pipeline.run_merge(RECIPE, work, lambda *_: None)
        pipeline.run_export(RECIPE, work, lambda *_: None, wanted=parse([dtype], "--dtype"), layout="captioner")
    return work.repo


def script(folder: Path) -> Path:
    """`beams.mjs` beside the package, where its imports are found."""
    home = folder / "node"
    shutil.copytree(Path(vlm_export.__file__).parent / "js", home / "js", dirs_exist_ok=True)
    if not (home / "node_modules").is_symlink():
        (home / "node_modules").symlink_to(node_home() / "node_modules")
    return Path(shutil.copy(harness.HERE / "beams.mjs", home))


def run(program: Path, request: Run) -> list[Run]:
    """One process of Node: what it measured of each image."""
    done = subprocess.run(
        ["node", program], input=json.dumps(request), stdout=subprocess.PIPE, encoding="utf-8", check=True
    )
    runs: list[Run] = json.loads(done.stdout)
    return runs


def median(runs: list[Run], what: str) -> float:
    return statistics.median(run[what] for run in runs)


def rows(found: dict[str, list[list[Run]]], beams: dict[str, int]) -> list[Row]:
    """Medians over the rounds, of each the median over the images."""
    token_ms = {name: [median(runs, "token_ms") for runs in rounds] for name, rounds in found.items()}
    greedy_ids = [run["ids"] for run in found[STOCK][0]]
    made = []
    for name, rounds in found.items():
        ratio = harness.median_ratio(token_ms[name], token_ms[GREEDY])
        ids = [run["ids"] for run in rounds[0]]
        made.append(
            {
                "search": name,
                "first token ms": statistics.median(median(runs, "first_token_ms") for runs in rounds),
                "ms a token": statistics.median(token_ms[name]),
                "× greedy": ratio,
                "× greedy, a beam": ratio / beams[name] if beams[name] else None,
                "transformers.js' tokens": f"{sum(map(list.__eq__, ids, greedy_ids))} of {len(ids)}",
            }
        )
    return made


def main() -> None:
    parser = harness.arguments(__doc__, rounds=5)
    parser.add_argument("--beams", type=int, nargs="+", default=[2, 3, 4], help="(2, 3 and 4)")
    parser.add_argument("--tokens", type=int, default=30, help="to generate for each image (%(default)s)")
    parser.add_argument("--dtype", default="fp32", help="of the graphs (%(default)s)")
    parser.add_argument(
        "--repo", type=Path, help="another repo of layout captioner in the place of the bundled recipe's"
    )
    options = parser.parse_args()
    beams = {STOCK: 0, GREEDY: 1} | {f"{number} beams": number for number in options.beams}
    with harness.workspace(options.keep) as folder:
        repo = options.repo or export(folder, options.dtype)
        images = sorted((RECIPE.golden_dir / "images").glob("*.png"))[:IMAGES]
        request = {
            "repo": str(repo.absolute()),
            "dtype": options.dtype,
            "tokens": options.tokens,
            "images": [str(path.absolute()) for path in images],
        }
        program = script(folder)
        candidates = {name: partial(run, program, request | {"beams": number}) for name, number in beams.items()}
        found = harness.alternating(options.rounds, candidates)
    harness.report("beams", rows(found, beams), rounds=options.rounds, tokens=options.tokens, dtype=options.dtype)


if __name__ == "__main__":
    main()
