"""The error of the configuration: one line for the user, never a stack trace."""


class ConfigError(Exception):
    """A configuration that cannot be used.

    The message is one line that names the file or key and what to do. `main()` prints it and exits non-zero.
    """
