"""Swapping and undoing: names, hooks, saving, generation and evaluation stay what they were."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from colab_qlora import FastLanguageModel, UserError, describe, restore  # noqa: E402
from colab_qlora.models.adapters import set_gradient_checkpointing  # noqa: E402
from colab_qlora.models.fuse import fuse, fused_layers, state_of  # noqa: E402
from colab_qlora.models.fused_state import ATTRIBUTE  # noqa: E402

pytestmark = pytest.mark.model
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def adapted(tiny_model_folder: Path) -> Any:
    model, _ = FastLanguageModel.from_pretrained(str(tiny_model_folder), 64, dtype="float32")
    model = FastLanguageModel.get_peft_model(
        model, r=4, use_gradient_checkpointing=False, init_lora_weights="gaussian"
    )
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    return model


@pytest.fixture
def ids() -> Any:
    torch.manual_seed(4)
    return torch.randint(5, 500, (2, 12)).to(DEVICE)


def names(model: Any) -> tuple[list[str], list[str], list[str]]:
    modules = [name for name, _ in model.named_modules()]
    return modules, [n for n, _ in model.named_parameters()], list(model.state_dict())


def test_names_stay_and_restore_gives_everything_back(adapted: Any, ids: Any) -> None:
    fused = names(adapted)
    classes = {n: type(m) for n, m in adapted.named_modules()}
    loss = adapted(input_ids=ids, labels=ids).loss
    assert restore(adapted) is adapted
    assert names(adapted) == fused
    assert not fused_layers(adapted)
    assert not [m for m in adapted.modules() if "colab_qlora" in type(m).forward.__module__]
    changed = {n for n, m in adapted.named_modules() if type(m) is not classes[n]}
    assert {n.rsplit(".", 1)[-1] for n in changed} == {"0", "1", "norm", "model"}
    assert not any(m._forward_pre_hooks for m in adapted.modules())
    stock = adapted(input_ids=ids, labels=ids).loss
    assert float(stock.detach()) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert state_of(adapted) is None
    restore(adapted)
    state = fuse(adapted)
    assert fuse(adapted) is state
    again = adapted(input_ids=ids, labels=ids).loss
    assert torch.equal(again, loss)


def test_nothing_outside_the_model_changes(tiny_model_folder: Path) -> None:
    from transformers.models.llama import modeling_llama

    classes = [c for c in vars(modeling_llama).values() if isinstance(c, type)]
    before = [dict(vars(c)) for c in classes]
    other, _ = FastLanguageModel.from_pretrained(str(tiny_model_folder), 64, dtype="float32")
    model, _ = FastLanguageModel.from_pretrained(str(tiny_model_folder), 64, dtype="float32")
    FastLanguageModel.get_peft_model(model, r=2)
    assert [dict(vars(c)) for c in classes] == before
    assert not fused_layers(other)
    assert fused_layers(model)


def test_classes_are_subclasses_so_hooks_by_class_hold(adapted: Any, ids: Any) -> None:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    assert all(isinstance(layer, LlamaDecoderLayer) for layer in fused_layers(adapted))
    seen: list[torch.Size] = []
    fused_layers(adapted)[0].register_forward_hook(lambda m, args, out: seen.append(out.shape))
    with torch.no_grad():
        out = adapted(input_ids=ids, output_hidden_states=True, use_cache=False)
    assert len(out.hidden_states) == 3
    assert seen == [torch.Size([2, 12, 64])]
    with torch.no_grad():
        adapted(input_ids=ids, use_cache=False)
    state = state_of(adapted)
    assert state is not None
    assert not state.stock_passes  # hooks that transformers left behind do not count


def test_generation_is_the_models_own(adapted: Any, ids: Any) -> None:
    FastLanguageModel.for_inference(adapted)
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    fused = adapted.generate(input_ids=ids, **options)
    state = state_of(adapted)
    assert state is not None
    assert not state.stock_passes
    restore(adapted)
    assert torch.equal(adapted.generate(input_ids=ids, **options), fused)


def test_a_left_padded_batch_generates_as_before(adapted: Any, ids: Any) -> None:
    FastLanguageModel.for_inference(adapted)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    fused = adapted.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    restore(adapted)
    stock = adapted.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert torch.equal(stock, fused)


def test_logits_are_there_in_evaluation_and_when_asked_for(adapted: Any, ids: Any) -> None:
    trained = adapted(input_ids=ids, labels=ids)
    assert trained.logits is None
    asked = adapted(input_ids=ids, labels=ids, skip_logits=False)
    assert asked.logits.shape[:2] == (2, 12)
    assert float(asked.loss.detach()) == pytest.approx(float(trained.loss.detach()), rel=1e-5)
    by_place = adapted(ids, torch.ones_like(ids), labels=ids)
    assert by_place.logits is None
    assert torch.equal(by_place.loss, trained.loss)
    assert adapted(input_ids=ids).logits is not None
    adapted.eval()
    with torch.no_grad():
        evaluated = adapted(input_ids=ids, labels=ids)
        short = adapted(input_ids=ids, labels=ids, skip_logits=True)
        as_tuple = adapted(input_ids=ids, labels=ids, skip_logits=True, return_dict=False)
    assert evaluated.logits is not None
    assert short.logits is None
    assert float(short.loss) == pytest.approx(float(evaluated.loss), rel=1e-5)
    assert torch.equal(as_tuple[0], short.loss)


def test_second_backward_is_refused_in_words(adapted: Any, ids: Any) -> None:
    loss = adapted(input_ids=ids, labels=ids).loss
    loss.backward(retain_graph=True)
    with pytest.raises(UserError, match="a second backward pass through a fused layer"):
        loss.backward()
    loss = adapted(input_ids=ids, labels=ids).loss
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in adapted.parameters() if p.grad is not None)


def test_checkpointing_keeps_little_but_the_layer_inputs(adapted: Any, ids: Any) -> None:
    def kept_bytes() -> int:
        loss = adapted(input_ids=ids, labels=ids).loss
        node, nodes = loss.grad_fn, []
        while node is not None:
            nodes.append(node)
            node = next((n for n, _ in node.next_functions if n is not None), None)
        saved = [n.saved for n in nodes if hasattr(n, "saved") and n.saved is not None]
        assert len(saved) == 2
        tensors = [t for s in saved for t in s._tensors.values()]
        loss.backward()
        return sum(t.numel() * t.element_size() for t in tensors) // len(saved)

    everything = kept_bytes()
    first = {n: p.grad.clone() for n, p in adapted.named_parameters() if p.grad is not None}
    adapted.zero_grad()
    set_gradient_checkpointing(adapted, True)
    assert kept_bytes() == ids.numel() * (64 + 4) * 4  # and the rank-4 products of down_proj
    for name, parameter in adapted.named_parameters():
        if parameter.grad is not None:
            error = (parameter.grad - first[name]).norm() / first[name].norm()
            assert float(error) < 1e-5, name
    # h0, q, k, v, o, lse, h1, gate, up, two 1 / rms and the rank-4 products, in float32
    heads, width, inner, ranks = 64 + 2 * 32, 64, 128, 7 * 4
    per_token = 4 * (3 * width + heads + 4 + 2 * inner + 2 + ranks)
    assert everything == ids.numel() * per_token


def test_saving_and_loading_the_adapter(adapted: Any, ids: Any, tmp_path: Path) -> None:
    adapted.save_pretrained(tmp_path)
    again, _ = FastLanguageModel.from_pretrained(str(tmp_path), 64, dtype="float32")
    assert fused_layers(again)
    adapted.eval()
    again.eval()
    with torch.no_grad():
        one = adapted(input_ids=ids, labels=ids).loss
        two = again(input_ids=ids, labels=ids).loss
    assert torch.equal(one, two)


def _loss_and_gradients(model: Any, ids: Any) -> tuple[Any, dict[str, Any]]:
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_a_copy_is_a_model_of_its_own(adapted: Any, ids: Any) -> None:
    loss, _ = _loss_and_gradients(adapted, ids)
    twin = copy.deepcopy(adapted)
    assert len(fused_layers(twin)) == 2
    assert _scratch_bytes(adapted) > 0
    assert _scratch_bytes(twin) == 0
    restore(adapted)
    assert torch.equal(twin(input_ids=ids, labels=ids).loss, loss)
    assert len(fused_layers(twin)) == 2


def _scratch_bytes(model: Any) -> int:
    state = state_of(model)
    assert state is not None
    return state.scratch.bytes_held()


@pytest.mark.parametrize("checkpointing", [False, "smart"])
def test_a_whole_model_is_saved_and_loaded(
    adapted: Any, ids: Any, tmp_path: Path, checkpointing: bool | str
) -> None:
    set_gradient_checkpointing(adapted, checkpointing)
    loss, gradients = _loss_and_gradients(adapted, ids)
    assert _scratch_bytes(adapted) > 0
    torch.save(adapted, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert _scratch_bytes(again) == 0
    ours, loaded = state_of(adapted), state_of(again)
    assert ours is not None and loaded is not None
    assert ours.last_shape is not None
    assert loaded.last_shape is None  # a batch's masks are not part of a model
    assert names(again) == names(adapted)
    assert [type(m) for m in again.modules()] == [type(m) for m in adapted.modules()]
    again_loss, again_gradients = _loss_and_gradients(again, ids)
    assert torch.equal(again_loss, loss)
    assert gradients
    torch.testing.assert_close(again_gradients, gradients)
    # the settings and hooks that were loaded are the loaded model's own
    assert all(vars(layer)[ATTRIBUTE] is state_of(again) for layer in fused_layers(again))
    assert restore(again) is again
    assert not any(m._forward_pre_hooks for m in again.modules())
    stock = again(input_ids=ids, labels=ids).loss
    assert float(stock.detach()) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert len(fused_layers(adapted)) == 2


def test_other_architectures_say_so_and_train(ids: Any) -> None:
    from peft import LoraConfig, get_peft_model

    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 512, "n_positions": 64}
    model = transformers.AutoModelForCausalLM.from_config(transformers.GPT2Config(**sizes)).to(
        DEVICE
    )
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"]))
    fuse(model)
    words = str(describe(model))
    assert "the logits of GPT2LMHeadModel are not known here" in words
    model(input_ids=ids, labels=ids).loss.backward()
    restore(model)


def test_a_family_without_fused_layers_gets_norms_and_loss(ids: Any) -> None:
    from peft import LoraConfig, get_peft_model

    config = transformers.GraniteConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=512,
        pad_token_id=0,
        max_position_embeddings=64,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).to(DEVICE)
    model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    stock = model(input_ids=ids, labels=ids).loss
    fuse(model)
    words = str(describe(model))
    assert "GraniteDecoderLayer  its own code" in words
    assert "GraniteDecoderLayer is none of LlamaDecoderLayer" in words
    assert "labelled rows only" in words
    # two in each layer, and the last one
    assert [s.count for s in describe(model).swaps if s.now == "fused norm"] == [5]
    loss = model(input_ids=ids, labels=ids).loss
    assert float(loss.detach()) == pytest.approx(float(stock.detach()), rel=1e-5)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(input_ids=ids, labels=ids).loss, loss)
    assert str(describe(again)) == words
    loss.backward()


def test_attention_weights_take_the_models_own_code(adapted: Any, ids: Any) -> None:
    adapted.eval()
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
        adapted.set_attn_implementation("eager")
        out = adapted(input_ids=ids, output_attentions=True, use_cache=False)
    assert len(out.attentions) == 2
    assert out.attentions[0].shape == (2, 4, 12, 12)
    assert torch.allclose(out.logits, expected, atol=1e-4)
    assert "attention weights were asked for" in str(describe(adapted))


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_the_models_own_code_sees_right_padding_and_window(
    adapted: Any, ids: Any, kind: str
) -> None:
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    model = adapted.get_base_model()
    labels = ids.masked_fill(mask == 0, -100)
    adapted.set_attn_implementation(kind)
    expected = adapted(input_ids=ids, attention_mask=mask, labels=labels).loss
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 1e-9  # a reason for the model's own code, and no more
    found = adapted(input_ids=ids, attention_mask=mask, labels=labels).loss
    assert "attention dropout" in str(describe(adapted))
    assert abs(float((found - expected).detach())) < 1e-4


def test_a_label_outside_the_vocabulary_is_named(adapted: Any, ids: Any) -> None:
    labels = ids.clone()
    labels[0, 3] = 10**6
    with pytest.raises(ValueError, match="labels.*1000000"):
        adapted(input_ids=ids, labels=labels)
    assert torch.isfinite(adapted(input_ids=ids, labels=ids).loss)
