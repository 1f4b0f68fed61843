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


def exit_code_of(command: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """Runs a command that does not train. interrupted: what is said at Ctrl-C.

    Ranks that have met find the same mistakes: the first of them says what is wrong.
    """
    try:
        return command() or 0
    except (UserError, OSError) as error:
        said, code = f"error: {error}", getattr(error, "exit_code", MISTAKE)
    except KeyboardInterrupt:
        said, code = interrupted, CANCELLED
    dist = sys.modules.get("torch.distributed")  # not imported for this: most mistakes are found before
    if dist is None or not dist.is_initialized() or dist.get_rank() == 0:
        print(said, file=sys.stderr, flush=True)
    return code
