"""The engine against plain generate, in float32: the same tokens whatever is drafted, the same law when sampling."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import Cache, DynamicCache, GenerationConfig, LogitsProcessorList
from transformers.cache_utils import DynamicLayer
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from tokenthrift.core.errors import ThriftError
from tokenthrift.decoding.engine import DecodeStats
from tokenthrift.decoding.prompt_lookup import PromptLookup

LOOKUP = PromptLookup(adaptive=False, draft=8).start


def ids_of(*rows):
    return torch.tensor(rows)


def stats_of():
    """A list that the engine's counts are appended to."""
    seen: list[DecodeStats] = []
    return seen, seen.append


# ---- greedy ---------------------------------------------------------------------------------------------------------

OPTIONS = [
    {},
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 3},
    {"eos_token_id": [1, 5, 9], "pad_token_id": 0},
    {"eos_token_id": [1, 5, 9], "pad_token_id": 0, "min_new_tokens": 20},
    {"bad_words_ids": [[3], [4, 5]], "repetition_penalty": 0.8},
    {"max_length": 40},
    {"prefill_chunk_size": 7},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
def test_greedy_tokens_are_those_of_plain_generate(model, prompts, oracle, custom, options):
    options = {"max_new_tokens": 30, **options} if "max_length" not in options else options
    accepted = 0
    for seed in range(4):
        ids = ids_of(prompts(seed))
        plain = model.generate(ids, do_sample=False, **options)
        for factory in (LOOKUP, oracle(plain[0].tolist(), seed=seed)):
            seen, on_done = stats_of()
            ours = model.generate(ids, do_sample=False, custom_generate=custom(factory, on_done=on_done), **options)
            assert ours.tolist() == plain.tolist()
            assert seen[0].committed == plain.shape[1] - ids.shape[1]
            accepted += seen[0].accepted
    assert accepted > 0


@pytest.mark.parametrize("new", [1, 2, 3, 4, 5])
def test_few_new_tokens(llama, prompts, oracle, custom, new):
    ids = ids_of(prompts(3))
    plain = llama.generate(ids, do_sample=False, max_new_tokens=new)
    long = llama.generate(ids, do_sample=False, max_new_tokens=20)[0].tolist()
    seen, on_done = stats_of()
    ours = llama.generate(
        ids, do_sample=False, max_new_tokens=new, custom_generate=custom(oracle(long, 0.0), on_done=on_done)
    )
    assert ours.tolist() == plain.tolist()
    assert seen[0].forwards == min(new, 2)


def test_right_drafts_save_the_forwards_they_should(model, prompts, oracle, custom):
    ids = ids_of(prompts(1))
    plain = model.generate(ids, do_sample=False, max_new_tokens=29)
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    seen, on_done = stats_of()
    try:
        factory = oracle(plain[0].tolist(), spoil=0.0, width=6)
        model.generate(ids, do_sample=False, max_new_tokens=29, custom_generate=custom(factory, on_done=on_done))
    finally:
        handle.remove()
    assert len(calls) == seen[0].forwards == 1 + 28 // 7
    assert (seen[0].committed, seen[0].drafts, seen[0].drafted, seen[0].accepted) == (29, 4, 24, 24)


def test_only_needed_logits_are_computed(llama, prompts, oracle, custom):
    ids = ids_of(prompts(1))
    plain = llama.generate(ids, do_sample=False, max_new_tokens=15)
    rows = []
    handle = llama.lm_head.register_forward_hook(lambda _m, _i, out: rows.append(out.shape[1]))
    try:
        llama.generate(
            ids, do_sample=False, max_new_tokens=15, custom_generate=custom(oracle(plain[0].tolist(), 0.0, 6))
        )
    finally:
        handle.remove()
    assert rows == [1, 7, 7]


def test_an_end_of_sequence_inside_a_draft_stops_there(llama, prompts, oracle, custom):
    ids = ids_of(prompts(2))
    text = llama.generate(ids, do_sample=False, max_new_tokens=20)[0].tolist()
    end = text[ids.shape[1] + 4]
    options = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": end, "pad_token_id": 0}
    plain = llama.generate(ids, return_dict_in_generate=True, **options)
    seen, on_done = stats_of()
    engine = custom(oracle(text, spoil=0.0, width=10), on_done=on_done)
    ours = llama.generate(ids, return_dict_in_generate=True, custom_generate=engine, **options)
    assert ours.sequences.tolist() == plain.sequences.tolist()
    assert ours.past_key_values.get_seq_length() == plain.past_key_values.get_seq_length()
    assert seen[0].forwards <= 2


