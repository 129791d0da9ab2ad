"""Names in texts against brute force, and the best cover of a text against all covers."""

from itertools import combinations, pairwise
from random import Random

import pytest

from kexue.data.dictionary import NameDictionary, lower_case, max_match
from kexue.errors import InputError


def brute_force(names: list[str], text: str) -> list[tuple[int, int, str]]:
    return sorted((i, i + len(n), n) for n in set(names) for i in range(len(text)) if text.startswith(n, i))


@pytest.mark.parametrize("letters", ["ab", "武汉大学生", "a龘😀\0İ", "\U0010ffff\ud7ff一"])
def test_all_occurrences_are_found(letters: str) -> None:
    random = Random(letters)
    for _ in range(100):
        names = ["".join(random.choices(letters, k=random.randint(1, 5))) for _ in range(random.randint(0, 12))]
        texts = ["".join(random.choices(letters + "z", k=random.randint(0, 12))) for _ in range(random.randint(0, 5))]
        dictionary, ordered = NameDictionary.build(names), sorted(set(names))
        assert len(dictionary) == len(ordered)
        found = dictionary.find(texts)
        rows = list(zip(found.text.tolist(), found.start.tolist(), found.end.tolist(), found.name, strict=True))
        assert rows == sorted(rows)
        for number, text in enumerate(texts):
            assert [(s, e, ordered[n]) for t, s, e, n in rows if t == number] == brute_force(names, text)
        asked = [*texts, *names, *(name + "a" for name in names)]
        expected = [ordered.index(name) if name in ordered else -1 for name in asked]
        assert dictionary.numbers(asked).tolist() == expected


def test_texts_do_not_run_into_each_other() -> None:
    dictionary = NameDictionary.build(["ab", "b\0a"])
    assert len(dictionary.find(["a", "b", "a"])) == 0
    assert dictionary.find(["a", "b\0a"]).text.tolist() == [1]


def test_nothing_is_found_in_nothing() -> None:
    assert len(NameDictionary.build([]).find(["abc", ""])) == 0
    assert len(NameDictionary.build(["a"]).find([])) == 0
    assert NameDictionary.build(["a"]).numbers([]).tolist() == []


@pytest.mark.parametrize("name", ["", "x" * 1001])
def test_names_of_no_use_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=rf"a name of {len(name)} characters .*use 1 to 1000"):
        NameDictionary.build(["ab", name])


def test_lower_case_keeps_every_place() -> None:
    text = "ABCİΣ ΑΣ ǅ中文😀"
    assert lower_case(text) == "abcİσ ασ ǆ中文😀"
    assert all(len(lower_case(chr(code))) == 1 for code in range(0x3000))


def cost(length: int, words: list[tuple[int, int]]) -> int:
    covered = {place for start, end in words for place in range(start, end)}
    return -len(words) - 100 * (length - len(covered))


def test_the_best_cover_is_found() -> None:
    random = Random(0)
    for _ in range(300):
        length = random.randint(0, 9)
        spans = [(i, j) for i in range(length) for j in range(i + 1, length + 1)]
        words = random.sample(spans, min(len(spans), random.randint(0, 7)))
        chosen = [words[number] for number in max_match(length, words)]
        assert all(one[1] <= other[0] for one, other in pairwise(chosen))
        covers = [
            cost(length, list(some))
            for size in range(len(words) + 1)
            for some in combinations(sorted(words), size)
            if all(one[1] <= other[0] for one, other in pairwise(some))
        ]
        assert cost(length, chosen) == max(covers)


def test_of_equal_covers_the_longest_word_comes_first() -> None:
    assert max_match(4, [(0, 1), (1, 4), (0, 3), (3, 4), (0, 2), (2, 4)]) == [2, 3]
    assert max_match(4, [(0, 1), (1, 4), (0, 4)]) == [2]
