"""LLMLingua and LongLLMLingua beside the `llmlingua` package, on the same weights: kept tokens and throughput.

    python benchmarks/text_llmlingua.py --peer-python PATH --tokens 500 1000 --rates 0.5 0.33

PATH is a Python of its own with llmlingua==0.2.2 and transformers < 4.48. The text is the Python documentation that
comes with Python (PSF licence), its longest topics as documents. ``compat="llmlingua"`` is compared token by token;
the default is timed beside it. Ours and theirs take turns, and ratios are medians of the turns' ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
from difflib import SequenceMatcher
from pathlib import Path
from pydoc_data.topics import topics
from time import perf_counter
from typing import Any

import torch

import tokenthrift as tt
from tokenthrift.models.packs import PACKS, pack_path
from tokenthrift.models.scoring import Scorer
from tokenthrift.ops.tokens import encode, token_spans

QUESTION = "How are the names of attributes looked up?"
THEIRS: dict[str, dict[str, Any]] = {
    "llmlingua": {"rank_method": "llmlingua"},
    "longllmlingua": {
        "rank_method": "longllmlingua",
        "question": QUESTION,
        "concate_question": False,
        "condition_in_question": "after_condition",
        "condition_compare": True,
        "dynamic_context_compression_ratio": 0.3,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a pack or a folder")
    parser.add_argument("--tokens", type=int, nargs="+", default=[500, 1000, 2000])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 0.33])
    parser.add_argument("--documents", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--methods", nargs="+", default=list(THEIRS), choices=list(THEIRS))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--peer-python", required=True, help="a Python with llmlingua==0.2.2")
    args = parser.parse_args()

    scorer = Scorer(*tt.load(args.model))
    print("| method | documents | tokens | rate | theirs keeps | same tokens | compat, time to theirs | default |")
    print("|---|" + "--:|" * 7)
    with tempfile.TemporaryDirectory() as folder:
        peer = Peer(args.peer_python, args.model, Path(folder))
        for name in args.methods:
            for count in args.documents:
                for tokens in args.tokens:
                    documents = made_documents(scorer.tokenizer, tokens, count)
                    for rate in args.rates:
                        print(compared(name, documents, rate, scorer, peer, args.turns), flush=True)


def compared(name: str, documents: list[str], rate: float, scorer: Scorer, peer: Peer, turns: int) -> str:
    """A line of the table."""
    text, question = "\n\n".join(documents), QUESTION if name == "longllmlingua" else None
    total = sum(len(ids) for ids, _ in encode(scorer.tokenizer, documents))
    target = int(rate * total)
    job = {"documents": documents, "target_token": target, "use_sentence_level_filter": False, **THEIRS[name]}
    # What is protected would be added to what the authors choose.
    options = {"question": question, "scorer": scorer, "separator": "\n\n", "protect": "none"}
    compat, default = [], []
    for _ in range(turns):
        theirs = peer.send(job)
        start = perf_counter()
        ours = tt.compress(text, name, rate=target, compat="llmlingua", **options)
        middle = perf_counter()
        tt.compress(text, name, rate=rate, **options)
        compat.append((middle - start) / theirs["seconds"])
        default.append((perf_counter() - middle) / theirs["seconds"])
    same = agreement(scorer.tokenizer, ours, theirs["ids"])
    return (
        f"| `{name}` | {len(documents)} | {total} | {rate} | {len(theirs['ids'])} | {same:.1%} "
        f"| {statistics.median(compat):.2f}× | {statistics.median(default):.2f}× |"
    )


def agreement(tokenizer: Any, ours: Any, theirs: list[int]) -> float:
    """Share of the tokens kept that both keep, in order."""
    left = {c for start, end in ours.kept for c in range(start, end)}
    ids, spans = encode(tokenizer, [ours.original])[0]
    kept = [token for token, span in zip(ids, spans, strict=True) if left.issuperset(range(*span))]
    blocks = SequenceMatcher(None, kept, theirs, autojunk=False).get_matching_blocks()
    return 2 * sum(block.size for block in blocks) / (len(kept) + len(theirs))


def made_documents(tokenizer: Any, tokens: int, count: int) -> list[str]:
    """So many documents, with about so many tokens in all."""
    chosen = sorted(topics.values(), key=len, reverse=True)[:count]
    each = tokens // count
    texts = ["\n".join(line.strip() for line in text.split("\n") if line.strip()) for text in chosen]
    return [text[: token_spans(tokenizer, text[: each * 8])[each - 1][1]].strip() for text in texts]


class Peer:
    """The package in a process of its own, which waits while it is not asked."""

    def __init__(self, python: str, model: str, folder: Path) -> None:
        source = pack_path(model) if model in PACKS else Path(model)
        for file in source.iterdir():
            (folder / file.name).symlink_to(file)
        config = json.loads((source / "config.json").read_text())
        config |= {"torch_dtype": "float32", **config.pop("rope_parameters", {})}  # what older versions look for
        (folder / "config.json").unlink()
        (folder / "config.json").write_text(json.dumps(config))
        script = str(Path(__file__).with_name("text_llmlingua_peer.py"))
        self.process = subprocess.Popen(
            [python, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.send({"threads": torch.get_num_threads(), "model": str(folder)})

    def send(self, job: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit("the peer stopped: run text_llmlingua_peer.py to see why")
        found: dict[str, Any] = json.loads(answer)
        return found


if __name__ == "__main__":
    main()
