"""Decode methods on prompts of six kinds, beside plain generate and what transformers offers, all in one run.

    python benchmarks/decode_methods.py --prompts-per-kind 36 --out out/decode.jsonl    # all 216 prompts
    python benchmarks/decode_methods.py --batch 8 --prompts-per-kind 16                 # against plain generate of 8
    python benchmarks/decode_methods.py --profile                                       # time outside forwards

For every prompt (every batch of prompts of one kind, left-padded) all ways of decoding run in turn, in an order that
moves on by one from prompt to prompt; each way is compared with the plain generate of the same turn. A way sees each
prompt once, since methods may learn from what they have generated. With --out, results are written prompt by prompt,
and the same command goes on where it stopped; ways that are added later are timed beside a plain generate of their own.
Plans run as ``tt.apply`` runs them, with the product of linear layers that is fastest here (``linears="auto"``); what
that alone makes of plain generate is a way of its own. On a busy machine --cpu compares CPU seconds, which others
disturb less; that is fair with one thread only.

The table has, by kind: tokens a second relative to plain generate, tokens committed a forward, and the share of
generated tokens that plain generate would have written at their place (in float32 100%, but for near-ties).
"""

from __future__ import annotations

import argparse
import cProfile
import inspect
import json
import pstats
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
import transformers

import tokenthrift as tt
from tokenthrift.bench.decoding import KINDS, exact_plans, load_prompts
from tokenthrift.core.errors import ThriftError
from tokenthrift.core.plan import Plan

PLAIN, LOOKUP, ASSISTANT = "plain", "transformers prompt_lookup", "transformers assistant"


DRAFTED = (
    "draft_model(model={}, draft=3, adaptive=False)",
    "dyspec(model={}, nodes=6, adaptive=False)",
    "rsd(model={}, width=2, depth=2, adaptive=False)",
    "spectr(model={}, drafts=2, depth=2, adaptive=False)",
    "sequoia(model={}, nodes=6, depth=3, adaptive=False)",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m", help="model pack, folder or hub id")
    parser.add_argument("--plans", nargs="+", metavar="PLAN", help="default: every exact method that needs no model")
    parser.add_argument("--assistant", metavar="MODEL", help="also run transformers' assistant_model with this one")
    parser.add_argument(
        "--only-plans", action="store_true", help="leave out transformers' own ways, and plain ones but one"
    )
    parser.add_argument(
        "--draft-layers",
        type=int,
        metavar="N",
        help="also run the methods with a draft model, which is the model's own first N layers: to see that the output "
        "is right, not that it is fast, since such a model was not trained to write with them",
    )
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), metavar="KIND", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--prompts-per-kind", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1, help="prompts in a batch")
    parser.add_argument("--out", type=Path, help="JSONL file to write results to, and to go on from")
    parser.add_argument("--cpu", action="store_true", help="compare CPU seconds instead of those on the wall")
    parser.add_argument("--linears", default="auto", help="product of linear layers in the plans (tt.apply's linears)")
    parser.add_argument("--details", action="store_true", help="print a row a prompt, or what takes the time, too")
    parser.add_argument("--profile", action="store_true", help="instead: time outside forwards, on one prompt a kind")
    args = parser.parse_args()
    try:
        run(args)
    except ThriftError as error:
        parser.error(str(error))


