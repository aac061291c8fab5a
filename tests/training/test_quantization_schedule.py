"""Precision changes in a real training: what changes, what does not, and what may go wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from dynamic_helpers import (  # noqa: E402
    POINTS,
    STEPS,
    dear_points,
    dynamic_trainer,
    write_checkpoint,
)
from live_helpers import fail_at  # noqa: E402
from trainer_helpers import losses_of  # noqa: E402

from colab_qlora import UserError, read_log  # noqa: E402
from colab_qlora.curves.draw import draw_curves  # noqa: E402
from colab_qlora.models.fuse import fused_layers, state_of, unfused  # noqa: E402
from colab_qlora.quantization.activation_statistics import weight_items  # noqa: E402
from colab_qlora.quantization.dynamic import dynamic_state  # noqa: E402
from colab_qlora.quantization.live_prices import (  # noqa: E402
    BrokenPrices,
    LivePrices,
    measure_live,
)
from colab_qlora.quantization.placing import rung_of  # noqa: E402
from colab_qlora.quantization.schedule import ScheduleSettings  # noqa: E402
from colab_qlora.training import quantization_schedule  # noqa: E402
from colab_qlora.training.adapter_state import adapter_tensors  # noqa: E402
from colab_qlora.training.quantization_schedule import QuantizationSchedule  # noqa: E402

pytestmark = pytest.mark.model
Make = Callable[..., Any]
SETTINGS = ScheduleSettings(points=POINTS, smoothing=0.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("dynamic") / "tiny")


@pytest.fixture
def make(checkpoint: Path, tmp_path: Path) -> Make:
    def build(schedule: Any = SETTINGS, out: str = "out", **options: Any) -> Any:
        trainer = {"quantization_schedule": schedule, **options.pop("trainer", {})}
        return dynamic_trainer(checkpoint, tmp_path / out, trainer=trainer, **options)

    return build


@pytest.fixture
def points(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return dear_points(monkeypatch)


def schedule_of(trainer: Any) -> QuantizationSchedule:
    (found,) = [r for r in trainer._readers() if isinstance(r, QuantizationSchedule)]
    return found


def adapters_of(trainer: Any) -> dict[str, Any]:
    return {name: t.clone() for name, t in adapter_tensors(trainer.model).items()}


def moments_of(trainer: Any) -> list[Any]:
    """All tensors of the optimiser's state, as clones."""
    state = trainer.optimizer.state_dict()["state"]
    return [v.clone() for s in state.values() for v in s.values() if isinstance(v, torch.Tensor)]


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = list(one.values()), list(other.values())
    assert len(one) == len(other) > 0
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def lines_of(trainer: Any, word: str = "precision") -> list[str]:
    return [note for note in trainer.notes if word in note]


