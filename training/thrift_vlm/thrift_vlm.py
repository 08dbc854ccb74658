"""Trains the model pack `thrift-vlm`: python training/thrift_vlm/thrift_vlm.py encode | train | export --work FOLDER

`encode` draws the scenes and runs the frozen encoder once over them; the features stay in FOLDER as float16.
`train` first teaches the projector to say what a patch shows and where it is (minutes), then trains projector and
decoder on answers, with few patches an image at first: among 256 the right ones are found very slowly. Relations are
asked in a phase of their own, when all else is answered.
All questions about one image are one sequence: each sees the image and itself and no other question, and all begin at
the same position, so the image is computed once for about 20 of them.
`export` writes the weights into the package, answers the held-out questions and writes the model card.

Every command goes on where it was interrupted, and ends by itself after --hours. It lives outside the package, since
who uses the model needs none of it.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from scene_data import ITEMS, collections
from torch import Tensor, nn
from transformers import AttentionInterface
from vlm_card import card
from vlm_parts import LAYER, encoder, new_model, new_tokenizer

from tokenthrift.bench.scene_questions import KINDS, NOTHING, Question, ask
from tokenthrift.bench.scenes import COLOURS, NAMES, PLACES, Collection, Scene, draw, lay_out
from tokenthrift.bench.seeing import blind, evaluate, prompt, questions
from tokenthrift.models.images import preprocess
from tokenthrift.models.packs import find, load
from tokenthrift.models.packs.cache import shipped
from tokenthrift.models.packs.composed import NAME, WEIGHTS

GRID, PATCH, WIDTH = 16, 14, 384
RELATED = ("relation", "beside")
PARTS = {"train": 0, "check": 1}


def scene(part: str, number: int, collection: Collection) -> Scene:
    """Scene number so and so; always the same."""
    return lay_out(random.Random(f"{part} {number}"), collection)


def encode(work: Path, items: Path, counts: dict[str, int], deadline: float) -> bool:
    """Features of all scenes, (n, 256, 384) float16 a part; True when all are done."""
    tower = encoder()
    for part, count in counts.items():
        collection = collections(items)[PARTS[part]]
        path, done_path = work / f"{part}.f16", work / f"{part}.done"
        done = int(done_path.read_text()) if done_path.exists() else 0
        store = np.memmap(path, np.float16, "r+" if path.exists() else "w+", shape=(count, GRID * GRID, WIDTH))
        while done < count:
            if time.monotonic() > deadline:
                return False
            numbers = range(done, min(done + 16, count))
            images = [draw(scene(part, n, collection), collection) for n in numbers]
            with torch.no_grad():
                states = tower(preprocess(images), output_hidden_states=True).hidden_states[LAYER]
            store[done : done + len(numbers)] = states[:, 1:].to(torch.float16).numpy()
            done += len(numbers)
            done_path.write_text(str(done))
            if done % 320 == 0:
                print(json.dumps({"part": part, "encoded": done, "of": count}), flush=True)
        store.flush()
    return True


def stored(work: Path, part: str) -> np.memmap:
    """The features that are there so far; training may begin with a part of them."""
    done = int((work / f"{part}.done").read_text())
    size = (work / f"{part}.f16").stat().st_size // (2 * GRID * GRID * WIDTH)
    return np.memmap(work / f"{part}.f16", np.float16, "r", shape=(size, GRID * GRID, WIDTH))[:done]


class Packed:
    """Sequences of one image and many questions, as a batch for the decoder."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.cached = tokenizer, {}
        self.pad = tokenizer.pad_token_id

    def ids(self, text: str) -> list[int]:
        if text not in self.cached:
            self.cached[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.cached[text]

    def __call__(self, rows: list[list[Question]]) -> dict[str, Tensor]:
        """Text after the image, (rows, questions, length): ids, and labels (−100: not a word of an answer)."""
        pairs = [[self._pair(question) for question in asked] for asked in rows]
        most = max(map(len, pairs))
        length = max(len(ids) for row in pairs for ids, _ in row)
        found = {}
        for name, part, fill in (("ids", 0, self.pad), ("labels", 1, -100)):
            table = torch.full((len(rows), most, length), fill)
            for r, row in enumerate(pairs):
                for q, pair in enumerate(row):
                    table[r, q, : len(pair[part])] = torch.tensor(pair[part])
            found[name] = table
        return found

    def _pair(self, question: Question) -> tuple[list[int], list[int]]:
        before = self.ids(prompt(question.text, image=False))
        after = [*self.ids(question.answer), self.tokenizer.eos_token_id]
        return before + after[:-1], [-100] * (len(before) - 1) + after


def forward(
    model: Any, features: Tensor, batch: dict[str, Tensor], kept: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits and labels of the answers' words, and which question each belongs to (row · 1000 + number).

    With `kept`, (rows, n), the features are those of some patches; everything stays at its position.
    """
    decoder = model.model.language_model
    decoder.set_attn_implementation(ATTENTION)
    rows, most, length = batch["ids"].shape
    seen = model.model.multi_modal_projector(features)
    begin = torch.full((rows, 1), model.config.text_config.bos_token_id)
    embed = decoder.get_input_embeddings()
    inputs = torch.cat([embed(begin), seen, embed(batch["ids"].flatten(1))], dim=1)
    prefix = 1 + seen.shape[1]
    kept = torch.arange(seen.shape[1]).expand(rows, -1) if kept is None else kept
    end = 1 + (GRID * GRID)
    text = torch.arange(end, end + length).repeat(most).expand(rows, -1)
    positions = torch.cat([torch.zeros(rows, 1, dtype=torch.long), 1 + kept, text], dim=1)
    hidden = decoder(
        inputs_embeds=inputs,
        position_ids=positions,
        use_cache=False,
        prefix=prefix,
        length=length,
    ).last_hidden_state[:, prefix:]
    labels = batch["labels"].flatten(1)
    wanted = labels != -100
    which = torch.arange(rows)[:, None] * 1000 + torch.arange(most).repeat_interleave(length)
    return model.lm_head(hidden[wanted]), labels[wanted], which[wanted]


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    prefix: int,
    length: int,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal in the prefix; a question sees the prefix and what came before in itself.

    Nothing else is computed: with a mask over everything two thirds of the work would be thrown away.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    begin = nn.functional.scaled_dot_product_attention(
        query[:, :, :prefix], key[:, :, :prefix], value[:, :, :prefix], is_causal=True, scale=scaling
    )
    q, k, v = (states[:, :, prefix:].unflatten(2, (-1, length)) for states in (query, key, value))
    own = (q @ k.transpose(-1, -2)).float() * scaling
    own = own.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf"))
    shared = (q.flatten(2, 3) @ key[:, :, :prefix].transpose(-1, -2)).float() * scaling
    weights = torch.cat([shared, own.flatten(2, 3)], dim=-1).softmax(-1).to(value.dtype)
    text = weights[..., :prefix] @ value[:, :, :prefix]
    text = text + (weights[..., prefix:].unflatten(2, (-1, length)) @ v).flatten(2, 3)
    return torch.cat([begin, text], dim=2).transpose(1, 2).contiguous(), None


ATTENTION = "thrift-vlm-training"
AttentionInterface.register(ATTENTION, _attention)


class Places(nn.Module):
    """Where the thing is that a question names, told at the name itself after half of the decoder's layers.

    What is left of what needs both places before it can be answered. Without this loss such questions stay at chance
    long after all others are answered; the layer that tells is thrown away.
    """

    SIZES = (len(PLACES), GRID, GRID)

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.tell = nn.Linear(model.config.text_config.hidden_size, sum(self.SIZES))
        self.names = {name: tokenizer.convert_tokens_to_ids(name) for name in NAMES}
        layers = model.model.language_model.layers
        layers[len(layers) // 2].register_forward_hook(self._keep)

    def _keep(self, module: Any, args: Any, output: Any) -> None:
        self.states = output

    def loss(self, ids: Tensor, scenes: Sequence[Scene]) -> Tensor:
        """Of the last forward: ids (rows, questions, length) about the scenes of the rows."""
        table = torch.full((len(scenes), 3, max(self.names.values()) + 1), -100)
        for row, scene in enumerate(scenes):
            for item in scene.items:
                if sum(other.name == item.name for other in scene.items) == 1:
                    x, y = item.middle
                    table[row, :, self.names[item.name]] = torch.tensor([item.place, y // PATCH, x // PATCH])
        ids = ids.flatten(1)
        known = ids.clamp(max=table.shape[-1] - 1)
        target = table.gather(2, known[:, None].expand(-1, 3, -1)).masked_fill((ids != known)[:, None], -100)
        told = self.tell(self.states[:, -ids.shape[1] :].float()).split(self.SIZES, dim=-1)
        losses = [
            nn.functional.cross_entropy(part.flatten(0, 1), aim.flatten(), reduction="sum")
            for part, aim in zip(told, target.unbind(1), strict=True)
        ]
        return torch.stack(losses).sum() / (target != -100).sum().clamp(min=1)  # no question may name a single thing


def patch_labels(found: Scene) -> Tensor:
    """For every patch: name (the last is nothing; −100 at a border), colour (−100 none), place, row and column."""
    name = torch.full((GRID, GRID), len(NAMES))
    colour = torch.full((GRID, GRID), -100)
    for item in found.items:
        whole = [slice(start // PATCH, -(-(start + item.side) // PATCH)) for start in (item.top, item.left)]
        name[whole[0], whole[1]] = -100
        inner = [
            slice(round((start + item.side * 0.25) / PATCH), max(round((start + item.side * 0.75) / PATCH), 1))
            for start in (item.top, item.left)
        ]
        name[inner[0], inner[1]] = NAMES.index(item.name)
        colour[inner[0], inner[1]] = item.colour
    rows, columns = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    place = 3 * ((rows + 0.5) * 3 / GRID).long() + ((columns + 0.5) * 3 / GRID).long()
    for item in found.items:  # what sticks out of a place still belongs to it
        part = (colour != -100) & (name == NAMES.index(item.name))
        y, x = (torch.arange(GRID) * PATCH + PATCH // 2 for _ in range(2))
        inside = ((y >= item.top) & (y < item.top + item.side))[:, None] & (
            (x >= item.left) & (x < item.left + item.side)
        )
        place[part & inside] = item.place
    return torch.stack([name, colour, place, rows, columns]).flatten(1)


def align(model: Any, tokenizer: Any, features: np.memmap, scenes: list[Scene], steps: int, log: Any) -> None:
    """The projector learns to say, patch by patch, what is there and where, in the decoder's own words.

    A patch's vector is to be near the embeddings of its words; the exact row and column are told by two linear layers
    that are thrown away.
    """
    projector, embed = model.model.multi_modal_projector, model.get_input_embeddings()

    def ids(words: Sequence[str]) -> Tensor:
        return torch.tensor([tokenizer(word, add_special_tokens=False)["input_ids"] for word in words])

    places = [torch.tensor(tokenizer(place, add_special_tokens=False)["input_ids"]) for place in PLACES]
    words = [ids([*NAMES, NOTHING])[:, 0], ids(COLOURS)[:, 0]]
    exact = nn.Linear(model.config.text_config.hidden_size, 2 * GRID)
    optimizer = torch.optim.AdamW([*projector.parameters(), *exact.parameters()], 2e-3, weight_decay=0.01)
    labels = torch.stack([patch_labels(one) for one in scenes])
    rng = random.Random("align")
    weight = torch.ones(len(NAMES) + 1)
    weight[-1] = 0.2  # most patches show no item
    table = embed.weight.detach()
    heads = [table[some] for some in words] + [torch.stack([table[place].sum(0) for place in places])]
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / steps)
        chosen = rng.sample(range(len(features)), 8)
        x = torch.from_numpy(np.stack([features[i] for i in chosen])).float()
        vectors = projector(x).flatten(0, 1)
        parts = [*(vectors @ head.T * head.shape[-1] ** -0.5 for head in heads), *exact(vectors).split(GRID, dim=-1)]
        target = labels[chosen].transpose(0, 1).flatten(1)
        losses = [
            nn.functional.cross_entropy(part, aim, weight=weight if i == 0 else None)
            for i, (part, aim) in enumerate(zip(parts, target, strict=True))
        ]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            kinds = ("name", "colour", "place", "row", "column")
            log({"align": step} | {kind: round(loss.item(), 3) for kind, loss in zip(kinds, losses, strict=True)})


def few(labels: Tensor, count: int, rng: random.Random) -> list[int]:
    """Numbers of `count` patches: one to three of every item, and others by chance."""
    name, _, place = labels[:3]
    chosen: set[int] = set()
    for where in place[(name >= 0) & (name < len(NAMES))].unique():
        inside = torch.nonzero((place == where) & (name >= 0) & (name < len(NAMES)))[:, 0].tolist()
        chosen.update(rng.sample(inside, min(len(inside), rng.randint(1, 3))))
    others = [n for n in range(GRID * GRID) if n not in chosen]
    return sorted([*chosen, *rng.sample(others, count - len(chosen))])


def normalised(model: Any, features: np.memmap) -> tuple[Tensor, Tensor]:
    """Mean and scale of the features; they are folded into the projector's first layer before anything is trained."""
    sample = torch.from_numpy(np.stack([features[i] for i in range(0, len(features), max(len(features) // 200, 1))]))
    flat = sample.float().flatten(0, 1)
    return flat.mean(0), flat.std(0) + 1e-4


class Standardised(nn.Module):
    """A linear layer on standardised inputs, trained as such; `folded` is the same as one plain layer."""

    def __init__(self, linear: nn.Linear, mean: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.linear = linear
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear((x - self.mean) / self.scale)

    @torch.no_grad()
    def folded(self) -> nn.Linear:
        plain = nn.Linear(self.linear.in_features, self.linear.out_features)
        plain.weight.copy_(self.linear.weight / self.scale)
        plain.bias.copy_(self.linear.bias - plain.weight @ self.mean)
        return plain


@torch.no_grad()
def accuracy(model: Any, packed: Packed, features: np.memmap, scenes: list[Scene], each: int = 2) -> dict[str, float]:
    """Share of questions whose answer greedy decoding writes exactly, by kind and as a mean over questions."""
    model.eval()
    hits: dict[str, list[bool]] = {}
    for start in range(0, len(scenes), 8):
        asked = [ask(scenes[i], random.Random(f"check {i}"), each) for i in range(start, min(start + 8, len(scenes)))]
        x = torch.from_numpy(np.stack(features[start : start + len(asked)])).float()
        logits, labels, which = forward(model, x, packed(asked))
        # With the right words so far, every word is the likeliest: exactly then greedy decoding writes the answer.
        wrong = set(which[logits.argmax(-1) != labels].tolist())
        for row, some in enumerate(asked):
            for number, question in enumerate(some):
                hits.setdefault(question.kind, []).append(row * 1000 + number not in wrong)
    model.train()
    every = [hit for kind in hits.values() for hit in kind]
    return {kind: round(sum(h) / len(h), 4) for kind, h in hits.items()} | {"all": round(sum(every) / len(every), 4)}


def train(args: argparse.Namespace, deadline: float) -> None:
    torch.manual_seed(args.seed)
    tokenizer = new_tokenizer()
    model = new_model(tokenizer)
    del model.model.vision_tower  # the features are there already
    features, checked = stored(args.work, "train"), stored(args.work, "check")
    fit, check = collections(args.items)
    scenes = [scene("train", n, fit) for n in range(len(features))]
    check_scenes = [scene("check", n, check) for n in range(len(checked))]
    projector = model.model.multi_modal_projector
    projector.linear_1 = Standardised(projector.linear_1, *normalised(model, features))
    packed, places = Packed(tokenizer), Places(model, tokenizer)
    optimizer = torch.optim.AdamW(_groups(model, args.decay), args.rate, betas=(0.9, 0.98))
    teller = torch.optim.AdamW(places.parameters(), args.rate)
    checkpoint, step, seconds = args.work / "checkpoint.pt", 0, 0.0

    def log(line: dict[str, Any]) -> None:
        with (args.work / "log.jsonl").open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    def save() -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}
        state |= {"places": places.state_dict(), "teller": teller.state_dict()}
        torch.save(state | {"images": len(features)}, checkpoint.with_suffix(".new"))
        checkpoint.with_suffix(".new").replace(checkpoint)

    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        places.load_state_dict(state["places"])
        teller.load_state_dict(state["teller"])
        step, seconds = state["step"], state["seconds"]
    else:
        began = time.monotonic()
        align(model, tokenizer, features, scenes, args.align, log)
        seconds = time.monotonic() - began
    model.train()
    began, saved, losses = time.monotonic(), time.monotonic(), []
    while step < args.steps and time.monotonic() < deadline:
        for group in optimizer.param_groups:
            group["lr"] = args.rate * schedule(step, args.steps, args.warm)
        rng = random.Random(f"{args.seed} {step}")
        chosen = rng.sample(range(len(features)), args.batch)
        x = torch.from_numpy(np.stack([features[i] for i in chosen])).float()
        relate = args.relate[0] <= step < args.relate[1]
        each = {kind: 2 * args.each if kind in RELATED else args.each // 4 for kind in KINDS} if relate else args.each
        asked = [ask(scenes[i], rng, each) for i in chosen]
        kept = None
        patches = 24 if relate else next((n for until, n in ((args.few, 24), (1.5 * args.few, 64)) if step < until), 0)
        if patches:
            kept = torch.tensor([few(patch_labels(scenes[i]), patches, rng) for i in chosen])
            x = x.gather(1, kept[..., None].expand(-1, -1, x.shape[-1]))
        words = packed(asked)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bfloat16):
            logits, labels, _ = forward(model, x, words, kept)
        loss = nn.functional.cross_entropy(logits.float(), labels)
        told = places.loss(words["ids"], [scenes[i] for i in chosen])
        optimizer.zero_grad()
        teller.zero_grad()
        (loss + args.told * told).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        teller.step()
        step += 1
        losses.append([loss.item(), told.item()])
        now = time.monotonic()
        if step % 25 == 0:
            loss, told = np.mean(losses, axis=0).round(4).tolist()
            log({"step": step, "loss": loss, "told": told, "seconds": round(seconds + now - began)})
            losses = []
        if step % args.check == 0 or step == args.steps:
            log({"step": step, "accuracy": accuracy(model, packed, checked, check_scenes)})
        if now - saved > 180 or step == args.steps:
            seconds, began = seconds + time.monotonic() - began, time.monotonic()
            save()
            saved = time.monotonic()
            features = stored(args.work, "train")  # `encode` may still be running
            scenes += [scene("train", n, fit) for n in range(len(scenes), len(features))]
    seconds += time.monotonic() - began
    save()
    log({"step": step, "of": args.steps, "finished": step >= args.steps})


def schedule(step: int, steps: int, warm: int) -> float:
    """Linear to 1, then half a cosine to 0.02."""
    if step < warm:
        return (step + 1) / warm
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))


def _groups(model: Any, decay: float) -> list[dict[str, Any]]:
    """Matrices decay, vectors do not."""
    some = list(model.parameters())
    return [
        {"params": [p for p in some if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in some if p.dim() < 2], "weight_decay": 0.0},
    ]


def export(args: argparse.Namespace) -> None:
    """Projector, decoder and tokenizer into the package, then the held-out questions, and the model card."""
    state = torch.load(args.work / "checkpoint.pt", weights_only=True)
    weights = state["model"]
    tokenizer = new_tokenizer()
    model = new_model(tokenizer)
    projector = model.model.multi_modal_projector
    first = "model.multi_modal_projector.linear_1."
    standard = Standardised(projector.linear_1, weights.pop(first + "mean"), weights.pop(first + "scale"))
    standard.linear.load_state_dict({name: weights.pop(f"{first}linear.{name}") for name in ("weight", "bias")})
    folded = standard.folded().state_dict()
    weights |= {first + name: tensor for name, tensor in folded.items()}
    out = shipped(find(NAME))
    out.mkdir(parents=True, exist_ok=True)
    half = {name: tensor.to(torch.float16).contiguous() for name, tensor in weights.items()}
    save_file(half, out / WEIGHTS, metadata={"format": "pt"})
    config = model.config.to_diff_dict()
    config["architectures"] = ["LlavaForConditionalGeneration"]
    config["vision_feature_layer"] = LAYER
    config["vision_feature_select_strategy"] = "default"
    config["vision_config"].pop("_name_or_path", None)  # a folder of this machine
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(out)
    loaded, processor = load(NAME)
    asked = questions(seed=0, count=args.questions)
    answers = evaluate(loaded, processor, asked)
    large = questions(seed=0, count=args.large, size=518)
    figures = {
        "steps": state["step"],
        "images": state["images"],
        "hours": round(state["seconds"] / 3600, 2),
        "history": args.history,
        "held_out": answers.to_dict(),
        "blind": blind(asked),
        "at_518": evaluate(loaded, processor, large).to_dict() if large else None,
    }
    (out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    (out / "README.md").write_text(card(figures, loaded), encoding="utf-8")
    print(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("encode", "train", "export"))
    parser.add_argument("--work", type=Path, required=True, help="folder for features, checkpoint and log")
    parser.add_argument("--items", type=Path, default=ITEMS, help="folder with Fashion-MNIST's files")
    parser.add_argument("--hours", type=float, default=3.0, help="stop after so long; the same command goes on")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--images", type=int, default=6000, help="scenes to train on")
    parser.add_argument("--checked", type=int, default=160, help="scenes of the log's accuracy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=6200)
    parser.add_argument("--align", type=int, default=500, help="steps of the projector by itself")
    parser.add_argument(
        "--few", type=int, default=1500, help="steps that see 24 patches an image; then half as many, 64"
    )
    parser.add_argument(
        "--relate",
        type=int,
        nargs=2,
        default=(3000, 5000),
        metavar=("FROM", "TO"),
        help="steps that ask mostly for relations, with 24 patches an image",
    )
    parser.add_argument("--warm", type=int, default=100)
    parser.add_argument("--batch", type=int, default=6, help="images a step")
    parser.add_argument("--each", type=int, default=4, help="questions of every kind, an image")
    parser.add_argument("--bfloat16", action=argparse.BooleanOptionalAction, default=True, help="of the products")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--told", type=float, default=0.3, help="weight of telling where a named thing is")
    parser.add_argument("--decay", type=float, default=0.05)
    parser.add_argument("--check", type=int, default=400, help="steps between two measurements of accuracy")
    parser.add_argument("--questions", type=int, default=1200, help="held-out questions at 224 pixels")
    parser.add_argument("--history", help="a sentence for the card: how these weights were made differently")
    parser.add_argument("--large", type=int, default=120, help="held-out questions at 518 pixels")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 3600 * args.hours
    if args.command == "encode":
        encode(args.work, args.items, {"check": args.checked, "train": args.images}, deadline)
    elif args.command == "train":
        train(args, deadline)
    else:
        export(args)


if __name__ == "__main__":
    main()
