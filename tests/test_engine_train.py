"""Fine-tuning: packing, exact accumulation, checkpoints, LoRA, and files that others can read."""

import errno
import itertools
import json
import math
import signal

import numpy as np
import pytest
import torch
import transformers as hf

import tilewright as tw
from tilewright import adapt, checkpoint, files, pretrained
from tilewright.config import TrainOptions
from tilewright.data import IGNORED, RowOrder, byte_tokenizer, cu_seqlens, encode, pack
from tilewright.progress import Silent
from tilewright.train import Interrupted, Trainer, TrainingError, learning_rate_at, mean_loss

TEXTS = [
    f"document {n}: " + "the quick brown fox jumps over the lazy dog, " * (n % 5) + "end"
    for n in range(24)
]
RUN = {"steps": 6, "context": 64, "rows": 2, "accumulate": 2, "seed": 3, "learning_rate": 3e-3}


def tiny_config(**changes):
    # a wide initial spread, so that attention matters for the loss
    return hf.LlamaConfig(
        **{
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 258,
            "max_position_embeddings": 64, "initializer_range": 0.25, "bos_token_id": None,
            "eos_token_id": 256, "pad_token_id": 257, **changes,
        }
    )  # fmt: skip


def tiny_model(**changes):
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(tiny_config(**changes))


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "tiny" / "config.json"
    path.parent.mkdir()
    tiny_config().to_json_file(path)
    return path


def same_weights(a, b):
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(m == n and torch.equal(x, y) for (m, x), (n, y) in pairs)


# packing


def test_byte_tokenizer_is_bytes_and_loads_offline(tmp_path):
    tokenizer = byte_tokenizer(64)
    text = "Grüße, 世界! \t\n x  y \x00\x7f\xad"
    assert tokenizer(text)["input_ids"] == list(text.encode())
    tokenizer.save_pretrained(tmp_path)
    loaded = hf.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert loaded(text)["input_ids"] == list(text.encode())
    assert loaded.decode(list(text.encode())) == text
    assert (loaded.eos_token_id, loaded.pad_token_id, len(loaded)) == (256, 257, 258)


def test_pack_holds_every_token_once_and_fills_the_rows():
    generator = np.random.default_rng(0)
    lengths = [*generator.integers(1, 90, 200), 64, 65, 1]  # some longer than a row
    documents, start = [], 0
    for n in lengths:
        documents.append(np.arange(start, start + n))
        start += n
    rows = pack(documents, 64, pad=-1)
    kept = rows.input_ids[rows.input_ids >= 0]
    assert sorted(kept.tolist()) == list(range(start))
    assert kept.numel() / rows.input_ids.numel() > 0.9
    assert rows.n_pieces == sum(math.ceil(n / 64) for n in lengths)
    assert rows.n_valid == start - rows.n_pieces
    has_label = rows.labels != IGNORED
    assert torch.equal(rows.labels[has_label], rows.input_ids[has_label])
    # a token has a label if and only if its left neighbour is its predecessor in the document
    follows = torch.zeros_like(has_label)
    follows[:, 1:] = (rows.input_ids[:, 1:] >= 0) & (rows.position_ids[:, 1:] != 0)
    assert torch.equal(has_label, follows)


def test_cu_seqlens_are_the_borders():
    rows = pack([[1] * 5, [2] * 3, [3] * 4], 6, pad=0)
    borders = cu_seqlens(rows.position_ids).tolist()
    assert borders[0] == 0 and borders[-1] == rows.input_ids.numel()
    pieces = [set(rows.input_ids.flatten()[a:b].tolist()) for a, b in itertools.pairwise(borders)]
    assert all(len(piece) == 1 for piece in pieces)


def test_rows_shrink_to_the_fullest():
    assert pack([[1, 2, 3], [4, 5]], 1000, pad=0).input_ids.shape == (1, 5)


def test_order_takes_every_row_once_a_pass_and_differs_between_passes():
    order = RowOrder(n_rows=10, rows=1, accumulate=5, seed=1)
    passes = [[r for b in order.micro_batches(s) for r in b] for s in range(6)]
    first, second = passes[0] + passes[1], passes[2] + passes[3]
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert RowOrder(10, 1, 5, 1).micro_batches(3) == order.micro_batches(3)
    assert order.steps_for(1.0) == 2 and order.steps_for(1.5) == 3


