"""Early stopping: a run that overfits is stopped, and the model is that of the lowest eval loss."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from live_helpers import fail_at, with_verdict  # noqa: E402
from trainer_helpers import ROWS, losses_of  # noqa: E402

from colab_qlora import FastLanguageModel, UserError, read_log  # noqa: E402
from colab_qlora.curves import advise, diagnose  # noqa: E402
from colab_qlora.curves.verdicts import Diagnosis, Verdict  # noqa: E402
from colab_qlora.training.adapter_state import adapter_tensors  # noqa: E402
from colab_qlora.training.early_stopping import EarlyStopping  # noqa: E402
from colab_qlora.training.optimizer import FlatAdamW  # noqa: E402

pytestmark = pytest.mark.model
Make = Callable[..., Any]

_RANDOM = random.Random(0)
_WORDS = ["red", "green", "blue", "one", "two", "cat", "dog", "sun", "moon", "sea", "tree"]
# nothing to learn but the words, so that six rows are learnt by heart
CHATTER = [
    {"prompt": "Say:\n", "completion": " ".join(_RANDOM.choice(_WORDS) for _ in range(8))}
    for _ in range(14)
]


@pytest.fixture(scope="module")
def tiny_model_folder(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a final norm that lets it be sure, and so be wrong, of a token."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("sure") / "sure-llama"
    model = LlamaForCausalLM.from_pretrained(tiny_model_folder)
    with torch.no_grad():
        model.model.norm.weight.mul_(10)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(folder)
    return folder


def overfitting_run(make_trainer: Make, out: Path | None = None, **options: Any) -> Any:
    defaults: dict[str, Any] = {
        "rows": CHATTER[:6],
        "eval_rows": CHATTER[6:],
        "lora": {"r": 16, "lora_alpha": 32},
        "max_steps": 60,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "constant",
        "eval_strategy": "steps",
        "eval_steps": 3,
    }
    return make_trainer(out, **{**defaults, **options})


def turned(log: Any, **options: Any) -> Diagnosis:
    """Two evaluations in a row above the lowest are overfitting; a stand-in for the rules."""
    losses = [r["eval_loss"] for r in log if r.get("eval_loss") is not None and r["step"] > 0]
    is_over = len(losses) > 2 and min(losses[-2:]) > 1.015 * min(losses)
    name = "overfitting" if is_over else "healthy"
    return Diagnosis((Verdict(name, "info", "likely", None, "of the evals", "stop"),), 1)


def weights(trainer: Any) -> dict[str, Any]:
    return {name: t.clone() for name, t in adapter_tensors(trainer.model).items()}


def on_disk(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "best_adapter" / "adapter_model.safetensors")


def evals_of(out: Path) -> dict[int, float]:
    """Eval losses by step, those after the first step."""
    records = read_log(out / "loss_log.jsonl").records
    return {r["step"]: r["eval_loss"] for r in records if "eval_loss" in r and r["step"] > 0}


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def test_an_overfitting_run_is_stopped_and_ends_with_its_best_adapter(
    make_trainer: Make, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    stopping = EarlyStopping()
    trainer = overfitting_run(make_trainer, trainer={"early_stopping": stopping})
    addresses = {name: t.data_ptr() for name, t in adapter_tensors(trainer.model).items()}
    trainer.train()
    evals = evals_of(out)
    best = min(evals, key=evals.__getitem__)
    # the run did overfit: the train loss went on falling while the eval loss rose
    assert 0 < best < trainer.state.global_step < 60
    assert losses_of(trainer)[-1] < losses_of(trainer)[best - 1]
    assert evals[trainer.state.global_step] > 1.015 * evals[best]
    assert stopping.best is not None and stopping.best.step == best
    assert equal(weights(trainer), on_disk(out))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evals[best], abs=1e-6)
    said = f"step {best} (eval loss {evals[best]:.4f})"
    stopped, restored = trainer.notes[-2:]
    assert stopped.startswith(f"stopped early at step {trainer.state.global_step}: overfitting (")
    assert restored == f"the adapter is that of {said}, the lowest; also in {out}/best_adapter"
    # a log read later knows that the run is over, though it has fewer steps than planned
    log = read_log(out / "loss_log.jsonl")
    assert log.records[-1]["event"] == "stopped early: overfitting"
    assert diagnose(log).is_finished is True
    assert "let the run go on" not in advise(diagnose(log), log).text()
    # in place: the flat optimiser's tensors are still the model's
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert isinstance(optimizer, FlatAdamW)
    after = {name: t.data_ptr() for name, t in adapter_tensors(trainer.model).items()}
    assert len(set(after.values())) == len(addresses)
    flat = next(optimizer._flats())
    assert [p.data_ptr() for p in flat.parameters] == [
        view.data_ptr() for view in flat.views_of(flat.values)
    ]


def test_the_same_run_without_it_ends_worse(make_trainer: Make, tmp_path: Path) -> None:
    trainer = overfitting_run(make_trainer, max_steps=24)
    trainer.train()
    evals = evals_of(tmp_path / "out")
    assert trainer.state.global_step == 24
    assert evals[24] > 1.015 * min(evals.values())
    assert not (tmp_path / "out" / "best_adapter").exists()


def test_the_best_adapter_loads_like_any_other(make_trainer: Make, tmp_path: Path) -> None:
    trainer = overfitting_run(
        make_trainer, max_steps=9, trainer={"early_stopping": EarlyStopping(diagnose=turned)}
    )
    trainer.train()
    folder = tmp_path / "out" / "best_adapter"
    assert {p.name for p in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    model, _ = FastLanguageModel.from_pretrained(str(folder), 64, dtype="float32")
    assert equal(adapter_tensors(model), on_disk(tmp_path / "out"))
    evals = evals_of(tmp_path / "out")
    trainer.model = model
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(evals.values()), abs=1e-6)


@pytest.mark.parametrize(
    ("name", "confidence", "wanted", "is_stopped"),
    [
        ("overfitting", "likely", "likely", True),
        ("overfitting", "watch", "likely", False),
        ("overfitting", "likely", "sure", False),
        ("eval rising", "watch", "watch", True),
        ("worse than base", "sure", "likely", True),
        ("unstable", "sure", "watch", False),
        ("memorising", "sure", "watch", False),
    ],
)
def test_what_stops(
    make_trainer: Make, name: str, confidence: str, wanted: str, is_stopped: bool
) -> None:
    diagnose = with_verdict(name, confidence, from_step=2)
    stopping = EarlyStopping(confidence=wanted, diagnose=diagnose)
    trainer = overfitting_run(
        make_trainer, max_steps=3, eval_steps=1, trainer={"early_stopping": stopping}
    )
    assert trainer.train().global_step == (2 if is_stopped else 3)
    assert (stopping.stopped_by is not None) == is_stopped


def test_the_last_weights_can_be_kept(make_trainer: Make, tmp_path: Path) -> None:
    plain = overfitting_run(make_trainer, tmp_path / "plain", max_steps=18)
    plain.train()
    stopping = EarlyStopping(restore_best=False, diagnose=with_verdict("healthy"))
    kept = overfitting_run(make_trainer, max_steps=18, trainer={"early_stopping": stopping})
    kept.train()
    # neither saving nor judging changes the training
    assert losses_of(kept) == losses_of(plain)
    assert equal(weights(kept), weights(plain))
    assert not equal(weights(kept), on_disk(tmp_path / "out"))
    assert stopping.kept().endswith(f"is in {tmp_path}/out/best_adapter")


def test_without_evaluations_it_refuses(make_trainer: Make) -> None:
    trainer = make_trainer(eval_rows=ROWS[:4], trainer={"early_stopping": True})
    with pytest.raises(UserError, match="early stopping needs evaluations: got eval_strategy='no'"):
        trainer.train()


def test_without_an_adapter_it_refuses(tiny_model_folder: Path, tmp_path: Path) -> None:
    from colab_qlora import SFTConfig, SFTTrainer

    model, tokenizer = FastLanguageModel.from_pretrained(
        str(tiny_model_folder), 64, "float32", load_in_4bit=False
    )
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=ROWS[:4],
        eval_dataset=ROWS[:4],
        args=SFTConfig(str(tmp_path), max_steps=1, eval_strategy="steps", eval_steps=1),
        early_stopping=True,
    )
    with pytest.raises(UserError, match="keeps the best adapter, and the model has none"):
        trainer.train()


def test_another_confidence_is_refused() -> None:
    with pytest.raises(UserError, match="not understood: got 'certain'; allowed: sure, likely"):
        EarlyStopping(confidence="certain")


def test_a_resumed_run_keeps_the_best_so_far(make_trainer: Make, tmp_path: Path) -> None:
    out = tmp_path / "out"
    saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 27}
    calm = with_verdict("healthy")
    broken = overfitting_run(
        make_trainer, **saving, trainer={"early_stopping": EarlyStopping(diagnose=calm)}
    )
    fail_at(broken, 22, RuntimeError("the session ended"))
    with pytest.raises(RuntimeError, match="the session ended"):
        broken.train()
    first = evals_of(out)
    best = min(first, key=first.__getitem__)
    assert best < 21  # so that there is something to keep
    kept = on_disk(out)
    stopping = EarlyStopping(diagnose=calm)
    resumed = overfitting_run(make_trainer, **saving, trainer={"early_stopping": stopping})
    resumed.train(resume_from_checkpoint=True)
    evals = evals_of(out)
    assert sorted(evals) == list(range(3, 28, 3))
    assert min(evals, key=evals.__getitem__) == best
    assert equal(on_disk(out), kept)
    assert equal(weights(resumed), kept)
    assert f"the adapter is that of step {best} " in resumed.notes[-1]
    # a third session finds nothing to train, and has the best adapter too
    again = overfitting_run(
        make_trainer, **saving, trainer={"early_stopping": EarlyStopping(diagnose=calm)}
    )
    again.train(resume_from_checkpoint=True)
    assert equal(weights(again), kept)


def test_a_run_that_was_stopped_stays_stopped(make_trainer: Make) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3}
    stopped = overfitting_run(
        make_trainer, **saving, trainer={"early_stopping": EarlyStopping(diagnose=turned)}
    )
    steps = stopped.train().global_step
    assert steps < 60
    again = overfitting_run(
        make_trainer, **saving, trainer={"early_stopping": EarlyStopping(diagnose=turned)}
    )
    assert again.train(resume_from_checkpoint=True).global_step == steps + 1
    assert equal(weights(again), weights(stopped))


def test_the_best_of_another_run_is_set_aside(make_trainer: Make, tmp_path: Path) -> None:
    options = {"early_stopping": EarlyStopping(diagnose=turned)}
    overfitting_run(make_trainer, max_steps=6, trainer=options).train()
    first = on_disk(tmp_path / "out")
    overfitting_run(make_trainer, max_steps=6, learning_rate=1e-4).train()
    assert equal(on_disk(tmp_path / "out" / "earlier-1"), first)
    assert not (tmp_path / "out" / "best_adapter").exists()
