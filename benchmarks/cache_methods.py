"""Every method of the cache, attention and prefill stages at three budgets: fidelity, recall, bytes, TTFT, ms/token.

    python benchmarks/cache_methods.py --tokens 2048 4096 --out out/cache.jsonl
    python benchmarks/cache_methods.py --peer-python PATH    # a Python of its own with kvpress==0.5.5

The prompt is real text (the Python documentation that comes with Python, PSF licence) with eight facts spread over it.
After every method the same is measured: how far the next tokens' distributions are from the unmodified model's on the
text's own continuation, decoded token by token, and how many of the facts greedy decoding still recalls. The prompt's
last line says what will be asked. The unmodified model reads the prompt before every method, and kvpress after every
plan that it has. Decoding takes turns of a few tokens, unmodified, ours, kvpress, and a ratio is the median of the
turns' ratios, so that a busy machine slows all alike. Results are appended to ``--out`` as they come, and a run that
was interrupted goes on there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import transformers
from cache_probe import pace, probe
from decode_methods import first_layers

import tokenthrift as tt

KVPRESS = {
    "cache=ada_kv(budget={b})": "AdaKVPress(SnapKVPress(compression_ratio={r}, window_size=32, kernel_size=5))",
    "cache=expected_attention(budget={b})": "ExpectedAttentionPress(compression_ratio={r})",
    "cache=h2o(budget={b}, recent=0, per_query=True)": "ObservedAttentionPress(compression_ratio={r})",
    "cache=keydiff(budget={b})": "KeyDiffPress(compression_ratio={r})",
    "cache=knorm(budget={b})": "KnormPress(compression_ratio={r})",
    "cache=lagkv(budget={b}, lag=64)": "LagKVPress(compression_ratio={r}, n_sink=4, lag_size=64)",
    "cache=pyramid_kv(budget={b})": "PyramidKVPress(compression_ratio={r}, window_size=8, kernel_size=5, beta=20)",
    "cache=snapkv(budget={b})": "SnapKVPress(compression_ratio={r}, window_size=32, kernel_size=5)",
    "cache=streaming_llm(budget={b})": "StreamingLLMPress(compression_ratio={r}, n_sink=4)",
    "cache=tova(budget={b})": "TOVAPress(compression_ratio={r})",
}
"""Plans and what kvpress calls them; {b} is the budget, {r} the share that goes."""
PLANS = (
    *KVPRESS,
    "cache=dapq(budget={b})",
    "cache=ems(budget={b})",
    "cache=h2o(budget={b})",
    "cache=razor_attention(budget={b})",
    "cache=spatten(budget={b})",
    "cache=speckv(budget={b})",
    "cache=tca_attention(budget={b})",
    "cache=tree_kv(budget={b})",
    "attention=fasa(budget={b})",
    "attention=quest(budget={b})",
    "attention=tidal_decode(budget={b})",
    "attention=token_select(budget={b})",
    "prefill=dhsa(budget={b})",
    "prefill=gemfilter(budget={b})",
    "prefill=lazy_llm(keep={k})",
    "prefill=spatten_cascade(keep={k})",
    "prefill=specpc(model={draft!r}, budget={b})",
    "prefill=token_sparse_attention(coverage=0.05, min_tokens={b})",
)
"""{k} is the share that stays, {draft} a model of the first quarter of the layers."""
FACTS = {
    "harbour": "copper", "castle": "violin", "orchard": "seven", "library": "lemon",
    "mountain": "winter", "bakery": "falcon", "theatre": "silver", "garden": "pepper",
}  # fmt: skip
"""Places and their passwords."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a pack or a folder")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--budgets", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--plans", nargs="+", default=list(PLANS))
    parser.add_argument("--steps", type=int, default=24, help="tokens of the text's continuation that are compared")
    parser.add_argument("--turns", type=int, default=5, help="of ten decoded tokens, the first two not timed")
    parser.add_argument("--linears", default="torch", help="product of our linear layers, see tokenthrift.apply")
    parser.add_argument("--peer-python", help="a Python with kvpress==0.5.5")
    parser.add_argument("--out", type=Path, default=Path("out/cache_methods.jsonl"))
    args = parser.parse_args()

    args.out.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    product = [] if args.linears == "torch" else [args.linears]
    model, tokenizer = tt.load(args.model)
    layers = model.config.num_hidden_layers // 4
    draft = str(first_layers(model, tokenizer, layers, Path("out") / f"{Path(args.model).name}-first-{layers}"))
    with tempfile.TemporaryDirectory() as folder:
        peer = Peer(args.peer_python, args.model) if args.peer_python else None
        for tokens in args.tokens:
            ids, text, facts = made_prompt(tokenizer, tokens, args.steps)
            reference = None
            for plan in args.plans:
                plain: dict[str, Any] = {}
                for budget in args.budgets:
                    key = [tokens, plan, budget, *product]
                    if any(row["key"] == key for row in done):
                        continue
                    if reference is None:
                        probe(model, ids[:256], text, [])  # warm-up
                        full = probe(model, ids, text, facts)
                        reference = full["logp"]
                        torch.save(reference, f"{folder}/reference.pt")
                    share = budget / tokens
                    call = plan.format(b=budget, k=round(share, 4), draft=draft)
                    press = KVPRESS[plan].format(r=1 - share) if peer is not None and plan in KVPRESS else None
                    try:
                        session = tt.apply(call, model, linears=args.linears)
                    except tt.ThriftError as error:
                        print(f"# {call}: {error}")
                        continue
                    plain = plain or probe(model, ids, text[:1], [])
                    with session:
                        ours = probe(model, ids, text, facts, reference)
                    theirs = peer.ask(press, ids, text, f"{folder}/reference.pt") if peer and press else {}
                    turns = []
                    for _ in range(args.turns):
                        turn = [pace(model, plain["cache"], text[:10], tokens)]
                        with session:
                            turn.append(pace(model, ours["cache"], text[:10], tokens))
                        if peer and press:
                            turn.append(peer.pace(text[:10], tokens))
                        turns.append(turn)
                    row = {"key": key, "call": call.replace(draft, f"first {layers} layers"), "all": full["score"]}
                    row |= row_of(plain, ours, theirs, turns)
                    done.append(row)
                    with args.out.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    print(line(row["call"], [row]), flush=True)
    print_tables(args, [row for row in done if row["key"][3:] == product])


