"""A small language whose every sentence can be checked exactly: "two small red balls lie behind the wooden table".

    subject              verb       place
    a small red ball     lies       under the wooden table
    three old cows       slowly walk past a stone barn

A *shape* is a list of slots, a slot is a tuple of words, and a sentence is one word from each slot of one shape. So
the sentences can be numbered, `sentence(number)` is one of them, and `is_grammatical` looks for a shape that fits. What
has to be learnt: number (a ball lies, balls lie), what moves and what does not (a ball never walks, and `into` needs a
walk), a or an, and that subject and place belong to one topic, which is the sentence's class.
"""

import re
from collections.abc import Iterator
from functools import cache
from itertools import accumulate, product
from math import prod

import numpy as np

Slot = tuple[str, ...]
Shape = tuple[Slot, ...]

SIZES = ("small", "big", "old", "new", "tiny", "heavy")
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "orange")
MATERIALS = ("wooden", "stone", "iron", "glass", "broken", "empty")
ONE, MANY = ("a", "the", "every"), ("two", "three", "four", "the", "some")
MANNERS = ("slowly", "quietly", "often", "never")
STAYS = {"one": ("lies", "stands", "rests", "waits"), "many": ("lie", "stand", "rest", "wait")}
MOVES = {"one": ("walks", "runs", "jumps", "wanders"), "many": ("walk", "run", "jump", "wander")}
WHERE = ("under", "behind", "beside", "near", "on")
WHITHER = ("past", "around", "towards", "into", "across")

# topic: (things, living beings, places); a noun belongs to one topic only, so the nouns give the topic away.
TOPICS = {
    "kitchen": (("cup", "spoon", "pot"), ("cook", "mouse", "kitten"), ("table", "oven", "shelf")),
    "garden": (("flower", "rake", "basket"), ("gardener", "hen", "frog"), ("hedge", "pond", "shed")),
    "harbour": (("boat", "anchor", "net"), ("sailor", "gull", "crab"), ("pier", "lighthouse", "dock")),
    "street": (("car", "lamp", "bicycle"), ("driver", "dog", "pigeon"), ("bridge", "shop", "corner")),
    "farm": (("plough", "bucket", "ladder"), ("farmer", "cow", "horse"), ("barn", "field", "stable")),
    "school": (("book", "pencil", "ball"), ("teacher", "pupil", "child"), ("desk", "board", "window")),
}
IRREGULAR = {"mouse": "mice", "child": "children"}


def plural(noun: str) -> str:
    return IRREGULAR.get(noun, noun + "s")


def _shapes_of(topic: str) -> Iterator[Shape]:
    things, beings, places = TOPICS[topic]
    place = (("the", "a"), MATERIALS, places)
    for count, determiners in (("one", ONE), ("many", MANY)):
        for adjectives in ((SIZES,), (COLOURS,), (SIZES, COLOURS)):
            of_things, of_beings = (
                tuple(noun if count == "one" else plural(noun) for noun in nouns) for nouns in (things, beings)
            )
            yield determiners, *adjectives, of_things, STAYS[count], WHERE, *place
            yield determiners, *adjectives, of_beings, STAYS[count], WHERE, *place
            yield determiners, *adjectives, of_beings, MANNERS, MOVES[count], WHITHER, *place


SHAPES: tuple[tuple[str, Shape], ...] = tuple((topic, shape) for topic in TOPICS for shape in _shapes_of(topic))
_ENDS = list(accumulate(prod(map(len, shape)) for _, shape in SHAPES))
COUNT = _ENDS[-1]  # of all sentences; no two shapes share one, see the tests


def vocabulary() -> set[str]:
    return {word for _, shape in SHAPES for slot in shape for word in slot} | {"an"}


def sentence(number: int) -> str:
    """Sentence `number` of COUNT, in the order of the shapes, the last slot changing first."""
    if not 0 <= number < COUNT:
        raise IndexError(f"the grammar has {COUNT} sentences, there is no number {number}")
    place = int(np.searchsorted(_ENDS, number, side="right"))
    rest, words = number - (_ENDS[place - 1] if place else 0), []
    for slot in reversed(SHAPES[place][1]):
        rest, index = divmod(rest, len(slot))
        words.append(slot[index])
    return _with_an(" ".join(reversed(words)))


def sample(count: int, seed: int) -> list[str]:
    """`count` different sentences: first a topic and a shape, each as likely as another, then the words."""
    if count > COUNT // 4:
        raise ValueError(f"{count} sentences: the grammar gives at most {COUNT // 4} at once")
    rng, chosen = np.random.default_rng(seed), {}  # a dict keeps the order, a set would not
    sizes = np.diff([0, *_ENDS])
    while len(chosen) < count:
        shapes = rng.integers(len(SHAPES), size=count)
        for shape, u in zip(shapes, rng.random(count), strict=True):
            number = _ENDS[shape] - sizes[shape] + int(u * sizes[shape])
            chosen[sentence(number)] = None
            if len(chosen) == count:
                break
    return list(chosen)


@cache
def _by_length() -> dict[int, list[tuple[str, list[frozenset[str]]]]]:
    table: dict[int, list] = {}
    for topic, shape in SHAPES:
        table.setdefault(len(shape), []).append((topic, [frozenset(slot) for slot in shape]))
    return table


def topic_of(text: str) -> str | None:
    """The topic of a sentence of the grammar; None for anything else, be it one letter off."""
    plain = re.sub(r"\ban\b", "a", text)
    if _with_an(plain) != text:
        return None
    words = plain.split(" ")
    for topic, slots in _by_length().get(len(words), []):
        if all(word in slot for word, slot in zip(words, slots, strict=True)):
            return topic
    return None


def is_grammatical(text: str) -> bool:
    return topic_of(text) is not None


def all_sentences(shape: Shape) -> Iterator[str]:
    return (_with_an(" ".join(words)) for words in product(*shape))


def _with_an(text: str) -> str:
    """ "a" becomes "an" before a vowel: an orange cup, an old cup, an empty shelf, an iron desk."""
    return re.sub(r"\ba(?= [aeiou])", "an", text)