@pytest.mark.parametrize("is_accelerated", [False, True], ids=["stock", "tilewright"])
def test_packed_documents_equal_separate_ones(is_accelerated):
    documents = encode(byte_tokenizer(), ["alpha beta", "gamma, delta", "x", "epsilon zeta eta"])
    model = tiny_model()
    nll, grads = 0.0, None
    for d in documents:  # the yardstick is stock attention over one document at a time
        ids = torch.from_numpy(d)[None]
        if ids.shape[1] > 1:
            loss = model(input_ids=ids, labels=ids, num_items_in_batch=1).loss
            loss.backward()
            nll += loss.item()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    if is_accelerated:
        adapt.accelerate(model)
    rows = pack(documents, 64, pad=257)
    loss = model(**rows.batch([0]), use_cache=False, num_items_in_batch=1).loss
    loss.backward()
    assert len(rows) == 1 and loss.item() == pytest.approx(nll, rel=1e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], rtol=2e-4, atol=2e-4, msg=name)


@pytest.mark.parametrize("is_accelerated", [False, True], ids=["stock", "tilewright"])
def test_a_document_does_not_see_its_neighbour(is_accelerated):
    model = tiny_model().eval()
    if is_accelerated:
        adapt.accelerate(model)
    a, b, c = [5] * 9, [7] * 9, list(range(40, 60))
    logits = []
    for first in (a, b):
        row = torch.tensor([first + c])
        positions = torch.cat([torch.arange(9), torch.arange(20)])[None]
        with torch.no_grad():
            logits.append(model(input_ids=row, position_ids=positions, use_cache=False).logits)
    assert torch.equal(logits[0][:, 9:], logits[1][:, 9:])
    assert not torch.equal(logits[0][:, :9], logits[1][:, :9])


@pytest.mark.parametrize("is_running", [False, True], ids=["restarted", "running"])
def test_positions_may_run_on_over_borders_that_the_caller_names(is_running):
    """RoPE is relative: logits of packed documents do not depend on where a document begins."""
    model = tiny_model().eval()
    adapt.accelerate(model)
    documents = [list(range(30, 39)), list(range(40, 60))]
    row = torch.tensor([documents[0] + documents[1]])
    positions = torch.arange(29) if is_running else torch.cat([torch.arange(9), torch.arange(20)])
    borders = torch.tensor([0, 9, 29], dtype=torch.int32)
    with torch.no_grad():
        packed = model(
            input_ids=row, position_ids=positions[None], cu_seq_lens_q=borders,
            cu_seq_lens_k=borders, max_length_q=20, max_length_k=20, use_cache=False,
        ).logits[0]  # fmt: skip
        alone = [model(input_ids=torch.tensor([d]), use_cache=False).logits[0] for d in documents]
        joined = model(input_ids=row, use_cache=False).logits[0]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert (packed[9:] - joined[9:]).abs().max() > 0.01  # without borders it is another result


# steps


def gradients(n_micro, rows):
    """Summed gradients of 8 rows as n_micro micro-batches."""
    model = tiny_model()
    trainer = Trainer(model, TrainOptions(clip_norm=0.0), 10, 1e-3)
    seen = {}
    trainer.optimizer.register_step_pre_hook(
        lambda *_: seen.update({n: p.grad.clone() for n, p in model.named_parameters()})
    )
    size = 8 // n_micro
    done = trainer.step(0, [rows.batch(range(i, i + size)) for i in range(0, 8, size)])
    return done, seen


@pytest.fixture
def uneven_rows():
    # eight rows of very different numbers of labels
    tokens = np.random.default_rng(1).integers(0, 256, 64 * 8)
    rows = pack([tokens], 64, pad=257)
    for n in range(8):
        rows.labels[n, 1 + 7 * (n + 1) :] = IGNORED
    return rows


def test_accumulation_is_exact_over_tokens(uneven_rows):
    whole, expected = gradients(1, uneven_rows)
    for n_micro in (2, 8):
        done, grads = gradients(n_micro, uneven_rows)
        assert done.loss == pytest.approx(whole.loss, rel=1e-6)
        assert done.n_valid == whole.n_valid == uneven_rows.n_valid
        for name, grad in grads.items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    model = tiny_model()
    with torch.no_grad():
        mean_of_means = np.mean([float(model(**uneven_rows.batch([n])).loss) for n in range(8)])
    assert mean_of_means != pytest.approx(whole.loss, rel=1e-3)


