"""The one exception of the data side."""


class DataError(Exception):
    """A corpus, shard or tokenizer that cannot be used: one line that names the file and what to do."""
