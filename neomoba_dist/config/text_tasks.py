"""The tasks that fine-tuning knows, as data: the nine of GLUE (arXiv 1804.07461) and contrastive pairs.

A task says what its files hold, what the head on top of the encoder returns, and how it is judged.
"""

from dataclasses import dataclass
from typing import Final, Literal


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """The head of a fine-tuned model. outputs: classes; 1 of a regressor; 0 of an embedder, which has no weights.

    temperature: by which an embedder's cosines are divided in its loss.
    """

    kind: Literal["classifier", "regressor", "embedder"]
    pooling: Literal["cls", "mean"]
    outputs: int = 0
    temperature: float = 1.0


@dataclass(frozen=True, kw_only=True)
class TextTask:
    """folder: the task's name in GLUE's download and submission. texts, target, plain: names of columns, of every
    spelling that is in use; plain: columns of files without a header. labels: of the classes; none for a score.

    validation, test: names of the splits. metrics: "accuracy", "f1", "matthews", "pearson", "spearman", "retrieval".
    """

    folder: str
    texts: tuple[tuple[str, ...], ...]
    metrics: tuple[str, ...]
    labels: tuple[str, ...] = ()
    target: tuple[str, ...] = ("label",)
    plain: tuple[str, ...] = ()
    validation: tuple[str, ...] = ("dev",)
    test: tuple[str, ...] = ("test",)
    embeds: bool = False

    def head(self, pooling: Literal["cls", "mean"], temperature: float) -> HeadConfig:
        """What is put on top of the encoder."""
        if self.embeds:
            return HeadConfig(kind="embedder", pooling="mean", temperature=temperature)
        kind: Literal["classifier", "regressor"] = "classifier" if self.labels else "regressor"
        return HeadConfig(kind=kind, pooling=pooling, outputs=len(self.labels) or 1)


_PAIR: Final = (("sentence1",), ("sentence2",))
_ENTAILMENT: Final = ("entailment", "not_entailment")

TEXT_TASKS: Final[dict[str, TextTask]] = {
    "cola": TextTask(
        folder="CoLA", texts=(("sentence",),), metrics=("matthews",), labels=("0", "1"),
        plain=("source", "label", "star", "sentence"),
    ),
    "sst2": TextTask(
        folder="SST-2", texts=(("sentence",),), metrics=("accuracy",), labels=("0", "1"), plain=("sentence", "label")
    ),
    "mrpc": TextTask(
        folder="MRPC", texts=(("#1 String", "sentence1"), ("#2 String", "sentence2")), metrics=("f1", "accuracy"),
        labels=("0", "1"), target=("Quality", "label"),
    ),
    "stsb": TextTask(folder="STS-B", texts=_PAIR, metrics=("pearson", "spearman"), target=("score", "label")),
    "qqp": TextTask(
        folder="QQP", texts=(("question1",), ("question2",)), metrics=("f1", "accuracy"), labels=("0", "1"),
        target=("is_duplicate", "label"),
    ),
    "mnli": TextTask(
        folder="MNLI", texts=(("sentence1", "premise"), ("sentence2", "hypothesis")), metrics=("accuracy",),
        labels=("entailment", "neutral", "contradiction"), target=("gold_label", "label"),
        validation=("dev_matched", "dev_mismatched"), test=("test_matched", "test_mismatched"),
    ),
    "qnli": TextTask(
        folder="QNLI", texts=(("question",), ("sentence",)), metrics=("accuracy",), labels=_ENTAILMENT
    ),
    "rte": TextTask(folder="RTE", texts=_PAIR, metrics=("accuracy",), labels=_ENTAILMENT),
    "wnli": TextTask(folder="WNLI", texts=_PAIR, metrics=("accuracy",), labels=("0", "1")),
    "contrastive": TextTask(
        folder="pairs", texts=(("query", "anchor"), ("positive",), ("negative",)), metrics=("retrieval",), embeds=True
    ),
}  # fmt: skip

GLUE: Final = tuple(name for name, task in TEXT_TASKS.items() if not task.embeds)


def names_of(text: str | None) -> list[str]:
    """A comma-separated list of names."""
    return [name.strip() for name in text.split(",")] if text else []
