"""Attention maps: where the queries of a real text look, layer by layer and head by head, and which blocks MoBA chose.

The weights are those of the layer itself, whatever it runs: attention is linear in the values, so values that are unit
vectors, as many keys at a time as a head has dimensions, come out as the weights. Maps are summed over cells of some
tokens. Mixtures of experts also show the share of the router's choices that each expert gets.

Legend: T tokens, N query heads of this rank, D head size, C cells, B blocks, E experts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from evals.cli import EvalError, list_of, natural_int, positive_int

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from evals.load import Subject
    from evals.tasks import Result, Scores, Table

TITLE = "Attention maps"
DEFAULT_TOKENS, MOST_CELLS, MOST_DRAWN = 512, 64, 4
EXPERT_TOKENS = 16_384  # of the corpus, whose routing is counted
NUMBERS = {
    "own_block": "own block, %",
    "first_token": "first token, %",
    "distance": "tokens away",
    "caught": "caught, %",
}


@dataclass(frozen=True)
class Plan:
    """The text, whose maps are drawn of some layers and heads; the pieces of text that the experts' shares are of."""

    tokens: np.ndarray
    layers: list[int]
    heads: list[int]
    pieces: list[np.ndarray]


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    """The task's options."""
    numbers = list_of(natural_int)
    parser.add_argument(
        "--layers", type=numbers, metavar="N,...", help=f"layers to draw, from 0 (default: {MOST_DRAWN}, evenly spread)"
    )
    parser.add_argument(
        "--heads", type=numbers, metavar="N,...", help=f"query heads (default: {MOST_DRAWN}, evenly spread)"
    )
    parser.add_argument(
        "--map-tokens", type=positive_int, metavar="N",
        help=f"of the longest document (default: the run's sequence_length, at most {DEFAULT_TOKENS})",
    )  # fmt: skip


def prepare(subject: Subject, args: argparse.Namespace) -> Plan:
    """Choose text, layers and heads. Raises EvalError."""
    config, corpus = subject.config.model, subject.corpus
    trained = subject.config.phase.sequence_length
    lengths = np.asarray(corpus.document_lengths)
    longest = int(lengths.argmax())
    count = args.map_tokens or min(trained, DEFAULT_TOKENS, int(lengths[longest]))
    if count > lengths[longest]:
        raise EvalError(
            f"--map-tokens {count}: the longest document of {corpus.folder} has {lengths[longest]:,} tokens; give at "
            "most that or another corpus with --data"
        )
    subject.check_length("--map-tokens", count)
    layers = _chosen("--layers", args.layers, config.num_hidden_layers)
    heads = _chosen("--heads", args.heads, config.num_attention_heads)
    start = int(lengths[:longest].sum())
    pieces = []
    if config.moe_layers:
        total = min(EXPERT_TOKENS, corpus.tokens)
        pieces = [corpus.tokens_at(at, min(trained, total - at)) for at in range(0, total, trained)]
    return Plan(corpus.tokens_at(start, count), layers, heads, pieces)


def _chosen(flag: str, given: list[int] | None, there: int) -> list[int]:
    """What the flag names, or some of all, evenly spread. Raises EvalError."""
    found = given or np.linspace(0, there - 1, min(there, MOST_DRAWN)).round().astype(int).tolist()
    if found[-1] >= there:
        raise EvalError(f"{flag} {found[-1]}: the model has {there}, counted from 0; give less")
    return found


def run(subject: Subject, plan: Plan) -> Result:
    """The maps of all chosen heads, and the experts' shares."""
    from evals.attention_weights import expert_shares, head_maps

    subject.model.use(subject.attentions[0])
    config = subject.config.model
    count = len(plan.tokens)
    cell = cell_tokens(count, config.moba_block_size)
    experts = None
    if plan.pieces:
        shares = expert_shares(subject, plan.pieces)
        experts = {"tokens": sum(map(len, plan.pieces)), "layers": list(config.moe_layers), "shares": shares}
    return {
        "tokens": count,
        "cell": cell,
        "block_size": config.moba_block_size,
        "top_k": config.moba_top_k,
        "maps": head_maps(subject, plan.tokens, plan.layers, plan.heads, cell),
        "experts": experts,
    }


def cell_tokens(count: int, block_size: int) -> int:
    """Tokens of a cell: the fewest with at most MOST_CELLS of them that divide a block, or are whole blocks."""
    least = -(-count // MOST_CELLS)
    parts = [size for size in range(least, block_size + 1) if block_size % size == 0]
    return parts[0] if parts else -(-least // block_size) * block_size


def scores(result: Result) -> Scores:
    """The numbers of the table, one entry per head."""
    return {
        f"attention_map_layer{entry['layer']}_head{entry['head']}": {
            **{key: entry[key] for key in NUMBERS if entry[key] is not None},
            "samples": 1,
        }
        for entry in result["maps"]
    }


def csv(result: Result) -> Table:
    """One line per cell that is looked at, then one per expert. value: attention of the cell's queries, or share."""
    lines = [["map", "layer", "head_or_expert", "query", "key", "value"]]
    cell = result["cell"]
    for entry in result["maps"]:
        names = ["attention", str(entry["layer"]), str(entry["head"])]
        for query, row in enumerate(entry["mass"]):
            lines += [[*names, str(query * cell), str(key * cell), str(mass)] for key, mass in enumerate(row) if mass]
    experts = result["experts"] or {"layers": [], "shares": []}
    for layer, shares in zip(experts["layers"], experts["shares"], strict=True):
        lines += [["experts", str(layer), str(expert), "", "", str(share)] for expert, share in enumerate(shares)]
    return lines


def figure(result: Result) -> Figure:
    """A panel per layer and head; below them the experts' shares."""
    from evals.attention_plot import attention_figure

    return attention_figure(result)


def table(result: Result) -> Table:
    """Where each head looks, in numbers."""
    shown = {key: label for key, label in NUMBERS.items() if any(entry[key] is not None for entry in result["maps"])}
    lines = [["layer and head", *shown.values()]]
    for entry in result["maps"]:
        cells = [f"layer {entry['layer']}, head {entry['head']}"]
        for key in shown:
            value = entry[key]
            cells.append("-" if value is None else f"{value:,.1f}" if key == "distance" else f"{100 * value:.1f}")
        lines.append(cells)
    return lines


def caption(result: Result) -> str:
    """What the maps show."""
    said = (
        f"Attention weights over the first {result['tokens']:,} tokens of the longest document of {result['data']}, "
        f"summed over keys and averaged over queries of cells of {result['cell']} tokens: every row adds up to 100 %. "
        "Table: attention on the query's own block and on the first token, and its mean distance from the query. "
    )
    if any(entry["chosen"] for entry in result["maps"]):
        said += (
            f"Tinted: the blocks of {result['block_size']:,} tokens that MoBA chose, {result['top_k']} for each query "
            "with its own. Caught: how much of what full attention would give these queries and keys lies in the "
            "blocks that were chosen. "
        )
    if result["experts"]:
        shares: Sequence[Sequence[float]] = result["experts"]["shares"]
        busiest = max(max(row) for row in shares)
        said += (
            f"Experts: the router's choices over {result['experts']['tokens']:,} tokens; the busiest expert of a layer "
            f"gets {100 * busiest:.1f} %, a fair share is {100 / len(shares[0]):.1f} %."
        )
    return said.strip()
