"""The benchmark of a training step: its model, figures, gradients, updates and memory."""

import json
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import tilewright
from tilewright import memory
from tilewright.adapt import deferred
from tilewright.bench import bench_training, ceilings, run, training_memory, training_model
from tilewright.bench.bench_training import LARGE, SMALL
from tilewright.bench.training_model import EAGER, OURS, STOCK
from tilewright.bench.variant import Variant

pytest.importorskip("peft", reason="the benchmark of training adapts by PEFT")

TINY = {name: bench_training.small(case) for name, case in bench_training.CASES.items()}
by_case = pytest.mark.parametrize("case", TINY.values(), ids=TINY)
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(bench_training, "CASES", TINY)
    monkeypatch.setattr(
        bench_training, "quick", lambda case: {k: case[k] for k in case if "gives" not in k}
    )
    known = ceilings.Ceilings(fma=100.0, bf16_dot=200.0, int8_dot=None, read=10.0, how="made up")
    monkeypatch.setattr(ceilings, "measure", lambda device: known)


def training(case, how, dtype=torch.float32):
    inputs = bench_training.make_inputs(case, dtype, "cpu")
    return bench_training.in_training(how, case, inputs)["training"]


def rms(t):
    return t.double().square().mean().sqrt().item()


# --- the model ---


def test_the_large_shape_is_a_llama_of_100_million():
    model = training_model.hosted_without_values(LARGE)
    assert 0.99e8 < sum(p.numel() for p in model.parameters()) < 1.01e8
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, size in LARGE.layer_matrices.items():
        assert model.model.layers[0].get_submodule(name).weight.shape == size


def test_what_trains_is_what_the_case_says():
    sizes = {n: sum(p.numel() for p in training(c, OURS).trained.values()) for n, c in TINY.items()}
    matrices = SMALL.layer_weights
    beside = SMALL.vocab * SMALL.hidden + (2 * SMALL.layers + 1) * SMALL.hidden
    assert sizes["full-2k"] == matrices + beside
    assert abs(sizes["half-2k"] - beside - matrices / 2) < 0.15 * matrices
    ends = sum(n_out + n_in for n_out, n_in in SMALL.layer_matrices.values())
    assert sizes["lora-2k"] == SMALL.layers * training_model.RANK * ends
    assert abs(sizes["sparse-2k"] - 0.01 * matrices) <= 7 * SMALL.layers


@by_case
def test_ours_runs_our_operators_and_stock_none_of_them(case):
    ours, stock = training(case, OURS), training(case, STOCK)
    tilewright.restore(ours.forward)
    with pytest.raises(ValueError, match="is not accelerated"):
        tilewright.restore(stock.forward)
    assert type(ours.optimizer) is tilewright.AdamW
    assert type(stock.optimizer) is torch.optim.AdamW
    assert list(ours.trained) == list(stock.trained)


@pytest.mark.parametrize("name", ["lora-2k", "full-2k", "half-2k"])
def test_operations_are_those_that_torch_counts(name):
    case = TINY[name]
    plain = training(case, EAGER)
    with FlopCounterMode(display=False) as counter:
        plain()
    n = case["T"]
    # what torch computes of pairs that the mask then hides, and a product of positions
    hidden = 12 * SMALL.layers * SMALL.hidden * n * (n - 1) // 2
    angles = 2 * SMALL.head_width // 2 * n
    operations, _ = bench_training.work(case, 2, "fwd+bwd")
    assert 0 <= counter.get_total_flops() - hidden - operations <= angles


def test_a_sparse_step_needs_three_products_of_its_values():
    case = TINY["sparse-2k"]
    bare = bench_training.work({**case, "share": 0.0}, 2, "fwd+bwd")[0]
    n = sum(len(at) for at in training_model.places(SMALL, case["share"]).values())
    more = (bench_training.work(case, 2, "fwd+bwd")[0] - bare) / (2 * case["T"])
    first = sum(
        len(at)
        for name, at in training_model.places(SMALL, case["share"]).items()
        if re.search(r"\.0\.self_attn\.[qkv]_proj", name)
    )
    assert more == 3 * n - first


# --- agreement ---


