import json
import random
import string

import numpy as np
import pytest
import torch

from vatt_engine.data.words import Vocabulary, load_word_vectors, match_vectors

WORDS = ["<pad>", "<unk>", "a", "red", "circle", "dont", "pad"]


@pytest.fixture
def vocabulary():
    return Vocabulary(WORDS)


def definition(text, words):
    """DMVR's tokeniser in words: drop punctuation, lower-case, split, look up."""
    ids = {word: index for index, word in enumerate(words)}
    kept = "".join(c for c in text if c not in string.punctuation)
    return [ids.get(word, ids["<unk>"]) for word in kept.lower().split()]


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("A red, RED circle!", [2, 3, 3, 4]),
        ("don't", [5]),
        ("don\N{RIGHT SINGLE QUOTATION MARK}t", [5]),
        ("a\t red\n\ncircle ", [2, 3, 4]),
        ("blue circle", [1, 4]),
        ("<pad> a <unk>", [6, 2, 1]),  # markers in a caption are words, never ids 0 or special
        ("re-d", [3]),
        (string.punctuation, []),
        ("", []),
    ],
)
def test_encodes(vocabulary, text, ids):
    assert vocabulary.encode(text) == ids


def test_agrees_with_the_definition_on_random_ascii():
    rng = random.Random(0)
    words = ["<pad>", "<unk>", *string.ascii_lowercase, "ab", "xy"]
    vocabulary = Vocabulary(words)
    for _ in range(300):
        text = "".join(rng.choices(string.ascii_letters + string.punctuation + "   \t\n", k=rng.randrange(40)))
        assert vocabulary.encode(text) == definition(text, words), text


def test_batch_is_cropped_and_padded_with_zero(vocabulary):
    ids = vocabulary.encode_batch(["a red circle", "", "red " * 40], max_words=4)
    assert ids.dtype == torch.int64
    assert ids.tolist() == [[2, 3, 4, 0], [0, 0, 0, 0], [3, 3, 3, 3]]
    assert vocabulary.encode_batch([], max_words=16).shape == (0, 16)
    assert vocabulary.encode_batch(["a"]).shape == (1, 16)


@pytest.mark.parametrize("bad", [None, 3, "broken \ud800 text"])
def test_bad_text_is_named(vocabulary, bad):
    with pytest.raises(ValueError, match="text 1 must be a string of valid Unicode"):
        vocabulary.encode_batch(["fine", bad])


def test_bad_arguments(vocabulary):
    with pytest.raises(ValueError, match="texts must be a list of strings, got the string 'a red'"):
        vocabulary.encode_batch("a red")
    with pytest.raises(ValueError, match="max_words must be at least 1, got 0"):
        vocabulary.encode_batch(["a"], max_words=0)
    with pytest.raises(ValueError, match="id 0 must be <pad>, got <unk>"):
        Vocabulary(["<unk>", "<pad>"])
    with pytest.raises(ValueError, match="id 0 must be <pad>, got no words"):
        Vocabulary([])
    with pytest.raises(ValueError, match="must contain <unk>"):
        Vocabulary(["<pad>", "a"])
    with pytest.raises(ValueError, match="got 'a' twice"):
        Vocabulary(["<pad>", "<unk>", "a", "b", "a"])


def test_training_orders_by_count_then_alphabet_whatever_the_order_of_captions():
    captions = ["The dog, the cat", "a CAT!", "zebra apple", "the end"]
    expected = ["<pad>", "<unk>", "the", "cat", "a", "apple", "dog", "end", "zebra"]
    for seed in range(5):
        random.Random(seed).shuffle(captions)
        assert Vocabulary.train(iter(captions)).words == expected
    assert Vocabulary.train(captions, size=5).words == expected[:5]


def test_training_rejects_what_gives_no_words():
    with pytest.raises(ValueError, match=r"size must be at least 3 .* got 2"):
        Vocabulary.train(["a"], size=2)
    with pytest.raises(ValueError, match="captions must hold a word, got none"):
        Vocabulary.train(["...", ""])


def test_saved_vocabulary_loads_the_same(tmp_path):
    vocabulary = Vocabulary.train(["a red circle, don't!", "été \N{SNOWMAN} circle"])
    path = tmp_path / "tokenizer.json"
    vocabulary.save(path)
    loaded = Vocabulary.load(path)
    assert loaded.words == vocabulary.words
    assert loaded.encode("Circle ÉTÉ \N{SNOWMAN} nothing") == vocabulary.encode("circle été \N{SNOWMAN} nothing")
    again = tmp_path / "again.json"
    loaded.save(again)
    assert again.read_bytes() == path.read_bytes()


