"""Documents and conversations as token ids.

A document becomes a list of *segments*: pieces of text still to be tokenised, and ids that are known already (the
chat template's own text, the separator). Text is tokenised with special tokens switched off, so that the name of
one inside a document stays text. A text starts as the tokenizer itself starts one, since evaluation and generation
do.
"""

import functools
import itertools
import re
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from utils import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

PIECE = 1 << 15  # characters; longer texts are split where that does not change their tokens
WINDOW = 1 << 23  # bytes of a long text that are decoded at a time
LONGEST_PIECE = 1 << 20  # characters; cut there even if no such place was found
SEPARATORS = ("<|end_of_text|>", "<|endoftext|>")
ROLES = {"human": "user", "gpt": "assistant"}
KNOWN_ROLES = {"system", "user", "assistant", "tool"}
DATE = "26 Jul 2024"  # the date that Llama 3.1's template falls back to; "today" would not be reproducible
STRIPPED = (lambda text: text, str.strip, str.rstrip, str.lstrip)  # what templates do to contents

LETTER = r"[^\W\d_]"
KEEP_SPACE = re.compile(rf"(?<={LETTER})(?=[ \n]{LETTER})")
DROP_SPACE = re.compile(rf"(?<={LETTER}) (?={LETTER})")
PROBE = (
    "It's well-known that, e.g., 3.14159 isn't 22/7 (really!), and we'll\nsee  why:\n\n\tfor x in range(10):\n"
    "        print(x)\nThe naïve café in Zürich «привет мир» sells 1,000 crêpes a day… 中文 字符 and naught\n"
    "I DON'T know what he'd do THEN or when\nThe End of it all\r\nhas come to pass"
)

TextOrIds = str | np.ndarray

_copies: "weakref.WeakKeyDictionary[Any, Any]" = weakref.WeakKeyDictionary()


class BadDocument(ValueError):
    """A document that cannot be turned into tokens; the message says why."""


def separator_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The token after every document: `<|end_of_text|>`, else `<|endoftext|>`, else eos."""
    vocabulary = tokenizer.get_vocab()
    for name in SEPARATORS:
        if name in vocabulary:
            return vocabulary[name]
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has neither an end-of-text nor an eos token to put between documents")
    return tokenizer.eos_token_id


def plain_backend(tokenizer: "PreTrainedTokenizerBase") -> Any:
    """A copy of the fast tokenizer's backend that reads special tokens' names as text; one copy a tokenizer."""
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{type(tokenizer).__name__} is no fast tokenizer; the data loader needs one")
    if tokenizer not in _copies:
        from tokenizers import Tokenizer

        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        _copies[tokenizer] = backend
    return _copies[tokenizer]


def start_ids(backend: "Tokenizer") -> np.ndarray:
    """What the tokenizer itself puts before a text, int32: Llama 3's is its BOS, SmolLM2's is empty."""
    found = backend.encode("a")
    added = itertools.takewhile(lambda pair: pair[1], zip(found.ids, found.special_tokens_mask))
    return np.array([token for token, _ in added], dtype=np.int32)


class DocumentEncoder:
    """Turns values of a text or conversations column into segments, and segments into ids."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", chat: bool = False, started: bool = True):
        """`started` False leaves out the tokenizer's own start of a text, as runs begun before that rule do."""
        self.tokenizer, self.chat = tokenizer, chat
        self.backend = plain_backend(tokenizer)
        self.start = start_ids(self.backend)[: None if started else 0]
        self.separator = np.array([separator_id(tokenizer)], dtype=np.int32)
        self.boundary = find_boundary(self.backend)
        if chat and not tokenizer.chat_template:
            raise UserError(
                "the tokenizer has no chat template, which conversations need; take an instruction-tuned teacher, "
                "name a plain text column with --second_dataset_text_field, or use --skip_stage2"
            )
        self.special_names = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.template_ids = functools.lru_cache(1024)(self._template_ids)
        self.template_parts = functools.lru_cache(256)(self._template_parts)

    def segments(self, value: object) -> Iterable[TextOrIds]:
        """Segments of one document, the separator last; none for an empty document. A text is split as it is used.

        A text begins with the tokenizer's own start (nothing for some); a conversation is its template's output.

        Raises `BadDocument`, before the first segment, for values that are no text or no conversation.
        """
        if value is None:
            return []
        if self.chat:
            return self._conversation(value)
        if isinstance(value, bytes | memoryview):
            return itertools.chain(self._begun(), split_long(value, self.boundary), [self.separator])
        if not isinstance(value, str):
            raise BadDocument(f"the column holds {type(value).__name__}, not text")
        if not value or value.isspace():
            return []
        return itertools.chain(self._begun(), self._pieces(value), [self.separator])

    def encode(self, texts: Sequence[str]) -> list[Any]:
        """The backend's encodings of plain texts, without special tokens, for `ids_of`."""
        return self.backend.encode_batch_fast(list(texts), add_special_tokens=False) if texts else []

    def _begun(self) -> list[TextOrIds]:
        return [self.start] if len(self.start) else []

    def _pieces(self, text: str) -> Iterator[str]:
        try:
            _ = text.isascii() or text.encode()
        except UnicodeEncodeError as error:  # UTF-16 halves, which JSON can smuggle in and UTF-8 cannot hold
            raise BadDocument(f"invalid Unicode: half a surrogate pair at character {error.start}") from error
        return split_text(text, self.boundary)

    def _conversation(self, turns: object) -> list[TextOrIds]:
        messages = read_turns(turns)
        if all(not message["content"] or message["content"].isspace() for message in messages):
            return []
        rendered = self._render(messages)
        parts = self.template_parts(tuple(message["role"] for message in messages))
        contents = match_contents(rendered, parts, [message["content"] for message in messages]) if parts else None
        if parts is None or contents is None:
            return self._whole(rendered, messages)
        segments: list[TextOrIds] = [self.template_ids(parts[0])]
        for content, part in zip(contents, parts[1:]):
            segments += [*self._pieces(content), self.template_ids(part)]
        return [*(segment for segment in segments if len(segment)), self.separator]

    def _whole(self, rendered: str, messages: list[dict[str, str]]) -> list[TextOrIds]:
        """A conversation whose template rewrites the messages: exact as long as no message names a special token."""
        if any(name in message["content"] for message in messages for name in self.special_names):
            raise BadDocument("a message names a special token, and the chat template rewrites messages")
        return [self._template_ids(rendered), self.separator]

    def _render(self, messages: list[dict[str, str]]) -> str:
        from jinja2 import TemplateError

        try:
            rendered = self.tokenizer.apply_chat_template(messages, tokenize=False, date_string=DATE)
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            raise BadDocument(f"the chat template refuses this conversation: {error}") from error
        assert isinstance(rendered, str)
        return rendered

    def _template_parts(self, roles: tuple[str, ...]) -> list[str] | None:
        """The template's own text before, between and after the messages, for conversations with these roles."""
        marks = [f"\ue000{index}\ue001" for index in range(len(roles))]
        messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks)]
        rest, parts = self._render(messages), []
        for mark in marks:
            before, found, rest = rest.partition(mark)
            if not found:
                return None
            parts.append(before)
        return None if "\ue000" in rest else [*parts, rest]

    def _template_ids(self, text: str) -> np.ndarray:
        """Ids of the template's own text, special tokens as such, BOS not doubled."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        bos = self.tokenizer.bos_token_id
        if len(ids) > 1 and ids[0] == ids[1] == bos:
            del ids[0]
        return np.array(ids, dtype=np.int32)


def ids_of(encoding: Any) -> np.ndarray:
    """Token ids (int32) of one of the backend's encodings."""
    return np.fromiter(encoding.ids, dtype=np.int32, count=len(encoding))


