"""The spans of the training rows as a dictionary: a baseline by itself, and a feature for models not pretrained."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ..errors import InputError
from .files import read_text
from .records import Span, SpanRecord

DICTIONARY_FILE = "dictionary.json"
PARTS = "BIES"


def units_of(text: str, separator: str = "") -> list[tuple[int, int]]:
    """Start and exclusive end of the words between separators; of every character where there is no separator."""
    if not separator:
        return [(place, place + 1) for place in range(len(text))]
    units, start = [], 0
    for word in text.split(separator):
        units.append((start, start + len(word)))
        start += len(word) + len(separator)
    return units


class SpanDictionary:
    """Finds again what was a span in training: from left to right the longest known, with its most frequent type.

    Args:
        counts: text of a span -> type -> how often it was one.
        separator: what stands between the words of a text, of which spans are made; "": spans are made of characters.
    """

    def __init__(self, counts: Mapping[str, Mapping[str, int]], separator: str = "") -> None:
        self.counts = {text: Counter(types) for text, types in counts.items()}
        self.separator = separator
        self._longest = max((len(units_of(text, separator)) for text in counts), default=0)
        self._own: dict[str, Counter[tuple[str, str]]] = {}

    @classmethod
    def fit(cls, records: Iterable[SpanRecord], separator: str = "") -> "SpanDictionary":
        """Collect the spans of annotated records, and remember which text brought which: see `tags`."""
        counts: dict[str, Counter[str]] = {}
        own: dict[str, Counter[tuple[str, str]]] = {}
        for record in records:
            for span in record.spans:
                counts.setdefault(span.text, Counter())[span.type] += 1
                own.setdefault(record.text, Counter())[span.text, span.type] += 1
        found = cls(counts, separator)
        found._own = own
        return found

    def predict(self, record: SpanRecord) -> SpanRecord:
        """Return the record with the spans found."""
        text, units = record.text, units_of(record.text, self.separator)
        places = [(units[first][0], units[last][1], kind) for first, last, kind in self._matches(text, units)]
        return SpanRecord(record.id, text, tuple(Span(kind, text[start:end], start) for start, end, kind in places))

    def tags(self, text: str, type_ids: Mapping[str, int]) -> list[int]:
        """What the dictionary says of each character, or where a word begins of the word.

        0, or `1 + 4 type + part`, the parts being those of `PARTS`. What a training text itself brought into the
        dictionary is left out for it: a model would otherwise learn that the dictionary is always right.
        """
        tags, units = [0] * len(text), units_of(text, self.separator)
        for first, last, kind in self._matches(text, units, self._own.get(text)):
            parts = "S" if first == last else "B" + "I" * (last - first - 1) + "E"
            for (start, _), part in zip(units[first : last + 1], parts, strict=True):
                tags[start] = 1 + len(PARTS) * type_ids[kind] + PARTS.index(part)
        return tags

    def save(self, folder: Path) -> None:
        """Write `dictionary.json`."""
        text = json.dumps(self.counts, ensure_ascii=False)
        (Path(folder) / DICTIONARY_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, separator: str = "") -> "SpanDictionary":
        """Read what `save` wrote; what came from which text is not in it.

        Raises:
            InputError: the file is missing or broken.
        """
        path = Path(folder) / DICTIONARY_FILE
        try:
            entries = json.loads(read_text(path)).items()
            return cls({text: {k: int(n) for k, n in types.items()} for text, types in entries}, separator)
        except (json.JSONDecodeError, AttributeError, TypeError) as error:
            raise InputError(f"{path}: not a dictionary of spans ({error}); save the assets again") from error

    def _matches(
        self, text: str, units: list[tuple[int, int]], own: Counter[tuple[str, str]] | None = None
    ) -> Iterator[tuple[int, int, str]]:
        """(first unit, last unit, type), without overlaps."""
        own = own or Counter()
        first = 0
        while first < len(units):
            for last in range(min(len(units), first + self._longest) - 1, first - 1, -1):
                kind = self._kind(text[units[first][0] : units[last][1]], own)
                if kind is not None:
                    yield first, last, kind
                    first = last + 1
                    break
            else:
                first += 1

    def _kind(self, word: str, own: Counter[tuple[str, str]]) -> str | None:
        counts = self.counts.get(word)
        if counts is None:
            return None
        left = {kind: count - own[word, kind] for kind, count in counts.items()}
        best = max(left, key=lambda kind: left[kind])
        return best if left[best] > 0 else None
