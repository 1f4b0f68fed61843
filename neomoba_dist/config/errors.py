"""The error of the configuration: one line for the user, never a stack trace."""

from neomoba_dist.errors import UserError


class ConfigError(UserError):
    """A configuration that cannot be used.

    The message names the file and key and what to do. `main()` prints it and exits non-zero. Characters that would
    break the line (a newline inside a key, say) are escaped.
    """

    def __init__(self, message: str) -> None:
        """Keep `message` as one printable line."""
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message))
