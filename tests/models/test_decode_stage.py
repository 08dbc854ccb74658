"""The decode stage on a user's model: their own generate call, drafted; the model as it was afterwards."""

from __future__ import annotations

import inspect

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer

from tokenthrift.core.errors import ThriftError
from tokenthrift.core.plan import Plan
from tokenthrift.core.session import Session
from tokenthrift.models.decoder import DecoderAdapter

VOCAB = 16


@pytest.fixture(scope="module")
def shared():
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def model(shared):
    """The model, checked afterwards to have no trace of a session left."""
    before = dict(vars(shared))
    yield shared
    assert vars(shared) == before


def session_of(model, plan="decode=prompt_lookup(adaptive=False)"):
    return Session(Plan.parse(plan), DecoderAdapter(model))


IDS = torch.tensor([[3, 4, 5, 6, 3, 4, 5, 7, 3, 4, 5, 6]])


def test_the_users_call_gives_the_same_tokens_in_fewer_forwards(model):
    plain = model.generate(IDS, max_new_tokens=50, do_sample=False)
    with session_of(model) as session:
        ours = [model.generate(IDS, max_new_tokens=50, do_sample=False) for _ in range(2)]
    assert [o.tolist() for o in ours] == [plain.tolist()] * 2
    record = session.records["decode"]
    assert (record.calls, record.tokens_before) == (2, 100)
    assert record.tokens_after < 60
    extra = record.extra
    assert extra["accepted"] == record.tokens_before - record.tokens_after
    assert extra["drafted"] >= extra["accepted"] >= 40
    assert extra["drafts"] <= record.tokens_after - 2
    assert extra["mean_accepted_length"] == pytest.approx(98 / (record.tokens_after - 2))
    assert record.seconds == pytest.approx(extra["draft_seconds"] + extra["verify_seconds"])
    assert "mean accepted length" in session.report().to_markdown()


def test_the_report_tells_acceptance_by_depth_and_source_over_all_calls(model):
    with session_of(model) as session:
        model.generate(IDS, max_new_tokens=50, do_sample=False)
        once = session.report().to_dict()["stages"]["decode"]
        model.generate(IDS, max_new_tokens=50, do_sample=False)
    twice = session.report().to_dict()["stages"]["decode"]
    for counts in (once, twice):
        extra, tallies = counts["extra"], counts["tallies"]
        assert [tallies["source"]["lookup"][key] for key in ("tried", "accepted")] == [
            extra["drafted"], extra["accepted"],
        ]  # fmt: skip
        assert sum(t["tried"] for t in tallies["depth"].values()) == extra["drafted"]
        assert sum(t["accepted"] for t in tallies["depth"].values()) == extra["accepted"]
        assert list(tallies["depth"]) == [str(i + 1) for i in range(len(tallies["depth"]))]
    assert twice["tallies"]["depth"]["1"]["tried"] == 2 * once["tallies"]["depth"]["1"]["tried"] > 0
    text = session.report().to_markdown()
    assert "| depth 1 |" in text and "| source lookup |" in text and "verify seconds" in text


def test_streamers_hear_of_every_step_before_its_tokens(model):
    class Witness(BaseStreamer):
        def __init__(self):
            self.told, self.got, self.accepted = [], [], 0

        def on_step(self, drafts, verdicts):
            assert len(drafts) == len(verdicts) == 1
            assert len(self.told) == len(self.got)  # the tokens of the step before are through
            self.told += verdicts[0].tokens
            self.accepted += len(verdicts[0].path)

        def put(self, value):
            self.got += value.flatten().tolist()
            self.told = self.told or list(self.got)  # the prompt
            self.told += self.got[len(self.told) :]  # and the token of the prefill: no step

        def end(self):
            self.ended = True

    streamer = Witness()
    with session_of(model) as session:
        out = model.generate(IDS, max_new_tokens=50, do_sample=False, streamer=streamer)
    assert streamer.got == streamer.told == out[0].tolist() and streamer.ended
    assert streamer.accepted == session.records["decode"].extra["accepted"] > 0


def test_arguments_may_be_positional_and_the_signature_stays(model):
    config = GenerationConfig(max_new_tokens=9, do_sample=False)
    plain = model.generate(IDS, config)
    signature = inspect.signature(model.generate)
    with session_of(model):
        assert inspect.signature(model.generate) == signature
        assert model.generate(IDS, config).tolist() == plain.tolist()


def test_streamers_reach_the_engine(model):
    class Tape(BaseStreamer):
        def __init__(self):
            self.events = []

        def put(self, value):
            self.events.append(value.tolist())

        def end(self):
            self.events.append("end")

    plain, ours = Tape(), Tape()
    model.generate(IDS, max_new_tokens=12, do_sample=False, streamer=plain)
    with session_of(model):
        model.generate(IDS, max_new_tokens=12, do_sample=False, streamer=ours)
    assert ours.events == plain.events


