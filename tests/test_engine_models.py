"""Accelerated transformers models against the same models run eagerly, in float32."""

import pytest
import tiny_models as tiny
import torch
from torch._dynamo.backends.debugging import aot_eager
from transformers import StaticCache, T5Config, T5EncoderModel

import tilewright as tw

# a call that falls back to transformers' own attention warns, and would make these tests hollow
pytestmark = pytest.mark.filterwarnings("error:tilewright")

LOGITS = 2e-5  # largest difference, on logits of size 1 to 10; float32 sums in another order
# one token that gpt_oss generates from one other lies where half a last bit on the outputs of
# stock's own norms moves a logit by 1.9e-5
GENERATED = {"gpt_oss": 3e-5}
GRADIENTS = 1e-4  # of the largest gradient


@pytest.fixture(params=tiny.DECODERS)
def decoder(request):
    return tiny.seeded(tiny.DECODERS[request.param], attn_implementation="eager")


def accelerated(model):
    """The model itself, every attention layer of it replaced."""
    report = tw.accelerate(model)
    replaced, skipped = tiny.of_kind(report)
    assert replaced and not skipped, report
    return model


def gradients(model):
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def expect_close_gradients(ours, eager):
    assert ours.keys() == eager.keys()
    scale = max(g.abs().max() for g in eager.values())
    for name, want in eager.items():
        assert (ours[name] - want).abs().max() <= GRADIENTS * scale, name


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_logits_and_gradients(decoder, side):
    ids, mask = tiny.tokens(), tiny.padding(side)
    live = mask.bool()
    labels = ids.masked_fill(~live, -100)
    if side == "left":  # the first live token is predicted from a padded position
        labels[0, 4] = -100

    def run():
        out = decoder(ids, attention_mask=mask, labels=labels)
        out.loss.backward()
        return out.logits.detach()[live], gradients(decoder)

    want, want_gradients = run()
    accelerated(decoder)
    got, got_gradients = run()
    assert (got - want).abs().max() <= LOGITS
    expect_close_gradients(got_gradients, want_gradients)


def test_without_any_mask(decoder):
    ids = tiny.tokens()
    with torch.no_grad():
        want = decoder(ids).logits
        got = accelerated(decoder)(ids).logits
    assert (got - want).abs().max() <= LOGITS


PROMPTS = {  # length, padding; windows are 4 or 5 keys, so the short ones grow through them
    "full": (tiny.LENGTH, "none"),
    "padded": (tiny.LENGTH, "left"),
    "three tokens": (3, "none"),
    "one token": (1, "none"),
}


@pytest.mark.parametrize("prompt", PROMPTS)
def test_generates_the_same_tokens(decoder, prompt):
    length, side = PROMPTS[prompt]
    ids, mask = tiny.tokens(length=length), tiny.padding(side, length=length)
    greedy = {
        "attention_mask": mask, "max_new_tokens": 7, "do_sample": False, "output_logits": True,
        "return_dict_in_generate": True,
    }  # fmt: skip
    beams = {**greedy, "num_beams": 3, "max_new_tokens": 5}
    want, want_beams = decoder.generate(ids, **greedy), decoder.generate(ids, **beams)
    accelerated(decoder)
    static = decoder.generate(ids, **greedy, cache_implementation="static")
    for got, eager in (
        (decoder.generate(ids, **greedy), want),
        (static, want),
        (decoder.generate(ids, **beams), want_beams),
    ):
        assert torch.equal(got.sequences, eager.sequences)
        for ours, theirs in zip(got.logits, eager.logits, strict=True):
            allowed = GENERATED.get(decoder.config.model_type, LOGITS)
            assert (ours - theirs).abs().max() <= allowed


