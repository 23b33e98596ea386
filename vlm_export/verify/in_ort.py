"""The graphs in ONNX Runtime, driven as the client drives them: outputs, caches, tokens, against PyTorch's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np
import onnx_ir as ir

from vlm_export.dtypes import DTYPES, FP32
from vlm_export.forms.reading import needed_json_of
from vlm_export.graph import signature
from vlm_export.manifest import ONNX
from vlm_export.merging import merge
from vlm_export.quantize import saturation
from vlm_export.runtime import logits
from vlm_export.runtime.drivers import Driver, begun_with, choose_driver, with_encoded
from vlm_export.runtime.generate import Decoder, generate
from vlm_export.runtime.options import Options, Plan, plan
from vlm_export.runtime.sessions import GRAPH_ERRORS, Arrays, DecoderRun, Sessions
from vlm_export.runtime.text import Text
from vlm_export.source.checkpoint import Checkpoint
from vlm_export.spec import cache
from vlm_export.verify import collapse, in_single, limits
from vlm_export.verify.collapse import ImagePair
from vlm_export.verify.golden import Golden, GoldenCase
from vlm_export.verify.golden_sessions import GoldenSessions
from vlm_export.verify.metrics import agreement, cosine_similarity, max_relative_error, nats_lost, rouge_l
from vlm_export.verify.other_sizes import check_other_sizes
from vlm_export.verify.report import LOADS, RUNS, SATURATION, SHAPE, SIGNATURE, Check
from vlm_export.verify.tokens import add_tokens
from vlm_export.verify.verification import Verification
from vlm_export.wanted import MIXED

_FORCED_IMAGES = 8  # the golden images whose tokens are forced for what a dtype costs in nats: a second run of each


@dataclass(frozen=True)
class Forced:
    """What the graphs say where the golden tokens come before: the best token at each place, under the plan's rules.

    `scores` `[tokens, vocabulary] float32` are those that the graphs give, before any rule.
    """

    chosen: list[int]
    scores: np.ndarray


@dataclass(frozen=True)
class Where:
    """The case and the run of the graphs that an output is of; an encoder's one run has no name."""

    case: GoldenCase
    phase: str = ""

    def __str__(self) -> str:
        parts = (self.case.name, f"batch {self.case.batch}", self.phase)
        return ", ".join(part for part in parts if part)


def verify_in_ort(run: Verification, dtype: str, golden_inputs: Sequence[Arrays]) -> bool:
    """Compare the graphs of a dtype with the golden outputs.

    Returns whether the graphs run: then captions can be compared elsewhere, whatever else was found.
    """
    sessions = _sessions(run, dtype)
    run.tell(f"{dtype}: graphs")
    if not _check_signatures(run, dtype, sessions):
        return False
    try:
        if run.layout.joins:
            _verify_single(run, dtype, sessions, golden_inputs)
            return True
        driver = driver_of(run, sessions)
        encoded = {case.name: check_case(run, dtype, driver, case) for case in run.golden.facts.cases}
        run.tell(f"{dtype}: tokens in ONNX Runtime")
        if _check_tokens(run, dtype, driver, golden_inputs):
            _check_captions(run, dtype)
            _check_collapse(run, dtype, driver, encoded)
    except GRAPH_ERRORS as error:
        run.fail("all", dtype, "ort", RUNS, f"ONNX Runtime: {' '.join(str(error).split())}")
        return False
    return True


def _verify_single(run: Verification, dtype: str, sessions: GoldenSessions, golden_inputs: Sequence[Arrays]) -> None:
    """Tokens of every image, alone and together, and what they say."""
    run.tell(f"{dtype}: tokens in ONNX Runtime", captions=len(golden_inputs))
    try:
        rows = in_single.rows(run, sessions, golden_inputs)
    except FloatingPointError as error:
        run.add("all", dtype, "ort", limits.TOKENS_EXACT, math.nan, str(error))
        return
    found = run.generated_in_ort[dtype] = [row.token_ids for row in rows]
    add_tokens(run, dtype, "ort", limits.TOKENS_EXACT, found)
    in_single.check_search(run, dtype, sessions, golden_inputs)
    in_single.check_texts(run, dtype, sessions, golden_inputs)
    in_single.check_together(run, dtype, sessions, golden_inputs)
    _check_captions(run, dtype)
    text = Text(run.repo)
    for finding in collapse.of_captions(run.golden.facts.images, found, [text.decode(ids) for ids in found]):
        run.add("all", dtype, "ort", finding.metric, finding.value, finding.detail)


