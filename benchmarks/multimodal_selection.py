"""What choosing visual tokens costs: every connector method, as a share of the prefill that it shortens.

    python benchmarks/multimodal_selection.py [--tokens 576 2880] [--keep 0.11] [--text 64] [--repeats 5]

The features are random. 576 tokens are an image of 24 x 24; more are a whole image and crops of that size. What a
method asks of the encoder (CLS rows, attention received, keys, hidden states) is computed in the time that is shown,
from queries and keys of 16 heads of 64; the encoder itself is not. The prefill is that of a random Llama layer of
LLaVA-1.5-7B's shape in float32, times its 32 layers, for all visual tokens and some text: one layer stands for all.
Then max-min selection of 10% of the largest number of tokens beside a loop that reads the rows of all tokens chosen so
far in every step, as the authors' code of DivPrune does. Medians, all in one run.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

import tokenthrift as tt
from tokenthrift.core.method import find
from tokenthrift.core.view import Lazy, Segment, View
from tokenthrift.ops.diversity import max_min_diversity

SIDE, HEADS, HEAD_DIM, LAYERS = 24, 16, 64, 24


def view_of(n: int, dim: int) -> View:
    """A view as the connector stage would offer it, of one image."""
    patches, make = SIDE * SIDE, torch.Generator().manual_seed(0)
    count = n // patches
    query, key = (torch.randn(count, HEADS, 1 + patches, HEAD_DIM, generator=make) for _ in range(2))
    hidden, features = (torch.randn(1, n, dim, generator=make) for _ in range(2))
    text = torch.randn(1, 64, dim, generator=make)
    mask = torch.ones(1, n, dtype=torch.bool)
    segments = [Segment(0, 1, SIDE, SIDE, "image", 0, 0)]
    segments += [Segment(i * patches, 1, SIDE, SIDE, "crop", (i - 1) // 2, (i - 1) % 2) for i in range(1, count)]

    def attention(rows: slice) -> Tensor:
        return (query[:, :, rows] * HEAD_DIM**-0.5 @ key.transpose(-1, -2)).softmax(-1)

    def received(_layer: int) -> Tensor:
        blocks = [attention(slice(i, i + 64)).sum((1, 2)) for i in range(0, 1 + patches, 64)]
        return (torch.stack(blocks).sum(0)[:, 1:] / (HEADS * (1 + patches))).reshape(1, n)

    view = View(features=Lazy(lambda: features), mask=mask, protected=~mask, layers=LAYERS, segments=tuple(segments))
    view.offer("cls", lambda _layer: attention(slice(0, 1))[:, :, 0, 1:].transpose(0, 1).reshape(1, HEADS, n))
    view.offer("received", received)
    view.offer("keys", lambda _layer: key[:, :, 1:].transpose(0, 1).reshape(1, HEADS, n, HEAD_DIM))
    view.offer("hidden", lambda _layer: hidden)
    view.offer("text", text)
    view.offer("text_mask", torch.ones(1, 64, dtype=torch.bool))
    return view


def seconds(function: Callable[[], Any], repeats: int) -> float:
    """Median time of a call, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        start = perf_counter()
        function()
        times.append(perf_counter() - start)
    return statistics.median(times[1:])


def prefill_seconds(tokens: int, hidden: int, inner: int, layers: int, repeats: int) -> float:
    """A decoder's prefill, from one of its layers."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    heads = hidden // 128 or 1
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_attention_heads=heads, num_key_value_heads=heads
    )
    config._attn_implementation = "sdpa"
    layer, x = LlamaDecoderLayer(config, 0).eval(), torch.randn(1, tokens, hidden)
    turns = LlamaRotaryEmbedding(config)(x, torch.arange(tokens)[None])
    return layers * seconds(lambda: layer(x, position_embeddings=turns), repeats)


def authors_loop(d: Tensor, count: int) -> Tensor:
    """DivPrune's selection, restated: each step reads the distances of all tokens chosen so far."""
    chosen = torch.empty(count, dtype=torch.int64)
    for i in range(count):
        if i == 0:
            scores = d.topk(2, dim=0, largest=False).values[1]
        else:
            scores = d.index_select(0, chosen[:i]).min(0).values
        chosen[i] = scores.argmax()
    return chosen


def compare_loops(n: int, dim: int, repeats: int) -> None:
    x, count = torch.randn(1, n, dim, generator=torch.Generator().manual_seed(0)), n // 10

    def distances() -> Tensor:
        unit = x[0] / x[0].norm(dim=1, keepdim=True)
        return 1 - unit @ unit.T

    d = distances()
    assert authors_loop(d, count).equal(max_min_diversity(x, count, d=d[None])[0])
    matrix = seconds(distances, repeats)
    theirs, ours = (
        seconds(lambda: authors_loop(d, count), repeats),
        seconds(lambda: max_min_diversity(x, count, d=d[None]), repeats),
    )
    print(f"\n{count} of {n} tokens by max-min diversity, the same tokens in the same order:\n")
    print("| | ms | authors' loop / ours |\n|---|--:|--:|")
    print(f"| authors' loop, distances given | {theirs * 1e3:.1f} | |")
    print(f"| ours, distances given | {ours * 1e3:.1f} | {theirs / ours:.1f} |")
    print(
        f"| the matrix of distances, in both | {matrix * 1e3:.1f} | {(theirs + matrix) / (ours + matrix):.1f} in all |"
    )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[576, 2880], help="multiples of 576")
    parser.add_argument("--dim", type=int, default=1024, help="width of the visual tokens")
    parser.add_argument("--text", type=int, default=64, help="tokens of text in the prompt")
    parser.add_argument("--keep", type=float, default=0.11)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=4096, help="width of the decoder")
    parser.add_argument("--inner", type=int, default=11008, help="width inside its MLP")
    parser.add_argument("--layers", type=int, default=32)
    args = parser.parse_args()
    sizes = args.hidden, args.inner, args.layers
    prefills = [prefill_seconds(n + args.text, *sizes, min(args.repeats, 2)) for n in args.tokens]
    heads = "".join(f" {n}: ms | share of prefill |" for n in args.tokens)
    print(f"\n| method |{heads}\n|---|" + "--:|--:|" * len(args.tokens))
    print("| prefill of all tokens |" + "".join(f" {t * 1e3:.0f} | |" for t in prefills))
    for info in tt.methods(stage="connector"):
        cells = ""
        for n, prefill in zip(args.tokens, prefills, strict=True):
            view, method = view_of(n, args.dim), find(info.name).make(keep=args.keep)
            time = seconds(lambda method=method, view=view: method.reduce(view), args.repeats)  # type: ignore[misc]
            cells += f" {time * 1e3:.1f} | {time / prefill:.2%} |"
        print(f"| `{info.name}` |{cells}", flush=True)
    compare_loops(max(args.tokens), args.dim, args.repeats)


if __name__ == "__main__":
    main()
