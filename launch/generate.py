"""Continue a text with a trained causal model, greedily.

    python launch/generate.py --checkpoint runs/mine --prompt "import os"

One process, on the GPU if there is one. The tokenizer is the one beside the run's training shards.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as in the other launch files

if TYPE_CHECKING:
    from neomoba_dist.config import ModelConfig


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line; flags may be written with `-` or `_`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="run folder (its newest checkpoint), or a step_N folder"
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what to continue")
    parser.add_argument(
        "--max_new_tokens", "--max-new-tokens", type=int, default=64, metavar="N", help="at most so many (default: 64)"
    )
    parser.add_argument(
        "--decode",
        choices=("full", "moba"),
        default="full",
        help="attention of the MoBA layers: full, as MoBA's authors generate (default), or moba",
    )
    return parser.parse_args(arguments)


def continue_text(arguments: argparse.Namespace) -> str:
    """Prompt and continuation. Raises CheckpointError, ConfigError, DataError or GenerationError, each one line."""
    import torch

    from neomoba_dist.checkpoint.load import CheckpointReader, load_model
    from neomoba_dist.config import ConfigError
    from neomoba_dist.data.corpus import open_corpus
    from neomoba_dist.generate.decode import generate
    from neomoba_dist.generate.stage import Stage
    from neomoba_dist.generate.text import continued_text

    reader = CheckpointReader(arguments.checkpoint)
    config = reader.config
    if not config.model.causal:
        raise ConfigError(
            f'{reader.folder}: a model of neomoba.model.objective "mlm" does not continue text; give a run of "clm"'
        )
    if arguments.max_new_tokens < 1:
        raise ConfigError(f"--max_new_tokens is {arguments.max_new_tokens}; give at least 1")
    cache = None if config.data.cache is None else Path(config.data.cache)
    tokenizer = open_corpus(config.data.sources[0].place, cache=cache).tokenizer()
    ids = tokenizer.wrap_document(tokenizer.encode(arguments.prompt))
    end = tokenizer.special.sep if tokenizer.special.sep is not None else tokenizer.special.eos
    prompt = ids if end is None else ids[:-1]  # the document goes on: without the token that would end it
    check_length(config.model, len(prompt), arguments.max_new_tokens)
    cuda = torch.cuda.is_available()
    dtype = getattr(torch, config.dtype_name) if cuda else torch.float32
    model, _ = load_model(reader.folder, dtype=dtype, device="cuda" if cuda else "cpu")
    stage = Stage.of(model)
    (continuation,) = generate(stage, [prompt], arguments.max_new_tokens, decode=arguments.decode, stop_id=end)
    return continued_text(tokenizer, arguments.prompt, continuation)


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
    """Returns the exit code: 0, or 1 after one line on what is wrong."""
    arguments = parse_arguments(command_line)
    from neomoba_dist.checkpoint.layout import CheckpointError
    from neomoba_dist.config import ConfigError
    from neomoba_dist.data.errors import DataError
    from neomoba_dist.generate.decode import GenerationError

    try:
        print(continue_text(arguments))
    except (CheckpointError, ConfigError, DataError, GenerationError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
