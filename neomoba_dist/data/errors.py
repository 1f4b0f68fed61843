"""The exceptions of the data side."""

from neomoba_dist.errors import UserError


class DataError(UserError):
    """A corpus, shard or tokenizer that cannot be used: one line that names the file and what to do."""


class AgreedError(DataError):
    """A DataError that every rank of the job raises: it is enough that one of them says so."""

    on_all_ranks = True
