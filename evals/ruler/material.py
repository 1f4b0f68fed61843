"""What the samples are written from: words, essays, and questions with their documents.

Files of a user: essays as a folder of texts (*.txt) or RULER's PaulGrahamEssays.json; questions in the formats of SQuAD
and of HotpotQA; english_words.json, more words for very long lists (without it adjective-noun pairs serve).
"""

from __future__ import annotations

import json
import random
import re
from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from evals.cli import EvalError
from evals.work import item_key

FILES = {
    "essays": ("essays", "PaulGrahamEssays.json"),
    "squad": ("squad.json", "dev-v2.0.json"),
    "hotpotqa": ("hotpotqa.json", "hotpot_dev_distractor_v1.json"),
    "english_words": ("english_words.json",),
}


@dataclass(frozen=True)
class Question:
    """own, related: numbers of the documents that it needs, and of those about the same thing."""

    query: str
    answers: list[str]
    own: list[int]
    related: list[int]


@dataclass(frozen=True)
class Questions:
    """A file of questions and all its documents."""

    questions: list[Question]
    documents: list[str]


class Material:
    """Everything is read where it is first used. most_words: of the essays that are read at all."""

    def __init__(self, paths: dict[str, Path | None], most_words: int) -> None:
        self.paths, self._most_words = paths, most_words

    @cached_property
    def _lists(self) -> list[list[str]]:
        """wonderwords' nouns, adjectives and verbs."""
        try:
            from wonderwords.random_word import _get_words_from_text_file
        except ImportError as error:
            raise EvalError("ruler: wonderwords is not installed; install the requirements") from error
        return [_get_words_from_text_file(f"{kind}list.txt") for kind in ("noun", "adjective", "verb")]

    @cached_property
    def words(self) -> list[str]:
        """All single words, sorted."""
        return sorted({word for words in self._lists for word in words})

    def pair(self, draw: random.Random) -> str:
        """An adjective and a noun, as keys of needles are."""
        nouns, adjectives, _ = self._lists
        return f"{draw.choice(adjectives)}-{draw.choice(nouns)}"

    def another_word(self, draw: random.Random) -> str:
        """For lists that need more than `words`."""
        return self.pair(draw) if self.paths["english_words"] is None else draw.choice(self.english_words)

    @cached_property
    def english_words(self) -> list[str]:
        """A user's list."""
        found = _read_json(self.paths["english_words"], "english_words")
        return list(found.values() if isinstance(found, dict) else found)

    @cached_property
    def essays(self) -> Essays:
        """The haystack of real text."""
        return Essays.of(self._essay_text())

    def _essay_text(self) -> str:
        path = self._path("essays", "a folder of texts")
        if path.is_file() and path.suffix == ".json":
            texts = [_read_json(path, "essays")["text"]]
        else:
            texts, read = [], 0
            for file in [path] if path.is_file() else sorted(path.rglob("*.txt")):
                texts.append(file.read_text(encoding="utf-8", errors="replace"))
                read += texts[-1].count(" ")
                if read > self._most_words:
                    break
        words = re.sub(r"\s+", " ", "\n".join(texts)).strip().split(" ")[: self._most_words]
        if words == [""]:
            raise EvalError(f"--essays {path}: holds no text; give a folder of .txt files")
        return " ".join(words)

    def questions(self, dataset: str) -> Questions:
        """Of "squad" or "hotpotqa"."""
        return self.squad if dataset == "squad" else self.hotpotqa

    @cached_property
    def squad(self) -> Questions:
        """A file in SQuAD's format; questions without an answer are left out."""
        path = self._path("squad", "a file in SQuAD's format, such as dev-v2.0.json")
        try:
            articles = [article["paragraphs"] for article in _read_json(path, "squad")["data"]]
            documents = sorted({paragraph["context"] for article in articles for paragraph in article})
            number = {text: i for i, text in enumerate(documents)}
            questions = []
            for article in articles:
                about = [number[paragraph["context"]] for paragraph in article]
                for paragraph in article:
                    own = number[paragraph["context"]]
                    related = [i for i in dict.fromkeys(about) if i != own]
                    for qa in paragraph["qas"]:
                        answers = [answer["text"] for answer in qa["answers"]]
                        if answers and not qa.get("is_impossible", False):
                            questions.append(Question(qa["question"], answers, [own], related))
        except (KeyError, TypeError) as error:
            raise EvalError(f"--squad {path}: not in SQuAD's format ({error!r} is missing or wrong)") from error
        return _some(Questions(questions, documents), f"--squad {path}")

    @cached_property
    def hotpotqa(self) -> Questions:
        """A file in HotpotQA's format (distractor setting)."""
        path = self._path("hotpotqa", "a file in HotpotQA's format, such as hotpot_dev_distractor_v1.json")
        try:
            entries = _read_json(path, "hotpotqa")
            pages = [[f"{title}\n{''.join(parts)}" for title, parts in entry["context"]] for entry in entries]
            documents = sorted({page for group in pages for page in group})
            number = {text: i for i, text in enumerate(documents)}
            questions = [
                Question(entry["question"], [entry["answer"]], [number[page] for page in dict.fromkeys(group)], [])
                for entry, group in zip(entries, pages, strict=True)
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise EvalError(f"--hotpotqa {path}: not in HotpotQA's format ({error!r} is missing or wrong)") from error
        return _some(Questions(questions, documents), f"--hotpotqa {path}")

    def hash_of(self, kind: str, haystack: str, dataset: str) -> str:
        """A hash of what samples of a kind are written from."""
        if kind == "qa":
            found = self.questions(dataset)
            return item_key(*found.documents, *(q.query for q in found.questions))
        if kind == "common_words_extraction":
            return item_key(*self.words, self.paths["english_words"] and self.paths["english_words"].stat().st_size)
        if kind == "niah":
            return item_key(*(word for words in self._lists for word in words), *self._essay_parts(haystack))
        return ""

    def _essay_parts(self, haystack: str) -> list[str]:
        return self.essays.sentences if haystack == "essay" else []

    def _path(self, name: str, what: str) -> Path:
        path = self.paths[name]
        if path is None or not path.exists():
            said = f"{path}: does not exist" if path else "missing"
            raise EvalError(f"--{name} {said}; name {what}, or put it as {FILES[name][0]} into --data-dir")
        return path


@dataclass(frozen=True)
class Essays:
    """Sentences of a text, repeated where more is needed. ends: words up to the end of each sentence."""

    sentences: list[str]
    ends: list[int]

    @classmethod
    def of(cls, text: str) -> Essays:
        """Split by nltk's Punkt without training, which needs no data files."""
        from nltk.tokenize.punkt import PunktSentenceTokenizer

        sentences = PunktSentenceTokenizer().tokenize(text)
        return cls(sentences, list(accumulate(sentence.count(" ") + 1 for sentence in sentences)))

    def first(self, words: int) -> list[str]:
        """The sentences of the first `words` words; the last one may be cut."""
        rounds, rest = divmod(words, self.ends[-1])
        whole = bisect_left(self.ends, rest + 1)
        found = self.sentences * rounds + self.sentences[:whole]
        left = rest - (self.ends[whole - 1] if whole else 0)
        return [*found, " ".join(self.sentences[whole].split(" ")[:left])] if left else found


def _some(found: Questions, what: str) -> Questions:
    if not found.questions:
        raise EvalError(f"{what}: holds no question with an answer")
    return found


def _read_json(path: Path | None, flag: str) -> Any:
    assert path is not None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvalError(f"--{flag} {path}: cannot be read as JSON ({error})") from error
