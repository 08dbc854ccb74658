"""Question-blind text methods side by side: fidelity of a model's continuation, and answers that survive; one run.

    python training/word_head/compare.py --files held-out/*.txt [--plans "word_head" "random_words"] [--passages 24]

Each text is a passage and the tokens that follow it. Fidelity is the KL divergence (nats a token) of the model's
predictions of these tokens after the shortened passage from those after the whole one, and how much worse it predicts
them. Answers are strings that occur once in a passage: names, numbers, long words, phrases of two or three words;
recall is the share of them that the shortened passage has. Nothing is protected but with --protect. Half of the texts
are topics of Python's own help, half come from the files, if any are given.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from corpus import Text, from_file, passages

import tokenthrift as tt
from tokenthrift.bench.metrics import bootstrap, kl_divergence, nats_per_token
from tokenthrift.models.scoring import Embedder, Scorer
from tokenthrift.ops.tokens import Span, encode
from tokenthrift.text.spans import FUNCTION_WORDS, phrases

PLANS = (
    "word_head", "selective_context", "selective_context(context=document)", "random_words", "truncate(where=middle)",
    "embedding_sentences", "frugal_prompt", "tcra", "llmlingua", "specpc_text",
)  # fmt: skip
RATES = (0.7, 0.5, 0.33, 0.2)
BEHIND = 32
"""Tokens that follow a passage."""


def answers(text: str, count: int, draw: random.Random) -> dict[str, list[str]]:
    """Strings that a question about the passage could have as its answer, each of which it has once, by kind."""
    plain = re.sub(r"\s+", " ", text)
    found: dict[str, list[str]] = {"name": [], "number": [], "word": [], "phrase": []}
    for match in re.finditer(r"(?<![.!?:] )(?<![\w\"'(])[A-Z][\w-]+(?: [A-Z][\w-]+)*", plain):
        found["name"].append(match.group())
    for match in re.finditer(r"(?<![\w.])\d[\d.,]*\d|(?<![\w.])\d+(?![\w.])", plain):
        found["number"].append(match.group())
    for match in re.finditer(r"(?<![\w-])[a-z]{6,}(?![\w-])", plain):
        if match.group() not in FUNCTION_WORDS:
            found["word"].append(match.group())
    for start, end in phrases(plain, 3):
        phrase = re.sub(r"^(?:an?|the|this|its|their) ", "", plain[start:end].strip(), flags=re.IGNORECASE)
        if " " in phrase:
            found["phrase"].append(phrase)
    once = {kind: [a for a in dict.fromkeys(group) if has(plain, a, 1)] for kind, group in found.items()}
    return {kind: draw.sample(group, min(count, len(group))) for kind, group in once.items()}


def has(text: str, answer: str, times: int | None = None) -> bool:
    """Whether the text has the answer, as whole words and whatever the white space; so many times if that is said."""
    words = r"\s+".join(map(re.escape, answer.split()))
    found = len(re.findall(rf"(?<!\w){words}(?!\w)", text, re.IGNORECASE))
    return found > 0 if times is None else found == times


class Remembering(Scorer):
    """A scorer that reads each passage once, whatever the number of rates."""

    _last: tuple[Any, Any] = (None, None)

    def self_information(self, text: str, segments: Sequence[Span] | None = None) -> list[tuple[int, int, float]]:
        key = (text, None if segments is None else tuple(segments))
        if self._last[0] != key:
            self._last = (key, super().self_information(text, segments))
        return list(self._last[1])


class Fidelity:
    """What a model predicts of the tokens behind a passage."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer

    def of(self, text: str, behind: Sequence[int]) -> Callable[[str], dict[str, float]]:
        """What measures a shortened text against the whole one."""
        full, truth = self.logits(text, behind), torch.tensor(behind)

        def measure(shorter: str) -> dict[str, float]:
            found = self.logits(shorter, behind)
            return {
                "kl": kl_divergence(full, found),
                "nats": nats_per_token(found, truth) - nats_per_token(full, truth),
            }

        return measure

    @torch.inference_mode()
    def logits(self, prompt: str, behind: Sequence[int]) -> torch.Tensor:
        """``(behind, vocabulary)``."""
        start = [] if self.scorer.prefix is None else [self.scorer.prefix]
        ids = torch.tensor([[*start, *encode(self.scorer.tokenizer, [prompt])[0][0], *behind]])
        return self.scorer.model(ids, logits_to_keep=len(behind) + 1).logits[0, :-1].float()


