"""The exceptions of the data side."""


class DataError(Exception):
    """A corpus, shard or tokenizer that cannot be used: one line that names the file and what to do."""

    on_all_ranks = False  # whether every rank of the job raises it


class AgreedError(DataError):
    """A DataError that every rank of the job raises: it is enough that one of them says so."""

    on_all_ranks = True
