"""Chinese sentences with relations, made from templates: shared and nested spans, objects of several slots, none.

Template language: `{p1}` is a span whose letter says what it is (`p` a person, see `_WORDS`), the same name always the
same span; `[t{y}{n}]` is a span that has others inside. Beside a template stand its relations, `predicate subject
object slot=object ...` by the names of their spans.
"""

import re
from collections.abc import Callable, Iterator
from random import Random

from ..duie import PredicateTypes
from ..records import VALUE_SLOT, Argument, Mention, Relation, RelationRecord
from . import words

Word = Callable[[Random], str]

SCHEMA: dict[str, PredicateTypes] = {
    predicate: PredicateTypes(subject, {VALUE_SLOT: value, **slots})
    for predicate, subject, value, slots in [
        ("导演", "影视作品", "人物", {}),
        ("主演", "影视作品", "人物", {}),
        ("编剧", "影视作品", "人物", {}),
        ("作者", "图书作品", "人物", {}),
        ("改编自", "影视作品", "作品", {}),
        ("歌手", "歌曲", "人物", {}),
        ("作词", "歌曲", "人物", {}),
        ("作曲", "歌曲", "人物", {}),
        ("所属专辑", "歌曲", "音乐专辑", {}),
        ("丈夫", "人物", "人物", {}),
        ("妻子", "人物", "人物", {}),
        ("毕业院校", "人物", "学校", {}),
        ("校长", "学校", "人物", {}),
        ("创始人", "企业", "人物", {}),
        ("董事长", "企业", "人物", {}),
        ("总部地点", "企业", "地点", {}),
        ("成立日期", "机构", "Date", {}),
        ("所在城市", "机构", "城市", {}),
        ("饰演", "娱乐人物", "人物", {"inWork": "影视作品"}),
        ("票房", "影视作品", "Number", {"inArea": "地点"}),
        ("获奖", "娱乐人物", "奖项", {"inWork": "作品", "onDate": "Date"}),
    ]
}
"""Predicate -> its types, the form that `kexue.data.duie.read_schema` gives."""

_PARTS = {
    "first": "长夜 春风 南方 远山 故园 边城 星河 白鹿 青衣 孤岛 北国 流金 风雪 海上 无名",
    "last": "往事 之恋 风云 传奇 行记 岁月 的秘密 归人 奏鸣曲 无声 夜话 来信 列车 不眠 迷踪",
    "award": "金帆奖 银杏奖 白鸥奖 青松奖 北斗奖 飞虹奖",
    "kind": "最佳男主角 最佳女主角 最佳新人 最佳导演 最受欢迎演员",
    "city": "北京 上海 广州 深圳 杭州 南京 成都 重庆 武汉 西安 长沙 青岛 大连 厦门 昆明 兰州",
    "school": "师范大学 理工大学 音乐学院 电影学院 交通大学 医科大学",
    "club": "雄狮队 猎鹰俱乐部 海豚队 飞虎队 骏马俱乐部 雷霆队 灰狼俱乐部 白鲸队",
}


def _of(*parts: str) -> Word:
    """A word of each part, joined."""
    lists = [_PARTS[part].split() for part in parts]
    return lambda random: "".join(random.choice(choices) for choices in lists)


def _year(random: Random) -> str:
    return f"{random.randint(1950, 2024)}年"


def _day(random: Random) -> str:
    return f"{_year(random)}{random.randint(1, 12)}月{random.randint(1, 28)}日"


_WORDS: dict[str, Word] = {
    "w": _of("first", "last"),  # a film or a series
    "b": _of("first", "last"),  # a book
    "s": _of("first", "last"),  # a song
    "a": _of("first", "last"),  # an album
    "p": words.person,
    "r": words.person,  # whom an actor plays
    "c": words.company,
    "y": _of("city"),
    "n": _of("school"),
    "o": _of("club"),
    "d": _day,
    "e": _year,
    "g": _of("award", "kind"),
    "m": words.money,
}