def run(args: argparse.Namespace) -> None:
    prompts = load_prompts(1 if args.profile else args.prompts_per_kind, tuple(args.kinds))
    plans = [str(Plan.of(plan)) for plan in args.plans or exact_plans()]
    for plan in plans:
        if "decode" not in Plan.of(plan).stages:
            raise ThriftError(f"the plan '{plan}' has no decode stage: this script compares ways of decoding")
    model, tokenizer = tt.load(args.model)
    if args.draft_layers:
        short = first_layers(
            model, tokenizer, args.draft_layers, Path("out") / f"{Path(args.model).name}-first-{args.draft_layers}"
        )
        plans += [f"decode={plan.format(repr(str(short)))}" for plan in DRAFTED]
        args.assistant = args.assistant or str(short)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    options = {"max_new_tokens": args.new_tokens, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}

    def encode(texts: list[str]) -> Any:
        chats = [[{"role": "user", "content": text}] for text in texts]
        kwargs = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        return tokenizer.apply_chat_template(chats, padding=len(texts) > 1, **kwargs).to(model.device)

    ways: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {PLAIN: (nullcontext, {})}
    if args.batch == 1 and not args.only_plans:  # transformers' own ways take no batches
        ways[LOOKUP] = (nullcontext, {"prompt_lookup_num_tokens": 10})
        if args.assistant:
            ways[ASSISTANT] = (nullcontext, {"assistant_model": tt.load(args.assistant)[0]})
    ways |= {plan: (partial(tt.apply, plan, model, linears=args.linears), {}) for plan in plans}
    with tt.apply(plans[0], model, linears=args.linears) as session:
        product = session.linears
    if product != "torch" and not args.only_plans:  # what of the plans' speed is not drafting
        ways[f"{PLAIN}, {product}"] = (partial(tt.apply, None, model, linears=product), {})
    if args.profile:
        profile(model, [encode([p.prompt]) for p in prompts], options, ways, args.details)
        return

    settings = {
        "model": args.model,
        "linears": args.linears,
        "new_tokens": args.new_tokens,
        "batch": args.batch,
        "threads": torch.get_num_threads(),
    }
    rows, clock = Rows(args.out, settings), "cpu" if args.cpu else "seconds"
    generate_once(model, encode(["Hello."]), {**options, "max_new_tokens": 8}, nullcontext, {})  # a warm-up
    for turn, group in enumerate(groups(prompts, args.batch)):
        missing = [way for way in ways if way != PLAIN and not rows.has(group, way)]
        if not missing:
            continue
        order = [PLAIN, *missing]
        order = order[turn % len(order) :] + order[: turn % len(order)]
        inputs = encode([p.prompt for p in group])
        results = {way: generate_once(model, inputs, options, *ways[way]) for way in order}
        said = results[PLAIN]["tokens"]
        for result in results.values():
            result["equal"] = equal_share(result.pop("tokens"), said)
        results = {way: results[way] for way in (PLAIN, *missing)}
        rows.add({"ids": [p.id for p in group], "kind": group[0].kind, "prompt": inputs["input_ids"].shape[1]}, results)
        speeds = ", ".join(f"{way} {relative(results, way, clock):.2f}x" for way in missing)
        print(f"# {', '.join(p.id for p in group)}: {results[PLAIN]['new']} tokens; {speeds}", flush=True)
    report(rows, list(ways), [p.id for p in prompts], settings, clock, args.details)


def first_layers(model: Any, tokenizer: Any, layers: int, folder: Path) -> Path:
    """A folder with a model of the first layers of this one, and the same embeddings, head and tokenizer."""
    if not 1 <= layers <= len(model.model.layers):
        raise ThriftError(f"--draft-layers takes 1 to {len(model.model.layers)} of this model's layers, not {layers}")
    if not folder.exists():
        whole, model.model.layers = model.model.layers, model.model.layers[:layers]
        model.config.num_hidden_layers = layers
        try:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        finally:
            model.model.layers = whole
            model.config.num_hidden_layers = len(whole)
    return folder


def groups(prompts: list[Any], size: int) -> Iterator[list[Any]]:
    """Batches of prompts of one kind; kinds take turns."""
    by_kind = [[p for p in prompts if p.kind == kind] for kind in dict.fromkeys(p.kind for p in prompts)]
    for start in range(0, max(map(len, by_kind), default=0), size):
        yield from (batch for of_kind in by_kind if (batch := of_kind[start : start + size]))


