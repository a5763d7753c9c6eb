"""WordNet's first senses: what a word means where nothing is known but the word (Raganato et al. 2017, section 4.2)."""

from __future__ import annotations

import os
import pathlib
import tarfile
from collections.abc import Iterable

from ctx_jax.atlas.formats.files import decoded, opened, shown, without_compression, wrong
from ctx_jax.errors import InputError

INDEX = "index.sense"
PARTS = {"1": "1", "2": "2", "3": "3", "4": "4", "5": "3"}
"""ss_type of a sense key → its lemma's part of speech: an adjective satellite, 5, has its lemma among adjectives."""


def is_wordnet(name: str) -> bool:
    """Is it the name of a file that `first_senses` reads?"""
    name = without_compression(name).lower()
    return name == INDEX or (name.startswith(("wordnet", "wndb")) and name.endswith((".tar", ".tgz")))


def first_senses(path: str | os.PathLike) -> dict[str, str]:
    """The key of the first sense of each lemma and part of speech, `bank%1` → `bank%1:17:01::` (senseidx(5WN)).

    Args:
      path: `index.sense`, plain or compressed, or a tar archive that has it.

    Raises:
      InputError: a file that cannot be read, an archive without it, a line of another form.
    """
    path = pathlib.Path(path)
    with opened(path) as stream:
        if without_compression(path.name).lower() == INDEX:
            return _first(path, stream)
        try:
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                for member in archive:
                    if pathlib.PurePosixPath(member.name).name == INDEX and member.isfile():
                        return _first(f"{path}: {member.name}", archive.extractfile(member))
        except tarfile.TarError as error:
            raise InputError(f"{path}: {error}; expected a tar archive with {INDEX}") from error
    raise InputError(f"{path}: found no {INDEX}; expected one")


def _first(path: str | os.PathLike, stream: Iterable[bytes]) -> dict[str, str]:
    found: dict[str, str] = {}
    for number, line in decoded(path, stream):
        fields = line.split()
        lemma, _, sense = (fields or [""])[0].partition("%")
        if len(fields) != 4 or sense[:1] not in PARTS or not fields[2].isdecimal():
            raise wrong(path, number, shown(line), "key, offset, number of the sense and count")
        if fields[2] == "1":
            found[f"{lemma}%{PARTS[sense[0]]}"] = fields[0]
    return found
