"""What decoding keeps between answers, when it is made anew, and which models it refuses."""

from __future__ import annotations

import gc
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).resolve().parent))

from decoding_helpers import SIZES, decoded, generated, greedy, prompts, tiny_model  # noqa: E402

from colab_qlora import FastLanguageModel  # noqa: E402
from colab_qlora.decoding import (  # noqa: E402
    decode,
    eager_on_cpu,
    free_decoding,
    kept_steps,
    why_not_graphed,
)
from colab_qlora.decoding.decode_step import DecodeStep  # noqa: E402
from colab_qlora.models.fuse import fuse  # noqa: E402
from colab_qlora.models.host_embedding import bring_back, move_to_host  # noqa: E402
from colab_qlora.quantization.int8_modules import Int8Linear  # noqa: E402


def adapted(family: str = "Llama") -> Any:
    """A tiny model with the adapters "default" and "other", both of which say something."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    model = peft.get_peft_model(tiny_model(family), config)
    model.add_adapter("other", config)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    return model.eval()


def kept(model: Any) -> Any:
    found = kept_steps._KEPT.get(kept_steps.causal_model(model))
    return found and found[1]


def test_the_adapters_that_count_are_those_of_now() -> None:
    model, inputs, options = adapted(), prompts(9, 4), greedy(12)
    found = {}

    def check(name: str) -> None:
        found[name] = decoded(model, inputs, options)
        assert torch.equal(found[name], generated(model, inputs, options)), name

    check("default")
    model.set_adapter("other")
    check("other")
    with model.disable_adapter():
        check("none")
    first = kept(model)
    model.set_adapter("default")
    check("default again")
    assert kept(model) is not first, "what was captured had no adapters"
    assert torch.equal(found["default again"], found["default"])
    model.merge_adapter()
    check("merged")
    model.unmerge_adapter()
    distinct = [found[name].tolist() for name in ("default", "other", "none")]
    assert all(distinct.count(tokens) == 1 for tokens in distinct)


def test_a_step_is_kept_while_an_optimiser_changes_values_in_place() -> None:
    model, inputs, options = adapted(), prompts(9), greedy(12)
    before = decoded(model, inputs, options)
    step = kept(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.default" in name:
                parameter.add_(torch.randn_like(parameter))
    after = decoded(model, inputs, options)
    assert kept(model) is step
    assert torch.equal(after, generated(model, inputs, options))
    assert not torch.equal(after, before)
    # a weight in another place is another weight
    head = kept_steps.causal_model(model).lm_head
    head.weight = torch.nn.Parameter(head.weight.detach().flip(0).clone())
    assert torch.equal(decoded(model, inputs, options), generated(model, inputs, options))
    assert kept(model) is not step


def test_one_step_at_a_time_in_lengths_of_256_tokens() -> None:
    model = tiny_model("Llama")
    decoded(model, prompts(9), greedy(4))
    step = kept(model)
    assert (step.rows, step.length) == (1, 256)
    decoded(model, prompts(20), greedy(236))
    assert kept(model) is step
    decoded(model, prompts(20), greedy(237))
    assert (kept(model).rows, kept(model).length) == (1, 512)
    step = kept(model)
    decoded(model, prompts(9), greedy(4))
    assert kept(model) is step, "512 places are not too many for 13"
    decoded(model, prompts(9, 4), greedy(4))
    assert (kept(model).rows, kept(model).length) == (2, 256)


def test_training_and_the_models_end_free_it(capsys: pytest.CaptureFixture[str]) -> None:
    model = adapted()
    decoded(model, prompts(9), greedy(4))
    step = weakref.ref(kept(model))
    FastLanguageModel.for_training(model)
    gc.collect()
    assert step() is None and kept(model) is None
    model.eval()
    decoded(model, prompts(9), greedy(4))
    step, causal = weakref.ref(kept(model)), weakref.ref(kept_steps.causal_model(model))
    del model
    gc.collect()
    assert causal() is None and step() is None
    assert not capsys.readouterr().out


def test_the_fused_model_and_the_stock_one_share_nothing_stale() -> None:
    model, inputs, options = adapted(), prompts(9, 4), greedy(12)
    expected = generated(model, inputs, options)
    fuse(model)
    assert torch.equal(decoded(model, inputs, options), expected)


def test_int8_linears_are_decoded() -> None:
    model, inputs, options = tiny_model("Llama"), prompts(9, 4), greedy(12)
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, name, Int8Linear.from_weight(getattr(layer.mlp, name).weight))
    assert torch.equal(decoded(model, inputs, options), generated(model, inputs, options))


def test_4_bit_linears_are_decoded(tiny_model_folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model, _ = FastLanguageModel.from_pretrained(str(tiny_model_folder), 64, dtype="float32")
    model = FastLanguageModel.get_peft_model(model, r=4).eval()
    inputs, options = prompts(9, 4), greedy(12)
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    assert torch.equal(decoded(model, inputs, options), generated(model, inputs, options))


def test_a_pass_that_cannot_be_captured_is_told_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, inputs = tiny_model("Llama"), prompts(9)

    def fail(self: Any, causal: Any) -> None:
        try:
            raise RuntimeError("a wait in a capture\nand more")
        except RuntimeError:
            raise RuntimeError("the capture is invalid")  # noqa: B904

    monkeypatch.setattr(DecodeStep, "prepare", fail)
    with eager_on_cpu():
        assert decode(model, inputs, greedy(4)) is None
        monkeypatch.undo()
        assert decode(model, inputs, greedy(4)) is None
        reason = "its pass could not be captured (RuntimeError: a wait in a capture)"
        assert why_not_graphed(model) == reason
    printed = f"colab_qlora: transformers' generate decodes this model: {reason}\n"
    assert capsys.readouterr().out == printed
    with eager_on_cpu():
        assert why_not_graphed(tiny_model("Llama")) == "", "another model's failure"


def test_a_cache_that_does_not_fit_is_no_reason_for_the_next(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, inputs = tiny_model("Llama"), prompts(9)

    def full(self: Any, causal: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.30 GiB")

    monkeypatch.setattr(DecodeStep, "prepare", full)
    with eager_on_cpu():
        assert decode(model, inputs, greedy(4)) is None
        monkeypatch.undo()
        assert torch.equal(decoded(model, inputs, greedy(4)), generated(model, inputs, greedy(4)))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["scaling", "eps"])
def test_a_number_that_a_pass_computes_with_counts(name: str) -> None:
    model, inputs = tiny_model("Llama"), prompts(9)
    before = decoded(model, inputs, greedy(12))
    layer = model.model.layers[0]
    if name == "scaling":
        layer.self_attn.scaling *= 40
    else:
        layer.input_layernorm.variance_epsilon = 50.0
    found = decoded(model, inputs, greedy(12))
    assert torch.equal(found, generated(model, inputs, greedy(12)))
    assert not torch.equal(found, before)


def test_a_model_that_is_not_decoded_any_more_keeps_nothing() -> None:
    model, inputs = tiny_model("Llama"), prompts(9)
    decoded(model, inputs, greedy(4))
    assert kept(model) is not None
    assert decode(model, inputs, greedy(4)) is None, "on a CPU, without the tests' switch"
    assert kept(model) is None


def test_a_step_in_use_is_nobody_elses() -> None:
    model, inputs = tiny_model("Llama"), prompts(9)
    step = kept_steps.borrow_step(model, 1, 9, 4)
    assert isinstance(step, DecodeStep)
    with eager_on_cpu():
        assert decode(model, inputs, greedy(4)) is None
        kept_steps.give_back(model)
        assert decode(model, inputs, greedy(4)) is not None
    free_decoding(model)
    assert kept(model) is None


def _refused() -> dict[str, tuple[Any, str]]:
    plain, hooked, replaced, host = (tiny_model("Llama") for _ in range(4))
    hooked.model.layers[1].register_forward_hook(lambda module, args, output: None)
    replaced.model.norm.forward = replaced.model.norm.forward
    untied = {"tie_word_embeddings": False}
    host = tiny_model("Llama", **untied)
    move_to_host(host)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    ia3 = peft.get_peft_model(
        plain, peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    )
    prompt = peft.get_peft_model(
        tiny_model("Llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=97)
    )
    flex = tiny_model("Llama")
    flex.config._attn_implementation = "flex_attention"
    return {
        "window": (tiny_model("Mistral", sliding_window=8), "slides over a window"),
        "rotation": (tiny_model("Llama", rope_parameters=rope), "rotation is 'dynamic'"),
        "hooks": (hooked, "model.layers.1 has hooks"),
        "forward": (replaced, "forward of model.norm is replaced"),
        "host": (host, "embedding is in host memory"),
        "ia3": (ia3, "its adapters are IA3"),
        "prompt": (prompt, "its adapters are PROMPT_TUNING"),
        "architecture": (gpt2, "GPT2LMHeadModel is none of LlamaForCausalLM"),
        "attention": (flex, "'flex_attention', which takes no mask"),
    }


def test_models_that_are_refused_say_why() -> None:
    with eager_on_cpu():
        for name, (model, reason) in _refused().items():
            assert reason in why_not_graphed(model), name
            assert decode(model.eval(), prompts(9), greedy(4)) is None
    plain = tiny_model("Llama")
    assert why_not_graphed(plain) == "the model is on the CPU"
    with eager_on_cpu():
        assert why_not_graphed(plain) == ""


def test_an_embedding_that_came_back_is_decoded() -> None:
    model, inputs = tiny_model("Llama", tie_word_embeddings=False), prompts(9)
    move_to_host(model)
    bring_back(model, torch.device("cpu"))
    found = decoded(model, inputs, greedy(8))
    assert torch.equal(found, generated(model, inputs, greedy(8)))
    assert SIZES["vocab_size"] > int(found.max())
