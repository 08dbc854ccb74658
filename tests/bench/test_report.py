from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser

import pytest

from tokenthrift.bench.report import plot, runs, table
from tokenthrift.bench.runner import BenchResult, bench
from tokenthrift.bench.summary import PlanResult

from .tiny import SUITE, a_text, tiny_model, tiny_tokenizer

EVIL = "<script>alert(1)</script> & \"quoted\" 'text' {{ 7 * 7 }} "


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> BenchResult:
    folder = tmp_path_factory.mktemp("report")
    data = folder / "evil <b>.jsonl"
    lines = [json.dumps({"prompt": EVIL + a_text(50), "answer": f"{i} {EVIL}"}) for i in range(2)]
    data.write_text("\n".join(lines))
    plans = ["text=truncate(rate=0.5)", "cache=knorm(budget=50)"]
    return bench(
        tiny_model(), data, plans, SUITE, folder / "out", processor=tiny_tokenizer(), progress=False,
        command="tokenthrift bench --data 'evil <b>.jsonl'",
    )  # fmt: skip


@pytest.fixture(scope="module")
def page(result: BenchResult) -> str:
    return (result.out / "report.html").read_text(encoding="utf-8")


def test_nothing_comes_from_outside(page: str) -> None:
    assert not re.search(r"(https?:)?//[a-z0-9-]+\.", page)
    assert "<script" not in page
    assert "@import" not in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)


def test_prompts_are_escaped(page: str) -> None:
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "{{ 7 * 7 }}" in page
    assert "evil &lt;b&gt;.jsonl" in page


def test_page_says_what_is_needed(page: str, result: BenchResult) -> None:
    for words in ("cache=knorm(budget=50)", "arXiv 2406.11430", "Reproduce", "<del>", result.machine["torch"], "<svg"):
        assert words in page


def test_page_is_well_formed(page: str) -> None:
    open_tags: list[str] = []
    void = {"meta", "br", "img", "path", "use", "link"}

    class Checker(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in void:
                open_tags.append(tag)

        def handle_startendtag(self, tag: str, attrs: object) -> None:
            pass

        def handle_endtag(self, tag: str) -> None:
            if tag not in void:
                assert open_tags.pop() == tag

    Checker().feed(page)
    assert not open_tags


def test_runs_rebuild_the_text() -> None:
    assert runs("abcdefgh", [(1, 3), (5, 6)]) == [(False, "a"), (True, "bc"), (False, "de"), (True, "f"), (False, "gh")]
    assert runs("abc", [(0, 3)]) == [(True, "abc")]
    assert runs("abc", [(2, 9)]) == [(False, "ab"), (True, "c")]  # the text was cut for display


def test_plot_takes_degenerate_results() -> None:
    same = [PlanResult("", loss=0.0, time_ratio=1.0), PlanResult("x", loss=0.0, time_ratio=1.0)]
    assert plot(same, "time_ratio").startswith("<svg")
    assert plot(same[:1], "time_ratio") == ""
    assert plot(same, "kv_ratio") == ""  # never measured


def test_terminal_table(result: BenchResult) -> None:
    from rich.console import Console

    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table(result.sections[0]))
    text = console.export_text()
    assert "cache=knorm(budget=50)" in text
    assert "★" in text
