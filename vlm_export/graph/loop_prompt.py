"""What a chat's text begins with: a prompt, with the rows of its images written over the image tokens'.

    vision_encoder, embed_tokens on the prompt → inputs_embeds → Loop { decoder → next_token → embed_tokens }

The loop's first run is the decoder's on the whole prompt, its later ones on a token each. So mask and places are
carried: the mask grows by a column, and a token's place is behind its row's last, whatever pads the prompt on its left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from vlm_export.contract import IMAGE_ROWS
from vlm_export.graph import tied_table
from vlm_export.graph.loop_start import ROWS, Carried, Moved, Opened, empty_caches, given_cache
from vlm_export.graph.onnx_text import named, parsed
from vlm_export.graph.taken_apart import move_weights, take_apart

# A token that pads is at place 1, as transformers.js has it, and has the id that no rule on repetition looks at.
_PROMPT = """
taken = Shape <start = 1, end = 2> (input_ids)
kept = Constant <value_int = 1> ()
zero = Constant <value_int = 0> ()
one = Constant <value_int = 1> ()
is_padding = Equal (attention_mask, zero)
nothing = Constant <value_int = VOCABULARY> ()
begun = Where (is_padding, nothing, input_ids)
columns = Constant <value_int = 1> ()
counted = CumSum (attention_mask, columns)
before_first = Constant <value_int = BEFORE_FIRST> ()
places = Add (counted, before_first)
first_position_ids = Where (is_padding, one, places)
image_token = Constant <value_int = IMAGE_TOKEN> ()
is_its_token = Equal (input_ids, image_token)
is_prompt = Not (is_padding)
is_image = And (is_its_token, is_prompt)
of_image = NonZero (is_image)
image_places = Transpose <perm = [1, 0]> (of_image)
width = Shape <start = -1> (image_features)
any_number = Constant <value_ints = [-1]> ()
as_rows = Concat <axis = 0> (any_number, width)
rows_of_images = Reshape (image_features, as_rows)
first_inputs_embeds = ScatterND (embedded, image_places, rows_of_images)
"""
_NEXT = """
one_more = Constant <value_int = 1> ()
no_more = Sub (chosen, chosen)
seen = Add (no_more, one_more)
next_attention_mask = Concat <axis = 1> (attention_mask, seen)
last = Constant <value_ints = [-1]> ()
end = Constant <value_ints = [9223372036854775807]> ()
along_row = Constant <value_ints = [1]> ()
last_place = Slice (position_ids, last, end, along_row)
next_position_ids = Add (last_place, one_more)
"""
PROMPT = ("input_ids", "attention_mask")


@dataclass(frozen=True)
class Prompted:
    """A chat's beginning: `vision_encoder`, `embed_tokens` and `decoder_model_merged`.

    Attributes:
        image_token: the id that a row of an image's features stands at.
        first: the place of a row's first token.
        positions: how many tokens the model has positions for, those of the prompt among them.
        vocabulary: how many ids have scores.
    """

    image_token: int
    first: int
    positions: int
    vocabulary: int

    def open(self, parts: Sequence[ir.Model], opset: int) -> Opened:
        """As of `Beginning`: the prompt's embeddings are made and written once, in front of the loop."""
        outer, embedding, core = (model.graph for model in parts)
        ids, mask = (named(name, "int64", ["batch_size", "prompt_length"]) for name in PROMPT)
        [features] = outer.outputs
        assert features.shape is not None
        if len(features.shape) > 2 and isinstance(features.shape[-2], int):
            parts[0].metadata_props[IMAGE_ROWS] = str(features.shape[-2])
        outer.inputs.extend([ids, mask])
        tied_table.share(embedding, core.initializers.values())
        move_weights(embedding, outer, "embed.")
        move_weights(core, outer, "decoder.")
        prompt = take_apart(embedding.clone(allow_outer_scope_values=True), "prompt.")
        embed, decoder = take_apart(embedding, "embed."), take_apart(core, "decoder.")

        prompt.fed["input_ids"].replace_all_uses_with(ids)
        outer.extend(prompt.nodes)
        text, empty = empty_caches(decoder)
        sources = {
            "of_each_row": ids,
            "input_ids": ids,
            "attention_mask": mask,
            "image_features": features,
            "embedded": prompt.given["inputs_embeds"],
        }
        before = parsed(ROWS + text + self._text(), sources, opset, "prompt.")
        outer.extend(before.nodes)
        decoder.fed["num_logits_to_keep"].replace_all_uses_with(before["kept"])

        def next_inputs(chosen: ir.Value, moved: Moved) -> tuple[list[ir.Node], list[ir.Value]]:
            embed.fed["input_ids"].replace_all_uses_with(chosen)
            carried = {name: moved(decoder.fed[name]) for name in ("attention_mask", "position_ids")}
            after = parsed(_NEXT, {"chosen": chosen, **carried}, opset, "fed.")
            fed = [embed.given["inputs_embeds"], *(after[f"next_{name}"] for name in carried)]
            return [*embed.nodes, *after.nodes], [*fed, *map(moved, given_cache(decoder))]

        return Opened(
            decoder.nodes,
            decoder.given["logits"],
            ids,
            before["begun"],
            before["taken"],
            [
                Carried(decoder.fed["inputs_embeds"], before["first_inputs_embeds"]),
                Carried(decoder.fed["attention_mask"], mask),
                Carried(decoder.fed["position_ids"], before["first_position_ids"]),
                *(Carried(decoder.fed[name], before[made]) for name, made in empty.items()),
            ],
            next_inputs,
        )

    def _text(self) -> str:
        text = _PROMPT
        for name, value in (
            ("VOCABULARY", self.vocabulary),
            ("BEFORE_FIRST", self.first - 1),
            ("IMAGE_TOKEN", self.image_token),
        ):
            text = text.replace(name, str(value))
        return text