def test_the_users_stopping_criteria_are_asked_for_every_token(llama, prompts, oracle, custom):
    ids = ids_of(prompts(4))
    text = llama.generate(ids, do_sample=False, max_new_tokens=20)[0].tolist()
    runs = []
    for engine in (None, custom(oracle(text, 0.1))):
        asked = []

        def stop(input_ids, scores, asked=asked, **_):
            asked.append(input_ids[0].tolist())
            return torch.tensor([len(asked) == 9])

        out = llama.generate(
            ids,
            do_sample=False,
            max_new_tokens=20,
            stopping_criteria=StoppingCriteriaList([stop]),
            custom_generate=engine,
        )
        runs.append((out.tolist(), asked))
    assert runs[0] == runs[1]


def test_logits_processors_see_every_prefix_once_and_in_order(llama, prompts, oracle, custom):
    ids = ids_of(prompts(5))
    text = llama.generate(ids, do_sample=False, max_new_tokens=20)[0].tolist()
    runs = []
    for engine in (None, custom(oracle(text, 0.3))):
        seen = []

        def process(input_ids, scores, seen=seen):
            seen.append(input_ids[0].tolist())
            return scores

        llama.generate(
            ids,
            do_sample=False,
            max_new_tokens=20,
            logits_processor=LogitsProcessorList([process]),
            custom_generate=engine,
        )
        runs.append(seen)
    assert runs[0] == runs[1]


# ---- trees ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}, {"eos_token_id": [1, 5, 9], "pad_token_id": 0}])
def test_trees(model, prompts, tree_oracle, custom, options, attention):
    rows = [prompts(seed, length) for seed, length in enumerate((24, 17, 9))]
    ids = ids_of(*([0] * (24 - len(r)) + r for r in rows))
    mask = (torch.arange(24) >= 24 - torch.tensor([[24], [17], [9]])).long()
    options = {"pad_token_id": 0, **options, "do_sample": False, "max_new_tokens": 40}
    before, accepted = model.config._attn_implementation, 0
    model.set_attn_implementation(attention)
    try:
        for inputs in ({"input_ids": ids, "attention_mask": mask}, {"input_ids": ids[:1]}):
            plain = model.generate(**inputs, **options)
            texts = [row[-n:] for row, n in zip(plain.tolist(), plain.shape[1] - 24 + mask.sum(1), strict=False)]
            stream, (seen, on_done) = iter(texts), stats_of()
            start = custom(lambda p, request: tree_oracle(next(stream), 0.1)(p), on_done=on_done)  # noqa: B023
            ours = model.generate(**inputs, custom_generate=start, **options)
            assert ours.tolist() == plain.tolist()
            accepted += seen[0].accepted
        assert accepted > 0
    finally:
        model.set_attn_implementation(before)


