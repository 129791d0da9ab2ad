"""Passages with a question: each tells facts about several people, companies and teams, and one fact is asked for.

The right value stands among others of its kind, in the sentence about the one that the question names; a question that
the passages do not answer asks for a fact that is not told, of one that they name.
"""

from collections.abc import Callable, Iterator
from random import Random

from ..records import Answer, ReadingRecord
from ..squad import places_of
from . import words

Word = Callable[[Random], str]

# Kind -> (its name, fact -> (its value, statements, questions))
_KINDS: dict[str, tuple[Word, dict[str, tuple[Word, list[str], list[str]]]]] = {
    "company": (
        words.company,
        {
            "seat": (
                words.place,
                ["{}的总部位于{}", "{}把总部设在{}"],
                ["{}的总部在哪里？", "{}总部位于什么地方？"],
            ),
            "founder": (words.person, ["{}由{}创办", "{}的创始人是{}"], ["{}是谁创办的？", "{}的创始人叫什么？"]),
            "product": (words.product, ["{}主要生产{}", "{}最近推出了{}"], ["{}生产什么？", "{}有什么产品？"]),
            "money": (words.money, ["{}去年的收入为{}", "{}年收入达到{}"], ["{}的收入是多少？", "{}一年收入多少钱？"]),
        },
    ),
    "person": (
        words.person,
        {
            "home": (words.place, ["{}出生于{}", "{}是{}人"], ["{}出生在哪里？", "{}是哪里人？"]),
            "post": (words.post, ["{}现任{}", "{}担任{}"], ["{}担任什么职务？", "{}的职位是什么？"]),
            "start": (words.time, ["{}于{}参加工作", "{}参加工作的时间是{}"], ["{}什么时候参加工作？"]),
        },
    ),
    "team": (
        words.team,
        {
            "coach": (words.person, ["{}的主教练是{}", "{}由{}执教"], ["{}的主教练是谁？", "谁是{}的教练？"]),
            "league": (words.league, ["{}参加了{}", "{}今年征战{}"], ["{}参加什么比赛？"]),
            "score": (words.score, ["{}上一场的比分是{}", "{}首战打成{}"], ["{}上一场比分是多少？"]),
        },
    ),
}
_OPENINGS = ["", "", "据报道，", "资料显示，", "记者了解到，"]


def reading_passages(seed: int = 0, num_passages: int = 1, unanswerable: float = 0.2) -> Iterator[ReadingRecord]:
    """Yield questions without end, no two with the same first passage; the same seed gives the same questions.

    Args:
        seed: of the random stream.
        num_passages: of each question; the answer stands in one of them or several.
        unanswerable: share of questions that no passage answers.
    """
    random = Random(f"reading passages {seed} {num_passages} {unanswerable}")
    seen: set[str] = set()
    while True:
        record = _question(random, f"generated-{seed}-{len(seen) + 1:06d}", num_passages, unanswerable)
        if record.passages[0] not in seen:
            seen.add(record.passages[0])
            yield record


def _question(random: Random, name: str, num_passages: int, unanswerable: float) -> ReadingRecord:
    subjects: dict[str, str] = {}
    while len(subjects) < 3:
        kind = random.choice(list(_KINDS))
        subjects[_KINDS[kind][0](random)] = kind
    known = {
        subject: {fact: parts[0](random) for fact, parts in _KINDS[kind][1].items()}
        for subject, kind in subjects.items()
    }
    subject, kind = random.choice(list(subjects.items()))
    asked = random.choice(list(known[subject]))
    value = known[subject][asked]
    answerable = random.random() >= unanswerable
    passages = tuple(
        _passage(random, subjects, known, subject, asked, told=answerable and (number == 0 or random.random() < 0.5))
        for number in range(num_passages)
    )
    if num_passages > 1:
        passages = tuple(random.sample(passages, num_passages))
    question = random.choice(_KINDS[kind][1][asked][2]).format(subject)
    answers = [
        Answer(value, start, number)
        for number, passage in enumerate(passages)
        for start in places_of(value, passage)
        if answerable
    ]
    return ReadingRecord(name, question, passages, tuple(answers))


def _passage(
    random: Random,
    subjects: dict[str, str],
    known: dict[str, dict[str, str]],
    subject: str,
    asked: str,
    *,
    told: bool,
) -> str:
    """Two facts of each subject, in any order; the one that is asked for only if it is to be told."""
    sentences = []
    for name, kind in subjects.items():
        facts = [fact for fact in known[name] if (name, fact) != (subject, asked)]
        chosen = random.sample(facts, 2)
        if told and name == subject:
            chosen[0] = asked
        sentences += [random.choice(_KINDS[kind][1][fact][1]).format(name, known[name][fact]) for fact in chosen]
    return random.choice(_OPENINGS) + "。".join(random.sample(sentences, len(sentences))) + "。"
