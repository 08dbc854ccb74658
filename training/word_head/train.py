"""Train the word head on labels, with the encoder frozen, and write its weights and card.

python training/word_head/train.py --labels labels.jsonl --out src/tokenthrift/data/word_head
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from pathlib import Path

import torch
from fit import examples, fit, read_labels

import tokenthrift as tt
from tokenthrift.models.word_head import WordHead, WordScorer, save_word_head


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=Path, required=True, help="what make_labels.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights and the card")
    parser.add_argument("--encoder", default="minilm-l6", help="pack, folder or hub id of a BERT-type encoder")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 3, 6], help="hidden states that the head reads")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--later", type=float, default=1.0, help="weight of what follows in a word's worth")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--held-out", type=float, default=0.15, help="share of the passages that are only tested on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rows = read_labels(args.labels)
    random.Random(args.seed).shuffle(rows)
    encoder, tokenizer = tt.load(args.encoder)
    head = WordHead(encoder.config.hidden_size, args.layers, args.width, args.later)
    found = examples(rows, WordScorer(encoder, tokenizer, head))
    tested = max(1, round(len(found) * args.held_out))
    fitted = fit(head, found[tested:], found[:tested], epochs=args.epochs, lr=args.lr, seed=args.seed)
    sources = Counter(row["source"].split("/")[0] for row in rows)
    card = {
        "encoder": args.encoder,
        "passages": len(rows),
        "words": fitted.words,
        "removed": fitted.removed,
        "sources": dict(sorted(sources.items())),
        "held_out": {
            "passages": tested,
            "rank correlation of own": round(fitted.own, 3),
            "rank correlation of later": round(fitted.later, 3),
        },
        "settings": {"epochs": args.epochs, "best": fitted.best, "lr": args.lr, "seed": args.seed},
    }
    save_word_head(head, args.out, card)
    print(f"held-out losses: {' '.join(f'{loss:.3f}' for loss in fitted.losses)}")
    print(f"rank correlations on held-out passages: own {fitted.own:.3f}, later {fitted.later:.3f}")


if __name__ == "__main__":
    main()