def test_weights_change_at_the_points_under_the_cap(
    make: Make, points: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make()
    state = dynamic_state(trainer.model)
    assert state is not None
    first = state.map.rungs
    trainer.train()
    assert points == [4, 4, 4]
    assert {change.step for change in state.history} == {2, 4, 6}
    assert state.map.rungs != first
    assert state.map.bytes <= state.cap_bytes
    assert {i.name: rung_of(i) for i in weight_items(trainer.model)} == state.map.rungs
    said = lines_of(trainer)
    assert [line.split(":")[0] for line in said] == ["step 2", "step 4", "step 6"]
    assert all("changed precision: " in line and "; price -" in line for line in said)
    printed = capsys.readouterr().out
    assert all(f"colab_qlora: {line}\n" in printed for line in said)
    assert schedule_of(trainer).seconds > 0
    # the layers stayed fused over what was swapped
    shared = state_of(trainer.model)
    assert shared is not None
    assert len(fused_layers(trainer.model)) == 2
    assert not shared.stock_passes


def test_changes_are_events_of_the_log_and_the_plot(
    make: Make, points: list[int], tmp_path: Path
) -> None:
    trainer = make()
    trainer.train()
    log = read_log(tmp_path / "out" / "loss_log.jsonl")
    events = {r["step"]: r for r in log.records if "event" in r}
    assert list(events) == [2, 4, 6]
    for line in lines_of(trainer):
        step, text = line.removeprefix("step ").split(": ", 1)
        assert events[int(step)]["event"] == text
        assert events[int(step)]["seconds"] > 0
    assert [r["step"] for r in log.records if "loss" in r] == list(range(1, STEPS + 1))
    fig = draw_curves(log)
    notes = [t.get_text() for t in fig.findobj(lambda a: a.get_gid() == "note")]
    assert "3 events, numbered 1 to 3, first at step 2" in notes


def test_one_long_event_fits_into_the_plot() -> None:
    words = ", ".join(f"layers.{n}.self_attn.q_proj nf4_64 -> int8" for n in range(3))
    text = f"14 weights changed precision: {words}, 11 more; price -12%"
    records: list[dict[str, Any]] = [{"step": s, "loss": 2.0 - s / 100} for s in range(1, 50)]
    fig = draw_curves([*records, {"step": 12, "event": text}])
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    (note,) = [t for t in fig.findobj(lambda a: a.get_gid() == "note") if "event" in t.get_text()]
    box = note.get_window_extent(canvas.get_renderer())
    assert box.x0 >= 0
    assert box.x1 <= fig.bbox.width


def test_adapters_and_optimiser_state_stay_the_same_objects_and_values(
    make: Make, points: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make()
    stock, seen = QuantizationSchedule._point, []

    def watched(self: Any, model: Any, step: int) -> None:
        def now() -> tuple[Any, ...]:
            trained = [p for p in model.parameters() if p.requires_grad]
            groups = [p for g in trainer.optimizer.param_groups for p in g["params"]]
            names = [name for name, _ in model.named_parameters() if "lora_" in name]
            places = [p.data_ptr() for p in trained]
            return [id(p) for p in trained], [id(p) for p in groups], names, places

        before, values, moments = now(), adapters_of(trainer), moments_of(trainer)
        count = len(dynamic_state(model).history)  # type: ignore[union-attr]
        stock(self, model, step)
        assert now() == before
        assert equal(adapters_of(trainer), values)
        assert equal(moments_of(trainer), moments)
        assert all(p.grad is None for p in model.parameters())
        seen.append(len(dynamic_state(model).history) - count)  # type: ignore[union-attr]

    monkeypatch.setattr(QuantizationSchedule, "_point", watched)
    trainer.train()
    assert len(seen) == 3
    assert all(seen)


@pytest.mark.parametrize(
    "options",
    [
        {"lora": {"lora_dropout": 0.2}},
        {"lora": {"use_gradient_checkpointing": True}},
        {"lora": {"use_gradient_checkpointing": "smart"}, "gradient_accumulation_steps": 1},
        {"lora": {"use_fused_layers": False, "use_gradient_checkpointing": "smart"}},
        {"optim": "sgd", "lora": {"use_fused_layers": False, "lora_dropout": 0.2}},
    ],
)
def test_a_run_without_changes_is_the_same_bit_by_bit(
    make: Make, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_before(model: Any, *args: Any, **kwargs: Any) -> LivePrices:
        """Measure in earnest, and find what was found before."""
        measured = measure_live(model, *args, **kwargs)
        return LivePrices(dynamic_state(model).prices, measured.mean_square)  # type: ignore[union-attr]

    monkeypatch.setattr(quantization_schedule, "measure_live", as_before)
    with_schedule = make(SETTINGS, "with", **options)
    with_schedule.train()
    steps = SETTINGS.due_steps(STEPS, 2, with_schedule.args.gradient_accumulation_steps)
    said = lines_of(with_schedule)
    assert said == [f"step {step}: no weight changed precision" for step in steps]
    without = make(False, "without", **options)
    without.train()
    assert not lines_of(without)
    assert losses_of(with_schedule) == losses_of(without)
    assert equal(adapters_of(with_schedule), adapters_of(without))
    if options.get("optim") != "sgd":
        assert equal(moments_of(with_schedule), moments_of(without))
    logs = [read_log(tmp_path / out / "loss_log.jsonl") for out in ("with", "without")]
    losses = [[r["loss"] for r in log if "loss" in r] for log in logs]
    assert losses[0] == losses[1]
    assert len(losses[0]) == STEPS


def test_training_goes_on_over_the_weights_that_are_there(make: Make, points: list[int]) -> None:
    """The fused path's loss after the swaps is that of the model's own code."""
    trainer = make()
    trainer.train()
    batch = next(iter(trainer.get_train_dataloader()))
    model = trainer.model.train()
    with torch.no_grad():
        fused = float(model(**batch, use_cache=False, skip_logits=True).loss)
        with unfused(model):
            stock = float(model(**batch, use_cache=False).loss)
    assert fused == pytest.approx(stock, rel=1e-5)
    assert losses_of(trainer)[-1] < losses_of(trainer)[0]


def test_a_source_that_is_gone_ends_the_schedule_and_not_the_training(
    make: Make, checkpoint: Path, tmp_path: Path
) -> None:
    trainer = make()
    state = dynamic_state(trainer.model)
    assert state is not None
    first = state.map
    for tensor in state.source.files:  # type: ignore[attr-defined]
        state.source.files[tensor] = tmp_path / "gone.safetensors"  # type: ignore[attr-defined]
    trainer.train()
    assert trainer.state.global_step == STEPS
    (line,) = lines_of(trainer)
    assert line.startswith("step 2: training goes on with the precisions that weights have now, ")
    assert "gone.safetensors" in line
    assert state.map is first
    assert schedule_of(trainer).due == []


def test_the_source_may_go_between_two_points(
    make: Make, points: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make()
    state = dynamic_state(trainer.model)
    assert state is not None
    stock = trainer.training_step

    def training_step(*args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 3:
            state.source.files = {}  # type: ignore[attr-defined]
        return stock(*args, **kwargs)

    trainer.training_step = training_step
    trainer.train()
    assert {change.step for change in state.history} == {2}
    assert len(lines_of(trainer)) == 2
    assert lines_of(trainer)[-1] == (
        "step 4: training goes on with the precisions that weights have now, and they do not "
        "change any more: the 16-bit weight of lm_head cannot be read: got UserError: the "
        "checkpoint has no weight of lm_head: got 0 tensors"
    )


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "there is not enough memory to meas"),
        (RuntimeError("two\nlines"), "RuntimeError: two lines"),
    ],
)
def test_what_fails_in_measuring_ends_the_schedule(
    make: Make, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    calls = []

    def broken(*args: Any, **options: Any) -> Any:
        calls.append(1)
        raise error

    monkeypatch.setattr(quantization_schedule, "measure_live", broken)
    trainer = make()
    trainer.train()
    assert trainer.state.global_step == STEPS
    assert len(calls) == 1
    (line,) = lines_of(trainer)
    assert words in line


def test_memory_that_runs_out_halfway_leaves_a_log_of_what_changed(
    make: Make, points: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from colab_qlora.quantization import remaking
    from colab_qlora.quantization.placing import place

    placed: list[str] = []

    def place_once(model: Any, item: Any, rung: str, *args: Any, **options: Any) -> None:
        if placed:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        placed.append(item.name)
        place(model, item, rung, *args, **options)

    monkeypatch.setattr(remaking, "place", place_once)
    trainer = make()
    trainer.train()
    state = dynamic_state(trainer.model)
    assert state is not None
    assert trainer.state.global_step == STEPS
    (change,) = state.history
    assert change.name == placed[0]
    assert {i.name: rung_of(i) for i in weight_items(trainer.model)} == state.map.rungs
    (event,) = [r["event"] for r in read_log(tmp_path / "out" / "loss_log.jsonl") if "event" in r]
    assert event == f"precision changed: {change.name} {change.before} -> {change.after}"


def test_broken_prices_skip_a_point(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def broken_once(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise BrokenPrices("the loss is not finite", got="nan")
        return measure_live(*args, **options)

    monkeypatch.setattr(quantization_schedule, "measure_live", broken_once)
    trainer = make()
    trainer.train()
    assert len(calls) == 3
    assert lines_of(trainer)[0] == (
        "step 2: precision stays as it is at this point, because the loss is not finite: got nan"
    )


def test_a_resumed_run_repeats_no_point(make: Make, points: list[int], tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1}
    broken = make(**saving)
    fail_at(broken, 5, RuntimeError("the session ended"))
    with pytest.raises(RuntimeError, match="the session ended"):
        broken.train()
    assert len(points) == 2
    resumed = make(**saving)
    resumed.train(resume_from_checkpoint=True)
    # the point after step 6 waits until enough micro-batches were seen, two steps after step 5
    assert len(points) == 3
    state = dynamic_state(resumed.model)
    assert state is not None
    assert points[-1] == 4
    # the map and the changes before are those of the checkpoint
    assert list(dict.fromkeys(change.step for change in state.history)) == [2, 4, 7]
    assert state.map.bytes <= state.cap_bytes
    assert {i.name: rung_of(i) for i in weight_items(resumed.model)} == state.map.rungs
    log = read_log(tmp_path / "out" / "loss_log.jsonl")
    assert [r["step"] for r in log.records if "event" in r] == [2, 4, 7]
    seconds = [r["seconds"] for r in log.records]
    assert seconds == sorted(seconds)
    # a run that is finished is taken over with its map
    again = make(**saving)
    again.train(resume_from_checkpoint=True)
    assert len(points) == 3
    assert dynamic_state(again.model).map == state.map  # type: ignore[union-attr]


def test_a_second_training_has_its_own_points(make: Make, points: list[int]) -> None:
    trainer = make(max_steps=5)
    trainer.train()
    assert len(points) == 2  # 20 % and 40 % are 1 and 2 of 5 steps; four micro-batches take two
    trainer.train()
    assert len(points) == 4


@pytest.mark.parametrize("wanted", [None, True])
def test_a_dynamic_model_has_a_schedule_by_default(make: Make, wanted: bool | None) -> None:
    trainer = make(wanted)
    assert schedule_of(trainer).settings == ScheduleSettings()
    assert not lines_of(trainer, "quantization_schedule")


@pytest.mark.parametrize("wanted", [False, ScheduleSettings(enabled=False)])
def test_it_can_be_switched_off(make: Make, wanted: Any) -> None:
    trainer = make(wanted)
    assert not [r for r in trainer._readers() if isinstance(r, QuantizationSchedule)]


def test_one_that_was_passed_as_a_callback_is_the_only_one(make: Make, points: list[int]) -> None:
    mine = QuantizationSchedule(SETTINGS)
    trainer = make(None, trainer={"callbacks": [mine]})
    assert schedule_of(trainer) is mine
    trainer.train()
    assert len(points) == 3


@pytest.mark.parametrize(("wanted", "is_said"), [(None, False), (False, False), (True, True)])
def test_a_model_of_one_precision_has_none(make: Make, wanted: Any, is_said: bool) -> None:
    trainer = make(wanted, quantization="nf4")
    assert not [r for r in trainer._readers() if isinstance(r, QuantizationSchedule)]
    said = lines_of(trainer, "quantization_schedule")
    assert said == (
        [
            "quantization_schedule is not followed: the model was not loaded with "
            'quantization="dynamic"'
        ]
        if is_said
        else []
    )


def test_another_value_is_refused(make: Make) -> None:
    with pytest.raises(UserError, match="quantization_schedule is not understood: got 'yes'"):
        make("yes")
