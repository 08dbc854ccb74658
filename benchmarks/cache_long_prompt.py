"""Cache methods on a long real prompt: bytes, decode speed, added prefill time; kept indices beside kvpress.

    python benchmarks/cache_long_prompt.py --tokens 4096 --budget 512
    python benchmarks/cache_long_prompt.py --peer-python PATH   # a Python of its own with kvpress==0.5.5

Every plan is timed against the unmodified model in the same process, interleaved; medians of `--repeats`. The text is
the Python documentation that comes with Python (`pydoc_data.topics`, PSF licence). kvpress needs transformers < 5.3,
hence an environment of its own; both sides get the same weights folder and the same token ids.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
from pathlib import Path
from time import perf_counter

import torch
import transformers

PEERS = {
    "knorm(budget={b})": "KnormPress(compression_ratio={r})",
    "snapkv(budget={b})": "SnapKVPress(compression_ratio={r}, window_size=32, kernel_size=5)",
    "streaming_llm(budget={b})": "StreamingLLMPress(compression_ratio={r}, n_sink=4)",
}

PEER_SCRIPT = """
import json, sys, time, statistics, torch, kvpress
from kvpress import KnormPress, SnapKVPress, StreamingLLMPress
import transformers
from transformers import AutoModelForCausalLM, DynamicCache
transformers.logging.disable_progress_bar()
job = json.load(open(sys.argv[1]))
torch.set_num_threads(job["threads"])
model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
ids = torch.tensor([job["ids"]])

def run(press, steps):
    kept, compress = {}, type(press).compress
    def spy(self, module, hidden_states, keys, values, attentions, kwargs):
        scores = self.score(module, hidden_states, keys, values, attentions, kwargs) if record else None
        if record:
            n = int(keys.shape[2] * (1 - self.compression_ratio))
            kept[module.layer_idx] = scores.topk(n, dim=-1).indices.sort(-1).values[0].tolist()
        return compress(self, module, hidden_states, keys, values, attentions, kwargs)
    record = steps == 0
    if record:
        type(press).compress = spy
    try:
        cache = DynamicCache()
        with torch.no_grad():
            start = time.perf_counter()
            with press(model):
                out = model(ids, past_key_values=cache, logits_to_keep=1)
            prefill = time.perf_counter() - start
            token, times = out.logits[:, -1:].argmax(-1), []
            for i in range(steps):
                start = time.perf_counter()
                position = torch.tensor([[ids.shape[1] + i]])
                out = model(token, past_key_values=cache, position_ids=position)
                times.append(time.perf_counter() - start)
                token = out.logits[:, -1:].argmax(-1)
        return prefill, statistics.median(times) if times else 0, kept
    finally:
        type(press).compress = compress

out = {}
for name, source in job["presses"].items():
    press = eval(source)
    out[name] = {"kept": run(press, 0)[2]}
    timed = [run(press, job["steps"])[:2] for _ in range(job["repeats"])]
    out[name]["ttft"] = statistics.median(t[0] for t in timed)
    out[name]["decode"] = statistics.median(t[1] for t in timed)
