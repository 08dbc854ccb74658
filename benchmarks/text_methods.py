"""Every text method at four rates: continuation, questions, tokens a second, structure. One table, one run.

    python benchmarks/text_methods.py --out out/text_methods            # the packs; some 40 minutes on two cores
    python benchmarks/text_methods.py --classifier FOLDER_OR_HUB_ID     # with llmlingua2, which has no pack
    python benchmarks/text_methods.py --quick                           # random models: shows that it runs

(a) continuation: how far the next tokens' distributions of the scorer's model are from those behind the whole text, on
the text's own continuation. The 32 tokens before that are never shortened, and are the question.
(b) questions about real documents: is the answer in the shorter text? No model answers. Once as published, nothing
protected, and once as `tokenthrift.compress` protects by default, then without the answers that this protects.
(c) tokens of the text a second, by whole calls, models loaded.
(d) made-up documents full of code, JSON, tags, tables, links, numbers, negations, quotes and placeholders: what of that
is broken. Scorer and embedder are random here: whether anything breaks is up to the runtime that all methods share.

Texts and questions come from Python's help and docstrings (PSF License). Scores are computed once for all rates where
that gives what the method gives at each rate, which is tried on a text first; speed is measured without that. Results
are appended to `results.jsonl` in `--out` as they come, and a run that was interrupted goes on there.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import text_parts as parts
import torch
from text_tables import print_tables

import tokenthrift as tt
from tokenthrift.bench.facts import fact_questions
from tokenthrift.bench.fuzzed import fuzzed
from tokenthrift.bench.random_models import random_models
from tokenthrift.bench.rates import AtRates, Models
from tokenthrift.bench.store import Store
from tokenthrift.core.method import find
from tokenthrift.models.scoring import Embedder, Scorer
from tokenthrift.ops.tokens import count_tokens

PARTS = ("structure", "continuation", "speed", "questions")
ONE_DOCUMENT = {"longllmlingua": {"separator": ""}}
"""Settings for a text that is one document; an empty line would stand between documents."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.7, 0.5, 0.33, 0.2])
    parser.add_argument("--methods", nargs="+", default=[info.name for info in tt.methods(stage="text")])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--classifier", help="a token classifier for llmlingua2: a folder or a hub id")
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--passage", type=int, default=128, help="tokens of a passage that is asked about, at most")
    parser.add_argument("--documents", type=int, default=4, help="documents whose continuation is compared")
    parser.add_argument("--tokens", type=int, default=320, help="tokens of each that are shortened")
    parser.add_argument("--timed", type=int, default=1, help="texts of 512 tokens to time")
    parser.add_argument("--fuzzed", type=int, default=1000, help="made-up documents")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few of everything with random models")
    parser.add_argument("--fresh", action="store_true", help="forget the results in --out")
    parser.add_argument("--out", type=Path, default=Path("out/text_methods"))
    args = parser.parse_args()
    if args.quick:
        args.questions, args.passage, args.documents, args.tokens, args.timed, args.fuzzed = 12, 120, 1, 100, 1, 4

    bench = TextBench(args)
    for name in args.methods:
        for part in args.parts:
            bench.measure(name, part)
    print_tables(bench.store, args.methods, args.rates)


class TextBench:
    """What is measured on, made when it is first needed; what was measured, in the store."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.random = random_models()
        self.made: dict[str, Any] = {}
        self.store = Store(args.out, args.fresh)
        settings = ("rates", "questions", "passage", "documents", "tokens", "timed", "fuzzed", "seed", "quick")
        used = {name: getattr(args, name) for name in settings}
        threads = torch.get_num_threads()
        self.store.begin(
            {**used, "classifier": args.classifier, "python": platform.python_version(), "threads": threads}
        )

    def measure(self, name: str, part: str) -> None:
        """Add a row a rate, unless they are there."""
        keys = {rate: f"{part} {name} {rate}" for rate in self.args.rates}
        if all(key in self.store for key in keys.values()):
            return
        if name == "llmlingua2" and part != "structure" and not (self.args.quick or self.args.classifier):
            print(
                f"# {name} has no model pack: give --classifier, or it is in the column on structure only", flush=True
            )
            return
        start = perf_counter()
        rows = getattr(self, part)(name)
        seconds = perf_counter() - start
        for rate, key in keys.items():
            self.store.add({"key": key, "part": part, "method": name, "rate": rate, "seconds": seconds, **rows[rate]})
        print(f"# {part} of {name}: {seconds:.0f} s", flush=True)

    # ---- the four parts ---------------------------------------------------------------------------------------------

    def continuation(self, name: str) -> dict[float, parts.Row]:
        model, tokenizer = self.packs.scorer.model, self.packs.tokenizer
        texts = self._once("texts", lambda: parts.continued(model, tokenizer, self.args.documents, self.args.tokens))
        rows = parts.continuation_rows(self._at(name, self.packs), texts, model)
        nothing = self._once("nothing", lambda: parts.without_context(texts, model, tokenizer))
        return {rate: {**row, "kl_of_nothing": nothing} for rate, row in rows.items()}

    def questions(self, name: str) -> dict[float, parts.Row]:
        size = partial(count_tokens, self.packs.tokenizer)
        passages = self._once(
            "passages", lambda: fact_questions(self.args.questions, self.args.passage, size, self.args.seed, 5)
        )
        rows = parts.question_rows(self._at(name, self.packs), passages, "question" in find(name, "text").needs)
        kinds = [question.kind for passage in passages for question in passage.questions]
        about = [i for i, passage in enumerate(passages) for _ in passage.questions]
        return {rate: {**row, "kinds": kinds, "about": about} for rate, row in rows.items()}

    def speed(self, name: str) -> dict[float, parts.Row]:
        texts = self._once("timed", lambda: parts.timed_texts(self.packs.tokenizer, self.args.timed, 512))
        return parts.speed_rows(self._at(name, self.packs), texts)

    def structure(self, name: str) -> dict[float, parts.Row]:
        first = 10_000 * self.args.seed
        documents = self._once("fuzzed", lambda: [fuzzed(first + i, blocks=4) for i in range(self.args.fuzzed)])
        models = Models(self.random.tokenizer, self.random.scorer, self.random.embedder)
        return parts.structure_rows(self._at(name, models, whole=False), documents)

    # ---- what they need ---------------------------------------------------------------------------------------------

    @property
    def packs(self) -> Models:
        """The real models, or with --quick the random ones."""

        def load() -> Models:
            if self.args.quick:
                return Models(self.random.tokenizer, self.random.scorer, self.random.embedder)
            model, tokenizer = tt.load("smollm2-135m")
            return Models(tokenizer, Scorer(model, tokenizer), Embedder(*tt.load("minilm-l6")))

        return self._once("packs", load)

    def _at(self, name: str, models: Models, whole: bool = True) -> AtRates:
        """The method at the rates; with ``whole`` a text is one document."""
        params: dict[str, Any] = dict(ONE_DOCUMENT.get(name, {})) if whole else {}
        if name == "llmlingua2":
            given = self.args.classifier if whole and not self.args.quick else self.random.classifier
            params["model"] = given
        info = find(name, "text")
        return AtRates(lambda rate: info.make(rate=rate, **params), self.args.rates, models)

    def _once(self, what: str, make: Callable[[], Any]) -> Any:
        if what not in self.made:
            self.made[what] = make()
        return self.made[what]


if __name__ == "__main__":
    main()
