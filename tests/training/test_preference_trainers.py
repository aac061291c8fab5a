"""TRL's preference and reinforcement trainers over our models: the losses of the stock model."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
trl = pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402
from word_model import write_word_model  # noqa: E402

from colab_qlora import FastLanguageModel, PatchDPOTrainer, restore  # noqa: E402
from colab_qlora.models.fuse import fused_layers, state_of  # noqa: E402

pytestmark = pytest.mark.model

PAIRS = [
    {
        "prompt": f"question {i} : what comes after {i} ?",
        "chosen": f"{i + 1} comes after {i} .",
        "rejected": "I do not know that at all , sorry .",
    }
    for i in range(12)
]
STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama over the words of `PAIRS`: few logits, as newer TRL computes log-probabilities
    in a Triton kernel of its own, which a CPU interprets.
    """
    texts = [text for row in PAIRS for text in row.values()]
    return write_word_model(tmp_path_factory.mktemp("words") / "words-llama", texts)


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Any:
    """Train; returns losses, gradient norms, weights and the trainer."""
    return functools.partial(_run, folder, tmp_path)


@pytest.fixture(scope="module")
def stock(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same over the model's own code, each kind once."""
    out = tmp_path_factory.mktemp("stock")
    return functools.cache(lambda kind: _run(folder, out / kind, kind, fused=False))


def _run(
    folder: Path,
    out: Path,
    kind: str,
    mode: Any = False,
    *,
    fused: bool = True,
    is_4bit: bool = False,
    change: Any = None,
    saved: Any = None,
    **options: Any,
) -> dict[str, Any]:
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), 128, dtype="float32", load_in_4bit=is_4bit
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=4,
        random_state=1,
        use_gradient_checkpointing=mode,
        use_fused_layers=fused,
        modules_to_save=saved,
    )
    assert bool(fused_layers(model)) is fused
    if change == "restore":
        restore(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        trainer = _TRAINERS[kind](model, tokenizer, str(out / "out"), bool(mode), options)
        if change == "float32":
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    trained = {n: p.detach().float() for n, p in model.named_parameters() if p.requires_grad}
    state = state_of(model)
    assert state is None or state.stock_passes == {}, "generation alone may take the model's code"
    return {
        "losses": [entry["loss"] for entry in history],
        "norms": [float(entry["grad_norm"]) for entry in history],
        "weights": torch.cat([p.flatten() for p in trained.values()]),
        "history": history,
        "trainer": trainer,
    }


def _arguments(out: str, checkpointing: bool, options: dict[str, Any]) -> dict[str, Any]:
    defaults = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 3,
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": True,
        "report_to": "none",
        "gradient_checkpointing": checkpointing,
        "output_dir": out,
    }
    return {**defaults, **options}


def _dpo(model: Any, tokenizer: Any, out: str, checkpointing: bool, options: Any) -> Any:
    args = trl.DPOConfig(**_arguments(out, checkpointing, options))
    rows = Dataset.from_list(PAIRS)
    return trl.DPOTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)


def _orpo(model: Any, tokenizer: Any, out: str, checkpointing: bool, options: Any) -> Any:
    orpo = pytest.importorskip("trl.experimental.orpo")
    args = orpo.ORPOConfig(max_length=64, **_arguments(out, checkpointing, options))
    rows = Dataset.from_list(PAIRS)
    return orpo.ORPOTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)


def _grpo(model: Any, tokenizer: Any, out: str, checkpointing: bool, options: Any) -> Any:
    generation = {"num_generations": 4, "max_completion_length": 8, "beta": 0.1}
    arguments = _arguments(out, checkpointing, {"per_device_train_batch_size": 4, **options})
    return trl.GRPOTrainer(
        model=model,
        args=trl.GRPOConfig(**{**generation, **arguments}),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in PAIRS]),
        reward_funcs=_letters,
        processing_class=tokenizer,
    )


def _letters(completions: list[str], **kwargs: Any) -> list[float]:
    """A reward that differs between the completions of a prompt."""
    return [len(set(text)) + 0.1 * number for number, text in enumerate(completions)]


