"""Names that tutorials import from other kits are there, and those without a task say so."""

from __future__ import annotations

from pathlib import Path

import pytest

import colab_qlora

TUTORIAL_NAMES = (
    "FastLanguageModel",
    "FastModel",
    "FastVisionModel",
    "PatchDPOTrainer",
    "PatchFastRL",
    "UnslothTrainer",
    "UnslothTrainingArguments",
    "apply_chat_template",
    "get_chat_template",
    "is_bf16_supported",
    "is_bfloat16_supported",
    "standardize_sharegpt",
    "to_sharegpt",
    "train_on_responses_only",
    "unsloth_train",
)


def test_every_name_can_be_imported() -> None:
    pytest.importorskip("trl")
    for name in TUTORIAL_NAMES:
        assert name in colab_qlora.__all__, name
        assert getattr(colab_qlora, name) is not None


def test_other_names_are_the_same_classes() -> None:
    pytest.importorskip("trl")
    assert colab_qlora.FastModel is colab_qlora.FastLanguageModel
    assert colab_qlora.UnslothTrainer is colab_qlora.SFTTrainer
    assert colab_qlora.UnslothTrainingArguments is colab_qlora.SFTConfig


def test_patching_functions_say_that_they_do_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    trl = pytest.importorskip("trl")
    before = vars(trl.DPOTrainer).copy()
    colab_qlora.PatchDPOTrainer()
    colab_qlora.PatchFastRL("GRPO", colab_qlora.FastLanguageModel)
    assert dict(vars(trl.DPOTrainer)) == before
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("colab_qlora: PatchDPOTrainer() does nothing, as nothing is patched")
    assert lines[1].startswith("colab_qlora: PatchFastRL() does nothing, as nothing is patched")


@pytest.mark.parametrize(
    ("capability", "native"), [((7, 5), False), ((8, 0), True), ((9, 0), True)]
)
def test_a_t4_has_no_bfloat16_whatever_torch_says(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], native: bool
) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a, **k: True)
    assert colab_qlora.is_bfloat16_supported() is native
    assert colab_qlora.is_bf16_supported() is native


def test_a_tutorials_precision_arguments_construct_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from colab_qlora import dtypes

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    # as of a CPU with bfloat16 instructions
    monkeypatch.setattr(dtypes, "pick_compute_dtype", lambda *a: torch.bfloat16)
    assert colab_qlora.is_bfloat16_supported() is False
    transformers.TrainingArguments(
        str(tmp_path),
        fp16=not colab_qlora.is_bfloat16_supported(),
        bf16=colab_qlora.is_bf16_supported(),
    )


def test_unsloth_train_is_train() -> None:
    class Trainer:
        def train(self, **kwargs: object) -> object:
            return kwargs

    assert colab_qlora.unsloth_train(Trainer(), resume_from_checkpoint=True) == {
        "resume_from_checkpoint": True
    }


def test_models_for_images_are_refused_in_one_sentence() -> None:
    with pytest.raises(colab_qlora.UserError, match=r"FastVisionModel.from_pretrained\('a/b'\)"):
        colab_qlora.FastVisionModel.from_pretrained("a/b", load_in_4bit=True)
