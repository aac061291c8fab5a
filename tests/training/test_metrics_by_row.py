"""Metrics get what they got of the whole batch's logits, which nobody ever holds."""

from __future__ import annotations

from collections.abc import Callable
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


def _evaluate(
    make_trainer: Make, preprocess: Any, *, restored: bool = False, **options: Any
) -> Any:
    metric = Metric()
    extra = {"compute_metrics": metric, "preprocess_logits_for_metrics": preprocess}
    trainer = make_trainer(
        eval_rows=EVAL_ROWS, per_device_eval_batch_size=BATCH, trainer=extra, **options
    )
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
