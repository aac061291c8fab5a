"""Metrics get what they got of the whole batch's logits, which nobody ever holds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from trainer_helpers import ROWS  # noqa: E402

from colab_qlora import UserError, restore  # noqa: E402
from colab_qlora.models.fuse import causal_model  # noqa: E402
from colab_qlora.training import metrics_by_row  # noqa: E402

pytestmark = pytest.mark.model
Make = Callable[..., Any]
EVAL_ROWS = [*ROWS[:6], {"prompt": "Count:\n", "completion": "one two three four five six"}]
BATCH = 4


class Metric:
    """Keeps what it was given."""

    def __call__(self, prediction: Any) -> dict[str, float]:
        self.predictions, self.labels = prediction.predictions, prediction.label_ids
        return {"accuracy": 0.5}


def _argmax(logits: Any, labels: Any) -> Any:
    return logits.argmax(-1)


def _two_parts(logits: Any, labels: Any) -> Any:
    return logits.argmax(-1), torch.logsumexp(logits, -1)


def _right(logits: Any, labels: Any) -> Any:
    """Of the labelled tokens of one row, the share that is right: a tensor without dimensions."""
    hits, wanted = logits[:, :-1].argmax(-1), labels[:, 1:]
    return (hits == wanted)[wanted != -100].float().mean()


def _evaluate(
    make_trainer: Make, preprocess: Any, *, restored: bool = False, **options: Any
) -> Any:
    metric = Metric()
    extra = {"compute_metrics": metric, "preprocess_logits_for_metrics": preprocess}
    options = {"per_device_eval_batch_size": BATCH, **options}
    trainer = make_trainer(eval_rows=EVAL_ROWS, trainer=extra, **options)
    with torch.no_grad():
        for number, (name, p) in enumerate(trainer.model.named_parameters()):
            if "lora_B" in name:  # adapters that do something
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(number)) * 0.1)
    if restored:
        restore(trainer.model)
    sizes: list[tuple[int, ...]] = []
    head = causal_model(trainer.model).lm_head
    stock = torch.nn.Linear.forward

    def watched(self: Any, x: Any) -> Any:
        if self is head:
            sizes.append(tuple(x.shape))
        return stock(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Linear, "forward", watched)
        result = trainer.evaluate()
    assert trainer.preprocess_logits_for_metrics is preprocess
    return result, metric, sizes


@pytest.mark.parametrize("preprocess", [None, _argmax, _two_parts], ids=["logits", "one", "two"])
def test_metrics_are_those_of_the_stock_model(make_trainer: Make, preprocess: Any) -> None:
    ours, metric, sizes = _evaluate(make_trainer, preprocess)
    stock, expected, stock_sizes = _evaluate(make_trainer, preprocess, restored=True)
    assert ours["eval_accuracy"] == 0.5
    assert ours["eval_loss"] == pytest.approx(stock["eval_loss"], rel=1e-6)
    assert (metric.labels == expected.labels).all()
    parts = [(metric.predictions, expected.predictions)]
    if preprocess is _two_parts:
        parts = list(zip(metric.predictions, expected.predictions, strict=True))
    # what stands behind a row's end is whatever the padding gives
    labelled = expected.labels != -100
    for found, wanted in parts:
        assert found.shape == wanted.shape
        if found.dtype.kind == "i":
            assert (found[labelled] == wanted[labelled]).all()
        else:
            assert np.abs(found[labelled] - wanted[labelled]).max() < 1e-4
    # a row of logits at a time, where the stock model has a batch of them
    assert [size[0] for size in sizes] == [1] * len(EVAL_ROWS)
    assert max(size[0] for size in stock_sizes) == BATCH


@pytest.mark.parametrize(
    "preprocess",
    [
        _right,
        lambda logits, labels: (_right(logits, labels),),
        lambda logits, labels: [_right(logits, labels), (_right(logits, labels) * 2,)],
        lambda logits, labels: {"right": _right(logits, labels)},
        lambda logits, labels: OrderedDict(a=_right(logits, labels), b=_right(logits, labels) + 1),
    ],
    ids=["number", "tuple of one", "nested", "dict", "ordered"],
)
def test_a_number_for_a_row_in_the_container_that_it_is_given_in(
    make_trainer: Make, preprocess: Any
) -> None:
    _, metric, _ = _evaluate(make_trainer, preprocess)
    # the stock loop gives preprocess a batch, which is a row here
    _, expected, _ = _evaluate(
        make_trainer, preprocess, restored=True, per_device_eval_batch_size=1
    )
    _assert_alike(metric.predictions, expected.predictions)


def _assert_alike(found: Any, wanted: Any) -> None:
    assert type(found) is type(wanted)
    if isinstance(wanted, dict):
        assert list(found) == list(wanted)
        found, wanted = list(found.values()), list(wanted.values())
    if isinstance(wanted, tuple | list):
        for part, other in zip(found, wanted, strict=True):
            _assert_alike(part, other)
        return
    assert wanted.shape == (len(EVAL_ROWS),)
    assert found.dtype == wanted.dtype and np.allclose(found, wanted, atol=1e-5)


def test_rows_of_different_lengths_are_padded(make_trainer: Make) -> None:
    def some(logits: Any, labels: Any) -> Any:
        return logits.argmax(-1)[:, : 2 + int(labels[labels != -100].sum()) % 3]

    _, metric, _ = _evaluate(make_trainer, some)
    _, expected, _ = _evaluate(make_trainer, some, restored=True, per_device_eval_batch_size=1)
    assert metric.predictions.shape == expected.predictions.shape
    assert (metric.predictions == expected.predictions).all()
    assert (metric.predictions == -100).any()


def test_what_cannot_be_joined_is_refused(make_trainer: Make) -> None:
    with pytest.raises(UserError, match=r"cannot be joined: got str; allowed: a tensor, or a"):
        _evaluate(make_trainer, lambda logits, labels: "right")


def test_numbers_of_numpy_and_nothing_at_all(make_trainer: Make) -> None:
    _, metric, _ = _evaluate(make_trainer, lambda logits, labels: labels.sum(-1).numpy())
    assert metric.predictions.shape == (len(EVAL_ROWS),)
    # transformers computes no metric then
    result, _, _ = _evaluate(make_trainer, lambda logits, labels: None)
    assert np.isfinite(result["eval_loss"]) and "eval_accuracy" not in result


def test_evaluation_without_a_metric_makes_no_logits(make_trainer: Make) -> None:
    trainer = make_trainer(eval_rows=EVAL_ROWS, per_device_eval_batch_size=BATCH)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics_by_row, "logits_from", lambda *a: pytest.fail("logits were made"))
        assert np.isfinite(trainer.evaluate()["eval_loss"])


def test_metrics_between_training_steps(make_trainer: Make) -> None:
    extra = {"compute_metrics": Metric(), "preprocess_logits_for_metrics": _argmax}
    options = {"eval_strategy": "steps", "eval_steps": 2, "dtype": "bfloat16"}
    trainer = make_trainer(eval_rows=EVAL_ROWS, trainer=extra, **options)
    trainer.train()
    found = [e["step"] for e in trainer.state.log_history if e.get("eval_accuracy") == 0.5]
    assert found == [0, 2, 4]


def test_logits_that_host_memory_cannot_hold_are_refused(
    make_trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_by_row, "host_memory_gib", lambda: (12.7, 0.01))
    with pytest.raises(UserError, match="logits of every eval token.*argmax"):
        _evaluate(make_trainer, None)
    assert _evaluate(make_trainer, _argmax)[0]["eval_accuracy"] == 0.5
    # a metric that takes batch by batch keeps nothing
    monkeypatch.setattr(Metric, "__call__", lambda self, p, compute_result: {"accuracy": 0.25})
    assert _evaluate(make_trainer, None, batch_eval_metrics=True)[0]["eval_accuracy"] == 0.25


WORDS = 1024
GIB = 2**30


def _check_room(monkeypatch: Any, lengths: list[int], free_bytes: float, **options: Any) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"input_ids": [[1] * length for length in lengths]})
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=WORDS))
    monkeypatch.setattr(metrics_by_row, "causal_model", lambda model: model)
    monkeypatch.setattr(metrics_by_row, "host_memory_gib", lambda: (12.7, free_bytes / GIB))
    metrics_by_row.check_room_for_logits(model, rows, **options)


def _needed(places: int) -> float:
    """Free bytes of which the logits of so many places are the share that they may take."""
    return 4 * places * WORDS / 0.4


def test_one_long_row_pads_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [4] * 99 + [200]
    _check_room(monkeypatch, lengths, 1.001 * _needed(100 * 200))
    with pytest.raises(UserError, match="got 100 rows padded to 200 tokens x 1,024 words"):
        _check_room(monkeypatch, lengths, 0.999 * _needed(100 * 200))


def test_joined_rows_are_padded_to_the_longest_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [4] * 8 + [20]
    _check_room(monkeypatch, lengths, 1.001 * _needed(3 * 20), joined_rows=4)
    with pytest.raises(UserError, match="got 3 rows padded to 20 tokens"):
        _check_room(monkeypatch, lengths, 0.999 * _needed(3 * 20), joined_rows=4)


def test_no_rows_and_rows_of_another_kind_are_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    _check_room(monkeypatch, [], 1.0)
    metrics_by_row.check_room_for_logits(SimpleNamespace(), iter([{"input_ids": [1]}]))


def test_the_room_that_the_loop_needs_is_what_is_counted(
    make_trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows and the length in the message are the shape of what the metric gets."""
    for options in ({}, {"padding_free": True}):
        _, metric, _ = _evaluate(make_trainer, None, **options)
        count, longest, _ = metric.predictions.shape
        with monkeypatch.context() as patch:
            patch.setattr(metrics_by_row, "host_memory_gib", lambda: (12.7, 1e-6))
            with pytest.raises(UserError, match=f"got {count} rows padded to {longest} tokens"):
                _evaluate(make_trainer, None, **options)
