"""Generation: transformers' own output, streams, sampling rules, and the growing cache."""

import math

import pytest
import torch
import transformers as hf
from transformers.generation import logits_process as stock_rules

import tilewright as tw
from tilewright import adapt
from tilewright.cache import GrowingLayer, new_cache
from tilewright.data import byte_tokenizer
from tilewright.files import InputError
from tilewright.generate import Piece, _Request
from tilewright.sampling import Sampler, Sampling

BASE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 258, "max_position_embeddings": 160,
    "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": 256, "pad_token_id": 257,
}  # fmt: skip
CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**BASE),
    "qwen3": lambda: hf.Qwen3Config(**BASE, head_dim=16),
    "mistral-window": lambda: hf.MistralConfig(**BASE, sliding_window=12),
    "mixtral": lambda: hf.MixtralConfig(**BASE, num_local_experts=4),
    "gpt2": lambda: hf.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=258, n_positions=160, initializer_range=0.3,
        bos_token_id=256, eos_token_id=256, pad_token_id=257,
    ),
}  # fmt: skip
PROMPTS = [[1, 2, 3], list(range(60, 80)), [7] * 5, [9]]


def build(name="llama"):
    torch.manual_seed(1)
    return hf.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()


def stock_greedy(model, prompt, n):
    with torch.no_grad():
        out = model.generate(torch.tensor([prompt]), max_new_tokens=n, do_sample=False)
    return out[0, len(prompt) :].tolist()


class Scripted(torch.nn.Module):
    """A language model that answers position by position from a fixed list of tokens."""

    def __init__(self, script):
        super().__init__()
        self.config = hf.LlamaConfig(**{**BASE, "num_hidden_layers": 1})
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.script = script

    def forward(self, input_ids, position_ids, **unused):
        # the prompt is one token, so the answer to position p is script[p]
        logits = torch.zeros(*input_ids.shape, 258)
        for column, position in enumerate(position_ids[0].tolist()):
            logits[:, column, self.script[min(position, len(self.script) - 1)]] = 1.0
        return hf.modeling_outputs.CausalLMOutput(logits=logits)


# the same tokens as transformers


@pytest.mark.parametrize("is_accelerated", [False, True], ids=["stock", "tilewright"])
@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_is_transformers(name, is_accelerated):
    model = build(name)
    expected = [stock_greedy(model, prompt, 40) for prompt in PROMPTS]
    assert any(len(set(tokens)) > 3 for tokens in expected)
    if is_accelerated:
        adapt.accelerate(model)
    got = tw.generate(model, PROMPTS, max_new_tokens=40)
    assert [g.tokens for g in got] == expected


def test_end_tokens_finish_one_row_and_leave_the_others():
    model = build()
    free = tw.generate(model, PROMPTS, max_new_tokens=30)
    end = free[1].tokens[4]
    model.generation_config.eos_token_id = [end, 256]
    got = tw.generate(model, PROMPTS, max_new_tokens=30)
    for g, f in zip(got, free, strict=True):
        n = f.tokens.index(end) + 1 if end in f.tokens else 30
        assert g.tokens == f.tokens[:n]
        assert g.reason == ("end" if end in f.tokens else "length")
    assert got[1].reason == "end" and {g.reason for g in got} == {"end", "length"}


def test_evaluation_mode_is_used_and_given_back():
    model = build()
    model.config.attention_dropout = 0.9
    expected = tw.generate(model, PROMPTS, max_new_tokens=10)
    model.train()
    assert tw.generate(model, PROMPTS, max_new_tokens=10) == expected
    assert model.training


def test_context_bounds_the_output():
    model = build()
    (got,) = tw.generate(model, [[5] * 150], max_new_tokens=64)
    assert len(got.tokens) <= 10 and got.reason == "length"


# sampling


def random_logits(rows=6, width=50):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(rows, width, generator=generator)
    logits[:, 7] = logits[:, 11]  # a tie
    return logits


def test_each_row_has_its_own_rule():
    logits = random_logits(rows=2)
    rules = [Sampling(temperature=4.0, top_k=3), Sampling(temperature=4.0)]
    sampler = Sampler(rules, [[0], [0]], torch.device("cpu"))
    drawn = torch.stack([sampler.draw(logits) for _ in range(300)])
    assert set(drawn[:, 0].tolist()) == set(logits[0].topk(3).indices.tolist())
    assert drawn[:, 1].unique().numel() > 10


def test_repetition_penalty_is_transformers():
    logits = random_logits()
    seen = torch.tensor([[0, 4, 4, 9]] * len(logits))
    rules = [Sampling(repetition_penalty=1.8)] * len(logits)
    sampler = Sampler(rules, seen.tolist(), torch.device("cpu"))
    penalty = stock_rules.RepetitionPenaltyLogitsProcessor(1.8)
    for _ in range(8):  # what was drawn counts from the next step on
        expected = penalty(seen, logits.clone()).argmax(-1)
        assert torch.equal(sampler.draw(logits), expected)
        seen = torch.cat([seen, expected[:, None]], 1)
    assert (seen[:, 4:] != seen[:, 4:5]).any()


