"""The packed cache alone; tests/decoding/test_engine.py has it under models."""

from pathlib import Path

import numpy as np
import torch
from transformers import DynamicCache

from tokenthrift.core.draft import Draft
from tokenthrift.models.packed import PackedCache, Step

GOLDEN = Path(__file__).parents[1] / "golden" / "decoding" / "eqspec_realign.npz"


def test_rows_hold_what_realigned_caches_hold():
    """EQSPEC (arXiv 2510.22876) pads all rows anew in every step; here they stay, with the same entries."""
    golden = {name: torch.from_numpy(array) for name, array in np.load(GOLDEN).items()}
    ids, drafts, accepted = golden["ids"], golden["draft"], golden["accepted"].tolist()
    pads = (ids == 0).sum(1).tolist()
    cache, held = DynamicCache(), ids.shape[1] - 1  # the last token is not in the cache yet
    for layer in range(2):
        cache.update(golden["k"][layer][:, :, :held], golden["v"][layer][:, :, :held], layer)
    packed = PackedCache(cache, ids[:, :held] != 0)
    packed.packing.step = Step([Draft.chain(row) for row in drafts.tolist()], torch.device("cpu"))
    for layer in range(2):
        new = [golden[name][layer][:, :, held:].transpose(0, 1).flatten(1, 2)[None] for name in ("k", "v")]
        packed.packed[layer].update(*new)
    packed.keep([list(range(count)) for count in accepted])
    packed.give_back()
    for row, (pad, count) in enumerate(zip(pads, accepted, strict=True)):
        theirs = int(golden["new_pad"][row])
        for layer in range(2):
            for mine, name in ((cache.layers[layer].keys, "new_k"), (cache.layers[layer].values, "new_v")):
                ours = mine[row, :, pad : held + 1 + count]
                assert torch.equal(ours, golden[name][layer][row, :, theirs:])
                assert not mine[row, :, held + 1 + count :].any()
