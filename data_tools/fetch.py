"""Gets text from the Hugging Face hub or from local files, as a folder that the other commands read.

  --source wikipedia                     a preset: bookcorpus, pg19, refinedweb, wikipedia, wikitext-103
  --source hf:NAME[:CONFIG]@REVISION     any data set of the hub that is stored as parquet
  --source FILE_OR_FOLDER ...            local txt, jsonl(.gz|.zst), parquet; needs no network

Data sets of the hub are streamed through the library `datasets`; none of their code is run. Writes
OUTPUT/documents-*.jsonl.zst and, last, OUTPUT/manifest.json with the commit that was read. An interrupted run goes on
behind its last finished part.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from data_tools.cleaning import CleaningReport, Document
from data_tools.cli import add_strict, check_output, command_parser, positive_float, progress, run
from data_tools.sources import TEXT_KEYS, input_files, read_documents, refuse_input_in, total_bytes
from neomoba_dist.data.errors import DataError

if TYPE_CHECKING:
    from datasets import IterableDataset

    from data_tools.text_folder import TextFolder

PRESETS = {
    # its own repository holds a script; the hub keeps this parquet copy of what the script yields
    "bookcorpus": "hf:bookcorpus/bookcorpus@refs/convert/parquet",
    "pg19": "hf:emozilla/pg19@c021754c8e01c5b1cc83a1f549c1f97fbbb756b8",
    "refinedweb": "hf:tiiuae/falcon-refinedweb@c735840575b629292b41da8dde11dcd523d4f91c",
    "wikipedia": "hf:wikimedia/wikipedia:20231101.en@b04c8d1ceb2f5cd4588862100d08de323dccfbaa",
    "wikitext-103": "hf:Salesforce/wikitext:wikitext-103-raw-v1@b08601e04326c79dfdd32d625aee71d232d685c3",
}
_HUB = re.compile(r"hf:(?P<name>[^:@]+)(:(?P<config>[^@]+))?@(?P<revision>.+)")
_LOCAL = "without network: download it elsewhere and give the files, --source FOLDER (txt, jsonl, parquet)"


class HubDataset(NamedTuple):
    """An opened data set: its rows, where they come from, and how many there are (None: the hub does not say)."""

    rows: IterableDataset
    commit: str
    text_key: str
    documents: int | None


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def open_hub_dataset(source: str, split: str) -> HubDataset:
    """Opens `hf:NAME[:CONFIG]@REVISION` for streaming. DataError, in one line, if it is not to be had as parquet."""
    if (spec := _HUB.fullmatch(source)) is None:
        raise DataError(f"--source {source}: write hf:NAME[:CONFIG]@REVISION; REVISION is a commit, a tag or main")
    import datasets
    import huggingface_hub
    from datasets.packaged_modules.parquet.parquet import ParquetConfig

    datasets.disable_progress_bars()
    huggingface_hub.logging.set_verbosity_error()  # a line for each of five attempts
    name, config, revision = spec["name"], spec["config"], spec["revision"]
    try:
        builder = datasets.load_dataset_builder(name, config, revision=revision)
        if not isinstance(builder.config, ParquetConfig):
            raise DataError(
                f"--source {source}: not stored as parquet; try hf:{name}@refs/convert/parquet, the hub's own copy"
            )
        rows = builder.as_streaming_dataset(split=split)
        features: dict[str, Any] = rows.features or next(iter(rows.take(1)), {})
    except DataError:
        raise
    except Exception as error:  # the library passes on the errors of half a dozen others
        raise DataError(f"--source {source}: cannot be had ({_reason(error)}); {_LOCAL}") from error
    text_key = next((key for key in TEXT_KEYS if key in features), None)
    if text_key is None:
        raise DataError(f"--source {source}: no column {' or '.join(map(repr, TEXT_KEYS))}, only {', '.join(features)}")
    kind = getattr(rows.features[text_key], "dtype", type(rows.features[text_key]).__name__) if rows.features else None
    if kind not in (None, "string", "large_string", "null"):
        raise DataError(f"--source {source}: column {text_key!r} holds {kind}, not strings")
    known = builder.info.splits.get(split) if builder.info.splits else None
    return HubDataset(rows, str(builder.hash), text_key, known.num_examples if known else None)


def hub_documents(dataset: HubDataset, source: str, already: int) -> Iterator[Document | None]:
    """The documents of a data set, numbered on from `already`; None for one without text. `raw_bytes` counts rows."""
    try:
        for number, row in enumerate(dataset.rows, already):
            text = row[dataset.text_key]
            yield Document(str(row.get("id", number)), text, 1) if isinstance(text, str) else None
    except Exception as error:  # as above
        raise DataError(
            f"--source {source}: broke off ({_reason(error)}); the same command goes on from here"
        ) from error


def fetch_hub(source: str, split: str, folder: TextFolder, max_bytes: float, strict: bool) -> dict[str, Any]:
    """Fills the folder from the hub; returns facts for the manifest."""
    dataset = open_hub_dataset(source, split)
    done: dict[str, Any] = {"documents": 0, "without_text": 0, "bytes": 0, "commit": dataset.commit} | folder.state
    report = CleaningReport(strict=strict)
    if done["commit"] != dataset.commit:
        raise DataError(
            f"--source {source}: is now commit {dataset.commit}, was {done['commit']} when the run was interrupted; "
            f"give @{done['commit']} with --overwrite"
        )
    if "stream" in done:
        dataset.rows.load_state_dict(done.pop("stream"))
    with progress(dataset.documents, "fetch", "doc") as bar:
        already = done["documents"] + done["without_text"]
        bar.update(already)
        for number, document in enumerate(hub_documents(dataset, source, already), already):
            bar.update(1)
            if document is None:
                report.no_text(f"--source {source}: row {number}", f"{dataset.text_key!r} is null")
                done["without_text"] += 1
                continue
            done["documents"] += 1
            done["bytes"] += len(document.text.encode("utf-8"))
            folder.add(document, lambda: done | {"stream": dataset.rows.state_dict()})
            if done["bytes"] >= max_bytes:
                break
    for line in report.lines():
        print(line)
    return {"source": source, "split": split} | done


def fetch_local(sources: Sequence[str], folder: TextFolder, max_bytes: float, strict: bool) -> dict[str, Any]:
    """Fills the folder from local files; returns facts for the manifest."""
    files = input_files(sources)
    report = CleaningReport(strict=strict)
    done = {"documents": 0, "bytes": 0} | folder.state
    with progress(int(min(total_bytes(files), max_bytes)), "fetch", "B") as bar:
        documents = read_documents(files, report)
        bar.update(sum(document.raw_bytes for document in islice(documents, done["documents"])))
        for document in documents:
            if done["bytes"] >= max_bytes:
                break
            done["documents"] += 1
            done["bytes"] += len(document.text.encode("utf-8", errors="surrogatepass"))
            bar.update(document.raw_bytes)
            folder.add(document, lambda: done)
    for line in report.lines():
        print(line)
    return {"source": list(sources)} | done


def main(argv: Sequence[str]) -> None:
    """The command."""
    parser = command_parser("fetch", __doc__)
    parser.add_argument("--source", nargs="+", required=True, help="a preset, hf:NAME[:CONFIG]@REVISION, or files")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--split", default="train", help="of a data set of the hub (default: train)")
    parser.add_argument("--max_mb", type=positive_float, default=float("inf"), help="stop at this much text, in MB")
    add_strict(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace other text in OUTPUT")
    args = parser.parse(argv)
    check_output(args.output)

    from data_tools.clean import file_facts
    from data_tools.text_folder import TextFolder

    sources = [PRESETS.get(source, source) for source in args.source]
    hub = [source for source in sources if source.startswith("hf:")]
    if hub and len(sources) > 1:
        raise DataError(f"--source {hub[0]}: give one data set of the hub alone, others an --output of their own")
    recipe: dict[str, Any] = {"command": "fetch", "max_mb": str(args.max_mb)}
    if hub:
        recipe |= {"source": hub[0], "split": args.split}
    else:
        files = input_files(sources)
        refuse_input_in(args.output, files)
        recipe["input"] = file_facts(files)
    folder = TextFolder(args.output, recipe, args.overwrite)
    if folder.finished:
        print(f"{args.output}: already holds this text, nothing to do")
        return
    max_bytes = args.max_mb * 1e6
    if hub:
        facts = fetch_hub(hub[0], args.split, folder, max_bytes, args.strict)
    else:
        facts = fetch_local(sources, folder, max_bytes, args.strict)
    folder.close(facts)
    commit = f", commit {facts['commit']}" if hub else ""
    print(f"{args.output}: {facts['documents']} documents, {facts['bytes'] / 1e6:.1f} MB of text{commit}")


if __name__ == "__main__":
    run(main, resumes=True)