def test_chunks_of_a_prompt_and_a_cache(decoder):
    """Several queries behind cached keys: they stand at the last keys, not at the first."""
    ids = tiny.tokens()

    def run():
        with torch.no_grad():
            first = decoder(ids[:, :5], use_cache=True)
            return decoder(ids[:, 5:], past_key_values=first.past_key_values).logits

    want = run()
    accelerated(decoder)
    assert (run() - want).abs().max() <= LOGITS


def test_packed_rows_are_separate_documents(decoder):
    """Positions that restart: documents of 4, 1, 6 and of 9, 2 tokens in rows of 11."""
    ids = tiny.tokens()
    positions = torch.stack(
        [torch.cat([torch.arange(n) for n in lengths]) for lengths in ([4, 1, 6], [9, 2])]
    )

    def run():
        out = decoder(ids, position_ids=positions, use_cache=False, labels=ids)
        out.loss.backward()
        return out.logits.detach(), gradients(decoder)

    want, want_gradients = run()
    accelerated(decoder)
    got, got_gradients = run()
    assert (got - want).abs().max() <= LOGITS
    expect_close_gradients(got_gradients, want_gradients)
    if decoder.config.model_type != "gpt_oss":  # its mask does not look at positions, here or stock
        alone = decoder(ids[:1, 5:11], use_cache=False).logits
        assert (got[0, 5:11] - alone[0]).abs().max() <= LOGITS


def test_packed_rows_by_their_boundaries(decoder):
    """What DataCollatorWithFlattening hands over for flash attention, heeded by every model."""
    ids = tiny.tokens(batch=1)
    lengths = [4, 1, 6]
    bounds = torch.tensor([0, 4, 5, 11], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with torch.no_grad():
        alone = [decoder(part, use_cache=False).logits[0] for part in ids.split(lengths, dim=1)]
        got = accelerated(decoder)(
            ids, position_ids=positions, use_cache=False, cu_seq_lens_q=bounds,
            cu_seq_lens_k=bounds, max_length_q=6, max_length_k=6,
        ).logits[0]  # fmt: skip
    assert (got - torch.cat(alone)).abs().max() <= LOGITS


@pytest.mark.parametrize("name", tiny.ENCODERS)
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_encoder(name, side):
    model = tiny.seeded(tiny.ENCODERS[name], attn_implementation="eager")
    ids, mask = tiny.tokens(), tiny.padding(side)
    live = mask.bool()

    def run():
        hidden = model(ids, attention_mask=mask).last_hidden_state
        hidden[live].square().sum().backward()
        return hidden.detach()[live], gradients(model)

    want, want_gradients = run()
    accelerated(model)
    got, got_gradients = run()
    assert (got - want).abs().max() <= LOGITS
    expect_close_gradients(got_gradients, want_gradients)


def test_vision_transformer():
    model = tiny.seeded(tiny.vit, attn_implementation="eager")
    pixels = torch.randn(2, 3, 12, 12)

    def run():
        hidden = model(pixels).last_hidden_state
        hidden.square().sum().backward()
        return hidden.detach(), gradients(model)

    want, want_gradients = run()
    accelerated(model)
    got, got_gradients = run()
    assert (got - want).abs().max() <= LOGITS
    expect_close_gradients(got_gradients, want_gradients)


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_encoder_and_decoder_with_cross_attention(side):
    model = tiny.seeded(tiny.bart, attn_implementation="eager")
    ids, mask = tiny.tokens(), tiny.padding(side)
    labels = tiny.tokens(length=6)
    greedy = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    beams = {"attention_mask": mask, "max_new_tokens": 4, "num_beams": 2, "do_sample": False}

    def run():
        out = model(ids, attention_mask=mask, labels=labels)
        out.loss.backward()
        generated = model.generate(ids, **greedy), model.generate(ids, **beams)
        return out.logits.detach(), gradients(model), generated

    want, want_gradients, want_tokens = run()
    accelerated(model)
    got, got_gradients, got_tokens = run()
    assert (got - want).abs().max() <= LOGITS
    expect_close_gradients(got_gradients, want_gradients)
    for ours, eager in zip(got_tokens, want_tokens, strict=True):
        assert torch.equal(ours, eager)


def test_a_bert_decoder_is_causal():
    build = tiny.ENCODERS["bert"]
    model = tiny.seeded(build, attn_implementation="eager", is_decoder=True)
    ids, mask = tiny.tokens(), tiny.padding("left")
    with torch.no_grad():
        want = model(ids, attention_mask=mask).last_hidden_state
        got = accelerated(model)(ids, attention_mask=mask).last_hidden_state
    assert (got - want)[mask.bool()].abs().max() <= LOGITS


def test_a_decoder_used_without_causality():
    model = tiny.seeded(tiny.DECODERS["llama"], attn_implementation="eager")
    ids, mask = tiny.tokens(), tiny.padding("right")
    with torch.no_grad():
        causal = model(ids, attention_mask=mask).logits
        want = model(ids, attention_mask=mask, is_causal=False).logits
        got = accelerated(model)(ids, attention_mask=mask, is_causal=False).logits
    assert (want - causal)[mask.bool()].abs().max() > 0.01
    assert (got - want)[mask.bool()].abs().max() <= LOGITS


def test_a_position_bias_stays_stock():
    config = T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=tiny.VOCABULARY
    )
    with pytest.raises(ValueError, match=r"(?s)nothing in the model.*hands over position_bias"):
        tw.accelerate(T5EncoderModel(config))