def test_draws_follow_the_distribution():
    logits = torch.tensor([[2.0, 0.0, 1.0, -1.0, -50.0]])
    sampler = Sampler([Sampling(temperature=1.0, seed=5)], [[0]], torch.device("cpu"))
    n = 4000
    counts = torch.bincount(torch.cat([sampler.draw(logits) for _ in range(n)]), minlength=5)
    expected = logits.softmax(-1)[0]
    spread = (expected * (1 - expected) * n).sqrt()
    # four standard deviations; the seed is fixed, so this either always holds or never
    assert ((counts - n * expected).abs() <= 4 * spread + 1e-6).all()


@pytest.mark.parametrize("is_accelerated", [False, True])
def test_log_probabilities_of_draws_are_those_that_training_computes(is_accelerated):
    """A policy gradient needs one number for both: from the cache, and from a pass over the row."""
    model, prompt = build(), [1, 2, 3, 4]
    if is_accelerated:
        adapt.accelerate(model)
    cache, ids, tokens, drawn = new_cache(model.config), torch.tensor([prompt] * 3), [], []
    with torch.no_grad():
        for step in range(10):
            logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1]
            token, log_prob = tw.sample_tokens(
                logits, temperature=1.0, top_p=0.9, seed=[1, 2, 3], step=step, return_logprobs=True
            )
            ids = token[:, None]
            tokens.append(token)
            drawn.append(log_prob)
        answers = torch.stack(tokens, 1)
        whole = torch.cat([torch.tensor([prompt] * 3), answers], 1)
        h = model.model(input_ids=whole, use_cache=False).last_hidden_state[:, 3:-1]
        trained = tw.linear_log_probs(h, model.lm_head.weight, answers)
    assert len(set(map(tuple, answers.tolist()))) == 3
    torch.testing.assert_close(torch.stack(drawn, 1), trained, rtol=0, atol=1e-4)


def test_a_requests_draws_do_not_depend_on_the_batch():
    model = build()
    rule = {"max_new_tokens": 30, "temperature": 1.0, "top_p": 0.95}
    together = tw.generate(model, PROMPTS, seed=[11, 12, 13, 14], **rule)
    for n, prompt in enumerate(PROMPTS):
        (alone,) = tw.generate(model, [prompt], seed=11 + n, **rule)
        assert alone == together[n]
    reversed_ = tw.generate(model, PROMPTS[::-1], seed=[14, 13, 12, 11], **rule)
    assert reversed_[::-1] == together
    assert tw.generate(model, PROMPTS, seed=[21, 22, 23, 24], **rule) != together


def test_greedy_and_sampled_requests_share_a_batch():
    model = build()
    rules = [Sampling(max_new_tokens=12), Sampling(max_new_tokens=20, temperature=1.0, seed=3)]
    got = tw.generate(model, PROMPTS[:2], sampling=rules)
    assert got[0].tokens == stock_greedy(model, PROMPTS[0], 12)
    assert len(got[0].tokens) == 12 and len(got[1].tokens) == 20


# text


def stream_of(text, stop=(), n=None):
    tokenizer = byte_tokenizer()
    tokens = list(text.encode())
    return list(
        tw.generate(
            Scripted([*tokens, 256]), [[65]], tokenizer=tokenizer, stream=True, stop=stop,
            max_new_tokens=n or len(tokens) + 1,
        )
    )  # fmt: skip


def test_stream_hands_out_whole_characters_only():
    text = "Grüße, 世界 🎉\n"
    pieces = stream_of(text)
    assert "".join(p.text for p in pieces) == text
    assert all("�" not in p.text for p in pieces)
    assert [p.token for p in pieces] == [*text.encode(), 256]
    assert [p.reason for p in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].reason == "end"


def test_a_stream_cut_inside_a_character_ends_with_the_broken_mark():
    pieces = stream_of("a世", n=2)
    assert "".join(p.text for p in pieces) == "a�" and pieces[-1].reason == "length"


def test_broken_bytes_decode_as_the_tokenizer_decodes_them():
    tokenizer = byte_tokenizer()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 256, (300,), generator=generator).tolist()
    request = _Request(0, [65], Sampling(max_new_tokens=300), tokenizer)
    text = "".join(request.accept(token, {256}).text for token in tokens)
    assert text == tokenizer.decode(tokens)


def test_stop_strings_end_the_text_and_are_not_in_it():
    pieces = stream_of("one, two, three; four", stop=("three", "zzz"))
    assert "".join(p.text for p in pieces) == "one, two, "
    assert pieces[-1].reason == "stop" and len(pieces) == len("one, two, three")


