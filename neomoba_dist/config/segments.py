"""Rules of segment embeddings and next-sentence prediction."""

from collections.abc import Iterator

from neomoba_dist.config.root import Config


def segments(config: Config) -> Iterator[str]:
    """Refuse segments of models that read no pairs, and pairs whose texts are not told apart."""
    model = config.model
    if model.objective != "mlm" and model.type_vocab_size:
        yield (
            f"neomoba.model.type_vocab_size {model.type_vocab_size} tells the two texts of an encoder's pair apart, "
            f"and neomoba.model.objective is {model.objective}; set type_vocab_size to 0"
        )
    if model.next_sentence_prediction and not model.type_vocab_size:
        yield (
            "neomoba.model.next_sentence_prediction makes pairs, whose texts neomoba.model.type_vocab_size 0 does not "
            "tell apart; set type_vocab_size to 2"
        )
    if model.next_sentence_prediction and config.distill.teacher is not None:
        yield (
            "neomoba.model.next_sentence_prediction is nothing that neomoba.distill.teacher teaches; set it to false, "
            "segments stay"
        )
