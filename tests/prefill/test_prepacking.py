"""Prepacking: rows as the authors' code makes them; logits, cache and generated tokens as of the padded batch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import tokenthrift as tt
from tiny_models import FAMILIES, prompt, tiny
from tokenthrift.ops.bins import pack_bins

GOLDEN = Path(__file__).parents[1] / "golden" / "prefill"
ALL = pytest.mark.parametrize("family", FAMILIES)
LENGTHS = (31, 5, 40, 1, 12)


def prompts(lengths=LENGTHS):
    drawn = torch.Generator().manual_seed(0)
    return [torch.randint(3, 97, (n,), generator=drawn) for n in lengths]


def padded(model, packed):
    mask = packed.attention_mask
    with torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        return model(packed.input_ids, attention_mask=mask, position_ids=positions, use_cache=True)


def generate(model, inputs, **kwargs):
    return model.generate(**inputs, **{"max_new_tokens": 6, "do_sample": False, **kwargs})


def test_rows_are_those_of_the_authors_code_and_give_what_their_masks_and_positions_give():
    """Their rows lack each prompt's last token, and have padding at the end."""
    model, data = tiny("llama"), np.load(GOLDEN / "prepacking.npz")
    for case, meta in enumerate(json.loads(str(data["meta"]))):
        bins = pack_bins(meta["lengths"], max(meta["lengths"]))
        assert bins == [[index for index, _ in row] for row in meta["bins"]]
        for row, members in enumerate(bins):
            members = [i for i in members if meta["lengths"][i] > 1]
            lengths = [meta["lengths"][i] - 1 for i in members]
            tokens, positions, mask = (
                torch.tensor(data[f"{part}{case}"][row]) for part in ("tokens", "positions", "mask")
            )
            n = sum(lengths)
            with torch.no_grad():
                want = model(
                    tokens[None, :n], position_ids=positions[None, :n], attention_mask=mask[None, None, :n, :n].bool()
                ).logits[0]
            ours = tt.pack(model, [meta["ids"][i][:-1] for i in members]).logits[:, 0]
            ends = torch.tensor(lengths).cumsum(0) - 1
            torch.testing.assert_close(ours, want[ends], atol=1e-5, rtol=1e-5)


@ALL
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("row", [1, 50, 4096])
def test_logits_and_cache_are_those_of_the_padded_batch(family, attention, row):
    model = tiny(family, attention)
    packed = tt.pack(model, prompts(), row=row)
    want = padded(model, packed)
    torch.testing.assert_close(packed.logits, want.logits[:, -1:], atol=1e-5, rtol=1e-5)
    real = packed.attention_mask[:, None, :, None]
    for ours, theirs in zip(packed.past_key_values.layers, want.past_key_values.layers, strict=True):
        assert type(ours) is type(theirs)
        assert ours.get_seq_length() == theirs.get_seq_length()
        held = real[:, :, -theirs.keys.shape[2] :]
        torch.testing.assert_close(ours.keys * held, theirs.keys * held, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.values * held, theirs.values * held, atol=1e-5, rtol=1e-5)
    assert packed.tokens == sum(LENGTHS)


@ALL
def test_generate_goes_on_from_a_pack_any_number_of_times(family):
    model = tiny(family)
    packed = tt.pack(model, prompts())
    plain = {"input_ids": packed.input_ids, "attention_mask": packed.attention_mask}
    want = generate(model, plain)
    for _ in range(2):
        assert torch.equal(generate(model, packed.inputs), want)


def test_a_padded_batch_can_be_packed_wherever_its_padding_is():
    model = tiny("llama")
    want = tt.pack(model, prompts((7, 20)))
    ids, mask = torch.zeros(2, 24, dtype=torch.long), torch.zeros(2, 24, dtype=torch.long)
    for row, p in enumerate(prompts((7, 20))):
        ids[row, 2 : 2 + len(p)], mask[row, 2 : 2 + len(p)] = p, 1
    got = tt.pack(model, ids, mask)
    assert torch.equal(got.input_ids, want.input_ids)
    assert torch.equal(got.logits, want.logits)


@ALL
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_plan_generates_what_the_padded_batch_does(family, attention):
    model, inputs = tiny(family, attention), prompt(batch=3, length=40, pad=22)
    want, before = generate(model, inputs), sorted(vars(model))
    with tt.apply("prefill=prepacking()", model) as session:
        got = generate(model, inputs)
        every = model(**inputs, position_ids=(inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)).logits
    assert torch.equal(got, want)
    assert sorted(vars(model)) == before
    real = inputs["attention_mask"].bool()
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    want_logits = model(**inputs, position_ids=positions).logits
    torch.testing.assert_close(every[real], want_logits[real], atol=1e-5, rtol=1e-5)
    record = session.report().stages["prefill"]
    assert (record.calls, record.tokens_before, record.tokens_after) == (2, 240, 240 - 44)
    assert session.flops < session.flops_dense
    assert session.provenance()["prefill"].positions("first")[0, 0] == 22


def test_a_batch_without_padding_runs_as_it_is():
    model, inputs = tiny("llama"), prompt()
    want = model(**inputs).logits
    with tt.apply("prefill=prepacking()", model) as session:
        assert torch.equal(model(**inputs).logits, want)
        assert torch.equal(model(inputs["input_ids"]).logits, want)
    assert "prefill" not in session.records


def test_a_plan_with_drafts_decodes_as_without():
    model, inputs = tiny("llama"), prompt(batch=3, length=40, pad=22)
    want = generate(model, inputs, max_new_tokens=12)
    with tt.apply("prefill=prepacking() decode=prompt_lookup()", model):
        assert torch.equal(generate(model, inputs, max_new_tokens=12), want)


def test_calls_with_more_wishes_and_padding_on_the_right_are_left_alone():
    model, inputs = tiny("llama"), prompt(pad=9)
    right = {k: v.flip(1) for k, v in inputs.items()}
    want = model(**right).logits
    with tt.apply("prefill=prepacking()", model) as session:
        assert len(model(**inputs, output_hidden_states=True).hidden_states) == 3
        assert torch.isfinite(model(**inputs, labels=inputs["input_ids"]).loss)
        assert torch.equal(model(**right).logits, want)
    assert "prefill" not in session.records


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: tt.pack(tiny("llama"), []), "at least one prompt"),
        (lambda: tt.pack(tiny("llama"), [[3, 4], []]), "one token in each"),
        (lambda: tt.pack(tiny("llama"), [[3, 4]], row=0), "row=0"),
        (lambda: tt.pack(tiny("llama"), [[3, 4]], torch.ones(1, 2)), "leave out attention_mask"),
        (lambda: tt.pack(tiny("llama"), torch.ones(2, 3).long(), torch.ones(2, 2)), "same shape"),
        (lambda: tt.pack(torch.nn.Linear(2, 2), [[3]]), "no decoder-only model"),
        (lambda: tt.Plan.parse("prefill=prepacking(row=0)"), "row=0"),
        (lambda: tt.apply("prefill=prepacking() cache=knorm()", tiny("llama")).install(), "not both"),
    ],
)
def test_what_cannot_be_packed_is_refused_in_one_line(call, words):
    with pytest.raises(tt.ThriftError, match=words) as error:
        call()
    assert "\n" not in str(error.value)
