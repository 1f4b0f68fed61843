"""Continue texts, or answer messages, with a trained causal model; fill gaps of texts with an encoder-decoder.

    python launch/generate.py --checkpoint runs/mine --prompt "import os"
    python launch/generate.py --checkpoint runs/phase4_sft --chat --prompt "What is a list?"
    python launch/generate.py --checkpoint runs/mine --prompt-file prompts.jsonl --output out.jsonl --temperature 0.8
    python launch/generate.py --checkpoint runs/cpu_tiny_encdec --prompt "import <extra_id_0> as np"
    python launch/generate.py --checkpoint runs/student_pruned --int8 --prompt "import os"
    torchrun --nproc-per-node 4 launch/generate.py --checkpoint runs/mine --tp 2 --cp 2 --prompt-file prompts.txt

Sentinels (<extra_id_0>, <extra_id_1>, ... as the model's tokenizer names them) stand for gaps; what is printed is each
sentinel with what it stands for. By default the likeliest token is taken; --temperature draws. The text appears as it
is made. On one process, or on --tp x --pp x --cp x --ep ranks of any launcher, from a checkpoint of any layout; the
same text comes out.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as in the other launch files

from launch.pretrain import command_parser, leave
from neomoba_dist.errors import exit_code_of

if TYPE_CHECKING:
    from neomoba_dist.config import Config, ModelConfig
    from neomoba_dist.data.chat import ChatTemplate
    from neomoba_dist.data.tokenizer import Tokenizer


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line; flags may be written with `-` or `_`."""
    parser, add = command_parser(__doc__)
    add("checkpoint", required=True, metavar="DIR", help="run folder (its newest checkpoint), or a step_N folder")
    add(
        "prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="what to continue, or a text with sentinels; may stand several times",
    )
    add("prompt_file", metavar="FILE", help='prompts: lines of a .txt, or {"prompt": ...} objects of a .jsonl')
    add(
        "chat", action="store_true",
        help='prompts are messages of a user, which the chat template beside the tokenizer lays out; a .jsonl may also '
        'hold {"messages": [{"role": ..., "content": ...}, ...]}; only the answer is printed',
    )  # fmt: skip
    add("output", metavar="FILE", help="write a .jsonl with prompt, text and finish_reason of each instead of printing")
    add("max_new_tokens", type=int, default=64, metavar="N", help="at most so many (default: 64)")
    add("stop", action="append", default=[], metavar="TEXT", help="end before this text; may stand several times")
    add("temperature", type=float, default=0.0, metavar="X", help="draw; 1: the model's own distribution (default: 0)")
    add("top_k", type=int, metavar="N", help="draw from the N likeliest tokens")
    add("top_p", type=float, metavar="X", help="draw from the likeliest tokens that have this probability together")
    add("min_p", type=float, metavar="X", help="draw from tokens with this share of the best one's probability")
    add(
        "repetition_penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="against tokens that are there (default: 1)",
    )
    add("seed", type=int, default=0, metavar="N", help="of what is drawn (default: 0)")
    add(
        "decode", choices=("full", "moba"), default="full",
        help="attention of the MoBA layers: full, as MoBA's authors generate (default), or moba",
    )  # fmt: skip
    add("tokenizer", metavar="DIR", help="default: the one that the model was trained with")
    add("int8", action="store_true", help="projections in int8, in one process on a CPU")
    for axis, what in (("tp", "tensor"), ("pp", "pipeline"), ("cp", "context"), ("ep", "expert")):
        add(axis, type=int, default=1, metavar="N", help=f"{what}-parallel ranks")
    return parser.parse_args(arguments)