@pytest.mark.parametrize("name", ["llama", "mistral, window", "gemma2, softcap and windows"])
def test_compiled_in_one_graph(name, clean_memory):
    model = tiny.seeded(tiny.DECODERS[name], attn_implementation="eager")
    ids, mask = tiny.tokens(), tiny.padding("right")
    positions = torch.cat([torch.arange(4), torch.arange(7)]).expand(2, -1)
    cases = (
        {},
        {"attention_mask": mask},
        {"position_ids": positions, "use_cache": False},  # documents, found inside the graph
    )

    def run(forward, case):
        out = forward(ids, labels=ids, **case)
        out.loss.backward()
        return out.logits.detach()[mask.bool()], gradients(model)

    want = [run(model, case) for case in cases]
    accelerated(model)
    backend, operators = recording_backend()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for case, (logits, grads) in zip(cases, want, strict=True):
        got, got_gradients = run(compiled, case)
        assert (got - logits).abs().max() <= LOGITS, case
        expect_close_gradients(got_gradients, grads)
    expect_ours_alone(operators)


@pytest.mark.parametrize(
    "name", ["llama", "mistral, window", "gemma3, windows", "gpt_oss, sinks and windows"]
)
def test_compiled_steps_with_a_preallocated_cache(name, clean_memory):
    model = tiny.seeded(tiny.DECODERS[name], attn_implementation="eager")
    ids = tiny.tokens(length=2)  # shorter than the windows, which the steps grow through

    def run(step):
        cache = StaticCache(config=model.config, max_cache_len=32)
        with torch.no_grad():
            logits = [model(ids, past_key_values=cache).logits[:, -1:]]
            for _ in range(5):
                logits.append(step(logits[-1].argmax(-1), past_key_values=cache).logits)
        return torch.cat(logits, 1)

    want = run(model)
    accelerated(model)
    backend, operators = recording_backend()
    torch._dynamo.reset()
    got = run(torch.compile(model, backend=backend, fullgraph=True))
    assert (got - want).abs().max() <= LOGITS
    expect_ours_alone(operators)


def recording_backend():
    """A backend for torch.compile, and the set of operators that its graphs hold."""
    operators = set()

    def backend(graph, inputs):
        operators.update(str(node.target) for node in graph.graph.nodes)
        return aot_eager(graph, inputs)

    return backend, operators


def expect_ours_alone(operators):
    assert any("tilewright.flash" in operator for operator in operators)
    assert not any("scaled_dot_product" in operator for operator in operators)