def test_the_cache_after_trees_is_that_of_plain_generate(model, prompts, tree_oracle, custom):
    ids = ids_of(*(prompts(seed) for seed in range(2)))
    options = {"do_sample": False, "max_new_tokens": 20, "return_dict_in_generate": True}
    plain = model.generate(ids, **options)
    texts = iter(plain.sequences.tolist())
    ours = model.generate(ids, custom_generate=custom(lambda p, request: tree_oracle(next(texts))(p)), **options)
    assert ours.sequences.tolist() == plain.sequences.tolist()
    for a, b in zip(ours.past_key_values.layers, plain.past_key_values.layers, strict=True):
        assert a.get_seq_length() == b.get_seq_length()
        torch.testing.assert_close(a.keys, b.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(a.values, b.values, rtol=1e-4, atol=1e-4)


def test_trees_become_chains_where_the_cache_takes_no_trees(lfm2, prompts, tree_oracle, custom):
    ids = ids_of(prompts(5))
    plain = lfm2.generate(ids, do_sample=False, max_new_tokens=30).tolist()
    assert (
        lfm2.generate(ids, do_sample=False, max_new_tokens=30, custom_generate=custom(tree_oracle(plain[0]))).tolist()
        == plain
    )


def test_sampled_trees_give_the_tokens_of_plain_generate_with_the_same_seed(model, prompts, tree_oracle, custom):
    for seed in range(3):
        ids = ids_of(prompts(seed))
        torch.manual_seed(seed)
        plain = model.generate(ids, do_sample=True, top_k=5, max_new_tokens=25)
        torch.manual_seed(seed)
        engine = custom(tree_oracle(plain[0].tolist()))
        assert (
            model.generate(ids, do_sample=True, top_k=5, max_new_tokens=25, custom_generate=engine).tolist()
            == plain.tolist()
        )


# ---- batches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"eos_token_id": [1, 5, 9], "pad_token_id": 0}, {"repetition_penalty": 1.2}])
def test_left_padded_batches(model, prompts, oracle, custom, options):
    rows = [prompts(seed, length) for seed, length in enumerate((24, 17, 9))]
    ids = ids_of(*([0] * (24 - len(r)) + r for r in rows))
    mask = ids_of(*([0] * (24 - len(r)) + [1] * len(r) for r in rows))
    options = {"pad_token_id": 0, **options, "attention_mask": mask, "do_sample": False, "max_new_tokens": 40}
    plain = model.generate(ids, **options)
    assert model.generate(ids, custom_generate=custom(LOOKUP), **options).tolist() == plain.tolist()
    texts = [
        [t for t, m in zip(row, keep, strict=True) if m] for row, keep in zip(ids.tolist(), mask.tolist(), strict=True)
    ]
    texts = iter(text + row[24:] for text, row in zip(texts, plain.tolist(), strict=True))
    seen, on_done = stats_of()
    engine = custom(lambda prompt, request: oracle(next(texts), 0.03)(prompt), on_done=on_done)
    assert model.generate(ids, custom_generate=engine, **options).tolist() == plain.tolist()
    assert seen[0].accepted > 0


def test_rows_that_end_early_stay_padded_while_others_go_on(llama, prompts, oracle, custom):
    ids = ids_of(*(prompts(seed) for seed in range(3)))
    free = llama.generate(ids, do_sample=False, max_new_tokens=25)
    end = int(free[0, ids.shape[1] + 2])
    options = {"do_sample": False, "max_new_tokens": 25, "eos_token_id": end, "pad_token_id": 0}
    plain = llama.generate(ids, **options)
    texts = iter(plain.tolist())
    seen, on_done = stats_of()
    ours = llama.generate(
        ids,
        custom_generate=custom(lambda prompt, request: oracle(next(texts), 0.05)(prompt), on_done=on_done),
        **options,
    )
    assert ours.tolist() == plain.tolist()
    assert seen[0].accepted > 0


def test_several_return_sequences(llama, prompts, custom):
    """Rows draw one after the other, so the tokens are not those of plain generate with this seed; their law is."""
    ids = ids_of(prompts(0))
    options = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 12, "custom_generate": custom(LOOKUP)}
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(llama.generate(ids, **options))
    assert runs[0].tolist() == runs[1].tolist()
    assert runs[0].shape == (3, ids.shape[1] + 12)
    assert len(set(map(tuple, runs[0].tolist()))) == 3


def test_rows_that_accept_more_do_not_wait(model, prompts, oracle, custom):
    ids = ids_of(*(prompts(seed) for seed in range(3)))
    plain = model.generate(ids, do_sample=False, max_new_tokens=31)
    calls = []
    handle = model.register_forward_hook(
        lambda _m, _i, kwargs, _o: calls.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    texts = iter(zip(plain.tolist(), (0.0, 0.0, 1.0), strict=True))
    seen, on_done = stats_of()
    try:
        engine = custom(lambda prompt, request: oracle(*next(texts), width=5)(prompt), on_done=on_done)
        ours = model.generate(ids, do_sample=False, max_new_tokens=31, custom_generate=engine)
    finally:
        handle.remove()
    assert ours.tolist() == plain.tolist()
    # Two rows are through after 5 steps of 6; from then on only the third is fed.
    assert all(shape[0] == 1 for shape in calls[1:])
    assert [shape[1] for shape in calls[1:6]] == [18] * 5
    assert max(shape[1] for shape in calls[6:]) == 6
    assert seen[0].by_source["draft"] == [sum(d for d, _ in seen[0].by_depth), seen[0].accepted]


# ---- sampling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.7, "temperature": 1.5}, {"repetition_penalty": 1.3}],
    ids=str,
)
def test_sampled_tokens_are_those_of_plain_generate_with_the_same_seed(model, prompts, oracle, custom, options):
    options = {"do_sample": True, "max_new_tokens": 25, "top_k": 0, **options}
    for seed in range(3):
        ids = ids_of(prompts(seed))
        torch.manual_seed(seed)
        plain = model.generate(ids, **options)
        for factory in (LOOKUP, oracle(plain[0].tolist(), seed=seed)):
            torch.manual_seed(seed)
            assert model.generate(ids, custom_generate=custom(factory), **options).tolist() == plain.tolist()


