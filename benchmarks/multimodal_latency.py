"""Time to the first token against FLOPs as fewer visual tokens are kept, on a random model of LLaVA's shape.

    python benchmarks/multimodal_latency.py [--tokens 576 2880] [--methods divprune ...] [--plot out/latency.svg]
    python benchmarks/multimodal_latency.py --device cuda --methods all        # LLaVA-1.5-7B's shape, float16

576 tokens are an image of LLaVA-1.5 (336 pixels), 2,880 one of LLaVA-NeXT (672 pixels: the whole image and four crops;
its 48 newline tokens stay and are not counted). Weights are random, so this is about time only. On a CPU encoder and
decoder are small, but prefill still is most of the time. What is timed is the user's own ``generate`` of one token,
encoder, choice of tokens and all, in turns of the unmodified model and every plan, so that other work on the machine
slows all alike; ratios are taken within a turn. FLOPs are those of the session's report (encoder, projector, decoder).
Selection is what the connector stage takes in all, beside the unmodified model's time. What methods cost beside a
prefill of the full shape is seen without a GPU too, from one layer: ``multimodal_selection.py``.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

import tokenthrift as tt

IMAGE_TOKEN, SIDE, PATCH = 999, 336, 14
SMALL: Mapping[str, tuple[int, ...]] = {"vision": (256, 1024, 4, 4), "text": (1024, 2816, 8, 8)}
"""Width, width of the MLP, layers, heads."""
LLAVA_7B: Mapping[str, tuple[int, ...]] = {"vision": (1024, 4096, 24, 16), "text": (4096, 11008, 32, 32)}
KINDS = {576: "llava", 2880: "llava_next"}


@dataclass(frozen=True)
class Measured:
    """One plan: FLOPs and times beside the unmodified model's, which ``keep`` 1 stands for."""

    method: str
    keep: float
    flops: float
    seconds: float
    selection: float


def build(tokens: int, shape: Mapping[str, tuple[int, ...]], device: str) -> Any:
    """A random model that makes so many visual tokens of an image."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    def sizes(part: str) -> dict[str, int]:
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        return dict(zip(names, shape[part], strict=True))

    vision = {**sizes("vision"), "model_type": "clip_vision_model", "image_size": SIDE, "patch_size": PATCH}
    text = {**sizes("text"), "model_type": "llama", "vocab_size": 1000, "max_position_embeddings": 4096}
    pinpoints = {"image_grid_pinpoints": [[2 * SIDE, 2 * SIDE]]} if KINDS[tokens] == "llava_next" else {}
    config = AutoConfig.for_model(
        KINDS[tokens], vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, **pinpoints
    )
    torch.manual_seed(0)
    with torch.device(device):
        dtype = torch.float16 if device == "cuda" else torch.float32
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.generation_config.eos_token_id = None
    return model.eval()


def inputs_of(model: Any, text: int) -> dict[str, Tensor]:
    """One image in the middle of so many tokens of text."""
    device, next_ = model.device, model.config.model_type == "llava_next"
    make = torch.Generator().manual_seed(0)
    pixels = torch.randn(*((1, 5) if next_ else (1,)), 3, SIDE, SIDE, generator=make).to(device, model.dtype)
    given = {"pixel_values": pixels}
    if next_:
        given["image_sizes"] = torch.tensor([[2 * SIDE, 2 * SIDE]], device=device)
    side = SIDE // PATCH
    count = side**2 + (4 * side**2 + 2 * side if next_ else 0)
    words = torch.randint(3, IMAGE_TOKEN, (text,), generator=make).tolist()
    ids = [*words[: text // 2], *[IMAGE_TOKEN] * count, *words[text // 2 :]]
    ids_of = torch.tensor([ids], device=device)
    return {"input_ids": ids_of, "attention_mask": torch.ones_like(ids_of), **given}


def first_token(model: Any, inputs: dict[str, Tensor]) -> float:
    """Seconds until the first token is there."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    start = perf_counter()
    model.generate(**inputs, max_new_tokens=1, do_sample=False, pad_token_id=0)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return perf_counter() - start


def measure(model: Any, inputs: dict[str, Tensor], plans: list[tuple[str, float]], repeats: int) -> list[Measured]:
    """Every plan in turns with the unmodified model; a turn before the first does not count."""
    times, selection, flops = defaultdict(list), defaultdict(list), {}
    for turn in range(repeats + 1):
        plain = first_token(model, inputs)
        for name, keep in plans:
            with tt.apply(f"connector={name}(keep={keep})", model) as session:
                seconds = first_token(model, inputs)
            report = session.report()
            flops[name, keep] = report.flops / report.flops_dense
            if turn:
                times[name, keep].append(seconds / plain)
                selection[name, keep].append(report.stages["connector"].seconds / plain)
        if turn:
            times["", 1.0].append(plain)
    found = [Measured(*p, flops[p], median(times[p]), median(selection[p])) for p in plans]
    return [Measured("", 1.0, 1.0, median(times["", 1.0]), 0.0), *found]


def print_table(tokens: int, found: list[Measured]) -> None:
    plain, *others = found
    print(f"\n{tokens:,} visual tokens; unmodified: {1e3 * plain.seconds:.0f} ms to the first token\n")
    print("| method | kept | FLOPs | time to the first token | time / FLOPs | selection, of unmodified |")
    print("|---|" + "--:|" * 5)
    for m in others:
        print(
            f"| `{m.method}` | {m.keep} | {m.flops:.2f}× | {m.seconds:.2f}× | {m.seconds / m.flops:.2f} "
            f"| {m.selection:.1%} |"
        )


def plot(found: dict[int, list[Measured]], file: str) -> None:
    """Time against FLOPs, both beside the unmodified model's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="FLOPs, of the unmodified model's", ylabel="time to the first token")
    axes.plot([0, 1], [0, 1], color="0.7", linestyle="--", label="in proportion")
    for tokens, measured in found.items():
        for method in dict.fromkeys(m.method for m in measured[1:]):
            line = sorted((m.flops, m.seconds) for m in measured if m.method == method)
            axes.plot(*zip(*[*line, (1, 1)], strict=True), marker="o", label=f"{method}, {tokens:,} tokens")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=110)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--methods", nargs="+", default=["random_tokens", "divprune"], help="connector methods, or all")
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.5, 0.25, 0.11, 0.055])
    parser.add_argument("--text", type=int, default=64, help="tokens of text in the prompt")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--layers", type=int, help="of the decoder, if not those of its shape")
    parser.add_argument("--plot", metavar="FILE", help="an SVG or PNG file")
    args = parser.parse_args()
    shape = LLAVA_7B if args.device == "cuda" else SMALL
    if args.layers:
        width, inner, _, heads = shape["text"]
        shape = {**shape, "text": (width, inner, args.layers, heads)}
    names = [info.name for info in tt.methods(stage="connector")] if args.methods == ["all"] else args.methods
    plans = [(name, keep) for name in names for keep in args.keeps]
    found = {}
    for tokens in args.tokens:
        model = build(tokens, shape, args.device)
        found[tokens] = measure(model, inputs_of(model, args.text), plans, args.repeats)
        print_table(tokens, found[tokens])
        del model
    if args.plot:
        plot(found, args.plot)


if __name__ == "__main__":
    main()
