"""What is protected, that finding it takes no time, and that it survives in a thousand documents."""

from __future__ import annotations

import json
import random
import re
import time
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenthrift.bench.fuzzed import OF_A_SENTENCE, broken, fuzzed
from tokenthrift.core.errors import ThriftError
from tokenthrift.core.view import View
from tokenthrift.ops.tokens import count_tokens
from tokenthrift.text.bm25_sentences import BM25Sentences
from tokenthrift.text.protect import IN_PAIRS, Protected, Protection, missing
from tokenthrift.text.runtime import compress_text
from tokenthrift.text.selection import HINT, best_within
from tokenthrift.text.spans import join, phrases, sentences, spans_to_map, words
from tokenthrift.text.truncate import Truncate

from .tiny import tokenizer

DEFAULT = Protection.of("default")


def found(text: str, policy: Any = "default") -> list[tuple[str, str]]:
    return [(p.kind, text[p.start : p.end]) for p in Protection.of(policy).find(text)]


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        ("Run:\n```py\nx = 1\n```\nDone.", "code", ["```py\nx = 1\n```\n"]),
        ("a\n~~~\nnot closed\n", "code", ["~~~\nnot closed\n"]),
        ("x <pre>a  b</pre> y <code>c", "code", ["<pre>a  b</pre>"]),
        ("use `a b` and ``c`d`` here ` alone", "inline_code", ["`a b`", "``c`d``"]),
        ('see {"a": [1, {"b": "x]y\\""}]} and [1, 2]', "json", ['{"a": [1, {"b": "x]y\\""}]}', "[1, 2]"]),
        ('[not, {"ok": 1}, {bad: 2}, [[3], []]', "json", ['{"ok": 1}', "[[3], []]"]),
        ("[1 [2]] {'a': 1} [01] [1,] {} [tru]", "json", ["[2]", "{}"]),
        ('<b c="x>y">bold</b> a < b > c <br/> <!-- > -->', "xml", ['<b c="x>y">', "</b>", "<br/>", "<!-- > -->"]),
        ("t\n| a | b |\n|---|---|\n| 1 | 2 |\nx | y\nend", "table", ["| a | b |\n|---|---|\n| 1 | 2 |\nx | y\n"]),
        ("a | b\n--|--\n1 | 2\n\nif a | b\n", "table", ["a | b\n--|--\n1 | 2\n"]),
        ("(see https://x.org/a_(b)?c=1.) www.y.org, s3://b/k", "url", ["https://x.org/a_(b)?c=1", "www.y.org", "s3://b/k"]),
        ("mail a.b+c@x-y.co.uk. @home x@y", "email", ["a.b+c@x-y.co.uk"]),
        ("{{ a.b }} {x} ${HOME} {0:>3} {% if a %} %(n)s {not one}", "placeholder",
         ["{{ a.b }}", "{x}", "${HOME}", "{0:>3}", "{% if a %}", "%(n)s"]),
        ("5 km, $1,234.50 or -3 °C; v1.2.3 in 2024-01-02 (12%) 5公里 3 million euros", "number",
         ["5 km", "$1,234.50", "-3 °C", "v1.2.3", "2024-01-02", "12%", "5公里", "3 million euros"]),
        ("He did not go. Don't ask; never mind, no refunds. nicht gut 我不去", "negation",
         ["did not go", "Don't ask", "never mind", "no refunds", "nicht gut", "不去"]),
        ("It is not without risk. Never not\tsay it, don't.", "negation",
         ["is not without risk", "Never not\tsay", "don't"]),
        ("\"yes, sir\" it's 'so' “fine” 5\" «bon» 「はい」 dogs' tails'", "quote",
         ['"yes, sir"', "'so'", "“fine”", "«bon»", "「はい」"]),
    ],
)  # fmt: skip
def test_what_each_kind_is(text: str, kind: str, expected: list[str]) -> None:
    assert [what for _, what in found(text, kind)] == expected


def test_policies() -> None:
    text = 'Never say "no" to {x} at https://x.org/5'
    assert [k for k, _ in found(text)] == ["negation", "quote", "placeholder", "url"]
    assert [k for k, _ in found(text, "structure")] == ["placeholder", "url"]
    assert [k for k, _ in found(text, "default,-quote, -negation")] == ["placeholder", "url"]
    assert found(text, "none") == found(text, None) == found(text, "url,-all") == []
    assert found(text, ["url", re.compile(r"\bsay\b")]) == [("custom", "say"), ("url", "https://x.org/5")]
    assert not Protection.of("none") and Protection.of(DEFAULT) is DEFAULT


