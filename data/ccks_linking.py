"""CCKS 2019 entity linking: its knowledge base, its annotated rows and its answers, which have the form of the rows.

One JSON object a line. Knowledge base: `subject_id`, `subject`, `alias` and `type` (lists of strings), `data` of
{`predicate`, `object`}. Rows: `text_id`, `text`, `mention_data` of {`kb_id` or "NIL", `mention`, `offset`}, where
offsets are 0-based characters written as strings.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from .dictionary import MAX_NAME_LENGTH
from .files import write_rows
from .records import NIL, Entity, Link, LinkRecord
from .rows import OnBadRow, RowError, object_of, read_rows, value_of

TypeOf = Callable[[str], str | None]
"""From the id of an entity to its first type; raises `KeyError` for an id that the knowledge base does not have."""


def read_knowledge(
    path: str | Path, *, on_bad_row: OnBadRow = "raise", bad_rows_file: str | Path | None = None
) -> Iterator[Entity]:
    """Stream the entries of a knowledge base.

    Raises:
        InputError: see `read_rows`.
    """
    return read_rows(
        path, _entity, identity=lambda entity: entity.id, on_bad_row=on_bad_row, bad_rows_file=bad_rows_file
    )


def read_links(
    path: str | Path,
    type_of: TypeOf | None = None,
    *,
    with_links: bool = True,
    max_characters: int | None = None,
    on_bad_row: OnBadRow = "raise",
    bad_rows_file: str | Path | None = None,
) -> Iterator[LinkRecord]:
    """Stream annotated texts, each checked against its own text and the knowledge base.

    Args:
        path: file in the format of CCKS 2019, plain or gzip.
        type_of: knows the ids that exist; None allows all.
        with_links: False reads `text_id` and `text` only, for texts whose mentions are to be found.
        max_characters: a longer text is a bad row; None sets no limit.
        on_bad_row: "raise" or "skip", see `read_rows`.
        bad_rows_file: where skipped rows are listed.

    Raises:
        InputError: see `read_rows`; the line names the row and what is wrong in it.
    """

    def parse(row: dict[str, Any]) -> LinkRecord:
        row_id, text = value_of(row, "text_id", str), value_of(row, "text", str)
        if max_characters is not None and len(text) > max_characters:
            raise RowError(f"text of {len(text)} characters, at most {max_characters} are trained on; raise max_length")
        entries = value_of(row, "mention_data", list) if with_links else []
        links = tuple(_link(object_of(entry, "mention_data"), text, type_of) for entry in entries)
        places: set[tuple[int, int]] = set()
        for link in links:
            if (link.start, link.end) in places:
                raise RowError(f"mention {link.text!r} at {link.start} is there twice; give each its one kb_id")
            places.add((link.start, link.end))
        return LinkRecord(row_id, text, links)

    return read_rows(path, parse, identity=lambda record: record.id, on_bad_row=on_bad_row, bad_rows_file=bad_rows_file)


def write_answers(records: Iterable[LinkRecord], path: str | Path) -> int:
    """Write linked mentions as CCKS 2019 takes them.

    Returns:
        The number of rows written.

    Raises:
        InputError: the file cannot be written; nothing is left half done.
    """
    return write_rows(map(link_row, records), path)


def link_row(record: LinkRecord) -> dict[str, Any]:
    """One row, of an answer or annotated, as `read_links` reads it."""
    links = [{"kb_id": link.entity, "mention": link.text, "offset": str(link.start)} for link in record.links]
    return {"text_id": record.id, "text": record.text, "mention_data": links}


def entity_row(entity: Entity) -> dict[str, Any]:
    """One row of a knowledge base, as `read_knowledge` reads it."""
    return {
        "alias": list(entity.aliases),
        "subject_id": entity.id,
        "subject": entity.name,
        "type": list(entity.types),
        "data": [{"predicate": predicate, "object": value} for predicate, value in entity.facts],
    }


def _entity(row: dict[str, Any]) -> Entity:
    facts = [object_of(entry, "data") for entry in value_of(row, "data", list)]
    names = _strings(row, "alias")
    name = value_of(row, "subject", str)
    for each in (name, *names):
        if len(each) > MAX_NAME_LENGTH:
            raise RowError(f"a name of {len(each)} characters ({each[:30]!r}); use at most {MAX_NAME_LENGTH}")
    return Entity(
        value_of(row, "subject_id", str),
        name,
        tuple(names),
        tuple(_strings(row, "type")),
        tuple((value_of(fact, "predicate", str), _text(fact, "object")) for fact in facts),
    )


def _strings(row: dict[str, Any], key: str) -> list[str]:
    values = value_of(row, key, list)
    return [value_of({key: value}, key, str) for value in values if value != ""]


def _text(row: dict[str, Any], key: str) -> str:
    return "" if row.get(key) == "" else value_of(row, key, str)


def _link(row: dict[str, Any], text: str, type_of: TypeOf | None) -> Link:
    mention, offset = value_of(row, "mention", str), value_of(row, "offset", str)
    if not (offset.isascii() and offset.isdecimal()):
        raise RowError(f"'offset' is {offset!r:.60}; give the 0-based place of the mention as a string of digits")
    start = int(offset[:20])
    if text[start : start + len(mention)] != mention:
        found = text[start : start + len(mention)]
        places = [str(i) for i in range(len(text)) if text.startswith(mention, i)][:5]
        advice = f"it occurs at {', '.join(places)}" if places else "it does not occur in the text; correct the row"
        raise RowError(f"mention {mention!r} is said to start at {start}, where the text has {found!r}; {advice}")
    entity = value_of(row, "kb_id", str)
    if entity == NIL or type_of is None:
        return Link(mention, start, entity)
    try:
        return Link(mention, start, entity, type_of(entity))
    except KeyError as error:
        raise RowError(
            f"kb_id {entity!r} of {mention!r} is not in the knowledge base; correct it, or write {NIL}"
        ) from error