def read_turns(turns: object) -> list[dict[str, str]]:
    """OpenHermes' turns ({from, value}; human, gpt) as messages ({role, content}); raises `BadDocument`."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadDocument(f"no list of turns but {type(turns).__name__}")
    messages = []
    for turn in turns:
        role = turn.get("from") or turn.get("role")
        role = ROLES.get(role, role)
        content = turn.get("value") if "value" in turn else turn.get("content")
        if role not in KNOWN_ROLES:
            raise BadDocument(f"unknown role {role!r} in a conversation")
        if not isinstance(content, str | None):
            raise BadDocument(f"a message is {type(content).__name__}, not text")
        messages.append({"role": role, "content": content or ""})
    return messages


def match_contents(rendered: str, parts: list[str], contents: list[str]) -> list[str] | None:
    """The contents as they stand in `rendered` between the template's parts, or None if they were rewritten.

    Templates may strip whitespace from a message (Llama 3 does), and nothing else is recognised.
    """
    if not rendered.startswith(parts[0]):
        return None
    at, found = len(parts[0]), []
    for content, part in zip(contents, parts[1:]):
        for strip in STRIPPED:
            text = strip(content)
            if rendered.startswith(text, at) and rendered.startswith(part, at + len(text)):
                break
        else:
            return None
        found.append(text)
        at += len(text) + len(part)
    return found if at == len(rendered) else None


def find_boundary(backend: "Tokenizer") -> re.Pattern[str] | None:
    """Where this tokenizer's text can be split without changing its tokens; None: not known.

    Byte-level tokenizers (Llama 3, SmolLM2) start a token at the space between two words, so the space stays with
    the right part. Tokenizers that put a space before every text (Llama 2) get the right part without it. Which of
    the two holds is tried out on a text, at every place.
    """
    whole = backend.encode(PROBE, add_special_tokens=False).ids
    for pattern in (KEEP_SPACE, DROP_SPACE):
        cuts = list(pattern.finditer(PROBE))
        if all(_ids(backend, PROBE[: cut.start()]) + _ids(backend, PROBE[cut.end() :]) == whole for cut in cuts):
            return pattern
    return None


def _ids(backend: "Tokenizer", text: str) -> list[int]:
    return backend.encode(text, add_special_tokens=False).ids


def split_text(text: str, boundary: re.Pattern[str] | None) -> Iterator[str]:
    """Pieces of about PIECE characters, whose tokens in a row are those of the whole text.

    A text without a known place to split for LONGEST_PIECE characters (no spaces at all, say) is cut there, which
    may change the tokens beside the cut.
    """
    start = 0
    while len(text) - start > PIECE:
        limit = start + LONGEST_PIECE
        cut = boundary.search(text, start + PIECE, limit) if boundary else None
        if cut is None and len(text) <= limit:
            break
        yield text[start : cut.start() if cut else limit]
        start = cut.end() if cut else limit
    if start < len(text):
        yield text[start:]


def split_long(data: bytes | memoryview, boundary: re.Pattern[str] | None) -> Iterator[str]:
    """`split_text` for a long text in UTF-8, of which only a window is decoded at a time."""
    start = 0
    while start < len(data):
        text = str(data[start : start + WINDOW], "utf-8", "ignore")  # may end inside a character
        end = start + len(text.encode())
        if end < len(data) and boundary:
            cuts = list(boundary.finditer(text, max(0, len(text) - LONGEST_PIECE)))
            if cuts:
                end = start + len(text[: cuts[-1].end()].encode())
                text = text[: cuts[-1].start()]
        yield from split_text(text, boundary)
        start = end
