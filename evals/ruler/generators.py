"""A draft of one sample of each kind of task; everything random is drawn from the sample's own stream.

The same distributions as RULER's generators, but the amount of haystack is open to the word or character, so that every
sample fills its length (see fit.py).
"""

from __future__ import annotations

import math
import random
import re
import string
import uuid
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, pairwise

import numpy as np

from evals.ruler.fit import TokenCounter, fit
from evals.ruler.material import Material, Question
from evals.ruler.sets import Draft, RulerTask
from evals.ruler.wording import Wording

DEPTHS = [float(depth) for depth in np.rint(np.linspace(0, 100, 40))]  # percent
SHORT = 4096  # below it word lists have fewer repetitions
EXAMPLE_TOKENS = 500  # of variable tracking's example
HOPS = 4
COMMON_WORDS = 10
WORD_LENGTH = 6  # letters of a coded word
ZETA_2 = math.pi**2 / 6
ALPHA = 2.001  # RULER's 2, but so that the counts of several words do not rise at the same size
SPLIT = 100


@dataclass(frozen=True)
class Source:
    """What drafts of one task at one length are made from. count: tokens of a text."""

    task: RulerTask
    length: int
    wording: Wording
    material: Material
    count: TokenCounter


def draft(source: Source, draw: random.Random, question: Question | None = None) -> Draft:
    """A sample of the task; question: of question answering."""
    if question is not None:
        return question_answering(source, draw, question)
    return GENERATORS[source.task.kind](source, draw)


def niah(source: Source, draw: random.Random) -> Draft:
    """Needles "key: value" in a haystack; all values of some keys are asked for."""
    task, wording = source.task, source.wording

    def value(kind: str) -> str:
        if kind == "numbers":
            return str(draw.randint(1_000_000, 9_999_999))
        return source.material.pair(draw) if kind == "words" else _uuid(draw)

    pairs = [(value(task.key_type), [value(task.value_type) for _ in range(task.values)]) for _ in range(task.keys)]
    needles = [
        wording.needle.format(type_needle_v=task.value_type, key=key, value=each)
        for key, found in pairs
        for each in found
    ]
    draw.shuffle(needles)
    asked = draw.sample(pairs, task.queries)
    queries = [key for key, _ in asked]
    query = ", ".join(queries[:-1]) + ", and " + queries[-1] if len(queries) > 1 else queries[0]
    names = {"type_needle_v": task.value_type, "query": query}
    template, prefix = wording.templates["niah"], wording.prefixes["niah"]
    if task.queries * task.values == 1:
        template, prefix = singular(template), singular(prefix)
        names["type_needle_v"] = task.value_type.removesuffix("s")
    prefix = prefix.format(**names)

    if task.haystack == "essay":
        depths = sorted(draw.sample(DEPTHS, len(needles)))
        hay = Haystack(source.material.essays.first, " ")
    else:
        depths = sorted(100 * draw.random() for _ in needles)
        seed = draw.getrandbits(64)
        noise = task.haystack == "noise"
        hay = Haystack(noise_lines(wording.noise) if noise else NeedleLines(source, seed, queries), "\n")

    def compose(size: int) -> str:
        return template.format(context=hay.with_needles(size, needles, depths), **names) + prefix

    first = next(i for i, needle in enumerate(needles) if any(each in needle for each in asked[0][1]))
    more = {"query": query, "type_needle_v": task.value_type, "depth": round(depths[first], 2)}
    return Draft(compose, prefix, [each for _, found in asked for each in found], len(needles), more)


