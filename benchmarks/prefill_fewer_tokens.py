"""Prefill plans on long prompts: time to the first token, decode speed, FLOPs and bytes, beside the unmodified model.

    python benchmarks/prefill_fewer_tokens.py --tokens 2048 4096
    python benchmarks/prefill_fewer_tokens.py --model tiny --tokens 256   # a quick look

The plans take turns with the unmodified model in one process; medians of `--repeats`, as ratios to it. The text is the
Python documentation that comes with Python (`pydoc_data.topics`, PSF licence).
"""

from __future__ import annotations

import argparse
import json
import statistics
from contextlib import nullcontext
from pydoc_data.topics import topics
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

import tokenthrift as tt

PLANS = (
    "prefill=spatten_cascade(keep=0.3)",
    "prefill=spatten_cascade(keep=0.6)",
    "prefill=spatten_cascade(keep=0.3, heads=0.625)",
    "prefill=spatten_cascade(keep=0.3, values=0.3)",
    "prefill=lazy_llm(keep=0.3)",
    "prefill=gemfilter(budget=0.3)",
    "cache=spatten(budget=0.3)",
)


def model_and_text(name: str) -> tuple[Any, Tensor]:
    if name == "tiny":
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = LlamaConfig(vocab_size=1000, num_hidden_layers=8, max_position_embeddings=8192, **sizes)
        return LlamaForCausalLM(config).eval(), torch.randint(3, 1000, (1, 8192))
    model, tokenizer = tt.load(name)
    return model, torch.tensor([tokenizer("\n".join(topics[name] for name in sorted(topics)))["input_ids"]])


@torch.no_grad()
def once(model: Any, ids: Tensor, steps: int) -> tuple[float, float]:
    """Seconds to the first token, and a later token's."""
    start = perf_counter()
    out = model(ids, use_cache=True, logits_to_keep=1)
    first = perf_counter() - start
    times = []
    for _ in range(steps):
        token = out.logits[:, -1:].argmax(-1)
        start = perf_counter()
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
        times.append(perf_counter() - start)
    return first, statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a pack, a folder, a hub id, or tiny")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048])
    parser.add_argument("--steps", type=int, default=16, help="tokens to decode")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plans", nargs="+", default=PLANS)
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    args = parser.parse_args()
    model, text = model_and_text(args.model)
    for n in args.tokens:
        ids, plans = text[:, :n], ("", *args.plans)
        if ids.shape[1] < n:
            parser.error(f"the text has {ids.shape[1]} tokens only")
        times: dict[str, list[tuple[float, float]]] = {plan: [] for plan in plans}
        shown: dict[str, dict[str, float]] = {}
        for _ in range(args.repeats):
            for plan in plans:
                with tt.apply(plan, model) if plan else nullcontext() as session:
                    times[plan].append(once(model, ids, args.steps))
                if session is not None:
                    stage = next(iter(session.report().stages.values()))
                    shown[plan] = {"flops": session.flops / session.flops_dense, "kept": stage.kept}
                    if stage.bytes_before:
                        shown[plan]["kv_bytes"] = stage.bytes_after / stage.bytes_before
        first, later = (statistics.median(t[i] for t in times[""]) for i in (0, 1))
        print(f"{n} tokens: first token {first:.3f} s, later ones {later * 1000:.1f} ms")
        for plan in args.plans:
            row = {
                "ttft": statistics.median(t[0] for t in times[plan]) / first,
                "decode": statistics.median(t[1] for t in times[plan]) / later,
                **shown[plan],
            }
            if args.json:
                print(json.dumps({"tokens": n, "plan": plan, **row}))
            else:
                print(f"  {plan:50}" + "  ".join(f"{k} {v:.2f}" for k, v in row.items()))


if __name__ == "__main__":
    main()
