"""Words: captions to ids by a word-level vocabulary, and word vectors read from word2vec files."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vatt_engine.faults import is_raised_in

PAD, UNKNOWN = "<pad>", "<unk>"


class Vocabulary:
    """Words and their ids: punctuation removed, lower-cased, split at white space, anything unknown to `<unk>`.

    No begin or end marks are added. Id 0 is `<pad>`, because the text mask is `id != 0`. Markers written out in a
    caption are text like any other: "<pad>" is the word "pad". Punctuation is [[:punct:]] with its Unicode members, so
    that a typographic apostrophe goes as an ASCII one does.

    Args:
        words: the word of each id; "<pad>" first, "<unk>" somewhere, no word twice.

    Raises:
        ValueError: the words are not such a list.

    Source: DMVR `tokenizers.WordTokenizer`.

    >>> Vocabulary(["<pad>", "<unk>", "a", "red", "circle"]).encode("A red, RED square!")
    [2, 3, 3, 1]
    """

    def __init__(self, words: Sequence[str]) -> None:
        from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

        self.words = list(words)
        ids = {word: index for index, word in enumerate(self.words)}
        if not self.words or self.words[0] != PAD:
            raise ValueError(
                f"vocabulary: the word of id 0 must be {PAD}, got {self.words[0] if words else 'no words'}."
            )
        if UNKNOWN not in ids:
            raise ValueError(f"vocabulary: words must contain {UNKNOWN}, got {len(self.words)} words without it.")
        if len(ids) < len(self.words):
            twice = next(word for index, word in enumerate(self.words) if ids[word] != index)
            raise ValueError(f"vocabulary: words must differ from each other, got {twice!r} twice.")
        self.pad_id, self.unk_id = 0, ids[UNKNOWN]
        self._tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
        self._tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Replace(Regex("[[:punct:]]"), ""), normalizers.Lowercase()]
        )
        self._tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()

    @property
    def size(self) -> int:
        """Number of ids, `<pad>` and `<unk>` included."""
        return len(self.words)

    @classmethod
    def train(cls, captions: Iterable[str], size: int = 65536) -> Vocabulary:
        """The most frequent words of some captions; equally frequent ones in alphabetical order.

        Args:
            captions: the texts to count words in.
            size: largest number of ids, `<pad>` (0) and `<unk>` (1) included.

        Raises:
            ValueError: `size` leaves no room for a word, or the captions hold no word.

        >>> Vocabulary.train(["b a", "c b"]).words
        ['<pad>', '<unk>', 'b', 'a', 'c']
        """
        from tokenizers import trainers

        if size < 3:
            raise ValueError(f"vocabulary: size must be at least 3 ({PAD}, {UNKNOWN} and a word), got {size}.")
        tokenizer = cls([PAD, UNKNOWN])._tokenizer
        trainer = trainers.WordLevelTrainer(vocab_size=size - 2, show_progress=False)
        tokenizer.train_from_iterator(captions, trainer)
        ids = tokenizer.get_vocab()
        if not ids:
            raise ValueError("vocabulary: captions must hold a word, got none.")
        return cls([PAD, UNKNOWN, *sorted(ids, key=ids.get)])

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """A vocabulary from `tokenizer.json` as `save` writes it, or from a text file with one word per line.

        In a text file the line number, from 0, is the id. It must hold <pad> (first), <bos>, <eos> and <unk>, as the
        official `howto100m_en.txt` does.

        Raises:
            ValueError: the file is missing, is of neither kind, or breaks a rule above; the message has the line.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"{path}: vocabulary must be a readable UTF-8 file, got {reason}.") from None
        words = _words_of_json(path, text) if path.suffix == ".json" else _words_of_lines(path, text)
        try:
            return cls(words)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write `tokenizer.json`, which the `tokenizers` library can also read by itself."""
        Path(path).write_text(self._tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        """Ids of all the words of a text, without padding."""
        return self._ids([text])[0]

    def encode_batch(self, texts: Sequence[str], max_words: int = 16) -> Tensor:
        """Ids of the first `max_words` words of each text, padded with 0 on the right: int64 [n, max_words].

        Raises:
            ValueError: `max_words` is not positive, or a text is not a string of valid Unicode.

        >>> Vocabulary(["<pad>", "<unk>", "red"]).encode_batch(["Red!", ""], max_words=2).tolist()
        [[2, 0], [0, 0]]
        """
        if max_words < 1:
            raise ValueError(f"encode_batch: max_words must be at least 1, got {max_words}.")
        padding = [self.pad_id] * max_words
        rows = [(ids + padding)[:max_words] for ids in self._ids(texts)]
        return torch.from_numpy(np.array(rows, dtype=np.int64).reshape(-1, max_words))

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if isinstance(texts, str):
            raise ValueError(f"vocabulary: texts must be a list of strings, got the string {texts[:40]!r}.")
        try:
            return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts))]
        except TypeError:
            for index, text in enumerate(texts):
                if not isinstance(text, str) or any("\ud800" <= character <= "\udfff" for character in text):
                    message = f"vocabulary: text {index} must be a string of valid Unicode, got {text!r}."
                    raise ValueError(message) from None
            raise


def _words_of_json(path: Path, text: str) -> list[str]:
    from tokenizers import Tokenizer

    try:
        # Through the library and back: files of older versions compare equal in the words of the installed one.
        content = json.loads(Tokenizer.from_str(text).to_str())
    except Exception as error:
        if type(error) not in (Exception, ValueError):  # the library has no class of its own for a bad file
            raise
        raise ValueError(f"{path}: vocabulary must be a tokenizer.json, got {error}.") from None
    if content["model"]["type"] != "WordLevel":
        raise ValueError(f"{path}: vocabulary must be of type WordLevel, got {content['model']['type']}.")
    own = json.loads(Vocabulary([PAD, UNKNOWN])._tokenizer.to_str())
    for part in ("normalizer", "pre_tokenizer", "post_processor", "added_tokens"):
        if content[part] != own[part]:
            raise ValueError(
                f"{path}: {part} must be the one that Vocabulary.save writes, got {json.dumps(content[part])[:200]}."
                " Give the words as a text file, one word per line."
            )
    ids = content["model"]["vocab"]
    words = sorted(ids, key=ids.get)
    if [ids[word] for word in words] != list(range(len(words))):
        raise ValueError(f"{path}: ids must be 0..{len(words) - 1}, each once, got others.")
    return words


def _words_of_lines(path: Path, text: str) -> list[str]:
    words = [line.strip() for line in text.rstrip("\n").split("\n")]
    lines: dict[str, int] = {}
    for number, word in enumerate(words, start=1):
        if not word or len(word.split()) > 1:
            raise ValueError(f"{path}:{number}: line must hold one word, got {word!r}.")
        if word in lines:
            raise ValueError(f"{path}:{number}: word must be new, got {word!r}, also on line {lines[word]}.")
        lines[word] = number
    for marker in (PAD, "<bos>", "<eos>", UNKNOWN):
        if marker not in lines:
            raise ValueError(f"{path}: vocabulary must contain {marker}, got {len(words)} words without it.")
    if words[0] != PAD:
        raise ValueError(
            f"{path}:{lines[PAD]}: {PAD} must be on line 1, because 0 is the padding id, got line {lines[PAD]}."
        )
    return words


def load_word_vectors(path: str | Path) -> tuple[list[str], Tensor]:
    """Words and their vectors from a word2vec file or an .npz.

    The suffix tells the format: `.bin` is word2vec's binary format, `.npz` holds the arrays `words` (strings [V]) and
    `vectors` ([V, D]) and is read without pickle; anything else is word2vec's text format, a first line `V D`, then V
    lines of a word and D numbers.

    Returns:
        The V words, and their vectors, float32 [V, D].

    Raises:
        ValueError: the file is missing or malformed; the message has the line (text) or the byte offset (binary).

    >>> words, vectors = load_word_vectors("vectors.txt")  # doctest: +SKIP
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: word vectors must be an existing file, got none of this name.")
    read = {".bin": _read_binary, ".npz": _read_npz}.get(path.suffix.lower(), _read_text)
    with np.errstate(over="ignore"):  # a number too large for float32 is reported below
        words, vectors = read(path)
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        row = int(np.argmin(finite))
        where = f"{path}:{row + 2}" if read is _read_text else f"{path}: word {row}"
        raise ValueError(f"{where}: vector of {words[row]!r} must be finite in float32, got NaN or infinity.")
    return words, torch.from_numpy(vectors)


