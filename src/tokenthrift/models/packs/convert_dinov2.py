"""DINOv2-small with its saliency head: ONNX → the names of transformers' Dinov2Model, and the head's own file.

The exporter kept the parameters' names except for two kinds: the weight of a linear layer is an anonymous, transposed
operand of a MatMul whose node name is the module's path, and the position embeddings were cut into CLS and grid.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenthrift.core.errors import ThriftError

if TYPE_CHECKING:
    import numpy as np

HEAD_FILE = "saliency_head.safetensors"
_CLS_POSITION, _GRID_POSITION = "onnx::Concat_1957", "onnx::Reshape_1962"
_BACKBONE, _HEAD = "backbone.", "decoder."


def convert(source: Path, out: Path) -> None:
    """Write backbone (model.safetensors), head (saliency_head.safetensors) and config of the .onnx file in `source`."""
    import onnx
    from onnx import numpy_helper
    from transformers import Dinov2Config

    graph = onnx.load(str(next(source.glob("*.onnx")))).graph
    arrays = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    weights = _named(arrays, [(node.op_type, node.name, list(node.input)) for node in graph.node])
    backbone = {name.removeprefix(_BACKBONE): array for name, array in weights.items() if name.startswith(_BACKBONE)}
    head = {name.removeprefix(_HEAD): array for name, array in weights.items() if name.startswith(_HEAD)}
    config: Any = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=518,
        patch_size=14,
        use_mask_token=False,  # only training needs it, and it is not in the file
        architectures=["Dinov2Model"],
        dtype="float32",
    )
    _save(backbone, out / "model.safetensors")
    _save(head, out / HEAD_FILE)
    (out / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
    _complete(out)


def _named(arrays: dict[str, np.ndarray], nodes: list[tuple[str, str, list[str]]]) -> dict[str, np.ndarray]:
    """Every parameter under its module path: those that kept it, and the MatMul operands (transposed back)."""
    import numpy as np

    named = {name: array for name, array in arrays.items() if name.startswith((_BACKBONE, _HEAD))}
    positions = np.concatenate([arrays[_CLS_POSITION], arrays[_GRID_POSITION]], axis=1)
    named[f"{_BACKBONE}embeddings.position_embeddings"] = positions
    for kind, path, inputs in nodes:
        if kind == "MatMul" and inputs[1] in arrays:
            module = path.removesuffix("/MatMul").strip("/").replace("/", ".")
            named[f"{module}.weight"] = arrays[inputs[1]].T
    return named


def _complete(out: Path) -> None:
    """Raise unless the file fills the model exactly: a tensor missing from it would stay random, silently.

    The file keeps the names of the published checkpoint, which every transformers version maps to its own modules.
    """
    import transformers

    model: Any = transformers.Dinov2Model
    _, info = model.from_pretrained(str(out), use_safetensors=True, output_loading_info=True)
    odd = [str(name) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[kind]]
    if odd:
        raise ThriftError(f"the ONNX file does not fit Dinov2Model: {len(odd)} tensors differ, first {sorted(odd)[0]}")


def _save(weights: dict[str, np.ndarray], path: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(array) for name, array in weights.items()}, path, metadata={"format": "pt"})
