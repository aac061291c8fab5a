"""An adapter that comes back in a run whose weights change precision has the base of its step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from dynamic_helpers import (  # noqa: E402
    POINTS,
    ROWS,
    STEPS,
    dear_points,
    dynamic_trainer,
    write_checkpoint,
)
from live_helpers import with_verdict  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from colab_qlora import FastLanguageModel, UserError  # noqa: E402
from colab_qlora.quantization.activation_statistics import weight_items  # noqa: E402
from colab_qlora.quantization.budget import NF4_32, NF4_64  # noqa: E402
from colab_qlora.quantization.dynamic import dynamic_state  # noqa: E402
from colab_qlora.quantization.map_file import read_map  # noqa: E402
from colab_qlora.quantization.placing import rung_of  # noqa: E402
from colab_qlora.quantization.schedule import ScheduleSettings  # noqa: E402
from colab_qlora.training.early_stopping import EarlyStopping  # noqa: E402
from colab_qlora.training.learning_rate_sweep import learning_rate_sweep  # noqa: E402
from colab_qlora.training.non_finite import StopOnNonFinite  # noqa: E402

pytestmark = pytest.mark.model
Make = Callable[..., Any]
# precision changes after steps 2, 4 and 6
SETTINGS = ScheduleSettings(points=POINTS, smoothing=0.0)
BEST = 3
EVALS = {"eval_strategy": "steps", "eval_steps": 1}
LOST = "weights do not have the precision that they had "


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("dynamic") / "tiny")


@pytest.fixture
def make(checkpoint: Path, tmp_path: Path) -> Make:
    def build(out: str | Path = "out", **options: Any) -> Any:
        trainer = {
            "quantization_schedule": SETTINGS,
            "eval_dataset": ROWS[:4],
            **options.pop("trainer", {}),
        }
        return dynamic_trainer(checkpoint, tmp_path / out, trainer=trainer, **options)

    return build


@pytest.fixture
def points(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return dear_points(monkeypatch)


class Base(TrainerCallback):
    """Notes the rungs and the output of the model after each step; `at` is called before."""

    def __init__(self, at: Callable[[Any, int], None] = lambda model, step: None) -> None:
        self.rungs: dict[int, dict[str, str]] = {}
        self.outputs: dict[int, Any] = {}
        self.at = at

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.at(kwargs["model"], state.global_step)
        self.rungs[state.global_step] = rungs_of(kwargs["model"])
        self.outputs[state.global_step] = output_of(kwargs["model"])


def rungs_of(model: Any) -> dict[str, str]:
    return {item.name: rung_of(item) for item in weight_items(model)}


@torch.no_grad()
def output_of(model: Any) -> Any:
    was_training = model.training
    model.eval()
    logits = model(input_ids=torch.arange(4, 20)[None], use_cache=False, skip_logits=False).logits
    model.train(was_training)
    return logits


def watched(trainer: Any, **options: Any) -> Base:
    """After the schedule, which the trainer added last."""
    base = Base(**options)
    trainer.add_callback(base)
    return base


def best_at(trainer: Any, best: int) -> None:
    """The eval loss is least at this step, for the trainer and in the log."""
    stock = trainer.log

    def log(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "eval_loss" in logs:
            logs["eval_loss"] = 1.0 + abs(trainer.state.global_step - best)
        stock(logs, *args, **kwargs)

    trainer.log = log


def lose_source(model: Any, step: int) -> None:
    if step == 7:
        dynamic_state(model).source.files = {}  # type: ignore[union-attr]


def keeping() -> dict[str, Any]:
    return {"early_stopping": EarlyStopping(diagnose=with_verdict("healthy"))}


def test_the_best_adapter_comes_back_with_its_base(
    make: Make, points: list[int], tmp_path: Path
) -> None:
    trainer = make(trainer=keeping(), **EVALS)
    base = watched(trainer)
    best_at(trainer, BEST)
    trainer.train()
    state = dynamic_state(trainer.model)
    assert state is not None
    assert base.rungs[STEPS] != base.rungs[BEST]
    assert rungs_of(trainer.model) == state.map.rungs == base.rungs[BEST]
    assert {change.step for change in state.history} == {2}
    assert torch.equal(output_of(trainer.model), base.outputs[BEST])
    assert not [note for note in trainer.notes if LOST in note]
    # and from its folder
    folder = tmp_path / "out" / "best_adapter"
    recorded = read_map(folder)
    assert recorded is not None
    assert recorded.map.rungs == base.rungs[BEST]
    loaded, _ = FastLanguageModel.from_pretrained(str(folder), 64, dtype="float32")
    assert rungs_of(loaded) == base.rungs[BEST]
    assert torch.allclose(output_of(loaded), base.outputs[BEST], atol=1e-5)
    # what is saved now is what is there now
    trainer.save_model(str(tmp_path / "end"))
    saved = read_map(tmp_path / "end")
    assert saved is not None
    assert saved.map.rungs == base.rungs[BEST]


def test_a_source_that_is_gone_is_said_once_and_the_adapter_comes_back(
    make: Make, points: list[int]
) -> None:
    trainer = make(trainer=keeping(), **EVALS)
    base = watched(trainer, at=lose_source)
    best_at(trainer, BEST)
    trainer.train()
    (line,) = [note for note in trainer.notes if LOST in note]
    assert line.startswith(f"{LOST}in {trainer.args.output_dir}/best_adapter: the 16-bit weight of")
    assert trainer.notes[-1].startswith(f"the adapter is that of step {BEST} ")
    state = dynamic_state(trainer.model)
    assert state is not None
    assert rungs_of(trainer.model) == state.map.rungs == base.rungs[STEPS]
    assert {change.step for change in state.history} == {2, 4, 6}


@pytest.mark.parametrize("is_gone", [False, True])
def test_the_copy_before_numbers_broke_comes_back_with_its_base(
    make: Make, points: list[int], is_gone: bool
) -> None:
    stop = StopOnNonFinite()

    def at(model: Any, step: int) -> None:
        stop._next_copy = 0.0 if step <= BEST else math.inf
        if step == 8:
            dynamic_state(model).source.files = {} if is_gone else source.files

    trainer = make(trainer={"callbacks": [stop]})
    source = dynamic_state(trainer.model).source  # type: ignore[union-attr]
    base, stock = watched(trainer, at=at), trainer.compute_loss

    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        loss = stock(*args, **kwargs)
        return loss * math.nan if trainer.state.global_step >= 7 else loss

    trainer.compute_loss = compute_loss
    trainer.train()
    assert trainer.state.global_step == 8
    assert f"the adapter is that of step {BEST}," in trainer.notes[-1]
    assert base.rungs[7] != base.rungs[BEST]
    said = [note for note in trainer.notes if LOST in note]
    if is_gone:
        assert [line.split(":")[0] for line in said] == [f"{LOST}when the adapter was copied"]
        assert rungs_of(trainer.model) == base.rungs[7]
    else:
        assert not said
        assert rungs_of(trainer.model) == base.rungs[BEST]
        assert torch.equal(output_of(trainer.model), base.outputs[BEST])
    assert stop._copy_base is None


@pytest.mark.parametrize("is_gone", [False, True])
def test_the_best_checkpoint_comes_back_with_its_base(
    make: Make, points: list[int], is_gone: bool
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}
    trainer = make(metric_for_best_model="eval_loss", **saving, **EVALS)
    base = watched(trainer, **({"at": lose_source} if is_gone else {}))
    best_at(trainer, BEST)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{BEST}")
    said = [note for note in trainer.notes if LOST in note]
    if is_gone:
        (line,) = said
        assert line.startswith(f"{LOST}in {trainer.state.best_model_checkpoint}: the 16-bit weight")
        assert rungs_of(trainer.model) == base.rungs[STEPS]
    else:
        assert not said
        assert rungs_of(trainer.model) == base.rungs[BEST] != base.rungs[STEPS]
        assert torch.equal(output_of(trainer.model), base.outputs[BEST])


def test_precision_does_not_change_in_a_sweep(
    make: Make, points: list[int], tmp_path: Path
) -> None:
    lines: list[str] = []
    first = make("first")
    rungs = rungs_of(first.model)

    def next_one(learning_rate: float, max_steps: int, output_dir: str) -> Any:
        trainer = make(output_dir, learning_rate=learning_rate, max_steps=max_steps)
        assert rungs_of(trainer.model) == rungs
        return trainer

    out = tmp_path / "sweep"
    learning_rate_sweep(next_one, 1e-2, factors=(1, 2), steps=6, output_dir=out, say=lines.append)
    assert points == []
    said = [line for line in lines if "precision" in line]
    assert said == ["precision does not change in a sweep: all runs have the same base"] * 2


def test_a_sweep_over_bases_that_differ_is_refused(make: Make, tmp_path: Path) -> None:
    made: list[Any] = []

    def next_one(learning_rate: float, max_steps: int, output_dir: str) -> Any:
        made.append(make(output_dir, learning_rate=learning_rate, max_steps=max_steps))
        if len(made) == 2:
            state = dynamic_state(made[-1].model)
            assert state is not None
            name = next(n for n, rung in state.map.rungs.items() if rung == NF4_64)
            placements = {**state.map.placements, name: replace(state.map[name], rung=NF4_32)}
            state.map = replace(state.map, placements=placements)
        return made[-1]

    with pytest.raises(UserError, match=r"got precisions of the base \w{12} instead of \w{12};"):
        learning_rate_sweep(next_one, 1e-2, factors=(1, 2), steps=5, output_dir=tmp_path / "s")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quantization": "nf4"}, "quantization nf4 instead of dynamic"),
        ({"budget": "+0%"}, "quantization_budget +0% instead of +15%"),
    ],
)
def test_a_run_of_other_precision_is_not_resumed(
    make: Make, options: dict[str, Any], words: str
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    make(**saving, max_steps=STEPS).train()
    other = make(**saving, max_steps=STEPS, **options)
    other.train(resume_from_checkpoint=True)
    (line,) = [note for note in other.notes if "of another run" in note]
    assert words in line
    assert line.endswith("starting with the first step")


def test_a_checkpoint_with_a_map_over_plain_nf4_says_how_to_load_it(
    make: Make, tmp_path: Path
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    make(**saving, max_steps=4).train()
    folder = tmp_path / "out" / "checkpoint-2"
    other = make("other", quantization="nf4", max_steps=4)
    other.train(resume_from_checkpoint=str(folder))
    (line,) = [note for note in other.notes if "mixed precision" in note]
    assert line.endswith(f'load it with FastLanguageModel.from_pretrained("{folder}")')