def _check_signatures(run: Verification, dtype: str, sessions: Sessions) -> bool:
    """Check that every graph loads and has the inputs and outputs that the family declares; then its integer products.

    Returns whether all of them load and are as declared.
    """
    good = True
    for component in run.components:
        try:
            sessions.session(component.name)
        except GRAPH_ERRORS as error:
            run.fail(component.name, dtype, "ort", LOADS, f"ONNX Runtime: {' '.join(str(error).split())}")
            good = False
            continue
        graph = ir.load(sessions.path(component.name)).graph
        found = signature.differences(component, graph)
        if found:
            run.fail(component.name, dtype, "ort", SIGNATURE, "; ".join(found))
            good = False
        else:
            run.checks.append(Check(component.name, dtype, "ort", SIGNATURE, 0.0, 0.0, "pass"))
        _check_saturation(run, component.name, dtype, graph)
    return good


def _check_saturation(run: Verification, component: str, dtype: str, graph: ir.Graph) -> None:
    """Check that no integer product of a graph can saturate.

    It is computed from the weights, because many processors would show nothing.
    """
    largest = max((product.largest_pair for product in saturation.integer_products(graph)), default=0.0)
    worst = saturation.worst(graph)
    verdict: Literal["pass", "fail"] = "fail" if worst else "pass"
    detail = str(worst or "")
    run.checks.append(Check(component, dtype, "ort", SATURATION, largest, saturation.LIMIT, verdict, detail))


def check_case(run: Verification, dtype: str, driver: Driver, case: GoldenCase) -> Arrays:
    """Encoder outputs, prefill, and the decode steps of one case, each against its golden array.

    Returns the golden arrays with the encoder's own outputs in the place of PyTorch's.
    """
    goldens = run.golden.case(case.name)
    where = Where(case)
    encoded = driver.encode(goldens)
    for made in encoded:
        _compare(run, dtype, made.component, made.output, made.value, goldens[made.golden_name], where, goldens)
    done = driver.prefill(goldens)
    to_come = len(case.step_token_ids)
    _compare_run(run, dtype, done, goldens["prefill.logits"], goldens, to_come, replace(where, phase="prefill"))
    after_prefill = done.cache
    for step, tokens in enumerate(case.step_token_ids):
        ids = np.array(tokens, dtype=np.int64).reshape(case.batch, 1)
        done = driver.step(ids, done.cache, goldens)
        logits = goldens[f"step{step}.logits"]
        at_step = replace(where, phase=f"decode step {step + 1}")
        _compare_run(run, dtype, done, logits, goldens, to_come - step - 1, at_step)
    if case.batch == 1:  # GroupQueryAttention takes several tokens after a past at this batch only (ORT 1.31)
        together = np.array(case.step_token_ids, dtype=np.int64).T
        done = driver.step(together, after_prefill, goldens)
        at_once = replace(where, phase=f"{together.shape[1]} tokens in one step")
        _compare_run(run, dtype, done, logits, goldens, 0, at_once)
    return goldens | {made.golden_name: made.value for made in encoded}


def _compare_run(
    run: Verification,
    dtype: str,
    done: DecoderRun,
    logits: np.ndarray,
    goldens: Mapping[str, np.ndarray],
    to_come: int,
    where: Where,
) -> None:
    """Logits and cache of one run; the golden cache holds the tokens of `to_come` more, but for cross-attention's."""
    _compare(run, dtype, done.component, "logits", done.logits, logits, where, goldens)
    for name, held in done.cache.items():
        value = held.numpy()
        whole = goldens[cache.golden_of(name)]
        if to_come and not cache.has_positions(name):
            continue  # the golden's state is that behind the last token
        reference = whole if ".encoder." in name else whole[:, :, : whole.shape[2] - to_come]
        if not cache.has_positions(name) and value.shape == reference.shape:  # a state is a direction as a whole
            value, reference = (array.reshape(len(array), -1) for array in (value, reference))
        output = cache.present_of(name)
        _compare(run, dtype, done.component, output, value, reference, where, goldens)


def _compare(
    run: Verification,
    dtype: str,
    component: str,
    output: str,
    value: np.ndarray,
    reference: np.ndarray,
    where: Where,
    goldens: Mapping[str, np.ndarray],
) -> None:
    """One output. In float32 the error decides; in fewer bits the direction of each row does."""
    detail = f"{output} ({where})"
    if not value.size:
        run.fail(component, dtype, "ort", SHAPE, f"{detail} is empty: {list(value.shape)}")
        return
    if value.shape != reference.shape:
        detail += f" has shape {list(value.shape)}, not {list(reference.shape)}"
        if output == "logits" and value.ndim == 3 and value.shape[1] > 1:
            detail += signature.VISION_LOGITS.format(count=value.shape[1])
        run.fail(component, dtype, "ort", SHAPE, detail)
        return
    error = max_relative_error(value, reference)
    good = run.add(component, dtype, "ort", limits.MAX_RELATIVE_ERROR, error, detail, output, where.phase)
    if dtype != FP32.name:
        cosine = cosine_similarity(value, reference)
        good = run.add(component, dtype, "ort", limits.COSINE_SIMILARITY, cosine, detail, output, where.phase)
    if not good:
        _explain(run, value, goldens)


