"""Recorded layers give what layers give that run as ever, bit by bit, whatever happens in between.

On a CPU a recording does its work again at the same addresses (`Rerun`), which is all that the code
around it can tell; on a GPU they are CUDA graphs.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parent.parent / "layers"))

from layer_helpers import FAMILIES, GEMMA, batch, gradients  # noqa: E402
from peft import LoraConfig  # noqa: E402
from recording_helpers import (  # noqa: E402
    PASSES,
    differing,
    fused,
    passes,
    record,
    recorded_model,
)

from colab_qlora import FastLanguageModel, UserError  # noqa: E402
from colab_qlora.layers.saved import KEEP_INPUT  # noqa: E402
from colab_qlora.models.fuse import fuse, restore, state_of  # noqa: E402
from colab_qlora.models.pass_graphs import PassGraphs  # noqa: E402
from colab_qlora.models.smart import free_recordings, plan_batches, runtime_of  # noqa: E402

WINDOWED = ("mistral_window", "phi4_mini", "gemma2", "gemma3")


@pytest.fixture
def recorded() -> tuple[Any, dict[str, Any], dict[str, Any], PassGraphs]:
    return recorded_model()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_family_gives_the_same_bits(family, dtype):
    model = fused(family, dtype)
    batches = [batch(), batch(rows=1, length=7), batch("right", rows=3)]
    expected = [gradients(model, inputs) for inputs in batches]
    graphs = record(model)
    for _ in range(PASSES):
        for inputs, right in zip(batches, expected, strict=True):
            assert not differing(gradients(model, inputs), right)
    # padding comes as a mask to layers with a window
    assert len(graphs.shapes) == len(batches) - (family in WINDOWED)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_cuda_graphs_give_the_same_bits_in_16_bit(family, dtype):
    model = fused(family, dtype)
    batches = [batch(length=16), batch(rows=1, length=8)]
    expected = [gradients(model, inputs) for inputs in batches]
    graphs = record(model)
    for _ in range(PASSES):
        for inputs, right in zip(batches, expected, strict=True):
            assert not differing(gradients(model, inputs), right)
    assert len(graphs.shapes) == len(batches)


def test_layers_that_recompute_are_recorded_too():
    model = fused()
    state = state_of(model)
    assert state is not None
    state.plan, state.mlp_tokens = KEEP_INPUT, 8
    expected = gradients(model, batch())
    graphs = record(model)
    assert not any(differing(found, expected) for found in passes(model, batch()))
    assert graphs.shapes


def test_micro_batches_add_up(recorded):
    model, inputs, _, _ = recorded
    other = batch(length=9)

    def sums() -> dict[str, Any]:
        model.zero_grad()
        for each in (inputs, inputs, other, inputs):
            model(**each).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    found = sums()
    restore(model)
    fuse(model)
    assert not differing(found, sums())


def test_two_passes_under_way(recorded):
    model, inputs, expected, _ = recorded
    model.zero_grad()
    first, second = model(**inputs).loss, model(**inputs).loss
    second.backward()
    model.zero_grad()
    first.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert not differing({"loss": first.detach(), **grads}, expected)


def test_a_loss_that_is_dropped(recorded):
    model, inputs, expected, graphs = recorded
    loss = model(**inputs).loss
    del loss
    assert not any(differing(found, expected) for found in passes(model, inputs, 2))
    # in the pass that records, it leaves half a recording
    graphs.clear()
    passes(model, inputs, 2)
    model(**inputs)
    assert not any(differing(found, expected) for found in passes(model, inputs))
    assert len(graphs.shapes) == 1


def test_evaluation_in_between(recorded):
    model, inputs, expected, _ = recorded
    loss = model(**inputs).loss
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(**inputs).loss, expected["loss"])
    model.train()
    model.zero_grad()
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert not differing({"loss": loss.detach(), **grads}, expected)


def test_evaluation_and_passes_without_adapters_leave_recordings(recorded):
    model, inputs, expected, graphs = recorded
    recordings = graphs._recorded.items()
    for _ in range(4):
        model.eval()
        with torch.no_grad():
            model(**inputs, use_cache=False)
        model.train()
        with model.disable_adapter(), torch.no_grad():
            model(**inputs, use_cache=False)
        assert not differing(gradients(model, inputs), expected)
    assert graphs._recorded.items() == recordings


def test_a_mask_or_documents_of_a_recorded_shape_count(recorded):
    model, inputs, expected, graphs = recorded
    padded = batch("left")
    packed = {
        **batch(),
        "position_ids": torch.arange(11, device=inputs["labels"].device).repeat(2, 1),
    }
    packed["position_ids"][:, 6:] -= 6
    moved = {**batch(), "position_ids": packed["position_ids"][:1] * 0}
    moved["position_ids"] += torch.arange(3, 14, device=inputs["labels"].device)
    found = [gradients(model, each) for each in (padded, packed, moved)]
    assert graphs.shapes
    assert not differing(gradients(model, inputs), expected)
    restore(model)
    fuse(model)
    for each, mine in zip((padded, packed, moved), found, strict=True):
        assert not differing(mine, gradients(model, each))
        assert differing(mine, expected)


def test_a_batch_with_a_mask_costs_no_recording(monkeypatch):
    """Padding comes as a mask to the second layer alone, which runs as ever then."""
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    config = transformers.Gemma3TextConfig(**{**GEMMA, "layer_types": kinds})
    monkeypatch.setitem(FAMILIES, "full first", config)
    model = fused("full first")
    plain, padded = batch(), batch("right")
    expected, other = gradients(model, plain), gradients(model, padded)
    graphs = record(model)
    passes(model, plain)
    recordings = graphs._recorded.items()
    assert len(recordings) == 1
    for _ in range(3):
        assert not differing(gradients(model, padded), other)
        assert not differing(gradients(model, plain), expected)
    assert graphs._recorded.items() == recordings


def test_layers_of_one_kind_whose_tables_differ():
    """A backward pass reads the tables again, when layers above have had theirs."""
    model = fused("gemma3")
    for layer in model.get_base_model().model.layers:
        layer.self_attn.sliding_window = None
    expected = gradients(model, batch())
    graphs = record(model)
    assert not any(differing(found, expected) for found in passes(model, batch()))
    assert graphs.shapes


def test_plans_that_differ_in_settings_alone_have_a_recording_each():
    model = fused()
    plan_batches(model)
    runtime = runtime_of(model)
    assert runtime is not None
    gradients(model, batch())
    ((kind, plan),) = runtime.plans.items()
    assert plan.step is not None
    settings = replace(plan.step.batch.settings, mlp_tokens=8)
    step = replace(plan.step, batch=replace(plan.step.batch, settings=settings))
    plans = (plan, replace(plan, step=step))

    def one_each() -> list[dict[str, Any]]:
        found = []
        for each in plans:
            runtime.plans[kind] = each
            found.append(gradients(model, batch()))
        return found

    expected = one_each()
    graphs = record(model)
    for _ in range(PASSES):
        assert not any(map(differing, one_each(), expected))
    assert len(graphs.shapes) == 2


def test_another_scale_counts(recorded):
    model, inputs, expected, _ = recorded
    model.get_base_model().model.layers[1].self_attn.scaling *= 2
    found = gradients(model, inputs)
    restore(model)
    fuse(model)
    assert not differing(found, gradients(model, inputs))
    assert differing(found, expected)


def test_a_layer_that_is_called_by_itself_is_no_part_of_a_pass(recorded):
    model, inputs, expected, _ = recorded
    trunk = model.get_base_model().model
    model.zero_grad()
    loss = model(**inputs).loss
    hidden = torch.randn(2, 11, 48, device=loss.device).requires_grad_()
    places = torch.arange(11, device=loss.device)[None]
    tables = trunk.rotary_emb(hidden, places)
    trunk.layers[1](hidden, position_embeddings=tables)
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert not differing({"loss": loss.detach(), **grads}, expected)


def test_a_gradient_that_is_watched_is_the_watchers(recorded):
    model, inputs, expected, _ = recorded
    seen: list[torch.Tensor] = []
    layer = model.get_base_model().model.layers[2]
    handle = layer.register_full_backward_hook(lambda module, into, out: seen.append(out[0]))
    assert not differing(gradients(model, inputs), expected)
    kept = seen[0].clone()
    gradients(model, batch(length=9))
    handle.remove()
    assert torch.equal(seen[0], kept)


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("number", [0, 1])
def test_a_gradient_between_two_layers_is_the_watchers(recorded, number):
    """That of one layer's output is the next one's, whose recording would write over it."""
    model, inputs, expected, _ = recorded
    seen: list[torch.Tensor] = []
    layer = model.get_base_model().model.layers[number]
    handle = layer.register_full_backward_pre_hook(lambda module, out: seen.append(out[0]))
    assert not differing(gradients(model, inputs), expected)
    kept = seen[0].clone()
    model.zero_grad()
    (3 * model(**inputs).loss).backward()
    handle.remove()
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], kept)
    assert not differing(gradients(model, inputs), expected)


@pytest.mark.parametrize("is_global", [False, True], ids=["of one layer", "of all modules"])
def test_what_a_layer_is_given_is_the_watchers(recorded, is_global):
    model, inputs, expected, _ = recorded
    seen: list[torch.Tensor] = []
    layer = model.get_base_model().model.layers[2]

    def keep(module: Any, args: tuple[Any, ...]) -> None:
        if module is layer:
            seen.append(args[0].detach())

    everywhere = torch.nn.modules.module.register_module_forward_pre_hook
    handle = everywhere(keep) if is_global else layer.register_forward_pre_hook(keep)
    try:
        assert not differing(gradients(model, inputs), expected)
        kept = seen[0].clone()
        gradients(model, {**inputs, "input_ids": inputs["input_ids"].flip(1)})
    finally:
        handle.remove()
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], kept)


def test_a_forward_that_is_replaced_is_called(recorded):
    """As accelerate wraps one, before or after there are recordings."""
    model, inputs, expected, _ = recorded
    layer = model.get_base_model().model.layers[1]
    count: list[torch.Tensor] = []
    own = layer.forward

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        out = own(*args, **kwargs)
        count.append(out.detach())
        return out

    layer.forward = wrapped
    assert not any(differing(found, expected) for found in passes(model, inputs))
    assert len(count) == PASSES
    assert len({out.data_ptr() for out in count}) == PASSES, "its output is not kept for one pass"
    del layer.forward
    assert not differing(gradients(model, inputs), expected)


def test_hidden_states_that_were_asked_for_once(recorded):
    model, inputs, expected, graphs = recorded
    states = model(**inputs, output_hidden_states=True).hidden_states
    kept = [state.clone() for state in states]
    for found in passes(model, inputs):
        assert not differing(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(states, kept, strict=True))
    again = graphs.graph_of
    count: list[bool] = []
    graphs.graph_of = lambda *args: (count.append(True), again(*args))[1]
    gradients(model, inputs)
    assert len(count) == 3, "layers ask for their recordings again"


def test_nothing_is_said_or_made_where_nothing_can_be_recorded():
    said: list[str] = []
    model = fused(lora_dropout=0.5)
    graphs = record(model, said)
    passes(model, batch())
    assert not graphs.shapes and not said


def freeze(model: Any) -> None:
    layer = model.get_base_model().model.layers[1]
    layer.self_attn.q_proj.lora_A["default"].weight.requires_grad_(False)


def scale(model: Any) -> None:
    model.get_base_model().model.layers[1].mlp.down_proj.scaling["default"] = 0.3


def move(model: Any) -> None:
    """New storages, as an optimiser makes that lays all adapters in a row."""
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.5


def write(model: Any) -> None:
    """As an optimiser's step."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(0.5)


