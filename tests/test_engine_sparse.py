"""Sparse fine-tuning of models: training, exchanges of places, merging, files, PEFT."""

import copy
import importlib.util
import os

import pytest
import torch
from tiny_models import DECODERS, VOCABULARY
from torch import nn

import tilewright
from tilewright import load_peft_deltas, save_peft_deltas
from tilewright.adapt import sparse
from tilewright.adapt.sparse import SparseDelta, attach_deltas
from tilewright.adapt.sparse_layers import SparseLinear, SparseQuantizedLinear
from tilewright.adapt.sparse_optim import DeltaAdamW, DeltaSM3
from tilewright.files import InputError

AG = SparseDelta(density=0.05, rule="gradient", every=4, window=2, last_step=40)
MA = SparseDelta(density=0.05, rule="extremes", every=4, window=2, last_step=40)


def two_layers(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 20)).to(dtype)


def llama():
    torch.manual_seed(0)
    return DECODERS["llama"]()


def bits(t):
    return t.detach().contiguous().view(torch.uint8)


def step(model, optimizer, tuner, x, target, micro_batches=1):
    for _ in range(micro_batches):
        ((model(x) - target).square().mean() / micro_batches).backward()
    optimizer.step()
    optimizer.zero_grad()
    return tuner.after_step(optimizer)


def test_an_adapted_model_computes_what_it_did_and_says_what_trains():
    model = llama()
    tokens = torch.randint(VOCABULARY, (2, 9))
    before = model(tokens).logits
    names = {n for n, m in model.named_modules() if type(m) is nn.Linear}
    tuner = tilewright.adapt(model, SparseDelta(density=0.02))
    assert torch.equal(model(tokens).logits, before)
    assert set(tuner.layers) == names - {"lm_head"}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{n}.delta_values" for n in tuner.layers
    }
    assert all(type(m) is SparseLinear for m in tuner.layers.values())
    for layer in tuner.layers.values():
        assert layer.delta.nnz == int(0.02 * layer.in_features * layer.out_features)
    trained = sum(p.numel() for p in tuner.parameters())
    assert f"14 layers with a sparse delta, {trained} values train" in str(tuner)
    assert "lm_head: Linear stays: it is the output embedding" in str(tuner)


@pytest.mark.parametrize("method", [SparseDelta(density=0.05), AG, MA], ids=["none", "AG", "MA"])
def test_training_learns_and_leaves_the_weights_alone(method):
    model = two_layers()
    weights = [bits(m.weight).clone() for m in model if hasattr(m, "weight")]
    x, target = torch.randn(64, 40), torch.randn(64, 20)
    tuner = tilewright.adapt(model, method)
    optimizer = tuner.optimizer(lr=1e-1 if method.rule == "extremes" else 1e-2)
    assert isinstance(optimizer, DeltaSM3 if method.rule == "extremes" else DeltaAdamW)
    first = (model(x) - target).square().mean().item()
    counts = [m.delta.nnz for m in tuner.layers.values()]
    n_exchanges = sum(step(model, optimizer, tuner, x, target) for _ in range(50))
    last = (model(x) - target).square().mean().item()
    assert last < 0.93 * first
    assert n_exchanges == (0 if method.rule == "none" else 10) == tuner.exchanges
    assert [m.delta.nnz for m in tuner.layers.values()] == counts
    for layer in tuner.layers.values():
        vars(layer).pop("_delta")
        layer.delta.expect_whole("test")
    kept = [m.weight for m in model if hasattr(m, "weight")]
    assert all(torch.equal(bits(a), b) for a, b in zip(kept, weights, strict=True))


def test_moving_places_learns_more_than_fixed_ones():
    losses = {}
    for rule in ("none", "gradient"):
        model = two_layers()
        torch.manual_seed(1)
        x = torch.randn(256, 40)
        teacher = two_layers()
        with torch.no_grad():  # what there is to learn is in a few columns
            teacher[0].weight[:, :3] += 1.0
        target = teacher(x).detach()
        method = SparseDelta(density=0.03, rule=rule, every=8, window=3, last_step=120)
        tuner = tilewright.adapt(model, method)
        optimizer = tuner.optimizer(lr=2e-2)
        for _ in range(150):
            step(model, optimizer, tuner, x, target)
        losses[rule] = (model(x) - target).square().mean().item()
    assert losses["gradient"] < 0.7 * losses["none"], losses


