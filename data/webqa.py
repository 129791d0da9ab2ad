"""WebQA 1.0 in its merged form, and the answer format of SogouQA.

One object a file: {question id: {`question`, `evidences`: {evidence id: {`answer`: list of strings, `evidence`}}}}. Not
every answer stands in its evidence, and `no_answer` says that the evidence does not tell.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .documents import Item, Repetitive, read_items
from .files import write_lines
from .records import Answer, ReadingRecord
from .rows import OnBadRow, RowError, object_of, value_of
from .squad import answer_text, places_of, string_of

NO_ANSWER = "no_answer"


def read_webqa(
    path: str | Path,
    *,
    with_answers: bool = True,
    on_bad_row: OnBadRow = "raise",
    bad_rows_file: str | Path | None = None,
) -> Iterator[ReadingRecord]:
    """Read questions, each with all its evidences.

    An answer of one evidence is an answer of the question; it is listed at each of its places in all evidences, and
    without a place where no evidence has it.

    Args:
        path: the file, plain or gzip.
        with_answers: False leaves answers aside, for questions that are to be answered.
        on_bad_row: "raise" or "skip", see `read_items`.
        bad_rows_file: where skipped questions are listed.

    Raises:
        InputError: see `read_items`; the line names the question and what is wrong in it.
    """

    def parse(row: Any) -> ReadingRecord:
        name, row = row
        row = object_of(row, "the file")
        if isinstance(row.get("evidences"), Repetitive):
            raise RowError(f"'evidences' has {row['evidences'].repeated[0]!r} twice; give every evidence its own id")
        evidences = value_of(row, "evidences", dict)
        if not evidences:
            raise RowError("'evidences' is empty; give at least one passage")
        rows = [object_of(evidence, "evidences") for evidence in evidences.values()]
        passages = tuple(string_of(evidence, "evidence") for evidence in rows)
        answers = _answers(rows, passages) if with_answers else ()
        question = value_of(row, "question", str) if with_answers else string_of(row, "question")
        return ReadingRecord(name, question, passages, answers)

    options: dict[str, Any] = {"on_bad_row": on_bad_row, "bad_rows_file": bad_rows_file}
    return read_items(path, _questions, parse, identity=lambda record: record.id, **options)


def write_answer_lines(records: Iterable[ReadingRecord], path: str | Path, no_answer: str = "") -> int:
    """Write SogouQA's answer format, a line of id, tab and answer for each question; return their number.

    Raises:
        InputError: the file cannot be written; nothing is left half done.
    """
    return write_lines((f"{record.id}\t{' '.join(answer_text(record, no_answer).split())}" for record in records), path)


def _questions(document: Any) -> Iterator[Item]:
    document = object_of(document, "the file")
    for name, row in document.items():
        yield f"question {name!r}", (name, row)
    for name in document.repeated if isinstance(document, Repetitive) else ():
        yield f"question {name!r}", RowError(f"the id {name!r} is there twice; give every question its own")


def _answers(rows: list[dict[str, Any]], passages: tuple[str, ...]) -> tuple[Answer, ...]:
    texts: dict[str, None] = {}
    for row in rows:
        for text in value_of(row, "answer", list):
            if not isinstance(text, str) or not text:
                raise RowError(f"an entry of 'answer' is {text!r:.60}; give a string that is not empty")
            if text != NO_ANSWER:
                texts[text] = None
    answers: list[Answer] = []
    for text in texts:
        found = [
            Answer(text, start, number) for number, passage in enumerate(passages) for start in places_of(text, passage)
        ]
        answers += found or [Answer(text, None)]
    return tuple(answers)
