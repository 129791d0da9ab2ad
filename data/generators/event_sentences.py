"""Chinese sentences with events, made from templates: several events a sentence, shared arguments, none at all.

Template language: `{1.role}` is a span that plays the role in event 1 (the first of the template's types); `{12.role}`
plays it in both, `{1.role+2.role}` a role of its own in each, and `{1.触发词:a|b}` is one of the words given.
"""

import re
from collections.abc import Iterator
from random import Random

from ..records import TRIGGER_ROLE, Argument, Event, EventRecord
from . import words
from .words import Word

_ROLES: dict[str, dict[str, Word]] = {
    "司法-判刑": {"被告": words.person, "罪名": words.crime, "刑期": words.prison_term, "法院": words.court},
    "人事-任职": {"人物": words.person, "机构": words.organisation, "职位": words.post, "时间": words.time},
    "人事-离职": {"人物": words.person, "机构": words.organisation, "职位": words.post, "时间": words.time},
    "人事-裁员": {"机构": words.company, "人数": words.people_count, "时间": words.time},
    "财经-收购": {"收购方": words.company, "标的": words.company, "金额": words.money, "时间": words.time},
    "财经-融资": {
        "融资方": words.company,
        "投资方": words.fund,
        "金额": words.money,
        "轮次": words.funding_round,
        "时间": words.time,
    },
    "灾害-地震": {"地点": words.place, "震级": words.magnitude, "时间": words.time, "伤亡人数": words.casualties},
    "竞赛-胜负": {"胜者": words.team, "败者": words.team, "赛事": words.league, "比分": words.score},
    "产品-发布": {"发布方": words.company, "产品": words.product, "时间": words.time, "地点": words.place},
    "生活-结婚": {"结婚双方": words.person, "时间": words.time, "地点": words.place},
}

SCHEMA: dict[str, list[str]] = {event_type: list(roles) for event_type, roles in _ROLES.items()}
"""Event type -> its roles, the form that `kexue.data.duee.read_schema` gives."""

_SINGLE: dict[str, list[str]] = {
    "司法-判刑": [
        "{1.法院}一审以{1.罪名}{1.触发词:判处}{1.被告}{1.刑期}",
        "{1.被告}因犯{1.罪名}被{1.法院}{1.触发词:判处}{1.刑期}",
        "{1.被告}犯{1.罪名}{1.触发词:获刑|被判刑}{1.刑期}",
        "{1.法院}宣布，被告人{1.被告}{1.触发词:获刑|被判入狱}{1.刑期}",
    ],
    "人事-任职": [
        "{1.时间}，{1.机构}宣布{1.人物}{1.触发词:出任|接任}{1.职位}",
        "{1.人物}{1.触发词:出任|就任|担任}{1.机构}{1.职位}",
        "{1.机构}{1.触发词:聘请|任命}{1.人物}为{1.职位}",
        "{1.人物}{1.时间}正式{1.触发词:履新|上任}，成为{1.机构}新的{1.职位}",
    ],
    "人事-离职": [
        "{1.人物}{1.时间}{1.触发词:辞去|卸任}{1.机构}{1.职位}一职",
        "{1.机构}{1.职位}{1.人物}宣布{1.触发词:辞职|离职|请辞}",
        "{1.时间}，{1.机构}公告称{1.人物}因个人原因{1.触发词:离任|辞职}",
        "{1.人物}{1.触发词:离开|告别}了工作多年的{1.机构}",
    ],
    "人事-裁员": [
        "{1.机构}{1.时间}{1.触发词:裁员|裁减}{1.人数}",
        "{1.时间}，{1.机构}被曝将{1.触发词:裁撤|裁掉}{1.人数}",
        "因业务收缩，{1.机构}计划{1.触发词:裁员}，涉及{1.人数}",
    ],
    "财经-收购": [
        "{1.收购方}{1.时间}以{1.金额}{1.触发词:收购|买下}{1.标的}",
        "{1.收购方}宣布{1.触发词:并购|收购}{1.标的}，交易金额为{1.金额}",
        "{1.标的}被{1.收购方}{1.触发词:收购|收入囊中}",
        "{1.时间}，{1.标的}以{1.金额}的价格被{1.收购方}{1.触发词:买下|并购}",
    ],
    "财经-融资": [
        "{1.融资方}完成{1.金额}{1.轮次}{1.触发词:融资}，由{1.投资方}领投",
        "{1.时间}，{1.融资方}宣布{1.触发词:获投|获得投资}{1.金额}",
        "{1.投资方}{1.触发词:注资|投资}{1.融资方}，金额为{1.金额}",
        "{1.融资方}{1.时间}获{1.投资方}{1.轮次}{1.触发词:融资}",
    ],
    "灾害-地震": [
        "{1.时间}，{1.地点}发生{1.震级}{1.触发词:地震}",
        "{1.地点}{1.时间}{1.触发词:地震}，震级为{1.震级}，已造成{1.伤亡人数}",
        "{1.地点}突发{1.震级}{1.触发词:强震|地震}，目前{1.伤亡人数}",
    ],
    "竞赛-胜负": [
        "{1.赛事}战罢，{1.胜者}以{1.比分}{1.触发词:击败|战胜|力克}{1.败者}",
        "{1.胜者}{1.比分}{1.触发词:大胜|险胜|完胜}{1.败者}",
        "{1.败者}在{1.赛事}中{1.比分}{1.触发词:不敌|负于}{1.胜者}",
    ],
    "产品-发布": [
        "{1.发布方}{1.时间}在{1.地点}{1.触发词:发布|推出}{1.产品}",
        "{1.时间}，{1.发布方}的{1.产品}正式{1.触发词:亮相|上市|面世}",
        "{1.发布方}{1.触发词:推出|发布}{1.产品}，引来不少关注",
    ],
    "生活-结婚": [
        "{1.结婚双方}与{1.结婚双方}{1.时间}在{1.地点}{1.触发词:结婚|举行婚礼|完婚}",
        "{1.结婚双方}和{1.结婚双方}{1.触发词:登记结婚|喜结连理}",
        "{1.时间}，{1.结婚双方}{1.触发词:嫁给|迎娶}了{1.结婚双方}",
    ],
}

