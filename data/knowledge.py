"""A knowledge base in place: its entries and their names in one file that every process of a machine maps.

The file is built once from the published rows, see `KnowledgeBase.cached`.
"""

import json
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .arrays import Arrays, Texts, bad_rows_of, cached_arrays, open_arrays, place_file, save_arrays
from .ccks_linking import entity_row, read_knowledge
from .dictionary import NameDictionary, lower_case
from .records import Entity
from .rows import OnBadRow, list_bad_rows

KIND = {"holds": "knowledge base", "version": "1"}
KIND_OF_SOME = {**KIND, "bad rows": "skipped"}


class KnowledgeBase:
    """Entities by number, which is the place of their ids in the order of code points.

    Names are looked up in lower case, and without a pair of 《》 around them.

    Args:
        arrays: those that `build` makes.
        path: the file they lie in; None: in memory.
    """

    def __init__(self, arrays: Arrays, path: Path | None = None) -> None:
        self.path = path
        self.arrays = arrays
        self.names = NameDictionary(_part(arrays, "names"))
        """All names, see `lookup_form`."""
        self._ids = NameDictionary(_part(arrays, "ids"))
        self._entities, self._bearers = arrays["bearers.entities"], arrays["bearers.borders"]
        self._rows = Texts(arrays["rows.content"], arrays["rows.borders"])
        self._types = arrays["types"]
        self.types: list[str] = json.loads(arrays["type_names"].tobytes())
        """The first types of the entities, in order."""

    @classmethod
    def build(cls, entities: Iterable[Entity]) -> "KnowledgeBase":
        """Put entities, each with an id of its own, into arrays in memory."""
        ordered = sorted(entities, key=lambda entity: entity.id)
        pairs = {(lookup_form(name), i) for i, each in enumerate(ordered) for name in (each.name, *each.aliases)}
        names = NameDictionary.build(name for name, _ in pairs)
        owners = np.fromiter((number for _, number in pairs), dtype=np.int64, count=len(pairs))
        owned = names.numbers([name for name, _ in pairs])
        order = np.lexsort((owners, owned))
        types = sorted({each.types[0] for each in ordered if each.types})
        type_ids = {name: number for number, name in enumerate(types)}
        characters: Counter[str] = Counter()
        for each in ordered:
            characters.update(description(each))
        parts = {
            "names": names.arrays,
            "ids": NameDictionary.build(each.id for each in ordered).arrays,
            "bearers": {
                "entities": owners[order].astype(np.int32),
                "borders": np.searchsorted(owned[order], np.arange(len(names) + 1)).astype(np.int64),
            },
            "rows": Texts.pack([json.dumps(entity_row(each), ensure_ascii=False) for each in ordered]),
            "characters": {
                "codes": np.array([ord(character) for character in characters], dtype=np.uint32),
                "counts": np.array(list(characters.values()), dtype=np.int64),
            },
        }
        arrays = {f"{part}.{name}": array for part, group in parts.items() for name, array in group.items()}
        first = [type_ids[each.types[0]] if each.types else -1 for each in ordered]
        arrays["types"] = np.array(first, dtype=np.int32)
        arrays["type_names"] = np.frombuffer(json.dumps(types).encode("utf-8"), dtype=np.uint8)
        return cls(arrays)

    @classmethod
    def open(cls, path: str | Path) -> "KnowledgeBase":
        """Map a file that `save` or `cached` wrote.

        Raises:
            InputError: no such file, or another one.
        """
        return cls(open_arrays(path, KIND, KIND_OF_SOME), Path(path))

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all; where it exists already on the same disk, as a second name of it."""
        if self.path is None:
            save_arrays(self.arrays, path, KIND)
        else:
            place_file(self.path, path)

    @classmethod
    def cached(
        cls,
        source: str | Path,
        cache_dir: str | Path | None = None,
        *,
        on_bad_row: OnBadRow = "raise",
        bad_rows_file: str | Path | None = None,
    ) -> "KnowledgeBase":
        """Open the file built from published rows; the first process that needs it builds it.

        Args:
            source: the rows, see `read_knowledge`.
            cache_dir: see `cached_arrays`.
            on_bad_row: "raise" or "skip", see `read_rows`.
            bad_rows_file: where skipped rows are listed, also those skipped when the file was built.

        Raises:
            InputError: a bad row, or a place that cannot be written to.
        """

        def make(rows: Path, listing: Path) -> Arrays:
            return cls.build(read_knowledge(rows, on_bad_row=on_bad_row, bad_rows_file=listing)).arrays

        path = cached_arrays(source, cache_dir, KIND if on_bad_row == "raise" else KIND_OF_SOME, make)
        if bad_rows_of(path).exists():
            list_bad_rows(bad_rows_of(path), bad_rows_file)
        return cls.open(path)

    def __len__(self) -> int:
        return len(self._ids)

    def __reduce__(self) -> tuple[object, ...]:
        """Travel to another process as the name of the file, where there is one."""
        return (_open_once, (self.path,)) if self.path is not None else (KnowledgeBase, (self.arrays,))

    @property
    def num_bytes(self) -> int:
        """Memory of the arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    def numbers(self, ids: list[str]) -> NDArray[np.int64]:
        """Numbers of the entities with these ids, -1 for an id that is not there."""
        return self._ids.numbers(ids)

    def entity(self, number: int) -> Entity:
        """The entity with a number."""
        row = json.loads(self._rows[number])
        facts = tuple((fact["predicate"], fact["object"]) for fact in row["data"])
        return Entity(row["subject_id"], row["subject"], tuple(row["alias"]), tuple(row["type"]), facts)

    def bearers(self, name: int) -> NDArray[np.int32]:
        """The entities that bear a name, in order."""
        return self._entities[self._bearers[name] : self._bearers[name + 1]]

    def type_of(self, entity_id: str) -> str | None:
        """The first type of the entity with an id, None where it has none.

        Raises:
            KeyError: there is no such entity.
        """
        number = int(self._ids.numbers([entity_id])[0])
        if number < 0:
            raise KeyError(entity_id)
        return self.types[self._types[number]] if self._types[number] >= 0 else None

    def character_counts(self) -> dict[str, int]:
        """How often each character occurs in the descriptions of all entities."""
        codes, counts = self.arrays["characters.codes"], self.arrays["characters.counts"]
        return dict(zip(map(chr, codes.tolist()), counts.tolist(), strict=True))


def lookup_form(name: str) -> str:
    """The form under which a name is looked up."""
    if len(name) > 2 and name[0] == "《" and name[-1] == "》":
        name = name[1:-1]
    return lower_case(name)


def description(entity: Entity) -> str:
    """What is said of an entity, as one text: a line for each fact, and one for its names."""
    lines = [f"{predicate}：{value}" for predicate, value in entity.facts]
    return "\n".join([*lines, f"名称：{'、'.join(dict.fromkeys((entity.name, *entity.aliases)))}"])


def _part(arrays: Arrays, name: str) -> dict[str, NDArray]:
    return {key.removeprefix(f"{name}."): array for key, array in arrays.items() if key.startswith(f"{name}.")}


@lru_cache(maxsize=4)
def _open_once(path: Path) -> KnowledgeBase:
    return KnowledgeBase.open(path)