def _explain(run: Verification, value: np.ndarray, goldens: Mapping[str, np.ndarray]) -> None:
    """Say which other golden array a wrong output equals: two outputs that were swapped."""
    last = run.checks[-1]
    for name, other in goldens.items():
        if name.startswith("cache.") and value.ndim == 4:
            other = other[:, :, : value.shape[2]]
        if other.shape == value.shape and max_relative_error(value, other) < 1e-3:
            run.checks[-1] = Check(
                **(asdict(last) | {"detail": f"{last.detail}: it holds {name}: outputs are swapped"})
            )
            return


def _check_tokens(run: Verification, dtype: str, driver: Driver, golden_inputs: Sequence[Arrays]) -> bool:
    """Greedy tokens of every image; top-1 agreement when the golden tokens are forced, and what it costs in nats.

    Returns whether there are tokens: the decoder's scores are numbers.
    """
    generated, agreed, scores = [], [], list[np.ndarray]()
    for place, (image, model_inputs) in enumerate(zip(run.golden.facts.images, golden_inputs, strict=True)):
        inputs = with_encoded(driver, model_inputs)
        decided = _plan(run.golden.facts, inputs)
        try:
            [own] = generate(Decoder(driver, inputs), decided)
            chosen = own.token_ids
            if place < _FORCED_IMAGES or chosen != image.token_ids:
                forced = _forced(Decoder(driver, inputs), decided, image.token_ids)
                chosen = forced.chosen
                scores += [forced.scores] if place < _FORCED_IMAGES else []
        except FloatingPointError as error:
            run.add("all", dtype, "ort", limits.TOKENS_EXACT, math.nan, f"{image.file}: {error}")
            return False
        run.tell(f"{dtype}: tokens in ONNX Runtime", captions=1)
        generated.append(own.token_ids)
        agreed.append(agreement(chosen, image.token_ids))
    run.generated_in_ort[dtype] = generated
    add_tokens(run, dtype, "ort", limits.TOKENS_EXACT, generated)
    run.add("all", dtype, "ort", limits.TOP1_AGREEMENT, float(np.mean(agreed)), f"{len(agreed)} images")
    _check_nats(run, dtype, scores)
    return True


def _check_nats(run: Verification, dtype: str, scores: list[np.ndarray]) -> None:
    """How far a dtype's distributions of the next token are from float32's, which come first and are kept."""
    if dtype == FP32.name:
        run.fp32_scores = scores
        return
    if [each.shape for each in scores] != [each.shape for each in run.fp32_scores]:
        return  # float32 did not run, or one of them has another vocabulary: either has failed already
    lost = np.concatenate([nats_lost(*pair) for pair in zip(scores, run.fp32_scores, strict=True)])
    detail = f"{len(lost)} tokens of {len(scores)} images, against {FP32.name}"
    run.add("all", dtype, "ort", limits.TEACHER_FORCED_KL, float(lost.mean()), detail)


def _check_captions(run: Verification, dtype: str) -> None:
    """How much of PyTorch's captions the captions say, in words."""
    text, images = Text(run.repo), run.golden.facts.images
    captions = [text.decode(ids) for ids in run.generated_in_ort[dtype]]
    shares = [rouge_l(caption, image.caption) for caption, image in zip(captions, images, strict=True)]
    run.add("all", dtype, "ort", limits.ROUGE_L, float(np.mean(shares)), f"{len(shares)} images")


def _check_collapse(run: Verification, dtype: str, driver: Driver, encoded: Mapping[str, Arrays]) -> None:
    """Whether images are still told apart, and captions are still captions; `encoded` is what the cases gave."""
    token_ids, text = run.generated_in_ort[dtype], Text(run.repo)
    found = collapse.of_captions(run.golden.facts.images, token_ids, [text.decode(ids) for ids in token_ids])
    pair = collapse.image_pair(run.golden)
    if pair is not None:
        scores = _scores(driver, pair, encoded[pair.case.name])
        if scores[0].shape == pair.scores[0].shape:  # another shape has failed already
            found.append(collapse.image_swap(scores, pair.scores))
    for finding in found:
        run.add("all", dtype, "ort", finding.metric, finding.value, finding.detail)


def _scores(driver: Driver, pair: ImagePair, inputs: Arrays) -> list[np.ndarray]:
    """The graphs' scores `[2, vocabulary] float32` wherever the pair has PyTorch's."""
    done = driver.prefill(inputs)
    scores = [done.logits[:, -1]]
    for tokens in pair.steps:
        done = driver.step(np.array(tokens, dtype=np.int64)[:, None], done.cache, inputs)
        scores.append(done.logits[:, -1])
    return scores


