"""Spans as tags of single tokens and back.  Shapes: B batch, T tokens, P spans, K types, L tags.

"BIO" gives each type a tag for its first token and one for the others, "BIOS" one more, for a span of one token, and
"BIOES" another, for the last token. Tag 0 is "outside". A token has one tag: of spans that overlap, only one can be
said.
"""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ...errors import InputError

SchemeName = Literal["BIO", "BIOS", "BIOES"]
Inside = Literal["type", "any"]
Cells = list[tuple[int, int, int]]
"""(type, first token, last token) of the spans of a sentence."""
PARTS: dict[str, str] = {"BIO": "BI", "BIOS": "BIS", "BIOES": "BIES"}


class TagScheme:
    """The tags of a number of types.

    Args:
        num_types: K.
        name: "BIO", "BIOS" or "BIOES".

    Attributes:
        num_tags: L; tag `1 + type * parts + part`, the parts in the order of `PARTS`.

    Raises:
        InputError: an unknown name, or no types.
    """

    def __init__(self, num_types: int, name: SchemeName = "BIOES") -> None:
        if name not in PARTS:
            raise InputError(f"TagScheme(name={name!r}): use one of {', '.join(PARTS)}")
        if num_types < 1:
            raise InputError(f"TagScheme(num_types={num_types}): use 1 or more")
        self.num_types = num_types
        self.name = name
        self.parts = PARTS[name]
        self.num_tags = 1 + num_types * len(self.parts)
        self._part = np.array(["O", *self.parts * num_types])
        self._type = np.array([-1, *np.repeat(np.arange(num_types), len(self.parts))])
        self._begins, self._ends = np.isin(self._part, ["B", "S"]), np.isin(self._part, ["E", "S"])

    def allowed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Which tag may follow which `(L, L)`, which may begin a sentence `(L,)` and which may end it `(L,)`."""
        begins = np.isin(self._part, list("OBS"))
        open_ = np.isin(self._part, list("BI"))
        # Where a span may stop: anywhere with BIO, not after its first token where there is a tag for a single one.
        ends = ~np.isin(self._part, {"BI": [], "BIS": ["B"], "BIES": ["B", "I"]}[self.parts])
        goes_on = open_[:, None] & ~begins & (self._type[:, None] == self._type)
        follows = (ends[:, None] & begins) | goes_on
        return torch.from_numpy(follows), torch.from_numpy(begins), torch.from_numpy(ends)

    def tags(self, spans: Tensor, length: int) -> Tensor:
        """Tags `(B, length)` of spans without overlap: rows (type, first, last) `(B, P, 3)`, -1 where there is none.

        The last token is inclusive.
        """
        kind, first, last = (part[..., None] for part in spans.long().unbind(-1))
        place = torch.arange(length, device=spans.device)
        inside = (kind >= 0) & (place >= first) & (place <= last)
        part = torch.full_like(inside, self.parts.index("I"), dtype=torch.long)
        if "E" in self.parts:
            part = part.masked_fill(place == last, self.parts.index("E"))
        part = part.masked_fill(place == first, self.parts.index("B"))
        if "S" in self.parts:
            part = part.masked_fill((place == first) & (first == last), self.parts.index("S"))
        return ((1 + kind * len(self.parts) + part) * inside).sum(1)

    def spans(self, tags: Tensor, inside: Inside = "type") -> list[Cells]:
        """Spans (type, first, last) of each row of tags `(B, T)`.

        Args:
            tags: those of a sentence in each row.
            inside: how tags are read that do not follow each other by the rules. "type": as they are meant most
                likely, a span goes on as long as the type does, unless a tag says that one begins here or ended
                before. "any": it begins with a tag that says so, and goes on through what does not begin one, of
                whatever type, until a tag says that one ended here.
        """
        found: list[Cells] = [[] for _ in range(len(tags))]
        padded = np.zeros((tags.shape[0], tags.shape[1] + 2), dtype=np.int64)
        padded[:, 1:-1] = tags.cpu().numpy()
        kind, begun, ended = self._type[padded], self._begins[padded], self._ends[padded]
        tagged = kind >= 0
        begins = tagged & (begun | (kind != np.roll(kind, 1, 1)) | np.roll(ended, 1, 1))
        stops = tagged & (np.roll(begins, -1, 1) | ~np.roll(tagged, -1, 1))
        if inside == "any":
            begins, stops = begun, tagged & (ended | np.roll(begun, -1, 1) | ~np.roll(tagged, -1, 1))
        rows, first = begins.nonzero()
        # The first stop from each beginning on; a row ends outside, so that it is one of the same row.
        places = np.flatnonzero(stops)
        last = places[np.searchsorted(places, np.flatnonzero(begins))] % padded.shape[1]
        values = zip(rows.tolist(), kind[rows, first].tolist(), (first - 1).tolist(), (last - 1).tolist(), strict=True)
        for row, *span in values:
            found[row].append((span[0], span[1], span[2]))
        return found


def apart(cells: Tensor, length: int, layers: Tensor | None = None, num_layers: int = 1) -> Tensor:
    """Which of some spans tags can say `(B, P)`: of those that overlap the longest, of equally long ones the first.

    Args:
        cells: rows (type, first, last) `(B, P, 3)`, -1 where there is none.
        length: T.
        layers: tags of which layer say a span `(B, P)`; spans of different layers may overlap. None: all of one.
        num_layers: how many there are.
    """
    kind, first, last = cells.long().unbind(-1)
    layer = torch.zeros_like(kind) if layers is None else layers.clamp(min=0)
    place = torch.arange(length, device=cells.device)
    size = torch.where(kind >= 0, last - first, -1)
    order = torch.sort(size, dim=-1, descending=True, stable=True).indices
    kept = torch.zeros_like(kind, dtype=torch.bool)
    taken = torch.zeros(len(cells), num_layers, length, dtype=torch.bool, device=cells.device)
    row = torch.arange(len(cells), device=cells.device)
    for column in order.unbind(1):
        covers = (place >= first[row, column, None]) & (place <= last[row, column, None])
        where = row, layer[row, column]
        free = (size[row, column] >= 0) & ~(taken[where] & covers).any(-1)
        kept[row, column] = free
        taken[where] |= covers & free[:, None]
    return kept
