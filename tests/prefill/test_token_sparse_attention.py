"""Token Sparse Attention: the authors' tokens and outputs; nothing but attention among the chosen changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.cache_utils import DynamicLayer

import tokenthrift as tt
from tiny_models import FAMILIES, prompt, tiny
from tokenthrift.ops.attention import attend_selected, attention_rows

GOLDEN = Path(__file__).parents[1] / "golden" / "prefill"
ALL = pytest.mark.parametrize("family", FAMILIES)
BOTH = pytest.mark.parametrize("attention", ["sdpa", "eager"])
PLAN = "prefill=token_sparse_attention(coverage=0.3, min_tokens=4, window=4, kernel=3, layers=1)"


def generate(model, inputs, **kwargs):
    return model.generate(**inputs, **{"max_new_tokens": 6, "do_sample": False, **kwargs})


def view_of(query, key, scaling, mask):
    view = tt.View(queries=query, keys=key, mask=mask)
    view.offer("attention", lambda rows: attention_rows(query[:, :, -rows:], key, scaling, mask))
    return view


@pytest.mark.parametrize("case", [0, 1, 2])
def test_tokens_and_outputs_equal_the_authors_code(case):
    data = np.load(GOLDEN / "token_sparse_attention.npz")
    q, k, v = (torch.tensor(data[name]) for name in "qkv")
    coverage, least, window, kernel = data[f"c{case}_cfg"]
    plan = f"token_sparse_attention(coverage={coverage}, min_tokens={int(least)}, window={int(window)}, "
    method = tt.Plan.parse(f"{plan}kernel={int(kernel)})").at("prefill")[0]
    map = method.reduce(view_of(q, k, 8**-0.5, torch.ones(1, 80, dtype=torch.bool)))
    np.testing.assert_array_equal(map.source, data[f"c{case}_indices"])
    out = attend_selected(q, k, v, map, 8**-0.5).transpose(1, 2).flatten(2)
    np.testing.assert_allclose(out, data[f"c{case}_out"], atol=1e-5)


@ALL
@BOTH
def test_attention_is_dense_attention_that_masks_what_was_left_out(family, attention):
    """Grouped queries and left padding; the cache holds all tokens, and decoding is dense."""
    model, inputs = tiny(family, attention), prompt(length=40, pad=7)
    with tt.apply(PLAN, model) as session, torch.no_grad():
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        seen = []
        with spy(model, 1, seen):
            out = model(**inputs, position_ids=positions, use_cache=True)
    assert list(session.provenance()["prefill"]) == [1]
    map = session.provenance()["prefill"][1]
    q, k, v, scaling, got = seen[0]
    groups = q.shape[1] // k.shape[1]
    kept = map.kept
    allowed = torch.ones(40, 40, dtype=torch.bool).tril() & kept[:, :, None, :]
    logits = (q @ k.repeat_interleave(groups, 1).transpose(-1, -2) * scaling).masked_fill(~allowed, -torch.inf)
    want = logits.softmax(-1).nan_to_num() @ v.repeat_interleave(groups, 1)
    want = want * kept.unsqueeze(-1)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert not (kept & ~inputs["attention_mask"].bool()[:, None]).any()
    assert 0 < session.report().stages["prefill"].kept < 1
    assert out.past_key_values.get_seq_length() == 40
    assert all(isinstance(layer, DynamicLayer) for layer in out.past_key_values.layers)


class spy:
    """Notes what a layer's attention was given and gave."""

    def __init__(self, model, layer, seen):
        import tokenthrift.models.prefill_stage as stage

        self.stage, self.layer, self.seen = stage, layer, seen

    def __enter__(self):
        self.real = self.stage.attend_selected

        def attend(q, k, v, map, scaling):
            out = self.real(q, k, v, map, scaling)
            self.seen.append((q, k, v, scaling, out))
            return out

        self.stage.attend_selected = attend

    def __exit__(self, *_):
        self.stage.attend_selected = self.real


@ALL
@BOTH
def test_leaving_out_nothing_is_bit_identical_and_leaves_no_trace(family, attention):
    model, inputs = tiny(family, attention), prompt(pad=5)
    tokens, logits = generate(model, inputs, max_new_tokens=3), model(**inputs).logits
    before = sorted(vars(model)), model.config._attn_implementation
    for nothing in ("coverage=0.0, min_tokens=4, window=4", "coverage=0.5", "coverage=1e-9, min_tokens=4, window=4"):
        with tt.apply(f"token_sparse_attention({nothing}, layers=[0, 1])", model):
            assert torch.equal(generate(model, inputs, max_new_tokens=3), tokens)
            assert torch.equal(model(**inputs).logits, logits)
    with tt.apply(PLAN, model):
        assert not torch.equal(model(**inputs, logits_to_keep=1).logits, logits[:, -1:])
    assert (sorted(vars(model)), model.config._attn_implementation) == before
    assert torch.equal(model(**inputs).logits, logits)


@pytest.mark.parametrize("pad", [13, 33])
def test_a_padded_row_generates_what_it_generates_alone(pad):
    model, inputs = tiny("llama"), prompt(length=40, pad=pad)
    with tt.apply(PLAN, model):
        out = generate(model, inputs)
        for row, padding in enumerate((pad, 0)):
            alone = generate(model, {k: v[row : row + 1, padding:] for k, v in inputs.items()})
            assert torch.equal(out[row, padding:], alone[0])


def test_flops_are_those_of_the_smaller_attention():
    model, inputs = tiny("llama"), prompt(batch=1, length=40)
    with tt.apply(PLAN, model) as session, torch.no_grad():
        model(**inputs)
    m = session.provenance()["prefill"][1].n_out
    assert session.flops_dense - session.flops == 4 * 6 * 8 * (40**2 - m**2)


def test_it_goes_with_the_cache_and_the_decode_stage():
    model, inputs = tiny("llama"), prompt(length=40, pad=9)
    with tt.apply(f"{PLAN} cache=snapkv(budget=12, window=4) decode=prompt_lookup()", model) as session:
        drafted = generate(model, inputs, max_new_tokens=12)
    with tt.apply(f"{PLAN} cache=snapkv(budget=12, window=4)", model):
        assert torch.equal(generate(model, inputs, max_new_tokens=12), drafted)
    stages = session.report().stages
    assert stages["cache"].kept < 0.5
    assert stages["prefill"].calls == 1


def test_sliding_layers_are_left_alone():
    model = tiny("gemma3_text")
    with tt.apply("token_sparse_attention(coverage=0.5, min_tokens=2, window=2, layers=[0, 1, 2])", model) as session:
        model(**prompt(length=40))
    assert list(session.provenance()["prefill"]) == [1]


@pytest.mark.parametrize(
    "wrong",
    ["coverage=1.0", "coverage=-0.1", "min_tokens=0", "window=0", "kernel=2", "layers=word", "layers=[0.5]"],
)
def test_impossible_parameters_are_refused_in_one_line(wrong):
    with pytest.raises(tt.ThriftError) as error:
        tt.Plan.parse(f"token_sparse_attention({wrong})")
    assert "\n" not in str(error.value)


def test_layers_that_are_not_there_are_refused():
    with (
        pytest.raises(tt.ThriftError, match="the model has 2 layers"),
        tt.apply("token_sparse_attention(layers=5)", tiny("llama")),
    ):
        pass
