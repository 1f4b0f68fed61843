"""Completion of commands and flags in bash and zsh, by argcomplete; docs/cli.md says how to switch it on.

The shell starts `neomoba` with the line so far in its environment. Names of commands are answered from a table; for
flags the command starts as it would for --help, and its parser answers where it would have parsed.
"""

import argparse
import os
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any


def asked() -> bool:
    """Whether the shell asks for completions."""
    return "_ARGCOMPLETE" in os.environ


def answer(names_after: Callable[[Sequence[str]], Collection[str] | None]) -> None:
    """Answer the shell and end the process, or leave it to the command.

    names_after: the words that may follow some words; None where they name a command: it is in sys.argv then, to be
    started, and answers itself.
    """
    import argcomplete

    line = os.environ["COMP_LINE"].encode()[: int(os.environ["COMP_POINT"])].decode()
    *_, words, _ = argcomplete.split_line(line)

    def complete(parser: argparse.ArgumentParser, args: Sequence[str] | None = None, *_: Any) -> None:
        rest = sys.argv[1:] if args is None else args
        os.environ["_ARGCOMPLETE"] = str(len(words) - len(rest))  # the word, from one, that stands before `rest`
        argcomplete.autocomplete(parser)

    names = names_after(words[1:])
    if names is None:
        argparse.ArgumentParser.parse_args = complete  # type: ignore[assignment, method-assign]
        sys.argv = list(words)
        return
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("name", choices=list(names))
    complete(parser, [])