def match_vectors(
    vocabulary: Vocabulary, words: Sequence[str], vectors: Tensor, num_rows: int
) -> tuple[Tensor, Tensor]:
    """The vector of each word of a vocabulary, as an embedding table.

    Words are compared as they are written; of a word listed twice the first vector counts.

    Args:
        vocabulary: V words.
        words: N words.
        vectors: float32 [N, D], their vectors.
        num_rows: R of the table, at least V.

    Returns:
        The table, float32 [R, D], zero where there is no vector, and where there is one, bool [R].
    """
    rows = {word: index for index, word in reversed(list(enumerate(words)))}
    index = torch.full((num_rows,), -1)
    index[: vocabulary.size] = torch.tensor([rows.get(word, -1) for word in vocabulary.words])
    found = index >= 0
    table = torch.zeros(num_rows, vectors.shape[1])
    table[found] = vectors[index[found]].float()
    return table, found


def _parse_header(line: bytes, where: str) -> tuple[int, int]:
    fields = line.split()
    if len(fields) != 2 or not all(field.isdigit() and int(field) > 0 for field in fields):
        raise ValueError(f"{where}: first line must be two positive numbers, words and width, got {line[:80]!r}.")
    return int(fields[0]), int(fields[1])


def _check_room(path: Path, count: int, dim: int, least_bytes: int) -> None:
    """Refuse a header that promises more than the file can hold, before memory is asked for."""
    size = path.stat().st_size
    if least_bytes > size:
        raise ValueError(
            f"{path}: file must hold the {count} vectors of width {dim} that its first line promises, got {size} bytes."
        )