def test_gradient_norm_is_torchs_and_clipping_rescales(uneven_rows):
    free, grads = gradients(2, uneven_rows)
    expected = torch.linalg.vector_norm(torch.cat([g.flatten() for g in grads.values()]))
    assert free.grad_norm == pytest.approx(float(expected), rel=1e-5)
    for stock in (False, True):
        model = tiny_model()
        options = TrainOptions(clip_norm=0.5, stock=stock)
        trainer = Trainer(model, options, 10, 1e-3)
        done = trainer.step(0, [uneven_rows.batch(range(4)), uneven_rows.batch(range(4, 8))])
        assert done.grad_norm == pytest.approx(float(expected), rel=1e-5)
        for name, p in model.named_parameters():  # the first mean is a share of the gradient
            mean = trainer.optimizer.state[p]["exp_avg"] / (1 - options.beta1)
            torch.testing.assert_close(mean, grads[name] * 0.5 / (expected + 1e-6), msg=name)


def test_a_run_with_8_bit_states_resumes_to_the_last_bit(tmp_path, monkeypatch):
    documents = [[(7 * i + 3 * j) % 90 + 3 for j in range(60)] for i in range(12)]
    options = dict(steps=4, context=32, learning_rate=1e-2, state_bits=8, save_every=2)
    straight = tw.finetune(tiny_model(), documents, out=tmp_path / "one", **options)
    step = Trainer.step

    def stop_after_two(self, number, *rest):
        if number == 2:
            raise KeyboardInterrupt
        return step(self, number, *rest)

    monkeypatch.setattr(Trainer, "step", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        tw.finetune(tiny_model(), documents, out=tmp_path / "two", **options)
    monkeypatch.undo()
    resumed = tw.finetune(tiny_model(), documents, out=tmp_path / "two", resume=True, **options)
    assert resumed.losses == straight.losses
    for a, b in zip(resumed.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(files.InputError, match="state_bits is 8 with stock, need 32"):
        TrainOptions(state_bits=8, stock=True)


@pytest.mark.parametrize("stock", [False, True])
def test_a_gradient_that_is_not_finite_updates_nothing(stock, uneven_rows):
    model = tiny_model()
    trainer = Trainer(model, TrainOptions(stock=stock), 10, 1e-3)
    before = [p.detach().clone() for p in model.parameters()]
    model.get_input_embeddings().weight.register_hook(lambda g: g * math.inf)
    with pytest.raises(TrainingError, match="gradient is not finite at step 1"):
        trainer.step(0, [uneven_rows.batch(range(8))])
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_schedule():
    options = TrainOptions(warmup=4, final_rate=0.1)
    rates = [learning_rate_at(s, 20, options, 1.0) for s in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4] == 1.0
    assert rates[-1] == pytest.approx(0.1) and rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[12] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 8 / 15)))


def test_mean_loss_is_over_tokens(uneven_rows):
    model = tiny_model().eval()
    with torch.no_grad():
        logits = model(input_ids=uneven_rows.input_ids).logits.double()
    target = torch.roll(uneven_rows.labels, -1, 1)
    target[:, -1] = IGNORED
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
    assert mean_loss(model, uneven_rows) == pytest.approx(float(expected), rel=1e-6)


# runs


def test_losses_equal_stock_and_fall():
    stock = tw.finetune(tiny_model(), TEXTS, tokenizer=byte_tokenizer(), stock=True, **RUN)
    ours = tw.finetune(tiny_model(), TEXTS, tokenizer=byte_tokenizer(), **RUN)
    assert ours.losses == pytest.approx(stock.losses, rel=2e-5)
    assert ours.losses[-1] < ours.losses[0] - 1
    assert ours.report is not None and stock.report is None
    assert ours.model.config._attn_implementation == stock.model.config._attn_implementation


LORA = {"lora_rank": 2, "lora_dropout": 0.1, "train": "embed,norm"}


@pytest.mark.parametrize("extra", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resumed_run_is_the_uninterrupted_one(tmp_path, config_file, extra, dtype):
    settings = {**RUN, **extra, "dtype": dtype, "save_every": 2}
    whole = tw.finetune(config_file, TEXTS, out=tmp_path / "a", **settings)

    class StopAfterThree(Silent):
        def show(self, step, text):
            if step == 3:
                signal.raise_signal(signal.SIGINT)

    out = tmp_path / "b"
    with pytest.raises(Interrupted, match=r"stopped after step 3 of 6.*--resume"):
        tw.finetune(config_file, TEXTS, out=out, progress=StopAfterThree(), **settings)
    assert [p.name for p in sorted(out.glob("checkpoint-*"))] == ["checkpoint-000003"]
    torch.manual_seed(12345)  # what the process did in between must not matter
    again = tw.finetune(config_file, TEXTS, out=out, resume=True, **settings)
    assert again.losses == whole.losses
    assert same_weights(again.model, whole.model)
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6] and not list(out.glob("checkpoint-*"))
    finished = tw.finetune(config_file, TEXTS, out=out, resume=True, **settings)
    assert same_weights(finished.model, whole.model) and finished.losses == whole.losses


