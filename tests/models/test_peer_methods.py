"""Methods that tutorials call on a model: they are its own, and take what tutorials pass."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

from colab_qlora import FastLanguageModel, UserError  # noqa: E402

pytestmark = pytest.mark.model
OPTIONS = {
    "max_new_tokens": 4,
    "do_sample": False,
    "return_dict_in_generate": True,
    "output_logits": True,
}


@pytest.fixture(params=[False, True], ids=["base", "adapted"])
def model(request: pytest.FixtureRequest, tiny_model_folder: Path) -> Any:
    loaded, _ = FastLanguageModel.from_pretrained(str(tiny_model_folder), 64, dtype="float32")
    if request.param:
        loaded = FastLanguageModel.get_peft_model(loaded, r=2)
    return FastLanguageModel.for_inference(loaded)


@pytest.fixture
def inputs() -> Any:
    """As of tokenizer.apply_chat_template(..., return_tensors="pt") in transformers 5."""
    ids = torch.tensor([[3, 4, 5, 6], [9, 9, 7, 8]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    return transformers.BatchEncoding({"input_ids": ids, "attention_mask": mask})


def test_generate_takes_ids_and_mask_together(model: Any, inputs: Any) -> None:
    def first(*given: Any, **options: Any) -> Any:
        return model.generate(*given, **OPTIONS, **options).logits[0]

    expected = type(model).generate(model, **inputs, **OPTIONS)
    ids, mask = inputs["input_ids"], torch.ones_like(inputs["attention_mask"])
    for ours in (first(inputs), first(inputs=inputs), first(input_ids=inputs), first(**inputs)):
        assert torch.equal(ours, expected.logits[0])
    # the mask is not dropped, and one that is given goes before it
    unmasked = first(ids, attention_mask=mask)
    assert not torch.equal(unmasked, expected.logits[0])
    assert torch.equal(first(input_ids=inputs, attention_mask=mask), unmasked)
    twin, settings = copy.deepcopy(model), transformers.GenerationConfig(**OPTIONS)
    assert torch.equal(twin.generate(inputs, settings).sequences, expected.sequences)


def test_save_lora_writes_the_adapter(model: Any, tmp_path: Path) -> None:
    if not hasattr(model, "peft_config"):
        with pytest.raises(UserError, match=r"no adapter to save\. Call save_pretrained"):
            model.save_lora(tmp_path / "lora")
        return
    model.save_lora(str(tmp_path / "lora"))
    model.save_pretrained(tmp_path / "plain")
    ours, plain = (tmp_path / name / "adapter_model.safetensors" for name in ("lora", "plain"))
    assert ours.read_bytes() == plain.read_bytes()


def test_what_needs_vllm_is_refused_in_one_sentence(model: Any) -> None:
    for call in (model.load_lora, model.fast_generate):
        with pytest.raises(UserError, match=rf"^{call.name} is not to be had here: .* vLLM\. "):
            call("grpo_saved_lora", lora_request=None)