_SEVERAL: list[tuple[tuple[str, ...], str]] = [
    (
        ("司法-判刑", "司法-判刑"),
        "{12.法院}一审宣判，{1.被告}、{2.被告}因{12.罪名}分别{12.触发词:获刑|被判刑}{1.刑期}和{2.刑期}",
    ),
    (
        ("司法-判刑", "司法-判刑"),
        "{1.被告}以{1.罪名}、{2.被告}以{2.罪名}被{12.法院}{12.触发词:判处}{1.刑期}和{2.刑期}",
    ),
    (("司法-判刑", "司法-判刑"), "{1.被告}{1.触发词:获刑}{1.刑期}，同案的{2.被告}{2.触发词:获刑}{2.刑期}"),
    (("人事-任职", "人事-任职"), "{12.时间}，{12.机构}{12.触发词:任命}{1.人物}为{1.职位}、{2.人物}为{2.职位}"),
    (("人事-离职", "人事-任职"), "{1.人物}{1.触发词:卸任}{12.机构}{12.职位}，由{2.人物}{2.触发词:接任}"),
    (
        ("人事-离职", "人事-任职"),
        "{12.时间}，{12.人物}{1.触发词:辞去}{1.机构}{1.职位}，随后{2.触发词:出任|加盟}{2.机构}",
    ),
    (("财经-收购", "财经-收购"), "{12.收购方}{12.时间}先后{12.触发词:收购|并购}{1.标的}和{2.标的}"),
    (
        ("财经-融资", "财经-收购"),
        "{1.融资方+2.收购方}刚拿到{1.投资方}的{1.金额}{1.触发词:融资}，便{2.触发词:收购|买下}了{2.标的}",
    ),
    (("财经-收购", "人事-裁员"), "{1.收购方}{1.触发词:收购}{1.标的+2.机构}后，后者随即{2.触发词:裁员|裁减}{2.人数}"),
    (("人事-裁员", "人事-裁员"), "{1.机构}、{2.机构}{12.时间}相继{12.触发词:裁员}，分别涉及{1.人数}和{2.人数}"),
    (("灾害-地震", "灾害-地震"), "{12.时间}{1.地点}和{2.地点}先后发生{1.震级}、{2.震级}{12.触发词:地震}"),
    (("竞赛-胜负", "竞赛-胜负"), "{12.赛事}中，{12.胜者}接连{12.触发词:击败|战胜}{1.败者}和{2.败者}"),
    (
        ("竞赛-胜负", "竞赛-胜负"),
        "{12.赛事}次日，{1.胜者}{1.比分}{1.触发词:战胜}{1.败者}，{2.胜者}{2.比分}{2.触发词:大胜}{2.败者}",
    ),
    (
        ("产品-发布", "人事-任职"),
        "{1.发布方+2.机构}{12.时间}{1.触发词:发布}{1.产品}，并{2.触发词:任命}{2.人物}为{2.职位}",
    ),
    (("产品-发布", "产品-发布"), "{12.发布方}{12.时间}在{12.地点}{12.触发词:发布}{1.产品}与{2.产品}"),
    (
        ("生活-结婚", "生活-结婚"),
        "{12.时间}，{1.结婚双方}与{1.结婚双方}、{2.结婚双方}与{2.结婚双方}在{12.地点}{12.触发词:举行婚礼|完婚}",
    ),
]

