"""Label the words of real text: what each costs the language model, and what its removal costs what follows.

    python training/word_head/make_labels.py --out labels.jsonl --files jargon.txt.gz --packages numpy scipy

Appends a line a passage and goes on where it ended; the same arguments make the same labels.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
from corpus import from_file, from_package, passages
from labels import AHEAD, judge

import tokenthrift as tt
from tokenthrift.models.scoring import Scorer
from tokenthrift.text.spans import words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSONL, a line a passage")
    parser.add_argument("--files", type=Path, nargs="*", default=[], help="text files, plain or gzipped")
    parser.add_argument("--packages", nargs="*", default=[], help="installed packages, for their documentation")
    parser.add_argument("--count", type=int, default=200, help="passages")
    parser.add_argument("--chars", type=int, default=1300, help="characters of a passage, about")
    parser.add_argument("--asked", type=int, default=24, help="words of a passage that are removed, one at a time")
    parser.add_argument("--ahead", type=int, default=AHEAD, help="tokens behind a word that are predicted without it")
    parser.add_argument("--model", default="smollm2-135m", help="the language model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    texts = [text for file in args.files for text in from_file(file)]
    texts += [text for name in args.packages for text in from_package(name)]
    chosen = passages(texts, args.count, args.chars, args.seed)
    done = len(args.out.read_text(encoding="utf-8").splitlines()) if args.out.is_file() else 0
    scorer = Scorer(*tt.load(args.model))
    start = time.perf_counter()
    with args.out.open("a", encoding="utf-8") as out:
        for number, passage in list(enumerate(chosen))[done:]:
            units = words(passage.text)
            asked = sorted(
                random.Random(f"{args.seed}/{number}").sample(range(len(units)), min(args.asked, len(units)))
            )
            found = judge(scorer, passage.text, units, asked, args.ahead)
            rows = [[j.tokens, round(j.own, 4), [round(x, 3) for x in j.later]] for j in found]
            out.write(json.dumps({"source": passage.source, "text": passage.text, "words": rows}) + "\n")
            out.flush()
            print(f"{number + 1}/{len(chosen)} passages, {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
