"""Questions that only the context answers: ten kinds, each a function from (random numbers, items, depth) to a row.

A row's prompt holds `items` pairs, sentences, lines or examples; what is asked for stands at `depth`, 0 (first) to 1
(last). The student and the teacher are asked the same rows. Training text that is generated
(`text/recall_text.py`) leaves out every word of `KEY_WORDS`, and has no counterpart of the kinds `NEVER_TRAINED`.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

FIRST = (
    "James Mary Robert Linda John Susan David Karen Paul Nancy Mark Lisa George Betty Brian Helen Kevin Sandra"
).split()
LAST = (
    "Smith Jones Brown Davis Miller Wilson Moore Taylor Clark Lewis Walker Hall Young King Wright Hill Scott"
).split()
WORDS = "apple river stone cloud train candle garden window silver forest bridge market summer winter".split()
CITIES = (
    "Lisbon Cairo Oslo Lima Kyoto Dublin Havana Quito Vienna Nairobi Prague Madrid Athens Boston Denver Tokyo "
    "Geneva Milan Seoul Delhi"
).split()
ANIMALS = (
    "otter falcon badger lizard salmon rabbit walrus donkey beaver parrot hamster panther squirrel turtle camel goat"
).split()
METALS = "copper bronze nickel tin zinc iron cobalt lead".split()
TOOLS = "hammer chisel pliers wrench shovel drill ladder saw axe spanner crowbar mallet".split()
FOODS = "bread butter cheese honey pepper noodle soup cherry carrot onion lemon biscuit rice pasta".split()
COLOURS = "crimson violet orange purple turquoise yellow scarlet indigo olive magenta".split()
LABELS = "blick dax wug toma zop fep kiv mun".split()
CLASSES = (ANIMALS, CITIES, TOOLS, FOODS, COLOURS)
KEY_WORDS = frozenset(
    word.lower()
    for words in (FIRST, LAST, WORDS, CITIES, ANIMALS, METALS, TOOLS, FOODS, COLOURS, LABELS)
    for word in words
)

SUBJECTS = (
    "the old teacher,a quiet neighbour,the travelling doctor,every visitor,the younger sister,a tired farmer,"
    "the new librarian,one of the guests,the night porter,a careful painter"
).split(",")
VERBS = (
    "walked along,looked across,wrote about,kept away from,often spoke of,slowly crossed,waited beside,"
    "took a picture of,returned to,had never liked"
).split(",")
PLACES = (
    "the empty harbour,a narrow street,the wooden gate,the small museum,an open field,the railway station,"
    "the broken fence,a long corridor,the village square,the muddy path"
).split(",")
TIMES = (
    "in the early morning,before the rain began,after a long dinner,without saying a word,on the last day,"
    "for the second time,while the others slept,as usual,much later than planned,in complete silence"
).split(",")


@dataclass
class RecallRow:
    """One question: the context, the cue, and what must follow; `depth` is where in the context the answer stands."""

    prompt: str
    answer: str
    depth: float = 0.0


def _at(depth: float, count: int) -> int:
    return min(count - 1, int(depth * count))


def _names(rng: random.Random, count: int) -> list[str]:
    """`count` different names of people; above 306 some have an initial."""
    names = [f"{first} {last}" for first in FIRST for last in LAST]
    if count > len(names):
        letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
        names += [f"{first} {letter}. {last}" for first in FIRST for letter in letters for last in LAST]
    return rng.sample(names, count)


def phone_book(rng: random.Random, items: int, depth: float | None = None) -> RecallRow:
    """`First Last: 555-0123` lines, then one name again."""
    names = _names(rng, items)
    numbers = [f"{rng.randrange(200, 999)}-{rng.randrange(1000, 9999)}" for _ in names]
    chosen = rng.randrange(items) if depth is None else _at(depth, items)
    book = "\n".join(f"{name}: {number}" for name, number in zip(names, numbers))
    return RecallRow(f"Phone book:\n{book}\n\nThe number again:\n{names[chosen]}:", f" {numbers[chosen]}")


def key_value(rng: random.Random, items: int, depth: float | None = None) -> RecallRow:
    """`word-12 = 345` pairs, then one key again."""
    numbers = range(10, 60 if items <= 50 * len(WORDS) else 1000)
    keys = rng.sample([f"{word}-{number}" for word in WORDS for number in numbers], items)
    values = [str(rng.randrange(100, 999)) for _ in keys]
    chosen = rng.randrange(items) if depth is None else _at(depth, items)
    table = "\n".join(f"{key} = {value}" for key, value in zip(keys, values))
    return RecallRow(f"{table}\n{keys[chosen]} =", f" {values[chosen]}")


def _prose(rng: random.Random, sentences: int) -> list[str]:
    parts = (SUBJECTS, VERBS, PLACES, TIMES)
    return [" ".join(rng.choice(words) for words in parts).capitalize() + "." for _ in range(sentences)]


def _code_sentence(city: str, code: int) -> str:
    return f"The secret code of {city} is {code}."


def needle(rng: random.Random, items: int, depth: float) -> RecallRow:
    """One sentence with a number in prose about other things."""
    text, city, code = _prose(rng, items), rng.choice(CITIES), rng.randrange(10000, 99999)
    text.insert(_at(depth, items + 1), _code_sentence(city, code))
    return RecallRow(f"{' '.join(text)}\n\nWhat was the code? The secret code of {city} is", f" {code}")


def needles(rng: random.Random, items: int, depth: float) -> RecallRow:
    """Six such sentences spread over the prose; one of them is asked for."""
    text, cities = _prose(rng, items), rng.sample(CITIES, 6)
    codes = [rng.randrange(10000, 99999) for _ in cities]
    chosen = _at(depth, len(cities))
    for number in reversed(range(len(cities))):
        text.insert(round(number / len(cities) * len(text)), _code_sentence(cities[number], codes[number]))
    question = f"What was the code? The secret code of {cities[chosen]} is"
    return RecallRow(f"{' '.join(text)}\n\n{question}", f" {codes[chosen]}")


def reverse(rng: random.Random, items: int, depth: float) -> RecallRow:
    """`Name lives in house 123` lines; the number is given and the name asked for."""
    names, houses = _names(rng, items), rng.sample(range(100, max(999, 3 * items)), items)
    chosen = _at(depth, items)
    lines = "\n".join(f"{name} lives in house {house}" for name, house in zip(names, houses))
    return RecallRow(f"{lines}\n\nWho lives in house {houses[chosen]}? It is", f" {names[chosen]}")


def near_keys(rng: random.Random, items: int, depth: float) -> RecallRow:
    """Keys that differ in one part of three: `copper-otter-31 holds 5821`."""
    parts = [(metal, animal, number) for metal in METALS for animal in ANIMALS for number in range(10, 30)]
    one = rng.choice(parts)
    near = [part for part in parts if sum(a != b for a, b in zip(part, one)) == 1]
    keys = rng.sample(near, min(items - 1, len(near)))
    keys += rng.sample([part for part in parts if part not in {*keys, one}], items - 1 - len(keys))
    chosen = _at(depth, items)
    keys.insert(chosen, one)
    values = [str(rng.randrange(1000, 9999)) for _ in keys]
    lines = "\n".join(f"{'-'.join(map(str, key))} holds {value}" for key, value in zip(keys, values))
    return RecallRow(f"{lines}\n\nAgain: {'-'.join(map(str, one))} holds", f" {values[chosen]}")


def copied_sentence(rng: random.Random, items: int, depth: float) -> RecallRow:
    """Prose, then the beginning of one of its sentences (which stands there once); its end must follow."""
    text = list(dict.fromkeys(_prose(rng, items)))
    place, word, code = _at(depth, len(text)), rng.choice(WORDS), rng.randrange(10, 99)
    begin, end = (
        f"{rng.choice(SUBJECTS).capitalize()} number {code} said that",
        (f" {word} {rng.choice(CITIES)} {rng.choice(ANIMALS)} {rng.choice(TOOLS)} {rng.choice(FOODS)}"),
    )
    text.insert(place, f"{begin}{end}.")
    return RecallRow(f"{' '.join(text)}\n\nRead the sentence aloud: {begin}", end)


def variables(rng: random.Random, items: int, depth: float) -> RecallRow:
    """A program in which variables take numbers, or the value of an earlier variable; one that does is printed."""
    names = rng.sample(
        [f"{letter}{number}" for letter in "abcdefghijkmnpqrstuvwxyz" for number in range(2000)], items
    )
    given = max(1, items // 2)
    values = {name: str(rng.randrange(100, 999)) for name in names[:given]}
    lines = [f"{name} = {value}" for name, value in values.items()]
    chosen = _at(depth, given)
    order = [*rng.choices(range(given), k=items - given)]
    order[rng.randrange(len(order))] = chosen
    lines += [f"{name} = {names[place]}" for name, place in zip(names[given:], order)]
    asked = names[given + order.index(chosen)]
    program = "\n".join(lines)
    return RecallRow(f"{program}\nprint({asked})\n# prints", f" {values[names[chosen]]}")


def table_cell(rng: random.Random, items: int, depth: float) -> RecallRow:
    """Rows of a person's age, city and metal; one cell is asked for in a sentence."""
    names = _names(rng, items)
    rows = [(name, rng.choice(CITIES), rng.choice(METALS), rng.choice(ANIMALS)) for name in names]
    chosen, column = _at(depth, items), rng.randrange(1, 4)
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    what = ("", "city", "metal", "animal")[column]
    question = f"The {what} of {names[chosen]} is"
    return RecallRow(f"| person | city | metal | animal |\n{lines}\n\n{question}", f" {rows[chosen][column]}")


