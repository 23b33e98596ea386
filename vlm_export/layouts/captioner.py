"""What captioners share: transformers.js's pipeline 'image-to-text' loads them."""

from __future__ import annotations

from typing import Literal

from vlm_export.spec.client import Client


class Captioner(Client):
    """The client of `captioner`. What is in its config files is a matter of the model."""

    name = "pipeline('image-to-text')"
    task = "image-to-text"
    node: Literal["captioner"] = "captioner"
    feeds_one_picture = True

    def javascript(self, repo_id: str, photo: str) -> str:
        """A module's lines that caption a picture by the pipeline 'image-to-text'."""
        return f"""import {{ pipeline }} from '@huggingface/transformers';

const photo = '{photo}';
const captioner = await pipeline('image-to-text', '{repo_id}');
const [{{ generated_text: caption }}] = await captioner(photo);"""
