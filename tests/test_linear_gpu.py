"""What only a GPU can show of the linear room: whole tiles, bfloat16, races, graphs, big offsets.

The interpreter runs the same kernels in shapes that a CPU can follow; these have several of the
GPU's tiles on every axis.
"""

import pytest
import torch
from linear_cases import SEED, Case, both_ways, call, make_inputs, packed_weight, stock, truth_of
from yardstick import assert_errs_at_most_twice_stock

from tilewright import ops
from tilewright.ops.common.packed import FORMATS, PackedWeight, decode
from tilewright.ops.linear import reference

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t).removeprefix("torch."))
FULL = {"has_bias": True, "has_out_scale": True}


def on_gpu(case, dtype):
    """The tensors of a call and dy on the GPU."""
    tensors, dy = make_inputs(case, dtype)
    return {n: t.to("cuda") for n, t in tensors.items()}, dy.cuda()


def bitwise(a, b) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


CASES = {
    "dense": Case(300, 520, 390, 16, **FULL),
    "dense-nothing-divides": Case(257, 515, 389, 5, has_bias=True),
    "dense-float32-adapters": Case(200, 512, 512, 16, adapter=torch.float32, dropout_p=0.1),
    "dense-one-row": Case(1, 2048, 1030, 16, **FULL),
    "dense-rank-100": Case(200, 300, 200, 100, activation="relu", **FULL),
    "adapters": Case(300, 512, 390, 16, adapters=5, has_bias=True),
    "adapters-one-row": Case(2, 2048, 390, 16, format="nf4", group=64, adapters=3),
    "nf4-nested": Case(300, 1024, 390, 16, format="nf4", group=64, scales="nested", **FULL),
    "nf4-dropout": Case(300, 1024, 390, 16, format="nf4", group=64, dropout_p=0.2),
    "uint4-offsets": Case(300, 1024, 390, 16, format="uint4", group=128, has_offsets=True),
    "uint4-groups-of-8": Case(70, 520, 390, format="uint4", group=8, has_offsets=True),
    "int4-input-order": Case(300, 1024, 390, 16, format="int4", group=32, has_order=True,
                             scales=torch.float16, dropout_p=0.1),
    "fp8-rows": Case(300, 1030, 390, 16, format="fp8", has_bias=True),
    "int8-bfloat16-scales": Case(300, 1024, 390, format="int8", group=64, scales=torch.bfloat16),
}  # fmt: skip
CASES |= {
    f"{format}-{T}-rows": Case(
        T, 2048, 390, 8, format=format, group=64, scales=torch.float16, **FULL
    )
    for format in FORMATS
    for T in (1, 16, 30, 64, 200)
}
CASES |= {
    f"{format}-{T}-rows-int8": Case(T, 1024, 390, 8, format=format, group=group, has_bias=True,
                                    int8_activations=True, has_offsets=format == "uint4")
    for format, group in (("int4", 64), ("uint4", 32), ("nf4", 128), ("int8", 0))
    for T in (3, 200)
}  # fmt: skip


@by_dtype
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_errs_at_most_twice_stock_torch(case, dtype):
    """And an error of 1 % is seen."""
    tensors, dy = on_gpu(case, dtype)
    ours = both_ways(call, case, tensors, dy, "triton_gpu")
    theirs = both_ways(stock, case, tensors, dy)
    truth = truth_of(case, tensors, dy)
    for name in truth:
        results = [r[name] for r in (ours, theirs, truth)]
        assert_errs_at_most_twice_stock(name, *results)
        with pytest.raises(AssertionError):
            assert_errs_at_most_twice_stock(name, 1.01 * results[0], *results[1:])


@pytest.mark.parametrize("format", FORMATS)
def test_unit_vectors_read_the_weight_bit_for_bit(format):
    """Forward and backward: every element of many tiles, decoded as `decode` does in float32."""
    case = Case(1, 584, 408, format=format, group=64, has_offsets=True, has_order=True)
    weight = packed_weight(case).to("cuda")
    wanted = decode(weight)
    y = ops.fused_linear(torch.eye(584, device="cuda"), weight, impl="triton_gpu")
    x = torch.zeros(408, 584, device="cuda").requires_grad_()
    upstream = torch.eye(408, device="cuda")
    (dx,) = torch.autograd.grad(ops.fused_linear(x, weight, impl="triton_gpu"), x, upstream)
    # a fused multiply-add of scale and offset rounds once where `decode` rounds twice
    for got in (y.T, dx):
        torch.testing.assert_close(got, wanted, rtol=2e-7, atol=2e-7 * wanted.abs().max().item())


@pytest.mark.parametrize("order", [False, True], ids=["in-order", "input-order"])
def test_the_dropped_elements_are_philox_words(order):
    T, I, p = 150, 200, 0.45
    kept = (reference.philox_uniform(SEED, torch.arange(T), I) >= p).cuda()
    weight = packed_weight(Case(T, I, I, format="int4", group=8, has_order=order)).to("cuda")
    weight.scales.zero_()
    options = dict(dropout_p=p, dropout_seed=torch.tensor([SEED]), impl="triton_gpu")
    x = torch.ones(T, I, device="cuda").requires_grad_()
    down = torch.eye(I, device="cuda").requires_grad_()
    y = ops.fused_linear(x, weight, down=down, up=torch.eye(I, device="cuda"), **options)
    assert torch.equal(y > 0, kept)
    dx, ddown = torch.autograd.grad(y, (x, down), torch.eye(T, I, device="cuda"))
    assert torch.equal(dx.diagonal() > 0, kept.diagonal())
    assert torch.equal(ddown[:T] > 0, kept)


