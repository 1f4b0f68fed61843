"""The needle task: prompts are what they say; reading the needle gives 100 %, not reading it gives chance."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_tools.passkeys import KEY_DIGITS
from evals import needle
from evals.cli import EvalError
from evals.load import Subject
from evals.passkey import Prompt, Row, make_batch, make_prompt, read_text, score, write_row
from neomoba_dist.data.batch import Batch
from neomoba_dist.data.corpus import Corpus
from neomoba_dist.data.tokenizer import load_tokenizer
from tests.corpora import make_tokenizer

DEPTHS = [0.0, 30.0, 50.0, 100.0]


def options(**changes: Any) -> argparse.Namespace:
    return argparse.Namespace(
        **{
            "lengths": [80, 200],
            "depths": DEPTHS,
            "samples": 3,
            "seed": 0,
            "digits": KEY_DIGITS,
            "needles": 1,
            "limit": None,
            **changes,
        }
    )


class Whole:
    """A model whose logits are all there."""

    def hidden_states(self, batch: Batch) -> torch.Tensor:
        raise NotImplementedError

    def choices(self, batch: Batch, places: Sequence[int], candidates: Sequence[int]) -> tuple[list[int], list[int]]:
        logits = self.hidden_states(batch)[list(places)]
        return logits[:, list(candidates)].argmax(-1).tolist(), logits.argmax(-1).tolist()


def holds(tokens: list[int], part: list[int]) -> bool:
    return any(tokens[i : i + len(part)] == part for i in range(len(tokens)))


class Reader(Whole):
    """Finds the needle in its input and answers with what stands there; its hidden states are its logits."""

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt

    def hidden_states(self, batch: Batch) -> torch.Tensor:
        logits = torch.zeros(len(batch.input_ids), 1200)
        for start, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
            tokens = batch.input_ids[start:end].tolist()
            (name,) = [i for i, (ask, _) in enumerate(self.prompt.questions) if holds(tokens, ask)]
            marks = self.prompt.needles[name][0]
            after = next(i for i in range(len(tokens)) if tokens[i : i + len(marks)] == marks) + len(marks)
            question = self.prompt.questions[name][0]
            answer = max(i for i in range(len(tokens)) if tokens[i : i + len(question)] == question) + len(question)
            for i in range(KEY_DIGITS):
                place = answer + i - (1 if self.prompt.mask is None else 0)
                logits[start + place, tokens[after + i]] = 1.0
        return logits


class Blind(Whole):
    """Does not look at its input: random logits, or always the same digit."""

    def __init__(self, favourite: int | None = None) -> None:
        self.favourite, self.generator = favourite, torch.Generator().manual_seed(0)

    def hidden_states(self, batch: Batch) -> torch.Tensor:
        if self.favourite is None:
            return torch.randn(len(batch.input_ids), 1200, generator=self.generator)
        logits = torch.zeros(len(batch.input_ids), 1200)
        logits[:, self.favourite] = 1.0
        return logits


def scores(model: Any, plan: needle.Plan) -> np.ndarray:
    """bool [groups, 2, depths, K]."""
    return np.array([score(model, plan.prompt, group) for group in plan.groups])


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_a_model_that_reads_the_needle_gets_everything(subjects: dict[str, Subject], objective: str) -> None:
    plan = needle.prepare(subjects[objective], options())
    found = needle.summarize(plan.groups, scores(Reader(plan.prompt), plan))
    assert found["all"] == {"accuracy": 1.0, "standard_error": 0.0, "exact": 1.0}
    assert len(found["cells"]) == 2 * len(DEPTHS)
    assert all(cell["accuracy"] == cell["exact"] == 1.0 for cell in found["cells"])


@pytest.mark.parametrize("favourite", [None, 7])
def test_a_model_that_does_not_read_gets_chance(subjects: dict[str, Subject], favourite: int | None) -> None:
    plan = needle.prepare(subjects["clm"], options(lengths=[60], samples=100))
    model = Blind(None if favourite is None else int(plan.prompt.digits[favourite]))
    found = needle.summarize(plan.groups, scores(model, plan))["all"]
    digits = 100 * len(DEPTHS) * KEY_DIGITS
    assert abs(found["accuracy"] - needle.CHANCE) < 4 * (0.1 * 0.9 / digits) ** 0.5
    assert found["exact"] < 0.01


def test_the_answer_is_looked_up_and_not_assumed(subjects: dict[str, Subject]) -> None:
    """Another key in the needle than in the answer: the reader is wrong everywhere."""
    plan = needle.prepare(subjects["clm"], options(lengths=[80], samples=1))
    for row in plan.groups[0]:
        before = plan.prompt.needles[0][0]
        tokens = row.tokens.tolist()
        at = next(i for i in range(len(tokens)) if tokens[i : i + len(before)] == before) + len(before)
        row.tokens[at : at + KEY_DIGITS] = plan.prompt.digits[(row.key + 1) % 10]
    assert not scores(Reader(plan.prompt), plan).any()


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_an_untrained_model_is_near_chance(subjects: dict[str, Subject], objective: str) -> None:
    result = needle.run(subjects[objective], needle.prepare(subjects[objective], options(lengths=[64], samples=50)))
    assert result["lengths"] == [64]
    assert result["depths"] == DEPTHS
    assert result["samples"] == 50
    assert len(needle.prepare(subjects[objective], options(lengths=[64], samples=50, limit=2)).groups) == 2
    for curve in result["curves"].values():
        assert abs(curve["all"]["accuracy"] - 0.1) < 0.05
        assert curve["all"]["exact"] < 0.02


def test_prompts(subjects: dict[str, Subject]) -> None:
    subject = subjects["mlm"]
    plan = needle.prepare(subject, options())
    tokenizer = subject.tokenizer
    assert [len(group) for group in plan.groups] == [len(DEPTHS)] * 6
    for row in (row for group in plan.groups for row in group):
        text = tokenizer.decode(row.tokens).replace(" ", "")
        key = "".join(map(str, row.key))
        assert len(row.tokens) == row.length
        assert text.startswith("[CLS]")
        assert text.endswith(f"whatisthepasskey?thepasskeyis{key}.[SEP]")
        assert text.count(f"thepasskeyis{key}.rememberthepasskey.") == 1
        assert tokenizer.decode(row.tokens[row.answer : row.answer + KEY_DIGITS]).replace(" ", "") == key
        place = text.index("rememberthepasskey") / len(text)
        assert abs(place - row.depth / 100) < 0.5 * 80 / row.length  # the question and the needle take their part
    keys = {tuple(row.key) for group in plan.groups for row in group}
    assert len(keys) == 6 * len(DEPTHS)


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_the_answer_is_hidden_from_the_model(subjects: dict[str, Subject], objective: str) -> None:
    plan = needle.prepare(subjects[objective], options(samples=1))
    for group in plan.groups:
        batch = make_batch(plan.prompt, group)
        assert batch.rows == len(DEPTHS)
        assert batch.cu_seqlens.tolist() == [i * group[0].length for i in range(len(DEPTHS) + 1)]
        for row, inputs in zip(group, batch.input_ids.reshape(len(group), -1), strict=True):
            answer = slice(row.answer, row.answer + KEY_DIGITS)
            if objective == "mlm":
                assert (inputs[answer] == subjects[objective].corpus.special.mask).all()
            assert torch.equal(inputs[: row.answer], torch.from_numpy(row.tokens[: row.answer]))


def test_prompts_depend_on_nothing_but_the_seed_and_their_place(subjects: dict[str, Subject]) -> None:
    def rows(**changes: Any) -> dict[tuple[int, int, float], list[int]]:
        plan = needle.prepare(subjects["clm"], options(**changes))
        return {(row.length, row.sample, row.depth): row.tokens.tolist() for group in plan.groups for row in group}

    everything = rows()
    part = rows(lengths=[200], depths=[50.0], samples=2)
    assert part == {place: everything[place] for place in part}
    assert not set(map(tuple, rows(seed=1).values())) & set(map(tuple, everything.values()))


def test_haystack_is_text_of_the_corpus(corpus: Corpus) -> None:
    flat = corpus.tokens_at(0, corpus.tokens)
    assert len(corpus.index.shards) > 1
    start = corpus.index.shards[0].tokens - 20  # goes on in the second shard
    expected = flat[start:][corpus.ordinary[flat[start:]]][:100]
    assert np.array_equal(read_text(corpus, start, 100), expected)
    around = np.concatenate([flat[-10:], flat[:200]])  # and from the last in the first
    assert np.array_equal(read_text(corpus, len(flat) - 10, 100), around[corpus.ordinary[around]][:100])
    assert len(read_text(corpus, 5, 10**9)) == corpus.ordinary[flat].sum()


def test_needle_stands_after_a_full_stop_where_one_is_near(subjects: dict[str, Subject]) -> None:
    prompt = make_prompt(subjects["clm"].tokenizer, mask=False, key_digits=KEY_DIGITS)
    haystack = np.full(1000, prompt.digits[0] + 1)
    haystack[490] = prompt.full_stop

    def place(depth: float) -> int:
        row: Row = write_row(prompt, haystack, depth, 0, 0)
        marks = prompt.needles[0][0]
        tokens = row.tokens.tolist()
        return next(i for i in range(len(tokens)) if tokens[i : i + len(marks)] == marks) - len(prompt.head)

    assert [place(depth) for depth in (0, 25, 50, 75, 100)] == [0, 250, 491, 750, 1000]


@pytest.mark.parametrize("kind", ["wordpiece", "byte_bpe", "unigram", "bpe"])
def test_every_kind_of_tokenizer_spells_keys(kind: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make_tokenizer(tmp_path, kind))
    prompt = make_prompt(tokenizer, mask=True, key_digits=KEY_DIGITS)
    assert len(set(prompt.digits.tolist())) == 10
    row = write_row(prompt, np.array(tokenizer.encode("Some text to hide a key in.")), 50.0, 0, 0)
    text = "".join(tokenizer.decode(row.tokens).split())
    assert text.count("".join(map(str, row.key))) == 2


def test_tokenizer_without_digits_is_refused(subjects: dict[str, Subject]) -> None:
    class NoDigits:
        special = subjects["mlm"].tokenizer.special

        def encode(self, text: str) -> list[int]:
            return [1]

    with pytest.raises(EvalError, match="digits"):
        make_prompt(NoDigits(), mask=True, key_digits=KEY_DIGITS)  # type: ignore[arg-type]


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_several_needles(subjects: dict[str, Subject], objective: str) -> None:
    subject = subjects[objective]
    plan = needle.prepare(subject, options(lengths=[200], needles=3))
    prompt = plan.prompt
    rows = [row for group in plan.groups for row in group]
    asked = set()
    for row in rows:
        tokens = row.tokens.tolist()
        assert len(tokens) == row.length == 200
        assert all(holds(tokens, before) for before, _ in prompt.needles)
        (name,) = [i for i, (ask, _) in enumerate(prompt.questions) if holds(tokens, ask)]
        asked.add(name)
        # the asked key stands after its own name, others after theirs
        said = [*prompt.needles[name][0], *prompt.digits[row.key].tolist(), *prompt.needles[name][1]]
        assert holds(tokens, said)
    assert asked == {0, 1, 2}
    right, top = score(Reader(prompt), prompt, rows)
    assert right.all()
    assert top.all()
    with pytest.raises(EvalError, match="--needles 27: keys are named by letters; give at most 26"):
        needle.prepare(subject, options(needles=27))
