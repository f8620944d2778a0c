"""moe_upcycle: equal to the dense model at first, saved and loaded by transformers, trainable."""

import pytest
import tiny_models as tiny
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model

import tilewright as tw

NAMES = {"llama": "Mixtral", "mistral, window": "Mixtral", "qwen3": "Qwen3Moe"}
by_model = pytest.mark.parametrize("name", NAMES)


def dense(name, **changes):
    torch.manual_seed(5)
    return tiny.DECODERS[name](**changes).eval()


def words():
    return torch.randint(2, tiny.VOCABULARY, (2, tiny.LENGTH))


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


@by_model
@pytest.mark.parametrize("experts, top_k", [(4, 2), (3, 1), (2, 2)])
def test_it_computes_what_the_dense_model_does(name, experts, top_k):
    model, ids = dense(name), words()
    mixture = tw.moe_upcycle(model, experts, top_k)
    assert type(mixture).__name__ == f"{NAMES[name]}ForCausalLM"
    want = logits(model, ids)
    assert want.std() > 0.1
    torch.testing.assert_close(logits(mixture, ids), want, rtol=1e-5, atol=1e-5)
    for layer in mixture.model.layers:  # and the experts are really asked
        layer.mlp.experts.down_proj.data *= 1.01
    assert (logits(mixture, ids) - want).abs().max() > 1e-3


@by_model
def test_any_router_gives_the_same_at_first(name):
    model, ids = dense(name), words()
    mixture = tw.moe_upcycle(model, 4, 2)
    choices = []
    for seed in range(2):
        torch.manual_seed(seed)
        for layer in mixture.model.layers:
            torch.nn.init.normal_(layer.mlp.gate.weight)
        hook = mixture.model.layers[0].mlp.gate.register_forward_hook(
            lambda _, args, out: choices.append(out[2])
        )
        torch.testing.assert_close(logits(mixture, ids), logits(model, ids), rtol=1e-5, atol=1e-5)
        hook.remove()
    assert not torch.equal(*choices)


@by_model
def test_transformers_saves_and_loads_it(name, tmp_path):
    mixture, ids = tw.moe_upcycle(dense(name), 3, 2, noise=0.1), words()
    mixture.save_pretrained(tmp_path)
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(mixture)
    torch.testing.assert_close(logits(loaded, ids), logits(mixture, ids), rtol=1e-6, atol=1e-6)


def test_weights_are_its_own_and_the_dense_model_stays():
    model = dense("llama")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    mixture = tw.moe_upcycle(model)
    with torch.no_grad():
        for p in mixture.parameters():
            p.add_(1.0)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_noise_tells_the_copies_apart_and_a_generator_repeats_it():
    model = dense("llama")
    mixtures = [
        tw.moe_upcycle(model, noise=0.05, generator=torch.Generator().manual_seed(1))
        for _ in range(2)
    ]
    for n, t in mixtures[0].state_dict().items():
        assert torch.equal(t, mixtures[1].state_dict()[n]), n
    weight = mixtures[0].model.layers[1].mlp.experts.down_proj
    own = model.model.layers[1].mlp.down_proj.weight
    assert torch.equal(weight[0], own)
    for e in (1, 2, 3):
        assert ((weight[e] - own).std() / own.std()).item() == pytest.approx(0.05, rel=0.1)
    ids = words()
    mixtures[0](input_ids=ids, labels=ids).loss.backward()
    assert mixtures[0].model.layers[0].mlp.gate.weight.grad.abs().max() > 1e-8


def test_accelerated_and_in_bfloat16():
    model, ids = dense("llama").bfloat16(), words()
    mixture = tw.moe_upcycle(model)
    assert mixture.dtype == torch.bfloat16
    report = tw.accelerate(mixture)
    assert [r.kind for r in report.replaced].count("experts") == 2
    want = logits(model, ids)
    assert (logits(mixture, ids) - want).square().mean() < 1e-3 * want.square().mean()


def test_tied_embeddings_stay_tied():
    mixture = tw.moe_upcycle(dense("llama", tie_word_embeddings=True))
    assert mixture.lm_head.weight is mixture.model.embed_tokens.weight


def refusals():
    llama = dense("llama")
    yield lambda: tw.moe_upcycle(llama, 1), "experts is 1, need at least 2"
    yield lambda: tw.moe_upcycle(llama, 4, 5), "top_k is 5, need 1 to experts = 4"
    yield lambda: tw.moe_upcycle(llama, 4.0), "experts is 4.0, need a whole number"
    yield lambda: tw.moe_upcycle(llama, noise=-1), "noise is -1, need a finite number"
    yield lambda: tw.moe_upcycle(llama.model), "model is a LlamaModel, need a causal language"
    yield lambda: tw.moe_upcycle(torch.nn.Linear(2, 2)), "model is a Linear, need a causal"
    yield (lambda: tw.moe_upcycle(dense("llama", attention_bias=True)),
           "the model's attention has biases")  # fmt: skip
    yield (lambda: tw.moe_upcycle(dense("llama", mlp_bias=True)),
           "gate_proj of layer 0 has a bias, experts have none")  # fmt: skip

    def adapted():
        return get_peft_model(dense("llama"), LoraConfig(target_modules="all-linear")).base_model

    yield lambda: tw.moe_upcycle(adapted().model), "gate_proj of layer 0 is a Linear, need a plain"


@pytest.mark.parametrize("number", range(9))
def test_refusals(number):
    function, message = list(refusals())[number]
    with pytest.raises(ValueError, match=f"moe_upcycle: {message}"):
        function()