def switch(model: Any) -> None:
    torch.manual_seed(5)
    other = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    dtype = next(model.parameters()).dtype
    model.add_adapter("other", other)
    model.to(dtype)
    model.set_adapter("other")


def train_a_norm(model: Any) -> None:
    model.get_base_model().model.layers[1].input_layernorm.weight.requires_grad_(True)


@pytest.mark.parametrize("change", [freeze, scale, move, write, switch, train_a_norm])
def test_what_changes_between_passes_counts(recorded, change):
    model, inputs, before, graphs = recorded
    change(model)
    found = passes(model, inputs)
    assert graphs.shapes
    restore(model)
    fuse(model)
    expected = gradients(model, inputs)
    assert not any(differing(each, expected) for each in found)
    assert expected.keys() != before.keys() or differing(expected, before)


def test_disabled_adapters(recorded):
    model, inputs, expected, _ = recorded
    with model.disable_adapter(), torch.no_grad():
        plain = model(**inputs).loss
    assert not torch.equal(plain, expected["loss"])
    assert not differing(gradients(model, inputs), expected)


def test_dropout_is_not_recorded():
    model, inputs = fused(lora_dropout=0.5), batch()
    graphs = record(model)
    losses = {float(model(**inputs).loss.detach()) for _ in range(PASSES)}
    assert len(losses) == PASSES
    assert not graphs.shapes


