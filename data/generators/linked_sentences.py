"""A small knowledge base in which most names mean several entities, and sentences that tell by their words which one.

Some entities bear names that are ordinary words of the sentences, and are hardly ever meant by them; some mentions mean
nobody in the knowledge base.
"""

from collections.abc import Callable, Iterator
from functools import cache
from random import Random

from ..records import NIL, Entity, Link, LinkRecord
from . import words

Facts = Callable[[Random], list[tuple[str, str]]]

_KINDS: dict[str, tuple[str, Facts, list[str]]] = {
    "歌手": (
        "人物",
        lambda random: [("职业", "歌手"), ("代表作品", words.product(random)), ("籍贯", words.place(random))],
        ["{}的新专辑什么时候发行", "{}演唱会的门票已经开售", "昨晚听了{}的歌", "{}翻唱了一首老歌"],
    ),
    "教练": (
        "人物",
        lambda random: [("职业", "教练"), ("执教球队", words.team(random)), ("赛事", words.league(random))],
        ["{}执教的球队又输了比赛", "{}带队夺冠", "{}谈到了球队的防守", "赛后{}对裁判表示不满"],
    ),
    "作家": (
        "人物",
        lambda random: [("职业", "作家"), ("体裁", "小说"), ("出版社", words.place(random) + "出版社")],
        ["{}的小说获得了文学奖", "正在读{}写的散文", "{}的作品被译成多种语言", "{}签名售书"],
    ),
    "公司": (
        "机构",
        lambda random: [("性质", "公司"), ("经营范围", words.product(random)), ("总部", words.place(random))],
        ["{}发布了年度财报", "{}的股价今天上涨", "{}计划裁员", "{}获得新一轮融资"],
    ),
    "电影": (
        "作品",
        lambda random: [("类别", "电影"), ("导演", words.person(random)), ("票房", words.money(random))],
        ["《{}》上映三天票房过亿", "《{}》的导演接受采访", "周末去影院看了《{}》", "{}的预告片和海报公布"],
    ),
    "游戏": (
        "作品",
        lambda random: [("类别", "游戏"), ("平台", words.product(random)), ("开发商", words.company(random))],
        ["{}的新版本修复了很多问题", "{}攻略和通关视频", "和朋友联机玩{}", "{}的服务器今天维护"],
    ),
    "县": (
        "地点",
        lambda random: [("行政区类别", "县"), ("人口", words.people_count(random)), ("所属地区", words.place(random))],
        ["{}今年粮食产量再创新高", "{}的天气怎么样", "从省城到{}坐车要多久", "{}特产有哪些"],
    ),
}
_SHARING = [("歌手", "教练", "作家"), ("公司", "电影", "游戏", "县")]
_ORDINARY = ["比赛", "小说", "电影", "天气", "作品", "视频", "朋友", "问题"]
_PLAIN = ["这部电影和小说差别很大", "今天的天气适合比赛", "和朋友讨论了很久这个问题", "视频里的作品都很有意思"]
_OPENINGS = ["", "", "", "请问", "听说", "最新消息：", "据报道，"]
_CLOSINGS = ["", "", "？", "。", "！", "_资讯"]


@cache
def linked_entities(seed: int = 0, num_names: int = 60) -> tuple[Entity, ...]:
    """The knowledge base: names of people and names of things, each borne by one to four entities of different kinds,
    and entities named by ordinary words."""
    random = Random(f"linked entities {seed}")
    found: list[tuple[str, str]] = []
    names: set[str] = set()
    for number in range(num_names):
        kinds, draw = (_SHARING[0], words.person) if number % 2 else (_SHARING[1], _thing)
        name = draw(random)
        while name in names:
            name = draw(random)
        names.add(name)
        found += [(name, kind) for kind in random.sample(kinds, random.choice([1, 2, 2, len(kinds)]))]
    found += [(name, "游戏") for name in _ORDINARY]
    random.shuffle(found)
    entities = []
    for number, (name, kind) in enumerate(found):
        kind_type, facts, _ = _KINDS[kind]
        aliases = (f"{name}公司",) if kind == "公司" else (f"{name}县",) if kind == "县" else ()
        entities.append(Entity(str(10001 + number), name, aliases, (kind_type,), tuple(facts(random))))
    return tuple(entities)


def linked_sentences(seed: int = 0) -> Iterator[LinkRecord]:
    """Yield sentences about the entities of `linked_entities()` without end, no two with the same text.

    One in eight mentions nobody, one in five two entities, one in ten a person who is not in the knowledge base.
    """
    random = Random(f"linked sentences {seed}")
    entities = [(entity, _kind_of(entity)) for entity in linked_entities() if entity.name not in _ORDINARY]
    known = {entity.name for entity in linked_entities()}
    seen: set[str] = set()
    while True:
        text, links = random.choice(_OPENINGS), []
        drawn = random.random()
        clauses = 0 if drawn < 0.125 else 2 if drawn < 0.325 else 1
        for number in range(clauses):
            entity, kind = random.choice(entities)
            name, meant, kind_type = random.choice([entity.name, *entity.aliases]), entity.id, entity.types[0]
            if kind in _SHARING[0] and random.random() < 0.2:
                name, meant, kind_type = words.person(random), NIL, None
                if name in known:
                    continue
            before, _, after = random.choice(_KINDS[kind][2]).partition("{}")
            text += ("，" if number and links else "") + before
            links.append(Link(name, len(text), meant, kind_type))
            text += name + after
        text += random.choice(_PLAIN) if not links else ""
        text += random.choice(_CLOSINGS)
        if text not in seen:
            seen.add(text)
            yield LinkRecord(f"{seed}{len(seen):06d}", text, tuple(links))


def _thing(random: Random) -> str:
    return words.company(random)[:2] + random.choice(["", "之星", "传奇", "岛"])


def _kind_of(entity: Entity) -> str:
    """What an entity is, as its first fact says."""
    value = entity.facts[0][1]
    return value if value in _KINDS else "公司"