def cut(text: str, tokenizer: Any) -> tuple[str, list[int]]:
    """A passage, and the ids of what follows it."""
    _, spans = encode(tokenizer, [text])[0]
    at = spans[-BEHIND][0]
    return text[:at], encode(tokenizer, [text[at:]])[0][0][:BEHIND]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=Path, nargs="*", default=[], help="texts that nothing was learned from")
    parser.add_argument("--plans", nargs="+", default=list(PLANS), help="text methods")
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--passages", type=int, default=24)
    parser.add_argument("--fidelity", type=int, default=24, help="passages on which fidelity is measured, too")
    parser.add_argument("--chars", type=int, default=1700)
    parser.add_argument("--answers", type=int, default=5, help="of each kind, from a passage")
    parser.add_argument("--protect", default="none", help="what must survive, as in tokenthrift compress")
    parser.add_argument("--out", type=Path, help="JSONL, a line for each passage, method and rate")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    texts = [*topics(), *(text for file in args.files for text in from_file(file))]
    scorer, embedder = Remembering(*tt.load("smollm2-135m")), Embedder(*tt.load("minilm-l6"))
    fidelity = Fidelity(scorer)
    rows = []
    for number, passage in enumerate(passages(texts, args.passages, args.chars, args.seed)):
        text, behind = cut(passage.text, scorer.tokenizer)
        asked = answers(text, args.answers, random.Random(f"{args.seed}/{number}"))
        measure = fidelity.of(text, behind) if number < args.fidelity else lambda _: {}
        for plan in args.plans:
            name, params = _parsed(plan)
            for rate in args.rates:
                out = tt.compress(
                    text, name, rate, tokenizer=scorer.tokenizer, scorer=scorer, embedder=embedder,
                    protect=args.protect, **params,
                )  # fmt: skip
                kept = {kind: [has(out.text, a) for a in group] for kind, group in asked.items()}
                row = {"passage": number, "source": passage.source, "plan": plan, "rate": rate, "kept": out.rate}
                rows.append({**row, **measure(out.text), "answers": kept})
                if args.out is not None:
                    with args.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
        print(f"{number + 1} passages", flush=True)
    print(table(rows, args.plans, args.rates))


def topics() -> list[Text]:
    """Python's own help (PSF licence)."""
    from pydoc_data.topics import topics as found

    return [Text(f"topics/{name}", text) for name, text in sorted(found.items()) if len(text) > 3000]


def table(rows: Sequence[dict], plans: Sequence[str], rates: Sequence[float]) -> str:
    """Markdown: means over passages, the first plan against each other, answers of all kinds together and of each."""
    kinds = sorted({kind for row in rows for kind in row["answers"]})
    lines = [f"| rate | method | kept | KL | KL less the first's (95%) | nats worse | answers | {' | '.join(kinds)} |"]
    lines.append("|--:|---|" + "--:|" * (5 + len(kinds)))
    for rate in rates:
        first = {
            row["passage"]: row["kl"] for row in rows if (row["plan"], row["rate"]) == (plans[0], rate) and "kl" in row
        }
        for plan in plans:
            of = [row for row in rows if row["plan"] == plan and row["rate"] == rate]
            read = [row for row in of if row["passage"] in first]
            mean, low, high = bootstrap({"": [row["kl"] - first[row["passage"]] for row in read]})
            by_kind = {kind: [x for row in of for x in row["answers"][kind]] for kind in kinds}
            cells = [f"{rate}", f"`{plan}`", f"{statistics.mean(r['kept'] for r in of):.3f}"]
            cells += [f"{statistics.mean(r['kl'] for r in read):.3f}" if read else ""]
            cells += [f"{mean:+.3f} ({low:+.2f}…{high:+.2f})" if read and plan != plans[0] else ""]
            cells += [f"{statistics.mean(r['nats'] for r in read):.3f}" if read else ""]
            cells += [_share([x for group in by_kind.values() for x in group]), *map(_share, by_kind.values())]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _share(hits: Sequence[bool]) -> str:
    return f"{sum(hits) / len(hits):.1%}" if hits else ""


def _parsed(plan: str) -> tuple[str, dict]:
    [step] = tt.Plan.parse(f"text={plan}")
    return step.name, dict(step.params)


if __name__ == "__main__":
    main()
