"""What else happens to a model while its encoder is reduced: threads, copies, compilers, interruptions."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack

import tokenthrift as tt
from models.encoders import TimmAttention, TimmLike
from vision.tiny import build, run


@pytest.fixture(autouse=True)
def _quick():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("plan", ["tome(keep=0.5)", "tomesd()", "tome(keep=1.0)"])
def test_two_sessions_on_one_encoder_are_refused(plan):
    model = build("vit")
    dense = run(model)
    with tt.apply("tome(keep=0.5)", model):
        reduced = run(model)
        with pytest.raises(tt.ThriftError, match="another session is installed"), tt.apply(plan, model):
            pass
        assert torch.equal(run(model), reduced)
    with tt.apply(plan, model):
        pass
    assert torch.equal(run(model), dense)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_a_reduced_model_is_not_copied(copied):
    model = build("dinov2")
    with tt.apply("tome(keep=0.5)", model), pytest.raises(tt.ThriftError, match="leave its with block first"):
        copied(model)
    assert run(copy.deepcopy(model)).shape[1] == 26


@pytest.mark.parametrize(("encoder", "plan"), [("dinov2", "tome(keep=0.5)"), ("timm", "mctf(keep=0.5)")])
def test_threads_do_not_meet(encoder, plan):
    model, outputs, errors = build(encoder), {}, []
    together = threading.Barrier(2)

    def work(seed):
        try:
            for turn in range(10):
                together.wait(10)
                with torch.no_grad():
                    outputs[seed, turn] = run(model, seed)
        except Exception as error:
            errors.append(error)
            together.abort()

    with tt.apply(plan, model) as session:
        workers = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not errors and session.report().stages["vision"].calls == 20
        for (seed, _), out in outputs.items():
            assert torch.equal(out, run(model, seed))


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("plan", ["tome(keep=0.5)", "tomesd()"])
def test_a_model_that_was_compiled_before(plan, wrapped):
    model = build("vit")
    dense = run(model)
    with tt.apply(plan, model):
        expected = run(model)
    compiled = torch.compile(model, backend="eager")
    run(compiled)
    with tt.apply(plan, compiled if wrapped else model) as session:
        torch.testing.assert_close(run(compiled), expected, rtol=1e-5, atol=1e-5)
    assert session.forwards == 1
    torch.testing.assert_close(run(compiled), dense, rtol=1e-5, atol=1e-5)
    torch.compiler.reset()


def test_an_interruption_leaves_nothing_behind():
    model = build("timm")

    def interrupt(*_):
        raise KeyboardInterrupt

    with tt.apply("mctf(keep=0.5)", model):
        expected = run(model)
        handle = model.blocks[1].attn.proj.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(model)
        handle.remove()
        assert not _get_current_function_mode_stack()
        assert torch.equal(run(model), expected)
    assert "forward" not in vars(model.blocks[1].attn)


@pytest.mark.parametrize("plan", ["tome(keep=0.5)", "mctf()", "kmedoids()", "super_tokens()", "tomesd()"])
def test_a_batch_of_no_images(plan):
    model = build("timm")
    with tt.apply(plan, model):
        assert model(torch.zeros(0, 3, 40, 40)).shape == (0, 5)


class Unfused(TimmAttention):
    def forward(self, x, attn_mask=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) * self.scale
        scores = scores if attn_mask is None else scores + attn_mask
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_attention_that_cannot_be_replaced_is_named():
    model = build("timm")
    for block in model.blocks:
        block.attn.__class__ = Unfused
    dense = run(model)
    with tt.apply("mctf(keep=1.0)", model):
        assert torch.equal(run(model), dense)
    with tt.apply("tome(keep=0.5)", model):
        run(model)
    with pytest.raises(tt.ThriftError, match="set_fused_attn"), tt.apply("mctf(keep=0.5)", model):
        run(model)


@pytest.mark.parametrize("unlike", ["no layer scale", "no mask"])
def test_layers_that_only_look_like_timms_are_refused(unlike):
    model = TimmLike()
    for block in model.blocks:
        if unlike == "no mask":
            block.forward = lambda x, rope=None: x
        else:  # timm's blocks with norms behind the sub-layers
            del block.ls1
    assert isinstance(model.norm, nn.LayerNorm)
    with pytest.raises(tt.ThriftError, match="no adapter fits TimmLike"):
        tt.apply("tome(keep=0.5)", model)