def test_growth_picks_what_the_dense_gradient_says():
    """The first exchange replaces everything: all values stand where the gradient is largest."""
    model, dense = two_layers(), two_layers()
    x, target = torch.randn(64, 40), torch.randn(64, 20)
    method = SparseDelta(density=0.05, rule="gradient", every=2, window=1, last_step=10)
    tuner = tilewright.adapt(model, method)
    optimizer = tuner.optimizer(lr=0.0)
    assert step(model, optimizer, tuner, x, target)
    (dense(x) - target).square().mean().backward()
    for name, layer in tuner.layers.items():
        gradient = dense[int(name)].weight.grad.abs().flatten()
        best = gradient.topk(layer.delta.nnz).indices.sort().values
        assert torch.equal(layer.delta.places(), best)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_a_new_value_moves_by_exactly_lr_under_a_constant_gradient(micro_batches):
    model = nn.Sequential(nn.Linear(6, 4, bias=False))
    x, slope = torch.randn(8, 6), torch.randn(8, 4)
    method = SparseDelta(density=0.3, rule="gradient", every=6, window=5, last_step=10)
    tuner = tilewright.adapt(model, method)
    optimizer = tuner.optimizer(lr=1e-3, eps=1e-30)

    def one_step():
        for _ in range(micro_batches):
            ((model(x) * slope).sum() / micro_batches).backward()  # linear in the values
        optimizer.step()
        optimizer.zero_grad()
        return tuner.after_step(optimizer)

    before = set(tuner.layers["0"].delta.places().tolist())
    assert [one_step() for _ in range(5)] == [False] * 4 + [True]
    layer = tuner.layers["0"]
    is_new = torch.tensor([p not in before for p in layer.delta.places().tolist()])
    assert is_new.any() and (layer.delta_values[is_new] == 0).all()
    assert (optimizer.state[layer.delta_values]["age"] == 5).all()
    one_step()
    moved = layer.delta_values.detach()[is_new].abs()
    assert torch.allclose(moved, torch.full_like(moved, 1e-3), rtol=1e-5, atol=0)


def test_survivors_keep_values_and_moments():
    model, (x, target) = two_layers(), (torch.randn(64, 40), torch.randn(64, 20))
    tuner = tilewright.adapt(model, AG)
    optimizer = tuner.optimizer(lr=1e-2)
    for _ in range(5):
        step(model, optimizer, tuner, x, target)
    layer = tuner.layers["0"]
    (model(x) - target).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    state = optimizer.state[layer.delta_values]
    before = {
        p: (v, m) for p, v, m in zip(layer.delta.places().tolist(), layer.delta_values.tolist(),
                                     state["exp_avg"].tolist(), strict=True)
    }  # fmt: skip
    assert tuner.after_step(optimizer)
    after = {
        p: (v, m) for p, v, m in zip(layer.delta.places().tolist(), layer.delta_values.tolist(),
                                     state["exp_avg"].tolist(), strict=True)
    }  # fmt: skip
    stayed = set(before) & set(after)
    assert 0.75 * len(before) <= len(stayed) < len(before)
    assert all(before[p] == after[p] for p in stayed)


