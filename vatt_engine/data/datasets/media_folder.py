"""The files of a dataset on disk: found in one walk, and looked up by the names that annotations use."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path

from vatt_engine.data.datasets.entries import Entry
from vatt_engine.data.rows import ManifestError, is_unicode

VIDEO = ("mp4", "mkv", "webm", "avi", "mov", "m4v", "mpg", "mpeg", "flv", "3gp", "ogv", "ts", "wmv")
AUDIO = ("wav", "flac", "ogg", "opus", "m4a", "mp3", "aac")
IMAGES = ("jpeg", "jpg", "png")


class MediaFolder:
    """The media files under a folder, found in one walk that asks the disk about folders only.

    Args:
        root: the folder; links to folders are followed.
        suffixes: of the files to see, the best first, in lower case.
        watch: told how many files were found so far, now and then.
    """

    def __init__(self, root: str | Path, suffixes: tuple[str, ...], watch: Callable[[int], None] | None = None):
        self.root, self.suffixes, self._watch = Path(root), suffixes, watch
        if not self.root.is_dir():
            raise ManifestError(f"{root}: media must be a folder, got {'a file' if self.root.exists() else 'nothing'}.")

    def __iter__(self) -> Iterator[str]:
        """The paths of all files, below the root."""
        for found in self._paths.values():
            yield from (found,) if isinstance(found, str) else found

    @cached_property
    def _paths(self) -> dict[str, str | list[str]]:
        """Paths below the root by the file's name without its suffix; a list where several files have that name.

        Millions of files are common: a list for each of them would need more memory than the names.
        """
        paths: dict[str, str | list[str]] = {}
        for count, (stem, path) in enumerate(self._walk()):
            before = paths.setdefault(stem, path)
            if before is not path:
                paths[stem] = [*([before] if isinstance(before, str) else before), path]
            if self._watch and count % 10_000 == 0:
                self._watch(count)
        return paths

    def _walk(self) -> Iterator[tuple[str, str]]:
        """(name without suffix, path below the root) of each file."""
        for folder, entry in walk(self.root):
            if (stem := self.stem(entry.name)) != entry.name:
                yield stem, f"{folder}{entry.name}"

    def stem(self, name: str) -> str:
        """The last part of a path without its suffix, or two of them (`x.mp4.webm`)."""
        stem = name.rpartition("/")[2]
        for _ in range(2):
            head, _, suffix = stem.rpartition(".")
            stem = head if head and suffix.lower() in self.suffixes else stem
        return stem

    def find(self, entry: Entry, classes: frozenset[str]) -> str | None:
        """The file of an entry, below the root: that in the most of its folders, then of the best suffix.

        None lies in the folder of another class; `classes` are names as `plain` writes them.
        """
        wanted: set[str] | None = None
        for stem in entry.stems:
            found = self._paths.get(stem)
            if found is None:
                continue
            if wanted is None:
                wanted = {plain(folder) for folder in entry.folders}
            fits = []
            for path in (found,) if isinstance(found, str) else found:
                folders = [plain(folder) for folder in path.split("/")[:-1]]
                if wanted and folders and folders[-1] in classes and folders[-1] not in wanted:
                    continue
                suffix = self.suffixes.index(path.rpartition(".")[2].lower())
                fits.append((-len(wanted.intersection(folders)), suffix, path))
            if fits:
                return min(fits)[2]
        return None


def walk(root: Path) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """(folder below the root, with a slash behind it; file in it) at any depth; links to folders are followed once.

    Names that are no Unicode are passed over, since no manifest can hold them.
    """
    folders, seen = [""], set()
    while folders:
        folder = folders.pop()
        status = os.stat(root / folder)
        if (status.st_dev, status.st_ino) in seen:
            continue  # a link into its own parent
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(root / folder) as entries:
            for entry in entries:
                if not is_unicode(entry.name):
                    continue
                if entry.is_dir():
                    folders.append(f"{folder}{entry.name}/")
                else:
                    yield folder, entry


def plain(name: str) -> str:
    """A class name as folders spell it in many ways: `hurling (sport)`, `hurling_(sport)`."""
    return re.sub(r"[\W_]", "", name.lower())


def plain_names(names: Iterable[str] | None) -> frozenset[str]:
    return frozenset(map(plain, names or ()))
