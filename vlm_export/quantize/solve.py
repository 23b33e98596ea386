"""Choose a weight's numbers by what they do to its products with sample inputs.

GPTQ (Frantar et al., arXiv:2210.17323): rounding an input's weights makes an error that the weights which are not
rounded yet can take back, as far as their inputs go together with its own. Inputs that matter most are rounded first;
scales and zero points are chosen before, block by block, by the squared error with each input's weight in it
("activation order, static groups").

Of the libraries that have it, onnxruntime's own (`quantization.neural_compressor.weight_only.gptq`) gives rounded
floats without their scales, chooses a block's scale before the error of the blocks in front of it is taken back, and
works on a model that is in memory as a whole.
"""

from __future__ import annotations

import numpy as np

from vlm_export.quantize.numbers import Quantized, Solution, best_grid, in_blocks, rows_at_once

DAMPING = 0.01  # of the mean square of an input: added to each, so that few samples do not decide everything
_CHUNK = 128  # inputs whose errors are taken back from all later ones at once


def solve(quantized: Quantized, squares: np.ndarray) -> Solution:
    """The numbers of a weight whose sample inputs have the products `squares`, `[inputs, inputs]`: XᵀX of all rows X.

    Inputs that were zero in every sample count as independent of the others.
    """
    weight = np.ascontiguousarray(quantized.weight.numpy().T, dtype=np.float32)
    squares = squares.astype(np.float64)
    mean = float(np.trace(squares)) / len(squares)
    squares[np.diag_indices_from(squares)] += DAMPING * mean if mean > 0 else 1.0
    importance = np.diagonal(squares).astype(np.float32) / np.float32(mean if mean > 0 else 1.0)
    scales, zero_points = _grid(weight, quantized, importance)
    order = np.argsort(-importance, kind="stable")
    inverse = np.linalg.inv(squares[order][:, order])
    upper = np.linalg.cholesky((inverse + inverse.T) / 2).T.astype(np.float32)
    numbers = _rounded_in_order(weight.T[order], upper, order // quantized.share, scales.T, zero_points.T, quantized)
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return Solution(np.ascontiguousarray(numbers[back].T), scales, zero_points)


def _grid(weight: np.ndarray, quantized: Quantized, importance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`[outputs, blocks]` scales and zero points."""
    weights_of_errors = in_blocks(importance[None], quantized.share)
    parts = [
        best_grid(in_blocks(weight[rows], quantized.share), quantized.form, weights_of_errors)
        for rows in rows_at_once(weight)
    ]
    scales, zero_points = (np.concatenate(each) for each in zip(*parts, strict=True))
    return scales, zero_points


def _rounded_in_order(
    weight: np.ndarray,
    upper: np.ndarray,
    blocks: np.ndarray,
    scales: np.ndarray,
    zero_points: np.ndarray,
    quantized: Quantized,
) -> np.ndarray:
    """Round `weight` `[inputs, outputs]` input by input; the errors of each go into those after it.

    `upper` is the Cholesky factor of the inverse of the inputs' products, in the same order; `blocks` names each
    input's block, whose scales and zero points are `[blocks, outputs]`. Returns `[inputs, outputs] uint8`.
    """
    weight = np.ascontiguousarray(weight)
    top = (1 << quantized.form.bits) - 1
    numbers = np.empty(weight.shape, dtype=np.uint8)
    for start in range(0, len(weight), _CHUNK):
        end = min(start + _CHUNK, len(weight))
        errors = np.empty((end - start, weight.shape[1]), dtype=np.float32)
        for place in range(start, end):
            scale = scales[blocks[place]].astype(np.float32)
            zero_point = zero_points[blocks[place]].astype(np.float32)
            number = np.clip(np.rint(weight[place] / scale) + zero_point, 0, top)
            numbers[place] = number
            error = (weight[place] - (number - zero_point) * scale) / upper[place, place]
            errors[place - start] = error
            weight[place + 1 : end] -= upper[place, place + 1 : end, None] * error
        weight[end:] -= upper[start:end, end:].T @ errors
    return numbers