def test_text_file_gives_line_index_as_id(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("<pad>\n<bos>\n<eos>\n<unk>\nred\ncircle\n")
    vocabulary = Vocabulary.load(path)
    assert vocabulary.encode("red blue circle") == [4, 3, 5]
    assert (vocabulary.size, vocabulary.pad_id, vocabulary.unk_id) == (6, 0, 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<pad>\n<bos>\n<eos>\n<unk>\nred\nred\n", r"words.txt:6: word must be new, got 'red', also on line 5"),
        ("<pad>\n<bos>\n\n<eos>\n<unk>\n", r"words.txt:3: line must hold one word, got ''"),
        ("<pad>\n<bos>\n<eos>\n<unk>\nred circle\n", r"words.txt:5: line must hold one word, got 'red circle'"),
        ("<pad>\n<bos>\n<unk>\n", r"words.txt: vocabulary must contain <eos>"),
        ("red\n<pad>\n<bos>\n<eos>\n<unk>\n", r"words.txt:2: <pad> must be on line 1"),
        ("", r"words.txt:1: line must hold one word"),
    ],
)
def test_bad_text_files_are_refused_with_the_line(tmp_path, content, message):
    path = tmp_path / "words.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        Vocabulary.load(path)


def test_bad_tokenizer_files_are_refused(tmp_path, vocabulary):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(ValueError, match="must be a readable UTF-8 file"):
        Vocabulary.load(path)
    vocabulary.save(path)
    good = json.loads(path.read_text())

    def refused(change, message):
        content = json.loads(json.dumps(good))
        change(content)
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            Vocabulary.load(path)

    refused(lambda c: c["model"]["vocab"].pop("red"), "ids must be 0..5, each once")
    refused(lambda c: c["model"]["vocab"].update(red=4), "ids must be 0..5, each once")
    refused(lambda c: c["model"]["vocab"].update({"<pad>": 1, "<unk>": 0}), "id 0 must be <pad>, got <unk>")
    refused(lambda c: c.update(normalizer=None), "normalizer must be the one that Vocabulary.save writes, got null")
    refused(lambda c: c["model"].update(type="BPE"), "must be a tokenizer.json|must be of type WordLevel")
    refused(lambda c: c.pop("model"), "must be a tokenizer.json")
    path.write_text(json.dumps(good)[:-40])
    with pytest.raises(ValueError, match=r"tokenizer.json: vocabulary must be a tokenizer.json, got .* line 1 column"):
        Vocabulary.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="must be a readable UTF-8 file"):
        Vocabulary.load(path)


def test_encodes_many_captions_at_once():
    rng = random.Random(0)
    words = [f"w{i}" for i in range(10_000)]
    vocabulary = Vocabulary(["<pad>", "<unk>", *words])
    captions = [" ".join(rng.choices(words, k=10)) for _ in range(10_000)]
    ids = vocabulary.encode_batch(captions)
    assert ids.shape == (10_000, 16)
    assert ids[-1].tolist() == [words.index(word) + 2 for word in captions[-1].split()] + [0] * 6


NAMES = ["red", "été", "</s>"]
VECTORS = np.array([[1.5, -2.0], [0.25, 3e-5], [0.0, 7.0]], dtype=np.float32)


def write_text(path, names=NAMES, vectors=VECTORS):
    rows = [f"{name} {' '.join(str(x) for x in row)}\n" for name, row in zip(names, vectors.tolist())]
    path.write_text(f"{len(vectors)} {vectors.shape[1]}\n" + "".join(rows), encoding="utf-8")


def write_binary(path, names=NAMES, vectors=VECTORS, end=b"\n"):
    rows = [name.encode() + b" " + row.astype("<f4").tobytes() + end for name, row in zip(names, vectors)]
    path.write_bytes(f"{len(vectors)} {vectors.shape[1]}\n".encode() + b"".join(rows))


