"""LongLoRA on transformers models: shifted attention, stretched positions, the trainable set."""

import pytest
import tiny_models as tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    masking_utils,
)

import tilewright as tw

pytestmark = pytest.mark.filterwarnings("error:tilewright")

CLOSE = 2e-5  # float32, on logits of size 1 to 10
GROUP = 4


def llama(**more):
    return tiny.seeded(tiny.DECODERS["llama"], **more)


def shifted_pairs(lengths, n_heads, group=GROUP):
    """Which pairs S2-Attn sees, from its definition: bool (B, H, L, L).

    lengths   for each row the lengths of its documents, padding before the first of them is -n
    """
    size = sum(abs(n) for n in lengths[0])
    seen = torch.zeros(len(lengths), n_heads, size, size, dtype=torch.bool)
    for row, documents in enumerate(lengths):
        start = 0
        for n in documents:
            for i in range(max(n, 0)):
                for j in range(i + 1):
                    for head in range(n_heads):
                        shift = 0 if head < n_heads // 2 else group // 2
                        if (i + shift) // group == (j + shift) // group:
                            seen[row, head, start + i, start + j] = True
            start += abs(n)
    return seen


def eager_under(model, seen, *args, **kwargs):
    """A forward pass of the stock model with these pairs, (B, H, L, L), in place of its mask."""
    lowest = torch.finfo(torch.float32).min
    additive = torch.zeros(seen.shape).masked_fill(~seen, lowest)
    return model(*args, **kwargs, attention_mask=additive)


@pytest.mark.parametrize("case", ["whole rows", "left padding", "packed documents"])
def test_training_is_shifted_and_evaluation_dense(case):
    model = llama(attn_implementation="eager")
    ids = tiny.tokens()
    live = torch.ones(2, tiny.LENGTH, dtype=torch.bool)
    inputs, lengths = {}, [[tiny.LENGTH]] * 2
    positions = torch.arange(tiny.LENGTH).expand(2, -1)
    if case == "left padding":
        inputs["attention_mask"] = tiny.padding("left")
        live = inputs["attention_mask"].bool()
        lengths = [[-4, 7], [11]]
    if case == "packed documents":
        lengths = [[6, 5], [9, 2]]
        positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
        inputs.update(position_ids=positions, use_cache=False)

    with torch.no_grad():
        dense = model(ids, **inputs).logits
    shifted = eager_under(
        model, shifted_pairs(lengths, 4), ids, position_ids=positions, use_cache=False
    ).logits
    shifted[live].square().sum().backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()

    report = tw.accelerate(model, attention="shifted", group_size=GROUP)
    assert "shifted in training, group_size 4" in str(report)
    model.train()
    got = model(ids, **inputs).logits
    got[live].square().sum().backward()
    assert (dense - shifted)[live].abs().max() > 0.1
    assert (got - shifted)[live].abs().max() <= CLOSE
    scale = max(g.abs().max() for g in want.values())
    for name, parameter in model.named_parameters():
        assert (parameter.grad - want[name]).abs().max() <= 1e-4 * scale, name
    model.eval()
    with torch.no_grad():
        assert (model(ids, **inputs).logits - dense)[live].abs().max() <= CLOSE


def test_two_layers_reach_three_half_groups():
    """The last of 32 tokens, groups of 8: its gradient is on exactly the last 12 positions."""
    model = llama().train()
    tw.accelerate(model, attention="shifted", group_size=8)
    embedded = torch.randn(1, 32, 32, requires_grad=True)
    model(inputs_embeds=embedded, use_cache=False).logits[0, -1].sum().backward()
    reached = embedded.grad[0].abs().amax(-1) > 0
    assert reached.nonzero()[:, 0].tolist() == list(range(20, 32))


def test_no_token_sees_a_later_one():
    model = llama().train()
    tw.accelerate(model, attention="shifted", group_size=8)
    for at in (0, 1, 3, 7, 20):
        embedded = torch.randn(1, 32, 32, requires_grad=True)
        model(inputs_embeds=embedded, use_cache=False).logits[0, at].sum().backward()
        assert embedded.grad[0, at].abs().sum() > 0
        assert embedded.grad[0, at + 1 :].abs().sum() == 0


def test_a_group_of_twice_the_length_is_dense():
    model = llama()
    ids = tiny.tokens()
    dense = model(ids).logits
    tw.accelerate(model, attention="shifted", group_size=2 * tiny.LENGTH)
    assert (model.train()(ids).logits - dense).abs().max() <= CLOSE


def test_shifted_needs_a_causal_layer():
    with pytest.raises(ValueError, match="the model has no causal attention layer"):
        tw.accelerate(tiny.ENCODERS["bert"](), attention="shifted", group_size=4)


def test_shifted_in_a_decoder_with_an_encoder():
    """Only causal self-attention is shifted: not the encoder, not the cross-attention."""
    model = tiny.bart()
    report = tw.accelerate(model, attention="shifted", group_size=4)
    notes = {r.name: r.note for r in tiny.of_kind(report)[0]}
    assert notes["model.decoder.layers.0.self_attn"] == "shifted in training, group_size 4"
    assert notes["model.decoder.layers.0.encoder_attn"] == "not causal: dense"
    assert notes["model.encoder.layers.0.self_attn"] == "not causal: dense"


@pytest.mark.filterwarnings("default:tilewright")
def test_a_dense_mask_in_training_says_that_it_is_not_shifted():
    model = llama().train()
    tw.accelerate(model, attention="shifted", group_size=4)
    mask = masking_utils.sdpa_mask(2, tiny.LENGTH, tiny.LENGTH, allow_is_causal_skip=False)
    with pytest.warns(UserWarning, match="dense instead of shifted: the attention mask is 4-D"):
        model(tiny.tokens(), attention_mask=mask)