def test_the_law_of_sampled_chains_is_the_models(llama, prompts, oracle, custom):
    """Chi-square of whole chains from generate against exact probabilities, with a draft right for one chain only.

    Top-k 3 leaves 27 chains; those expected fewer than 8 times are pooled. 1,500 draws at alpha = 0.001. This sees
    gross errors of the loop; test_verify.py sees small ones of the rule.
    """
    ids = ids_of(prompts(6))
    draws, k = 1500, 3
    # Exact law of the chains.
    law = {(): 1.0}
    for _ in range(3):
        longer = {}
        for chain, p in law.items():
            logits = llama(torch.cat([ids, ids_of(chain).long()], 1) if chain else ids).logits[0, -1].float()
            top = logits.topk(k)
            for token, q in zip(top.indices.tolist(), top.values.softmax(-1).tolist(), strict=True):
                longer[(*chain, token)] = p * q
        law = longer
    favourite = max(law, key=law.get)
    factory = oracle([*ids[0].tolist(), *favourite], spoil=0.0)
    torch.manual_seed(0)
    counts = dict.fromkeys(law, 0)
    seen, on_done = stats_of()
    for _ in range(draws):
        out = llama.generate(
            ids, do_sample=True, top_k=k, max_new_tokens=3, custom_generate=custom(factory, on_done=on_done)
        )
        counts[tuple(out[0, ids.shape[1] :].tolist())] += 1
    assert sum(s.accepted for s in seen) > draws // 10
    statistic, cells, rest_seen, rest_expected = 0.0, 0, 0.0, 0.0
    for chain, p in law.items():
        if p * draws < 8:
            rest_seen, rest_expected = rest_seen + counts[chain], rest_expected + p * draws
            continue
        statistic += (counts[chain] - p * draws) ** 2 / (p * draws)
        cells += 1
    if rest_expected >= 8:
        statistic += (rest_seen - rest_expected) ** 2 / rest_expected
        cells += 1
    freedom = cells - 1
    # Upper 0.001 quantile of chi-square (Wilson-Hilferty).
    critical = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    assert freedom >= 5
    assert statistic < critical


# ---- caches, streams and outputs ------------------------------------------------------------------------------------


