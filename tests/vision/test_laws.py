"""What holds for every vision method, whoever wrote it: a new one joins these tests by being there."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenthrift as tt
from models.encoders import TEXTS, text_encoder, texts
from tokenthrift.core.method import find
from vision.tiny import ENCODERS, build, run
from vision.views import view

close = {"rtol": 1e-5, "atol": 1e-5}
OWN_MODELS = {"fastvggt", "subtokens"}
"""Methods that need another model, or a tokenizer; they have these tests in files of their own."""
METHODS = [m.name for m in tt.methods(stage="vision") if m.name not in OWN_MODELS and not m.name.startswith("_")]
IDLE = {"centerclip": "at=1, centers=1.0", "tomesd": "ratio=0.0", "super_tokens": "cell=(1, 1)"}
"""Parameters that mean: change nothing. Elsewhere keep=1.0."""
ACTIVE = {
    "centerclip": {"at": 0, "centers": 5},
    "tomesd": {"ratio": 0.5},
    "super_tokens": {},
    "diffrate": {"keep": 0.4},
}
"""Parameters with which the first of two layers reduces something. Elsewhere r=3."""
MANY_TO_MANY = {"sinkhorn", "token_transforming", "super_tokens"}
PRUNES = {"tofu", "diffrate", "kmedoids", "centerclip", "evit"}
"""Methods that drop mass, or count it in their own way."""


def idle(name):
    return f"vision={name}({IDLE.get(name, 'keep=1.0')})"


@pytest.fixture(autouse=True)
def _quick():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("name", METHODS)
def test_nothing_to_reduce_is_bit_identical(name, encoder, attention):
    model = build(encoder, attention)
    dense = run(model)
    with tt.apply(idle(name), model):
        assert torch.equal(run(model), dense)
    assert torch.equal(run(model), dense)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("encoder", TEXTS)
@pytest.mark.parametrize("name", METHODS)
def test_nothing_to_reduce_in_padded_texts_is_bit_identical(name, encoder, attention):
    if getattr(find(name).cls, "images_only", False):
        with pytest.raises(tt.ThriftError, match="reads text"), tt.apply(idle(name), text_encoder(encoder)):
            pass
        return
    model, batch = text_encoder(encoder, attention), texts(19, 8)
    dense = model(**batch).last_hidden_state
    with tt.apply(idle(name), model):
        assert torch.equal(model(**batch).last_hidden_state, dense)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("name", METHODS)
def test_runs_on_every_family_and_leaves_it_as_it_was(name, encoder):
    model = build(encoder)
    dense = run(model)
    params = ", ".join(f"{k}={v}" for k, v in ACTIVE.get(name, {"r": 3}).items())
    with tt.apply(f"vision={name}({params})", model) as session:
        out = run(model)
    assert out.isfinite().all() and session.report().stages["vision"].kept < 1
    assert torch.equal(run(model), dense) and not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=12, deadline=None)
@given(
    side=st.integers(3, 7),
    prefix=st.integers(0, 4),
    batch=st.integers(1, 3),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_laws_of_the_maps(name, side, prefix, batch, seed, data):
    torch.manual_seed(seed)
    tokens = prefix + side * side
    sizes = torch.rand(batch, tokens) + 0.5
    attention = torch.randn(batch, 2, tokens, tokens).softmax(-1)
    seen = view(
        torch.randn(batch, tokens, 8), prefix, layer=data.draw(st.integers(0, 1)), layers=2, sizes=sizes,
        attention=attention, grid=(1, side, side),
    )  # fmt: skip
    method = find(name).make(**ACTIVE.get(name, {"r": 3}))
    map = method.reduce(seen)
    if map is None:
        return
    ones = torch.ones(batch, map.n_out)
    w = map.dense()
    assert map.n_in == tokens and map.n_out < tokens and map.mask.all()
    torch.testing.assert_close(w.sum(-1), ones, **close)
    assert torch.equal(w[:, :prefix, :prefix], torch.eye(prefix).expand(batch, -1, -1))  # in front, alone
    if name in MANY_TO_MANY:
        assert (map.dense_share().sum(-2) <= 1 + 1e-5).all()
    else:
        u = map.unmerge(torch.eye(map.n_out).expand(batch, -1, -1))
        torch.testing.assert_close(w @ u, torch.eye(map.n_out).expand(batch, -1, -1), **close)
    if name not in PRUNES:
        torch.testing.assert_close(map.sizes(sizes).sum(-1), sizes.sum(-1), **close)
    assert (map.sizes(sizes) > 0).all()
    merged = method.combine(seen, map) if hasattr(method, "combine") else map.apply(seen.features)
    assert merged.shape == (batch, map.n_out, 8) and merged.isfinite().all()
    if hasattr(method, "combine"):
        assert torch.equal(merged[:, :prefix], seen.features[:, :prefix])
