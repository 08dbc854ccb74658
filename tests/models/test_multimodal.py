"""Vision-language models with fewer visual tokens, against their language models called on the shorter prompts."""

from __future__ import annotations

import torch

import tokenthrift as tt
from tiny_models import fingerprint
from tiny_vlms import IMAGE, batch, images, row, tiny_vlm
from tokenthrift.core.tokenmap import TokenMap
from tokenthrift.models.connector_maps import Pictures, Placed, prompt_map
from tokenthrift.models.pictures import Picture

QUARTER = "connector=random_tokens(keep=0.25)"


def llava_inputs():
    return {**batch([row([5, 6], 36, [7, 8, 9]), row([3, 4, 5, 6, 7], 36, [8])]), "pixel_values": images(2)}


def shorter(model, inputs, kept, r):
    """Embeddings and old columns of a row without padding, of which each image keeps the tokens ``kept``."""
    ids = inputs["input_ids"][r]
    columns, seen = [], 0
    for column, (i, real) in enumerate(zip(ids.tolist(), inputs["attention_mask"][r].tolist(), strict=True)):
        if real and (i != IMAGE or seen % 36 in kept):
            columns.append(column)
        seen += i == IMAGE
    embeds = model.get_input_embeddings()(ids)[None].clone()
    features = model.model.get_image_features(inputs["pixel_values"]).pooler_output
    embeds[0, ids == IMAGE] = features[r]
    return embeds[:, columns], columns


@torch.no_grad()
def test_a_shorter_prompt_is_read_as_the_language_model_reads_it():
    model, inputs = tiny_vlm("llava"), llava_inputs()
    with tt.apply(QUARTER, model) as session:
        out = model(**inputs)
    map = session.provenance()["connector"]
    for r in range(2):
        kept = map.source[r][map.mask[r]].tolist()
        start = inputs["input_ids"][r].tolist().index(IMAGE)
        chosen = [c - start for c in kept if start <= c < start + 36]
        assert len(chosen) == 9
        embeds, columns = shorter(model, inputs, chosen, r)
        assert columns == kept
        hidden = model.model.language_model(inputs_embeds=embeds).last_hidden_state
        expected = model.lm_head(hidden)[0]
        assert torch.allclose(out.logits[r, kept], expected, atol=2e-5, rtol=1e-4)
        dropped = [c for c in range(start, start + 36) if c not in kept]
        before = [max(k for k in kept if k < c) for c in dropped]
        assert torch.equal(out.logits[r, dropped], out.logits[r, before])


@torch.no_grad()
def test_everything_kept_changes_no_bit():
    model, inputs = tiny_vlm("llava"), llava_inputs()
    expected = model(**inputs).logits  # transformers puts hooks of its own on a model at its first call
    before = fingerprint(model)
    with tt.apply("connector=random_tokens(keep=1.0)", model):
        assert torch.equal(model(**inputs).logits, expected)
    assert fingerprint(model) == before


def test_a_map_of_a_prompt_merges_within_images():
    picture, source = Picture(4), Pictures([])
    columns = torch.arange(2, 6)
    placed = [Placed(picture, r, columns, columns, r, source) for r in range(2)]
    images = TokenMap.merge(torch.tensor([[0, 0, 1, -1], [1, 0, 0, 0]]), anchor=torch.tensor([[1, 2], [2, 0]]))
    real = torch.ones(2, 7, dtype=torch.bool)
    real[1, 0] = False
    map = prompt_map(placed, [(images, 0), (images, 1)], real)
    x = torch.arange(14.0).view(2, 7, 1)
    expected = torch.tensor([[0, 1, 2.5, 4, 6], [0, 8, 9, 11, 13]])
    assert torch.allclose(map.apply(x).squeeze(-1), expected)
    assert torch.where(map.mask, map.anchors, -1).tolist() == [[0, 1, 3, 4, 6], [-1, 1, 2, 4, 6]]
