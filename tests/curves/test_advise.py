"""The advice: what is changed for which verdict and run, and that it says what to expect."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from colab_qlora.curves.advise import SETTINGS, Advice, advise
from colab_qlora.curves.diagnose import diagnose
from colab_qlora.curves.log import LossLog, read_log
from colab_qlora.curves.remedies.by_verdict import REMEDIES
from colab_qlora.curves.remedies.changes import rate_text
from colab_qlora.curves.remedies.run_facts import USUAL_R, USUAL_RATE, WARMUP_SHARE, facts_of
from colab_qlora.curves.verdicts import NAMES, Diagnosis, Verdict
from colab_qlora.errors import UserError

CURVES = Path(__file__).resolve().parents[2] / "data_samples" / "curves"
GOOD = ("healthy", "still improving", "plateau", "spikes", "skipped steps", "not enough evidence")
# 256 rows in steps of 8: 32 steps an epoch
RUN: dict[str, Any] = {
    "learning_rate": 2e-4,
    "num_train_epochs": 3,
    "max_steps": -1,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "warmup_steps": 5,
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "train_rows": 256,
    "model_name": "org/Llama-3.1-8B-Instruct",
    "compute_dtype": "float16",
}


def diagnosis_of(
    *names: str,
    confidence: str = "likely",
    step: int | None = None,
    because: str = "the numbers say so",
    numbers: dict[str, float] | None = None,
    **reading: Any,
) -> Diagnosis:
    verdicts = tuple(
        Verdict(
            name,
            "info" if name in GOOD and name != "healthy" else "good" if name in GOOD else "fault",
            confidence,
            step,
            because,
            "do something",
            numbers or {},
        )
        for name in names
    )
    usual = {"last_step": 96, "best_step": 60, "best_eval_loss": 1.234, "base_eval_loss": 2.5}
    return Diagnosis(verdicts, **{**usual, **reading})


def without_eval(*names: str, **reading: Any) -> Diagnosis:
    nothing = {"best_step": None, "best_eval_loss": None, "base_eval_loss": None}
    return diagnosis_of(*names, **nothing, **reading)


def settings_of(advice: Advice) -> list[str]:
    return [advice.setting, *(change.setting for change in advice.alternatives)]


def test_every_verdict_has_a_remedy() -> None:
    assert list(REMEDIES) == list(NAMES)


@pytest.mark.parametrize("run", [None, {}, RUN, {"learning_rate": "much", "r": None}])
@pytest.mark.parametrize("has_eval", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_advice_is_whole_for_any_verdict_and_run(name: str, has_eval: bool, run: Any) -> None:
    make = diagnosis_of if has_eval else without_eval
    advice = advise(make(name, step=40), run)
    for change in (advice, *advice.alternatives):
        assert change.setting in SETTINGS
        for words in (change.do, change.why, change.expect):
            assert words
            assert not words.endswith(".")
            assert not re.search(r"None|\d\.\d{6}", words), words
        # a value to pass on is the value that is named
        arguments = change.as_arguments()
        if change.setting in arguments:
            assert arguments[change.setting] == change.then
            assert change.then != change.now
    lines = advice.text().splitlines()
    assert 3 <= len(lines) <= 5
    assert lines[0].startswith("This run: ")
    assert "because the numbers say so" in lines[0]
    assert lines[1].startswith("So next: ")
    assert "sweep" in advice.cannot_tell
    # one change: no two candidates say the same
    assert len({change.do for change in (advice, *advice.alternatives)}) == len(settings_of(advice))


def test_many_epochs_on_few_rows_become_those_of_the_best_step() -> None:
    run = {**RUN, "num_train_epochs": 14, "train_rows": 32, "r": 64, "lora_alpha": 64}
    found = diagnosis_of("overfitting", last_step=56, best_step=13, divergence_step=13)
    advice = advise(found, run)
    # 4 steps an epoch: step 13 is in the fourth, and nearest to the end of the third
    assert (advice.setting, advice.now, advice.then) == ("num_train_epochs", 14, 3)
    assert advice.as_arguments() == {"num_train_epochs": 3}
    assert "no longer rises after step 13" in advice.expect
    assert "near 1.234" in advice.expect
    rank = advice.alternatives[0]
    assert rank.setting == "r"
    # of so few rows more help most; of thousands dropout is the cheaper try
    assert settings_of(advice)[2:4] == ["data", "lora_dropout"]
    many = {**run, "train_rows": 4000, "r": 16}
    assert settings_of(advise(found, many))[1:3] == ["lora_dropout", "data"]
    # alpha / r is 1 before and after
    assert rank.as_arguments() == {"r": 16, "lora_alpha": 16}


def test_rslora_keeps_its_scale_too() -> None:
    run = {**RUN, "r": 64, "lora_alpha": 32, "use_rslora": True}
    rank = next(
        c for c in advise(diagnosis_of("overfitting"), run).alternatives if c.setting == "r"
    )
    arguments = rank.as_arguments()
    assert arguments["lora_alpha"] / math.sqrt(arguments["r"]) == pytest.approx(32 / math.sqrt(64))


def test_one_epoch_is_not_shortened_first() -> None:
    advice = advise(diagnosis_of("overfitting", best_step=20), {**RUN, "num_train_epochs": 1})
    assert (advice.setting, advice.then) == ("learning_rate", 1e-4)
    assert (advice.alternatives[0].setting, advice.alternatives[0].then) == ("max_steps", 20)


def test_a_run_counted_in_steps_stays_so() -> None:
    advice = advise(diagnosis_of("overfitting"), {**RUN, "max_steps": 96})
    assert advice.as_arguments() == {"max_steps": 60}
    longer = advise(diagnosis_of("healthy", "still improving"), {**RUN, "max_steps": 96})
    assert longer.as_arguments() == {"max_steps": 128}


def test_the_log_counts_epochs_where_the_run_does_not_say_its_rows() -> None:
    log = read_log(CURVES / "overfitting.jsonl")
    log.run.pop("train_rows", None)
    found = diagnose(log)
    assert found.best_step is not None
    epochs = next(r["epoch"] for r in log.records if r["step"] == found.best_step)
    assert advise(found, log).as_arguments() == {"num_train_epochs": round(epochs)}
    # the settings alone do not, and a number of steps is right all the same
    assert advise(found, log.run).as_arguments() == {"max_steps": found.best_step}


@pytest.mark.parametrize(
    ("model", "rate", "then"),
    [
        # far above the usual rate of its size: a tenth; else half
        ("Llama-3.1-8B", 2e-2, 2e-3),
        ("Llama-3.1-8B", 4e-4, 2e-4),
        ("SmolLM2-135M", 2e-3, 1e-3),
        ("embedded", 2e-2, 2e-3),
        ("unknown", 3e-4, 1.5e-4),
    ],
)
def test_an_unstable_run_gets_a_lower_rate(model: str, rate: float, then: float) -> None:
    run = {**RUN, "model_name": model, "learning_rate": rate}
    advice = advise(diagnosis_of("unstable", step=30), run)
    assert advice.as_arguments() == {"learning_rate": pytest.approx(then)}
    assert "step 30" in advice.expect


def test_warm_up_and_accumulation_come_next_where_they_are_short() -> None:
    short = {**RUN, "warmup_steps": 0, "per_device_train_batch_size": 2, "train_rows": 400}
    advice = advise(diagnosis_of("unstable"), {**short, "gradient_accumulation_steps": 1})
    assert settings_of(advice)[:3] == [
        "learning_rate",
        "warmup_steps",
        "gradient_accumulation_steps",
    ]
    warmup, accumulation = advice.alternatives[:2]
    # 3 epochs of 200 steps
    assert warmup.then == round(WARMUP_SHARE * 600)
    assert accumulation.as_arguments() == {"gradient_accumulation_steps": 4}
    assert settings_of(advise(diagnosis_of("unstable"), RUN)) == ["learning_rate", "data"]


def test_a_large_gpu_takes_the_larger_batch() -> None:
    run = {**RUN, "per_device_train_batch_size": 1}
    for machine, setting in (
        ({"gpu_total_gib": 14.7}, "gradient_accumulation_steps"),
        ({"gpu_total_gib": 79.0}, "per_device_train_batch_size"),
        (None, "gradient_accumulation_steps"),
    ):
        assert setting in settings_of(advise(diagnosis_of("unstable"), run, machine))


def test_the_environment_of_the_package_serves_as_the_machine() -> None:
    from colab_qlora.environment import Environment

    machine = Environment(gpu_total_gib=39.5, has_native_bf16=True)
    facts = facts_of(diagnosis_of("non-finite"), RUN, machine)
    assert (facts.gpu_gib, facts.has_native_bf16) == (39.5, True)
    advice = advise(diagnosis_of("non-finite", step=40), RUN, machine)
    assert advice.as_arguments() == {"bf16": True, "fp16": False}


def test_numbers_that_break_in_the_warm_up_come_from_the_rows() -> None:
    assert advise(diagnosis_of("non-finite", step=2), RUN).setting == "data"
    advice = advise(diagnosis_of("non-finite", step=40), RUN)
    assert advice.as_arguments() == {"learning_rate": 1e-4}


@pytest.mark.parametrize(
    ("model", "rate", "first", "then"),
    [
        ("Llama-3.1-8B", 1e-6, "learning_rate", 2e-4),
        ("SmolLM2-135M", 5e-5, "learning_rate", 1e-3),
        # a usual rate is seldom the reason
        ("Llama-3.1-8B", 2e-4, "adapters", None),
        ("SmolLM2-135M", 2e-3, "adapters", None),
    ],
)
def test_not_learning(model: str, rate: float, first: str, then: float | None) -> None:
    run = {**RUN, "model_name": model, "learning_rate": rate}
    advice = advise(diagnosis_of("not learning"), run)
    assert (advice.setting, advice.then) == (first, then)
    raised = next(c for c in (advice, *advice.alternatives) if c.setting == "learning_rate")
    assert raised.then > rate


def test_frozen_adapters_are_seen_in_the_diagnosis() -> None:
    records: list[dict[str, Any]] = [{"step": 0, "eval_loss": 2.0}, {"step": 40, "eval_loss": 2.0}]
    records += [{"step": i, "loss": 2.0 + i % 3 / 10, "grad_norm": 0.0} for i in range(1, 41)]
    advice = advise(diagnose(records), {**RUN, "learning_rate": 1e-6})
    assert advice.setting == "adapters"
    assert "gradient norm is above 0" in advice.expect


def test_a_scale_close_to_the_accumulation_names_it() -> None:
    run = {**RUN, "gradient_accumulation_steps": 16}
    near = advise(diagnosis_of("scale mismatch", numbers={"train_over_eval": 16.9}), run)
    assert (near.setting, near.now, near.then) == ("gradient_accumulation_steps", 16, 1)
    assert "16.9" in near.expect
    far = advise(diagnosis_of("scale mismatch", numbers={"train_over_eval": 2.4}), run)
    assert far.setting == "data"


def test_worse_than_base_is_the_rate_only_above_the_usual_one() -> None:
    high = advise(diagnosis_of("worse than base"), {**RUN, "learning_rate": 2e-3})
    assert high.as_arguments() == {"learning_rate": 2e-4}
    assert "below 2.500" in high.expect
    assert advise(diagnosis_of("worse than base"), {**RUN, "learning_rate": 1e-4}).setting == "data"


@pytest.mark.parametrize(
    "name", ["collapsed", "memorising", "not learning", "still improving", "plateau", "healthy"]
)
def test_without_an_eval_one_is_added_first(name: str) -> None:
    advice = advise(without_eval(name), RUN)
    assert advice.setting == "eval_strategy"
    arguments = advice.as_arguments()
    assert arguments["eval_on_start"] is True
    # ten times in 96 steps
    assert arguments["eval_steps"] == 9
    assert "eval loss" in advice.cannot_tell
    assert advise(diagnosis_of(name), RUN).setting != "eval_strategy"


@pytest.mark.parametrize(("rows", "held_out"), [(32, 6), (256, 51), (2000, 100), (50_000, 500)])
def test_the_size_of_the_eval_set(rows: int, held_out: int) -> None:
    advice = advise(without_eval("plateau"), {**RUN, "train_rows": rows})
    assert f"hold out {held_out} of the {rows:,} rows" in advice.do


def test_a_healthy_run_is_left_alone_or_made_longer() -> None:
    keep = advise(diagnosis_of("healthy", "plateau"), RUN)
    assert (keep.setting, keep.as_arguments()) == ("none", {})
    sweep = keep.alternatives[0]
    assert sweep.then == (6.7e-5, 2e-4, 6e-4)
    # a high rate that worked is not corrected
    small = {**RUN, "learning_rate": 3e-3, "model_name": "SmolLM2-135M"}
    assert advise(diagnosis_of("healthy"), small).setting == "none"
    longer = advise(diagnosis_of("healthy", "still improving", best_step=96), RUN)
    assert longer.as_arguments() == {"num_train_epochs": 4}
    assert "below 1.234" in longer.expect
    # rows known by heart are no reason to go on
    stairs = diagnosis_of("healthy", "still improving", "memorising", best_step=96)
    assert advise(stairs, RUN).setting == "none"


def test_a_high_rate_that_is_slow_trains_longer_first() -> None:
    assert advise(diagnosis_of("slow"), RUN).as_arguments() == {"learning_rate": 6e-4}
    high = advise(diagnosis_of("slow"), {**RUN, "learning_rate": 1e-3})
    assert high.setting == "num_train_epochs"


def test_a_suspicion_waits_while_the_run_goes_on() -> None:
    running = diagnosis_of("overfitting", confidence="watch", last_step=70)
    advice = advise(running, RUN)
    assert advice.setting == "none"
    assert "step 70 of 96" in advice.why
    assert advice.alternatives[0].setting == "num_train_epochs"
    finished = advise(diagnosis_of("overfitting", confidence="watch"), RUN)
    assert finished.setting == "num_train_epochs"
    # another verdict that is sure counts for more than a suspicion
    both = diagnosis_of("unstable", confidence="watch").verdicts + diagnosis_of("healthy").verdicts
    chosen = advise(Diagnosis(both, 96, 96, 1.2, 2.5), RUN)
    assert chosen.verdict is not None
    assert chosen.verdict.name == "healthy"


def test_who_knows_that_the_run_is_over_is_believed() -> None:
    found = diagnosis_of("overfitting", confidence="watch", last_step=70)
    # fewer steps than planned look like a run that goes on
    assert advise(found, RUN).setting == "none"
    assert advise(found, RUN, is_finished=True).setting == "num_train_epochs"
    done = diagnosis_of("overfitting", confidence="watch")
    waiting = advise(done, RUN, is_finished=False)
    assert waiting.do.startswith("change nothing yet; let the run go on")
    # without a plan the step stands alone
    waiting = advise(done, None, is_finished=False)
    assert "at step 96 this may still be chance" in waiting.why


def test_the_log_or_the_diagnosis_says_that_the_run_is_over() -> None:
    found = diagnosis_of("overfitting", confidence="watch", last_step=70)
    assert facts_of(found, RUN).is_running
    assert not facts_of(replace(found, is_finished=True), RUN).is_running
    ended = LossLog([{"step": 70, "loss": 1.0}, {"step": 70, "is_end": True}], RUN)
    assert not facts_of(found, ended).is_running
    # what is passed counts for more, and what the diagnosis knows for more than the log
    assert facts_of(replace(found, is_finished=True), RUN, is_finished=False).is_running
    assert facts_of(replace(found, is_finished=False), ended).is_running


def test_a_stopped_run_is_advised_to_do_what_it_planned() -> None:
    falling = diagnosis_of("healthy", "still improving", last_step=40, best_step=40)
    assert advise(falling, RUN).as_arguments() == {"num_train_epochs": 4}
    stopped = advise(falling, RUN, is_finished=True)
    assert stopped.do.startswith("go on to the planned end: trainer.train(resume_from_checkpoint=")
    assert "it was stopped at step 40 of 96" in stopped.why
    assert advise(falling, RUN, is_finished=False).do == "let the run go on"
    # a log that lacks its last few records is that of a whole run
    nearly = diagnosis_of("healthy", "still improving", last_step=90, best_step=90)
    assert advise(nearly, RUN, is_finished=True).as_arguments() == {"num_train_epochs": 4}
    assert advise(diagnosis_of("healthy"), RUN, is_finished=False).do == "let the run go on"
    slow = advise(diagnosis_of("slow", last_step=40), RUN, is_finished=True)
    assert slow.alternatives[0].do.startswith("go on to the planned end")


def test_thin_evidence_of_a_run_that_is_known_to_be_over_or_not() -> None:
    thin = diagnosis_of("not enough evidence", last_step=12)
    assert advise(thin, RUN, is_finished=True).do.startswith("go on to the planned end")
    short = {**RUN, "max_steps": 20}
    assert advise(thin, short, is_finished=True).as_arguments() == {"max_steps": 40}
    running = advise(thin, None, is_finished=False)
    assert (running.do, running.setting) == ("let the run go on", "none")
    assert running.why.endswith("it is at step 12")
    assert advise(thin, RUN, is_finished=False).why.endswith("it is at step 12 of 96")


PLURAL_OF_ONE = re.compile(r"(?<![\d.,=-])1 (epochs|steps|rows|times|evals)\b")
ONE = {
    **RUN,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "warmup_steps": 0,
    "train_rows": 1,
}


@pytest.mark.parametrize("run", [ONE, {**ONE, "train_rows": 9}, {**ONE, "max_steps": 1}, None])
@pytest.mark.parametrize("has_eval", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_one_of_a_thing_is_not_said_in_the_plural(name: str, has_eval: bool, run: Any) -> None:
    make = diagnosis_of if has_eval else without_eval
    for step, epochs in ((1, 1), (5, 1), (5, 2)):
        settings = run and {**run, "num_train_epochs": epochs}
        advice = advise(make(name, step=step, last_step=step), settings)
        for change in (advice, *advice.alternatives):
            for words in (change.do, change.why, change.expect):
                assert not PLURAL_OF_ONE.search(words), words


def test_one_of_a_thing_in_words() -> None:
    one_step = advise(diagnosis_of("not enough evidence", last_step=1), None)
    assert one_step.why.endswith("1 step is too few to read")
    assert one_step.do == "set max_steps=40 (this run had 1 step)"
    few = advise(diagnosis_of("not enough evidence", last_step=12), None)
    assert few.why.endswith("12 steps are too few to read")
    often = advise(without_eval("plateau"), ONE)
    assert often.do.endswith("evaluate before the first step and every step")
    unstable = advise(diagnosis_of("unstable"), {**ONE, "train_rows": 256})
    (rows,) = [c for c in unstable.alternatives if "accumulation" in c.setting]
    assert "averages over 1 row, and" in rows.why
    known = advise(diagnosis_of("not learning"), RUN).alternatives[0]
    assert known.why == "2e-4 is the usual 2e-4"


def test_no_loss_scaler_is_named_where_the_run_has_none() -> None:
    float16 = advise(diagnosis_of("skipped steps"), RUN)
    assert (float16.do, float16.setting) == ("change nothing", "none")
    assert "float16 training skips a step" in float16.why
    for dtype in ("bfloat16", "float32", "torch.bfloat16"):
        advice = advise(diagnosis_of("skipped steps"), {**RUN, "compute_dtype": dtype})
        assert advice.setting == "data"
        assert "float16 training" not in advice.text()


def test_thin_evidence() -> None:
    assert advise(diagnosis_of("not enough evidence", last_step=12), None).then == 40
    assert advise(diagnosis_of("not enough evidence", last_step=12), RUN).setting == "none"
    coarse = advise(diagnosis_of("not enough evidence", last_step=96), RUN)
    assert coarse.as_arguments() == {"logging_steps": 1}


def test_the_recorded_runs() -> None:
    found = {}
    for name in ("healthy", "overfitting", "learning_rate_too_high"):
        log = read_log(CURVES / f"{name}.jsonl")
        found[name] = advise(diagnose(log), log)
    assert found["healthy"].setting in ("none", "num_train_epochs")
    assert found["overfitting"].setting == "num_train_epochs"
    too_high = found["learning_rate_too_high"]
    assert too_high.as_arguments() == {"learning_rate": pytest.approx(too_high.now / 10)}


def test_the_starting_values_are_those_of_the_table() -> None:
    from colab_qlora.teaching.hyperparameters import STARTING_VALUES

    start = {value.name.split()[0]: value.start for value in STARTING_VALUES}
    assert float(start["learning_rate"]) == USUAL_RATE
    assert int(start["r"]) == USUAL_R
    assert start["warmup_steps"].startswith(f"{WARMUP_SHARE:.0%}".replace("%", " %"))


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("org/Llama-3.1-8B-Instruct", 8.0),
        ("HuggingFaceTB/SmolLM2-135M", 0.135),
        ("Qwen3-0.6B", 0.6),
        ("qwen2.5-1.5b-bnb-4bit", 1.5),
        ("embedded", 0.135),
        ("/models/7b-files/mine", None),
        ("gpt2", None),
        (None, None),
    ],
)
def test_the_size_is_read_from_the_name(name: str | None, billions: float | None) -> None:
    assert facts_of(diagnosis_of("healthy"), {"model_name": name}).model_billions == billions


@pytest.mark.parametrize(
    ("rate", "text"),
    [(2e-4, "2e-4"), (6.67e-5, "6.7e-5"), (1.0, "1e0"), (0.00994, "9.9e-3"), (1e-10, "1e-10")],
)
def test_a_rate_in_words(rate: float, text: str) -> None:
    assert rate_text(rate) == text


def test_other_things_are_refused() -> None:
    with pytest.raises(UserError, match="not a diagnosis: got list"):
        advise([{"step": 1, "loss": 2.0}])  # type: ignore[arg-type]
    with pytest.raises(UserError, match="not a mapping: got float"):
        advise(diagnosis_of("healthy"), 2e-4)
