"""A draw in a graph beside the runtime's, beside torch's probabilities, and in other builds of ONNX Runtime."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from test_runtime_generate import SAMPLING

from vlm_export.graph import random_draw
from vlm_export.runtime import generate, logits, noise
from vlm_export.runtime.options import Plan
from vlm_export.web import node_runtime

VOCABULARY, DRAWS = 12, 3000
# Of 9 degrees of freedom (10 tokens have a chance), chi-square is above this less than once in a million times.
UNLIKELY = 48.0
OPTIONS = ("temperature", "top_p", "top_k", "seed", "iteration")
# Draws of a few rows, step by step, in the build of ONNX Runtime that is named.
IN_NODE = """
import { readFile } from 'node:fs/promises';
import * as ort from 'PACKAGE';
if (ort.env.wasm) ort.env.wasm.wasmPaths = new URL('.', import.meta.resolve('PACKAGE')).href;
const { rows, scores, draws } = JSON.parse(await readFile('request.json', 'utf8'));
const session = await ort.InferenceSession.create(new Uint8Array(await readFile('draw.onnx')));
const made = [];
for (const [temperature, top_p, ...counts] of draws) {
    const whole = counts.map((count) => new ort.Tensor('int64', [BigInt(count)], []));
    const { best } = await session.run({
        final: new ort.Tensor('float32', scores, [rows, scores.length / rows]),
        temperature: new ort.Tensor('float32', [temperature], []),
        top_p: new ort.Tensor('float32', [top_p], []),
        top_k: whole[0], seed: whole[1], iteration: whole[2],
    });
    made.push([...best.data].map(Number));
}
console.log(JSON.stringify(made));
"""


def model(text: str) -> bytes:
    inputs = "float[R, V] final, float temperature, float top_p, int64 top_k, int64 seed, int64 iteration"
    outputs = "int64[R, 1] best, float[R, 1] its_score"
    return onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 20]> g ({inputs}) => ({outputs}) {{{text}}}'
    ).SerializeToString()


def scores_of(rows: int, vocabulary: int) -> np.ndarray:
    """Scores of which some are excluded, `[rows, vocabulary] float32`."""
    made = np.random.default_rng(3).normal(scale=2, size=(rows, vocabulary)).astype(np.float32)
    made[:, 3::7] = -np.inf
    return made


def drawn(session: onnxruntime.InferenceSession, scores: np.ndarray, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """The tokens, `[rows] int64`, and the logarithms of their probabilities, `[rows] float32`."""
    asked = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 0, "iteration": 0} | options
    kinds = [np.float32, np.float32, np.int64, np.int64, np.int64]
    feeds = {name: np.array(asked[name], dtype=kind) for name, kind in zip(OPTIONS, kinds, strict=True)}
    best, its_score = session.run(None, {"final": scores, **feeds})
    return best[:, 0], its_score[:, 0]


@pytest.fixture(scope="module")
def session() -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(model(random_draw.text()))


@pytest.mark.parametrize("options", [*SAMPLING, {"top_k": 0, "top_p": 1e-6}], ids=str)
def test_it_draws_what_the_runtime_draws(options: dict[str, Any], session: onnxruntime.InferenceSession) -> None:
    scores = scores_of(20, 300)
    plan = Plan((), 0, do_sample=True, **options)
    warped = logits.warp(scores, plan)
    said = []
    for seed, step in ((0, 0), (0, 1), (7, 5), (2**24 - 1, 4095)):
        found, its_score = drawn(session, scores, seed=seed, iteration=step, **({"top_k": 50} | options))
        expected = generate._drawn(warped, [seed] * len(scores), [0] * len(scores), step)
        assert found.tolist() == expected.tolist()
        rows = np.arange(len(scores))
        np.testing.assert_allclose(its_score, logits.log_softmax(warped)[rows, expected], rtol=1e-4, atol=1e-5)
        said.append(found.tolist())
    assert len({*map(tuple, said)}) == (1 if options.get("top_p") == 1e-6 else 4)


def chi_square(text: str, scores: np.ndarray, probabilities: np.ndarray, **options: Any) -> float:
    """How far the frequencies of tokens in a row of steps are from their probabilities."""
    session = onnxruntime.InferenceSession(model(text))
    found = [drawn(session, scores, iteration=step, **options)[0][0] for step in range(DRAWS)]
    expected = probabilities * DRAWS
    counts = np.bincount(found, minlength=len(expected))
    assert not counts[expected == 0].any()
    possible = expected > 0
    return float((((counts - expected)[possible] ** 2) / expected[possible]).sum())


@pytest.mark.parametrize("seed", [0, 1, 2**24 - 1])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_tokens_come_as_often_as_torch_says(seed: int, temperature: float) -> None:
    scores = scores_of(1, VOCABULARY)
    probabilities = torch.from_numpy(scores / temperature).double().softmax(-1)[0].numpy()
    asked = {"seed": seed, "temperature": temperature}
    assert chi_square(random_draw.text(), scores, probabilities, **asked) < UNLIKELY


@pytest.mark.parametrize(
    "line, wrong",
    [
        ("logarithm_of_waiting = Log (waiting)", "logarithm_of_waiting = Identity (waiting)"),
        ("cooled = Div (final, temperature)", "cooled = Mul (final, temperature)"),
        ("with_token = Add (state_of_step, ranked_ids)", "with_token = Add (state_of_seed, ranked_ids)"),
    ],
)
def test_a_wrong_draw_is_seen(line: str, wrong: str) -> None:
    scores = scores_of(1, VOCABULARY)
    probabilities = torch.from_numpy(scores / 3).double().softmax(-1)[0].numpy()
    assert line in random_draw.text()
    text = random_draw.text().replace(line, wrong)
    assert chi_square(text, scores, probabilities, seed=1, temperature=3.0) > UNLIKELY


def test_noise_is_that_of_whole_numbers() -> None:
    """In Python's own numbers, which never overflow."""
    state = 0
    for number, addend in zip((7, 5, 30, 0, 0), noise.ADDENDS, strict=True):
        state = pow(state + number + addend, 5, noise.PRIME)
    uniform = (state // 256 + 0.5) / 2**23
    assert noise.gumbel(7, 0, 5, np.array([30]))[0] == pytest.approx(-np.log(-np.log(uniform)), rel=1e-5)
    assert np.isfinite(noise.gumbel(0, 0, 0, np.arange(200_000))).all()


@pytest.mark.parametrize("along", ["seed", "sample", "step", "token"])
def test_noise_of_neighbours_has_nothing_in_common(along: str) -> None:
    many = 300
    if along == "token":
        table = np.stack([noise.gumbel(0, 0, step, np.arange(many)) for step in range(many)], axis=1)
    else:
        table = np.stack(
            [
                noise.gumbel(**({"seed": 1, "sample": 0, "step": 2} | {along: number}), token_ids=np.arange(many))
                for number in range(many)
            ]
        )
    uniform = np.exp(-np.exp(-table.astype(np.float64))) - 0.5
    deviation = 1 / np.sqrt(12 * uniform.size)
    assert abs(uniform.mean()) < 5 * deviation
    for apart in (1, 2, 3):
        correlation = (uniform[apart:] * uniform[:-apart]).mean() * 12
        assert abs(correlation) < 5 / np.sqrt(uniform[apart:].size)


@pytest.mark.node
@pytest.mark.parametrize("package", ["onnxruntime-node", "onnxruntime-web"])
def test_another_build_draws_the_same(package: str, session: onnxruntime.InferenceSession, tmp_path: Path) -> None:
    scores = np.random.default_rng(4).normal(scale=2, size=(5, 200)).astype(np.float32)
    draws = [
        [temperature, top_p, top_k, seed, step]
        for temperature, top_p, top_k in ((1.0, 1.0, 0), (3.0, 1.0, 50), (2.0, 0.75, 0))
        for seed in (0, 9, 2**24 - 1)
        for step in range(20)
    ]
    (tmp_path / "draw.onnx").write_bytes(model(random_draw.text()))
    request = {"rows": 5, "scores": scores.ravel().tolist(), "draws": draws}
    (tmp_path / "request.json").write_text(json.dumps(request))
    (tmp_path / "draw.mjs").write_text(IN_NODE.replace("PACKAGE", package))
    (tmp_path / "node_modules").symlink_to(node_runtime.node_home() / "node_modules")
    done = subprocess.run(["node", "draw.mjs"], cwd=tmp_path, capture_output=True, text=True, check=True)
    expected = [drawn(session, scores, **dict(zip(OPTIONS, draw, strict=True)))[0].tolist() for draw in draws]
    assert json.loads(done.stdout) == expected