def test_documents_and_masks_are_not_recorded():
    model = fused()
    packed = batch(rows=1)
    packed["position_ids"] = torch.tensor([[*range(5), *range(6)]], device=packed["labels"].device)
    for inputs in (packed, batch("left")):
        expected = gradients(model, inputs)
        graphs = record(model)
        assert not any(differing(found, expected) for found in passes(model, inputs))
        assert not graphs.shapes


def test_a_layer_that_is_watched_runs_as_ever(recorded):
    model, inputs, expected, _ = recorded
    seen: list[Any] = []
    layer = model.get_base_model().model.layers[1]
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(output))
    assert not differing(gradients(model, inputs), expected)
    kept = seen[0].clone()
    gradients(model, batch(length=11))
    handle.remove()
    assert torch.equal(seen[0], kept)
    assert not differing(gradients(model, inputs), expected)


def test_the_last_output_is_the_callers(recorded):
    model, inputs, _, _ = recorded
    trunk = model.get_base_model().model
    ids = inputs["input_ids"]
    kept = [trunk(input_ids=ids).last_hidden_state for _ in range(PASSES)]
    assert all(torch.equal(kept[0], each) for each in kept)
    trunk(input_ids=ids.flip(1))
    assert torch.equal(kept[0], kept[-1])


def test_the_inputs_gradient_is_the_callers():
    model = fused()
    graphs = record(model)
    embeds = model.get_base_model().get_input_embeddings()(batch()["input_ids"]).detach()
    leaves = [(embeds * factor).requires_grad_() for factor in (1, 1, 1, 1, 2)]
    for leaf in leaves:
        model(inputs_embeds=leaf, labels=batch()["labels"]).loss.backward()
    assert graphs.shapes
    assert all(torch.equal(leaf.grad, leaves[0].grad) for leaf in leaves[:4])
    assert not torch.equal(leaves[4].grad, leaves[0].grad)


