"""A tokenizer as GGUF holds it: byte-level BPE with one of llama.cpp's own ways to cut a text into words."""

import json
from typing import TYPE_CHECKING, Any

from utils import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's types of tokens

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
REGEXES = {  # what cuts a text into words: llama.cpp's name
    rf"{CONTRACTIONS}|{WORDS}|\p{{N}}{{1,3}}|{REST}": "llama-bpe",
    rf"{CONTRACTIONS}|{WORDS}|\p{{N}}|{REST}": "qwen2",
}


class GgufVocabulary:
    """What a GGUF file says of a fast tokenizer; raises a `UserError` for one of a kind that llama.cpp lacks."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        described = json.loads(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
        self.tokenizer, self.model = tokenizer, described["model"]
        self.cut = word_cutter(described)

    def add_to(self, writer: Any, size: int) -> None:
        """Write it for a model of `size` embeddings; those without a token get place holders."""
        tokens, kinds = self._tokens(size)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.cut)
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
        writer.add_token_merges(
            [" ".join(merge) if isinstance(merge, list) else merge for merge in self.model["merges"]]
        )
        for name in ("bos", "eos", "unk", "pad"):
            token = getattr(self.tokenizer, f"{name}_token_id")
            if token is not None:
                getattr(writer, f"add_{name}_token_id")(token)
        first = self.tokenizer("a").input_ids[0]
        writer.add_add_bos_token(first == self.tokenizer.bos_token_id)
        if self.tokenizer.chat_template:
            writer.add_chat_template(self.tokenizer.chat_template)

    def _tokens(self, size: int) -> tuple[list[str], list[int]]:
        added = self.tokenizer.added_tokens_decoder  # type: ignore[attr-defined]
        named = {index: token for token, index in self.model["vocab"].items()}
        tokens, kinds = [], []
        for index in range(size):
            if index in added:
                tokens.append(added[index].content)
                kinds.append(CONTROL if added[index].special else USER_DEFINED)
            else:
                tokens.append(named.get(index, f"[PAD{index}]"))
                kinds.append(NORMAL if index in named else UNUSED)
        return tokens, kinds


def word_cutter(described: dict[str, Any]) -> str:
    """llama.cpp's name of what a tokenizer.json cuts text with: Llama 3's, Qwen2's, SmolLM2's, GPT-2's."""
    steps = described["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type") for step in steps]
    if described["model"]["type"] == "BPE" and not described["normalizer"] and not steps[-1].get("add_prefix_space"):
        if kinds == ["ByteLevel"]:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and steps[0]["pattern"].get("Regex") in REGEXES:
            return REGEXES[steps[0]["pattern"]["Regex"]]
    raise UserError(
        "--format gguf: the tokenizer is not of the kind of Llama 3, Qwen2, SmolLM2 or GPT-2 (byte-level BPE): use "
        "--format granite"
    )
