"""From a checked configuration to a ready trainer, in one fixed order."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neomoba_dist.checkpoint.layout import CheckpointError, complete_checkpoints
from neomoba_dist.checkpoint.load import CheckpointReader
from neomoba_dist.config import BatchPlan, Config
from neomoba_dist.data.batch import Batch
from neomoba_dist.data.corpus import Corpus, open_corpus
from neomoba_dist.data.stream import UpdateStream, validation_batches


@dataclass(frozen=True)
class Corpora:
    """The opened folders of shards, checked against the model."""

    train: Corpus
    validation: Corpus | None


def open_corpora(config: Config) -> Corpora:
    """Open what `neomoba.data` names. Raises DataError, in one line; called before any process group exists."""
    train = open_corpus(config.data.train)
    train.require_vocabulary(config.model.vocab_size)
    if config.data.validation is None:
        return Corpora(train, None)
    validation = open_corpus(config.data.validation, key="neomoba.data.validation")
    validation.require_vocabulary(config.model.vocab_size)
    return Corpora(train, validation)


def find_resume(output: Path, resume: str) -> CheckpointReader | None:
    """The checkpoint to go on from. resume: "auto" (the newest, if any), "must", "none", or a folder.

    Raises CheckpointError where "must" finds none, and where "none" would overwrite a run.
    """
    found = complete_checkpoints(output)
    if resume == "none":
        if found or (output / "metrics.jsonl").exists():
            raise CheckpointError(f"{output}: holds a run already; give another --output_dir, or --resume auto")
        return None
    if resume == "auto":
        return CheckpointReader(found[-1]) if found else None
    if resume == "must":
        if not found:
            raise CheckpointError(f"{output}: no checkpoint to resume from; start with --resume auto or name a folder")
        return CheckpointReader(found[-1])
    return CheckpointReader(resume)


def build_stream(config: Config, plan: BatchPlan, corpus: Corpus, dp_rank: int) -> UpdateStream:
    """The training rows of one data-parallel rank. Raises DataError, in one line."""
    return UpdateStream(
        corpus,
        accumulation=plan.gradient_accumulation_steps,
        seed=config.phase.seed,
        **_row_settings(config, plan, dp_rank),
    )


def build_validation(config: Config, plan: BatchPlan, corpus: Corpus | None, dp_rank: int) -> list[Batch]:
    """The fixed validation micro-batches of one data-parallel rank; none without a validation corpus."""
    if corpus is None:
        return []
    return validation_batches(corpus, rows=config.log.validation_rows, **_row_settings(config, plan, dp_rank))


def _row_settings(config: Config, plan: BatchPlan, dp_rank: int) -> dict[str, Any]:
    """How rows are made and shared out, the same for training and validation."""
    return {
        "objective": config.model.objective,
        "sequence_length": config.phase.sequence_length,
        "micro_batch_size": plan.micro_batch_size,
        "dp_rank": dp_rank,
        "dp_size": plan.data_parallel_size,
        "mlm_probability": config.data.mlm_probability,
        "mlm_scheme": config.data.mlm_scheme,
        "max_documents_per_row": config.data.max_documents_per_row,
    }
