"""E[x_j^2] against a direct computation in float64: padding, several batches, checkpointing."""

from __future__ import annotations

import pytest
import torch
from tiny_llama import NAMES, batch_of, hook_count, tiny_llama

from colab_qlora.errors import UserError
from colab_qlora.quantization.activation_statistics import (
    ActivationCollector,
    collect_statistics,
    weight_items,
)


def direct(model, batches):
    """(E[x^2] by module, token shares): each row alone and without its padding, by recording."""
    inputs = {name: [] for name in NAMES if "embed" not in name}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, seen=seen: seen.append(args[0].detach()[0])
        )
        for name, seen in inputs.items()
    ]
    ids = []
    with torch.no_grad():
        for batch in batches:
            for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                if mask.any():
                    model(input_ids=row[mask.bool()][None])
                    ids.append(row[mask.bool()])
    for handle in handles:
        handle.remove()
    shares = torch.bincount(torch.cat(ids), minlength=model.config.vocab_size) / len(torch.cat(ids))
    means = {name: torch.cat(seen).double().square().mean(0) for name, seen in inputs.items()}
    return means, shares


@pytest.mark.parametrize("tied", [False, True])
def test_means_are_those_of_a_direct_computation(tied):
    model = tiny_llama(tied=tied)
    batches = [batch_of((9, 5, 1)), batch_of((7, 7), seed=1), batch_of((4,), seed=2)]
    means, shares = direct(model, batches)
    found = collect_statistics(model, batches)
    table = "model.embed_tokens"
    assert set(found.mean_square) == set(means) - {"lm_head"} | {table if tied else "lm_head"}
    for name, mean in means.items():
        ours = found.mean_square[table if tied and name == "lm_head" else name]
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, mean.float(), atol=0, rtol=1e-6)
    assert set(found.token_share) == {table}
    torch.testing.assert_close(found.token_share[table], shares, atol=1e-7, rtol=0)
    assert set(found.tokens.values()) == {9 + 5 + 1 + 7 + 7 + 4}


def test_padding_would_have_changed_them():
    model, batch = tiny_llama(), batch_of((9, 2))
    whole = {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}
    name = "model.layers.0.self_attn.q_proj"
    masked, unmasked = (collect_statistics(model, [b]).mean_square[name] for b in (batch, whole))
    assert (masked / unmasked - 1).abs().max() > 0.05
    # what stands in the padding is nothing to them
    other = {**batch, "input_ids": batch["input_ids"] + 3 * (1 - batch["attention_mask"])}
    assert torch.equal(collect_statistics(model, [other]).mean_square[name], masked)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_activations_are_summed_exactly(dtype):
    linear = torch.nn.Sequential(torch.nn.Linear(3, 2, bias=False)).to(dtype)
    # in 16 bit the sum would stop growing, in float32 it would round
    inputs = torch.cat([torch.full((1, 3), 250.0), torch.full((70_001, 3), 0.0117)]).to(dtype)
    with ActivationCollector(linear) as collector, torch.no_grad():
        linear(inputs)
    truth = inputs.double().square().mean(0).float()
    assert torch.equal(collector.statistics().mean_square["0"], truth)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_counts_each_token_once(checkpointing):
    model, batch = tiny_llama(), batch_of((6, 4))
    expected = collect_statistics(model, [batch])
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with ActivationCollector(model) as collector:
        model(**batch).loss.backward()
    found = collector.statistics()
    assert found.tokens == expected.tokens and set(found.tokens.values()) == {10}
    for name, mean in expected.mean_square.items():
        torch.testing.assert_close(found.mean_square[name], mean, atol=0, rtol=1e-6)


def test_adapters_are_no_items_and_change_no_name():
    from peft import LoraConfig, get_peft_model

    plain = tiny_llama()
    names = [item.name for item in weight_items(plain)]
    expected = collect_statistics(plain, [batch_of((5,))])
    adapted = get_peft_model(plain, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    assert [item.name for item in weight_items(adapted)] == names == NAMES
    found = collect_statistics(adapted, [batch_of((5,))])
    for name, mean in expected.mean_square.items():
        torch.testing.assert_close(found.mean_square[name], mean, atol=0, rtol=1e-6)


def test_a_tied_tensor_is_one_item():
    items = {item.name: item for item in weight_items(tiny_llama(tied=True))}
    assert list(items) == NAMES[:-1]
    assert len(items["model.embed_tokens"].modules) == 2 and items["model.embed_tokens"].is_table
    assert not items["model.layers.0.mlp.down_proj"].is_table


def test_no_hook_is_left_behind():
    model = tiny_llama()
    before = hook_count(model)
    collect_statistics(model, [batch_of((5,))])
    assert hook_count(model) == before
    with pytest.raises(IndexError), ActivationCollector(model) as collector:
        assert hook_count(model) > before
        model(input_ids=torch.tensor([[10_000]]))
    assert hook_count(model) == before
    # a pass that broke off leaves the window shut
    assert not collector._window.is_open


def test_no_data_is_an_error():
    model = tiny_llama()
    with pytest.raises(UserError, match="calibration data hold no token"):
        collect_statistics(model, [])
    padding = {k: torch.zeros(1, 4, dtype=torch.long) for k in ("input_ids", "attention_mask")}
    with pytest.raises(UserError, match="calibration data hold no token"):
        collect_statistics(model, [padding])


def test_a_mask_that_is_not_of_tokens_is_an_error():
    model = tiny_llama()
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.long)}
    batch["attention_mask"] = torch.ones(1, 1, 4, 4)
    with pytest.raises(UserError, match=r"which tokens are padding: got shape \(1, 1, 4, 4\)"):
        collect_statistics(model, [batch])
    assert hook_count(model) == hook_count(tiny_llama())


def test_broken_activations_are_an_error():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.fill_(float("inf"))
    with pytest.raises(UserError, match="that enter model.layers.1.*are infinite or NaN"):
        collect_statistics(model, [batch_of((5,))])