def _plan(facts: Golden, inputs: Arrays) -> Plan:
    """The plan for one image: greedy, under the golden's rules."""
    ids = {"eos_token_id": facts.eos_token_ids, "pad_token_id": facts.eos_token_ids[0]}
    return plan(Options(), {**facts.generation, **ids}, begun_with(inputs).shape[1])


def generated(run: Verification, dtype: str, golden_inputs: Sequence[Arrays]) -> list[list[int]]:
    """Greedy tokens of every image, as they were, or are now, made in ONNX Runtime.

    Raises:
        FloatingPointError: the decoder's scores are no numbers.
    """
    if dtype not in run.generated_in_ort:
        run.generated_in_ort[dtype] = tokens(run, dtype, golden_inputs)
    return run.generated_in_ort[dtype]


def tokens(run: Verification, dtype: str, pictures: Sequence[Arrays]) -> list[list[int]]:
    """Greedy tokens of any pictures, under the golden's rules.

    Raises:
        FloatingPointError: the decoder's scores are no numbers.
    """
    if run.layout.joins:
        return [row.token_ids for row in in_single.rows(run, _sessions(run, dtype), pictures)]
    driver = driver_of(run, _sessions(run, dtype))
    inputs = [with_encoded(driver, model_inputs) for model_inputs in pictures]
    plans = [_plan(run.golden.facts, each) for each in inputs]
    return [generate(Decoder(driver, each), decided)[0].token_ids for each, decided in zip(inputs, plans, strict=True)]


def gap(run: Verification, dtype: str, model_inputs: Arrays, begun: Sequence[int], other: int) -> float:
    """How far below the best token's score another one's is, behind these tokens: a share of the largest score."""
    [(*_, last)] = scores(run, dtype, [model_inputs], [[*begun, other]])
    return float((last.max() - last[other]) / np.abs(last[np.isfinite(last)]).max())


def scores(
    run: Verification, dtype: str, golden_inputs: Sequence[Arrays], tokens: Sequence[Sequence[int]]
) -> list[np.ndarray]:
    """For each image the scores `[tokens, vocabulary] float32` that its tokens are taken from, under the plan's rules.

    Raises:
        FloatingPointError: the decoder's scores are no numbers.
    """
    if run.layout.joins:
        return in_single.scores(run, _sessions(run, dtype), golden_inputs, tokens)
    driver = driver_of(run, _sessions(run, dtype))
    made = []
    for model_inputs, chosen in zip(golden_inputs, tokens, strict=True):
        inputs = with_encoded(driver, model_inputs)
        decoder, decided, rows = Decoder(driver, inputs), _plan(run.golden.facts, inputs), list[np.ndarray]()
        for count, token in enumerate(chosen):
            rows.append(logits.process(decoder.scores, decoder.history, count, decided)[0])
            if count + 1 < len(chosen):
                decoder.step([token])
        made.append(np.stack(rows))
    return made


def verify_other_sizes(run: Verification, merged: Checkpoint) -> None:
    """Run the float32 graphs at other sizes than the golden's, beside the merged checkpoint in PyTorch."""
    run.tell(f"{FP32.name}: other sizes, loading the model in PyTorch")
    checkpoint, model = merge.attach(merged.path, [])
    sessions = _sessions(run, FP32.name)
    check_other_sizes(run, driver_of(run, sessions), sessions, checkpoint.family.reference(model))


def driver_of(run: Verification, sessions: Sessions) -> Driver:
    """The driver of the repo that is verified, on these sessions."""
    files = {name: needed_json_of(run.repo, name) for name in ("config.json", "generation_config.json")}
    return choose_driver(files).on(sessions)


def _sessions(run: Verification, dtype: str) -> GoldenSessions:
    mixed = {component: DTYPES[own].suffix for component, own in run.manifest.mixed.items()}
    return GoldenSessions(run.repo / ONNX, mixed if dtype == MIXED else DTYPES[dtype].suffix, run.steps)


def _forced(decoder: Decoder, plan: Plan, golden: Sequence[int]) -> Forced:
    """What the graphs say at each place when the golden tokens came before it.

    Raises:
        FloatingPointError: the decoder's scores are no numbers.
    """
    chosen, scores = list[int](), list[np.ndarray]()
    for count, token in enumerate(golden):
        scores.append(decoder.scores[0])
        chosen.append(int(logits.process(decoder.scores, decoder.history, count, plan).argmax()))
        if count + 1 < len(golden):
            decoder.step([token])
    return Forced(chosen, np.stack(scores))