def classification(rng: random.Random, items: int, depth: float) -> RecallRow:
    """Words of five classes with arbitrary labels; a word that was not shown is to be labelled.

    `depth` has no one place here: every example of the class tells.
    """
    labels = rng.sample(LABELS, len(CLASSES))
    asked = rng.randrange(len(CLASSES))
    word = rng.choice(CLASSES[asked])
    lines = []
    for number in rng.sample([place % len(CLASSES) for place in range(items)], items):
        shown = rng.choice([each for each in CLASSES[number] if each != word])
        lines.append(f"word: {shown.lower()} label: {labels[number]}")
    return RecallRow("\n".join([*lines, f"word: {word.lower()} label:"]), f" {labels[asked]}", depth)


Task = Callable[[random.Random, int, float], RecallRow]
TASKS: dict[str, Task] = {
    "phone_book": phone_book,
    "key_value": key_value,
    "near_keys": near_keys,
    "copy": copied_sentence,
    "variables": variables,
    "table": table_cell,
    "needle": needle,
    "needles": needles,
    "reverse": reverse,
    "classification": classification,
}
PAIR_TASKS = ("phone_book", "key_value")  # asked by number of pairs too
NEVER_TRAINED = ("needle", "needles", "reverse", "classification")  # kinds without a counterpart in training's text
DEPTHS = 10