_TEMPLATES: list[tuple[str, str]] = [
    ("《{w}》由{p1}执导，{p2}、{p3}主演", "导演 w p1; 主演 w p2; 主演 w p3"),
    ("{p1}自编自导的《{w}》由{p2}领衔主演", "导演 w p1; 编剧 w p1; 主演 w p2"),
    ("{p1}导演、{p2}编剧的电影《{w}》今日上映", "导演 w p1; 编剧 w p2"),
    ("电视剧《{w}》改编自{p1}的小说《{b}》，{p2}主演", "改编自 w b; 作者 b p1; 主演 w p2"),
    ("《[w{b}电影版]》改编自{p1}所著的《{b}》", "改编自 w b; 作者 b p1"),
    ("《{b}》是{e}出版的图书，作者是{p1}", "作者 b p1"),
    ("{p1}著有《{b}》一书，一时洛阳纸贵", "作者 b p1"),
    ("《{s}》是{p1}演唱的歌曲，由{p2}作词，{p3}作曲", "歌手 s p1; 作词 s p2; 作曲 s p3"),
    ("{p1}作词作曲并演唱的《{s}》收录在专辑《{a}》中", "歌手 s p1; 作词 s p1; 作曲 s p1; 所属专辑 s a"),
    ("歌曲《{s}》收录于{p1}的专辑《{a}》", "歌手 s p1; 所属专辑 s a"),
    ("{p1}与妻子{p2}相识于{y}", "妻子 p1 p2; 丈夫 p2 p1"),
    ("{p2}的丈夫{p1}是{c}的董事长", "妻子 p1 p2; 丈夫 p2 p1; 董事长 c p1"),
    ("{p1}毕业于[t{y}{n}]，后回到家乡任教", "毕业院校 p1 t; 所在城市 t y"),
    ("{p1}现任[t{y}{n}]校长", "校长 t p1; 所在城市 t y"),
    ("{p1}、{p2}都毕业于[t{y}{n}]", "毕业院校 p1 t; 毕业院校 p2 t; 所在城市 t y"),
    ("{c}由{p1}创立，总部位于{y}，成立于{d}", "创始人 c p1; 总部地点 c y; 成立日期 c d"),
    ("{c}创始人、董事长{p1}出席了活动", "创始人 c p1; 董事长 c p1"),
    ("{c}成立于{d}，总部设在{y}", "成立日期 c d; 总部地点 c y"),
    ("[t{y}{o}]组建于{d}", "所在城市 t y; 成立日期 t d"),
    ("{p1}在《{w}》中饰演{r}", "饰演 p1 r inWork=w"),
    ("{p1}、{p2}在《{w}》中分别饰演{r1}和{r2}", "饰演 p1 r1 inWork=w; 饰演 p2 r2 inWork=w"),
    ("{p1}在《{w1}》里饰演{r1}，在《{w2}》里饰演{r2}", "饰演 p1 r1 inWork=w1; 饰演 p1 r2 inWork=w2"),
    ("{p1}饰演了{r}一角", "饰演 p1 r"),
    ("《{w}》在{y}的票房达到{m}", "票房 w m inArea=y"),
    ("《{w}》在{y1}、{y2}分别收获票房{m1}、{m2}", "票房 w m1 inArea=y1; 票房 w m2 inArea=y2"),
    ("《{w}》累计票房{m}，导演{p1}表示满意", "票房 w m; 导演 w p1"),
    ("{e}，{p1}凭借《{w}》获得{g}", "获奖 p1 g inWork=w onDate=e"),
    ("{e1}和{e2}，{p1}两次获得{g}", "获奖 p1 g onDate=e1; 获奖 p1 g onDate=e2"),
    ("{p1}主演的《{w}》让其斩获{g}", "主演 w p1; 获奖 p1 g inWork=w"),
    ("{p1}曾获{g1}、{g2}", "获奖 p1 g1; 获奖 p1 g2"),
]

_WITHOUT = [
    "{p1}谈到《{b}》时说，好书要慢慢读",
    "{p1}昨日现身{y}机场",
    "{c}否认了更换董事长的传闻",
    "{y}今年将举办多场电影放映活动",
    "《{w}》的导演人选还没有确定",
    "{p1}和{p2}都没有获奖",
    "[t{y}{n}]本周放假",
]

_OPENINGS = ["", "", "", "据了解，", "资料显示，", "【人物】", "近日，"]
_CLOSINGS = ["。", "。", "", "！", "，引起关注。", "，详见官网。"]
_BETWEEN = ["；", "。", "。此外，", "，而"]
_PART = re.compile(r"\{(\w+)\}|\[(\w)|(\])")


def relation_sentences(seed: int = 0) -> Iterator[RelationRecord]:
    """Yield sentences without end, no two with the same text; the same seed gives the same sentences.

    About one in ten states nothing (though it may hold words that elsewhere state something), the others one to four
    relations and more, of one clause or two.
    """
    random = Random(f"relation sentences {seed}")
    seen: set[str] = set()
    while True:
        text, relations = _sentence(random)
        if text not in seen:
            seen.add(text)
            yield RelationRecord(f"generated-{seed}-{len(seen):06d}", text, relations)


def _sentence(random: Random) -> tuple[str, tuple[Relation, ...]]:
    """Opening, one or two clauses, closing."""
    kind = random.random()
    text, relations = random.choice(_OPENINGS), ()
    plain = (random.choice(_WITHOUT), "")
    if kind < 0.1:
        clauses = [plain]
    elif kind < 0.7:
        clauses = [random.choice(_TEMPLATES)]
    elif kind < 0.9:
        clauses = random.sample(_TEMPLATES, 2)
    else:
        clauses = [random.choice(_TEMPLATES), plain]
    used: set[str] = set()
    for index, (template, stated) in enumerate(clauses):
        text += random.choice(_BETWEEN) if index else ""
        text, mentions = _fill(template, text, used, random)
        relations += tuple(_relation(statement.split(), mentions) for statement in stated.split(";") if statement)
    return text + random.choice(_CLOSINGS), relations


def _fill(template: str, text: str, used: set[str], random: Random) -> tuple[str, dict[str, Mention]]:
    """Add a template to the text, a new word for each name; return the text and the first mention of each name."""
    chosen: dict[str, str] = {}
    mentions: dict[str, Mention] = {}
    opened: list[tuple[str, int]] = []
    last = 0
    for part in _PART.finditer(template):
        text += template[last : part.start()]
        last = part.end()
        name, opens, _ = part.groups()
        if opens:
            opened.append((opens, len(text)))
        elif name:
            word = chosen[name] if name in chosen else chosen.setdefault(name, _new_word(_WORDS[name[0]], used, random))
            mentions.setdefault(name, Mention(word, len(text)))
            text += word
        else:
            name, start = opened.pop()
            mentions[name] = Mention(text[start:], start)
    return text + template[last:], mentions


def _relation(statement: list[str], mentions: dict[str, Mention]) -> Relation:
    predicate, subject, value, *others = statement
    slots = {VALUE_SLOT: value, **dict(other.split("=") for other in others)}
    arguments = [Argument(slot, mentions[name].text, mentions[name].start) for slot, name in slots.items()]
    return Relation(predicate, mentions[subject], tuple(arguments))


def _new_word(draw: Word, used: set[str], random: Random) -> str:
    """A word that is no part of those that are there, nor they of it: what a text says is then said by texts alone."""
    word = draw(random)
    while any(word in other or other in word for other in used):
        word = draw(random)
    used.add(word)
    return word
