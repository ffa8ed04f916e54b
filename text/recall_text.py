"""Generated documents that ask for memory: what comes later in them can only be known from what came before.

Hybrids keep attention to look up what stands in the context, and ordinary text asks for little of that (Jelassi et
al., arXiv 2402.01032). Document i is a function of (seed, i) and of words and sentences of the run's own text alone,
so that a position in this source is a number. Only `random.random` is drawn from: Python promises its numbers alone
to be the same in every version.

No template here is one of `evaluation/recall_tasks.py`, and four kinds of task there have no counterpart here at all.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from utils import UserError

Part = tuple[str, bool]  # text, and whether it is an answer: known from what stands before it in the document

GENERATED = "recall"  # the name of this source
WORD = re.compile(r"[^\W\d_]{3,12}")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
FEWEST_WORDS = 50
SHORTEST = 150  # characters of a document
CHARACTERS_A_TOKEN = 2  # of lists with numbers; prose has more

PAIR_LINES = (
    "{k} -> {v}", "{k}\t{v}", "{k} | {v}", "({k}, {v})", '"{k}": "{v}",', "{k} => {v};", "The {k} is {v}.",
    "{k} has number {v}.", "<{k}>{v}</{k}>", "Q: {k}? A: {v}", "{k} ..... {v}", "[{k}] {v}", "set {k} to {v}",
    "{k} ({v})", "* {k}, {v}", "For {k} take {v}.",
)  # fmt: skip
PAIR_HEADS = ("", "Index", "What was noted:", "Register", "Entries follow.", "Settings")
AGAIN = ("", "", "The same in another order:", "Once more", "And to check:", "---", "Summary")
COPY_CUES = ("Once again:", "The same text:", "Copy:", "To quote it:", "***", "Second printing", "As it stood above:")
ASSIGNMENTS = (("let {k} = {v}", "{k} is {v}"), ("{k} := {v};", "{k}? {v}"), ("SET {k} {v}", "GET {k} {v}"))
HEADERS = (("| ", " | ", " |"), ("", ",", ""), ("", "\t", ""), ("", ";", ""))
CELL_LINES = ("{row}, {column}: {v}", "{column} of {row}: {v}", "{row}.{column} {v}", "{column}[{row}] -> {v}")


class Draw:
    """Random choices that are the same on every machine and Python version."""

    def __init__(self, *key: object):
        self.next = Random("/".join(map(str, key))).random

    def below(self, count: int) -> int:
        """A whole number from 0 to count - 1."""
        return int(self.next() * count)

    def one(self, items: Sequence[Any]) -> Any:
        """One of the items."""
        return items[self.below(len(items))]

    def some(self, items: Sequence[Any], count: int) -> list[Any]:
        """`count` of the items, at different places, in a random order; all of them where there are fewer."""
        order = list(range(len(items)))
        for at in range(min(count, len(order))):
            other = at + self.below(len(order) - at)
            order[at], order[other] = order[other], order[at]
        return [items[index] for index in order[:count]]

    def digits(self, fewest: int, most: int) -> str:
        """A number of `fewest` to `most` digits, the first not 0."""
        count = fewest + self.below(most - fewest + 1)
        return str(1 + self.below(9)) + "".join(str(self.below(10)) for _ in range(count - 1))


@dataclass(frozen=True)
class Vocabulary:
    """Words (lower case, different) and sentences of a text."""

    words: list[str]
    sentences: list[str]

    @classmethod
    def of(cls, texts: Iterable[str], excluded: Collection[str], name: str) -> "Vocabulary":
        """The words and sentences of some texts without those that hold an `excluded` word (in lower case).

        Raises `UserError` where there are fewer than FEWEST_WORDS words; `name` is what the texts are called.
        """
        words: dict[str, None] = {}
        sentences: dict[str, None] = {}
        for text in texts:
            for sentence in SENTENCE_END.split(text):
                found = [word.lower() for word in WORD.findall(sentence)]
                kept = [word for word in found if word not in excluded]
                words.update(dict.fromkeys(kept))
                if len(found) >= 5 and len(kept) == len(found) and len(sentence) <= 300:
                    sentences[sentence.strip()] = None
        if len(words) < FEWEST_WORDS:
            raise UserError(
                f"{name}: {len(words)} different words at its beginning, and generated text needs {FEWEST_WORDS}: "
                "use more text, or --recall_share 0 (for --layers auto:K: --choice_recall_share 0)"
            )
        return cls(list(words), list(sentences))


class RecallText:
    """The documents of one seed over one vocabulary, from SHORTEST up to about `tokens` tokens each."""

    def __init__(self, vocabulary: Vocabulary, seed: int, tokens: int):
        self.vocabulary, self.seed = vocabulary, seed
        self.longest = max(SHORTEST, CHARACTERS_A_TOKEN * tokens)

    def document(self, index: int) -> str:
        """Document `index` as one text."""
        return "".join(text for text, _ in self.parts(index))

    def parts(self, index: int) -> list[Part]:
        """Document `index` in parts, which say what of it is an answer."""
        draw = Draw("recall", self.seed, index)
        # Even in the logarithm: a long list asks for much memory, a short one is what can be learnt first.
        size = int(SHORTEST * (self.longest / SHORTEST) ** draw.next())
        kind: Callable[[Draw, int], Iterator[Part]] = draw.one(
            (self._pairs, self._pairs, self._passages, self._variables, self._tables)
        )
        return list(kind(draw, size))

    def _names(self, draw: Draw, count: int) -> list[str]:
        """`count` different names in one style."""
        words = self.vocabulary.words
        style = draw.below(5)
        if style == 0:
            return draw.some(words, count)
        found: dict[str, None] = {}
        while len(found) < count:
            first, second = draw.one(words), draw.one(words)
            number = draw.digits(1, 4)
            name = (f"{first} {second}", f"{first.title()} {second.title()}", f"{first}{number}", number + "00")
            found[name[style - 1]] = None
        return list(found)

    def _values(self, draw: Draw, count: int) -> list[str]:
        """`count` values in one style, not all different."""
        words, style = self.vocabulary.words, draw.below(5)
        if style == 0:
            return [draw.one(words) for _ in range(count)]
        if style == 1:
            return [f"{draw.one(words)} {draw.one(words)}" for _ in range(count)]
        if style == 2:
            return [f"{draw.one(words)}{draw.digits(1, 2)}" for _ in range(count)]
        return [draw.digits(2, 7) if style == 3 else draw.digits(3, 3) for _ in range(count)]

    def _pairs(self, draw: Draw, size: int) -> Iterator[Part]:
        """A list of pairs, then the same pairs in other orders."""
        rounds = 1 + draw.below(3)
        count = max(3, size // (22 * (1 + rounds)))
        pairs = list(zip(self._names(draw, count), self._values(draw, count)))
        line = draw.one(PAIR_LINES)
        yield _head(draw.one(PAIR_HEADS)), False
        yield "".join(line.format(k=key, v=value) + "\n" for key, value in pairs), False
        for _ in range(rounds):
            yield _head(draw.one(AGAIN)), False
            if draw.below(3) == 0:
                line = draw.one(PAIR_LINES)
            asked = draw.some(pairs, len(pairs) if draw.below(2) else 1 + draw.below(len(pairs)))
            yield from _answered(line, ({"k": key, "v": value} for key, value in asked))

    def _passages(self, draw: Draw, size: int) -> Iterator[Part]:
        """Numbered passages and one or all of them once more, or a list of words or numbers and itself again."""
        sentences, words = self.vocabulary.sentences, self.vocabulary.words
        if not sentences or draw.below(3) == 0:
            count = max(4, size // 14)
            items = [draw.digits(2, 4) if draw.below(4) == 0 else draw.one(words) for _ in range(count)]
            passages = [draw.one((" ", ", ", "\n")).join(items)]
        else:
            chosen = [draw.one(sentences) for _ in range(max(1, size // 250))]
            cut = 1 + draw.below(len(chosen))
            passages = [" ".join(part) for part in (chosen[:cut], chosen[cut:]) if part]
        order = draw.some(list(range(len(passages))), len(passages))
        mark = draw.one(("", "[{n}] ", "{n}) ")) if len(passages) > 1 else ""
        for number, passage in enumerate(passages, 1):
            yield f"{mark.format(n=number)}{passage}\n", False
        for number in order:
            yield f"{draw.one(COPY_CUES)}\n{mark.format(n=number + 1)}", False
            yield from _continued(passages[number])
            yield "\n", False

    def _variables(self, draw: Draw, size: int) -> Iterator[Part]:
        """Variables that take numbers or each other's values, then their values."""
        names = self._names(draw, max(3, size // 36))
        assign, ask = draw.one(ASSIGNMENTS)
        values: dict[str, str] = {}
        for name in names:
            copied = draw.one(list(values)) if values and draw.below(3) == 0 else None
            values[name] = values[copied] if copied else draw.digits(1, 4)
            yield assign.format(k=name, v=copied or values[name]) + "\n", False
        yield "\n", False
        yield from _answered(ask, ({"k": name, "v": values[name]} for name in draw.some(names, len(names))))

    def _tables(self, draw: Draw, size: int) -> Iterator[Part]:
        """A table, then some of its cells by row and column."""
        columns = self._names(draw, 2 + draw.below(4))
        rows = self._names(draw, max(2, size // (20 * len(columns) + 30)))
        cells = {row: dict(zip(columns, self._values(draw, len(columns)))) for row in rows}
        left, between, right = draw.one(HEADERS)
        yield f"{left}{between.join(['', *columns] if left else ['name', *columns])}{right}\n", False
        yield "".join(f"{left}{between.join([row, *cells[row].values()])}{right}\n" for row in rows) + "\n", False
        places = [(row, column) for row in rows for column in columns]
        asked = draw.some(places, max(2, len(places) // 2))
        yield from _answered(
            draw.one(CELL_LINES), ({"row": row, "column": name, "v": cells[row][name]} for row, name in asked)
        )


def _head(text: str) -> str:
    return f"{text}\n" if text else ""


def _answered(line: str, fields: Iterable[dict[str, str]]) -> Iterator[Part]:
    """Lines whose value, with the space before it, is an answer."""
    before, _, after = line.partition("{v}")
    space = " " if before.endswith(" ") else ""
    before = before.removesuffix(" ") if space else before
    for each in fields:
        yield before.format(**each), False
        yield space + each["v"], True
        yield after.format(**each) + "\n", False


def _continued(passage: str) -> Iterator[Part]:
    """A passage whose beginning says which it is, and whose rest is an answer."""
    cut = passage.find(" ", 12)
    cut = len(passage) // 2 if cut < 0 else cut
    yield passage[:cut], False
    yield passage[cut:], True
