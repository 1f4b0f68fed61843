"""What is evaluated: a checkpoint on any layout, with the tokenizer and the validation corpus of its run."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from evals.cli import EvalError
from evals.model import ShardedModel
from evals.work import Workers, item_key
from neomoba_dist.checkpoint.load import CheckpointReader, load_weights
from neomoba_dist.checkpoint.tokenizer import tokenizer_of
from neomoba_dist.checkpoint.verify import refuse_damage
from neomoba_dist.config import Config, parse_config
from neomoba_dist.config.text_tasks import HeadConfig
from neomoba_dist.data.check import open_corpus
from neomoba_dist.data.corpus import Corpus
from neomoba_dist.data.index import INDEX_FILE, CorpusIndex
from neomoba_dist.data.tokenizer import Tokenizer, load_tokenizer
from neomoba_dist.generate.stage import Stage
from neomoba_dist.model.int8 import quantize_projections
from neomoba_dist.parallel.launcher import joined_world_size
from neomoba_dist.parallel.mesh import Mesh


@dataclass(frozen=True)
class Layout:
    """Ranks along the axes; what is left of the world is data parallel."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1

    def config(self, config: Config) -> Config:
        """The run's configuration on this layout. ConfigError where the model does not divide so."""
        tree = config.to_dict()
        tree["neomoba"]["parallel"] = {
            "tensor_model_parallel_size": self.tp,
            "pipeline_model_parallel_size": self.pp,
            "context_parallel_size": self.cp,
            "expert_model_parallel_size": self.ep,
        }
        for block in ("finetune", "distill"):  # their limits are those of training
            tree["neomoba"].pop(block)
        tree["zero_optimization"] = {"stage": 1}
        tree.pop("train_batch_size", None)
        return parse_config(tree, source=str(config.source))


@dataclass(frozen=True)
class Subject:
    """A loaded checkpoint. `model` is this rank's part, in eval mode on `device`; `config` is that of its run.

    The weights have the run's compute dtype on a GPU and float32 on a CPU. identity: a hash of the checkpoint.
    given_corpus: what is evaluated on by default; None where no task needs it. prefill: the one kind of attention that
    is asked for; None: all that the sparse layers can run are compared.
    """

    checkpoint: Path
    step: int
    config: Config
    model: ShardedModel
    tokenizer: Tokenizer
    given_corpus: Corpus | None
    device: torch.device
    identity: str
    workers: Workers
    prefill: str | None = None

    @property
    def corpus(self) -> Corpus:
        """The corpus to evaluate on. Raises EvalError where there is none."""
        if self.given_corpus is None:
            raise EvalError(f"{self.checkpoint}: this task needs a corpus; name a folder of shards with --data")
        return self.given_corpus

    @property
    def attentions(self) -> list[str]:
        """What the sparse layers can run: their own kind ("moba" where kinds are mixed), then "full"."""
        kinds = set(self.config.model.layer_attentions) - {"full"}
        if self.prefill is not None:
            return ["full" if self.prefill == "full" else next(iter(sorted(kinds)), "full")]
        return [*sorted(kinds)[:1], "full"]

    @property
    def own_attention(self) -> str:
        """What --attn-prefill asks for; else what the run validated with: "full" where it trained with nothing else."""
        trained = "full" if self.config.phase.full_attention_fraction == 1.0 else self.attentions[0]
        return trained if self.prefill is None else self.attentions[0]

    def check_length(self, flag: str, length: int) -> None:
        """Raises EvalError where learned positions end before `length`; warns beyond what the model was made for."""
        model = self.config.model
        limit = model.max_position_embeddings
        if length > limit and model.position_embedding == "learned":
            raise EvalError(
                f"{flag} {length}: the model learned only {limit} positions (neomoba.model.max_position_embeddings); "
                "give at most that"
            )
        if length > limit and self.workers.mesh.rank == 0:
            logging.getLogger(__name__).warning(
                f"warning: {flag} {length} is more than the {limit} tokens that the model was made for "
                "(neomoba.model.max_position_embeddings); scores may be poor"
            )

    def key(self, *parts: object) -> str:
        """Names an item of this checkpoint as the model now stands; see `work.Item`."""
        return item_key(self.identity, self.model.dtype, self.model.prefill, self.model.decode, *parts)