_TRAINERS = {"dpo": _dpo, "orpo": _orpo, "grpo": _grpo}


def _same(ours: dict[str, Any], stock: dict[str, Any]) -> None:
    assert len(ours["losses"]) == STEPS
    # a loss near 11 in float32 has 1e-6 as its last place
    assert ours["losses"] == pytest.approx(stock["losses"], rel=1e-5, abs=1e-6)
    assert ours["norms"] == pytest.approx(stock["norms"], rel=1e-4)
    # Adam divides by the gradient's size, which makes large what is rounding alone
    difference = (ours["weights"] - stock["weights"]).norm() / stock["weights"].norm()
    assert difference < 2e-4


@pytest.mark.parametrize("kind", ["dpo", "orpo", "grpo"])
def test_losses_are_those_of_the_unfused_model(run: Any, stock: Any, kind: str) -> None:
    assert any(abs(loss) > 1e-4 for loss in stock(kind)["losses"])
    for mode in (True, "smart"):
        _same(run(kind, mode), stock(kind))


def test_a_restored_model_is_the_stock_one(run: Any, stock: Any) -> None:
    _same(run("dpo", change="restore"), stock("dpo"))


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_adapters_over_4_bits_train_in_float32(
    run: Any, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = run(kind, "smart", is_4bit=True)
    assert {p.dtype for p in ours["trainer"].model.parameters() if p.requires_grad} == {
        torch.float32
    }
    # said at the first batch, and not again
    assert capsys.readouterr().out.count("the trained weights are in float32 again") == 1
    # the same trainer over the stock model, whose adapters are cast back by hand
    _same(ours, run(kind, fused=False, is_4bit=True, change="float32"))


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_tables_over_4_bits_train_in_float32(
    run: Any, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = ["embed_tokens", "lm_head"]
    ours = run(kind, True, is_4bit=True, saved=saved)
    trained = {n: p.dtype for n, p in ours["trainer"].model.named_parameters() if p.requires_grad}
    assert sum(".modules_to_save." in name for name in trained) == 2
    assert set(trained.values()) == {torch.float32}
    assert capsys.readouterr().out.count("the trained weights are in float32 again") == 1
    if kind == "dpo":  # GRPO draws its first answers before the cast is undone
        _same(ours, run(kind, fused=False, is_4bit=True, change="float32", saved=saved))


def test_dpo_learns_to_prefer_what_was_chosen(run: Any) -> None:
    PatchDPOTrainer()
    history = run("dpo", "smart", max_steps=STEPS)["history"]
    assert history[0]["loss"] == pytest.approx(0.693147, abs=1e-5)  # ln 2: nothing learnt yet
    assert history[-1]["rewards/margins"] > 0.1
    assert history[-1]["loss"] < history[0]["loss"] - 0.1


def test_the_reference_is_the_model_before_training(run: Any, stock: Any) -> None:
    """Reference log-probabilities that are computed once, before any step, give the same run."""
    _same(run("dpo", "smart", precompute_ref_log_probs=True), stock("dpo"))


def test_generation_inside_training_has_the_tokens_of_the_stock_model(run: Any, stock: Any) -> None:
    names = ("reward", "completions/mean_length", "num_tokens", "kl")
    ours, theirs = run("grpo", "smart")["history"], stock("grpo")["history"]
    for step in range(STEPS):
        for name in names:
            assert ours[step][name] == pytest.approx(theirs[step][name], rel=1e-4, abs=1e-6), name


def test_the_model_generates_and_trains_on_afterwards(run: Any) -> None:
    result = run("dpo", "smart")
    model = FastLanguageModel.for_inference(result["trainer"].model)
    tokenizer = result["trainer"].processing_class
    inputs = tokenizer(["question 1 :"], return_tensors="pt").to(model.device)
    generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert generated.shape[1] > inputs["input_ids"].shape[1]
    FastLanguageModel.for_training(model)
    assert len(fused_layers(model)) == 2 and model.training
