"""Measuring one plan on one image of a vision encoder: how far its output features move, and what it saves."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ..api import apply
from ..core.plan import Plan
from ..core.tokenmap import TokenMap


class VisionBench:
    """Measures plans on a vision encoder whose first ``prefix`` output tokens (CLS, registers) stand for the image."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        self.prefix = 1 + int(getattr(model.config, "num_register_tokens", 0) or 0)
        self._references: dict[Path, Tensor] = {}

    def measure(self, plan: Plan, path: Path) -> dict[str, Any]:
        """Cosines of the features with the unmodified model's, tokens, seconds and FLOPs."""
        pixels = self.pixels(path)
        features, row, _ = self._forward(plan, pixels)
        if path not in self._references:
            self._references[path] = self._forward(Plan(), pixels)[0] if plan else features
        full = self._references[path]
        cosine = torch.nn.functional.cosine_similarity(features, full, dim=-1)[0]
        return {**row, "cls": float(cosine[0]), "patches": float(cosine[self.prefix :].mean())}

    def groups(self, plan: Plan, path: Path) -> TokenMap | None:
        """Which patches the plan merged or dropped on this image."""
        return self._forward(plan, self.pixels(path))[2]

    def pixels(self, path: Path) -> Tensor:
        """The image as the model takes it."""
        from PIL import Image

        with Image.open(path) as image:
            encoded = self.processor(images=image.convert("RGB"), return_tensors="pt")
        return encoded["pixel_values"].to(self.model.device, self.model.dtype)

    @torch.no_grad()
    def _forward(self, plan: Plan, pixels: Tensor) -> tuple[Tensor, dict[str, Any], TokenMap | None]:
        with apply(plan, self.model) as session:
            start = self._now()
            features = self.model(pixel_values=pixels).last_hidden_state
            seconds = self._now() - start
        report, map = session.report(), session.provenance().get("vision")
        if isinstance(map, dict):  # merged and unmerged again in each layer: the last one's groups stand for all
            map = list(map.values())[-1]
        after = features.shape[1]
        before = after
        if isinstance(map, TokenMap):
            before, after = map.n_in, map.n_out
            if features.shape[1] == map.n_out != map.n_in:
                features = map.unmerge(features)
        row = {"tokens_before": before, "tokens": after, "seconds": seconds}
        if report.forwards:
            row |= {"flops": report.flops, "flops_full": report.flops_dense}
        return features.to(torch.float32), row, map if isinstance(map, TokenMap) else None

    def _now(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return perf_counter()
