"""The made-up documents, and that what breaks in them is noticed."""

from __future__ import annotations

from collections import Counter

from tokenthrift.bench.fuzzed import Fuzzed, broken, fuzzed
from tokenthrift.text.protect import KINDS


def test_every_kind_is_planted_and_known_by_its_place() -> None:
    counts: Counter[str] = Counter()
    for seed in range(60):
        doc = fuzzed(seed)
        assert doc == fuzzed(seed)
        strings = [doc.text[start:end] for start, end, _ in doc.planted]
        assert len(set(strings)) == len(strings) and all(doc.text.count(string) == 1 for string in strings)
        assert all(a.end <= b.start for a, b in zip(doc.planted, doc.planted[1:], strict=False))
        counts += Counter(kind for _, _, kind in doc.planted)
    assert set(counts) == set(KINDS)
    assert fuzzed(1) != fuzzed(2)


def test_keeping_all_breaks_nothing_and_losing_a_character_does() -> None:
    for seed in range(20):
        doc = fuzzed(seed)
        assert not broken(doc, [(0, len(doc.text))], KINDS)
        for start, end, kind in doc.planted:
            cut = (start + end) // 2
            assert broken(doc, [(0, cut), (cut + 1, len(doc.text))], KINDS) == {kind: 1}
            assert not broken(doc, [(0, cut), (cut + 1, len(doc.text))], set(KINDS) - {kind})


def test_what_belongs_to_a_sentence_may_go_with_all_of_it() -> None:
    doc = Fuzzed()
    doc.add("We paid ")
    doc.add("5 euros", "number")
    doc.add(" at ")
    doc.add("https://x.org/", "url")
    doc.add(" then")
    doc.sentences.append((0, len(doc.text)))
    doc.add(". The rest.")
    link = (doc.planted[1].start, doc.planted[1].end)
    rest = (len(doc.text) - 10, len(doc.text))
    assert not broken(doc, [link, rest], KINDS)
    assert broken(doc, [rest], KINDS) == {"url": 1}
    assert broken(doc, [(0, 3), link, rest], KINDS) == {"number": 1}
    assert not broken(doc, [(0, 3), link, rest], {"url"})
