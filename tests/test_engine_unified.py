"""Adapters, prefixes, DoRA and (IA)^3 as one family of operators: the identities between them."""

import copy

import peft
import pytest
import tiny_models as tiny
import torch
from torch import nn
from torch.nn.functional import linear
from yardstick import assert_errs_at_most_twice_stock, rms

import tilewright as tw
from tilewright.adapt import bottleneck_layers, ia3_layers, lora_dora

RANK = 4


class Layer(nn.Module):
    def __init__(self, n_in, n_out, dtype=torch.float32, bias=True):
        super().__init__()
        self.proj = nn.Linear(n_in, n_out, bias=bias, dtype=dtype)

    def forward(self, x):
        return self.proj(x)


def shaken(model, *parts, std=0.2):
    """The model with the parameters of these names away from their start."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in parts):
                parameter.add_(std * torch.randn_like(parameter))
    return model


# prefixes


def test_a_prefix_is_a_gated_sum_of_two_attentions():
    """out = (1 - g) Attn(q, K, V) + g Attn(q, Pk, Pv), forward and backward."""
    shapes = {"q": (2, 9, 4, 8), "k": (2, 9, 2, 8), "v": (2, 9, 2, 8), "pk": (2, 5, 2, 8),
              "pv": (2, 5, 2, 8)}  # fmt: skip
    given = {n: torch.randn(shape, requires_grad=True) for n, shape in shapes.items()}

    def gated(q, k, v, pk, pv):
        own, own_lse = tw.flash_attention(q, k, v, is_causal=True, return_lse=True)
        more, more_lse = tw.flash_attention(q, pk, pv, return_lse=True)
        g = torch.sigmoid(more_lse - own_lse).transpose(1, 2)[..., None]
        return (1 - g) * own + g * more

    def concatenated(q, k, v, pk, pv):
        return tw.flash_attention(q, torch.cat([pk, k], 1), torch.cat([pv, v], 1), is_causal=True)

    def extra(q, k, v, pk, pv):
        return tw.flash_attention(q, k, v, is_causal=True, extra_kv=(pk, pv))

    dy = torch.randn(shapes["q"])
    outcomes = []
    for form in (concatenated, gated, extra):
        out = form(**given)
        outcomes.append((out, *torch.autograd.grad(out, list(given.values()), dy)))
    for other in outcomes[1:]:
        for name, got, want in zip(("out", *given), other, outcomes[0], strict=True):
            assert rms(got - want) <= 2e-6 * rms(want), name


def loss_and_gradients(model):
    ids = tiny.tokens()
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


MODELS = ("llama", "qwen2, window in one layer", "gemma2, softcap and windows")
METHODS = {
    "prefix": (tw.Prefix(3, std=1.0), ""),
    "dora": (tw.DoRA(rank=RANK), "lora_"),
    "ia3": (tw.IA3(), "ia3_l"),
    "parallel": (tw.Parallel(RANK), "adapter_"),
    "sequential": (tw.Sequential(RANK), "adapter_"),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_an_accelerated_model_trains_as_the_stock_one(name, method):
    how, part = METHODS[method]
    tuner = tw.adapt(tiny.seeded(tiny.DECODERS[name]), how)
    stock = shaken(tuner.model, part).train() if part else tuner.model.train()
    ours = copy.deepcopy(stock)
    report = tw.accelerate(ours)
    loss_a, grads_a = loss_and_gradients(ours)
    loss_b, grads_b = loss_and_gradients(stock)
    assert (loss_a - loss_b).abs() <= 2e-6 * loss_b.abs()
    assert grads_a.keys() == grads_b.keys() and grads_a
    for n, grad in grads_a.items():
        assert rms(grad - grads_b[n]) <= 2e-5 * rms(grads_b[n]), n
    replaced = [r for r in report.replaced if r.kind == {"dora": "lora"}.get(method, method)]
    assert len(replaced) == {"dora": 14, "ia3": 4}.get(method, 0)
    skipped = [s for s in report.skipped if s.kind in ("ia3", "mlp", "lora")]
    if method == "ia3":
        assert {s.reason for s in skipped} == {"it scales its input, and the operator its output"}
        assert {r.note for r in replaced} == {"while its vector does not train"}
    elif method == "sequential":
        assert {s.reason for s in skipped} == {"its forward is not down(activation(gate) up)"}
    else:
        assert not skipped
    tw.restore(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in stock.modules()]
    assert not any(lora_dora.SQUARES in vars(m) for m in ours.modules())


# adapters


def test_without_an_activation_a_parallel_adapter_is_lora():
    """The same A, B and scale: one operator, so the same bits."""
    lora = shaken(peft.get_peft_model(Layer(40, 24), peft.LoraConfig(
        r=RANK, lora_alpha=3 * RANK, target_modules=["proj"])), "lora_B")  # fmt: skip
    of_lora = lora.base_model.model.proj
    ours = copy.deepcopy(lora.base_model.model)
    ours.proj = copy.deepcopy(of_lora.base_layer)
    tw.adapt(ours, "parallel", rank=RANK, scale=3.0, activation="none")
    with torch.no_grad():
        ours.proj.adapter_down.copy_(of_lora.lora_A["default"].weight)
        ours.proj.adapter_up.copy_(of_lora.lora_B["default"].weight)
    x = torch.randn(2, 7, 40)
    want = lora(x)
    assert rms(ours(x) - want) <= 1e-6 * rms(want)
    holder = nn.ModuleList([lora])
    with pytest.raises(ValueError, match="nothing in the model"):
        tw.accelerate(nn.Linear(2, 2))
    tw.accelerate(holder)
    assert torch.equal(ours(x), lora(x))
    tw.restore(holder)
    merged = copy.deepcopy(lora)
    merged.merge_adapter()
    assert rms(merged(x) - want) <= 1e-6 * rms(want)


@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (7, 65, 33, 3), (64, 128, 96, 8)], ids=str)
def test_a_parallel_adapter_and_its_gradients_are_autograds(shape, dtype, activation, monkeypatch):
    tokens, n_in, n_out, rank = shape
    model = Layer(n_in, n_out, dtype)
    tw.adapt(model, "parallel", rank=rank, scale=4.0, activation=activation)
    shaken(model, "adapter_up", std=0.5)
    calls = []
    operator = bottleneck_layers.fused_linear
    monkeypatch.setattr(
        bottleneck_layers, "fused_linear", lambda *a, **o: calls.append(a) or operator(*a, **o)
    )
    layer = model.proj
    x, dy = torch.randn(tokens, n_in).to(dtype), torch.randn(tokens, n_out).to(dtype)

    def plain(x, down, up, weight, bias):
        hidden = linear(x, down)
        hidden = hidden.relu() if activation == "relu" else hidden
        return linear(x, weight, bias) + 4.0 * linear(hidden, up)

    def outcome(form, x, down, up):
        y = form(x, down, up)
        return y, *torch.autograd.grad(y, (x, down, up), dy.to(y.dtype))

    # the adapter in x's dtype, as stock would need it
    factors = [t.detach().to(dtype) for t in (layer.adapter_down, layer.adapter_up)]
    leaves = [t.clone().requires_grad_() for t in (x, *factors)]
    stock = outcome(lambda *t: plain(*t, layer.weight, layer.bias), *leaves)
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    weights = [t.detach().double() for t in (layer.weight, layer.bias)]
    truth = outcome(lambda *t: plain(*t, *weights), *doubles)
    with torch.no_grad():
        layer.adapter_down.copy_(factors[0])
        layer.adapter_up.copy_(factors[1])
    own = x.clone().requires_grad_()
    ours = outcome(lambda x, *_: model(x), own, layer.adapter_down, layer.adapter_up)
    assert len(calls) == 1  # one operator reads x
    for name, a, b, t in zip(("y", "dx", "ddown", "dup"), ours, stock, truth, strict=True):
        assert_errs_at_most_twice_stock(name, a.to(b.dtype), b, t, t.abs() * n_in**0.5)


def test_adapters_over_packed_weights():
    model = tiny.seeded(tiny.DECODERS["llama"])
    tw.quantize(model, tw.NF4(group_size=16))
    packed = {n: t.clone() for n, t in model.state_dict().items()}
    base = model(tiny.tokens()).logits
    for method in (tw.Parallel(RANK), tw.Sequential(RANK, at="linear"), tw.BitFit(add=True),
                   tw.SparseDelta(density=0.1), tw.DoRA(rank=RANK), tw.IA3()):  # fmt: skip
        tuner = tw.adapt(model, method)
        assert rms(tuner.model(tiny.tokens()).logits - base) <= 2e-6 * rms(base), method
        optimizer = tuner.optimizer(lr=1e-2)
        for _ in range(2):
            tuner.model(input_ids=tiny.tokens(), labels=tiny.tokens()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert rms(tuner.model(tiny.tokens()).logits - base) > 1e-4 * rms(base), method
        if not isinstance(method, (tw.BitFit, tw.SparseDelta)) and "Seq" not in str(method):
            message = "activation 'relu'" if isinstance(method, tw.Parallel) else "is packed"
            with pytest.raises(ValueError, match=message):
                tuner.merge()
        tuner.remove()
        state = model.state_dict()
        assert state.keys() == packed.keys()
        assert all(torch.equal(state[n], t) for n, t in packed.items()), method
    with pytest.raises(ValueError, match="is packed, and a mask needs dense weights to train"):
        tw.adapt(model, "mask")


# DoRA and (IA)^3


def of_peft(config, n_in, n_out, dtype, part, bias):
    torch.manual_seed(1)
    return shaken(peft.get_peft_model(Layer(n_in, n_out, dtype, bias), config), part)


@pytest.mark.parametrize("trains", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (7, 65, 33, 3), (64, 128, 96, 8)], ids=str)
def test_dora_errs_at_most_twice_stock_peft(shape, dtype, trains, monkeypatch):
    tokens, n_in, n_out, rank = shape
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=["proj"], use_dora=True
    )  # fmt: skip
    stock = of_peft(config, n_in, n_out, dtype, "lora_", bias=True)
    for name, parameter in stock.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.data = parameter.data.to(dtype)
    ours = copy.deepcopy(stock)
    tw.accelerate(nn.ModuleList([ours]))
    calls = []
    for name in ("lora_linear", "fused_linear"):
        operator = getattr(lora_dora, name)
        monkeypatch.setattr(
            lora_dora, name, lambda *a, _f=operator, _n=name, **o: calls.append(_n) or _f(*a, **o)
        )
    x, dy = torch.randn(tokens, n_in).to(dtype), torch.randn(tokens, n_out).to(dtype)

    def outcome(model):
        layer = model.base_model.model.proj
        own = x.clone().requires_grad_()
        leaves = (own, layer.lora_A["default"].weight, layer.lora_B["default"].weight,
                  layer.lora_magnitude_vector["default"].weight)  # fmt: skip
        if not trains:
            with torch.no_grad():
                return (model(own),)
        y = model(own)
        return y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))

    def truth(change):
        """In float64; with abs as the change, the sum of the magnitudes of all terms."""
        layer = stock.base_model.model.proj
        kept = (x, layer.lora_A["default"].weight, layer.lora_B["default"].weight,
                layer.lora_magnitude_vector["default"].weight)  # fmt: skip
        base, bias = (t.detach().double() for t in (layer.base_layer.weight, layer.base_layer.bias))
        norm = (base + 2.0 * kept[2].double() @ kept[1].double()).detach().norm(dim=1)
        own, down, up, magnitude = leaves = [
            change(t.detach().double()).requires_grad_() for t in kept
        ]
        # what the sum under the root loses by terms of either sign
        widest = (change(base) + 2.0 * up.detach() @ down.detach()).norm(dim=1)
        norm = norm * (norm / widest).square() if change is torch.Tensor.abs else norm
        plain = own @ change(base).T + 2.0 * own @ down.T @ up.T
        y = magnitude / norm * plain + change(bias)
        return (y, *torch.autograd.grad(y, leaves, change(dy.double()))) if trains else (y,)

    results = zip(
        ("y", "dx", "dA", "dB", "dm"), outcome(ours), outcome(stock), truth(torch.Tensor.double),
        truth(torch.Tensor.abs), strict=False,
    )  # fmt: skip
    for name, a, b, t, terms in results:
        assert a.dtype == b.dtype
        assert_errs_at_most_twice_stock(name, a.to(dtype), b.to(dtype), t, terms)
    assert calls == ["lora_linear" if trains else "fused_linear"]


def test_the_norms_of_dora_follow_the_weight():
    config = peft.LoraConfig(r=2, target_modules=["proj"], use_dora=True)
    model = of_peft(config, 12, 9, torch.float32, "lora_", bias=False)
    stock = copy.deepcopy(model)
    tw.accelerate(nn.ModuleList([model]))
    x = torch.randn(3, 12)
    for _ in range(2):
        assert rms(model(x) - stock(x)) <= 1e-6 * rms(stock(x))
        for each in (model, stock):
            with torch.no_grad():
                each.base_model.model.proj.base_layer.weight.mul_(1.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_ia3_at_inference_is_one_operator(dtype, bias, monkeypatch):
    config = peft.IA3Config(target_modules=["proj"], feedforward_modules=[])
    stock = of_peft(config, 65, 33, dtype, "ia3_l", bias)
    ours = copy.deepcopy(stock)
    tw.accelerate(nn.ModuleList([ours]))
    calls = []
    operator = ia3_layers.fused_linear
    monkeypatch.setattr(
        ia3_layers, "fused_linear", lambda *a, **o: calls.append(a) or operator(*a, **o)
    )
    x = torch.randn(7, 65).to(dtype)
    layer = stock.base_model.model.proj
    with torch.no_grad():
        base = layer.base_layer.double()
        truth = base(x.double()) * layer.ia3_l["default"].double().flatten()
        layer.base_layer.to(dtype)
        a, b = ours(x), stock(x)
        assert_errs_at_most_twice_stock("y", a, b, truth, truth.abs() * 65**0.5)
        assert len(calls) == 1
    ours(x)
    assert len(calls) == 1  # its vector trains: PEFT's own


def test_stock_peft_reads_what_was_saved(tmp_path):
    ids = tiny.tokens()
    for how in (tw.LoRA(rank=RANK), tw.DoRA(rank=RANK), tw.IA3(), tw.Prefix(3)):
        tuner = tw.adapt(tiny.seeded(tiny.DECODERS["llama"]), how)
        shaken(tuner.model, "lora_", "ia3_l", "prompt_encoder")
        folder = tmp_path / type(how).__name__
        tuner.save(folder)
        model = peft.PeftModel.from_pretrained(tiny.seeded(tiny.DECODERS["llama"]), folder)
        assert torch.equal(model.eval()(ids).logits, tuner.model.eval()(ids).logits), how
        again = tw.load_adapted(tiny.seeded(tiny.DECODERS["llama"]), folder)
        assert type(again.method) is type(how)
