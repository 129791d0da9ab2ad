"""Chinese sentences with named entities, made from templates: `{type}` is a word of that type."""

import re
from collections.abc import Iterator
from random import Random

from ..records import Span, SpanRecord
from . import words
from .words import Word

_WORDS: dict[str, Word] = {
    "address": words.place,
    "company": words.company,
    "name": words.person,
    "organization": words.team,
    "position": words.post,
    "product": words.product,
}
TYPES = list(_WORDS)
"""The types of the spans, sorted."""

_TEMPLATES = [
    "{company}任命{name}为{position}",
    "{name}出任{company}{position}，前任{name}去年离开",
    "{name}在{address}出生，后来成为{organization}的{position}",
    "{organization}与{organization}在{address}战成平局",
    "{organization}{position}{name}对结果表示满意",
    "{company}的{product}在{address}上市",
    "{address}的{name}买到了{product}，却说不如{company}的旧款",
    "{company}、{company}和{company}都在{address}设有工厂",
    "{name}、{name}与{name}一同前往{address}",
    "{company}{position}{name}表示，{product}的销量超出预期",
    "记者走访{address}多家门店，发现{product}供应充足",
    "{organization}宣布签下{name}",
    "有人在网上转让{product}，地点是{address}",
    "{name}曾任{position}，现居{address}",
    "这本书讲的是一个普通家庭三代人的故事",
    "分析人士认为短期内不会有大的变化",
]
_OPENINGS = ["", "", "", "据媒体报道，", "记者获悉，", "快讯：", "最新消息，", "本报讯 ", "【要闻】"]
_CLOSINGS = ["。", "。", "", "，引发热议。", "，详情有待进一步公布。", "！"]
_SLOT = re.compile(r"\{(\w+)\}")


def entity_sentences(seed: int = 0) -> Iterator[SpanRecord]:
    """Yield sentences without end, no two with the same text; the same seed gives the same sentences.

    Some tell of nothing, one in four is made of two clauses.
    """
    random = Random(f"entity sentences {seed}")
    seen: set[str] = set()
    while True:
        template = random.choice(_TEMPLATES)
        if random.random() < 0.25:
            template += random.choice(["；", "，而", "。此外，"]) + random.choice(_TEMPLATES)
        record = _fill(random.choice(_OPENINGS) + template + random.choice(_CLOSINGS), len(seen), random)
        if record.text not in seen:
            seen.add(record.text)
            yield record


def _fill(template: str, number: int, random: Random) -> SpanRecord:
    """Fill the slots of a template, and note where each word lies."""
    text, last = "", 0
    spans: list[Span] = []
    for slot in _SLOT.finditer(template):
        text += template[last : slot.start()]
        last = slot.end()
        spans.append(Span(slot[1], _WORDS[slot[1]](random), len(text)))
        text += spans[-1].text
    return SpanRecord(number, text + template[last:], tuple(spans))
