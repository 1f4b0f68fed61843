"""What every error meant for the person at the keyboard is, and how commands end.

A command's exit code is 0 or one of these; batch scripts read from it whether to start again (docs/cli.md).
"""

import sys
from collections.abc import Callable

FAILED = 1  # something failed, or a check found what it looks for: damage, differences, a host to leave out
MISTAKE = 2  # will be as wrong the next time: configuration, command line, files that cannot be read
INTERRUPTED = 75  # EX_TEMPFAIL: a signal or the file STOP came before the last step; saved
CANCELLED = 130  # Ctrl-C, as shells count it


class UserError(Exception):
    """One line that names the key, flag or file and what to do. Commands print it and no stack trace."""

    exit_code = MISTAKE
    on_all_ranks = False  # whether every rank of the job raises it, so that one of them may speak for all


class FailedError(UserError):
    """What a command started did not end well, or a check found what it looks for."""

    exit_code = FAILED


NOT_AS_NAMED = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)


def exit_code_of(command: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """Runs a command that does not train. interrupted: what is said at Ctrl-C.

    Ranks that have met find the same mistakes, and the first of them says what is wrong; of what failed, each says its
    own.
    """
    try:
        return command() or 0
    except UserError as error:
        said, code, alone = f"{error}", error.exit_code, error.exit_code == FAILED and not error.on_all_ranks
    except OSError as error:  # a full disk, say, need not be full the next time
        said, code, alone = f"{error}", MISTAKE if isinstance(error, NOT_AS_NAMED) else FAILED, True
    except KeyboardInterrupt:
        said, code, alone = interrupted, CANCELLED, False
    dist = sys.modules.get("torch.distributed")  # not imported for this: most mistakes are found before ranks meet
    rank = dist.get_rank() if dist is not None and dist.is_initialized() else 0
    start = "" if code == CANCELLED else "error: "
    if rank == 0 or alone:
        print(f"{start}{f'rank {rank}: ' if rank else ''}{said}", file=sys.stderr, flush=True)
    return code
