"""Makes devils_dictionary.txt, the text of the main example, from the Debian package dict-devil.

Ambrose Bierce, The Devil's Dictionary (1911): public domain, from the Internet Wiretap edition.

    apt-get download dict-devil
    dpkg-deb --extract dict-devil_1.0-13.1_all.deb dict-devil
    python make_devils_dictionary.py dict-devil/usr/share/dictd > devils_dictionary.txt

One article of Bierce's to a line, in the book's order, which is alphabetical by letter, with a
blank line between: articles are cut at the offsets of the package's own index. Only the prose is
kept: verse and its signatures are laid out by spaces, on which a language model would spend much of
its effort. Left out of the 999 articles: 19 that are a headword and verse alone, and those with
a racial slur, which a model should not be taught to repeat.
"""

import gzip
import re
import string
import sys
from collections.abc import Iterator
from pathlib import Path

SLUR = re.compile(r"\bnigger|\bnegro", re.IGNORECASE)
DIGITS = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"


def number(text: str) -> int:
    """Reads dictd's base-64 number, most significant digit first."""
    value = 0
    for digit in text:
        value = 64 * value + DIGITS.index(digit)
    return value


def articles(folder: Path) -> Iterator[str]:
    """Yields the articles in the book's order; two headwords of one article yield it once."""
    book = gzip.decompress((folder / "devil.dict.dz").read_bytes()).decode("ascii")
    places = set()
    for row in (folder / "devil.index").read_text("ascii").splitlines():
        headword, start, length = row.split("\t")
        if not headword.startswith("00database"):
            places.add((number(start), number(length)))
    for start, length in sorted(places):
        yield book[start : start + length]


def prose(article: str) -> str:
    """Joins the prose lines: those not indented, and an indented one that opens a paragraph.

    Words broken at a hyphen come together, and the braces of dictd's cross-references go.
    """
    lines = article.splitlines()
    kept = []
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        opens_paragraph = following.strip() and not following.startswith(" ")
        if not line.startswith(" ") or opens_paragraph:
            kept.append(line)
    text = " ".join(" ".join(kept).split())
    return re.sub(r"(?<=\w-) (?=\w)", "", re.sub(r"[{}]", "", text))


def has_definition(entry: str) -> bool:
    """Says whether more is left than a headword with its parts of speech ("HEAT, n.")."""
    return re.fullmatch(r"[A-Z' -]+(, [a-z.]+)*\.?", entry) is None


def main() -> None:
    """Writes the text to standard output."""
    entries = [prose(article) for article in articles(Path(sys.argv[1]))]
    kept = [entry for entry in entries if has_definition(entry) and not SLUR.search(entry)]
    print("\n\n".join(kept))


if __name__ == "__main__":
    main()
