"""vlm-export bench: every figure is there and holds together. What they are is the machine's business."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from exported import Exported, prepare
from hub_server import TOKEN, HubServer, environment

from vlm_export import bundled, pipeline
from vlm_export.errors import CheckFailed, InputError
from vlm_export.files import file_hashes
from vlm_export.graph import graph_file
from vlm_export.measure import bench, bench_table
from vlm_export.publish import gate
from vlm_export.recipe import find_recipe
from vlm_export.runtime.repo import Repo

COMMAND = Path(sys.executable).with_name("vlm-export")
RECIPE = find_recipe(bundled.DEFAULT_RECIPE)
FEW: dict[str, Any] = {"new_tokens": 4, "rounds": 1, "threads": 1}


@pytest.fixture(autouse=True)
def _short_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "WARM_UP_SECONDS", 0.0)
    monkeypatch.setattr(bench, "MEASURED_SECONDS", 0.0)


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Merged and recorded, to be copied."""
    return prepare(tmp_path_factory.mktemp("pico"))


@pytest.fixture(scope="module")
def exported(pico: Exported, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The same, exported in fp32 and fp16."""
    made = pico.copy(tmp_path_factory.mktemp("exported"))
    made.export(dtypes=["fp16"])
    return made


def vlm_export(*arguments: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(COMMAND), *arguments], cwd=cwd, env=os.environ | environ, capture_output=True, text=True, check=False
    )


def test_every_runtime_and_dtype(default_repo: Path) -> None:
    images = bench.images_of(RECIPE)
    steps: list[tuple[str, int, int]] = []
    done = bench.bench(default_repo, images[:2], **FEW, progress=lambda *step: steps.append(step))

    pairs = [(runtime, dtype) for runtime in ("ort", "node", "wasm") for dtype in ("fp32", "q8")]
    assert [(row.runtime, row.dtype) for row in done.rows] == pairs
    assert steps == [(f"{runtime} {dtype}", place, 6) for place, (runtime, dtype) in enumerate(pairs)]
    for row in done.rows:
        assert row.failure is None
        assert row.threads == 1
        assert row.graph_bytes == sum(
            path.stat().st_size
            for path in (default_repo / "onnx").iterdir()
            if path.stem.endswith("_quantized") == (row.dtype == "q8")
        )
        for figure in (row.load_seconds, row.first_token_seconds, row.tokens_per_second):
            assert figure is not None and figure > 0
        assert row.tokens_per_second_range == (row.tokens_per_second, row.tokens_per_second)
        assert row.first_token_seconds is not None and row.first_token_seconds < 30
        assert row.peak_memory_bytes is not None and 40e6 < row.peak_memory_bytes < 2e9
    assert (done.images, done.new_tokens, done.rounds) == (["00.png", "01.png"], 4, 1)
    assert {name: set(versions) for name, versions in done.versions.items()} == {
        "ort": {"ONNX Runtime", "Python"},
        "node": {"transformers.js", "onnxruntime-node", "Node"},
        "wasm": {"transformers.js", "onnxruntime-web", "Node"},
    }
    assert done.machine["cpu"] and done.machine["cpus"] == os.cpu_count()
    hashes = file_hashes(default_repo)
    assert {f"onnx/{name}": digest for name, digest in done.graphs_sha256.items()}.items() <= hashes.items()
    assert len(done.graphs_sha256) == 4

    markdown = bench_table.markdown(asdict(done)).splitlines()
    table = [line for line in markdown if line.startswith("|")]
    assert [line.split(" | ")[:2] for line in table[2:]] == [[f"| {runtime}", dtype] for runtime, dtype in pairs]
    assert any(line.startswith("- wasm: ") and "in Node" in line and "1 thread" in line for line in markdown)


def test_peak_memory_is_that_of_a_process_of_its_own(default_repo: Path) -> None:
    """Not of this one, which holds torch and, for a moment, 1 GB more."""
    ballast = bytearray(b"x") * (1 << 30)
    done = bench.bench(default_repo, bench.images_of(None)[:1], runtimes=["ort", "node"], dtypes=["q8"], **FEW)
    assert bench.peak_memory_bytes() > len(ballast)
    assert all(row.peak_memory_bytes is not None and row.peak_memory_bytes < 400e6 for row in done.rows)


def test_medians_of_rounds(monkeypatch: pytest.MonkeyPatch, default_repo: Path) -> None:
    """The candidates take turns, and one bad round is not seen."""
    seen = []

    def sample(job: bench.Job) -> bench.Sample:
        seen.append(job.dtype)
        slow = 100.0 if len(seen) < 3 else 1.0
        return bench.Sample(slow, slow, 1 / slow, int(slow), {"ONNX Runtime": "1"})

    monkeypatch.setattr(bench, "_in_python", sample)
    done = bench.bench(default_repo, bench.images_of(None), runtimes=["ort"], rounds=3)
    assert seen == ["fp32", "q8"] * 3
    assert [(row.load_seconds, row.tokens_per_second, row.peak_memory_bytes) for row in done.rows] == [(1, 1, 1)] * 2
    assert done.rows[0].tokens_per_second_range == (0.01, 1)
    notes = bench_table.markdown(asdict(done))
    assert "the rounds differ, as on a busy machine (tok/s): ort fp32 0.01 to 1, ort q8 0.01 to 1" in notes


def test_a_chat_layout_with_external_data_in_every_runtime(
    pico: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = partial(graph_file.save_graph, inline_bytes=0, chunk_bytes=20_000)
    monkeypatch.setattr(pipeline, "save_graph", save)
    made = pico.copy(tmp_path)
    made.export("chat")
    assert len(list((made.work.repo / "onnx").glob("decoder_model_merged.onnx_data*"))) > 1
    image = next((tmp_path / "images").glob("*.png"))
    done = bench.bench(made.work.repo, [image], prompt="a cat", **FEW)
    assert [(row.runtime, row.failure) for row in done.rows] == [("ort", None), ("node", None), ("wasm", None)]
    assert {row.graph_bytes for row in done.rows} == {
        sum(path.stat().st_size for path in (made.work.repo / "onnx").iterdir())
    }
    assert "asked 'a cat', 4 new tokens" in bench_table.markdown(asdict(done))
    with pytest.raises(InputError, match="no q8; it has fp32"):
        bench.bench(made.work.repo, [image], dtypes=["q8"])


def test_a_layout_that_transformers_js_does_not_load() -> None:
    components = Repo(Path(), {"config.json": {"model_type": "prefix_conditioning_vlm"}}, "mine")
    assert components.layout == "components"
    assert bench.loadable(components, []) == ["ort"]
    with pytest.raises(InputError, match=r"mine: transformers\.js does not load the layout components: use --runtime"):
        bench.loadable(components, ["wasm"])


def test_a_dtype_that_does_not_run_has_a_line_that_says_so(exported: Exported, tmp_path: Path) -> None:
    made = exported.copy(tmp_path)
    graph = made.work.repo / "onnx" / "decoder_model_merged_fp16.onnx"
    graph.write_bytes(graph.read_bytes()[:-3000])
    image = bench.images_of(None)[:1]
    done = bench.bench(made.work.repo, image, runtimes=["ort", "node"], new_tokens=3, rounds=1)
    assert [(row.runtime, row.dtype) for row in done.failures] == [("ort", "fp16"), ("node", "fp16")]
    lines = bench_table.markdown(asdict(done)).splitlines()
    assert [line.split()[1] for line in lines if "fp16 failed: " in line] == ["ort", "node"]
    assert sum("tok/s" in line for line in lines) == 2

    failed = vlm_export(
        "bench", str(made.work.repo), "--runtime", "ort", "--dtype", "fp16", cwd=tmp_path, COLUMNS="500"
    )
    assert (failed.returncode, failed.stderr) == (1, "")
    assert "ort fp16 failed: " in failed.stdout and "decoder_model_merged_fp16.onnx" in failed.stdout


def test_the_command_prints_a_table_or_json(default_repo: Path, tmp_path: Path) -> None:
    arguments = ("bench", str(default_repo), "--runtime", "ort", "--dtype", "q8", "--rounds", "1", "--new-tokens", "3")
    done = vlm_export(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "shapes-captioner (captioner): one round"
    assert lines[1] == "4 images (00.png … 03.png), 3 new tokens each, greedy"
    assert max(map(len, lines)) <= 80
    row = next(line for line in lines if " q8 " in line)
    assert row.split()[0] == "ort" and "tok/s" in row and row.rstrip().endswith("MB")
    printed = json.loads(vlm_export(*arguments, "--json", cwd=tmp_path).stdout)
    assert [row["dtype"] for row in printed["rows"]] == ["q8"]
    assert printed["schema"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--runtime", "node"), "node is not on PATH: install Node 20 or newer, or run with --runtime ort"),
        (("--runtime", "ort", "--image", "no.png"), "no.png: no such image"),
        (("--runtime", "ort", "--prompt", "a"), "shapes-captioner: a captioner repo takes no prompt: drop --prompt"),
        (("--runtime", "ort", "--dtype", "q4"), "no q4; it has fp32, q8"),
        (("--card",), "--card: a recipe's card can be written, not that of a folder: name the recipe"),
    ],
)
def test_what_cannot_be_had_is_one_line(
    arguments: tuple[str, ...], message: str, default_repo: Path, tmp_path: Path
) -> None:
    done = vlm_export("bench", str(default_repo), *arguments, cwd=tmp_path, PATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def test_the_card_and_push(exported: Exported, tmp_path: Path) -> None:
    """verify, bench --card, push: the card has one section of figures, and the report is still about the files."""
    made = exported.copy(tmp_path)
    made.verify("ort")
    assert "## Measured" not in card(made)
    work = ("pico.yaml", "--work", str(made.work.root))
    options = ("--runtime", "ort", "--dtype", "fp32", "--rounds", "1", "--new-tokens", "3", "--card")
    done = vlm_export("bench", *work, *options, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, f"written to {made.work.repo / 'README.md'}\n")
    assert "3 new tokens each" in card(made)
    with HubServer(tmp_path / "hub") as hub:
        environ = environment(hub.url, tmp_path / "home", TOKEN)
        pushed = vlm_export("push", "acme/pico", "--recipe", *work, cwd=tmp_path, **environ)
        assert pushed.returncode == 0, pushed.stderr

    pipeline.run_card(made.recipe, made.work, measured(made))  # takes the first one's place
    assert card(made).count("## Measured") == 1
    assert "4 new tokens each" in card(made) and "3 new tokens each" not in card(made)
    assert card(made).index("## Verified") < card(made).index("## Measured") < card(made).index("## How it was made")
    assert "**pass**" in card(made)
    gate.check_verified(made.work)
    made.verify("ort")  # writes the card anew, with what was measured
    assert "4 new tokens each" in card(made)
    gate.check_verified(made.work)


def test_a_card_vouches_for_nothing_else(exported: Exported, tmp_path: Path) -> None:
    made = exported.copy(tmp_path)
    figures = measured(made)
    pipeline.run_card(made.recipe, made.work, figures)
    assert "Not verified yet." in card(made) and "## Measured" in card(made)
    with pytest.raises(CheckFailed, match="not verified yet"):
        gate.check_verified(made.work)

    made.verify("ort")
    config = made.work.repo / "config.json"
    stood = config.read_text()
    config.write_text("{}")
    pipeline.run_card(made.recipe, made.work, figures)
    with pytest.raises(CheckFailed, match=r"about other files than .* holds \(config.json\)"):
        gate.check_verified(made.work)
    config.write_text(stood)
    gate.check_verified(made.work)

    graph = made.graph("encoder_model")  # another graph: neither the report nor the figures are about it
    graph.write_bytes(graph.read_bytes() + b"\0")
    pipeline.run_card(made.recipe, made.work, figures)
    assert "Not verified yet." in card(made)
    with pytest.raises(CheckFailed, match="about other files"):
        gate.check_verified(made.work)
    made.verify("ort")
    assert "## Measured" not in card(made)


def measured(made: Exported) -> dict[str, Any]:
    return asdict(bench.bench(made.work.repo, bench.images_of(None)[:1], runtimes=["ort"], dtypes=["fp32"], **FEW))


def card(made: Exported) -> str:
    return (made.work.repo / "README.md").read_text()