def generate_once(model: Any, inputs: Any, options: dict[str, Any], way: Callable[[], Any], extra: dict) -> dict:
    """Seconds, tokens, and the forwards that made them, each row's counted."""
    calls: list[int] = []
    length = inputs["input_ids"].shape[1]
    with way() as session:
        handle = model.register_forward_hook(lambda *_: calls.append(1))
        start, start_cpu = perf_counter(), process_time()
        out = model.generate(**inputs, **options, **extra)[:, length:]
        if out.is_cuda:
            torch.cuda.synchronize()
        seconds, cpu = perf_counter() - start, process_time() - start_cpu
        handle.remove()
    tokens = [without_padding(row, model, options["pad_token_id"]) for row in out.tolist()]
    new = sum(map(len, tokens))
    if (
        session is not None and session.records
    ):  # a forward brings a row one token, and those accepted; drafting may run the model, too
        forwards = new - int(session.records["decode"].extra["accepted"])
    else:
        forwards = len(calls) if len(tokens) == 1 else new
    return {"seconds": seconds, "cpu": cpu, "new": new, "forwards": forwards, "tokens": tokens}


def without_padding(row: list[int], model: Any, pad: int) -> list[int]:
    """The tokens up to the first end of sequence, with it."""
    ends = model.generation_config.eos_token_id
    stops = {*(ends if isinstance(ends, list) else [ends]), pad}
    return row[: next((i + 1 for i, token in enumerate(row) if token in stops), len(row))]


def equal_share(ours: list[list[int]], plain: list[list[int]]) -> float:
    """The share of tokens that are those of plain generate, place by place; what is missing or too much is not."""
    same = sum(a == b for x, y in zip(ours, plain, strict=True) for a, b in zip(x, y, strict=False))
    return same / sum(max(len(x), len(y)) for x, y in zip(ours, plain, strict=True))


class Rows:
    """Results, one a group of prompts; what is in the file is not measured again."""

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        self.rows: list[dict[str, Any]] = []
        if path is not None and path.exists():
            text = path.read_text(encoding="utf-8")
            if text and not text.endswith("\n"):  # cut off: what is added begins a line
                path.write_text(text + "\n", encoding="utf-8")
            for number, line in enumerate(text.splitlines(), start=1):
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    print(f"# {path}, line {number} was cut off; it is measured again", flush=True)
                    continue
                if row["settings"] != settings:
                    raise ThriftError(f"{path} has results of other settings ({row['settings']}): choose another file")
                self.rows.append(row)

    def add(self, what: dict[str, Any], results: dict[str, Any]) -> None:
        row = {**what, "results": results, "settings": self.settings}
        self.rows.append(row)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def has(self, group: list[Any], way: str) -> bool:
        return any(row["ids"] == [p.id for p in group] and way in row["results"] for row in self.rows)

    def of(self, way: str, ids: list[str]) -> list[dict[str, Any]]:
        """The rows with results of a way for these prompts; of plain generate's several, the first."""
        found: dict[str, dict[str, Any]] = {}
        for row in self.rows:
            if way in row["results"] and set(row["ids"]) <= set(ids):
                found.setdefault(" ".join(row["ids"]), row)
        return list(found.values())


def relative(results: dict[str, Any], way: str, clock: str) -> float:
    """Tokens a second relative to plain generate."""
    ours, plain = results[way], results[PLAIN]
    return (ours["new"] / ours[clock]) / (plain["new"] / plain[clock])


def summed(rows: list[dict[str, Any]], way: str, clock: str) -> tuple[float, float, float]:
    """Over prompts: tokens a second relative to plain generate's, tokens a forward, share of equal tokens."""

    def total(way: str, key: str) -> float:
        return sum(row["results"][way][key] for row in rows)

    speed = (total(way, "new") / total(way, clock)) / (total(PLAIN, "new") / total(PLAIN, clock))
    equal = sum(row["results"][way]["equal"] * row["results"][way]["new"] for row in rows) / total(way, "new")
    return speed, total(way, "new") / total(way, "forwards"), equal


def quoted(way: str) -> str:
    """Plans as code."""
    return f"`{way}`" if "=" in way else way