def read_prompts(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """{"prompt": text} of each prompt of the command line and its file; with --chat also {"messages": [...]}. Raises
    ConfigError."""
    from neomoba_dist.config import ConfigError

    records: list[dict[str, Any]] = [{"prompt": prompt} for prompt in arguments.prompt]
    if arguments.prompt_file:
        file = Path(arguments.prompt_file)
        try:
            # JSON may spell U+2028 and the like as themselves, where `splitlines` would cut
            lines = [line for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
            if file.suffix == ".jsonl":
                records += [read_record(line, arguments.chat) for line in lines]
            else:
                records += [{"prompt": line} for line in lines]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--prompt-file {file}: cannot be read ({error})") from error
        except (ValueError, KeyError, TypeError) as error:
            kinds = '{"prompt": "..."}' + ' or {"messages": [...]}' * arguments.chat
            raise ConfigError(f"--prompt-file {file}: give one {kinds} a line ({error!r})") from error
    if not records or not all(value for record in records for value in record.values()):
        raise ConfigError("no prompt, or an empty one; give --prompt TEXT or --prompt-file FILE")
    return records


def read_record(line: str, chat: bool) -> dict[str, Any]:
    """The prompt, or the messages, of a line of jsonl. Raises ValueError, KeyError, TypeError."""
    from neomoba_dist.data.chat import check_messages

    record = json.loads(line)
    if chat and "messages" in record:
        check_messages(record["messages"])
        return {"messages": record["messages"]}
    if not isinstance(record["prompt"], str):
        raise TypeError("'prompt' is not a string")
    return {"prompt": record["prompt"]}


class Prompts(NamedTuple):
    """ids: what new ones follow, of each prompt. end: what ends these, of all or of each. sources: what an encoder
    reads for each."""

    ids: list[list[int]]
    end: int | list[int | None] | None
    sources: list[list[int]] | None = None


def encode_gaps(records: list[dict[str, Any]], tokenizer: "Tokenizer", config: "Config") -> Prompts:
    """Prompts of an encoder-decoder: its encoder reads them, its decoder begins as in training. Raises DataError."""
    from neomoba_dist.data.span_corruption import encode_source

    needed = config.corrupted_lengths.sentinels
    encoded = [encode_source(tokenizer, record["prompt"], needed) for record in records]
    return Prompts(
        [[tokenizer.special.padding]] * len(records), [end for _, end in encoded], [source for source, _ in encoded]
    )


def encode_prompts(records: list[dict[str, Any]], tokenizer: "Tokenizer", template: "ChatTemplate | None") -> Prompts:
    """Prompts of a causal model, by the chat template if there is one. Raises ConfigError."""
    from neomoba_dist.config import ConfigError

    head, tail = tokenizer.document_borders
    end = tail[0] if tail else None
    if template is None:
        return Prompts([[*head, *tokenizer.encode(record["prompt"])] for record in records], end)
    chats = [record.get("messages") or [{"role": "user", "content": record["prompt"]}] for record in records]
    try:
        prompts = [template.encode_prompt(messages) for messages in chats]
    except ValueError as error:
        raise ConfigError(f"--chat: {error}; give other messages, or leave --chat out") from error
    return Prompts(prompts, end if template.end_of_turn is None else template.end_of_turn)


def run(arguments: argparse.Namespace) -> None:
    """The command, on every rank. Raises errors that are one line each."""
    from evals.load import Layout, build_mesh, load_stage
    from neomoba_dist.checkpoint.load import CheckpointReader
    from neomoba_dist.checkpoint.resume import require_whole_weights
    from neomoba_dist.checkpoint.tokenizer import chat_template_of, tokenizer_of
    from neomoba_dist.config import ConfigError
    from neomoba_dist.data.tokenizer import load_tokenizer
    from neomoba_dist.generate.decode import generate
    from neomoba_dist.generate.sample import Sampling
    from neomoba_dist.parallel.launcher import join_world

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    sampling = Sampling(**{name: getattr(arguments, name) for name in names})
    records = read_prompts(arguments)
    reader = CheckpointReader(arguments.checkpoint)
    config = Layout(arguments.tp, arguments.pp, arguments.cp, arguments.ep).config(reader.config)
    encoder_decoder = bool(config.model.num_decoder_layers)
    if not config.model.causal and not encoder_decoder:
        raise ConfigError(
            f'{reader.folder}: a model of neomoba.model.objective "mlm" does not continue text; give a run of "clm" or '
            '"span_corruption"'
        )
    if encoder_decoder and arguments.chat:
        raise ConfigError(f"--chat: {reader.folder} is of an encoder-decoder, which fills gaps; leave --chat out")
    if arguments.max_new_tokens < 1:
        raise ConfigError(f"--max_new_tokens is {arguments.max_new_tokens}; give at least 1")
    tokenizer = load_tokenizer(arguments.tokenizer) if arguments.tokenizer else tokenizer_of(reader)
    if tokenizer is None:
        raise ConfigError(f"{reader.folder}: its tokenizer is not here; name its folder with --tokenizer")
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"--tokenizer {arguments.tokenizer}: has {tokenizer.vocab_size} ids, the model only "
            f"{config.model.vocab_size}; give the one that the model was trained with"
        )
    template = chat_template_of(reader, tokenizer, arguments.tokenizer) if arguments.chat else None
    if arguments.chat and template is None:
        raise ConfigError(
            f"--chat: no chat template beside the tokenizer of {reader.folder}; name a folder that has both with "
            "--tokenizer, or leave --chat out"
        )
    prompts = (
        encode_gaps(records, tokenizer, config) if encoder_decoder else encode_prompts(records, tokenizer, template)
    )
    longest = max(map(len, prompts.sources or prompts.ids))
    check_length(config.model, longest, 0 if encoder_decoder else arguments.max_new_tokens)
    join_world()
    mesh = build_mesh(config, "cpu" if arguments.int8 else "auto")
    require_whole_weights(reader, mesh)
    stage = load_stage(reader, config, mesh, int8=arguments.int8)
    speaks = mesh.rank == 0
    live = speaks and not arguments.output and len(records) == 1
    shown = Shown(tokenizer, records, arguments.stop, live=live, alone=encoder_decoder or arguments.chat)
    found = generate(
        stage, prompts.ids, arguments.max_new_tokens, sources=prompts.sources, decode=arguments.decode,
        stop_id=prompts.end, stop=shown.enough, sampling=sampling,
    )  # fmt: skip
    if speaks:
        shown.finish(found, arguments.max_new_tokens, arguments.output)


class Shown:
    """What is printed, as it is made or at the end; and whether a stop text has come. alone: without the prompt."""

    def __init__(
        self, tokenizer: "Tokenizer", records: list[dict[str, Any]], stops: list[str], *, live: bool, alone: bool
    ) -> None:
        self.tokenizer, self.records, self.stops, self.live = tokenizer, records, stops, live
        self.prompts = ["" if alone else record["prompt"] for record in records]  # what stands before the new text
        self.printed = 0

    def text(self, number: int, ids: list[int]) -> tuple[str, bool]:
        """The prompt, unless `alone`, and what follows, up to a stop text; whether one has come."""
        from neomoba_dist.generate.text import continued_text

        prompt = self.prompts[number]
        whole = continued_text(self.tokenizer, prompt, ids)
        ends = [at for stop in self.stops if (at := whole.find(stop, len(prompt))) >= 0]
        return (whole[: min(ends)], True) if ends else (whole, False)

    def enough(self, number: int, ids: list[int]) -> bool:
        """Called after each token."""
        if not self.live and not self.stops:
            return False
        text, stopped = self.text(number, ids)
        if self.live:
            # what may be the beginning of a stop text, or of a character of several tokens, waits
            held = max((n for stop in self.stops for n in range(len(stop)) if text.endswith(stop[:n])), default=0)
            self._print(text[: len(text) - held].rstrip("\ufffd") if not stopped else text)
        return stopped

    def finish(self, found: list[list[int]], most: int, output: str | None) -> None:
        """Print what is left, or write the file. Raises ConfigError."""
        from neomoba_dist.config import ConfigError

        texts = [self.text(number, ids) for number, ids in enumerate(found)]
        if output is None:
            if self.live:
                self._print(texts[0][0])
                print()
            else:
                print("\n\n".join(text for text, _ in texts))
            return
        lines = []
        for record, prompt, ids, (text, stopped) in zip(self.records, self.prompts, found, texts, strict=True):
            reason = "stop" if stopped or len(ids) < most else "length"
            entry = {**record, "text": text.removeprefix(prompt), "tokens": len(ids), "finish_reason": reason}
            lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
        try:
            Path(output).write_text("".join(lines), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--output {output}: cannot be written ({error.strerror})") from error

    def _print(self, text: str) -> None:
        print(text[self.printed :], end="", flush=True)
        self.printed = max(self.printed, len(text))


def check_length(model: "ModelConfig", prompt: int, new: int) -> None:
    """Warn of more tokens than the model has positions for; learned positions end there: GenerationError."""
    from neomoba_dist.generate.decode import GenerationError

    limit = model.max_position_embeddings
    if prompt + new <= limit:
        return
    said = f"the prompt's {prompt} tokens" + ("" if prompt > limit else f" and --max_new_tokens {new}")
    if model.position_embedding == "learned":
        raise GenerationError(
            f"{said} are more than the {limit} positions that the model learned "
            "(neomoba.model.max_position_embeddings); " + ("shorten it" if prompt > limit else "ask for fewer")
        )
    print(
        f"warning: {said} are more than the {limit} tokens that the model was made for "
        "(neomoba.model.max_position_embeddings); what follows may be poor",
        file=sys.stderr,
    )


def main(command_line: list[str]) -> int:
    """Returns the exit code."""
    arguments = parse_arguments(command_line)
    return exit_code_of(lambda: run(arguments))


if __name__ == "__main__":
    code = main(sys.argv[1:])
    from neomoba_dist.parallel.launcher import joined_world_size  # not before: --help needs no torch

    if joined_world_size() > 1:
        leave(code)
    sys.exit(code)
