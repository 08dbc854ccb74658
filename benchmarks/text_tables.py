"""The tables of text_methods.py, from its rows."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from tokenthrift.bench.facts import KINDS
from tokenthrift.bench.metrics import share_interval
from tokenthrift.bench.store import Store
from tokenthrift.core.method import find

Row = dict[str, Any]


def print_tables(store: Store, methods: Sequence[str], rates: Sequence[float]) -> None:
    """Print what the store has: all figures, recall by the kind of question, questions against none."""
    rows = {(row["part"], row["method"], row["rate"]): row for row in store.rows.values()}
    print(f"\n{heading(store)}\n")
    print(
        "| method | looks at the question | rate | kept | KL | top-1 | recall | (95%) | default policy: kept | recall "
        "| tokens/s | broken |\n|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
    )
    for name in methods:
        for rate in rates:
            print(line(name, rate, {part: rows.get((part, name, rate), {}) for part in PARTS}))
    asked = [name for name in methods if ("questions", name, rates[0]) in rows]
    if not asked:
        return
    kinds = [kind for kind in KINDS if kind in rows["questions", asked[0], rates[0]]["kinds"]]
    print(f"\nRecall by kind of question, nothing protected:\n\n| method | rate | {' | '.join(kinds)} |")
    print("|---|--:|" + "--:|" * len(kinds))
    for name in asked:
        for rate in rates:
            shares = [share(rows["questions", name, rate], "published", kind) for kind in kinds]
            print(f"| `{name}` | {rate} | {' | '.join(f'{value:.0%}' for value in shares)} |")
    print()
    for rate in rates:
        print(against(asked, rate, {name: rows["questions", name, rate] for name in asked}))


PARTS = ("continuation", "questions", "speed", "structure")


def heading(store: Store) -> str:
    """What was measured on, in a sentence."""
    rows = list(store.rows.values())
    asked = next((row for row in rows if row["part"] == "questions"), None)
    fuzzed = next((row for row in rows if row["part"] == "structure"), None)
    nothing = next((row["kl_of_nothing"] for row in rows if row["part"] == "continuation"), None)
    said = [f"{len(asked['kinds'])} questions about {asked['about'][-1] + 1} passages"] if asked else []
    if fuzzed:
        said.append(f"{fuzzed['documents']} made-up documents with {sum(fuzzed['planted'].values())} things to break")
    if nothing is not None:
        said.append(f"KL {nothing:.3f} with nothing kept")
    settings = store.fingerprint or {}
    return f"{'; '.join(said)}; Python {settings.get('python')}, {settings.get('threads')} threads"


def line(name: str, rate: float, row: dict[str, Row]) -> str:
    """A line of the first table; what was not measured is left empty."""
    cells = [f"`{name}`", "yes" if "question" in find(name, "text").needs else "", f"{rate}"]
    asked, text, fuzz = row["questions"], row["continuation"], row["structure"]
    cells.append(f"{statistics.mean(asked['published_kept']):.0%}" if asked else "")
    cells += [f"{text['kl']:.3f}", f"{text['top1']:.0%}"] if text else ["", ""]
    if asked:
        low, high = interval(asked["published_hits"], asked["about"])
        cells += [f"{share(asked, 'published'):.1%}", f"{low:.0%}–{high:.0%}"]
        cells += [f"{statistics.mean(asked['default_kept']):.0%}", f"{share(asked, 'default'):.1%}"]
    else:
        cells += [""] * 4
    cells.append(f"{row['speed']['speed']:,.0f}" if row["speed"] else "")
    broken = sum(sum(kinds.values()) for kinds in fuzz["broken"].values()) if fuzz else ""
    back = f" ({fuzz['unchanged']} returned whole)" if fuzz and fuzz["unchanged"] else ""
    return f"| {' | '.join([*cells, f'{broken}{back}'])} |"


def share(row: Row, policy: str, kind: str | None = None) -> float:
    """Share of the questions whose answers are there; those that a policy does not count are left out."""
    pairs = zip(row[f"{policy}_hits"], row["kinds"], strict=True)
    hits = [hit for hit, of in pairs if hit is not None and kind in (None, of)]
    return statistics.mean(hits) if hits else float("nan")


def interval(values: Sequence[int], about: Sequence[int]) -> tuple[float, float]:
    """Of the mean, by bootstrap over passages: questions about one passage are not independent."""
    return share_interval(np.bincount(about, values), np.bincount(about))


def against(methods: Sequence[str], rate: float, rows: dict[str, Row]) -> str:
    """The best method that looks at the question, and the best that does not, question by question."""
    asks = [name for name in methods if "question" in find(name, "text").needs]
    blind = [name for name in methods if name not in asks]
    if not asks or not blind:
        return f"rate {rate}: nothing to compare"
    first, second = (max(names, key=lambda name: share(rows[name], "published")) for names in (asks, blind))
    pairs = zip(rows[first]["published_hits"], rows[second]["published_hits"], strict=True)
    gains = [a - b for a, b in pairs]
    low, high = interval(gains, rows[first]["about"])
    return (
        f"rate {rate}: `{first}` {share(rows[first], 'published'):.1%}, `{second}`, which does not see the question, "
        f"{share(rows[second], 'published'):.1%}: {statistics.mean(gains):+.1%} ({low:+.1%} to {high:+.1%})"
    )