def test_what_stands_for_itself_stays_where_the_negation_or_quote_around_it_goes() -> None:
    text = 'There is no https://x.org/a page. He wrote "see {x} now" to me. Bring cake for 5.'
    kinds = [("negation", "no "), ("url", "https://x.org/a"), ("quote", '"see '), ("placeholder", "{x}")]
    assert found(text) == [*kinds, ("quote", ' now"'), ("number", "5")]
    out = compress_text([BM25Sentences(rate=0.5)], text, "Which cake?", tokenizer(), protect=DEFAULT)
    assert out.text == " https://x.org/a {x} Bring cake for 5." and not out.notes
    link, x = text.index("https"), text.index("{x}")
    lost = [p.kind for p in missing(text, DEFAULT.find(text), [(0, 8), (link, link + 15), (x, x + 3)])]
    assert lost == ["negation"]


@pytest.mark.parametrize(
    ("policy", "said"),
    [("jsn", "did you mean 'json'"), (["code", 3], "not 3"), (7, "names of kinds, not int"), ("", "knows no ''")],
)
def test_policies_that_are_none(policy: Any, said: str) -> None:
    with pytest.raises(ThriftError, match=said):
        Protection.of(policy)


@given(st.text(st.sampled_from("ab1 \n`~{}[]\"'<>/|-:.,@$%(“”日不\\!"), max_size=80))
def test_spans_are_in_order_disjoint_and_not_empty(text: str) -> None:
    spans = DEFAULT.find(text)
    assert all(0 <= p.start < p.end <= len(text) for p in spans)
    assert all(a.end <= b.start for a, b in pairwise(spans))
    assert missing(text, spans, [(0, len(text))] if text else []) == []


PLAIN = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5)
)


def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)


@given(st.recursive(PLAIN, nested))
def test_all_json_containers_are_found_whole(value: Any) -> None:
    for dumped in (json.dumps(value), json.dumps(value, indent=1, ensure_ascii=False)):
        assert found(f"x {dumped} y", "json") == ([("json", dumped)] if isinstance(value, list | dict) else [])


