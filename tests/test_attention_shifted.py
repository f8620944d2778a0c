"""Shifted-sparse attention (S2-Attn), against masks written out here and against its identities."""

from itertools import pairwise

import pytest
import torch
from attention_inputs import (
    DTYPES,
    Case,
    assert_accurate,
    attend,
    bitwise,
    dtype_name,
    gradients,
    int32,
    make_inputs,
    prepared,
    visible_pairs,
)
from attention_masks import (
    packed_ends,
    pair_mask,
    read_backward_mask,
    read_mask,
    shifted_tables,
)

import tilewright
from tilewright import ShiftedSegments

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)

LENGTHS = {  # (length, group size)
    "four-groups": (64, 16),
    "not-a-multiple": (75, 32),
    "rest-within-half-a-group": (134, 64),  # 4274 with 2048, scaled down
    "shorter-than-half-a-group": (8, 1024),
    "between-half-and-a-whole-group": (50, 64),
    "exactly-one-group": (48, 48),
    "odd-group": (61, 15),
    "groups-of-two": (33, 2),
    "groups-of-one": (20, 1),
    "one-token": (1, 4),
    "tiles-straddle-boundaries": (200, 100),
    "group-of-a-tile": (192, 64),
}
WRAPPED = {
    "four-groups": (64, 16),
    "two-groups": (128, 64),
    "one-group": (48, 48),
    "of-two": (8, 2),
}


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS)
def test_the_mask(impl, length, is_causal):
    n, group = length
    options = {"is_causal": is_causal, "segments": ShiftedSegments(group)}
    for heads, kv_heads in ((2, 1), (3, 3), (5, 1)):
        wanted = pair_mask(heads, [(n, n)], **options)
        read = read_mask(impl, torch.float32, n, n, heads, kv_heads, batch=1, **options)
        assert torch.equal(read[0], wanted), (heads, kv_heads)
    wanted = pair_mask(3, [(n, n)], **options)
    assert torch.equal(
        read_backward_mask(impl, torch.float32, n, n, 3, batch=1, **options)[0], wanted
    )


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("length", WRAPPED.values(), ids=WRAPPED)
def test_the_mask_with_wraparound(impl, length, is_causal):
    n, group = length
    options = {"is_causal": is_causal, "segments": ShiftedSegments(group, wraparound=True)}
    wanted = pair_mask(4, [(n, n)], **options)
    assert torch.equal(read_mask(impl, torch.float32, n, n, 4, 2, batch=1, **options)[0], wanted)
    assert torch.equal(
        read_backward_mask(impl, torch.float32, n, n, 4, batch=1, **options)[0], wanted
    )
    without = pair_mask(4, [(n, n)], is_causal=is_causal, segments=ShiftedSegments(group))
    differ = (wanted != without).any(-1).any(0).nonzero().flatten()
    at_the_wrap = set(range(group // 2))
    if not is_causal:
        at_the_wrap |= set(range(n - group // 2, n))
    assert set(differ.tolist()) <= at_the_wrap, "the two definitions differ at the wrap alone"


@pytest.mark.parametrize("first", [0, 1, 3, 4])
def test_first_shifted_head(impl, first):
    """Under tensor parallelism a rank may hold plain heads only, or shifted ones only."""
    options = {"is_causal": True, "segments": ShiftedSegments(16, first_shifted_head=first)}
    wanted = pair_mask(4, [(50, 50)], **options)
    assert torch.equal(read_mask(impl, torch.float32, 50, 50, 4, 2, batch=1, **options)[0], wanted)


@pytest.mark.parametrize("window", [(3, 0), (20, None), (9, 9)], ids=str)
def test_segments_within_a_window(impl, window):
    options = {"window": window, "segments": ShiftedSegments(24)}
    wanted = pair_mask(2, [(70, 70)], **options)
    assert torch.equal(read_mask(impl, torch.float32, 70, 70, batch=1, **options)[0], wanted)
    backward = read_backward_mask(impl, torch.float32, 70, 70, batch=1, **options)
    assert torch.equal(backward[0], wanted)


@pytest.mark.parametrize("wraparound", [False, True], ids=["", "wraparound"])
def test_documents_have_grids_of_their_own(impl, wraparound):
    documents = [(n, n) for n in ((16, 32, 0, 64, 16) if wraparound else (5, 33, 0, 64, 1, 17))]
    n = sum(lq for lq, _ in documents)
    options = {"is_causal": True, "segments": ShiftedSegments(16, wraparound)}
    wanted = pair_mask(2, documents, **options)
    options |= packed_ends(documents)
    assert torch.equal(read_mask(impl, torch.float32, n, n, **options), wanted)
    assert torch.equal(read_backward_mask(impl, torch.float32, n, n, **options), wanted)


@pytest.mark.parametrize("side", ["right", "left", "both"])
def test_padded_rows_count_from_their_first_live_key(impl, side):
    """B > 1 with unequal lengths: each row has the grid of its own true length."""
    lengths = (70, 37, 8)
    starts = {"right": (0, 0, 0), "left": (0, 33, 62), "both": (0, 11, 40)}[side]
    key_mask = torch.zeros(3, 70, dtype=torch.bool)
    wanted = torch.zeros(3, 2, 70, 70, dtype=torch.bool)
    options = {"is_causal": True, "segments": ShiftedSegments(16)}
    for row, (n, start) in enumerate(zip(lengths, starts, strict=True)):
        key_mask[row, start : start + n] = True
        alone = pair_mask(2, [(n, n)], **options)
        wanted[row, :, start : start + n, start : start + n] = alone
    options |= {"key_mask": key_mask, "batch": 3}
    live = key_mask[:, None, :, None]  # padded queries may see anything: nobody reads them
    assert torch.equal(read_mask(impl, torch.float32, 70, 70, **options) & live, wanted)
    backward = read_backward_mask(impl, torch.float32, 70, 70, **options)
    assert torch.equal(backward & live, wanted)


def test_fewer_queries_than_keys(impl):
    """The queries stand at the last keys: their groups are those of the whole document."""
    options = {"is_causal": True, "segments": ShiftedSegments(16)}
    whole = pair_mask(2, [(60, 60)], **options)
    read = read_mask(impl, torch.float32, 21, 60, batch=1, **options)
    assert torch.equal(read[0], whole[:, 39:])


@by_dtype
@pytest.mark.parametrize("heads", [(4, 1), (6, 3), (4, 2), (7, 7)], ids=str)
@pytest.mark.parametrize("wraparound", [False, True], ids=["", "wraparound"])
def test_errs_at_most_twice_stock_torch(impl, heads, wraparound, dtype):
    segments = ShiftedSegments(64, wraparound)
    n = 192 if wraparound else 211
    case = Case(n, n, *heads, head_dim=40, is_causal=True, segments=segments, batch=2)
    inputs = prepared(case, dtype)
    ours = gradients(impl, inputs.q, inputs.k, inputs.v, inputs.dout, **inputs.options)
    assert_accurate(ours, inputs, ("out", "lse", "dq", "dk", "dv"))


@by_dtype
@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS)
def test_every_length_errs_at_most_twice_stock_torch(impl, length, dtype):
    n, group = length
    case = Case(n, n, 4, 2, head_dim=64, is_causal=True, segments=ShiftedSegments(group))
    inputs = prepared(case, dtype)
    ours = gradients(impl, inputs.q, inputs.k, inputs.v, inputs.dout, **inputs.options)
    assert_accurate(ours, inputs, ("out", "lse", "dq", "dk", "dv"))


@by_dtype
@pytest.mark.parametrize("live", [((0, 90), (0, 37)), ((0, 90), (53, 90))], ids=["right", "left"])
def test_unequal_lengths_equal_single_rows(impl, live, dtype):
    """Two rows of 90 and 37 tokens are the two runs with one row each."""
    case = Case(
        90, 90, 4, 1, head_dim=32, batch=2, live=live, is_causal=True, segments=ShiftedSegments(32)
    )
    q, k, v, dout, options = make_inputs(case, dtype)
    rows = torch.stack([torch.arange(90).ge(a) & torch.arange(90).lt(b) for a, b in live])
    dout = dout.masked_fill(~rows[:, :, None, None], 0.0)  # nobody reads padded queries
    both = gradients(impl, q, k, v, dout, **options)
    inputs = prepared(case, dtype)
    for row, (start, end) in enumerate(live):
        part = slice(start, end)
        alone = gradients(
            impl, *(t[row : row + 1, part] for t in (q, k, v, dout)), is_causal=True,
            segments=ShiftedSegments(32),
        )  # fmt: skip
        for name in ("out", "dq", "dk", "dv"):
            ours, stock = getattr(both, name)[row, part], getattr(alone, name)[0]
            scale = getattr(inputs.truth, name).abs().max()
            difference = (ours.double() - stock.double()).abs().max()
            assert difference <= 4 * torch.finfo(dtype).eps * scale, (name, row)


def _two_tables(q, k, v, group):
    """S2-Attn by its identity: plain and shifted heads are two packed calls (float64)."""
    n, heads = q.shape[1:3]
    kv = torch.arange(heads) // (heads // k.shape[2])
    halves = []
    for table, part in zip(
        shifted_tables(n, group), (slice(0, (heads + 1) // 2), slice((heads + 1) // 2, None)),
        strict=True,
    ):  # fmt: skip
        halves.append(
            tilewright.flash_attention(
                q[0, :, part],
                k[0][:, kv[part]],
                v[0][:, kv[part]],
                cu_seqlens=int32(table),
                is_causal=True,
                impl="reference",
            )
        )
    return torch.cat(halves, dim=1)[None]


@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("heads", [(2, 1), (5, 5), (6, 3)], ids=str)
def test_equals_two_packed_segment_tables(heads, length):
    n, group = length
    q, k, v, _, _ = make_inputs(Case(n, n, *heads, head_dim=8), torch.float64)
    shifted = tilewright.flash_attention(
        q, k, v, is_causal=True, segments=ShiftedSegments(group), impl="reference"
    )
    assert torch.allclose(shifted, _two_tables(q, k, v, group), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("group", [16, 32, 128], ids="G{}".format)
def test_visited_pairs_are_counted_by_segments(impl, group):
    """sum s (s + 1) / 2 over the segments of both tables; equal scores make lse count keys."""
    n, heads = 128, 4
    q = torch.zeros(1, n, heads, 8, device=impl.device)
    _, lse = attend(impl, q, q, q, is_causal=True, segments=ShiftedSegments(group), return_lse=True)
    pairs = sum(
        heads // 2 * s * (s + 1) // 2
        for table in shifted_tables(n, group)
        for s in torch.tensor(table).diff().tolist()
    )
    assert round(lse.double().exp().sum().item()) == pairs
    if group == 32:
        dense = heads * n * (n + 1) // 2
        assert abs(pairs / dense - 0.234) < 0.01, "a quarter of the length visits 23.4 % of pairs"


@pytest.mark.parametrize("group", [150, 151, 4096], ids="G{}".format)
def test_a_group_of_twice_the_length_is_dense_causal(impl, group):
    q, k, v, dout, _ = make_inputs(Case(75, 75, 4, 2, head_dim=32), torch.float32)
    dense = gradients(impl, q, k, v, dout, is_causal=True)
    wide = gradients(impl, q, k, v, dout, is_causal=True, segments=ShiftedSegments(group))
    assert bitwise(dense, wide)


@by_dtype
@pytest.mark.parametrize("heads", [(4, 2), (3, 1)], ids=str)
def test_the_future_does_not_leak(impl, heads, dtype):
    """Perturb token j of k and v: no output before j moves, not even at the first tokens."""
    n, group = 96, 32
    q, k, v, dout, _ = make_inputs(Case(n, n, *heads, head_dim=32), dtype)
    segments = ShiftedSegments(group)
    before = gradients(impl, q, k, v, dout, is_causal=True, segments=segments)
    for j in (1, 15, 16, 17, 31, 32, 63, 80, 95):
        k2, v2 = k.clone(), v.clone()
        k2[:, j] += 1.0
        v2[:, j] -= 2.0
        after = gradients(impl, q, k2, v2, dout, is_causal=True, segments=segments)
        assert bitwise(after.out[:, :j], before.out[:, :j]), j
        assert bitwise(after.lse[:, :, :j], before.lse[:, :, :j]), j
        assert bitwise(after.dq[:, :j], before.dq[:, :j]), j
        assert not bitwise(after.out[:, j], before.out[:, j]), "the token itself must move"


def test_wraparound_does_leak(impl):
    """The paper's pseudo-code lets the first G / 2 tokens see the last ones: shown, not hidden."""
    q, k, v, dout, _ = make_inputs(Case(96, 96, 4, 2, head_dim=32), torch.float32)
    segments = ShiftedSegments(32, wraparound=True)
    before = gradients(impl, q, k, v, dout, is_causal=True, segments=segments)
    v[:, 90] += 1.0
    after = gradients(impl, q, k, v, dout, is_causal=True, segments=segments)
    moved = (before.out != after.out).any(-1)[0]  # (Lq, H)
    assert moved[:16, 2:].all() and not moved[:, :2][:90].any() and not moved[16:80, 2:].any()


def test_a_gradient_reaches_exactly_the_visible_keys(impl):
    """d out_i / d v_j is 0 for every j > i, tokens of the first half group included."""
    segments = ShiftedSegments(16)
    mask = read_backward_mask(
        impl, torch.float32, 64, 64, 2, batch=1, is_causal=True, segments=segments
    )[0]
    assert not mask.triu(1).any()
    assert torch.equal(mask, pair_mask(2, [(64, 64)], is_causal=True, segments=segments))


def test_two_layers_reach_twelve_tokens_back(impl):
    """L = 32, G = 8: the last token sees 8 positions, or 12 through a layer in between."""
    torch.manual_seed(3)
    x = torch.randn(1, 32, 2, 8, device=impl.device, requires_grad=True)
    mix = torch.randn(16, 16, device=impl.device) / 4  # heads must mix between the layers

    def reach(segments):
        hidden = x
        for _ in range(2):
            hidden = attend(impl, hidden, hidden, hidden, is_causal=True, segments=segments)
            hidden = (hidden.flatten(2) @ mix).view_as(hidden)
        (gradient,) = torch.autograd.grad(hidden[:, -1].sum(), x)
        return gradient.abs().sum((0, 2, 3)).nonzero().flatten().tolist()

    assert reach(ShiftedSegments(8)) == [*range(20, 32)]
    assert reach(ShiftedSegments(8, first_shifted_head=2)) == [*range(24, 32)]


@by_dtype
def test_other_documents_do_not_matter(impl, dtype):
    """Permuting packed documents, or adding others, leaves each one's results bitwise the same."""
    lengths = (40, 1, 75, 33)
    case = Case(documents=tuple((n, n) for n in lengths), heads=4, kv_heads=1, head_dim=40)
    q, k, v, dout, options = make_inputs(case, dtype)
    ends = options["cu_seqlens"].tolist()
    options = {"is_causal": True, "segments": ShiftedSegments(24)}

    def run(order):
        parts = [slice(ends[n], ends[n + 1]) for n in order]
        cu = int32([0, *torch.tensor([p.stop - p.start for p in parts]).cumsum(0).tolist()])
        mixed = (torch.cat([t[p] for p in parts]) for t in (q, k, v, dout))
        results = gradients(impl, *mixed, cu_seqlens=cu, **options)
        return {
            n: [getattr(results, name)[cu[at] : cu[at + 1]] for name in ("out", "dq", "dk", "dv")]
            for at, n in enumerate(order)
        }

    first = run([0, 1, 2, 3])
    for order in ([3, 2, 1, 0], [2, 0], [2], [1, 3, 0, 2]):
        for n, results in run(order).items():
            assert all(bitwise(a, b) for a, b in zip(results, first[n], strict=True)), (order, n)


def test_the_length_and_group_that_broke_public_code(kernel_once):
    """4274 tokens with groups of 2048, forward; each segment against a dense causal call."""
    n, group = 4274, 2048
    q, k, v, _, _ = make_inputs(Case(n, n, 2, 1, head_dim=16), torch.float32)
    q, k, v = (t.to(kernel_once.device) for t in (q, k, v))
    out = attend(kernel_once, q, k, v, is_causal=True, segments=ShiftedSegments(group))
    for head, table in enumerate(shifted_tables(n, group)):
        for start, end in pairwise(table):
            part = slice(start, end)
            alone = attend(kernel_once, q[:, part, head:][:, :, :1], k[:, part], v[:, part],
                           is_causal=True)  # fmt: skip
            difference = (out[:, part, head] - alone[:, :, 0]).abs().max()
            assert difference <= 8 * torch.finfo(torch.float32).eps * v.abs().max()


def test_the_reference_agrees_with_the_masks_written_here():
    """The truth itself, over more heads than the read-outs take."""
    for n, group in LENGTHS.values():
        q, k, v, _, _ = make_inputs(Case(n, n, 7, 7, head_dim=1), torch.float32)
        options = {"is_causal": True, "segments": ShiftedSegments(group)}
        assert torch.equal(visible_pairs(q, k, v, **options)[0], pair_mask(7, [(n, n)], **options))