def test_a_stop_before_the_first_step_leaves_nothing_to_resume(tmp_path, config_file, monkeypatch):
    real = Trainer.step

    def stop_inside(self, *arguments):
        signal.raise_signal(signal.SIGINT)
        return real(self, *arguments)

    monkeypatch.setattr(Trainer, "step", stop_inside)
    with pytest.raises(Interrupted, match="stopped after step 0 of 6, nothing to resume"):
        tw.finetune(config_file, TEXTS, out=tmp_path / "out", **RUN)
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_full_model_loads_in_plain_transformers(tmp_path, config_file):
    result = tw.finetune(config_file, TEXTS, out=tmp_path / "out", **RUN)
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    batch = tokenizer("the quick", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, result.model(**batch).logits)
    assert not [p for p in (tmp_path / "out").iterdir() if "partial" in p.name]


def test_adapter_loads_in_plain_peft(tmp_path, config_file):
    peft = pytest.importorskip("peft")
    tw.finetune(config_file, TEXTS, out=tmp_path / "base", **RUN)
    result = tw.finetune(
        tmp_path / "base", TEXTS, out=tmp_path / "lora", lora_rank=2, lora_targets="q_proj,v_proj",
        train=("embed", "norm"), **RUN,
    )  # fmt: skip
    base = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    ids = torch.arange(40, 70)[None]
    with torch.no_grad():
        expected = result.model(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, expected)
        ours = pretrained.load(tmp_path / "lora").model.eval()
        assert torch.equal(ours(input_ids=ids).logits, expected)


def test_trained_parameters_are_lora_embed_and_norm(config_file):
    pytest.importorskip("peft")
    result = tw.finetune(config_file, TEXTS, lora_rank=2, train="embed,norm", **{**RUN, "steps": 1})
    for name, parameter in result.model.named_parameters():
        is_named = "modules_to_save" in name and ("embed" in name or "norm" in name)
        assert parameter.requires_grad == (is_named or "lora_" in name), name
    plain = tw.finetune(config_file, TEXTS, train="norm", **{**RUN, "steps": 1})
    trained = {n for n, p in plain.model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in plain.model.named_parameters() if "norm" in n}


def test_frozen_weights_do_not_move(config_file):
    before = pretrained.load(config_file, seed=RUN["seed"]).model.state_dict()
    result = tw.finetune(config_file, TEXTS, train="norm", weight_decay=0.1, **RUN)
    for name, value in result.model.state_dict().items():
        assert torch.equal(value, before[name]) == ("norm" not in name), name


def test_shifted_attention_and_stretched_rope(tmp_path, config_file):
    pytest.importorskip("peft")
    tw.finetune(config_file, TEXTS, out=tmp_path / "base", **RUN)
    long = {**RUN, "context": 256}
    shifted, dense = (
        tw.finetune(
            tmp_path / "base", [" ".join(TEXTS)], out=tmp_path / kind, attention=kind, lora_rank=2,
            rope_target_length=256, **long,
        )
        for kind in ("shifted", "dense")
    )  # fmt: skip
    assert shifted.losses != dense.losses
    # evaluation is dense: the stock model, loaded plainly, gives the same
    loaded = pretrained.load(tmp_path / "shifted").model.eval()
    assert loaded.config.rope_parameters["factor"] == 4.0
    assert loaded.config.max_position_embeddings == 256
    ids = torch.randint(0, 256, (1, 200))
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, shifted.model(input_ids=ids).logits)


def test_stretching_equals_plain_interpolation():
    model = tiny_model().eval()
    assert pretrained.stretch_rope(model, 200) == 4  # ceil(200 / 64)
    config = tiny_config(
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
        max_position_embeddings=200,
    )
    torch.manual_seed(0)
    expected = hf.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 256, (1, 150))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected(input_ids=ids).logits)
    with pytest.raises(files.InputError, match="scaled already"):
        pretrained.stretch_rope(model, 400)