def made_prompt(tokenizer: Any, tokens: int, steps: int) -> tuple[list[int], list[int], list[Any]]:
    """Ids of a prompt with facts at eight depths, of how its text goes on, and questions with their answers."""
    prose = "\n\n".join(sorted(topics.values(), key=len, reverse=True)[:8])
    asked = [tokenizer(f"\nThe password of the {place} is")["input_ids"] for place in FACTS]
    said = [tokenizer(f"\nThe password of the {place} is {word}.\n")["input_ids"] for place, word in FACTS.items()]
    *others, last = FACTS
    end = tokenizer(f"\n\nRemember the password of the {', the '.join(others)} and the {last}.\n\n")["input_ids"]
    body = tokenizer(prose)["input_ids"]
    room = tokens - sum(map(len, said)) - len(end)
    ids: list[int] = []
    for i, fact in enumerate(said):
        ids += body[room * (2 * i - 1) // (2 * len(said)) if i else 0 : room * (2 * i + 1) // (2 * len(said))] + fact
    ids += body[len(ids) - sum(map(len, said)) : room] + end
    assert len(ids) == tokens
    # A statement ends with its answer, a full stop and the end of the line.
    facts = [(question, fact[len(question) : -2]) for question, fact in zip(asked, said, strict=True)]
    return ids, body[room : room + steps], facts


class Peer:
    """kvpress in a process of its own, which waits while it is not asked."""

    def __init__(self, python: str, model: str) -> None:
        from tokenthrift.models.packs import PACKS, pack_path

        folder = pack_path(model) if model in PACKS else Path(model)
        script = str(Path(__file__).with_name("cache_probe.py"))
        self.process = subprocess.Popen(
            [python, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._send({"threads": torch.get_num_threads(), "model": str(folder)})

    def ask(self, press: str, ids: list[int], text: list[int], reference: str) -> dict[str, Any]:
        return self._send({"press": press, "ids": ids, "text": text, "reference": reference})

    def pace(self, text: list[int], seen: int) -> float:
        """Seconds a token of the last job's cache."""
        return float(self._send({"pace": text, "seen": seen})["decode"])

    def _send(self, job: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"the peer stopped at {job.get('press', 'its start')}: run cache_probe.py to see why")
        return json.loads(answer)


def row_of(
    plain: dict[str, Any], ours: dict[str, Any], theirs: dict[str, Any], turns: list[list[float]]
) -> dict[str, Any]:
    """What a line of the table says; ``turns`` have seconds a token, unmodified, ours and, if there, theirs."""

    def ratio(to: int) -> float:
        return statistics.median(turn[1] / turn[to] for turn in turns)

    row = {name: ours[name] for name in ("ttft", "kl", "top1", "score")} | {"turns": turns}
    row["bytes"] = ours["bytes"] / plain["bytes"]
    row["ttft_full"] = ours["ttft"] / plain["ttft"]
    row["decode"], row["decode_full"] = statistics.median(turn[1] for turn in turns), ratio(0)
    if theirs:
        row["ttft_to_peer"], row["decode_to_peer"] = ours["ttft"] / theirs["ttft"], ratio(2)
        row["kl_peer"], row["bytes_peer"] = theirs["kl"], theirs["bytes"] / plain["bytes"]
        if ours["bytes"] == theirs["bytes"]:
            away = (torch.tensor(ours["keys"]) - torch.tensor(theirs["keys"])).abs().amax(-1)
            row["same"] = float((away < 0.05).float().mean())
    return row


def line(name: str, rows: list[dict[str, Any]]) -> str:
    """A line of a table, with the values of these rows in each cell."""
    return f"| `{name}` | " + " | ".join(cell(rows, *column) for column in COLUMNS) + " |"


def print_tables(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """A table for each length of prompt, with a line a plan: each cell has a value for each budget."""
    for tokens in args.tokens:
        of = {tuple(row["key"][1:3]): row for row in rows if row["key"][0] == tokens}
        lines = []
        for plan in args.plans:
            found = [of.get((plan, budget), {}) for budget in args.budgets]
            if any(found):
                lines.append(line(name_of(plan), found))
        if lines:
            print(
                f"\n{args.model}, {tokens} tokens, float32, {torch.get_num_threads()} threads, transformers "
                f"{transformers.__version__}; the unmodified model recalls {next(iter(of.values()))['all']:.0%} of the "
                f"facts; budgets {', '.join(map(str, args.budgets))}\n"
            )
            print("| plan | " + " | ".join(head for head, *_ in COLUMNS) + " |\n|---|" + "--:|" * len(COLUMNS))
            print("\n".join(lines))


COLUMNS = (
    ("KL", "kl", "{:.3f}"),
    ("top-1", "top1", "{:.0%}"),
    ("recall", "score", "{:.0%}"),
    ("KV bytes", "bytes", "{:.2f}×"),
    ("TTFT s", "ttft", "{:.1f}"),
    ("vs full", "ttft_full", "{:.2f}×"),
    ("decode ms/token", "decode_ms", "{:.0f}"),
    ("vs full", "decode_full", "{:.2f}×"),
    ("kvpress: KL", "kl_peer", "{:.3f}"),
    ("heads with the same entries", "same", "{:.0%}"),
    ("TTFT, ours/theirs", "ttft_to_peer", "{:.2f}×"),
    ("decode, ours/theirs", "decode_to_peer", "{:.2f}×"),
)
"""Of the tables: heading, what of a row, and how it is written."""


def cell(rows: list[dict[str, Any]], head: str, name: str, form: str) -> str:
    """The rows' values, one behind the other; nothing where none has one."""
    values = [row | {"decode_ms": row["decode"] * 1000} if row else {} for row in rows]
    if not any(name in row for row in values):
        return ""
    return " / ".join(form.format(row[name]) if name in row else "–" for row in values)


def name_of(plan: str) -> str:
    """A plan without what differs between the rows."""
    for part in (", budget={b}", "budget={b}, ", "budget={b}", ", min_tokens={b}", "keep={k}"):
        plan = plan.replace(part, "")
    return plan.replace("model={draft!r}", "model='first layers'")


if __name__ == "__main__":
    main()