def singular(text: str) -> str:
    """RULER's wording where one value is asked for."""
    for many, one in (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer")):
        text = text.replace(many, one)
    return text


@dataclass(frozen=True)
class Haystack:
    """parts: size -> sentences or lines of that much haystack."""

    parts: Callable[[int], list[str]]
    separator: str

    def with_needles(self, size: int, needles: Sequence[str], depths: Sequence[float]) -> str:
        """The haystack with each needle at its depth, in percent; depths rise."""
        parts = self.parts(size)
        at = [int(len(parts) * depth / 100) for depth in depths]
        pieces, last = [], 0
        for place, needle in zip(at, needles, strict=True):
            pieces += [*parts[last:place], needle]
            last = place
        return self.separator.join(pieces + parts[last:])


def noise_lines(noise: str) -> Callable[[int], list[str]]:
    """Lines of the same five sentences; sizes count sentences."""
    sentences = re.split(r"(?<=\.) ", noise)

    def lines(size: int) -> list[str]:
        whole, rest = divmod(size, len(sentences))
        return [noise] * whole + ([" ".join(sentences[:rest])] if rest else [])

    return lines


class NeedleLines:
    """Lines like the needle, each with a key and value of its own; sizes count characters."""

    def __init__(self, source: Source, seed: int, asked: Sequence[str]) -> None:
        self._source, self._draw, self._asked = source, random.Random(seed), asked
        self._lines: list[str] = []
        self._ends: list[int] = []

    def __call__(self, size: int) -> list[str]:
        while not self._ends or self._ends[-1] < size:
            line = self._line()
            self._lines.append(line)
            self._ends.append(len(line) + (self._ends[-1] if self._ends else 0))
        whole = bisect_left(self._ends, size)
        left = size - (self._ends[whole - 1] if whole else 0)
        return [*self._lines[:whole], self._lines[whole][:left]]

    def _line(self) -> str:
        task, draw, material = self._source.task, self._draw, self._source.material
        key = ""
        while not key or key in self._asked:
            key = material.pair(draw) if task.key_type == "words" else _uuid(draw)
        value = _uuid(draw) if task.value_type == "uuids" else str(draw.randint(1_000_000, 9_999_999))
        return self._source.wording.needle.format(type_needle_v=task.value_type, key=key, value=value)


def _uuid(draw: random.Random) -> str:
    return str(uuid.UUID(int=draw.getrandbits(128), version=4))


def variable_tracking(source: Source, draw: random.Random) -> Draft:
    """A chain of assignments hidden in noise, after a short solved example."""
    wording, kind = source.wording, source.task.kind
    lines = Haystack(noise_lines(wording.noise), "\n")

    def chain(letters: int) -> Draft:
        names: list[str] = []
        while len(names) <= HOPS:
            name = "".join(draw.choices(string.ascii_uppercase, k=letters))
            names += [name] if name not in names else []
        value = str(draw.randint(10_000, 99_998))
        steps = [f"VAR {names[0]} = {value}"]
        steps += [f"VAR {name} = VAR {before} " for before, name in pairwise(names)]
        depths = sorted(100 * draw.random() for _ in steps)
        prefix = wording.prefixes[kind].format(num_v=len(names), query=value)

        def compose(size: int) -> str:
            context = lines.with_needles(size, steps, depths)
            return wording.templates[kind].format(context=context, query=value, num_v=len(names)) + prefix

        return Draft(compose, prefix, names, len(steps))

    example, main = chain(3), chain(5)
    text, _, _ = fit(example, min(EXAMPLE_TOKENS, source.length // 2), 0, source.count, 2 * len(example.outputs))
    shot = f"{text} {' '.join(example.outputs)}\n\n"
    return Draft(lambda size: shot + main.compose(size), main.prefix, main.outputs, main.least)


def common_words(source: Source, draw: random.Random) -> Draft:
    """A numbered list in which ten words are more frequent than the others, after a short solved example."""
    short = source.length < SHORT
    words = draw.sample(source.material.words, len(source.material.words))
    order, more, held = draw.getrandbits(64), random.Random(draw.getrandbits(64)), set(words)

    def word_list(words: Sequence[str], common: int, uncommon: int) -> str:
        found = list(words[:COMMON_WORDS]) * common + list(words[COMMON_WORDS:]) * uncommon
        random.Random(order).shuffle(found)
        return " ".join(f"{i}. {word}" for i, word in enumerate(found, 1))

    def fill(words: Sequence[str], common: int, uncommon: int) -> tuple[str, str]:
        context = word_list(words, common, uncommon)
        return source.wording.fill(source.task.kind, context=context, query="", num_cw=COMMON_WORDS)

    shown = draw.sample(source.material.words, 20 if short else 40)
    text, prefix = fill(shown, *((3, 1) if short else (10, 3)))
    answer = " ".join(f"{i}. {word}" for i, word in enumerate(shown[:COMMON_WORDS], 1))
    repetitions = (6, 1) if short else (30, 3)

    def compose(size: int) -> str:
        while len(words) < size:
            word = source.material.another_word(more)
            if word not in held:
                held.add(word)
                words.append(word)
        return f"{text} {answer}\n" + fill(words[:size], *repetitions)[0]

    return Draft(compose, prefix, words[:COMMON_WORDS], COMMON_WORDS)


def frequent_words(source: Source, draw: random.Random) -> Draft:
    """Coded words whose frequencies follow a zeta distribution; the second to fourth are asked for.

    Sizes count hundredths of a word.
    """
    ranks = np.arange(1.0, max((source.length - source.task.generated) // 50, 5) + 1)
    vocabulary: dict[str, None] = {}
    while len(vocabulary) < len(ranks):
        vocabulary["".join(draw.choices(string.ascii_lowercase, k=WORD_LENGTH))] = None
    words = ["...", *list(vocabulary)[1:]]  # the most frequent one is noise
    order = draw.getrandbits(64)

    def fill(size: int) -> tuple[str, str]:
        counts = (size / SPLIT / (ZETA_2 * ranks**ALPHA)).astype(int).tolist()
        text = [word for word, times in zip(words, counts, strict=True) for _ in range(times)]
        random.Random(order).shuffle(text)
        return source.wording.fill(source.task.kind, context=" ".join(text), query="")

    # with fewer words the fourth would not stand in the text
    least = math.ceil(SPLIT * ZETA_2 * 16)
    return Draft(lambda size: fill(size)[0], fill(least)[1], words[1:4], least)


def question_answering(source: Source, draw: random.Random, question: Question) -> Draft:
    """Documents, among them those that answer the question; sizes count characters of the others."""
    found = source.material.questions(source.task.dataset)
    taken = {*question.own, *question.related}
    related = draw.sample(question.related, len(question.related))
    others = [i for i in range(len(found.documents)) if i not in taken]
    draw.shuffle(others)
    order = draw.getrandbits(64)
    pool = [found.documents[i] for i in related + others] or [found.documents[i] for i in question.own]

    def distractors(size: int) -> list[str]:
        left = size
        chosen: list[str] = []
        for document in cycle(pool):
            if left <= 0:
                return chosen
            chosen.append(document[:left])
            left -= len(document)
        return chosen

    def compose(size: int) -> str:
        documents = [found.documents[i] for i in question.own] + distractors(size)
        random.Random(order).shuffle(documents)
        numbered = [source.wording.document.format(i=i, document=text) for i, text in enumerate(documents, 1)]
        return source.wording.fill(source.task.kind, context="\n\n".join(numbered), query=question.query)[0]

    return Draft(compose, source.wording.prefixes[source.task.kind], question.answers)


GENERATORS = {
    "niah": niah,
    "variable_tracking": variable_tracking,
    "common_words_extraction": common_words,
    "freq_words_extraction": frequent_words,
}