# positions


@pytest.mark.parametrize(
    ("present", "target", "factor"),
    [(None, 65, 2.0), (None, 200, 4.0), (2.0, 500, 8.0), (1.5, 97, 3.0)],
)
def test_positions_are_stretched_as_transformers_does(present, target, factor, tmp_path):
    """64 positions, or 64 times a linear factor: the model equals one configured that way."""

    def build(linear):
        rope = {"rope_type": "default", "rope_theta": 10000.0}
        if linear:
            rope.update(rope_type="linear", factor=linear)
        return llama(rope_parameters=rope, attn_implementation="eager")

    ids = tiny.tokens()
    model, want = build(present), build(factor)
    config, frequencies = model.config, model.model.rotary_emb.inv_freq.clone()
    report = tw.accelerate(model, rope_target_length=target)
    assert any(note.startswith("rotary positions stretched") for note in report.notes)
    with torch.no_grad():
        assert (model(ids).logits - want(ids).logits).abs().max() <= CLOSE
        assert (want(ids).logits - build(present)(ids).logits).abs().max() > 0.1
    assert model.config.rope_parameters == want.config.rope_parameters

    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert (loaded(ids).logits - want(ids).logits).abs().max() <= CLOSE

    tw.restore(model)
    assert model.config is config
    assert config.rope_parameters == build(present).config.rope_parameters
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)


def test_positions_that_reach_already_stay():
    model = llama()
    frequencies = model.model.rotary_emb.inv_freq.clone()
    report = tw.accelerate(model, rope_target_length=64)
    assert report.notes == ("rotary positions reach 64 tokens already: nothing to stretch",)
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)


def test_another_scaling_is_kept_and_multiplied():
    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
    }  # fmt: skip
    model = llama(rope_parameters=rope)
    frequencies = model.model.rotary_emb.inv_freq.clone()
    report = tw.accelerate(model, rope_target_length=128)
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies / 2)
    assert model.config.rope_parameters["rope_type"] == "llama3"
    assert 'config.json cannot say so beside rope_type "llama3"' in report.notes[0]


def gemma3():
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "head_dim", "vocab_size")
    sizes = {name: tiny._DECODER[name] for name in names}
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes, num_hidden_layers=1, num_key_value_heads=1))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=tiny.VOCABULARY))


def dynamic():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    return llama(rope_parameters=rope)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (gpt2, "GPT2LMHeadModel has no rotary positions with a buffer inv_freq"),
        (gemma3, "model.rotary_emb has one for each layer type"),
        (dynamic, 'has rope_type "dynamic", which computes them anew'),
    ],
)
def test_refused_positions_leave_the_model_stock(build, message):
    model = build()
    with pytest.raises(ValueError, match="accelerate: rope_target_length") as e:
        tw.accelerate(model, rope_target_length=4096)
    assert message in str(e.value)
    assert model.config._attn_implementation == "sdpa"


# the trainable set


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


NORMS = {
    *(
        f"model.layers.{i}.{n}_layernorm.weight"
        for i in (0, 1)
        for n in ("input", "post_attention")
    ),
    "model.norm.weight",
}


@pytest.mark.parametrize("tied", [False, True])
def test_trainable_parameters_without_adapters(tied):
    model = llama(tie_word_embeddings=tied)
    report = tw.accelerate(model, train=["embed", "norm"])
    assert trainable(model) == {"model.embed_tokens.weight", *NORMS}
    assert model.lm_head.weight.requires_grad is tied
    assert report.notes == (
        "training 6 parameters whose names hold embed or norm, and 0 of adapters; "
        "the rest is frozen",
    )
    tw.restore(model)
    assert all(p.requires_grad for p in model.parameters())


def test_trainable_parameters_beside_lora():
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "o_proj"]))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    before = trainable(model)
    tw.accelerate(model, train=["embed", "norm"])
    base = "base_model.model."
    adapters = {
        f"{base}model.layers.{i}.self_attn.{projection}.lora_{ab}.default.weight"
        for i in (0, 1)
        for projection in ("q_proj", "o_proj")
        for ab in "AB"
    }
    names = {"model.embed_tokens.weight", *NORMS}
    assert trainable(model) == adapters | {base + name for name in names}
    tw.restore(model)
    assert trainable(model) == before


def test_modules_that_peft_saves_train_instead_of_their_originals():
    model = get_peft_model(
        llama(), LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    )
    tw.accelerate(model, train=["embed", "norm"])
    embeddings = {name for name in trainable(model) if "embed" in name}
    assert embeddings == {"base_model.model.model.embed_tokens.modules_to_save.default.weight"}


def test_integers_cannot_train():
    model = llama()
    packed = torch.zeros(4, 4, dtype=torch.int8)
    model.model.norm.packed = torch.nn.Parameter(packed, requires_grad=False)
    with pytest.raises(ValueError, match=r"model\.norm\.packed, which is torch\.int8"):
        tw.accelerate(model, train=["norm"])
    assert all(p.requires_grad for p in model.model.layers.parameters())


def test_the_recipe_learns():
    """All of it at once: LoRA, shifted attention, stretched positions, embeddings and norms."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**tiny._DECODER, "max_position_embeddings": 8})
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules=["q_proj"]))
    frozen = model.base_model.model.lm_head.weight.clone()
    tw.accelerate(
        model, attention="shifted", group_size=4, rope_target_length=16, train=["embed", "norm"]
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = tiny.tokens(length=16)
    losses = []
    for _ in range(8):
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert torch.equal(model.base_model.model.lm_head.weight, frozen)
