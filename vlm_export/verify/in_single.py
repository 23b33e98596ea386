"""A repo of one graph in ONNX Runtime: its tokens against PyTorch's, of one picture at a time and of all together.

Of what happens inside its loop nothing can be seen: the tokens of every golden image decide.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from vlm_export.contract import TEXTS_BETWEEN
from vlm_export.runtime import one_graph
from vlm_export.runtime.one_graph import Row, gives_texts, texts, together
from vlm_export.runtime.repo import open_repo
from vlm_export.runtime.sessions import Arrays
from vlm_export.runtime.single_options import greedily
from vlm_export.runtime.text import Text
from vlm_export.verify import limits
from vlm_export.verify.golden_sessions import GoldenSessions, as_fed
from vlm_export.verify.metrics import first_difference
from vlm_export.verify.tokens import add_rate, add_searched
from vlm_export.verify.verification import Verification

_PADDING = 3  # of the longest prompt, where rows are run together
_TEXTS = 4  # images whose texts are compared: each is a run of its own
_MARKS = re.compile(r"\s*\ufffd[\s\ufffd]*")


def rows(run: Verification, sessions: GoldenSessions, pictures: Sequence[Arrays]) -> list[Row]:
    """What the graph says of each picture, under the rules that it was made with.

    Raises:
        FloatingPointError: a probability is no number.
    """
    options = greedily(open_repo(run.repo))
    made = [row for inputs in pictures for row in one_graph.rows(sessions, as_fed(inputs, run.steps), options)]
    if any(np.isnan(row.scores).any() for row in made):
        raise FloatingPointError("the decoder's scores are no numbers: some are too large for the dtype")
    return made


def scores(
    run: Verification, sessions: GoldenSessions, pictures: Sequence[Arrays], tokens: Sequence[Sequence[int]]
) -> list[np.ndarray]:
    """For each picture `[tokens, 1] float32`, each token's probability; NaN where it says another.

    Raises:
        FloatingPointError: a probability is no number.
    """
    made = []
    for row, chosen in zip(rows(run, sessions, pictures), tokens, strict=True):
        own = np.full((len(chosen), 1), np.nan, dtype=np.float32)
        same = first_difference(row.token_ids, chosen)
        own[:same, 0] = np.exp(row.scores[:same])
        made.append(own)
    return made


def check_search(run: Verification, dtype: str, sessions: GoldenSessions, golden_inputs: Sequence[Arrays]) -> None:
    """Check that the search which the graph makes by itself, where the recipe asks for one, finds PyTorch's tokens."""
    if run.golden.facts.search:
        fed = [as_fed(inputs, run.steps) for inputs in golden_inputs]
        made = [row.token_ids for inputs in fed for row in one_graph.rows(sessions, inputs)]
        add_searched(run, dtype, "ort", made)


def check_texts(run: Verification, dtype: str, sessions: GoldenSessions, golden_inputs: Sequence[Arrays]) -> None:
    """Check that the texts, where the graph gives them, are those that the tokenizer makes of its tokens."""
    if not gives_texts(sessions):
        return
    text, images = Text(run.repo), run.golden.facts.images[:_TEXTS]
    different = []
    for image, inputs, ids in zip(images, golden_inputs, run.generated_in_ort[dtype], strict=False):
        try:
            found = texts(sessions, as_fed(inputs, run.steps), greedily(open_repo(run.repo)))
        except UnicodeDecodeError as error:
            different.append(f"{image.file} ({error})")
            continue
        if len(found) != 1 or not is_text(found[0], text.decode(ids)):
            different.append(image.file)
    add_rate(run, dtype, "ort", limits.TEXTS_EXACT, len(images), [], different)


def is_text(found: str, decoded: str) -> bool:
    """Whether a text is what a tokenizer decoded, which marks bytes of no whole character where the graph has none.

    Those of SentencePiece mark whole characters beside them too, so that any may stand there. Nor has the graph the
    character that stands between texts.
    """
    parts = map(re.escape, _MARKS.split(decoded.replace(TEXTS_BETWEEN, "").strip()))
    return re.fullmatch(".*".join(parts), found, re.DOTALL) is not None


def check_together(run: Verification, dtype: str, sessions: GoldenSessions, golden_inputs: Sequence[Arrays]) -> None:
    """Check that rows which are run together get the tokens that each gets alone, if the graph takes several.

    Of prompts each is padded on its left, the longest too.
    """
    if run.steps is not None:
        return
    inputs = together(golden_inputs, run.golden.facts.eos_token_ids[0], more=_PADDING)
    if inputs is None:  # pictures of their own sizes
        return
    alone = run.generated_in_ort[dtype]
    made = [row.token_ids for row in one_graph.rows(sessions, inputs, greedily(open_repo(run.repo)))]
    images = zip(run.golden.facts.images, made, alone, strict=True)
    different = [image.file for image, found, expected in images if found != expected]
    add_rate(run, dtype, "ort", limits.TOKENS_TOGETHER, len(made), [], different)