def test_what_may_become_a_stop_string_is_held_back():
    pieces = stream_of("abcabX", stop="abcd")
    shown = ""
    for piece, raw in zip(pieces, ["a", "ab", "abc", "abca", "abcab", "abcabX"], strict=False):
        shown += piece.text
        assert raw.startswith(shown)
    assert [p.text for p in pieces[:6]] == ["", "", "", "abc", "", "abX"]


def test_stream_and_list_agree():
    model, tokenizer = build(), byte_tokenizer()
    prompts = ["import os", "d", "class Thing:"]
    rule = {"max_new_tokens": 25, "temperature": 0.8, "seed": [1, 2, 3], "tokenizer": tokenizer}
    whole = tw.generate(model, prompts, **rule)
    texts, tokens = ["", "", ""], [[], [], []]
    for piece in tw.generate(model, prompts, stream=True, **rule):
        assert isinstance(piece, Piece)
        texts[piece.index] += piece.text
        tokens[piece.index].append(piece.token)
    assert texts == [g.text for g in whole] and tokens == [g.tokens for g in whole]
    assert texts == [tokenizer.decode(t, skip_special_tokens=True) for t in tokens]


# the cache


def test_growing_layer_holds_what_transformers_holds():
    generator = torch.Generator().manual_seed(0)
    ours, stock = GrowingLayer(), hf.cache_utils.DynamicLayer()

    def append(batch, n):
        k, v = (torch.randn(batch, 2, n, 8, generator=generator) for _ in range(2))
        for a, b in zip(ours.update(k, v), stock.update(k, v), strict=True):
            assert torch.equal(a, b)
        assert ours.get_seq_length() == stock.get_seq_length()

    append(3, 5)
    storage = ours.keys.data_ptr()
    append(3, 1)
    assert ours.keys.data_ptr() == storage  # appended in place, nothing copied
    append(3, GrowingLayer.ROOM)  # the buffer is too small now
    for layer in (ours, stock):
        layer.crop(-4)
    append(3, 2)
    for layer in (ours, stock):
        layer.batch_select_indices(torch.tensor([2, 0]))
    append(2, 3)
    for layer in (ours, stock):
        layer.reorder_cache(torch.tensor([1, 0]))
    append(2, 1)
    for layer in (ours, stock):
        layer.reset()
    append(1, 2)


def test_cropping_keeps_shared_rows_apart():
    layer = GrowingLayer()
    first = torch.ones(1, 1, 4, 2)
    layer.update(first, first)
    before = layer.keys.clone()
    layer.batch_repeat_interleave(2)
    layer.update(torch.zeros(2, 1, 1, 2), torch.zeros(2, 1, 1, 2))
    assert torch.equal(layer.keys[:, :, :4], before.expand(2, -1, -1, -1))


def test_only_full_attention_layers_are_replaced():
    kinds = [type(layer).__name__ for layer in new_cache(CONFIGS["mistral-window"]()).layers]
    assert kinds == ["DynamicSlidingWindowLayer"] * 2
    assert [type(layer) for layer in new_cache(CONFIGS["llama"]()).layers] == [GrowingLayer] * 2


# what is refused


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1] * 160], {}, "prompt 0 has 160 tokens, need fewer than the model's context of 160"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, 258]], {}, "prompt 0 holds token 258, need 0 to 257"),
        (["text"], {}, "prompt 0 is a string: pass the model's tokenizer"),
        ([[1]], {"stop": "x"}, "stop needs a tokenizer"),
        ([[1]], {"temperature": -0.1}, "temperature is -0.1, need a number of at least 0"),
        ([[1]], {"temperature": math.inf}, "temperature is inf"),
        ([[1]], {"top_p": 0.0}, "top_p is 0.0, need 0 < top_p <= 1"),
        ([[1]], {"top_k": -1}, "top_k is -1, need a whole number of at least 0"),
        ([[1]], {"min_p": 2}, "min_p is 2, need 0 <= min_p <= 1"),
        ([[1]], {"repetition_penalty": 0}, "repetition_penalty is 0, need a positive number"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0, need a whole number of at least 1"),
        ([[1]], {"top_q": 1}, "no option 'top_q'"),
        ([[1]], {"seed": [1, 2]}, "2 seeds for 1 prompts"),
        ([[1]], {"sampling": [Sampling()] * 2}, "2 samplings for 1 prompts"),
        ([[1]], {"sampling": Sampling(), "top_k": 2}, "pass sampling or its fields"),
    ],
)
def test_bad_requests_are_refused(prompts, options, message):
    with pytest.raises(InputError, match=message):
        tw.generate(build(), prompts, **options)


def test_an_empty_stop_string_is_refused():
    with pytest.raises(InputError, match="need strings of at least one character"):
        Sampling(stop=("",))


def test_a_module_of_torch_alone_is_refused():
    with pytest.raises(InputError, match="model Linear has no config, need a model of transform"):
        tw.generate(torch.nn.Linear(4, 4), [[1]])


def test_no_prompts_give_no_results():
    assert tw.generate(build(), []) == []