def test_scores_logits_and_cache_are_those_of_plain_generate(model, prompts, oracle, custom):
    ids = ids_of(prompts(1))
    options = {
        "do_sample": False,
        "max_new_tokens": 12,
        "repetition_penalty": 1.2,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
    }
    plain = model.generate(ids, **options)
    ours = model.generate(ids, custom_generate=custom(oracle(plain.sequences[0].tolist())), **options)
    assert ours.sequences.tolist() == plain.sequences.tolist()
    for a, b in ((ours.scores, plain.scores), (ours.logits, plain.logits)):
        assert len(a) == len(b) == 12
        torch.testing.assert_close(torch.stack(a), torch.stack(b), rtol=1e-4, atol=1e-4)
    for a, b in zip(ours.past_key_values.layers, plain.past_key_values.layers, strict=True):
        assert a.get_seq_length() == b.get_seq_length() == ids.shape[1] + 11
        assert not getattr(a, "record_past", False)
        torch.testing.assert_close(a.keys, b.keys, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("whole", [True, False], ids=["whole text", "new tokens only"])
def test_a_second_turn_goes_on_from_the_cache(model, prompts, custom, whole):
    first = ids_of(prompts(0))
    runs = []
    for engine in (None, custom(LOOKUP)):
        options = {"do_sample": False, "return_dict_in_generate": True, "custom_generate": engine}
        cache = DynamicCache(config=model.config)
        one = model.generate(first, past_key_values=cache, max_new_tokens=14, **options)
        text = torch.cat([one.sequences, ids_of(prompts(8, 9))], 1)
        mask = torch.ones_like(text)
        new = text if whole else text[:, one.past_key_values.get_seq_length() :]
        two = model.generate(
            new, attention_mask=mask, past_key_values=one.past_key_values, max_new_tokens=14, **options
        )
        runs.append((one.sequences.tolist(), two.sequences.tolist(), two.past_key_values.get_seq_length()))
    assert runs[0] == runs[1]


def test_prompts_given_as_embeddings(llama, prompts, custom):
    embeds = llama.get_input_embeddings()(ids_of(prompts(2)))
    options = {"inputs_embeds": embeds, "do_sample": False, "max_new_tokens": 30}
    assert llama.generate(custom_generate=custom(LOOKUP), **options).tolist() == llama.generate(**options).tolist()


def test_the_text_buffer_grows(llama, oracle, custom, monkeypatch):
    from tokenthrift.decoding import engine

    monkeypatch.setattr(engine, "_ROOM", 3)
    ids = ids_of([2, 3])
    plain = llama.generate(ids, do_sample=False, max_new_tokens=40)
    ours = llama.generate(ids, do_sample=False, max_new_tokens=40, custom_generate=custom(oracle(plain[0].tolist())))
    assert ours.tolist() == plain.tolist()


class Tape(BaseStreamer):
    def __init__(self):
        self.events: list = []

    def put(self, value):
        self.events.append(value.tolist())

    def end(self):
        self.events.append("end")


def test_streamers_get_every_token_in_order(llama, prompts, oracle, custom):
    ids = ids_of(prompts(1))
    plain = Tape()
    text = llama.generate(ids, do_sample=False, max_new_tokens=15, streamer=plain)
    ours = Tape()
    engine = custom(oracle(text[0].tolist()), streamer=ours)
    llama.generate(ids, do_sample=False, max_new_tokens=15, streamer=ours, custom_generate=engine)
    assert ours.events == plain.events


class Evicting(DynamicLayer):
    """A cache that forgets: after the prefill it keeps the first 4 and last 8 entries, and still counts all of them."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def update(self, key_states, value_states, *args, **kwargs):
        prefill = self.seen == 0
        self.seen += key_states.shape[-2]
        keys, values = super().update(key_states, value_states)
        if prefill and self.seen > 12:
            self.keys, self.values = (torch.cat([t[..., :4, :], t[..., -8:, :]], -2) for t in (keys, values))
        return keys, values

    def stored(self):
        return super().get_seq_length()

    def get_seq_length(self):
        return self.seen

    def get_mask_sizes(self, query_length):
        return self.stored() + query_length, self.seen - self.stored()

    def crop(self, tokens_to_remove):
        super().crop(tokens_to_remove)
        self.seen += tokens_to_remove


def test_a_cache_that_stores_fewer_tokens_than_it_has_seen(llama, prompts, oracle, custom):
    def generate(engine):
        cache = Cache(layer_class_to_replicate=Evicting)
        out = llama.generate(ids, do_sample=False, max_new_tokens=30, past_key_values=cache, custom_generate=engine)
        assert [(layer.seen, layer.stored()) for layer in cache.layers] == [(24 + 29, 12 + 29)] * 2
        return out.tolist()

    ids = ids_of(prompts(0))
    plain = generate(None)
    assert plain != llama.generate(ids, do_sample=False, max_new_tokens=30).tolist()  # forgetting shows
    assert generate(custom(oracle(plain[0]))) == plain


def test_convolution_states_are_rolled_back(lfm2, prompts, oracle, custom):
    for length in (2, 24):
        ids = ids_of(prompts(length, length))
        plain = lfm2.generate(ids, do_sample=False, max_new_tokens=30).tolist()
        for factory in (LOOKUP, oracle(plain[0])):
            ours = lfm2.generate(ids, do_sample=False, max_new_tokens=30, custom_generate=custom(factory))
            assert ours.tolist() == plain


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_beams": 2}, "beam search"),
        ({"use_cache": False}, "cache"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"generation_config": GenerationConfig(prompt_lookup_num_tokens=3)}, "assisted"),
    ],
    ids=lambda o: next(iter(o)) if isinstance(o, dict) else "",
)
def test_what_cannot_be_drafted_is_refused_in_one_line(llama, prompts, custom, options, says):
    with pytest.raises(ThriftError, match=says) as error:
        llama.generate(ids_of(prompts(0)), max_new_tokens=4, custom_generate=custom(LOOKUP), **options)
    assert "\n" not in str(error.value)


def test_an_empty_prompt_is_refused(llama, custom):
    with pytest.raises(ThriftError, match="empty"):
        llama.generate(torch.zeros(1, 0, dtype=torch.long), max_new_tokens=4, custom_generate=custom(LOOKUP))


def test_recurrent_states_are_refused(qwen3_next, prompts, custom):
    with pytest.raises(ThriftError, match=r"rolled back.*LinearAttentionLayer"):
        qwen3_next.generate(ids_of(prompts(0)), max_new_tokens=4, custom_generate=custom(LOOKUP))


def test_a_sliding_cache_records_no_more_than_before_after_an_error(gemma3, prompts, custom):
    cache = DynamicCache(config=gemma3.config)

    class Broken(Tape):
        def put(self, value):
            super().put(value)
            if len(self.events) == 4:
                raise RuntimeError("full")

    with pytest.raises(RuntimeError, match="full"):
        gemma3.generate(
            ids_of(prompts(0)),
            max_new_tokens=9,
            do_sample=False,
            past_key_values=cache,
            custom_generate=custom(LOOKUP, streamer=Broken()),
        )
    assert not any(getattr(layer, "record_past", False) for layer in cache.layers)