def test_adamw_over_a_fixed_set_is_torchs():
    p, q = (nn.Parameter(torch.linspace(-1, 1, 50)) for _ in range(2))
    ours = DeltaAdamW([p], lr=3e-3, weight_decay=0.1)
    theirs = torch.optim.AdamW([q], lr=3e-3, weight_decay=0.1)
    for n in range(20):
        p.grad = q.grad = torch.sin(torch.arange(50.0) + n)
        ours.step()
        theirs.step()
    assert torch.allclose(p, q, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", [AG, MA], ids=["AG", "MA"])
def test_clipping_on_the_way(method):
    """The norm is that of all values' gradients; what is clipped is what enters the moments."""
    model, (x, target) = two_layers(), (torch.randn(64, 40), torch.randn(64, 20))
    tuner = tilewright.adapt(model, method)
    optimizer = tuner.optimizer(lr=1e-2, clip_norm=1e-3)
    (model(x) - target).square().mean().backward()
    norm = torch.cat([p.grad for p in tuner.parameters()]).norm()
    optimizer.step()
    assert norm > 2e-3 and torch.allclose(optimizer.last_norm, norm)
    if method is AG:
        means = torch.cat([optimizer.state[p]["exp_avg"] for p in tuner.parameters()])
        assert torch.allclose(means.norm(), torch.tensor(0.1 * 1e-3), rtol=2e-2)


@pytest.mark.parametrize(
    "options", [{"state_bits": 8}, {"narrow": "master"}, {"ages": True}, {"only": {}}], ids=str
)
def test_options_that_could_not_move_with_the_values(options):
    tuner = tilewright.adapt(two_layers(), AG)
    with pytest.raises(ValueError, match=r"DeltaAdamW: .* need it left out: values come and go"):
        tuner.optimizer(**options)


def test_ages_advance_where_values_are_of_16_bits():
    model = two_layers(torch.bfloat16)
    tuner = tilewright.adapt(model, SparseDelta(density=0.05, values="bfloat16"))
    optimizer = tuner.optimizer(lr=1e-2)
    x, target = torch.randn(64, 40).bfloat16(), torch.randn(64, 20).bfloat16()
    for _ in range(3):
        step(model, optimizer, tuner, x, target)
    for p in tuner.parameters():
        assert p.dtype == torch.bfloat16 and (optimizer.state[p]["age"] == 3).all()


@pytest.mark.parametrize("method", [AG, MA], ids=["AG", "MA"])
def test_resuming_in_the_middle_of_a_window_changes_nothing(method):
    x, target = torch.randn(64, 40), torch.randn(64, 20)
    results = []
    for resume in (False, True):
        model = two_layers()
        tuner = tilewright.adapt(model, method)
        optimizer = tuner.optimizer(lr=1e-2)
        for n in range(14):
            if resume and n == 9:  # one step of a window of two is seen
                saved = copy.deepcopy(
                    (model.state_dict(), optimizer.state_dict(), tuner.state_dict())
                )
                model = two_layers()
                tuner = tilewright.adapt(model, method)
                optimizer = tuner.optimizer(lr=1e-2)
                model.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
                tuner.load_state_dict(saved[2])
            step(model, optimizer, tuner, x, target)
        results.append([(m.delta.places(), m.delta_values.detach())
                        for m in tuner.layers.values()])  # fmt: skip
    for one, other in zip(*results, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("format", ["NF4", "Int8"])
def test_a_packed_model_trains_and_its_bytes_stay(format):
    model = llama()
    tilewright.quantize(model, getattr(tilewright, format)())
    packed = {n: t.clone() for n, t in model.state_dict().items() if "codes" in n or "scales" in n}
    tokens = torch.randint(VOCABULARY, (4, 9))
    tuner = tilewright.adapt(model, SparseDelta(density=0.05, rule="gradient", every=3, window=2,
                                                last_step=20))  # fmt: skip
    assert all(type(m) is SparseQuantizedLinear for m in tuner.layers.values())
    optimizer = tuner.optimizer(lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        tuner.after_step(optimizer)
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0] and tuner.exchanges == 3
    state = model.state_dict()
    assert packed and all(torch.equal(bits(state[n]), bits(t)) for n, t in packed.items())
    with pytest.raises(ValueError, match="merge_delta: weight is"):
        tuner.merge()


def test_merging_and_taking_out_again_to_the_last_bit():
    model, x = two_layers(torch.bfloat16), torch.randn(9, 40).bfloat16()
    tuner = tilewright.adapt(model, SparseDelta(density=0.1))
    with torch.no_grad():
        for p in tuner.parameters():
            p.normal_()
    weights = [bits(m.weight).clone() for m in tuner.layers.values()]
    beside = model(x)
    tuner.merge()
    tuner.merge()  # twice is once
    assert not any(torch.equal(bits(m.weight), w)
                   for m, w in zip(tuner.layers.values(), weights, strict=True))  # fmt: skip
    assert torch.allclose(model(x).float(), beside.float(), atol=0.1)
    tuner.unmerge()
    assert torch.equal(model(x), beside)
    assert all(torch.equal(bits(m.weight), w)
               for m, w in zip(tuner.layers.values(), weights, strict=True))  # fmt: skip
    tuner.merge()
    removed = tuner.remove()
    assert [type(m) for m in model] == [nn.Linear, nn.Tanh, nn.Linear] and len(removed) == 2
    assert all(torch.equal(bits(m.weight), w) for m, w in zip(model[::2], weights, strict=True))
    assert all(p.requires_grad for p in model.parameters()) and len(model.state_dict()) == 4


def test_files_and_targets(tmp_path):
    model = llama()
    tuner = tilewright.adapt(model, SparseDelta(density=0.05, targets=["q_proj", "down_proj"]))
    assert len(tuner.layers) == 4
    with torch.no_grad():
        for p in tuner.parameters():
            p.normal_()
    tokens = torch.randint(VOCABULARY, (2, 9))
    expected = model(tokens).logits
    tuner.save(tmp_path / "deltas.safetensors")
    again = llama()
    loaded = tilewright.load_adapted(again, tmp_path / "deltas.safetensors")
    assert loaded.method.targets == ["q_proj", "down_proj"] and loaded.method.density == 0.05
    assert torch.equal(again(tokens).logits, expected)


def test_a_copy_of_a_model_is_its_own():
    model, x = two_layers(), torch.randn(5, 40)
    tilewright.adapt(model, SparseDelta(density=0.1))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].delta_values.normal_()
    assert not torch.equal(other(x), model(x)) and not model[0].delta_values.any()


needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="needs peft: pip install peft"
)


