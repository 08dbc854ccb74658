"""Every family with fewer visual tokens, against its language model called once for the whole shortened text."""

from __future__ import annotations

import pytest
import torch

import tokenthrift as tt
from tiny_models import fingerprint
from tiny_vlms import EVERY, IMAGE, ROWS, alone, batch, pictured, tiny_vlm

PLAIN = [f for f in EVERY if f not in ("llava_next", "llava_onevision")]
FAMILY = pytest.mark.parametrize("family", PLAIN)
WINDOW = 16  # of the tiny Gemma's sliding layers


def quarter(positions="gapless"):
    return f"connector=random_tokens(keep=0.25, seed=3, positions='{positions}')"


def language(model):
    return getattr(model.model, "language_model", None) or model.model.text_model


class Reference:
    """One row of a prompt, of which some columns are left: no cache, no padding, everything by hand."""

    def __init__(self, model, inputs, kept, positions="gapless"):
        self.model, self.kept, self.policy = model, kept, positions
        seen = {}

        def note(_m, _a, kwargs):
            seen.update(kwargs)

        handle = language(model).register_forward_pre_hook(note, with_kwargs=True)
        model(**inputs, use_cache=False)
        handle.remove()
        ids = inputs["input_ids"][0].tolist()
        self.kinds, image = [], -1  # -1 for text, else which image
        for column, i in enumerate(ids):
            image += i == IMAGE and (column == 0 or ids[column - 1] != IMAGE)
            self.kinds.append(image if i == IMAGE else -1)
        self.embeds = seen["inputs_embeds"][:, kept]
        self.old = seen.get("position_ids")
        if self.old is None:
            self.old = torch.arange(len(ids))[None]
        self.deep = seen.get("deepstack_visual_embeds")
        self.which = [i for i, column in enumerate(c for c in range(len(ids)) if ids[c] == IMAGE) if column in kept]

    def positions(self):
        if self.policy == "original":
            return self.old[..., self.kept]
        if self.old.dim() == 2:
            return torch.arange(len(self.kept))[None]
        out, at = [], 0
        columns = list(self.kept)
        while columns:
            image = self.kinds[columns[0]]
            if image < 0:
                out.append([at] * 3)
                columns.pop(0)
                at += 1
                continue
            first = self.kinds.index(image)
            mine = [c - first for c in columns if self.kinds[c] == image]
            high, wide = sorted({c // 6 for c in mine}), sorted({c % 6 for c in mine})
            out += [[at, at + high.index(c // 6), at + wide.index(c % 6)] for c in mine]
            columns = columns[len(mine) :]
            at += max(len(high), len(wide))
        return torch.tensor(out).T[:, None]

    @torch.no_grad()
    def logits(self, more=()):
        """Of the row's kept columns and of so many later tokens."""
        embeds = torch.cat([self.embeds, self.model.get_input_embeddings()(torch.tensor([list(more)]).long())], 1)
        positions = self.positions()
        last = self.old.max() if self.policy == "original" else positions.max()
        later = (last + 1 + torch.arange(len(more))).expand(*positions.shape[:-1], -1)
        given = {"inputs_embeds": embeds, "position_ids": torch.cat([positions, later], -1), "use_cache": False}
        if self.deep is not None:
            visual = torch.tensor([[self.kinds[c] >= 0 for c in self.kept] + [False] * len(more)])
            given |= {"visual_pos_masks": visual, "deepstack_visual_embeds": [d[self.which] for d in self.deep]}
        n = embeds.shape[1]
        given["attention_mask"] = torch.ones(1, n).long()
        if self.model.config.model_type == "gemma3":
            full, near = torch.zeros(n, n, dtype=torch.bool), torch.zeros(n, n, dtype=torch.bool)
            kinds = [self.kinds[c] for c in self.kept] + [-1] * len(more)
            for q in range(n):
                for k in range(n):
                    full[q, k] = k <= q or (kinds[q] == kinds[k] >= 0)
                    near[q, k] = full[q, k] and q - k < WINDOW
            given["attention_mask"] = {"full_attention": full[None, None], "sliding_attention": near[None, None]}
        return self.model.lm_head(language(self.model)(**given).last_hidden_state)[0]


def kept_columns(session, ids, mask):
    """Per row the columns that are left, counted without the row's padding."""
    map = session.provenance()["connector"]
    pads = (mask == 0).sum(1).tolist()
    return [[c - pad for c in map.source[r][map.mask[r]].tolist()] for r, pad in enumerate(pads)]


def close(a, b):
    return torch.allclose(a, b, atol=3e-4, rtol=1e-3)


@FAMILY
@torch.no_grad()
def test_nothing_changes_where_everything_is_kept_or_nothing_is_visual(family):
    model, inputs = tiny_vlm(family), pictured(family, ROWS, 3)
    text = batch([[3, 4, 5], [6, 7]])
    expected, words = model(**inputs).logits, model(**text).logits
    before = fingerprint(model)
    with tt.apply("connector=random_tokens(keep=1.0)", model) as session:
        assert torch.equal(model(**inputs).logits, expected)
        assert session.report().stages["connector"].kept == 1
    with tt.apply(quarter(), model) as session:
        assert torch.equal(model(**text).logits, words)
        assert "connector" not in session.report().stages
    assert fingerprint(model) == before
    assert torch.equal(model(**inputs).logits, expected)


@FAMILY
@pytest.mark.parametrize("positions", ["gapless", "original"])
@torch.no_grad()
def test_a_batch_is_generated_as_the_shorter_texts_are(family, positions):
    """Rows with different numbers of images and of tokens, padded on the left."""
    model, inputs = tiny_vlm(family), pictured(family, ROWS, 3)
    width = inputs["input_ids"].shape[1]
    with tt.apply(quarter(positions), model) as session:
        out = model.generate(
            **inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    assert torch.equal(out.sequences[:, :width], inputs["input_ids"])
    kept = kept_columns(session, inputs["input_ids"], inputs["attention_mask"])
    assert [len(k) for k in kept] == [14, 24]
    record = session.report().stages["connector"]
    assert (record.tokens_before, record.tokens_after) == (108, 27)
    assert out.past_key_values.layers[1].keys.shape[2] == 24 + 3
    for r in range(2):
        reference = Reference(model, alone(family, r), kept[r], positions)
        more = out.sequences[r, width:].tolist()
        assert close(torch.stack([step[r] for step in out.logits]), reference.logits(more)[-5:-1])


@FAMILY
@torch.no_grad()
def test_a_forward_gives_logits_at_all_columns(family):
    model, inputs = tiny_vlm(family), alone(family, 1)
    with tt.apply(quarter(), model) as session:
        out = model(**inputs)
    (kept,) = kept_columns(session, inputs["input_ids"], inputs["attention_mask"])
    reference = Reference(model, inputs, kept)
    assert out.logits.shape[1] == inputs["input_ids"].shape[1] == out.past_key_values.get_seq_length()
    assert close(out.logits[0, kept], reference.logits())


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3"])
@torch.no_grad()
def test_eager_attention(family):
    model, inputs = tiny_vlm(family, "eager"), alone(family, 1)
    with tt.apply(quarter(), model) as session:
        out = model(**inputs)
    (kept,) = kept_columns(session, inputs["input_ids"], inputs["attention_mask"])
    assert close(out.logits[0, kept], Reference(tiny_vlm(family), inputs, kept).logits())