@pytest.mark.parametrize(
    "piece",
    ["x", "[", "{", '["', '"', "'", "<", "<a ", '<a "', "<!--", "`", "` ``", "|", "a|b\n", "1", "1 ", "not ", "https://)",
     "@", "a@", "a.", "```\n", "<pre>", "{{", "“", "日", "\n", " ", '["a",', "[1,", '{"a":', "%(", "|-\n", "1,000"],
)  # fmt: skip
def test_time_is_linear_in_the_length(piece: str) -> None:
    text = piece * (50_000 // len(piece))
    start = time.perf_counter()
    DEFAULT.find(text)
    assert time.perf_counter() - start < 3


def test_what_has_survived() -> None:
    text = "We paid 5 euros. They did not. See https://x.org now."
    spans = DEFAULT.find(text)
    assert [text[p.start : p.end] for p in spans] == ["5 euros", "did not", "https://x.org"]
    lost = [p.kind for p in missing(text, spans, [(0, 7), (31, 53)])]
    assert lost == ["number"]  # its sentence was torn; that of the negation is gone as a whole
    assert [p.kind for p in missing(text, spans, [(0, 31)])] == ["url"]
    assert [p.kind for p in missing(text, [Protected(8, 12, "custom")], [(8, 11)])] == ["custom"]


class Drawn:
    """A method that keeps what it draws by lot."""

    info = Truncate.info
    where = "head"

    def __init__(self, seed: int, rate: float, split: Any) -> None:
        self.draw, self.rate, self.split = random.Random(seed), rate, split

    def reduce(self, view: View) -> Any:
        units = self.split(view.text)
        scores = [self.draw.random() for _ in units]
        return spans_to_map(best_within(view.text, units, scores, self.rate, view.tokenizer), len(view.text))


def check(seed: int) -> None:
    """One document, one rate, one way to split it; every guarantee."""
    doc = fuzzed(seed)
    text = doc.text
    draw = random.Random(seed)
    split = draw.choice((words, phrases, sentences))
    rate = draw.choice((0.2, 0.33, 0.5, 0.7, 0.9))
    method: Any = (
        Drawn(seed, rate, split) if seed % 5 else Truncate(rate=rate, where=draw.choice(("head", "tail", "middle")))
    )
    out = compress_text([method], text, None, tokenizer(), protect=DEFAULT)

    assert out.text == join(text, out.kept)
    assert all(a[1] < b[0] for a, b in zip(out.kept, out.kept[1:], strict=False))
    assert not broken(doc, out.kept, DEFAULT.kinds), seed
    for start, end, kind in doc.planted:
        if kind not in OF_A_SENTENCE or (split is not sentences and seed % 5):
            assert text[start:end] in out.text, (seed, text[start:end])
    assert missing(text, DEFAULT.find(text), out.kept) == []
    assert not any("returned as it was" in note for note in out.notes)

    target = max(int(out.tokens_before * rate + 0.5), 1)
    assert out.tokens_after == count_tokens(tokenizer(), out.text)
    said = ("the protected spans alone", "protected spans were added", "all of the text", "no unit has at most")
    assert out.tokens_after <= target or any(words in note for words in said for note in out.notes), seed
    # No two words or numbers have become one, and what starts a line still does.
    for (_, left), (right, _) in zip(out.kept, out.kept[1:], strict=False):
        assert not (re.match(r"[A-Za-z0-9_]", text[left - 1]) and re.match(r"[A-Za-z0-9_]", text[right])), seed
    for mark in ("```py\n", "~~~py\n", "| name"):
        assert all(out.text[: m.start()].endswith(("\n", "\n ")) or not out.text[: m.start()].strip()
                   for m in re.finditer(re.escape(mark), out.text)), seed  # fmt: skip


def check_whole(seed: int) -> None:
    """One document, protected with ``whole``: the target is met, and what is protected is there as a whole or not."""
    doc = fuzzed(seed)
    draw = random.Random(seed)
    rate = draw.choice((0.1, 0.2, 0.33, 0.5))
    method: Any = Drawn(seed, rate, draw.choice((words, phrases, sentences)))
    out = compress_text([method], doc.text, None, tokenizer(), protect=Protection.of("whole"))
    said = ("all of the text", "no unit has at most", "the protected spans alone have", "were added")
    target = max(int(out.tokens_before * rate + 0.5), 1)
    assert out.tokens_after <= target or any(words in note for words in said for note in out.notes), seed
    assert not broken(doc, out.kept, (*IN_PAIRS, *OF_A_SENTENCE)), seed
    for start, end, kind in doc.planted:
        left = join(doc.text, [(max(start, a), min(end, b)) for a, b in out.kept if a < end and start < b])
        assert not left.strip() or left == doc.text[start:end] or kind in OF_A_SENTENCE, (seed, left)
    assert not any("returned as it was" in note for note in out.notes)
    dropped = any(f"{doc.text[p.start : p.end]}" not in out.text for p in doc.planted if p.kind not in OF_A_SENTENCE)
    assert not dropped or any("left out, whole" in note for note in out.notes), seed


def test_with_whole_what_is_protected_is_there_as_a_whole_or_not() -> None:
    for seed in range(150):
        check_whole(seed)


def test_with_whole_the_answer_stays_and_code_that_does_not_help_goes() -> None:
    code = "```py\nx = 1\n\n# Nobody came.\ny = [2]\n```\n"
    table = "| a | b |\n|---|---|\n| 1 | 2 |\n"
    text = f"Look here.\n\n{code}\nThe key is under the green mat.\n\n{table}\nMore <b>of</b> {{%if x%}} this.\n{code}"
    asked = "Where is the key, under the mat?"

    def run(policy: str, rate: float) -> Any:
        method = BM25Sentences(rate=rate)
        return compress_text([method], text, asked, tokenizer(), protect=Protection.of(policy))

    strict, whole = run("default", 0.3), run("default,whole", 0.3)
    assert code in strict.text and table in strict.text and "mat" not in strict.text and strict.rate > 0.5
    assert "The key is under the green mat.\n" in whole.text and "```" not in whole.text and whole.rate <= 0.3
    assert "{%if x%}" in whole.text
    assert whole.text.count("<b>") == whole.text.count("</b>") == 1
    assert whole.notes == ("the protected spans alone are more than was asked for: some are left out, whole",)
    assert strict.notes[0].endswith("only they are kept" + HINT)
    assert run("default,whole", 0.9).kept == run("default", 0.9).kept  # there was room for all of it
    method = Truncate(rate=0.3)  # it has no scores
    head = compress_text([method], text, None, tokenizer(), protect=Protection.of("whole"))
    assert head.text == compress_text([method], text, None, tokenizer(), protect=DEFAULT).text
    assert head.notes[0].endswith("only they are kept")
    assert run("json,whole", 0.3).kept == run("json", 0.3).kept
    assert not Protection.of("none,whole") and not Protection.of("whole,-all")
    assert Protection.of("whole") == Protection.of("default,whole") != DEFAULT == Protection.of("whole,default,-whole")


@pytest.mark.parametrize("part", range(4))
def test_everything_protected_survives(part: int) -> None:
    for seed in range(75 * part, 75 * (part + 1)):
        check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_everything_protected_survives_in_many_documents(part: int) -> None:
    for seed in range(1000 + 200 * part, 1000 + 200 * (part + 1)):
        check(seed)