def recall_rows(task: str, pairs: int, count: int, seed: int = 0) -> list[RecallRow]:
    """`count` rows of one of PAIR_TASKS with `pairs` pairs each; the same for the same seed. At most 306 pairs."""
    rng = random.Random(f"{task}/{pairs}/{seed}")
    ask: Callable[..., RecallRow] = TASKS[task]
    return [ask(rng, pairs) for _ in range(count)]


def rows_of_length(
    task: str, tokens: int, count: int, count_tokens: Callable[[str], int], seed: int = 0
) -> list[RecallRow]:
    """`count` rows of about, mostly at most, `tokens` tokens, at ten depths in turn; the same for the same seed."""
    rng = random.Random(f"{task}@{tokens}/{seed}")
    ask = TASKS[task]

    def size(items: int) -> float:
        rows = [ask(random.Random(f"{task}/{number}"), items, 0.5) for number in range(8)]
        return sum(count_tokens(row.prompt + row.answer) for row in rows) / len(rows)

    small, large = size(8), size(72)
    each = (large - small) / 64
    items = max(2, int((0.98 * tokens - small) / each) + 8)
    depths = [(number % DEPTHS + 0.5) / DEPTHS for number in range(count)]
    rows = [ask(rng, items, depth) for depth in depths]
    for row, depth in zip(rows, depths):
        row.depth = depth
    return rows