def report(rows: Rows, ways: list[str], ids: list[str], settings: dict[str, Any], clock: str, details: bool) -> None:
    """Print the table."""
    kinds = [kind for kind in KINDS if any(row["kind"] == kind for row in rows.of(PLAIN, ids))]
    plain = rows.of(PLAIN, ids)
    seconds = sum(row["results"][PLAIN][clock] for row in plain)
    rate = sum(row["results"][PLAIN]["new"] for row in plain) / seconds if seconds else 0.0
    print(
        f"\n{settings['model']}, {sum(len(row['ids']) for row in plain)} prompts, at most {settings['new_tokens']} new "
        f"tokens, batch {settings['batch']}, {settings['threads']} threads, torch {torch.__version__}, transformers "
        f"{transformers.__version__}; plain generate: {rate:.1f} tokens/s\n\n"
        f"Tokens a {'CPU ' * (clock == 'cpu')}second relative to plain generate:\n\n"
        f"| way | {' | '.join(kinds)} | all | tokens a forward | equal |\n|---|{'--:|' * (len(kinds) + 3)}"
    )
    table = {way: rows.of(way, ids) for way in ways}
    sums = {
        way: [summed([row for row in found if row["kind"] == kind], way, clock) for kind in kinds]
        for way, found in table.items()
    }
    for way, found in table.items():
        speed, forward, equal = summed(found, way, clock)
        cells = [*(f"{s:.2f}" for s, _, _ in sums[way]), f"{speed:.2f}", f"{forward:.2f}", f"{equal:.2%}"]
        print(f"| {quoted(way)} | {' | '.join(cells)} |")
    print(f"\nTokens a forward, the model's own included:\n\n| way | {' | '.join(kinds)} |\n|---|{'--:|' * len(kinds)}")
    for way in ways[1:]:
        print(f"| {quoted(way)} | {' | '.join(f'{forward:.2f}' for _, forward, _ in sums[way])} |")
    worst = {way: min((relative(r["results"], way, clock), *r["ids"]) for r in rows.of(way, ids)) for way in ways[1:]}
    print("\nSlowest: " + ", ".join(f"{way} {low:.2f}x ({first})" for way, (low, first, *_) in worst.items()))
    if details:
        print("\n| prompts | tokens | new | plain s | way | s | x | forwards | equal |")
        print("|---|--:|--:|--:|---|--:|--:|--:|--:|")
        for row in (row for row in rows.rows if set(row["ids"]) <= set(ids)):
            for way, r in row["results"].items():
                if way in ways[1:]:
                    start = f"{', '.join(row['ids'])} | {row['prompt']} | {r['new']}"
                    times = f"{row['results'][PLAIN][clock]:.2f} | {way} | {r[clock]:.2f}"
                    speed = f"{relative(row['results'], way, clock):.2f}"
                    print(f"| {start} | {times} | {speed} | {r['forwards']} | {r['equal']:.1%} |")


def profile(model: Any, batches: list[Any], options: dict[str, Any], ways: dict[str, Any], details: bool) -> None:
    """Where the time outside the model's forwards goes, over one prompt of every kind.

    Drafting counts as time outside, unless it runs the model itself; setting ``generate`` up counts, too.
    """
    inside = 0.0
    forward = model.forward

    def timed(*args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        start = perf_counter()
        try:
            return forward(*args, **kwargs)
        finally:
            inside += perf_counter() - start

    timed.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    print("| way | seconds | outside forwards | share | drafting | share |\n|---|--:|--:|--:|--:|--:|")
    for name, (way, extra) in ways.items():
        inside, total, model.forward = 0.0, 0.0, timed
        try:
            with way() as session:
                for inputs in batches:
                    start = perf_counter()
                    model.generate(**inputs, **options, **extra)
                    total += perf_counter() - start
        finally:
            del model.forward
        record = getattr(session, "records", {}).get("decode")
        drafting = record.extra["draft_seconds"] if record else 0.0
        outside = total - inside
        print(
            f"| {quoted(name)} | {total:.2f} | {outside:.3f} | {outside / total:.1%} "
            f"| {drafting:.3f} | {drafting / total:.1%} |"
        )
    for name, (way, extra) in ways.items() if details else ():
        print(f"\n{name}")
        with way(), cProfile.Profile() as profiler:
            model.generate(**batches[0], **options, **extra)
        pstats.Stats(profiler).sort_stats("tottime").print_stats("tokenthrift|generation/utils|argmax|tolist|cat", 15)


if __name__ == "__main__":
    main()