def _read_text(path: Path) -> tuple[list[str], np.ndarray]:
    with path.open("rb") as file:
        count, dim = _parse_header(file.readline(1_000).rstrip(), f"{path}:1")
        _check_room(path, count, dim, count * (2 * dim + 1))
        words, vectors = [], np.empty((count, dim), dtype=np.float32)
        number = 1
        for number, line in enumerate(file, start=2):
            where = f"{path}:{number}"
            if len(words) == count:
                raise ValueError(f"{where}: file must end after the {count} words of its first line, got more.")
            try:
                word, *fields = line.decode("utf-8").rstrip().split(" ")
                values = list(map(float, fields))
            except (UnicodeDecodeError, ValueError) as error:
                raise ValueError(f"{where}: line must be a word and {dim} numbers, got {error}.") from None
            if len(values) != dim:
                raise ValueError(f"{where}: line must be a word and {dim} numbers, got {len(values)} numbers.")
            vectors[len(words)] = values
            words.append(word)
    if len(words) < count:
        raise ValueError(
            f"{path}:{number}: file must hold the {count} words of its first line, got {len(words)} words."
        )
    return words, vectors


def _read_binary(path: Path) -> tuple[list[str], np.ndarray]:
    with path.open("rb") as file:
        count, dim = _parse_header(file.readline(1_000).rstrip(), f"{path}: byte 0")
        position = file.tell()
        _check_room(path, count, dim, position + count * (4 * dim + 2))
        words, vectors = [], np.empty((count, dim), dtype=np.float32)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for row in range(count):
                space = data.find(b" ", position, position + 4_096)
                if space < 0 or space + 1 + 4 * dim > len(data):
                    raise ValueError(
                        f"{path}: byte {position}: file must hold a word, a space and {dim} float32, for word {row} of"
                        f" {count}, got {'no space' if space < 0 else 'the end of the file'}."
                    )
                try:
                    words.append(data[position:space].lstrip(b"\n").decode("utf-8"))
                except UnicodeDecodeError as error:
                    raise ValueError(f"{path}: byte {position}: word {row} must be UTF-8, got {error}.") from None
                vectors[row] = np.frombuffer(data[space + 1 : space + 1 + 4 * dim], dtype="<f4")
                position = space + 1 + 4 * dim
            if data[position:].strip(b"\n"):
                raise ValueError(f"{path}: byte {position}: file must end after {count} words, got more.")
    return words, vectors


def _read_npz(path: Path) -> tuple[list[str], np.ndarray]:
    import zipfile
    import zlib

    if not zipfile.is_zipfile(path):  # NumPy would take it for a pickle, and advise to allow that
        raise ValueError(f"{path}: file must be an .npz with arrays words and vectors, got no zip archive.")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            words, vectors = arrays["words"], arrays["vectors"]
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile, zlib.error, TypeError) as error:
        if isinstance(error, TypeError) and not is_raised_in(error, "numpy"):
            raise
        raise ValueError(
            f"{path}: file must be an .npz with arrays words and vectors, no pickle, got {error}."
        ) from None
    if words.ndim != 1 or words.dtype.kind not in "US" or not len(words):
        raise ValueError(f"{path}: words must be strings [V], got {words.dtype} {list(words.shape)}.")
    if vectors.ndim != 2 or vectors.dtype.kind != "f" or len(vectors) != len(words) or not vectors.shape[1]:
        raise ValueError(f"{path}: vectors must be float [{len(words)}, D], got {vectors.dtype} {list(vectors.shape)}.")
    if words.dtype.kind == "S":
        try:
            words = np.char.decode(words, "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: words must be UTF-8, got {error}.") from None
    return words.tolist(), np.ascontiguousarray(vectors, dtype=np.float32)
