"""Experts over two processes by gloo: outputs and gradients are those of one process with all."""

import pytest
import torch
from moe_inputs import Case, make_inputs

from tilewright import ExpertsLora, ops

CASES = {
    "plain": Case(24, 2, 4, 40, 24),
    "biased, some go nowhere": Case(24, 3, 6, 40, 24, bias=True, routing="nowhere"),
    "all to one process": Case(24, 2, 6, 40, 24, routing="one"),
    "scaled input": Case(24, 2, 4, 40, 24, scale_input=True),
    "no tokens in the first": Case(24, 2, 4, 40, 24, activation="geglu"),
}
OF_TOKENS, OF_EXPERTS = (
    ("x", "ids", "gates", "dy"),
    ("gate_up", "down", "gate_up_bias", "down_bias"),
)
TRAINED = ("x", "gates", *OF_EXPERTS)


def with_update(case: Case) -> dict:
    inputs = make_inputs(case, torch.float32)
    generator = torch.Generator().manual_seed(8)
    inputs["a"] = torch.randn(case.experts, 3, case.features, generator=generator) / 6
    inputs["b"] = torch.randn(case.experts, 2 * case.width, 3, generator=generator)
    return inputs


def tokens_of(name: str, case: Case, rank: int) -> slice:
    cut = 0 if name.startswith("no tokens") else 9  # unlike numbers
    return slice(0, cut) if rank == 0 else slice(cut, case.tokens)


def both_ways(function, inputs: dict, case: Case, **options) -> dict:
    names = [n for n in (*TRAINED, "a", "b") if n in inputs]
    leaves = {n: inputs[n].clone().requires_grad_() for n in names}
    call = {n: leaves.get(n, t) for n, t in inputs.items() if n not in ("dy", "a", "b")}
    update = ExpertsLora(leaves["a"], leaves["b"], 0.5)
    y = function(**call, **case.rule, gate_up_lora=update, **options)
    grads = torch.autograd.grad(y, list(leaves.values()), inputs["dy"])
    return {"y": y.detach(), **dict(zip(names, grads, strict=True))}


def _rank(rank, meeting, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2
    )
    try:
        for name, case in CASES.items():
            inputs, held = with_update(case), case.experts // 2
            for n, t in inputs.items():
                own = slice(rank * held, (rank + 1) * held)
                inputs[n] = t[tokens_of(name, case, rank) if n in OF_TOKENS else own]
            found = both_ways(ops.moe_mlp_parallel, inputs, case, experts=case.experts)
            results.put((rank, name, {n: t.numpy() for n, t in found.items()}))
        refused = []
        given = with_update(CASES["plain"])
        call = {n: given[n] for n in ("x", "ids", "gates", "gate_up", "down")}
        for experts in (5, 4):
            try:
                ops.moe_mlp_parallel(**call, experts=experts)
            except ValueError as error:
                refused.append(str(error))
        results.put((rank, "refused", refused))
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    meeting = tmp_path_factory.mktemp("ranks") / "meeting"
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=_rank, args=(rank, meeting, results)) for rank in range(2)]
    for process in ranks:
        process.start()
    found = [results.get(timeout=200) for _ in range(2 * (len(CASES) + 1))]
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    return {(rank, name): result for rank, name, result in found}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(name, two_processes):
    case = CASES[name]
    need = both_ways(ops.moe_mlp, with_update(case), case)
    parts = [{n: torch.from_numpy(t) for n, t in two_processes[r, name].items()} for r in (0, 1)]
    for n, want in need.items():
        got = torch.cat([part[n] for part in parts])
        assert got.shape == want.shape, n
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)
        if want.any():
            with pytest.raises(AssertionError):
                torch.testing.assert_close(1.01 * got, want, rtol=1e-5, atol=2e-5)
    if name.startswith("no tokens"):
        assert parts[0]["y"].shape == (0, 40) and parts[0]["gate_up"].any()


@pytest.mark.slow
def test_refusals_among_processes(two_processes):
    for rank in (0, 1):
        uneven, too_many = two_processes[rank, "refused"]
        assert "experts is 5, need a multiple of 2 processes" in uneven
        assert "gate_up has 4 experts, need 2: 4 over 2 processes" in too_many


def test_without_processes_it_is_refused():
    x, ids = torch.zeros(2, 8), torch.zeros(2, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"torch\.distributed is not initialized"):
        ops.moe_mlp_parallel(x, ids, ids.float(), x, x, experts=2)