@by_case
@by_dtype
def test_every_gradient_errs_at_most_twice_stock(case, dtype):
    """Each by itself: in the benchmark's own check the largest would hide the others."""
    found = {how: training(case, how, dtype) for how in (OURS, STOCK)}
    found[EAGER] = training(case, EAGER, torch.float64)
    for each in found.values():
        each.gradients()
    for name in found[EAGER].trained:
        exact, stock, ours = (found[how].gradient(name).double() for how in (EAGER, STOCK, OURS))
        last_rounding = torch.finfo(dtype).eps / 2 * rms(exact)
        budget = max(2 * rms(stock - exact), last_rounding)
        assert rms(ours - exact) <= budget, name
        assert (ours - exact).abs().max() <= 16 * budget, name
        if dtype == torch.float32:  # a gradient wrong by 1 % would be seen
            assert 100 * budget < 0.1 * rms(exact), name


@by_case
def test_updated_weights_err_at_most_twice_stock(case):
    moved = {}
    for how in (EAGER, STOCK, OURS):
        each = training(case, how, torch.float64 if how == EAGER else torch.float32)
        before = {name: p.detach().clone() for name, p in each.trained.items()}
        losses = [each() for _ in range(3)]
        assert losses[-1] < losses[0]
        moved[how] = torch.cat(
            [(p.detach() - before[n]).double().flatten() for n, p in each.trained.items()]
        )
    exact, stock, ours = (moved[how] for how in (EAGER, STOCK, OURS))
    lr = training_model.ADAMW["lr"]
    assert lr < rms(exact) < 4 * lr  # three steps of about lr, an entry
    budget = 2 * rms(stock - exact)
    assert rms(ours - exact) <= budget < 0.005 * rms(exact)


@pytest.mark.usefixtures("tiny")
def test_a_loss_wrong_by_one_percent_gets_no_time(monkeypatch, capsys):
    right = deferred.linear_cross_entropy
    monkeypatch.setattr(deferred, "linear_cross_entropy", lambda *a, **k: 1.01 * right(*a, **k))
    arguments = ["training", "--quick", "--seconds", "0.01", "--dtype", "float32"]
    assert run.main([*arguments, "--case", "lora-2k"]) == 1
    printed = capsys.readouterr()
    (ours,) = [line for line in printed.out.splitlines() if "| tilewright " in line]
    assert "wrong: output errs by" in ours and "tokens/s" not in ours


# --- the run ---


@pytest.mark.usefixtures("tiny")
def test_a_run_shows_tokens_a_second(tmp_path, capsys):
    file = tmp_path / "r.json"
    arguments = ["training", "--quick", "--seconds", "0.01", "--json", str(file)]
    assert run.main([*arguments, "--case", "half-2k,sparse-2k", "--no-check"]) == 0
    printed = capsys.readouterr().out
    assert "Left out by --quick: transformers compiled" in printed
    rows = json.loads(file.read_text())["results"]
    assert [row["variant"] for row in rows] == ["tilewright", "transformers"] * 2
    for row in rows:
        rate = TINY[row["case"]]["T"] / (row["times"]["median_us"] / 1e6)
        assert row["per_second"] == {"tokens": pytest.approx(rate)}


# --- memory ---


def test_memory_is_the_rise_of_a_step_and_the_peak_over_all(monkeypatch):
    if memory.resident_bytes() is None:
        pytest.skip("this system does not tell how much memory a process has")
    mib = 2**20

    def filled(n_mib):  # a bytearray is written when it is made
        return bytearray(b"\1") * (n_mib * mib)

    probe = Variant(
        lambda case, held: filled(96), prepare=lambda case, inputs: {"held": filled(48)}
    )
    monkeypatch.setitem(bench_training.VARIANTS, "probe", probe)
    monkeypatch.setattr(bench_training, "quick", bench_training.small)
    rise, peak = training_memory.of_a_step("lora-2k", "probe", is_quick=True)
    assert 94 <= rise < 100 and 142 <= peak < 152  # the system counts in batches of pages


def test_the_table_of_memory_has_ratios_to_ours():
    found = {"a": {"tilewright": (10.0, 40.0), "transformers": (25.0, 60.0)}, "b": {"other": None}}
    assert training_memory.table(found)[2:] == [
        "| a | tilewright | 10 | 1.00 | 40 | 1.00 |",
        "| a | transformers | 25 | 2.50 | 60 | 1.50 |",
        "| b | other | not measurable here |  |  |  |",
    ]
