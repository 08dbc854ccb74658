"""From the entries of a cache back to the patches of an image, through all stages between, checked by value."""

from __future__ import annotations

import pytest
import torch

import tokenthrift as tt
from tiny_vlms import IMAGE, ROWS, pictured, tiny_vlm
from tokenthrift.models.connector_features import map_up_to

_VIT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 48, "patch_size": 8}
TOWERS = {
    "clip": {},
    "dinov2": {"vision_config": {**_VIT, "model_type": "dinov2", "mlp_ratio": 2}, "vision_feature_layer": -1},
}
ENCODER = "vision=pitome(keep=0.5)"


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("layer", [0, 2])
@torch.no_grad()
def test_entries_of_a_cache_lead_back_to_patches(tower, layer):
    """Values of the first layer are made of a column's embedding alone, so they tell which token is behind an entry;
    the other layers must hold such entries as their maps say, whatever their values."""
    model, inputs = tiny_vlm("llava", **TOWERS[tower]), pictured("llava", ROWS, 3)
    # Images first, made by the reduced encoder alone: which patches make a token, and what it is.
    with tt.apply(ENCODER, model.model.vision_tower) as alone:
        of_layers = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    hidden = of_layers[model.config.vision_feature_layer]
    encoder = map_up_to(alone.maps("vision"), hidden.shape[1])
    assert hidden.shape[1] < 37 and encoder.n_in == 37
    tokens = model.model.multi_modal_projector(hidden)
    words = model.get_input_embeddings()(inputs["input_ids"])

    with tt.apply(f"{ENCODER} connector=divprune(keep=10) cache=snapkv(budget=16, window=4)", model) as session:
        cache = model(**inputs).past_key_values
    maps, pictures = session.provenance(), session.adapter.pictures()
    assert cache.layers[layer].keys.shape[2] == 16
    at = {(p.row, int(column)): (p, k) for p in pictures for k, column in enumerate(p.columns)}
    first, seen = model.model.language_model.layers[0], []
    for row, head, slot in maps["cache"][layer].mask.nonzero().tolist():
        entry = maps["cache"][layer].anchors[row, head, slot]
        column = int(maps["connector"].anchors[row, entry])
        if (row, column) in at:
            placed, k = at[row, column]
            patch = int(placed.picture.left[k]) + 1  # the encoder's first token is CLS
            token = int(encoder.owner[placed.number, patch])
            assert int(encoder.anchors[placed.number, token]) == patch
            x = tokens[placed.number, token]
            seen.append((placed.number, *(encoder.owner[placed.number] == token).nonzero()[:, 0].tolist()))
        else:
            assert inputs["input_ids"][row, column] != IMAGE
            x = words[row, column]
        if layer == 0:
            value = first.self_attn.v_proj(first.input_layernorm(x)).view(-1, 8)[head]
            assert torch.allclose(cache.layers[0].values[row, head, slot], value, atol=1e-4, rtol=1e-3)
    assert {image for image, *_ in seen} == {0, 1, 2}
    assert any(len(patches) > 1 for _, *patches in seen)  # a merged token: several patches
    for one in seen:  # CLS is no patch, and groups share none
        assert 0 not in one[1:] and all(
            one == other or one[0] != other[0] or not set(one[1:]) & set(other[1:]) for other in seen
        )
