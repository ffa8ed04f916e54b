"""Several sources in one stage, by weight: which source each sequence of the global order comes from.

Sequences, not documents, are mixed, so that each source keeps its own packing, order and cursor. Who is next is
smooth weighted round-robin: each source gains its share a sequence, the one with most gives the next sequence and
pays 1. So shares come out to within a sequence at every point, nothing is random, and the state is a credit a source.
"""

import itertools
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from text.blocks import Block, Cursor
from text.packing import PackedTextDataset
from text.packing import Sequence as TokenSequence
from text.recall_text import GENERATED, RecallText, Vocabulary
from text.text_sources import SourceSpec, TextSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATED_BLOCK = 64  # documents made at a time
VOCABULARY_CHARACTERS = 1 << 20  # of a run's text that generated documents take words and sentences from
VOCABULARY_ROWS = 4096


class MixedSpec(NamedTuple):
    """A source that is mixed in, its share of all sequences, and what it is called in states and reports."""

    name: str
    share: float
    source: SourceSpec | None  # None: generated


class Mark(NamedTuple):
    """Where the mixture stands behind a sequence: the last sequence of each source, how many each gave, credits."""

    last: tuple[TokenSequence | None, ...]
    given: tuple[int, ...]
    credits: tuple[float, ...]


class GeneratedBlocks:
    """Blocks of an endless source whose documents are made from their number."""

    def __init__(self, text: RecallText):
        self.text = text

    def epoch(self, cursor: Cursor) -> Iterator[Block]:
        """Every block from the cursor's on, without end."""
        for block in itertools.count(cursor.block):
            numbers = range(block * GENERATED_BLOCK, (block + 1) * GENERATED_BLOCK)
            yield Block(Cursor(0, block), [(self.text.document(n), f"{GENERATED}:{n}") for n in numbers])


class GeneratedDataset(PackedTextDataset):
    """Packed sequences of generated documents."""

    def __init__(self, text: RecallText, tokenizer: "PreTrainedTokenizerBase", *, seq_length: int, version: int):
        self.text = text
        spec = SourceSpec(GENERATED, shuffle_buffer=0, version=version)
        source = TextSource(GENERATED, [], f"{GENERATED} 1")
        super().__init__(spec, tokenizer, seq_length=seq_length, seed=text.seed, source=source)

    def _make_blocks(self) -> Any:
        return GeneratedBlocks(self.text)

    def _check_enough(self) -> None:
        pass


