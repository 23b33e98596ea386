"""Convert the captioner of real size with the commands that a user types, and say what each dtype costs.

    python recipes/real-captioner/prove.py                 # `make real`: the 32 pictures beside this file
    python recipes/real-captioner/prove.py --images 300    # so many held-out scenes, drawn anew; more downloads
    python recipes/real-captioner/prove.py --record        # draws the 32, and writes what PyTorch says of them

Assembles the checkpoint, records PyTorch's captions, merges, exports, verifies in ONNX Runtime and in transformers.js,
and measures. What is made of it lands in build/real-captioner, the goldens in golden/ beside the recipe. The status is
0 if verify passed, and if PyTorch's captions are those that `captions.json` has.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import assemble
import click
import scenes
import yaml
from rich.console import Console
from rich.table import Table
from tower import IMAGE_SIZE

from vlm_export.files import Work, read_json, write_json
from vlm_export.manifest import load_manifest
from vlm_export.measure import bench_table
from vlm_export.recipe import RecipeFile, load_recipe
from vlm_export.verify import limits
from vlm_export.verify.golden import Golden, GoldenFolder, load_golden
from vlm_export.verify.report import REPORT

ROOT = assemble.HERE.parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import quality  # noqa: E402

RECIPE, CAPTIONS = assemble.HERE / "recipe.yaml", assemble.HERE / "captions.json"
BUILD = ROOT / "build"
RUNTIMES = {"ort": "ONNX Runtime", "node": "Node", "wasm": "WASM"}
NEW_TOKENS = 20
RECORDED = 32


@dataclass(frozen=True)
class Proof:
    """What the commands left."""

    recipe: RecipeFile
    work: Work
    golden: GoldenFolder
    report: Mapping[str, Any]
    benchmark: Mapping[str, Any]


def held_out_recipe(count: int) -> Path:
    """The recipe with so many held-out scenes in place of its pictures, drawn beside it."""
    folder = BUILD / f"real-captioner-{count}"
    draw_pictures(folder / "images", count)
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    recipe |= {"model": str(assemble.CHECKPOINT), "golden": {"images": ["images/*.png"]}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return folder / "recipe.yaml"


def convert(recipe: Path, rounds: int) -> Proof:
    """golden, merge, onnx, verify, bench."""
    work = Work(BUILD / recipe.parent.name)
    command("golden", recipe)
    command("merge", recipe, "--work", work.root)
    command("onnx", recipe, "--work", work.root)
    command("verify", recipe, "--work", work.root, may_fail=True)
    runtimes = [f"--runtime={runtime}" for runtime in RUNTIMES]
    options = [*runtimes, f"--new-tokens={NEW_TOKENS}", f"--rounds={rounds}", "--json"]
    image = min((recipe.parent / "images").iterdir())
    benchmark = json.loads(command("bench", work.repo, f"--image={image}", *options, may_fail=True))
    loaded = load_recipe(recipe)
    golden = load_golden(loaded.golden_dir)
    return Proof(loaded, work, golden, read_json(work.report / REPORT), benchmark)


def command(*arguments: str | Path, may_fail: bool = False) -> str:
    """Run one of vlm-export, shown as it is typed; what `--json` prints is returned."""
    click.echo(f"\n$ vlm-export {' '.join(str(argument) for argument in arguments)}", err=True)
    tool = Path(sys.executable).with_name("vlm-export")
    out = subprocess.PIPE if "--json" in arguments else sys.stderr
    done = subprocess.run([tool, *arguments], stdout=out, text=True, check=not may_fail)
    return done.stdout or ""


def rows(proof: Proof) -> Iterator[list[str]]:
    """A line of the table for each dtype."""
    manifest = load_manifest(proof.work.repo)
    passages = quality.read_captions(proof.work.merged, proof.golden)
    measured = {(row["dtype"], row["runtime"]): row for row in proof.benchmark["rows"]}
    for dtype in manifest.dtypes:
        found = quality.measure(proof.work.repo, dtype, passages)
        size = sum(graph.size_bytes for graph in manifest.graphs if graph.dtype == dtype)
        yield [
            dtype,
            bench_table.megabytes(size),
            *(equal_captions(proof, dtype, runtime) for runtime in ("ort", "node")),
            f"{found.kl:.1e}",
            f"{found.top1:.1%}",
            *(speed(measured[dtype, runtime]) for runtime in RUNTIMES),
        ]


def equal_captions(proof: Proof, dtype: str, runtime: str) -> str:
    """How many captions have exactly PyTorch's tokens; in Node those made from the picture files, too."""
    metrics = [limits.TOKENS_EXACT, *([limits.FROM_FILE_EXACT] if runtime == "node" else [])]
    values = {
        check["metric"]: check["value"]
        for check in proof.report["checks"]
        if (check["dtype"], check["runtime"]) == (dtype, runtime) and check["metric"] in metrics
    }
    count = len(proof.golden.facts.images)
    return " · ".join(f"{round(values[metric] * count)} of {count}" for metric in metrics if metric in values)


def speed(row: Mapping[str, Any]) -> str:
    """First token and rate, or why there are none."""
    if row["failure"]:
        return str(row["failure"])
    return f"{bench_table.duration(row['first_token_seconds'])} · {row['tokens_per_second']:.1f}/s"


def right(facts: Golden, expected: Sequence[str]) -> int:
    """How many of PyTorch's captions say what the picture shows, letter for letter."""
    return sum(image.caption == caption for image, caption in zip(facts.images, expected, strict=True))


def draw_pictures(folder: Path, count: int) -> None:
    """The first held-out scenes, as many pixels high and wide as the tower takes."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(count):
        path = folder / f"{seed:03}.png"
        if not path.is_file():
            scenes.draw(scenes.held_out_scene(seed), IMAGE_SIZE).save(path)


def as_recorded(facts: Golden) -> bool:
    """Whether PyTorch says here what it said where `captions.json` was written; prints what differs."""
    recorded = json.loads(CAPTIONS.read_text(encoding="utf-8"))
    different = [image.file for image in facts.images if recorded[image.file] != image.caption]
    if different:
        click.echo(f"{CAPTIONS}: PyTorch says something else here of {', '.join(different)}", err=True)
    return not different


@click.command(help=__doc__)
@click.option("--images", "count", type=int, help="So many held-out scenes in place of the recorded pictures.")
@click.option("--record", is_flag=True, help="Draw the pictures and write captions.json.")
@click.option("--rounds", default=1, show_default=True, help="Of the speed.")
def main(count: int | None, record: bool, rounds: int) -> None:
    assemble.checkpoint()
    if record:
        draw_pictures(RECIPE.parent / "images", RECORDED)
    recipe = held_out_recipe(count) if count else RECIPE
    proof = convert(recipe, rounds)
    facts = proof.golden.facts
    if record:
        write_json(CAPTIONS, {image.file: image.caption for image in facts.images})
    expected = [scenes.held_out_scene(int(Path(image.file).stem)).caption for image in facts.images]
    heads = ["dtype", "size", "captions as PyTorch: ONNX Runtime", "Node", "KL", "top-1", *RUNTIMES.values()]
    table = Table(*heads, title="first token · tokens a second in the last three columns")
    for row in rows(proof):
        table.add_row(*row)
    console = Console(width=max(Console().width, 160))  # whole, in a log too
    console.print(table)
    console.print(f"PyTorch's captions: {right(facts, expected)} of {len(expected)} exactly right")
    same = count is not None or as_recorded(facts)
    sys.exit(0 if same and proof.report["verdict"] == "pass" else 1)


if __name__ == "__main__":
    main()
