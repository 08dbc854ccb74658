"""Prompt lookup on SmolLM2-135M: plain generate, transformers' own prompt lookup, and this library's, side by side.

    python benchmarks/decode_prompt_lookup.py [--rounds 3] [--new-tokens 160] [--profile]

Prompts ask to repeat or edit source code and documentation that come with Python, and, as a control, open questions
where there is nothing to copy. For every prompt the three ways run in turn, in one process, `rounds` times; medians are
printed, with the share of tokens equal to plain greedy decoding (which must be 100% in float32).
"""

from __future__ import annotations

import argparse
import colorsys
import cProfile
import heapq
import inspect
import json.decoder
import pstats
import statistics
import textwrap
from contextlib import nullcontext
from pydoc_data.topics import topics
from time import perf_counter

import torch

import tokenthrift as tt


def prompts() -> list[tuple[str, str]]:
    """Pairs of kind and prompt."""
    code = {f.__name__: textwrap.dedent(inspect.getsource(f)) for f in (colorsys.rgb_to_hls, heapq.nsmallest)}
    code["decode"] = textwrap.dedent(inspect.getsource(json.decoder.JSONDecoder.raw_decode))
    text = {k: " ".join(topics[k].split())[:700] for k in ("assert", "global", "lambda")}
    repeat = "Repeat the following exactly, and write nothing else:\n\n"
    return [
        *(("repeat code", repeat + c[:900]) for c in code.values()),
        *(("repeat text", repeat + t) for t in text.values()),
        ("edit code", "Rename the function rgb_to_hls to convert in this code:\n\n" + code["rgb_to_hls"]),
        ("edit code", "Add a comment line at the top of this code:\n\n" + code["decode"]),
        ("edit text", "Correct the spelling of this text:\n\n" + text["assert"].replace("the", "teh")),
        ("open", "Why is the sky blue?"),
        ("open", "Write a short story about a lighthouse keeper."),
        ("open", "What should I consider before I buy a bicycle?"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=160)
    parser.add_argument("--plan", default="decode=prompt_lookup()")
    parser.add_argument(
        "--profile", action="store_true", help="profile our Python overhead on the first prompt instead"
    )
    args = parser.parse_args()
    model, tokenizer = tt.load("smollm2-135m")
    options = {"max_new_tokens": args.new_tokens, "do_sample": False}

    def inputs_of(prompt: str) -> dict[str, torch.Tensor]:
        chat = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)

    if args.profile:
        profile(model, inputs_of(prompts()[0][1]), options, args.plan)
        return
    ways = {"plain": {}, "transformers": {"prompt_lookup_num_tokens": 10}, "ours": {}}
    rows = []
    for kind, prompt in prompts():
        inputs = inputs_of(prompt)
        length = inputs["input_ids"].shape[1]
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        forwards, outputs = dict.fromkeys(ways, 0), {}
        for _ in range(args.rounds):
            for way, extra in ways.items():
                session = tt.apply(args.plan, model) if way == "ours" else nullcontext()
                calls: list[int] = []
                handle = model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
                with session:
                    start = perf_counter()
                    out = model.generate(**inputs, **options, **extra)
                    seconds[way].append(perf_counter() - start)
                handle.remove()
                forwards[way], outputs[way] = len(calls), out[0, length:].tolist()
                if way == "ours":
                    extra_counts = session.records["decode"].extra
        new = len(outputs["plain"])
        median = {way: statistics.median(s) for way, s in seconds.items()}
        equal = sum(a == b for a, b in zip(outputs["plain"], outputs["ours"], strict=False)) / new
        equal *= len(outputs["ours"]) == new
        rows.append((kind, length, new, median, forwards, extra_counts, equal))
        print(f"# {kind}: {tokenizer.decode(outputs['plain'])[:70]!r}", flush=True)

    report(rows, f"plan `{args.plan}`, {torch.get_num_threads()} threads, {model.dtype}, {args.rounds} rounds")


def report(rows: list, title: str) -> None:
    """Print the table and the median speed-ups."""
    columns = ["task", "prompt", "new", "plain s", "transformers s", "ours s", "transformers x", "ours x"]
    columns += ["forwards (transformers / ours)", "accepted length", "equal"]
    print(f"\n{title}\n\n| {' | '.join(columns)} |\n|---|{'--:|' * (len(columns) - 1)}")
    speeds: dict[str, dict[str, list[float]]] = {"repeat and edit": {}, "open": {}}
    for kind, length, new, median, forwards, extra, equal in rows:
        times = {way: median["plain"] / seconds for way, seconds in median.items()}
        for way in ("transformers", "ours"):
            speeds["open" if kind == "open" else "repeat and edit"].setdefault(way, []).append(times[way])
        cells = [kind, length, new, *(f"{s:.2f}" for s in median.values())]
        cells += [f"{times['transformers']:.2f}", f"{times['ours']:.2f}"]
        cells += [f"{forwards['transformers']} / {forwards['ours']}", f"{extra['mean_accepted_length']:.2f}"]
        print(f"| {' | '.join(map(str, cells))} | {equal:.0%} |")
    for name, of in speeds.items():
        ways = ", ".join(f"{way} {statistics.median(times):.2f} (worst {min(times):.2f})" for way, times in of.items())
        print(f"\nmedian speed-up, {name}: {ways}")


def profile(model, inputs, options, plan: str) -> None:
    """Where the time outside the model's forwards goes."""
    inside = 0.0
    forward = model.forward

    def timed(*args, **kwargs):
        nonlocal inside
        start = perf_counter()
        try:
            return forward(*args, **kwargs)
        finally:
            inside += perf_counter() - start

    timed.__signature__ = inspect.signature(forward)
    for name in (None, plan):
        inside, model.forward = 0.0, timed
        with tt.apply(name, model):
            start = perf_counter()
            model.generate(**inputs, **options)
            total = perf_counter() - start
        del model.forward
        print(f"{name or 'plain'}: {total:.3f} s, outside forwards {total - inside:.4f} s = {1 - inside / total:.1%}")
    with tt.apply(plan, model), cProfile.Profile() as profiler:
        model.generate(**inputs, **options)
    pstats.Stats(profiler).sort_stats("tottime").print_stats("tokenthrift|generation/utils|argmax|tolist|cat", 15)


if __name__ == "__main__":
    main()
