"""moe_upcycle_encoder and route_to: each example to the expert of its domain, and to no other."""

import copy

import pytest
import tiny_models as tiny
import torch
from yardstick import rms

import tilewright as tw
from tilewright.upcycle_encoder import DomainExperts

EXPERTS = 3
ROUTES = ([0] * 6, [2] * 6, [0, 1, 2, 0, 1, 2], [2, 0, 0, 0, 0, 1])


def dense(name="bert", **changes):
    return tiny.seeded(lambda: tiny.ENCODERS[name](**changes))


def batch(rows=6):
    mask = tiny.padding("right", rows)
    return {"input_ids": tiny.tokens(rows), "attention_mask": mask}


def hidden(model, inputs, route=None):
    with torch.no_grad():
        if route is None:
            return model(**inputs).last_hidden_state
        with tw.route_to(model, route):
            return model(**inputs).last_hidden_state


def apart(model, size=0.3):
    """Experts that differ."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, DomainExperts):
                for p in layer.parameters():
                    p.add_(size * torch.randn(p.shape, generator=generator))
    return model


def own(model, expert):
    """The parameters of one expert, by name."""
    marks = f"ups.{expert}.", f"downs.{expert}."
    return {n: p for n, p in model.named_parameters() if any(m in n for m in marks)}


@pytest.mark.parametrize("layers", [None, [1]], ids=["all", "one"])
@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh", "silu", "relu"])
@pytest.mark.parametrize("name", tiny.ENCODERS)
def test_at_first_any_route_gives_what_the_dense_model_does(name, act, layers):
    model, inputs = dense(name, hidden_act=act), batch()
    mixture = tw.moe_upcycle_encoder(model, EXPERTS, layers)
    want = hidden(model, inputs)
    assert want.std() > 0.1
    assert sum(isinstance(m, DomainExperts) for m in mixture.modules()) == (1 if layers else 2)
    for route in ROUTES:
        torch.testing.assert_close(hidden(mixture, inputs, route), want, rtol=0, atol=1e-5)
    assert (hidden(apart(mixture), inputs, ROUTES[2]) - want).abs().max() > 0.1


def test_each_example_gets_its_own_expert():
    """As if each had a model of its own; and the order of the batch does not matter."""
    mixture, inputs, route = apart(tw.moe_upcycle_encoder(dense(), EXPERTS)), batch(), ROUTES[3]
    got = hidden(mixture, inputs, route)
    for b, expert in enumerate(route):
        alone = hidden(mixture, {n: t[b : b + 1] for n, t in inputs.items()}, [expert])
        torch.testing.assert_close(alone[0], got[b], rtol=1e-5, atol=2e-6)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    shuffled = {n: t[order] for n, t in inputs.items()}
    permuted = hidden(mixture, shuffled, torch.tensor(route)[order])
    torch.testing.assert_close(permuted, got[order], rtol=1e-5, atol=1e-6)
    wrong = hidden(mixture, inputs, [(e + 1) % EXPERTS for e in route])
    assert (wrong - got).abs().amax(dim=(1, 2)).min() > 1e-2


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, tw.AdamW])
def test_a_domain_moves_its_own_expert_alone(optimizer):
    """Also after others have been trained, whose momentum must not move them."""
    mixture, inputs = tw.moe_upcycle_encoder(dense(), EXPERTS), batch()
    steps = optimizer(mixture.parameters(), lr=1e-2, weight_decay=0.1)

    def step(expert):
        with tw.route_to(mixture, [expert] * 6):
            mixture(**inputs).last_hidden_state.square().sum().backward()
        steps.step()
        steps.zero_grad()

    def state_of(e):
        return [copy.deepcopy(dict(steps.state.get(p, {}))) for p in own(mixture, e).values()]

    step(1)
    assert not any(state_of(0)) and all(state_of(1))
    before = copy.deepcopy(mixture.state_dict())
    kept = {e: state_of(e) for e in range(EXPERTS)}
    step(0)
    for e in range(EXPERTS):
        moved = {n: not torch.equal(p, before[n]) for n, p in own(mixture, e).items()}
        assert set(moved.values()) == {e == 0}, (e, moved)
    for e in (1, 2):
        for was, now in zip(kept[e], state_of(e), strict=True):
            assert was.keys() == now.keys()
            same = [torch.equal(torch.as_tensor(was[n]), torch.as_tensor(now[n])) for n in was]
            assert all(same)
    assert not any(kept[0]) and all(state_of(0))


def test_gradients_are_those_of_a_loop_over_examples():
    mixture, inputs, route = apart(tw.moe_upcycle_encoder(dense(), EXPERTS)), batch(), ROUTES[3]
    weights = torch.randn(hidden(mixture, inputs, route).shape)
    with tw.route_to(mixture, route):
        (mixture(**inputs).last_hidden_state * weights).sum().backward()
    got = {n: p.grad for n, p in mixture.named_parameters()}
    mixture.zero_grad()
    for b, expert in enumerate(route):
        with tw.route_to(mixture, [expert]):
            one = mixture(**{n: t[b : b + 1] for n, t in inputs.items()}).last_hidden_state
        (one * weights[b : b + 1]).sum().backward()
    need = {n: p.grad for n, p in mixture.named_parameters()}
    assert {n for n in got if got[n] is None} == {n for n in need if need[n] is None}
    largest = max(rms(g) for g in need.values() if g is not None)
    for n, g in need.items():
        if g is not None:  # keys' biases have a gradient of 0 but for rounding
            assert rms(got[n] - g) <= 1e-5 * rms(g) + 1e-7 * largest, n


def test_an_accelerated_mixture_and_one_in_bfloat16():
    mixture, inputs, route = apart(tw.moe_upcycle_encoder(dense(), EXPERTS)), batch(), ROUTES[2]
    want = hidden(mixture, inputs, route)
    assert [r.kind for r in tw.accelerate(mixture).replaced].count("attention") == 2
    torch.testing.assert_close(hidden(mixture, inputs, route), want, rtol=1e-4, atol=1e-5)
    half = hidden(mixture.bfloat16(), inputs, route).float()
    assert (half - want).square().mean() < 1e-3 * want.square().mean()


def test_the_dense_model_stays_and_the_mixture_is_saved_by_its_state(tmp_path):
    model, inputs = dense(), batch()
    want = hidden(model, inputs)
    mixture = apart(tw.moe_upcycle_encoder(model, EXPERTS))
    assert torch.equal(hidden(model, inputs), want)
    torch.save(mixture.state_dict(), tmp_path / "state")
    other = tw.moe_upcycle_encoder(model, EXPERTS)
    other.load_state_dict(torch.load(tmp_path / "state"))
    assert torch.equal(*(hidden(m, inputs, ROUTES[2]) for m in (mixture, other)))


def refusals():
    model, inputs = dense(), batch()
    mixture = tw.moe_upcycle_encoder(model, EXPERTS)
    upcycle, route = tw.moe_upcycle_encoder, tw.route_to

    def enter(*arguments):
        with route(*arguments):
            mixture(**inputs)

    yield lambda: upcycle(model, 0), "moe_upcycle_encoder: experts is 0, need at least 1"
    yield lambda: upcycle(model, 2, [2]), "moe_upcycle_encoder: layers has 2, the model has layers"
    yield lambda: upcycle(torch.nn.Linear(2, 2)), "moe_upcycle_encoder: model is a Linear, need one"
    yield (lambda: upcycle(dense(hidden_act="gelu_new")),
           "moe_upcycle_encoder: the activation of layer 0 is NewGELUActivation")  # fmt: skip
    yield lambda: mixture(**inputs), "DomainExperts: no route; call the model inside"
    yield lambda: enter(model, [0]), "route_to: model is a BertModel without experts"
    yield lambda: enter(mixture, [0] * 5), r"route_to: experts has shape \(5,\), need \(6,\)"
    yield lambda: enter(mixture, [0] * 5 + [3]), "route_to: experts holds 0 to 3, need 0 to 2"
    yield lambda: enter(mixture, [0.0] * 6), "route_to: experts is torch.float32 of shape"
    yield lambda: enter(mixture, 1), r"route_to: experts is torch.int64 of shape \(\)"


@pytest.mark.parametrize("number", range(10))
def test_refusals(number):
    function, message = list(refusals())[number]
    with pytest.raises((ValueError, RuntimeError), match=message):
        function()
