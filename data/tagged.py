"""Tagged corpora: a token and its tag a line, an empty line after each sentence.

Resume: a character, a blank, its tag (B-, M-, E-, S- and a type, or O). Weibo: a character and the digit of its place
in the word, a tab, its tag (B-, I- and a type, or O). Texts are the tokens one after another.
"""

import logging
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Literal

from .cluener import check_length, check_type
from .files import write_lines
from .records import Span, SpanRecord, without_overlaps
from .rows import OnBadRow, RowError, read_blocks

log = logging.getLogger(__name__)

TagNames = Literal["BIO", "BMES"]
Tag = tuple[str, str]
"""(part, type); the part is the letter before the hyphen, and the type of "outside" is empty."""
OUTSIDE: Tag = ("O", "")
_PLACED = re.compile(r"(.[^0-9]*)[0-9]+", re.DOTALL)  # a broken emoji is more than one character


def read_tagged(
    path: str | Path,
    types: Collection[str] | None = None,
    *,
    names: TagNames = "BMES",
    word_places: bool = False,
    strict_tags: bool = False,
    with_spans: bool = True,
    max_characters: int | None = None,
    on_bad_row: OnBadRow = "raise",
    bad_rows_file: str | Path | None = None,
) -> Iterator[SpanRecord]:
    """Stream sentences with the spans that their tags say; the id of a sentence is its number.

    Args:
        path: the file, plain or gzip.
        types: allowed types; None allows all.
        names: which tags there are, "BIO" or "BMES".
        word_places: a token is a character with its place in the word after it, as Weibo has it.
        strict_tags: a tag that cannot stand after the one before it makes a bad row. Otherwise it is counted in the
            log, and read as scorers do, see `spans_of`.
        with_spans: False leaves the tags aside; lines may then hold a token alone.
        max_characters: a longer sentence is a bad row; None sets no limit.
        on_bad_row: "raise" or "skip", see `read_blocks`.
        bad_rows_file: where skipped rows are listed.

    Raises:
        InputError: see `read_blocks`; the line is that of the token.
    """
    odd: list[str] = []

    def parse(number: int, lines: list[str]) -> SpanRecord:
        tokens: list[str] = []
        tags: list[Tag] = []
        for offset, line in enumerate(lines):
            try:
                token, tag = _token_and_tag(line, word_places, with_spans)
                tokens.append(token)
                tags.append(_tag(tag, names, types) if with_spans else OUTSIDE)
            except RowError as error:
                raise RowError(str(error), offset) from error
        for offset, (before, tag) in enumerate(zip([OUTSIDE, *tags], [*tags, OUTSIDE], strict=True)):
            if not may_follow(before, tag, names):
                what = f"tag {'-'.join(tag).rstrip('-')!r} cannot stand after {'-'.join(before).rstrip('-')!r}"
                if strict_tags:
                    raise RowError(f"{what}; correct it, or use strict_tags=false", min(offset, len(tags) - 1))
                odd.append(what)
        text = "".join(tokens)
        check_length(text, max_characters)
        starts = [0]
        for token in tokens:
            starts.append(starts[-1] + len(token))
        borders = [(kind, starts[first], starts[last]) for kind, first, last in spans_of(tags)]
        return SpanRecord(number, text, tuple(Span(kind, text[start:end], start) for kind, start, end in borders))

    yield from read_blocks(path, parse, on_bad_row=on_bad_row, bad_rows_file=bad_rows_file)
    if odd:
        log.warning("%s: %d tags contradict the one before them; the first: %s", path, len(odd), odd[0])


def write_tagged(
    records: Iterable[SpanRecord], path: str | Path, *, names: TagNames = "BMES", separator: str = " "
) -> int:
    """Write a character and its tag a line; of spans that overlap, those that tags can say, see `without_overlaps`.

    Returns:
        The number of sentences written.

    Raises:
        InputError: the file cannot be written; nothing is left half done.
    """
    return write_lines((_block(record, names, separator) for record in records), path)


def spans_of(tags: Iterable[Tag]) -> list[tuple[str, int, int]]:
    """Spans (type, first token, exclusive end) of a sentence.

    Tags that contradict each other are read as scorers do: a span goes on as long as its type does, unless a tag says
    that one begins here or ended before.
    """
    found: list[tuple[str, int, int]] = []
    before = OUTSIDE
    for place, tag in enumerate(tags):
        if tag != OUTSIDE:
            if tag[0] in ("B", "S") or before[0] in ("E", "S") or tag[1] != before[1]:
                found.append((tag[1], place, place))
            found[-1] = (*found[-1][:2], place + 1)
        before = tag
    return found


def may_follow(before: Tag, tag: Tag, names: TagNames) -> bool:
    """Whether a tag can stand after another one; `OUTSIDE` stands for the border of the sentence."""
    inside = tag[0] in ("I", "M", "E")
    if inside:
        return before[0] in ("B", "I", "M") and before[1] == tag[1]
    return names == "BIO" or before[0] not in ("B", "M")


def _block(record: SpanRecord, names: TagNames, separator: str) -> str:
    first, inner, last, single = "BIIB" if names == "BIO" else "BMES"
    tags = [OUTSIDE[0]] * len(record.text)
    for span in without_overlaps(record.spans):
        length = span.end - span.start
        parts = single if length == 1 else first + inner * (length - 2) + last
        tags[span.start : span.end] = [f"{part}-{span.type}" for part in parts]
    lines = [f"{character}{separator}{tag}\n" for character, tag in zip(record.text, tags, strict=True)]
    return "".join(lines)


def _tag(text: str, names: TagNames, types: Collection[str] | None) -> Tag:
    if text == OUTSIDE[0]:
        return OUTSIDE
    part, _, kind = text.partition("-")
    if part not in tuple(names.replace("O", "")) or not kind:
        raise RowError(f"tag {text!r}; give O, or one of {', '.join(names.replace('O', ''))} with a hyphen and a type")
    check_type(kind, types)
    return part, kind


def _token_and_tag(line: str, word_places: bool, with_spans: bool) -> tuple[str, str]:
    token, found, tag = line.rpartition("\t" if "\t" in line else " ")
    if not found or not token:
        if with_spans:
            raise RowError(f"{line!r:.60} is not a token and its tag; write both, with a blank or a tab between them")
        token = line
    if word_places:
        placed = _PLACED.fullmatch(token)
        if placed is None:
            raise RowError(f"token {token!r:.60} is not a character and its place in the word, such as 口0")
        token = placed[1]
    return token, tag
