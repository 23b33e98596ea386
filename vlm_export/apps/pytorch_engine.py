"""The fallback: the PyTorch model that a repo is made of, run by transformers' `generate`.

The only file here that imports torch and transformers, and it is imported only where something falls back.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import StoppingCriteria, StoppingCriteriaList

from vlm_export.atomic import scratch_folder
from vlm_export.errors import InputError, blamed_on
from vlm_export.merging import merge
from vlm_export.preprocessing import (
    ChatProcessor,
    TaskProcessor,
    copy_tokenizer,
    image_processor_settings,
    load_tokenizer,
)
from vlm_export.recipe import RecipeFile
from vlm_export.runtime.drivers import begun_with
from vlm_export.runtime.generate import FinishReason, Generated
from vlm_export.runtime.model import Answer, Backend, Cancelled, Item, Memory, OnText, Prompt, Watcher, answers, finish
from vlm_export.runtime.options import Options, Plan, plan
from vlm_export.runtime.repo import CONFIG, LayoutName, open_repo
from vlm_export.runtime.text import Message, Text, check_rows
from vlm_export.source import fetch
from vlm_export.source.checkpoint import Checkpoint
from vlm_export.source.companions import gathered
from vlm_export.source.generation_rules import published
from vlm_export.verify.recording import eos_token_ids

# What transformers' `generate` is told of a plan; it warns of what it does not use.
_COMMON_OPTIONS = (
    "max_new_tokens",
    "min_new_tokens",
    "num_beams",
    "num_return_sequences",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "do_sample",
)
_RULES = ("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id")
_BEAM_OPTIONS = ("length_penalty", "early_stopping")
_SAMPLING_OPTIONS = ("temperature", "top_k", "top_p")


def beside(folder: Path, *, because: str) -> TorchEngine:
    """The merged checkpoint in the work folder of an exported repo.

    Raises:
        InputError: there is none, which is told with the reason why one was wanted.
    """
    merged = folder.resolve().parent / "merged"
    if not (merged / CONFIG).is_file():
        reason = f"{because}; " if because else ""
        raise InputError(f"{reason or f'{folder}: '}there is no PyTorch model to run instead, in {merged}")
    repo = open_repo(folder)
    checkpoint, model = merge.attach(merged, [])
    default = checkpoint.family.image_processor(checkpoint.config)
    settings = repo.in_graph or repo.preprocessor or image_processor_settings(merged, default, {})
    return TorchEngine(checkpoint, model, repo.name, repo.layout, settings, repo.generation)


def from_recipe(recipe: RecipeFile) -> TorchEngine:
    """The recipe's model with its adapters attached; nothing is merged or exported.

    Raises:
        InputError: the model or an adapter is missing, or they do not fit together.
    """
    with ExitStack() as opened:
        opened.enter_context(fetch.trusted_code(recipe))
        found = fetch.sources(recipe)
        checkpoint, model = merge.attach(
            found.model,
            found.adapters,
            combination=recipe.recipe.combination,
            dequantized=recipe.recipe.base == "dequantized",
        )
        default = checkpoint.family.image_processor(checkpoint.config)
        with gathered(found.model, found.adapters, found.beside) as companions:
            checkpoint = replace(checkpoint, path=companions.folder)
            settings = image_processor_settings(
                checkpoint.path, default, recipe.recipe.image_processor, f"{recipe.path}: image_processor"
            )
            rules = published(recipe.recipe.generation, checkpoint)
            engine = TorchEngine(checkpoint, model, recipe.name, recipe.recipe.layout, settings, rules)
        engine.code = opened.pop_all()  # its config is read anew for each prompt
        return engine


class TorchEngine:
    """A family's PyTorch model. `generation` is what a `generation_config.json` says, or would say."""

    backend: Backend = "torch"
    dtype = "fp32"
    repo_path: Path | None = None
    code: ExitStack | None = None  # what a repo's own classes are registered by, as long as the engine lives

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: nn.Module,
        name: str,
        layout: LayoutName,
        settings: Mapping[str, Any],
        generation: Mapping[str, Any],
    ):
        self.name, self.layout = name, layout
        self.fed_as: LayoutName = checkpoint.family.layouts[layout].joins or layout
        self.reference = checkpoint.family.reference(model)
        self.preprocessor = checkpoint.family.preprocessor(checkpoint.path, checkpoint.config, settings)
        tokenizer = load_tokenizer(checkpoint.path)
        text_config = checkpoint.family.text_config(checkpoint.config)
        self.positions: int | None = getattr(text_config, "max_position_embeddings", None)
        self.rows: int = text_config.vocab_size
        eos = eos_token_ids(checkpoint, tokenizer)
        self.generation = {"eos_token_id": eos, **generation}
        with scratch_folder() as scratch:
            copy_tokenizer(checkpoint.path, Path(scratch))
            self.text = Text(Path(scratch), keeps_tokens=self.preprocessor.keeps_tokens)

    def generate(
        self,
        images: Sequence[Image.Image],
        prompt: Prompt,
        options: Options,
        on_text: OnText | None = None,
        cancelled: Cancelled | None = None,
    ) -> Answer:
        """Answer one prompt by transformers' `generate`, as `OnnxEngine.generate` does by the graphs.

        Raises:
            InputError: as of `Model.generate`.
        """
        started = time.perf_counter()
        inputs = self._model_inputs(images, prompt)
        check_rows(inputs["input_ids"].flatten(), self.rows, self.text.token, f"{self.name}: the prompt")
        before = begun_with(inputs).shape[1]
        decided = plan(options, self.generation, before, room=self.positions and self.positions - before + 1)
        watcher = Watcher(self.text, decided.stop, on_text if decided.num_beams == 1 else None)
        criteria = _Watched(watcher, cancelled)
        made = self._run(inputs, decided, criteria)
        first = criteria.first_token or time.perf_counter()
        answer = answers(made, self.text, decided.stop, inputs["input_ids"].shape[1], started, first)
        finish(answer, watcher, on_text)
        return answer

    def generate_batch(self, items: Sequence[Item], options: Options) -> list[Answer]:
        """Answer the items one after another, each with the tokens that it gets alone."""
        return [self.generate(images, prompt, options) for images, prompt in items]

    def turn(
        self,
        memory: Memory,
        images: Sequence[Image.Image],
        messages: Sequence[Message],
        options: Options,
        on_text: OnText | None = None,
        cancelled: Cancelled | None = None,
    ) -> tuple[Answer, Memory]:
        """Answer a conversation, all of which is run anew; raises as `generate` does."""
        answer = self.generate(images, messages, options, on_text, cancelled)
        return answer, Memory(tokens_fed=answer.prompt_tokens)

    @torch.inference_mode()
    def _run(self, inputs: Mapping[str, np.ndarray], plan: Plan, criteria: _Watched) -> list[Generated]:
        if plan.seed is not None:
            torch.manual_seed(plan.seed)
        names = [
            *_COMMON_OPTIONS,
            *(_BEAM_OPTIONS if plan.num_beams > 1 else ()),
            *(_SAMPLING_OPTIONS if plan.do_sample else ()),
        ]
        rules = {name: getattr(plan, name) for name in _RULES} | {"forced_eos_token_id": plan.forced_eos_token_ids}
        output = self.reference.generate(
            {name: torch.from_numpy(array) for name, array in inputs.items()},
            **{name: getattr(plan, name) for name in names},
            **{name: _as_lists(value) for name, value in rules.items() if value not in (None, ())},
            eos_token_id=list(plan.eos_token_ids),
            pad_token_id=plan.pad_token_id,
            stopping_criteria=StoppingCriteriaList([criteria]),
            return_dict_in_generate=True,
            output_scores=True,
        )
        length = output.beam_indices.shape[1] if plan.num_beams > 1 else len(output.scores)
        sequences = output.sequences[:, output.sequences.shape[1] - length :].tolist()  # without a prompt's ids
        scores = output.sequences_scores.tolist() if plan.num_beams > 1 else [None] * len(sequences)
        return [
            Generated(ids, self._reason(ids, plan), score)
            for ids, score in zip((_cut(ids, plan.eos_token_ids) for ids in sequences), scores, strict=True)
        ]

    def _reason(self, ids: Sequence[int], plan: Plan) -> FinishReason:
        if ids[-1] in plan.eos_token_ids or any(stop in self.text.decode(ids) for stop in plan.stop):
            return "stop"
        return "length" if len(ids) == plan.max_new_tokens else "cancelled"

    def _model_inputs(self, images: Sequence[Image.Image], prompt: Prompt) -> dict[str, np.ndarray]:
        """What the model is fed, by the very processors that goldens are recorded with."""
        if isinstance(self.preprocessor, TaskProcessor):
            return self._task(self.preprocessor, images, prompt)
        if isinstance(self.preprocessor, ChatProcessor):
            return self._conversation(self.preprocessor, images, prompt)
        self._check_one(images)
        with scratch_folder() as scratch:
            path = Path(scratch, "image.png")
            images[0].save(path)
            return self.preprocessor.model_inputs(path, _texts(prompt))

    def _check_one(self, images: Sequence[Image.Image]) -> None:
        if len(images) != 1:
            raise InputError(f"{self.name}: captions one image at a time, not {len(images)} together")

    def _task(
        self, preprocessor: TaskProcessor, images: Sequence[Image.Image], prompt: Prompt
    ) -> dict[str, np.ndarray]:
        try:
            text = preprocessor.tasks.asked(prompt)
        except InputError as error:
            raise InputError(f"{self.name}: {error}") from error
        self._check_one(images)
        return preprocessor.of_picture(images[0], text)

    def _conversation(
        self, preprocessor: ChatProcessor, images: Sequence[Image.Image], prompt: Prompt
    ) -> dict[str, np.ndarray]:
        if prompt is None:
            raise InputError(f"{self.name}: answers a question about an image: give it a prompt")
        messages = [] if isinstance(prompt, str) else list(prompt)
        if isinstance(prompt, str):
            content = [*({"type": "image"} for _ in images), {"type": "text", "text": prompt}]
            messages = [{"role": "user", "content": content}]
        where = f"{self.name}: the prompt"
        text = preprocessor.rendered(messages, where)
        with blamed_on(where):
            made = preprocessor.processor(
                images=list(images) or None, text=[text], return_tensors="np", **preprocessor.call
            )
        wanted = {**preprocessor.input_dtypes, **preprocessor.beside}
        return {name: np.asarray(made[name]).astype(dtype) for name, dtype in wanted.items() if name in made}