BUSY = {
    "dense": Case(2000, 2048, 2048, 16, dropout_p=0.1, **FULL),
    "nf4": Case(2000, 2048, 2048, 16, format="nf4", group=64, scales="nested", **FULL),
    "nf4-one-row": Case(1, 4096, 4096, 16, format="nf4", group=64, **FULL),
    "int8-activations": Case(999, 2048, 2048, format="int4", group=64, int8_activations=True),
}


@pytest.mark.parametrize("case", BUSY.values(), ids=BUSY)
def test_fifty_runs_of_a_busy_gpu_give_the_same_bits(case):
    tensors, dy = on_gpu(case, torch.bfloat16)
    first = both_ways(call, case, tensors, dy, "triton_gpu")
    assert all(t.isfinite().all() for t in first.values())
    # compared on the GPU: a copy after each run would leave it idle in between
    differences = torch.zeros((), dtype=torch.long, device="cuda")
    for _ in range(49):
        again = both_ways(call, case, tensors, dy, "triton_gpu")
        for name in first:
            differences += (first[name] != again[name]).sum()
    assert differences.item() == 0


@pytest.mark.parametrize("case", BUSY.values(), ids=BUSY)
def test_nothing_waits_for_the_gpu(case):
    tensors, dy = on_gpu(case, torch.bfloat16)
    both_ways(call, case, tensors, dy, "triton_gpu")  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        both_ways(call, case, tensors, dy, "triton_gpu")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_graph_can_be_captured_and_replayed():
    """A decoding step as a CUDA graph: the same bits for new contents."""
    case = BUSY["nf4-one-row"]
    tensors, _ = on_gpu(case, torch.bfloat16)

    def run():
        with torch.no_grad():
            return call(case, tensors, "triton_gpu")

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    tensors["x"].copy_(torch.randn_like(tensors["x"]))
    graph.replay()
    assert bitwise(captured, run())


@pytest.mark.parametrize("format", ["dense", "nf4"])
def test_a_compiled_graph_gives_the_same_bits(clean_memory, format):
    case = Case(200, 512, 512, 16, format=format, group=64 * (format != "dense"), has_bias=True)
    tensors, dy = on_gpu(case, torch.bfloat16)
    trained = [tensors[n].requires_grad_() for n in ("x", "bias", "down", "up")]

    def layer(x, bias, down, up):
        return ops.lora_linear(x, tensors["weight"], down, up, scale=0.5, bias=bias,
                               impl="triton_gpu")  # fmt: skip

    results = []
    for run in (layer, torch.compile(layer, fullgraph=True)):
        y = run(*trained)
        results.append((y, *torch.autograd.grad(y, trained, dy)))
    assert all(bitwise(a, b) for a, b in zip(*results, strict=True))


def test_offsets_past_two_to_the_31():
    """2**31 elements of x, y and dy and more before the last rows: they equal themselves alone."""
    T, I, O, last = 528_000, 4104, 4104, 1000
    assert (T - last) * I > 2**31
    x = torch.randn(T, I, device="cuda", dtype=torch.bfloat16)
    weight = packed_weight(Case(1, I, O, format="int4", group=8)).to("cuda")
    down = torch.randn(8, I, device="cuda", dtype=torch.bfloat16) / 64
    up = torch.randn(O, 8, device="cuda", dtype=torch.bfloat16)

    def rows(x):
        x = x.detach().requires_grad_()
        y = ops.fused_linear(x, weight, down=down, up=up, impl="triton_gpu")
        (dx,) = torch.autograd.grad(y, x, y.detach())
        return y[-last:].detach().clone(), dx[-last:].clone()

    # as many rows as to take the same tiles
    for whole, alone in zip(rows(x), rows(x[-8 * last :]), strict=True):
        torch.testing.assert_close(whole, alone, rtol=2**-7, atol=0.05)
        assert alone.abs().max() > 0


def test_a_weight_of_more_than_two_to_the_31_elements():
    """The last rows of a wide head: codes, scales and dx offsets need 64 bits."""
    I, O = 8192, 2**18 + 2**12 + 40
    assert O * I > 2**31
    case = Case(1, I, 4096, format="int4", group=64)
    part = packed_weight(case)
    repeats = -(-O // 4096)
    blocks = -(-O // 16)
    weight = PackedWeight(
        "int4", O, I, 64, part.codes.cuda().repeat(repeats, 1, 1)[:blocks].contiguous(),
        part.scales.cuda().repeat(repeats, 1, 1)[:blocks].contiguous(),
    )  # fmt: skip
    x = torch.randn(3, I, device="cuda", dtype=torch.bfloat16)
    y = ops.fused_linear(x, weight, impl="triton_gpu")
    assert bitwise(y[:, :4096], y[:, 4096 * 50 : 4096 * 51])
    assert bitwise(y[:, 4096 * (repeats - 1) :], y[:, : O - 4096 * (repeats - 1)])
    assert y.isfinite().all() and y.abs().max() > 0