def test_wrong_backward_passes_are_refused(recorded):
    model, inputs, expected, _ = recorded
    loss = model(**inputs).loss
    loss.backward(retain_graph=True)
    with pytest.raises(UserError, match="a second backward pass through a fused layer"):
        loss.backward()
    loss = model(**inputs).loss
    write(model)
    with pytest.raises(UserError, match="an adapter was changed between"):
        loss.backward()


def test_switched_off(recorded):
    model, inputs, expected, graphs = recorded
    graphs.is_on = False
    assert not differing(gradients(model, inputs), expected)


def test_a_copy_of_a_model_has_no_recordings(recorded):
    model, inputs, expected, _ = recorded
    other = copy.deepcopy(model)
    state = state_of(other)
    assert state is not None and not state.graphs.shapes
    write(model)
    assert not differing(gradients(other, inputs), expected)


@pytest.mark.parametrize("end", [restore, free_recordings, FastLanguageModel.for_inference])
def test_nothing_is_left_afterwards(recorded, end):
    model, inputs, expected, graphs = recorded
    end(model)
    assert not graphs.shapes
    model.train()
    fuse(model)
    assert not any(differing(found, expected) for found in passes(model, inputs))


def test_a_training_ends_without_recordings(tiny_model_folder, tmp_path):
    from datasets import Dataset

    from colab_qlora import SFTConfig, SFTTrainer

    model, tokenizer = FastLanguageModel.from_pretrained(str(tiny_model_folder), 64)
    model = FastLanguageModel.get_peft_model(model, r=4)
    graphs = record(model)
    rows = Dataset.from_list([{"text": "one two three four five six seven"}] * 12)
    seen: list[int] = []
    config = SFTConfig(str(tmp_path), per_device_train_batch_size=2, save_strategy="no")
    trainer = SFTTrainer(model, config, train_dataset=rows, tokenizer=tokenizer, live_plot=False)
    step = trainer.training_step
    trainer.training_step = lambda *args: (step(*args), seen.append(len(graphs.shapes)))[0]
    trainer.train()
    assert seen[-1] == 1 and not graphs.shapes