_WITHOUT: list[tuple[Word | None, str]] = [
    (words.person, "{}表示，融资并不是公司眼下最要紧的事"),
    (words.company, "{}否认了有关裁员的传闻"),
    (words.place, "{}举行地震应急演练，居民有序撤离"),
    (words.person, "{}在采访中谈到了自己对婚姻的看法"),
    (words.company, "{}股价今日小幅上涨，成交清淡"),
    (words.team, "{}本周恢复训练，备战下一场比赛"),
    (words.court, "{}开展普法宣传，讲解哪些行为会获刑"),
    (words.person, "{}说自己从未想过要离开这座城市"),
    (words.organisation, "{}今年的预算与去年大致持平"),
    (words.product, "记者走访多家门店，发现{}供应充足"),
    (words.company, "分析人士认为{}短期内不会收购同行"),
    (words.place, "未来三天{}以多云天气为主，气温略有回升"),
    (None, "这本书讲的是一个普通家庭三代人的故事"),
]

_OPENINGS = ["", "", "", "据媒体报道，", "记者获悉，", "快讯：", "最新消息，", "本报讯 ", "【要闻】"]
_CLOSINGS = ["。", "。", "", "，引发热议。", "，详情有待进一步公布。", "！", "，消息来自官方通报。"]
_BETWEEN = ["；", "；另外，", "。同日，", "，而", "。此外，"]
_SLOT = re.compile(r"\{([^{}:]+)(?::([^{}]+))?\}")


def event_sentences(seed: int = 0) -> Iterator[EventRecord]:
    """Yield sentences without end, no two with the same text; the same seed gives the same sentences.

    About one in eight tells of no event (though it may hold words that elsewhere name one), one half of one, the rest
    of two, of one type or of two types, with and without common arguments.
    """
    random = Random(f"event sentences {seed}")
    seen: set[str] = set()
    while True:
        text, events = _sentence(random)
        if text not in seen:
            seen.add(text)
            yield EventRecord(f"generated-{seed}-{len(seen):06d}", text, events)


def _sentence(random: Random) -> tuple[str, tuple[Event, ...]]:
    """Opening, one or two clauses, closing."""
    kind = random.random()
    text, events = random.choice(_OPENINGS), ()
    if kind < 0.12:
        clauses = [_plain(random)]
    elif kind < 0.62:
        clauses = [_single(random)]
    elif kind < 0.87:
        clauses = [_fill(*random.choice(_SEVERAL), random)]
    elif kind < 0.95:
        clauses = [_single(random), _single(random)]
    else:
        clauses = [_single(random), _plain(random)]
    for index, (clause, found) in enumerate(clauses):
        text += random.choice(_BETWEEN) if index else ""
        events += tuple(_shift(event, len(text)) for event in found)
        text += clause
    return text + random.choice(_CLOSINGS), events


def _single(random: Random) -> tuple[str, tuple[Event, ...]]:
    event_type = random.choice(list(_SINGLE))
    return _fill((event_type,), random.choice(_SINGLE[event_type]), random)


def _plain(random: Random) -> tuple[str, tuple[Event, ...]]:
    word, template = random.choice(_WITHOUT)
    return template.format(word(random) if word else ""), ()


def _fill(types: tuple[str, ...], template: str, random: Random) -> tuple[str, tuple[Event, ...]]:
    """Fill a template's slots, each with a word not yet used in it, and note where every argument lies."""
    text, last, used = "", 0, set()
    arguments: list[list[Argument]] = [[] for _ in types]
    for slot in _SLOT.finditer(template):
        text += template[last : slot.start()]
        last = slot.end()
        places = [
            (int(digit) - 1, role)
            for part in slot[1].split("+")
            for digits, role in [part.split(".")]
            for digit in digits
        ]
        event, role = places[0]
        word = random.choice(slot[2].split("|")) if slot[2] else _new_word(_ROLES[types[event]][role], used, random)
        for event, role in places:
            arguments[event].append(Argument(role, word, len(text)))
        text += word
    events = zip(types, arguments, strict=True)
    return text + template[last:], tuple(Event(event_type, _trigger_first(spans)) for event_type, spans in events)


def _new_word(draw: Word, used: set[str], random: Random) -> str:
    word = draw(random)
    while word in used:
        word = draw(random)
    used.add(word)
    return word


def _trigger_first(arguments: list[Argument]) -> tuple[Argument, ...]:
    return tuple(sorted(arguments, key=lambda argument: (argument.role != TRIGGER_ROLE, argument.start)))


def _shift(event: Event, by: int) -> Event:
    return Event(event.type, tuple(Argument(a.role, a.text, a.start + by) for a in event.arguments))
