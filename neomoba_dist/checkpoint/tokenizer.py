"""The tokenizer and chat template that a checkpoint's model was trained with: checkpoints hold none, but runs know
where they lie."""

from pathlib import Path

from neomoba_dist.checkpoint.load import CheckpointReader
from neomoba_dist.data.chat import ChatTemplate, load_chat_template
from neomoba_dist.data.check import open_corpus
from neomoba_dist.data.index import INDEX_FILE
from neomoba_dist.data.tokenizer import TOKENIZER_JSON, TOKENIZER_MODEL, Tokenizer, load_tokenizer


def tokenizer_of(reader: CheckpointReader) -> Tokenizer | None:
    """The one beside the weights (the hub's folders) or in the run folder (as fine-tuning keeps it), or that of the
    training corpus; None where none of them is."""
    for folder in (reader.folder, *reader.folder.parents[1:2]):
        for name in (TOKENIZER_JSON, TOKENIZER_MODEL):
            if (file := folder / name).is_file():
                return load_tokenizer(file)
    location = reader.config.data.sources[0].location
    return open_corpus(location).tokenizer() if (Path(location) / INDEX_FILE).is_file() else None


def chat_template_of(
    reader: CheckpointReader, tokenizer: Tokenizer, place: str | Path | None = None
) -> ChatTemplate | None:
    """The chat template beside the tokenizer at `place`; without `place` where `tokenizer_of` looks, in the other
    training corpora too; None where there is none. Raises DataError."""
    if place is not None:
        return load_chat_template(place, tokenizer)
    corpora = (Path(source.location) for source in reader.config.data.sources)
    folders = filter(Path.is_dir, (reader.folder, *reader.folder.parents[1:2], *corpora))
    found = (load_chat_template(folder, tokenizer) for folder in folders)
    return next((template for template in found if template is not None), None)
