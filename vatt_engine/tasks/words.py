"""The vocabulary of a pre-training run and its word vectors: given, or made from the captions of the training set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vatt_engine.data.manifest import Sample
from vatt_engine.data.words import Vocabulary, load_word_vectors, match_vectors
from vatt_engine.engine.checkpoint import saved_names, saved_state
from vatt_engine.models import VATT, VATTConfig
from vatt_engine.schema import ConfigError
from vatt_engine.tasks.config import PretrainConfig, WordsConfig


def load_vocabulary(config: PretrainConfig, samples: Sequence[Sample], kept: Path | None) -> Vocabulary:
    """The vocabulary the run was started with (`kept`), else the configured one, else one trained on the captions.

    Raises:
        ValueError: it has more words than the model's table, or there is no caption to train it on.
    """
    limit, path = config.model.text.vocabulary_size, kept or config.text.vocabulary
    if path is None and not config.data.num_candidates:
        return Vocabulary(["<pad>", "<unk>"])
    if path is None:
        if not any(sample.captions for sample in samples):
            hint = "Train on video and audio alone with --data.num-candidates 0."
            raise ConfigError(f"{', '.join(config.data.sources)}: the manifest must have captions, got none. {hint}")
        return Vocabulary.train((caption.text for sample in samples for caption in sample.captions), limit)
    vocabulary = Vocabulary.load(path)
    if vocabulary.size > limit:
        raise ConfigError(
            f"{path}: vocabulary must fit model.text.vocabulary_size {limit}, got {vocabulary.size} words."
        )
    return vocabulary


def load_vectors(model: VATT, config: VATTConfig, words: WordsConfig, vocabulary: Vocabulary, *, held: bool) -> int:
    """Put word vectors into the model's table; returns the number of words that have one.

    Args:
        held: whether a checkpoint follows, whose table then holds vectors already.

    Raises:
        ValueError: the table would be frozen with random vectors, or the file's width is not the table's.
    """
    if words.vectors is None:
        if config.text.freeze_embedding and not held:
            raise ConfigError(
                "text.vectors must be given where model.text.freeze_embedding is true, got none: random word vectors "
                "would stay random. Give a word2vec file, or set model.text.freeze_embedding to null."
            )
        return 0
    weight = model.word_embedding.weight
    table, found = match_vectors(vocabulary, *load_word_vectors(words.vectors), len(weight))
    if not found.any():
        raise ConfigError(f"{words.vectors}: word vectors must be of words of the vocabulary, got none of its words.")
    if table.shape[1] != weight.shape[1]:
        raise ConfigError(
            f"{words.vectors}: word vectors must have width model.text.embedding_dim {weight.shape[1]}, "
            f"got {table.shape[1]}."
        )
    model.word_embedding.load_vectors(table.to(weight), found)
    return int(found.sum())


def freeze_as_saved(model: VATT, config: VATTConfig, run_dir: Path) -> bool:
    """Freeze a table that the newest checkpoint has not trained, as after an import; whether the table is frozen.

    The config decides where it says so; else it makes no difference between vectors that were loaded, and so frozen,
    and those that are trained from scratch. The checkpoint does: it has the optimizer's state for what was trained.
    """
    table = model.word_embedding
    if config.text.freeze_embedding is None:
        trained = {name.rpartition("/")[0] for name in saved_names(run_dir, "optimizer")}
        [name] = [name for name, parameter in model.named_parameters() if parameter is table.weight]
        frozen = name in saved_state(run_dir).get("frozen", [])  # `vatt convert` may know it from a model's folder
        table.weight.requires_grad_(not frozen and (not trained or f"model.{name}" in trained))
    return not table.weight.requires_grad


def check_words(config: PretrainConfig, kept: Path) -> None:
    """Refuse words from the captions for a table of vectors that belong to other words.

    Raises:
        ConfigError: the run holds no vocabulary, and none is given.
    """
    if config.data.num_candidates and config.text.vocabulary is None and not kept.exists():
        hint = "Give --text.vocabulary, or convert once more with --vocabulary; --data.num-candidates 0 takes no text."
        raise ConfigError(f"{kept}: the words of the frozen vectors must be given, got no such file. {hint}")