def load_subject(
    checkpoint: Path,
    data: Path | None,
    device: str,
    *,
    layout: Layout = Layout(),
    tokenizer: Path | None = None,
    needs_corpus: bool = True,
    batch_tokens: int = 4096,
    journal: Path | None = None,
    prefill: str | None = None,
    decode: str = "full",
) -> Subject:
    """Load a run folder's newest checkpoint, or one step_N folder, into any layout of the running world.

    data: corpus to evaluate on instead of the run's validation corpus. device: "auto" (a GPU if there is one) or a
    torch device. tokenizer: instead of the one beside the corpus. Raises EvalError, ConfigError, DataError or
    CheckpointError, in one line.
    """
    reader = CheckpointReader(checkpoint)
    config = layout.config(reader.config)
    corpus = _open_data(reader, data) if needs_corpus or data else None
    text_tokenizer = _tokenizer(reader, corpus, tokenizer)
    mesh = build_mesh(config, device)
    if mesh.rank == 0:
        refuse_damage(reader.folder, ("model",))
    stage = load_stage(reader, config, mesh, reader.config.finetune.head)
    names = (name for name in ("index.json", "manifest.json") if (reader.folder / name).is_file())
    identity = item_key(*((reader.folder / name).read_bytes() for name in names))
    workers = Workers(mesh, batch_tokens, journal)
    workers.require_same(str(reader.folder), identity)
    return Subject(
        reader.folder,
        reader.index["step"],
        reader.config,
        ShardedModel(stage, decode=decode),
        text_tokenizer,
        corpus,
        mesh.device,
        identity,
        workers,
        prefill,
    )


def load_stage(
    reader: CheckpointReader, config: Config, mesh: Mesh, text_head: HeadConfig | None = None, *, int8: bool = False
) -> Stage:
    """This rank's layers of a checkpoint on its device, in eval mode; `config` is that of the layout.

    int8: their projections in int8 (model/int8.py). Raises EvalError where that does not run.
    """
    if int8 and (mesh["world"].size > 1 or mesh.device.type != "cpu"):
        raise EvalError("--int8 runs in one process on a CPU; start one, or leave --int8 out")
    dtype = torch.float32 if mesh.device.type == "cpu" else getattr(torch, config.dtype_name)
    stage = Stage.build(config.model, mesh, dtype=dtype, text_head=text_head)
    load_weights(reader, stage)
    stage = stage.to(mesh.device).eval()
    if int8:
        quantize_projections(stage)
    return stage


def build_mesh(config: Config, device: str) -> Mesh:
    """The mesh of the joined world, or of this process alone. Raises EvalError where the ranks do not fill it."""
    world, place = joined_world_size(), _device(device)
    parallel = config.parallel
    sizes = {
        "--tp": parallel.tensor_model_parallel_size,
        "--pp": parallel.pipeline_model_parallel_size,
        "--cp": parallel.context_parallel_size,
    }
    worker = math.prod(sizes.values())
    said = " x ".join(f"{flag} {size}" for flag, size in sizes.items() if size > 1) or "--tp 1"
    if world % worker:
        raise EvalError(
            f"{said} takes {worker} ranks or a multiple, this launch has {world}; start as many, "
            f"for example by torchrun --nproc-per-node {worker}"
        )
    ep = parallel.expert_model_parallel_size
    spread = world // worker * parallel.context_parallel_size
    if spread % ep:
        raise EvalError(f"--ep {ep} must divide dp x cp = {spread} of this launch; give another --ep or more ranks")
    if world == 1:
        return Mesh.single(place)
    return Mesh.build(parallel, place, num_key_value_heads=config.model.num_key_value_heads)


def _tokenizer(reader: CheckpointReader, corpus: Corpus | None, given: Path | None) -> Tokenizer:
    """The given one, that of the corpus, or the one that the checkpoint's run knows of."""
    if given is not None:
        tokenizer = load_tokenizer(given)
        if tokenizer.vocab_size > reader.config.model.vocab_size:
            raise EvalError(
                f"--tokenizer {given}: has {tokenizer.vocab_size} ids, the model only "
                f"{reader.config.model.vocab_size}; give the one that the model was trained with"
            )
        return tokenizer
    if corpus is not None:
        return corpus.tokenizer()
    known = tokenizer_of(reader)
    if known is None:
        location = reader.config.data.sources[0].location
        raise EvalError(
            f"{reader.folder}: a checkpoint holds no tokenizer, and its training corpus {location} is not here; name "
            "the tokenizer's folder with --tokenizer"
        )
    return known


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
    train = Path(sources[0].location)
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