# what goes wrong


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_checkpoint(tmp_path, config_file):
    settings = {**RUN, "learning_rate": 1e30, "clip_norm": 0.0, "save_every": 1}
    out = tmp_path / "out"
    with pytest.raises(TrainingError, match=r"not finite at step 2; .*checkpoint-000001; try a"):
        tw.finetune(config_file, TEXTS, out=out, **settings)
    assert (out / "checkpoint-000001" / "state.json").exists()
    for name in ("model.safetensors", "optimizer.safetensors"):
        files.check_safetensors(out / "checkpoint-000001" / name)


@pytest.mark.parametrize("written", ["write_tensors", "write_json", "log"])
def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, config_file, monkeypatch, written):
    out = tmp_path / "out"

    def fail(path, *unused, **also_unused):
        if written != "log":
            path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    class FillAfterThree(Silent):
        def show(self, step, text):
            if step == 3:
                owner, name = (type(out), "open") if written == "log" else (checkpoint, written)
                monkeypatch.setattr(owner, name, fail)

    with pytest.raises(files.WriteError, match="No space left on device; free space") as caught:
        tw.finetune(config_file, TEXTS, out=out, save_every=2, progress=FillAfterThree(), **RUN)
    monkeypatch.undo()
    assert str(caught.value).count("cannot write") == 1
    assert [p.name for p in checkpoint.RunFolder(out, resume=True).checkpoints()] == [
        "checkpoint-000002"
    ]
    assert not [p for p in out.rglob("*") if "partial" in p.name]
    whole = tw.finetune(config_file, TEXTS, **RUN)
    again = tw.finetune(config_file, TEXTS, out=out, save_every=2, resume=True, **RUN)
    assert again.losses == whole.losses


def test_a_failing_write_does_not_replace_a_good_file(tmp_path):
    path = tmp_path / "good.json"
    files.write_json(path, {"value": 1})
    with pytest.raises(files.WriteError), files.replacing(path) as beside:
        beside.write_text("{")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert files.read_json(path) == {"value": 1} and list(tmp_path.iterdir()) == [path]


def test_resume_with_other_settings_or_data_is_refused(tmp_path, config_file):
    tw.finetune(config_file, TEXTS, out=tmp_path / "out", **RUN)
    with pytest.raises(files.InputError, match=r"resume: learning_rate was 0.003 .* is 0.1 now"):
        tw.finetune(
            config_file, TEXTS, out=tmp_path / "out", resume=True, **{**RUN, "learning_rate": 0.1}
        )
    with pytest.raises(files.InputError, match="resume: data was"):
        tw.finetune(config_file, TEXTS[1:], out=tmp_path / "out", resume=True, **RUN)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0, need a whole number of at least 1"),
        ({"rows": 1.5}, "rows is 1.5, need a whole number"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0, need a number with 0 < learning_rate"),
        ({"lora_dropout": 1.0}, "need a number with 0 <= lora_dropout < 1"),
        ({"clip_norm": math.nan}, "clip_norm is nan"),
        ({"attention": "sparse"}, "attention is 'sparse', need dense or shifted"),
        ({"group_size": 8}, "group_size belongs to attention 'shifted'"),
        ({"attention": "shifted", "stock": True}, "needs tilewright's operators"),
        ({"device": "tpu"}, "device is 'tpu', need auto"),
        ({"train": "router"}, "train: 'router' matches no parameter"),
        ({"stepz": 1}, "no option 'stepz'"),
        ({"context": 65}, "context is 65, but the model reaches 64 positions"),
        ({"rope_target_length": 32}, "rope_target_length is 32, need at least the model's 64"),
    ],
)
def test_options_are_refused(config_file, options, message):
    with pytest.raises(files.InputError, match=message):
        tw.finetune(config_file, TEXTS, **{"steps": 1, "context": 64, **options})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "data is empty"),
        ([[1, 2, 300]], "data holds token 300, need 0 to 257"),
        ([[1], [2]], "no token has a predecessor"),
    ],
)
def test_data_is_refused(config_file, data, message):
    with pytest.raises(files.InputError, match=message):
        tw.finetune(config_file, data, steps=1, context=64)


def test_a_module_of_torch_alone_is_refused(tmp_path):
    with pytest.raises(files.InputError, match="model Linear has no config, need a model of tran"):
        tw.finetune(torch.nn.Linear(4, 4), [[1, 2]], steps=1, context=64)
    with pytest.raises(files.InputError, match=r"model Linear has no save_pretrained\(\), need a "):
        pretrained.save(torch.nn.Linear(4, 4), None, tmp_path)
    assert list(tmp_path.iterdir()) == []
