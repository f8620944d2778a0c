"""The recipes: each runs, and its loss is what its source says, on a small model."""

import math
import warnings
from dataclasses import replace
from functools import cache

import pytest
import torch

import tilewright as tw
from tilewright.bench import bench_encoder
from tilewright.bench.recipes import (
    distill,
    embedding,
    functions,
    fusion,
    many_shot,
    ranking,
    self_training,
    sentence_encoder,
    shared,
)
from tilewright.demo_shared import QUICK, llama

pytest.importorskip("tokenizers")


@cache
def text():
    return shared.read_text(QUICK)


def small_llama(seed=0):
    """Two layers with random weights, accelerated, without dropout."""
    model = llama(QUICK, text().tokenizer, seed)
    tw.accelerate(model)
    return model


def gradients(model, loss):
    """By name, of the parameters that require one."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: g for n, g in zip(named, found, strict=True) if g is not None}


def expect_finite(result):
    assert len({len(row) for row in result.table}) == 1
    assert result.sentence.endswith(".")
    assert result.figures
    assert all(isinstance(v, float) and v == v for v in result.figures.values()), result.figures


# --- text that is held out is of other packages ---


def test_no_package_is_on_both_sides():
    known, others = functions.apart(functions.documented_functions())
    assert len(known) > 1000 and len(others) > 200
    assert {f.package for f in known} & {f.package for f in others} == set()
    assert all(f.summary not in f.code for f in known[:200])


# --- many shots ---

# one row: questions of 2, 1 and 3 tokens, answers of 2, 1 and 3
IDS = torch.tensor([[5, 9, 7, 8, 3, 4, 6, 2, 9, 11, 12, 13]])
ANSWERED = torch.tensor([[0, 0, 1, 1, 0, 1, 0, 0, 0, 1, 1, 1]]).bool()
ENDS = (4, 6, 12)


@pytest.mark.parametrize("average", ["tokens", "sequences"])
def test_all_answers_are_as_many_runs_with_one(average):
    """The gradient is the weighted sum of the runs whose prompt ends with one answer."""
    model = small_llama()
    labels = shared.shifted(torch.where(ANSWERED, IDS, -100))
    shares = torch.tensor([1.0, 0.5, 2.0])
    got = gradients(
        model,
        many_shot.answer_loss(model, IDS, labels, average=average, shot_weights=shares),
    )
    want = {n: torch.zeros_like(g) for n, g in got.items()}
    n_answered = int(ANSWERED.sum())
    for share, end in zip(shares, ENDS, strict=True):
        labels = shared.shifted(torch.where(ANSWERED, IDS, -100)[:, :end])
        run = many_shot.answer_loss(model, IDS[:, :end], labels, only_last=True)
        n_last = int((many_shot.shots_of(labels) == many_shot.shots_of(labels).max()).sum())
        part = share * (n_last / n_answered if average == "tokens" else 1 / len(ENDS))
        for name, g in gradients(model, run).items():
            want[name] += part * g
    for name in want:
        scale = want[name].abs().max()
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=float(1e-5 * scale))


def test_questions_have_no_loss_and_do_not_meet_the_head(monkeypatch):
    """The rows that meet the head are the tokens of answers."""
    model = small_llama()
    h = shared.hidden(model, IDS).detach().requires_grad_()
    labels = shared.shifted(torch.where(ANSWERED, IDS, -100))
    monkeypatch.setattr(shared, "hidden", lambda *unused: h)
    many_shot.answer_loss(model, IDS, labels).backward()
    met = h.grad.abs().sum(-1) > 0
    assert torch.equal(met, labels != -100) and int(met.sum()) == int(ANSWERED.sum())


def test_prompts_of_many_shots_are_of_one_module_each():
    result = many_shot.run(quick=True)
    expect_finite(result)
    for arm in ("last answer alone", "all answers"):
        assert result.figures[f"{arm}, last"] < result.figures["before, last"]


# --- embedding ---

ROWS = [[5, 9, 7, 8, 3], [4, 6, 2], [9, 11, 12, 13]]


def test_both_ways_the_first_token_sees_the_last():
    model = small_llama().eval()
    other = torch.tensor([[*ROWS[0][:-1], 20]])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")  # the stock path would warn
        for is_on in (True, False):
            with embedding.bidirectional(model, is_on):
                before = shared.hidden(model, torch.tensor([ROWS[0]]))[0, 0]
                after = shared.hidden(model, other)[0, 0]
            assert torch.equal(before, after) != is_on


def test_causal_again_gives_the_logits_of_before():
    model = small_llama().eval()
    ids = torch.tensor([ROWS[0]])
    with torch.no_grad():
        before = model(ids).logits
        with embedding.bidirectional(model):
            between = model(ids).logits
        assert torch.equal(model(ids).logits, before)
        assert (between - before).abs().max() > 0.01
        tw.restore(model)
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("is_bidirectional", [True, False])
def test_filling_never_reaches_an_embedding(is_bidirectional):
    model = small_llama().eval()
    with torch.no_grad():
        first, second = (embedding.encode(model, ROWS, is_bidirectional, pad) for pad in (0, 21))
        assert torch.equal(first, second)
        for row, together in zip(ROWS, first, strict=True):
            alone = embedding.encode(model, [row], is_bidirectional)[0]
            torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)


def test_chunks_give_the_gradient_of_the_whole_batch_with_dropout():
    """In chunks of 1, 2 and all; with the random numbers of each chunk, as the first pass drew."""
    codes = [[3, 4, 5], [6, 7], [8, 9, 2]]
    model = small_llama().train()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    for chunk in (1, 2, 3):
        plan = embedding.Plan(chunk=chunk)
        torch.manual_seed(3)
        loss = embedding.step(model, ROWS, codes, plan, True, False)
        got = {n: p.grad.clone() for n, p in model.named_parameters()}
        model.zero_grad()
        torch.manual_seed(3)
        starts = range(0, 3, chunk)
        q, d = (
            torch.cat([embedding.encode(model, rows[i : i + chunk], True) for i in starts])
            for rows in (ROWS, codes)
        )
        whole = tw.info_nce(q, d, temperature=plan.temperature)
        want = gradients(model, whole)
        torch.testing.assert_close(loss, whole.detach())
        for name, g in want.items():
            atol = float(1e-5 * g.abs().max())
            torch.testing.assert_close(got[name], g, rtol=1e-4, atol=atol)


def test_candidates_and_cosines_are_of_the_same_pairs():
    model = small_llama().eval()
    codes = [[3, 4, 5], [6, 7], [8, 9, 2]]
    with torch.no_grad():
        of_codes = embedding.candidate_log_probs(model, ROWS, codes, 2, 0)
        for b in range(3):
            for c in range(2):
                alone = embedding.log_probs(model, [ROWS[b]], [codes[(b + c) % 3]], 0)
                torch.testing.assert_close(of_codes[b, c], alone[0], rtol=1e-4, atol=1e-5)
        # by hand: log-softmax of the stock model's logits
        row = torch.tensor([ROWS[1] + codes[1]])
        log_p = torch.log_softmax(model(row).logits[0], -1)
        want = (log_p[2, 6] + log_p[3, 7]) / 2
        torch.testing.assert_close(of_codes[1, 0], want, rtol=1e-4, atol=1e-5)
    q, d = torch.randn(3, 4), torch.randn(3, 4)
    near = embedding.cosines(q, d, 2)
    for b in range(3):
        for c in range(2):
            want = torch.cosine_similarity(q[b], d[(b + c) % 3], dim=0)
            torch.testing.assert_close(near[b, c], want)


def test_the_embedding_recipe_runs():
    expect_finite(embedding.run(quick=True))


# --- the sentence encoder ---


def test_the_sentence_encoder_recipe_learns():
    if bench_encoder.why_not() is not None:
        pytest.skip(bench_encoder.why_not())
    plan = sentence_encoder.QUICK
    known, _ = functions.apart(functions.documented_functions())
    encoder = sentence_encoder.Encoder(plan)
    pairs = shared.drawn(known, 8, 0)

    def loss() -> float:
        encoder.model.eval()
        with torch.no_grad():
            q, d = encoder.summaries(pairs), encoder.codes(pairs)
            return float(tw.info_nce(q, d, temperature=plan.temperature))

    before = loss()
    trained = [p for n, p in encoder.model.named_parameters() if not n.startswith("pooler")]
    encoder.model.train()
    sentence_encoder.step(encoder, pairs, chunk=3)
    assert all(p.grad is not None for p in trained)
    with torch.no_grad():
        for p in trained:
            p -= 1e-3 * p.grad
    assert loss() < before


def test_retrieval_counts_ranks():
    queries, documents = torch.eye(3), torch.eye(3)[[0, 2, 1]]
    found = shared.retrieval(queries, documents + 0.1 * torch.eye(3))
    assert found["first"] == pytest.approx(100 / 3)
    assert found["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 2) / 3)


# --- fusion ---


def test_a_large_model_that_is_the_base_writes_what_the_expert_writes():
    base, expert = small_llama(0), small_llama(1)
    prompts = torch.tensor([[5, 9, 7], [4, 6, 2]])
    tokens, strengths = fusion.generate(base, expert, base, prompts, 6)
    wanted = tw.generate(expert, prompts.tolist(), max_new_tokens=6)
    assert torch.equal(strengths, torch.ones(2, 6).double())
    for row, want in zip(tokens.tolist(), wanted, strict=True):
        assert row[: len(want.tokens)] == want.tokens


def test_an_expert_that_is_the_base_leaves_the_large_model_alone():
    large, base = small_llama(0), small_llama(1)
    prompts = torch.tensor([[5, 9, 7], [4, 6, 2]])
    tokens, strengths = fusion.generate(large, base, base, prompts, 6)
    wanted = tw.generate(large, prompts.tolist(), max_new_tokens=6)
    assert torch.equal(strengths, torch.zeros(2, 6).double())
    for row, want in zip(tokens.tolist(), wanted, strict=True):
        assert row[: len(want.tokens)] == want.tokens


def test_models_of_two_vocabularies_are_refused():
    with pytest.raises(ValueError, match=r"fuse_logits: .*need V = "):
        tw.fuse_logits(torch.zeros(2, 9), torch.zeros(2, 8), torch.zeros(2, 8))


def test_the_fusion_recipe_runs():
    result = fusion.run(quick=True)
    expect_finite(result)
    assert 0 <= result.figures["strength"] <= 2


# --- several teachers ---


def targets_of(n_teachers=3, n_rows=2, length=4, top=3, classes=17):
    g = torch.Generator().manual_seed(0)
    ids = torch.rand(n_rows, length, n_teachers, classes, generator=g).argsort(-1)[..., :top]
    probs = torch.softmax(torch.randn(ids.shape, generator=g), -1)
    return distill.Targets(ids, probs, torch.rand(n_rows, n_teachers, generator=g))


def test_a_mixture_of_teachers_is_the_dense_one():
    """Loss, and the gradients of hidden states, head and gate, with the targets scattered."""
    targets, classes = targets_of(), 17
    h, weight = (torch.randn(*s).requires_grad_() for s in ((2, 4, 6), (classes, 6)))
    labels = torch.randint(classes, (2, 4))
    gate = distill.Gate(3)
    inputs = [h, weight, *gate.parameters()]
    got = distill.mixed_loss(h, weight, labels, targets, gate(targets.rewards), 0.1)
    log_p = torch.log_softmax((h @ weight.T).double(), -1)
    dense = torch.zeros(2, 4, 3, classes).scatter(3, targets.ids, targets.probs)
    mixture = (gate(targets.rewards)[:, None, :, None] * dense).sum(2)
    hard = -log_p.gather(2, labels[..., None]).mean()
    want = 0.9 * hard + 0.1 * -(mixture * log_p).sum(-1).mean()
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-7)
    grads, wanted = (torch.autograd.grad(loss, inputs) for loss in (got, want))
    for a, b in zip(grads, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_equal_teachers_make_the_gate_a_matter_of_taste():
    targets = targets_of()
    same = distill.Targets(
        targets.ids[:, :, :1].expand(-1, -1, 3, -1), targets.probs[:, :, :1].expand(-1, -1, 3, -1),
        targets.rewards,
    )  # fmt: skip
    h, weight, labels = torch.randn(2, 4, 6), torch.randn(17, 6), torch.randint(17, (2, 4))
    losses = [
        distill.mixed_loss(h, weight, labels, same, torch.tensor(shares).expand(2, 3), 0.1)
        for shares in ([1 / 3, 1 / 3, 1 / 3], [0.7, 0.2, 0.1], [0.0, 0.0, 1.0])
    ]
    torch.testing.assert_close(losses[1:], losses[:1] * 2)


def test_the_gate_selects_and_learns():
    rewards = torch.rand(5, 3)
    only = distill.Gate(3, threshold=1.0)(rewards)
    assert torch.equal(only, torch.eye(3)[only.argmax(1)])
    gate = distill.Gate(3, threshold=0.15)
    shares = gate(rewards)
    torch.testing.assert_close(shares.sum(1), torch.ones(5))
    assert ((shares == 0) | (shares > 0.15)).all()
    assert distill.imbalance(torch.full((4, 4), 0.25)) == 0
    # all on one of three: variance 2/9, mean 1/3
    torch.testing.assert_close(distill.imbalance(torch.eye(3)[[0, 0]]), torch.tensor(2.0))
    before = [p.detach().clone() for p in gate.parameters()]
    targets = targets_of()
    h, weight, labels = torch.randn(2, 4, 6), torch.randn(17, 6), torch.randint(17, (2, 4))
    loss = distill.mixed_loss(h, weight, labels, targets, gate(targets.rewards), 0.1)
    loss.backward()
    tw.AdamW(gate.parameters(), lr=1e-2).step()
    assert any(not torch.equal(a, b) for a, b in zip(before, gate.parameters(), strict=True))


def test_the_distillation_recipe_runs():
    result = distill.run(quick=True)
    expect_finite(result)
    assert sum(result.figures[f"share {e}"] for e in (1, 2, 3)) == pytest.approx(1)


# --- ranking ---


def test_a_ranking_loss_is_the_weighted_sum_over_the_number_of_labels():
    """Against all logits in float64: loss and gradients; the first place counts twice."""
    model = small_llama().eval()
    prompts, separators = torch.tensor([[5, 9, 7, 2], [9, 5, 7, 2]]), (3, 2)
    rankings = torch.tensor([[5, 3, 7, 3, 9, 2]] * 2)
    loss = ranking.ranking_loss(model, prompts, rankings, separators)
    got = gradients(model, loss)
    logits = model(torch.cat([prompts, rankings], 1)).logits.double()
    nll = -torch.log_softmax(logits[:, 3:-1], -1).gather(2, rankings[..., None])[..., 0]
    weights = torch.tensor([2.0, 1, 1 + 1 / math.log2(3), 1, 1.5, 1]).double()
    want = (weights * nll).sum() / rankings.numel()
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
    for name, g in gradients(model, want).items():
        atol = float(1e-5 * g.abs().max())
        torch.testing.assert_close(got[name], g, rtol=1e-4, atol=atol)
    plain = ranking.ranking_loss(model, prompts, rankings, separators, is_weighed=False)
    torch.testing.assert_close(plain.double(), nll.mean(), rtol=1e-5, atol=1e-6)


def test_gain_of_a_ranking():
    assert ranking.gain([7, 3, 5], [3, 5, 7]) == pytest.approx(1)
    best = 3 + 2 / math.log2(3) + 1 / 2
    assert ranking.gain([7, 3, 5], [5, 3, 7]) == pytest.approx((2 + 3 / math.log2(3) + 0.5) / best)
    # said twice, not listed, missing
    assert ranking.gain([7, 3, 5], [3, 3, 4]) == pytest.approx(3 / best)
    assert ranking.gain([7, 3, 5], []) == 0


def test_lists_and_their_rankings():
    lists = ranking.Lists(text(), [50, 40, 60, 30], 3)
    listed = lists.drawn(5, torch.Generator().manual_seed(0))
    prompts, rankings = lists.prompts(listed), lists.rankings(listed)
    for row, answer in zip(prompts.tolist(), rankings.tolist(), strict=True):
        order = [[50, 40, 60, 30].index(token) for token in answer[::2]]
        assert order == sorted(order) and sorted(answer[::2]) == sorted(row[:-1])
        assert answer[1::2] == [lists.separator, lists.separator, lists.line]


def test_the_ranking_recipe_runs():
    expect_finite(ranking.run(quick=True))


# --- self-training ---

TEXTS = [[5, 9, 7, 8], [4, 6, 2], [9, 11, 12, 13], [3, 5, 4], [8, 2, 6]]
PSEUDO = torch.tensor([[0.8, 0.2], [0.1, 0.9], [0.5, 0.5], [0.9, 0.1], [0.3, 0.7]])


def test_weights_of_pseudo_labels_are_products_of_gradients():
    torch.manual_seed(0)
    base = small_llama()
    tw.restore(base)
    student = self_training.adapted(base, width=4)
    with torch.no_grad():  # away from the start, where an adapter's two halves are alike
        for p in self_training.adapters(student):
            p.add_(0.1 * torch.randn_like(p))
    classifier = self_training.Classifier([40, 41], pad=0)
    few, labels = [[5, 9, 2], [7, 7, 3, 4]], torch.eye(2)
    before = [p.detach().clone() for p in student.parameters()]
    got = self_training.weigh(classifier, student, TEXTS, PSEUDO, few, labels, ahead=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))
    assert not got.requires_grad

    def flat(loss):
        found = torch.autograd.grad(loss, self_training.adapters(student), retain_graph=True)
        return torch.cat([g.flatten() for g in found]).double()

    g = flat(classifier.losses(student, few, labels).mean())
    each = classifier.losses(student, TEXTS, PSEUDO)
    want = torch.stack([g @ flat(one) for one in each]).clamp(min=0)
    assert (want > 0).any() and (want == 0).any()
    torch.testing.assert_close(got.double(), want / want.sum(), rtol=1e-2, atol=1e-3)
    assert float(got.sum()) == pytest.approx(1)


def test_a_flipped_label_has_no_weight_and_its_twin_has():
    torch.manual_seed(0)
    base = small_llama()
    tw.restore(base)
    student = self_training.adapted(base, width=4)
    classifier = self_training.Classifier([40, 41], pad=0)
    right, wrong = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    weights = self_training.weigh(
        classifier, student, [TEXTS[0]] * 2, torch.cat([wrong, right]), [TEXTS[0]], right, 1e-2
    )
    assert torch.equal(weights, torch.tensor([0.0, 1.0]))
    none = self_training.weigh(
        classifier, student, [TEXTS[0]], wrong, [TEXTS[0]], right, 1e-2
    )  # fmt: skip
    assert torch.equal(none, torch.zeros(1))


def test_a_session_leaves_base_and_teacher_alone():
    base = small_llama()
    tw.restore(base)
    plan = replace(self_training.QUICK, packages=("a", "b"), rows=4)
    teacher = self_training.adapted(base, plan.width)
    classifier = self_training.Classifier([40, 41], pad=0)
    before = [p.detach().clone() for model in (base, teacher) for p in model.parameters()]
    student = self_training.session(
        classifier, base, teacher, TEXTS, (TEXTS[:2], torch.eye(2)), plan, 0, is_weighed=True
    )
    after = [p for model in (base, teacher) for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.grad is None for p in after)
    frozen = {n.replace(".layer.", "."): p for n, p in student.named_parameters()
              if not p.requires_grad}  # fmt: skip
    assert len(frozen) == len(dict(base.named_parameters()))
    for name, p in base.named_parameters():
        assert torch.equal(frozen[name], p)
    # the student begins as the base with adapters of the same draw, and has moved from there
    torch.manual_seed(0)
    start = self_training.adapters(self_training.adapted(base, plan.width))
    now = self_training.adapters(student)
    assert not any(torch.equal(a, b) for a, b in zip(start, now, strict=True))


def test_the_self_training_recipe_runs():
    expect_finite(self_training.run(quick=True))
