"""Packed and padding-free rows train as padded ones do, and it is said what was done with them."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from trainer_helpers import losses_of  # noqa: E402

from colab_qlora import UserError  # noqa: E402
from colab_qlora.training.packing import (  # noqa: E402
    packing_fields,
    padding_share,
    without_attention_warnings,
)

pytestmark = pytest.mark.model
# of many lengths, all in one batch, so that every way of laying them out sees the same documents
DOCUMENTS = [
    {"text": f"{i} is a number. " + "It comes after another. " * (i % 5)} for i in range(10)
]
LAYOUTS = {
    "padding-free": {"padding_free": True},
    "packed": {"packing": True},
    "packed, long ones split": {"packing": True, "packing_strategy": "bfd-requeue"},
}
FUSED_OR_NOT = pytest.mark.parametrize("fused", [True, False], ids=["fused", "stock layers"])


def trained(make_trainer: Any, out: Any, *, fused: bool, **layout: Any) -> tuple[Any, dict]:
    """A run of three steps over all documents at once, and its adapter."""
    trainer = make_trainer(
        out,
        rows=DOCUMENTS,
        lora={"use_fused_layers": fused},
        per_device_train_batch_size=len(DOCUMENTS),
        gradient_accumulation_steps=1,
        max_steps=3,
        optim="adamw_torch",
        max_grad_norm=0.0,
        **layout,
    )
    trainer.train()
    adapter = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "lora" in n}
    return trainer, adapter


@FUSED_OR_NOT
def test_each_layout_trains_as_padding_does(make_trainer, tmp_path, fused):
    padded, expected = trained(make_trainer, tmp_path / "padded", fused=fused)
    assert any(float(weight.norm()) > 0 for n, weight in expected.items() if "lora_B" in n)
    for name, layout in LAYOUTS.items():
        other, adapter = trained(make_trainer, tmp_path / name, fused=fused, **layout)
        assert losses_of(other) == pytest.approx(losses_of(padded), rel=2e-5), name
        for key, weight in expected.items():
            gap = float((adapter[key] - weight).norm())
            assert gap <= 1e-3 * float(weight.norm()) + 1e-9, (name, key)


def test_documents_in_a_row_have_the_logits_that_they_have_alone(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path / "logits", rows=DOCUMENTS, packing=True)
    batch = next(iter(trainer.get_train_dataloader()))
    model = trainer.model.eval()
    positions = batch["position_ids"][0]
    starts = [*(positions == 0).nonzero().flatten().tolist(), len(positions)]
    assert len(starts) > 3, "one document alone proves nothing"
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    with torch.no_grad():
        together = model(**inputs, use_cache=False).logits
        for start, end in zip(starts, starts[1:], strict=False):
            alone = model(input_ids=batch["input_ids"][:, start:end], use_cache=False).logits
            assert torch.allclose(together[:, start:end], alone, atol=1e-5), (start, end)


@pytest.mark.parametrize("words", ["flash attention", "Flash Attention"])
def test_trl_warns_of_no_attention_that_is_ours(caplog, words):
    log = logging.getLogger("trl.trainer.sft_trainer")
    with caplog.at_level(logging.WARNING), without_attention_warnings():
        log.warning("You are using packing, but not a supported %s variant.", words)
        log.warning("something else")
    assert [record.getMessage() for record in caplog.records] == ["something else"]


def test_what_is_packed_is_said(make_trainer, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(tmp_path / "said", rows=DOCUMENTS, packing=True)
    tokens = sum(len(row) for row in trainer.train_dataset["input_ids"])
    rows, places = len(trainer.train_dataset), 64 * len(trainer.train_dataset)
    (line,) = [note for note in trainer.notes if "packed" in note]
    assert line == (
        f"10 train documents are packed into {rows} rows of up to 64 tokens, "
        f"{tokens / places:.0%} full; none sees another"
    )
    said = [record.getMessage().lower() for record in caplog.records]
    assert not [text for text in said if "flash attention" in text]


def test_a_strategy_that_mixes_documents_is_named(make_trainer, tmp_path):
    trainer = make_trainer(
        tmp_path / "wrapped", rows=DOCUMENTS, packing=True, packing_strategy="wrapped"
    )
    assert [n for n in trainer.notes if "lets the documents in a row see each other" in n]


def test_eval_rows_are_packed_with_the_train_rows_or_not_at_all(make_trainer, tmp_path):
    """TRL would pad packed eval rows as if each were one document."""
    # in one batch: transformers takes the mean of the batches', whatever is in them
    fields = {"eval_rows": DOCUMENTS, "per_device_eval_batch_size": len(DOCUMENTS)}
    packed = make_trainer(tmp_path / "a", rows=DOCUMENTS, packing=True, **fields)
    plain = make_trainer(tmp_path / "b", rows=DOCUMENTS, eval_packing=True, **fields)
    assert len(packed.eval_dataset) < len(plain.eval_dataset) == len(DOCUMENTS)
    assert [note for note in plain.notes if "eval_packing=True is left out" in note]
    losses = [trainer.evaluate()["eval_loss"] for trainer in (packed, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_joined_rows_are_cut_as_others_are(make_trainer, tmp_path):
    rows = [*DOCUMENTS, {"prompt": "a very long one " * 4, "completion": "and on " * 80}][-1:] * 3
    joined, padded = (
        make_trainer(tmp_path / str(free), rows=rows, eval_rows=rows, padding_free=free)
        for free in (True, False)
    )
    assert joined.args.max_length == padded.args.max_length == 64
    for name in ("train_dataset", "eval_dataset"):
        found, wanted = (getattr(trainer, name) for trainer in (joined, padded))
        assert found["input_ids"] == wanted["input_ids"]
        # TRL 0.29 has a mask, 1.x the labels themselves
        assert "completion_mask" in found.column_names or "labels" in found.column_names
        for column in {"completion_mask", "labels"} & set(found.column_names):
            assert found[column] == wanted[column]
        assert {len(row) for row in found["input_ids"]} == {64}


def test_rows_that_lose_their_end_are_counted(make_trainer, tmp_path):
    rows = [*DOCUMENTS, {"text": "a very long one " * 60}]
    for strategy, is_cut in (("bfd", True), ("bfd-requeue", False)):
        out = tmp_path / strategy
        trainer = make_trainer(out, rows=rows, packing=True, packing_strategy=strategy)
        assert bool([n for n in trainer.notes if "lose their end" in n]) is is_cut
        kept = sum(len(row) for row in trainer.train_dataset["input_ids"])
        assert (kept < 64 * 4) is is_cut, kept


def test_joined_rows_that_are_to_keep_their_end_are_refused():
    args = SimpleNamespace(
        packing=False, padding_free=True, eval_packing=None, truncation_mode="keep_end"
    )
    with pytest.raises(UserError, match="rows that are joined keep their start"):
        packing_fields(args, print)


@pytest.mark.parametrize("name", ["packing", "padding_free"])
def test_another_collator_is_refused(make_trainer, tmp_path, name):
    with pytest.raises(UserError, match=f"{name}=True needs the trainer's own data collator"):
        make_trainer(tmp_path / name, trainer={"data_collator": lambda rows: {}}, **{name: True})


def test_padding_is_said_where_there_is_much_of_it(make_trainer, tmp_path):
    rows = [{"text": "word " * (2 if i % 8 else 50)} for i in range(32)]
    trainer = make_trainer(tmp_path / "much", rows=rows, per_device_train_batch_size=8)
    (line,) = [note for note in trainer.notes if "is padding" in note]
    assert line.endswith("of a batch of 8 rows is padding; packing=True trains on none of it")
    even = [{"text": "word " * 20} for _ in range(32)]
    trainer = make_trainer(tmp_path / "none", rows=even, per_device_train_batch_size=8)
    assert not [note for note in trainer.notes if "padding" in note]


@pytest.mark.parametrize(
    ("lengths", "batch", "share"),
    [([10, 10, 10], 3, 0.0), ([1, 9], 2, 1 - 10 / 18), ([5], 8, 0.0), ([], 4, 0.0), ([1, 9], 1, 0)],
)
def test_share_of_padding(lengths, batch, share):
    assert padding_share(lengths, batch) == pytest.approx(share)


def test_share_of_padding_follows_the_expected_longest_row():
    """Two rows of 1 to 100 tokens: the longer has 67.2 in the mean, both together 101."""
    share = padding_share(range(1, 101), 2)
    assert share == pytest.approx(1 - 101 / (2 * 67.33), abs=0.03)
