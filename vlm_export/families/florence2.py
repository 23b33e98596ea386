"""Florence-2: DaViT, a text encoder that reads features and a task's sentence, and a decoder that looks at the result.

Checkpoints are what transformers' own class saves (`florence-community/Florence-2-…`). Those of Microsoft's own code
name everything otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import Generator, Tensor, nn
from transformers import Florence2Processor, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vlm_export.contract import TASK_KEYS
from vlm_export.errors import InputError
from vlm_export.families import _chat
from vlm_export.layouts.tasks import TaskPrompts
from vlm_export.models.chat import load_config
from vlm_export.models.florence import components, image_rows, image_size
from vlm_export.preprocessing import TaskProcessor, check_image_size, stored_generation
from vlm_export.runtime.tasks import Tasks
from vlm_export.spec.family import About, Config, Layout

_INPUT_DTYPES: dict[str, type[np.generic]] = {"pixel_values": np.float32, "input_ids": np.int64}
_POSITIONS = "pos_idx_to_embed"


def build(config: Config) -> PreTrainedModel:
    """The class of transformers, with the table of temporal positions as a parameter: checkpoints store it.

    Raises:
        InputError: a checkpoint of Microsoft's own code.
    """
    if config.get("vision_config", {}).get("model_type") == "davit":
        raise InputError(
            "config.json: vision_config: davit is Microsoft's own code: take florence-community/Florence-2-base"
        )
    vision = {
        **config.get("vision_config", {}),
        "drop_path_rate": 0.0,
    }  # else layers differ in what training alone does
    model = _chat.build({**config, "vision_config": vision})
    temporal = model.get_submodule("model.multi_modal_projector.visual_temporal_embed")
    table = temporal.get_buffer(_POSITIONS)
    delattr(temporal, _POSITIONS)
    temporal.register_parameter(_POSITIONS, nn.Parameter(table, requires_grad=False))
    return model


def start_token_id(config: Config, generation: Mapping[str, Any]) -> int:
    """The id that every answer begins with: `decoder_start_token_id`, of the text config where no file says it."""
    found = generation.get("decoder_start_token_id")
    return int(load_config(config).get_text_config().decoder_start_token_id if found is None else found)


@cache
def tasks() -> dict[str, dict[str, str]]:
    """What transformers' processor knows of tasks, which is in its code, by the names of its attributes."""
    image_processor = CLIPImageProcessorPil(image_seq_length=1)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(BPE()), extra_special_tokens={"image_token": "<image>"}
    )
    processor = Florence2Processor(image_processor, tokenizer)
    return {name: dict(getattr(processor, name)) for name in TASK_KEYS}


def sample_inputs(config: Config, generator: Generator) -> dict[str, Tensor]:
    """`pixel_values` `[1, 3, H, W]`, a prompt's `input_ids` `[1, 8]`, an answer's `decoder_input_ids` `[1, 4]`."""
    size, rows = image_size(config), load_config(config).get_text_config().vocab_size
    return {
        "pixel_values": torch.rand(1, 3, size, size, generator=generator) * 2 - 1,
        "input_ids": _chat.sample_ids(config, 0, generator),
        "decoder_input_ids": torch.randint(rows, (1, 4), generator=generator),
    }


