"""chat: `AutoProcessor` and `AutoModelForImageTextToText` of transformers.js, for the classes derived from its llava.

Such a class runs `embed_tokens` on the prompt, writes the images' features over the rows of image tokens, and feeds
embeddings, mask and positions to the decoder.
"""

from __future__ import annotations

from typing import Any, Literal

from vlm_export.spec.client import Client

_NO_GRID = 1 << 16  # pixels: a patch larger than any image


class Chat(Client):
    """What such classes share: how they are loaded and driven. Their config files differ.

    `call` is how the processor takes an image and a text.
    """

    name = "AutoModelForImageTextToText"
    node: Literal["chat"] = "chat"
    call = "image, text"
    question = "What is in this image?"

    def javascript(self, repo_id: str, photo: str) -> str:
        """A module's lines that ask `question` about a picture."""
        return f"""import {{ AutoProcessor, AutoModelForImageTextToText, load_image }} from '@huggingface/transformers';

const photo = '{photo}';
const processor = await AutoProcessor.from_pretrained('{repo_id}');
const model = await AutoModelForImageTextToText.from_pretrained('{repo_id}');
const content = [{{ type: 'image' }}, {{ type: 'text', text: '{self.question}' }}];
const text = processor.apply_chat_template([{{ role: 'user', content }}], {{ add_generation_prompt: true }});
const image = await load_image(photo);
const inputs = await processor({self.call});
const output = await model.generate(inputs);
const answer = output.slice(null, [inputs.input_ids.dims[1], null]);
const [caption] = processor.batch_decode(answer, {{ skip_special_tokens: true }});"""


def llava_processor(image_token: str, image_tokens: int) -> dict[str, Any]:
    """`processor_config.json` of a `LlavaProcessor` that writes `image_tokens` of them for an image of any size.

    It writes floor(size / patch_size)² + num_additional_image_tokens. A patch larger than the image leaves the second
    term alone, which is right for towers and projections of any grid.
    """
    return {
        "processor_class": "LlavaProcessor",
        "image_token": image_token,
        "patch_size": _NO_GRID,
        "num_additional_image_tokens": image_tokens,
    }