@pytest.fixture(scope="module")
def tokenizer():
    letters = Tokenizer(BPE({chr(ord("a") + i): i for i in range(VOCAB)}, merges=[]))
    letters.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=letters)


@pytest.mark.parametrize("where", ["keyword", "config", "model"])
def test_stop_strings(model, tokenizer, where):
    text = model.generate(IDS, max_new_tokens=30, do_sample=False)[0].tolist()
    stop = tokenizer.convert_ids_to_tokens(text[-1])
    options = {"max_new_tokens": 30, "do_sample": False, "tokenizer": tokenizer}
    if where == "keyword":
        options["stop_strings"] = [stop]
    elif where == "config":
        options = {
            "generation_config": GenerationConfig(max_new_tokens=30, stop_strings=[stop]),
            "tokenizer": tokenizer,
        }
    else:
        model.generation_config.stop_strings = [stop]
    try:
        plain = model.generate(IDS, **options)
        with session_of(model):
            ours = model.generate(IDS, **options)
            with pytest.raises(ValueError, match="tokenizer"):
                model.generate(IDS, **{**options, "tokenizer": None})
    finally:
        model.generation_config.stop_strings = None
    assert ours.tolist() == plain.tolist()
    assert plain.shape[1] < 42
    if where == "config":
        assert options["generation_config"].stop_strings == [stop]


@pytest.mark.parametrize(
    "options",
    [{"custom_generate": lambda *_: None}, {"assistant_model": object()}, {"prompt_lookup_num_tokens": 3}],
    ids=lambda o: next(iter(o)),
)
def test_other_ways_of_drafting_conflict(model, options):
    with session_of(model), pytest.raises(ThriftError, match=next(iter(options))):
        model.generate(IDS, max_new_tokens=3, **options)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"use_cache": False}, {"synced_gpus": True}])
def test_what_cannot_be_drafted_is_refused(model, options):
    with session_of(model), pytest.raises(ThriftError):
        model.generate(IDS, max_new_tokens=3, **options)


def test_one_decode_stage_at_a_time(model):
    with session_of(model):
        with pytest.raises(ThriftError, match="already has a decode stage"):
            session_of(model).install()
        assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape == (1, 15)
    with session_of(model):  # and again, once the first is over
        pass


def test_an_exception_inside_restores_the_model(model):
    with pytest.raises(RuntimeError, match="mine"), session_of(model):
        assert "generate" in vars(model)
        raise RuntimeError("mine")


def test_a_generate_of_the_users_own_is_called_and_put_back(model):
    calls = []
    plain = type(model).generate

    def own(*args, **kwargs):
        calls.append(kwargs)
        return plain(model, *args, **kwargs)

    model.generate = own
    try:
        with session_of(model):
            model.generate(IDS, max_new_tokens=3, do_sample=False)
        assert vars(model)["generate"] is own
    finally:
        del model.generate
    assert len(calls) == 1


def test_sampling_with_the_same_seed_gives_the_same_tokens(model):
    options = {"max_new_tokens": 30, "do_sample": True, "temperature": 0.7, "top_p": 0.9}
    torch.manual_seed(5)
    plain = model.generate(IDS, **options)
    with session_of(model):
        torch.manual_seed(5)
        assert model.generate(IDS, **options).tolist() == plain.tolist()


@pytest.mark.parametrize("cache", ["knorm(budget=0.5)", "streaming_llm(budget=7)", "snapkv(budget=0.6, window=2)"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_reduced_cache_is_read_and_grown_as_without_drafts(model, cache, rows):
    ids = torch.cat([IDS, IDS.flip(1), IDS.roll(3)])[:rows]
    mask = torch.ones_like(ids)
    mask[1:, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    with session_of(model, f"cache={cache}"):
        plain = model.generate(ids, return_dict_in_generate=True, **options)
    with session_of(model, f"cache={cache} decode=prompt_lookup(adaptive=False)") as session:
        ours = model.generate(ids, return_dict_in_generate=True, **options)
    assert ours.sequences.tolist() == plain.sequences.tolist()
    assert session.records["decode"].extra["accepted"] > 0
    for a, b in zip(ours.past_key_values.layers, plain.past_key_values.layers, strict=True):
        assert (a.get_seq_length(), a.dropped, a.entries) == (b.get_seq_length(), b.dropped, b.entries)
        assert a.positions.tolist() == b.positions.tolist()
        torch.testing.assert_close(a.keys, b.keys, rtol=1e-4, atol=1e-4)
