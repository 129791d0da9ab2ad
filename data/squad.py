"""Reading comprehension in SQuAD's form: CMRC 2018, DuReader-robust, DuReader-checklist.

One document a file: `data` is a list of {`paragraphs`: list of {`context`, `qas`: list of {`id`, `question`, `answers`:
list of {`text`, `answer_start`}}}}. DuReader-checklist adds `is_impossible` and then gives an empty answer. Positions
are 0-based character offsets. DuReader-robust gives -1 for all of them, and some of CMRC 2018's are off.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .documents import Item, read_items
from .files import write_lines
from .records import Answer, ReadingRecord
from .rows import OnBadRow, RowError, object_of, value_of


def read_squad(
    path: str | Path,
    *,
    with_answers: bool = True,
    on_bad_row: OnBadRow = "raise",
    bad_rows_file: str | Path | None = None,
) -> Iterator[ReadingRecord]:
    """Read questions, each with its one passage.

    An answer stands where the file says; where the text is another there, at the nearest place that has it; and where
    the file gives -1, at each of its places.

    Args:
        path: the file, plain or gzip.
        with_answers: False leaves answers aside, for questions that are to be answered.
        on_bad_row: "raise" or "skip", see `read_items`.
        bad_rows_file: where skipped questions are listed.

    Raises:
        InputError: see `read_items`; the line names the question and what is wrong in it.
    """

    def parse(row: Any) -> ReadingRecord:
        row = object_of(row, "qas")
        name = value_of(row, "id", str)
        # Nothing is learnt from an empty question, but whoever asks one gets an answer.
        question = value_of(row, "question", str) if with_answers else string_of(row, "question")
        context = string_of(row, "context")
        return ReadingRecord(name, question, (context,), _answers(row, context) if with_answers else ())

    options: dict[str, Any] = {"on_bad_row": on_bad_row, "bad_rows_file": bad_rows_file}
    return read_items(path, _questions, parse, identity=lambda record: record.id, **options)


def write_answers(records: Iterable[ReadingRecord], path: str | Path, no_answer: str = "") -> int:
    """Write the answer format of these sets, one object of {id: answer}.

    Args:
        records: predicted.
        path: the file.
        no_answer: what stands for "the passage does not tell".

    Returns:
        The number of answers written.

    Raises:
        InputError: the file cannot be written; nothing is left half done.
    """
    answers = {record.id: answer_text(record, no_answer) for record in records}
    write_lines([json.dumps(answers, ensure_ascii=False, indent=0)], path)
    return len(answers)


def answer_text(record: ReadingRecord, no_answer: str = "") -> str:
    """The first answer of a record."""
    return record.answers[0].text if record.answers else no_answer


def places_of(text: str, context: str) -> list[int]:
    """All places where a text stands."""
    places, start = [], context.find(text)
    while start >= 0:
        places.append(start)
        start = context.find(text, start + 1)
    return places


def string_of(row: dict[str, Any], key: str) -> str:
    """A string that may be empty."""
    return "" if row.get(key) == "" else value_of(row, key, str)


def _questions(document: Any) -> Iterator[Item]:
    """Every question with its context beside it."""
    articles = value_of(object_of(document, "the file"), "data", list)
    paragraphs = [
        paragraph for article in articles for paragraph in value_of(object_of(article, "data"), "paragraphs", list)
    ]
    for number, paragraph in enumerate(paragraphs):
        try:
            rows = value_of(object_of(paragraph, "paragraphs"), "qas", list)
        except RowError as error:
            yield f"paragraph {number}", error
            continue
        context = {key: value for key, value in paragraph.items() if key == "context"}
        for place, row in enumerate(rows):
            known = isinstance(row, dict) and isinstance(row.get("id"), str)
            name = f"question {row['id']!r}" if known else f"question {place} of paragraph {number}"
            yield name, {**context, **row} if isinstance(row, dict) else row


def _answers(row: dict[str, Any], context: str) -> tuple[Answer, ...]:
    if row.get("is_impossible", False) not in (True, False):
        raise RowError(f"'is_impossible' is {row['is_impossible']!r:.60}; give true or false")
    if row.get("is_impossible"):
        return ()
    rows = [object_of(entry, "answers") for entry in value_of(row, "answers", list)]
    if not rows:
        raise RowError("'answers' is empty; give an answer, or is_impossible: true")
    found = [Answer(text, start) for entry in rows for text, start in _places(entry, context)]
    return tuple(dict.fromkeys(found))


def _places(row: dict[str, Any], context: str) -> list[tuple[str, int]]:
    text, start = value_of(row, "text", str), value_of(row, "answer_start", int)
    places = places_of(text, context)
    if not places:
        raise RowError(f"answer {text!r:.60} does not occur in the context; correct the row")
    if start < -1 or start >= len(context):
        raise RowError(
            f"answer {text!r:.60} is said to start at {start}, outside the context; it occurs at {places[0]}"
        )
    if start != -1:
        places = [min(places, key=lambda place: abs(place - start))]
    return [(text, place) for place in places]