class MixedDataset:
    """A main source and others by weight, with the face of a `PackedTextDataset` towards the loader.

    The main source has what the others leave, and where it ends, after its passes, the mixture ends. The others
    begin anew without end. `names` are those of the other sources; shares are of sequences.
    """

    def __init__(self, main: PackedTextDataset, others: dict[str, PackedTextDataset], shares: Sequence[float]):
        self.main, self.names = main, list(others)
        self.datasets = [main, *others.values()]
        self.shares = [1.0 - sum(shares), *shares]
        self.credits = [0.0] * len(self.datasets)

    @property
    def source(self) -> TextSource:
        """The main source."""
        return self.main.source

    @property
    def share(self) -> float | None:
        """Of the main source's passes, what was given out."""
        return self.main.share

    @property
    def sequences(self) -> int:
        """Sequences given out, of all sources."""
        return sum(each.sequences for each in self.datasets)

    @property
    def counters(self) -> dict[str, int]:
        """Documents, tokens, empty and bad rows of all sources."""
        return {name: sum(each.counters[name] for each in self.datasets) for name in self.main.counters}

    def places(self) -> set[str]:
        """Where the files of every source are."""
        return set().union(*(each.places() for each in self.datasets))

    def stop_with(self, stop: threading.Event) -> None:
        """Waiting for the network ends when `stop` is set."""
        for each in self.datasets:
            each.stop_with(stop)

    def stream(self, ahead: Callable[[Iterator[Any]], Iterator[Any]] = iter) -> Iterator[TokenSequence]:
        """Sequences from the state on, without moving it; each carries where every source stands behind it."""
        streams = [each.stream(ahead) for each in self.datasets]
        last: list[TokenSequence | None] = [None] * len(streams)
        given, credits = [each.sequences for each in self.datasets], list(self.credits)
        while True:
            credits = [credit + share for credit, share in zip(credits, self.shares)]
            chosen = max(range(len(credits)), key=credits.__getitem__)
            credits[chosen] -= 1.0
            sequence = next(streams[chosen], None)
            if sequence is None:
                return
            last[chosen], given[chosen] = sequence, given[chosen] + 1
            yield replace(sequence, mark=Mark(tuple(last), tuple(given), tuple(credits)))

    def advance(self, sequence: TokenSequence, count: int = 1) -> None:
        """Take note that everything up to this sequence was given out."""
        mark = sequence.mark
        assert mark is not None
        for each, last, given in zip(self.datasets, mark.last, mark.given):
            if last is not None:
                each.advance(last, given - each.sequences)
        self.credits = list(mark.credits)

    def state_dict(self) -> dict[str, Any]:
        """The main source's own state, and `mix`: the other sources' states and all credits."""
        states = {name: each.state_dict() for name, each in zip(self.names, self.datasets[1:])}
        return {**self.main.state_dict(), "mix": {"sources": states, "credits": self.credits}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Sources that it does not know begin at their beginning.

        Credits hold for the same sources alone: of other ones the shares are counted anew.
        """
        self.main.load_state_dict(state)
        mix = state.get("mix", {"sources": {}, "credits": []})
        for name, each in zip(self.names, self.datasets[1:]):
            if name in mix["sources"]:
                each.load_state_dict(mix["sources"][name])
        same = list(mix["sources"]) == self.names
        self.credits = list(mix["credits"]) if same else [0.0] * len(self.datasets)


def source_shares(state: dict[str, Any]) -> dict[str, float]:
    """The shares of sequences as they came out, by source, from a loader's state; empty without a mixture.

    The stage's own data set is called "main".
    """
    if "mix" not in state:
        return {}
    counts = {"main": state["sequences"], **{n: each["sequences"] for n, each in state["mix"]["sources"].items()}}
    total = max(1, sum(counts.values()))
    return {name: count / total for name, count in counts.items()}


def vocabulary_of(source: TextSource, excluded: Collection[str]) -> Vocabulary:
    """Words and sentences of the first rows of a source, in the files' own order; bad rows are passed over."""
    texts: list[str] = []
    rows = source.documents(list(range(len(source.files))), (0, 0, 0))
    for value, *_ in itertools.islice(rows, VOCABULARY_ROWS):
        texts += _texts(value)
        if sum(map(len, texts)) >= VOCABULARY_CHARACTERS:
            break
    return Vocabulary.of(texts, excluded, source.name)


def _texts(value: Any) -> list[str]:
    """The texts in a row's value: itself, or the turns of a conversation."""
    if isinstance(value, list):
        return [text for turn in value if isinstance(turn, dict) for text in turn.values() if isinstance(text, str)]
    if isinstance(value, bytes | memoryview):
        return [str(value[:VOCABULARY_CHARACTERS], "utf-8", "ignore")]
    return [value[:VOCABULARY_CHARACTERS]] if isinstance(value, str) else []


def mixed_dataset(
    main: PackedTextDataset,
    mixed: Collection[MixedSpec],
    tokenizer: "PreTrainedTokenizerBase",
    excluded: Collection[str],
) -> MixedDataset:
    """`main` with other sources; generated documents take the words of main's text but those of `excluded`.

    Raises `UserError` as `build_loader` does, for each of the sources.
    """
    others: dict[str, PackedTextDataset] = {}
    options: dict[str, Any] = dict(seq_length=main.seq_length)
    for each in mixed:
        if each.source is None:
            text = RecallText(vocabulary_of(main.source, excluded), main.seed, main.seq_length)
            others[each.name] = GeneratedDataset(text, tokenizer, version=main.spec.version, **options)
        else:
            others[each.name] = PackedTextDataset(each.source, tokenizer, seed=main.seed, **options)
    return MixedDataset(main, others, [each.share for each in mixed])