json.dump(out, open(sys.argv[2], "w"))
"""


def main() -> None:
    import tokenthrift as tt
    from tokenthrift.models.kv import ReducedLayer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peer-python", help="a Python with kvpress==0.5.5; the model must then be a pack or a folder")
    args = parser.parse_args()

    model, tokenizer = tt.load(args.model, device=args.device)
    ids = long_prompt(tokenizer, args.tokens).to(args.device)
    plans = [p.format(b=args.budget) for p in PEERS]

    def run(plan: str | None) -> tuple[float, float, int, float, dict[int, list[list[int]]]]:
        with tt.apply(plan, model) as session, torch.no_grad():
            start = perf_counter()
            out = model(ids, use_cache=True, logits_to_keep=1)
            sync(args.device)
            prefill, cache, times = perf_counter() - start, out.past_key_values, []
            bytes_ = sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))
            kept = {i: la.positions[0].tolist() for i, la in enumerate(cache.layers) if isinstance(la, ReducedLayer)}
            token = out.logits[:, -1:].argmax(-1)
            for _ in range(args.steps):
                start = perf_counter()
                token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
                sync(args.device)
                times.append(perf_counter() - start)
        record = session.report().stages.get("cache")
        return prefill, statistics.median(times), bytes_, record.seconds if record else 0.0, kept

    runs: dict[str | None, list] = {None: [], **{p: [] for p in plans}}
    run(plans[-1])  # warm-up
    for _ in range(args.repeats):
        for plan, results in runs.items():
            results.append(run(plan))

    def median(plan: str | None, i: int) -> float:
        return statistics.median(r[i] for r in runs[plan])

    peer = run_peer(args, ids, plans) if args.peer_python else {}
    print(
        f"{args.model}, {args.tokens} tokens, budget {args.budget}, float32, {args.device}, "
        f"{torch.get_num_threads()} threads, transformers {transformers.__version__}\n"
    )
    print(
        "| plan | cache bytes | decode ms/token | vs full | TTFT s | compression / prefill "
        "| kvpress: decode, TTFT, kept entries |"
    )
    print("|---|--:|--:|--:|--:|--:|---|")
    for plan in runs:
        ttft, decode, bytes_, seconds = (median(plan, i) for i in range(4))
        versus = ""
        if plan in peer:
            other = peer[plan]
            versus = (
                f"{other['decode'] * 1000:.1f} ms, {other['ttft']:.2f} s, {agreement(runs[plan][-1][4], other['kept'])}"
            )
        print(
            f"| {plan or 'unmodified'} | {bytes_ / median(None, 2):.3f}× | {decode * 1000:.1f} "
            f"| {decode / median(None, 1):.2f}× | {ttft:.2f} | {seconds / (ttft - seconds):.1%} | {versus} |"
        )


def long_prompt(tokenizer: object, tokens: int) -> torch.Tensor:
    """``(1, tokens)`` ids of real text: the longest topics of the Python documentation."""
    from pydoc_data.topics import topics

    text = "\n\n".join(sorted(topics.values(), key=len, reverse=True)[:8])
    return tokenizer(text, return_tensors="pt").input_ids[:, :tokens]  # type: ignore[operator]


def run_peer(args: argparse.Namespace, ids: torch.Tensor, plans: list[str]) -> dict:
    from tokenthrift.models.packs import PACKS, pack_path

    folder = pack_path(args.model) if args.model in PACKS else Path(args.model)
    ratio = 1 - args.budget / args.tokens
    job = {
        "model": str(folder), "ids": ids[0].tolist(), "threads": torch.get_num_threads(),
        "steps": args.steps, "repeats": args.repeats,
        "presses": {p: source.format(r=ratio) for p, source in zip(plans, PEERS.values(), strict=True)},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as tmp:
        for name, text in (("peer.py", PEER_SCRIPT), ("job.json", json.dumps(job))):
            (Path(tmp) / name).write_text(text, encoding="utf-8")
        subprocess.run([args.peer_python, "peer.py", "job.json", "out.json"], cwd=tmp, check=True)
        return json.loads((Path(tmp) / "out.json").read_text(encoding="utf-8"))


def agreement(ours: dict[int, list[list[int]]], theirs: dict[str, list[list[int]]]) -> str:
    """Whether both sides keep the same entries; else the share that is the same, and the layers that differ.

    In layer 0 the key of a token depends on the token alone, up to a rotation that keeps its norm: repeated tokens tie
    under KNorm, and rounding decides which of them stay.
    """
    same = {
        layer: sum(len(set(a) & set(b)) for a, b in zip(kept, theirs[str(layer)], strict=True))
        for layer, kept in ours.items()
    }
    total = {layer: sum(map(len, kept)) for layer, kept in ours.items()}
    differ = [layer for layer in ours if same[layer] < total[layer]]
    if not differ:
        return "equal"
    return f"{sum(same.values()) / sum(total.values()):.2%} equal (layer {', '.join(map(str, differ))} differs)"


def sync(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