@dataclass(frozen=True)
class Reference:
    """The class of transformers. `input_ids` are a prompt's, without the image tokens that it wants in front of them;
    `attention_mask` says which of them are no padding, where there is any.

    `decoder_input_ids` begin with the start token.
    """

    model: Any

    def __post_init__(self) -> None:
        self.model.generation_config = GenerationConfig()  # rules of generation are the recipe's

    def encode(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`image_features` `[batch, rows, hidden]` and `encoder_hidden_states` `[batch, rows + tokens, hidden]`."""
        stages: dict[str, Tensor] = {}

        def keep(_: nn.Module, __: tuple[Any, ...], features: Tensor) -> None:
            stages["image_features"] = features

        with self.model.model.multi_modal_projector.register_forward_hook(keep):
            stages["encoder_hidden_states"] = self._run(inputs).encoder_last_hidden_state
        return stages

    def prefill(self, inputs: Mapping[str, Tensor]) -> Any:
        """The class's output for a picture, a prompt and what the answer begins with: `logits` `[batch, tokens,
        vocabulary] float32`, and the cache.
        """
        return self._run(inputs)

    def step(self, token_ids: Tensor, past: Any, inputs: Mapping[str, Tensor]) -> Any:
        """The class's output for `[batch, 1] int64` of the answer after the cache `past`.

        What the encoder made is in the cache: zeros stand for it, as the decoder must be given as many rows.
        """
        arguments = self._arguments({**inputs, "decoder_input_ids": token_ids})
        rows, width = arguments["attention_mask"].shape, self.model.config.get_text_config().d_model
        arguments |= {"encoder_outputs": BaseModelOutput(torch.zeros(*rows, width))}
        del arguments["pixel_values"], arguments["input_ids"]
        return self.model(**arguments, past_key_values=past, use_cache=True)

    def generate(self, inputs: Mapping[str, Tensor], **options: Any) -> Any:
        """The class's own `generate`, told which token an answer begins with."""
        start = int(inputs["decoder_input_ids"][0, 0])
        return self.model.generate(**self._arguments(inputs), decoder_start_token_id=start, **options)

    def _run(self, inputs: Mapping[str, Tensor]) -> Any:
        return self.model(**self._arguments(inputs), use_cache=True)

    def _arguments(self, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """The keyword arguments that the class is called with: image tokens, all seen, in front of the prompt."""
        ids = inputs["input_ids"]
        images = torch.full((len(ids), image_rows(self.model.config.to_dict())), self.model.config.image_token_id)
        mask = inputs.get("attention_mask", torch.ones_like(ids))
        return {
            "pixel_values": inputs["pixel_values"],
            "input_ids": torch.cat([images, ids], dim=1),
            "attention_mask": torch.cat([torch.ones_like(images), mask], dim=1),
            "decoder_input_ids": inputs["decoder_input_ids"],
        }


def preprocessor(folder: Path, config: Config, settings: Mapping[str, Any]) -> TaskProcessor:
    """The `Florence2Processor` of transformers.

    Raises:
        InputError: the settings make pictures of another size than the graphs take.
    """
    check_image_size(settings, image_size(config))
    return TaskProcessor(
        folder,
        {**settings, "image_seq_length": image_rows(config)},
        _INPUT_DTYPES,
        processor_class="Florence2Processor",
        tasks=Tasks.of(tasks()),
        start=start_token_id(config, stored_generation(folder)),
    )


FAMILY = replace(
    _chat.chat_family(
        "florence2",
        About(
            summary="Florence-2: DaViT, a text encoder that reads features and a task prompt, a decoder, both Bart's",
            since="0.1.0",
            towers=("florence_vision",),
            decoders=("bart",),
            notes=(
                "Start from `florence-community/Florence-2-…`, or a fine-tune of one: Microsoft's own checkpoints name "
                "everything otherwise, and are refused.",
                "A prompt is a task (`<CAPTION>`, `<OD>`, `<OCR_WITH_REGION>`), with its input right behind it where "
                "it has one (`<CAPTION_TO_PHRASE_GROUNDING>a cat`), or any sentence. There are no turns.",
                "Answers hold places as tokens (`car<loc_52><loc_332><loc_932><loc_774>`). "
                "`post_process_generation(text, task, image.size)` of transformers.js makes boxes of them, as "
                "PyTorch's processor does: the size is width and height, and fractions stay that PyTorch's cuts off.",
                "It differs from PyTorch's where labels have letters beyond ASCII, which PyTorch's drops in boxes, and "
                "where phrases are banned (`post_processor_config`), which it keeps. Polygons are an "
                "error there, so `<REFERRING_EXPRESSION_SEGMENTATION>`, `<REGION_TO_SEGMENTATION>` and "
                "`<OPEN_VOCABULARY_DETECTION>` are.",
                "Pictures are 768 × 768, unless `vision_config.image_size` of config.json says another size.",
                "Attention between channels stays plain: fused, it is slower.",
            ),
        ),
        sample_inputs=sample_inputs,
        reference=Reference,
        preprocessor=preprocessor,
        layout=Layout(components, TaskPrompts(tasks, start_token_id)),
        build=build,
    ),
    layouts={"tasks": Layout(components, TaskPrompts(tasks, start_token_id))},
)
