"""What is evaluated: a checkpoint in one process, with the tokenizer and the validation corpus of its run."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from evals.cli import EvalError
from neomoba_dist.checkpoint.load import CheckpointReader, load_model
from neomoba_dist.config import Config
from neomoba_dist.data.corpus import Corpus, open_corpus
from neomoba_dist.data.index import INDEX_FILE, CorpusIndex
from neomoba_dist.data.tokenizer import Tokenizer
from neomoba_dist.model.attention.layer import set_full_attention
from neomoba_dist.model.neobert import NeoBERT


@dataclass(frozen=True)
class Subject:
    """A loaded checkpoint. `model` is in eval mode on `device`; `config` is that of its run.

    The weights have the run's compute dtype on a GPU and float32 on a CPU.
    """

    checkpoint: Path
    step: int
    config: Config
    model: NeoBERT
    corpus: Corpus
    device: torch.device

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer beside the corpus."""
        return self.corpus.tokenizer()

    @property
    def attentions(self) -> list[str]:
        """What the sparse layers can run: their own kind ("moba" where kinds are mixed), then "full"."""
        kinds = set(self.config.model.layer_attentions) - {"full"}
        return [*sorted(kinds)[:1], "full"]

    def use(self, attention: str) -> None:
        """Let the sparse layers run `attention`, one of `attentions`."""
        set_full_attention(self.model, attention == "full")


def load_subject(checkpoint: Path, data: Path | None, device: str) -> Subject:
    """Load a run folder's newest checkpoint, or one step_N folder.

    data: corpus to evaluate on instead of the run's validation corpus. device: "auto" (a GPU if there is one) or a
    torch device. Raises EvalError, DataError or CheckpointError, in one line.
    """
    reader = CheckpointReader(checkpoint)
    corpus = _open_data(reader, data)
    place = _device(device)
    dtype = torch.float32 if place.type == "cpu" else getattr(torch, reader.config.dtype_name)
    model, config = load_model(reader.folder, dtype=dtype, device=place)
    return Subject(reader.folder, reader.index["step"], config, model, corpus, place)


def _open_data(reader: CheckpointReader, data: Path | None) -> Corpus:
    """The corpus to evaluate on, checked against the model's vocabulary and the training corpus's tokenizer."""
    config = reader.config
    folder = data or (Path(config.data.validation) if config.data.validation else None)
    if folder is None:
        raise EvalError(f"{reader.folder}: its run had no validation corpus; name a folder of shards with --data")
    if data is None and not (folder / INDEX_FILE).is_file():
        raise EvalError(
            f"{folder}: no corpus here, but neomoba.data.validation of the run names it; start in the folder where "
            "training was started, or name a folder of shards with --data"
        )
    corpus = open_corpus(folder, key="--data" if data else "neomoba.data.validation")
    corpus.require_vocabulary(config.model.vocab_size)
    _check_tokenizer(reader, corpus)
    return corpus


def _check_tokenizer(reader: CheckpointReader, corpus: Corpus) -> None:
    """Compare with the training corpus, where it still lies: ids of another tokenizer mean nothing to the model."""
    sources = reader.config.data.sources
    train = Path(sources[0].place)
    if not (train / INDEX_FILE).is_file():
        return
    index = CorpusIndex.from_file(train / INDEX_FILE)
    if index.tokenizer.sha256 != corpus.index.tokenizer.sha256:
        raise EvalError(
            f"{corpus.folder}: made with another tokenizer than the training corpus {train}; tokenize the text again "
            f"with: python -m data_tools.tokenize_corpus --tokenizer {train} --input TEXT --output FOLDER"
        )
    alone = len(sources) == 1 and not sources[0].min_length  # else the checkpoint names the mixture as a whole
    trained_on = reader.trainer().get("data", {}).get("fingerprint", index.fingerprint)
    if alone and trained_on != index.fingerprint:
        logging.getLogger(__name__).warning(
            f"warning: {train} changed since {reader.folder} was trained on it; if its tokenizer changed too, the "
            "results mean nothing"
        )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise EvalError(f"--device {name}: cannot be used ({reason}); leave it out, or give cpu or cuda") from error
    return device