class _Watched(StoppingCriteria):
    """Looks at the new ids after every step, as the runtime's own loops do."""

    def __init__(self, watcher: Watcher, cancelled: Cancelled | None):
        self.watcher = watcher
        self.cancelled = cancelled
        self.count = 0
        self.first_token: float | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **_: Any) -> torch.BoolTensor:
        self.first_token = self.first_token or time.perf_counter()
        self.count += 1
        ends = self.watcher(input_ids[:, -self.count :].tolist())
        if self.cancelled and self.cancelled():
            ends = [True] * len(ends)
        return torch.tensor(ends)  # type: ignore[return-value]


def _as_lists(value: Any) -> Any:
    """What a plan holds as tuples, in the types that transformers checks for."""
    return [_as_lists(each) for each in value] if isinstance(value, tuple) else value


def _cut(ids: list[int], eos_token_ids: Sequence[int]) -> list[int]:
    """A sequence up to its end token, without what pads it."""
    ends = [place for place, token in enumerate(ids) if token in eos_token_ids]
    return ids[: ends[0] + 1] if ends else ids


def _texts(prompt: Prompt) -> str:
    """The text of a prompt for a model that continues one."""
    if prompt is None or isinstance(prompt, str):
        return prompt or ""
    contents = [message["content"] for message in prompt]
    return "".join(
        content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
        for content in contents
    )