@needs_peft
def test_stock_peft_loads_what_we_save_and_we_what_it_saves(tmp_path):
    import peft

    tuner = tilewright.adapt(llama(), SparseDelta(density=0.03))
    with torch.no_grad():
        for p in tuner.parameters():
            p.normal_()
    tokens = torch.randint(VOCABULARY, (2, 9))
    expected = tuner.model(tokens).logits
    save_peft_deltas(tuner, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours")
    assert type(theirs.base_model).__name__ == "SupertuningModel"
    assert torch.allclose(theirs(tokens).logits, expected, atol=1e-4)
    back = load_peft_deltas(llama(), tmp_path / "ours")
    for name, delta in tuner.deltas().items():
        assert torch.equal(back.deltas()[name].places(), delta.places())
        assert torch.equal(back.deltas()[name].values, delta.values)
    config = peft.SupertuningConfig(target_modules=["q_proj", "up_proj"], sparsity=0.9,
                                    init_weights=False)  # fmt: skip
    trained = peft.get_peft_model(llama(), config)
    trained.save_pretrained(tmp_path / "theirs")
    ours = load_peft_deltas(llama(), tmp_path / "theirs")
    assert len(ours.layers) == 4
    assert torch.allclose(ours.model(tokens).logits, trained(tokens).logits, atol=1e-4)


@needs_peft
def test_adapters_of_another_kind_are_refused(tmp_path):
    import peft

    peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(
        tmp_path
    )
    with pytest.raises(InputError, match="is an adapter of kind LORA, need SUPERTUNING"):
        load_peft_deltas(llama(), tmp_path)
    config = peft.SupertuningConfig(target_modules=["q_proj"], sparsity=0.9, r=2)
    peft.get_peft_model(llama(), config).save_pretrained(tmp_path / "supra")
    with pytest.raises(InputError, match="has a low-rank update beside its values"):
        load_peft_deltas(llama(), tmp_path / "supra")


def _rank(rank, meeting, results):
    """One process: its own data, the same model."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2
    )
    for method in (AG, MA):
        model = two_layers()
        tuner = tilewright.adapt(model, method)
        parallel = nn.parallel.DistributedDataParallel(model)
        optimizer = tuner.optimizer(lr=1e-2)
        torch.manual_seed(rank + 10)
        x, target = torch.randn(32, 40), torch.randn(32, 20)
        for _ in range(7):
            step(parallel, optimizer, tuner, x, target)
        assert tuner.exchanges == 2
        results.put((rank, method.rule, [(m.delta.places().tolist(), m.delta_values.tolist())
                                         for m in tuner.layers.values()]))  # fmt: skip
    results.close()
    results.join_thread()
    torch.distributed.barrier()
    # torch's gloo group holds the GIL while it waits for its thread, which may wait for the GIL
    os._exit(0)


@pytest.mark.slow
def test_two_ranks_choose_the_same_places(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    meeting = tmp_path / "meeting"
    ranks = [context.Process(target=_rank, args=(rank, meeting, results)) for rank in range(2)]
    for process in ranks:
        process.start()
    found = [results.get(timeout=100) for _ in range(4)]
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    for rule in ("gradient", "extremes"):
        one, other = (next(f[2] for f in found if f[:2] == (rank, rule)) for rank in range(2))
        assert one == other, rule


REFUSED = {
    "density": (dict(density=0.0), "density is 0.0, need 0 < density <= 1"),
    "values": (dict(values="float16"), "no values 'float16'. Known: float32, bfloat16"),
    "rule": (dict(rule="best"), "no rule 'best'. Known: gradient, extremes, none"),
    "last-step": (dict(rule="gradient"), "rule 'gradient' with last_step None, need the number"),
    "window": (dict(every=4, window=5), "window is 5 of 4 steps, need 1 to every"),
    "targets": (dict(targets="q_proj"), "targets is 'q_proj', need a list of names"),
    "share": (dict(share=1.5), "share is 1.5, need 0 <= share <= 1"),
}


@pytest.mark.parametrize("options, message", REFUSED.values(), ids=REFUSED)
def test_methods_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match="SparseDelta: ") as refusal:
        SparseDelta(**options)
    assert message in str(refusal.value)


def test_refusals():
    model = two_layers()
    with pytest.raises(ValueError, match="method is a float, need one of lora, "):
        tilewright.adapt(model, 0.01)
    with pytest.raises(
        ValueError, match=r"target 'q_proj' is no linear layer that fits\. Known: 0, 1"
    ):
        tilewright.adapt(model, SparseDelta(targets=["q_proj"]))
    with pytest.raises(ValueError, match="no linear layer of the model fits: there are none"):
        tilewright.adapt(nn.Tanh(), SparseDelta())
    tuner = tilewright.adapt(model, MA)
    with pytest.raises(ValueError, match="the model has sparse deltas already"):
        tilewright.adapt(model, SparseDelta())
    with pytest.raises(ValueError, match="the optimizer AdamW, need DeltaSM3"):
        for _ in range(2):
            tuner.after_step(torch.optim.AdamW(tuner.parameters()))
    deltas = tuner.remove()
    with pytest.raises(ValueError, match="the model has no linear layer 'elsewhere' to change"):
        attach_deltas(model, {"elsewhere.weight": deltas["0.weight"]})
    with pytest.raises(
        ValueError, match=r"is of shape \(60, 40\), the layer's weight of \(20, 60\)"
    ):
        attach_deltas(model, {"2.weight": deltas["0.weight"]})
    for options, message in (
        (dict(lr=-1.0), "lr is -1.0"), (dict(eps=0.0), "eps is 0.0"),
        (dict(betas=(0.9, 1.0)), "betas are"), (dict(weight_decay=-1), "weight_decay is -1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"DeltaAdamW: {message}"):
            DeltaAdamW([nn.Parameter(torch.zeros(3))], **options)


@pytest.mark.parametrize("share", [0.001, 0.05, 0.3, 1.0])
def test_places_to_begin_with_are_drawn_alike(share):
    size = 4000
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(size)
    for _ in range(60):
        places = sparse._draw(size, int(share * size), generator)
        assert len(places.unique()) == len(places) == int(share * size)
        counts[places] += 1
    halves = counts.view(4, -1).sum(1)
    expected = 60 * share * size / 4
    assert ((halves - expected).abs() <= 5 * expected**0.5).all()