def test_all_formats_read_the_same(tmp_path):
    write_text(tmp_path / "v.txt")
    write_binary(tmp_path / "v.bin")
    write_binary(tmp_path / "no_newlines.bin", end=b"")
    np.savez(tmp_path / "v.npz", words=np.array(NAMES), vectors=VECTORS.astype(np.float64))
    np.savez(tmp_path / "bytes.npz", words=np.array([n.encode() for n in NAMES]), vectors=VECTORS)
    for name in ("v.txt", "v.bin", "no_newlines.bin", "v.npz", "bytes.npz"):
        words, vectors = load_word_vectors(tmp_path / name)
        assert words == NAMES, name
        assert vectors.dtype == torch.float32
        assert torch.equal(vectors, torch.from_numpy(VECTORS)), name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"v.txt:1: first line must be two positive numbers, words and width, got b''"),
        (b"red 1.0 2.0\n", r"v.txt:1: first line must be two positive numbers"),
        (b"0 2\n", r"v.txt:1: first line must be two positive numbers"),
        (b"2 2\nred 1.0 2.0\nblue 1.0\n", r"v.txt:3: line must be a word and 2 numbers, got 1 numbers"),
        (b"2 2\nred 1.0 x2.0\nblue 1.0 3\n", r"v.txt:2: line must be a word and 2 numbers, got .*'x2.0'"),
        (b"1 2\nred 1.0 2.0\nblue 1.0 3\n", r"v.txt:3: file must end after the 1 words"),
        (b"3 2\nred 1.0 2.0\nblue 1.0 3\n", r"v.txt:3: file must hold the 3 words of its first line, got 2 words"),
        (b"2 2\nred 1.0 2.0\n\xff\xff 1.0 3\n", r"v.txt:3: line must be a word and 2 numbers, got .*utf-8"),
        (b"2 2\nred 1.0 2.0\nblue 1.0 nan\n", r"v.txt:3: vector of 'blue' must be finite"),
        (b"2 2\nred 1.0 2.0\nblue 1.0 1e60\n", r"v.txt:3: vector of 'blue' must be finite"),
        (b"2 2\n\nblue 1.0 3\n      \n", r"v.txt:2: line must be a word and 2 numbers"),
        (b"999999999999 300\nred 1.0 2.0\n", r"v.txt: file must hold the 999999999999 vectors of width 300 .* got 29"),
    ],
)
def test_malformed_text_vectors_name_the_line(tmp_path, content, message):
    path = tmp_path / "v.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_word_vectors(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"v.bin: byte 0: first line must be two positive numbers"),
        (b"9999999 300\nred ", r"v.bin: file must hold the 9999999 vectors of width 300"),
        (b"2 1\nred " + b"\0" * 4 + b"verylong" + b"\0" * 4, r"v.bin: byte 12: .* word 1 of 2, got no space"),
        (b"2 1\nred " + b"\0" * 4 + b"verylong \0\0", r"v.bin: byte 12: .* got the end of the file"),
        (b"1 1\nred " + b"\0" * 4 + b"more", r"v.bin: byte 12: file must end after 1 words"),
        (b"1 1\n\xff\xff " + b"\0" * 4, r"v.bin: byte 4: word 0 must be UTF-8"),
        (b"1 1\nred \0\0\xc0\x7f", r"v.bin: word 0: vector of 'red' must be finite"),
    ],
)
def test_malformed_binary_vectors_name_the_byte(tmp_path, content, message):
    path = tmp_path / "v.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_word_vectors(path)


def test_malformed_npz_is_refused(tmp_path):
    path = tmp_path / "v.npz"

    def refused(message, **arrays):
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match=message):
            load_word_vectors(path)

    refused("arrays words and vectors, no pickle", words=np.array(NAMES, dtype=object), vectors=VECTORS)
    refused("arrays words and vectors, no pickle", words=np.array(NAMES))
    refused(r"vectors must be float \[3, D\], got float32 \[2, 2\]", words=np.array(NAMES), vectors=VECTORS[:2])
    refused(
        r"vectors must be float \[3, D\], got int64", words=np.array(NAMES), vectors=np.ones((3, 2), dtype=np.int64)
    )
    refused(r"words must be strings \[V\], got float32", words=VECTORS[:, 0], vectors=VECTORS)
    refused("words must be UTF-8", words=np.array([b"\xff", b"a", b"b"]), vectors=VECTORS)
    np.savez(path, words=np.array(NAMES), vectors=VECTORS)
    whole = path.read_bytes()
    for content in (b"", b"not a zip", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="arrays words and vectors, got no zip archive"):
            load_word_vectors(path)
    with pytest.raises(ValueError, match=r"missing.npz: word vectors must be an existing file"):
        load_word_vectors(tmp_path / "missing.npz")


def test_match_vectors(vocabulary):
    names = ["circle", "blue", "red", "circle", "Red"]
    vectors = torch.arange(10.0).view(5, 2) + 1
    table, found = match_vectors(vocabulary, names, vectors, len(WORDS) + 2)
    assert [word for word, hit in zip(WORDS, found) if hit] == ["red", "circle"]
    assert table[WORDS.index("red")].tolist() == [5, 6]
    assert table[WORDS.index("circle")].tolist() == [1, 2]  # the first of two
    assert table[~found].abs().sum() == 0
    assert table.shape == (len(WORDS) + 2, 2)
    assert not found[len(WORDS) :].any()
