"""InfoNCE against all similarities at once, cached gradients, two ranks against one process."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from loss_cases import normal
from memory_probes import allocations
from torch import nn

import tilewright as tw
from tilewright.ops.loss import blocks

TARGETS = torch.tensor([3, 0, 0, 4, 1])


def full(queries, documents, targets, temperature=0.05):
    """Every similarity, in float64."""
    q, d = (F.normalize(t.double(), dim=-1) for t in (queries, documents))
    return F.cross_entropy(q @ d.T / temperature, targets)


@pytest.mark.parametrize("n_block", [1, 2, 64])
def test_blocks_give_the_loss_of_all_similarities(n_block, monkeypatch):
    monkeypatch.setattr(blocks, "block_tokens", lambda *_: n_block)
    queries, documents = normal(5, 8).requires_grad_(), normal(11, 8, seed=1).requires_grad_()
    for targets in (TARGETS, None):
        want = full(queries, documents, torch.arange(5) if targets is None else targets)
        got = tw.info_nce(queries, documents, targets)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
        grads, wanted = (torch.autograd.grad(y, (queries, documents)) for y in (got, want))
        for a, b in zip(grads, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_other_forms():
    queries, documents = normal(5, 8), normal(11, 8, seed=1)
    both = tw.info_nce(queries, documents, symmetric=True, temperature=0.1)
    there = full(queries, documents, torch.arange(5), 0.1)
    back = full(documents[:5], queries, torch.arange(5), 0.1)
    torch.testing.assert_close(both.double(), (there + back) / 2, rtol=1e-5, atol=1e-6)
    raw = tw.info_nce(queries, documents, normalize=False, temperature=2.0, reduction="none")
    want = F.cross_entropy(queries @ documents.T / 2, torch.arange(5), reduction="none")
    torch.testing.assert_close(raw, want, rtol=1e-5, atol=1e-6)


def test_memory_is_that_of_a_block(monkeypatch):
    monkeypatch.setattr(blocks, "block_tokens", lambda *_: 16)
    queries, documents = normal(600, 8).requires_grad_(), normal(600, 8, seed=1).requires_grad_()
    held = max(allocations(lambda: tw.info_nce(queries, documents).backward()))
    assert held <= 16 * 600 * 4 < 600 * 600 * 4 / 20


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 8))

    def forward(self, x):
        return self.layers(x)


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("chunk", [1, 2, 12])
def test_cached_gradients_are_those_of_the_whole_batch(chunk):
    """Dropout included: what is drawn for a chunk is drawn again."""
    torch.manual_seed(0)
    model = Encoder().train()
    queries, documents = normal(12, 6).split(chunk), normal(12, 6, seed=1).split(chunk)
    state = torch.get_rng_state()
    embeddings = [torch.cat([model(c) for c in chunks]) for chunks in (queries, documents)]
    after = torch.rand(3)
    want = tw.info_nce(*embeddings)
    want.backward()
    wanted = gradients(model)
    model.zero_grad()
    torch.set_rng_state(state)
    got = tw.cached_step(tw.info_nce, (model, queries), (model, documents))
    assert torch.equal(torch.rand(3), after)  # the random numbers go on as they would have
    torch.testing.assert_close(got, want.detach())
    torch.testing.assert_close(gradients(model), wanted, rtol=1e-5, atol=1e-6)


def test_cached_gradients_hold_the_graph_of_one_chunk():
    model, held, most = Encoder(), [], []

    def encode(chunk):
        y = model(chunk)
        if y.requires_grad:
            y.register_hook(lambda g: held.clear())
            held.append(1)
            most.append(len(held))
        return y

    rows = normal(12, 6).split(3)
    tw.cached_step(lambda e: tw.info_nce(e, e.flip(0)), (encode, rows))
    assert most == [1] * 4


# --- two ranks ---


def rows_of(rank):
    """Unequal numbers of queries."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 9, 6, generator=generator)
    return x[:, :4] if rank == 0 else x[:, 4:]


def rank_loss(model, rank, n_all):
    """This rank's share of the mean over the queries of all ranks."""
    queries, documents = (model(x) for x in rows_of(rank))
    documents = tw.gather_across_ranks(documents, own_first=True)
    return tw.info_nce(queries, documents, reduction="sum") / n_all


def work(rank, meeting, results):
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Encoder().eval()
    loss = rank_loss(model, rank, 9)
    loss.backward()
    # the sum over ranks, as rank losses are shares of one mean
    for t in [loss.detach(), *(p.grad for p in model.parameters())]:
        dist.all_reduce(t)
    # token losses of unequal shares, with one denominator
    h, weight, labels = token_inputs(rank)
    n_valid = (labels != -100).sum()
    dist.all_reduce(n_valid)
    tokens = tw.linear_cross_entropy(h, weight, labels, denominator=n_valid)
    tokens.backward()
    dist.all_reduce(weight.grad)
    total = tokens.detach().clone()
    dist.all_reduce(total)
    if rank == 0:
        results.put([t.numpy() for t in (*gradients(model), weight.grad, total)])
    dist.barrier()
    dist.destroy_process_group()


def token_inputs(rank=None):
    h, weight, labels = normal(20, 8), normal(30, 8, seed=1).requires_grad_(), torch.arange(20)
    labels[3:8] = -100
    part = slice(None) if rank is None else slice(0, 8) if rank == 0 else slice(8, 20)
    return h[part], weight, labels[part]


def test_two_ranks_equal_one_process_on_the_union(clean_memory, tmp_path):
    """Embeddings gathered over ranks, and token losses with unequal numbers of labels."""
    meeting = tmp_path / "meeting"
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    ranks = [context.Process(target=work, args=(rank, meeting, results)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0
    got = [torch.from_numpy(a) for a in results.get()]
    torch.manual_seed(0)
    model = Encoder().eval()
    queries, documents = (model(torch.cat([rows_of(0), rows_of(1)], 1)[i]) for i in range(2))
    tw.info_nce(queries, documents).backward()
    h, weight, labels = token_inputs()
    tokens = tw.linear_cross_entropy(h, weight, labels)
    tokens.backward()
    want = [*gradients(model), weight.grad, tokens.detach()]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_gathering_without_ranks_is_nothing():
    t = normal(3, 4)
    assert tw.gather_across_ranks(t) is t


Q, D = normal(5, 8), normal(11, 8, seed=1)
REFUSED = {
    "info_nce: documents has shape (11, 7), need N = 8 as in queries": lambda: tw.info_nce(
        Q, D[:, :7]
    ),
    "info_nce: documents has shape (3, 8), need at least 5 rows": lambda: tw.info_nce(Q, D[:3]),
    "info_nce: temperature is 0, need": lambda: tw.info_nce(Q, D, temperature=0),
    "info_nce: targets is torch.int64 of shape (4,), need": lambda: tw.info_nce(Q, D, TARGETS[:4]),
    "info_nce: symmetric goes with": lambda: tw.info_nce(Q, D, TARGETS, symmetric=True),
    "gather_across_ranks: t has shape ()": lambda: tw.gather_across_ranks(torch.tensor(1.0)),
    "cached_step: needs at least one tower": lambda: tw.cached_step(tw.info_nce),
    "and chunks for each": lambda: tw.cached_step(tw.info_nce, (nn.Identity(), [])),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message):
    with pytest.raises(ValueError) as error:
        REFUSED[message]()
    assert message in str(error.value)
