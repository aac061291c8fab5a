"""Prices in the middle of a training, and the map that follows them under the same cap."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from dynamic_llama import BATCHES, batch_of, decoded, dynamic_llama, nf4_llama
from tiny_llama import hook_count

from colab_qlora.errors import UserError
from colab_qlora.models.fuse import fuse, fused_layers, state_of
from colab_qlora.quantization.activation_statistics import collect_statistics, weight_items
from colab_qlora.quantization.budget import INT8, NF4_32, NF4_64, RUNGS, SIXTEEN_BIT, rung_bytes
from colab_qlora.quantization.dynamic import apply_rungs, dynamic_state
from colab_qlora.quantization.ladder import choose_rungs
from colab_qlora.quantization.live_prices import BrokenPrices, LivePrices, measure_live, smoothed
from colab_qlora.quantization.map_file import save_map
from colab_qlora.quantization.placing import place, rung_of, shape_of
from colab_qlora.quantization.prices import measure_prices
from colab_qlora.quantization.remaking import MapCopy, follow_map, follow_or_say, readable
from colab_qlora.quantization.rung_prices import RungPrice, ladder_items
from colab_qlora.quantization.schedule import LastBatches, ScheduleSettings, move_map
from colab_qlora.quantization.weight_source import SourceGone

DOWN = "model.layers.1.mlp.down_proj"
NEW = ScheduleSettings(smoothing=0.0)


def scaled(prices, factors):
    """Prices with those of some weights multiplied."""
    return {
        name: {
            rung: RungPrice((), price.price * factors.get(name, 1.0), price.output_error)
            for rung, price in rungs.items()
        }
        for name, rungs in prices.items()
    }


def rungs_in(model):
    return {item.name: rung_of(item) for item in weight_items(model)}


def weights_in(model):
    return {item.name: decoded(item).clone() for item in weight_items(model)}


def adapters_in(model):
    return {n: (id(p), p.detach().clone()) for n, p in model.named_parameters() if p.requires_grad}


def test_points_are_shares_of_the_steps():
    settings = ScheduleSettings()
    assert settings.due_steps(1000) == (20, 100, 330)
    assert settings.due_steps(100, rows_a_micro_batch=4, micro_batches_a_step=2) == (2, 10, 33)
    # not before four micro-batches, or 16 rows, were seen
    assert settings.due_steps(100, rows_a_micro_batch=2) == (4, 10, 33)
    assert settings.due_steps(100, rows_a_micro_batch=16) == (2, 10, 33)
    # 0.07 * 100 is 7.000000000000001
    assert ScheduleSettings(points=(0.07,)).due_steps(100, 16) == (7,)
    assert settings.due_steps(20, 16) == (1, 2, 7)
    assert settings.due_steps(2, 16) == (1,)
    assert settings.due_steps(1, 16) == ()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"points": (0.0, 0.1)}, "points of the quantisation schedule is out of range"),
        ({"micro_batches": 0}, "micro_batches .* got 0; allowed: 1 or more"),
        ({"rows": 0}, "rows .* got 0"),
        ({"hysteresis": 0.9}, "hysteresis .* got 0.9; allowed: 1 or more"),
        ({"smoothing": 1.0}, "smoothing .* allowed: 0 or more, below 1"),
    ],
)
def test_numbers_out_of_range_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        ScheduleSettings(**values)


def test_the_last_micro_batches_are_kept():
    last = LastBatches(ScheduleSettings())
    given = [batch_of(seed, rows=2) for seed in range(6)]
    for index, batch in enumerate(given):
        assert last.are_enough == (index >= 4)
        last.add({**batch, "num_items_in_batch": torch.tensor(3), "text": "no tensor"})
    kept = last.batches()
    assert [b["input_ids"] is g["input_ids"] for b, g in zip(kept, given[2:], strict=True)] == (
        [True] * 4
    )
    assert all(batch.keys() == given[0].keys() for batch in kept)
    last.clear()
    assert not last.batches()


def test_as_many_rows_as_sixteen_are_enough():
    last = LastBatches(ScheduleSettings())
    for seed in range(3):
        last.add(batch_of(seed, rows=8))
    assert [len(batch["labels"]) for batch in last.batches()] == [8, 8]
    last.add(batch_of(4, rows=40))
    (only,) = last.batches()
    assert {name: len(tensor) for name, tensor in only.items()} == dict.fromkeys(only, 16)


def test_live_prices_are_those_of_the_model_as_it_is():
    """Dropout off, adapters on, in the units of the loss; here by the meter on an eval model."""
    model = dynamic_llama(lora={"lora_dropout": 0.3})
    state = dynamic_state(model)
    found = measure_live(model, state.source, BATCHES)
    scaled_up = measure_live(model, state.source, BATCHES, loss_scale=1024.0)
    model.eval()
    expected = measure_prices(model, BATCHES, source=state.source)
    assert expected.keys() == found.prices.keys() == state.map.placements.keys()
    for name, rungs in expected.items():
        assert set(rungs) == set(found.prices[name])
        for rung, price in rungs.items():
            for other in (found, scaled_up):
                assert other.prices[name][rung].price == pytest.approx(price.price, rel=1e-4)
    statistics = collect_statistics(model, BATCHES).mean_square
    assert statistics.keys() == found.mean_square.keys()
    for name, columns in statistics.items():
        assert torch.allclose(found.mean_square[name], columns, rtol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_measuring_leaves_no_trace(fused):
    model = dynamic_llama(lora={"lora_dropout": 0.3})
    shared = fuse(model) if fused else None
    layer = model.get_base_model().model.layers[0]
    layer.mlp.eval()  # a mode of its own
    first = next(p for p in model.parameters() if p.requires_grad)
    first.grad = torch.ones_like(first)
    modes = {name: module.training for name, module in model.named_modules()}
    classes = {name: type(module) for name, module in model.named_modules()}
    names, hooks = list(model.state_dict()), hook_count(model)
    flags = {k: v for k, v in vars(layer).items() if "checkpoint" in k}
    randomness, weights = torch.get_rng_state(), weights_in(model)
    needs = [p.requires_grad for p in model.parameters()]
    measure_live(model, dynamic_state(model).source, BATCHES)
    assert torch.equal(torch.get_rng_state(), randomness)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert list(model.state_dict()) == names
    assert hook_count(model) == hooks
    assert {k: v for k, v in vars(layer).items() if "checkpoint" in k} == flags
    assert [p.requires_grad for p in model.parameters()] == needs
    assert torch.equal(first.grad, torch.ones_like(first))
    assert all(p.grad is None for p in model.parameters() if p is not first)
    assert all(torch.equal(w, weights[name]) for name, w in weights_in(model).items())
    assert state_of(model) is shared
    assert bool(fused_layers(model)) == fused
    if shared is not None:
        assert not shared.stock_passes


@pytest.mark.parametrize("fused", [False, True])
def test_an_error_leaves_no_trace_either(fused):
    model = dynamic_llama()
    shared = fuse(model) if fused else None
    source = dynamic_state(model).source
    source.gone.add(DOWN)
    modes = [module.training for module in model.modules()]
    hooks = hook_count(model)
    with pytest.raises(SourceGone, match=f"the 16-bit weight of {DOWN} cannot be read"):
        measure_live(model, readable(source), BATCHES)
    assert [module.training for module in model.modules()] == modes
    assert hook_count(model) == hooks
    assert state_of(model) is shared


def test_broken_numbers_are_broken_prices():
    model = dynamic_llama()
    source = dynamic_state(model).source
    unlabelled = {**BATCHES[0], "labels": torch.full_like(BATCHES[0]["labels"], -100)}
    with pytest.raises(BrokenPrices, match="no row of the last micro-batches has labels"):
        measure_live(model, source, [unlabelled])
    # beside one with labels it is left out
    both = measure_live(model, source, [unlabelled, BATCHES[1]])
    alone = measure_live(model, source, [BATCHES[1]])
    assert both.prices == alone.prices
    # gradients that overflow
    with pytest.raises(BrokenPrices, match="is infinite or NaN"):
        measure_live(model, source, BATCHES, loss_scale=1e45)
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(BrokenPrices, match="the loss is not finite"):
        measure_live(model, source, BATCHES)


def test_the_average_takes_a_common_factor_out():
    def prices(*values):
        return {
            str(index): {NF4_64: RungPrice((), value, 1.0), INT8: RungPrice((), value / 100, 0.1)}
            for index, value in enumerate(values)
        }

    earlier, now = prices(1.0, 2.0, 4.0, 8.0, 1.0), prices(10.0, 20.0, 40.0, 80.0, 1000.0)
    found = smoothed(earlier, now, 0.5)
    assert [found[str(i)][NF4_64].price for i in range(5)] == pytest.approx(
        [10.0, 20.0, 40.0, 80.0, 505.0]
    )
    assert found["4"][INT8].price == pytest.approx(5.05)
    assert smoothed(earlier, now, 0.0)["4"][NF4_64].price == 1000.0
    assert smoothed({}, now, 0.5) == now
    # an expert that no token went to keeps what it had, in the new units
    del now["1"]
    assert smoothed(earlier, now, 0.5)["1"][NF4_64].price == pytest.approx(20.0)
    nothing = prices(0.0, 0.0)
    assert smoothed(nothing, nothing, 0.5) == nothing


def test_the_map_moves_under_the_cap_and_weights_are_made_from_the_source():
    model = dynamic_llama(share=0.15)
    state = dynamic_state(model)
    before, rungs = weights_in(model), state.map.rungs
    adapters, columns_before = adapters_in(model), dict(state.column_weights)
    dear = [name for name, rung in rungs.items() if rung == NF4_64][-2:]
    measured = measure_live(model, state.source, BATCHES)
    measured = LivePrices(scaled(measured.prices, dict.fromkeys(dear, 1e6)), measured.mean_square)
    result = move_map(model, state, measured, NEW, step=7)
    after = state.map.rungs
    assert {c.name for c in result.changes} == {n for n in rungs if rungs[n] != after[n]}
    assert all(RUNGS.index(after[name]) > RUNGS.index(NF4_64) for name in dear)
    assert any(change.added_bytes < 0 for change in result.changes)
    assert state.map.bytes <= state.cap_bytes == state.map.cap_bytes
    assert rungs_in(model) == after
    assert state.history == list(result.changes)
    assert all(change.step == 7 and change.why for change in result.changes)
    # demoted first
    added = [change.added_bytes for change in result.changes]
    assert added == sorted(added)
    assert result.price_after < result.price_before
    # made as from the source at once, by the new statistics
    other, source = nf4_llama()
    items = {item.name: item for item in weight_items(other)}
    for change in result.changes:
        place(
            other,
            items[change.name],
            change.after,
            source(change.name),
            column_weights=measured.mean_square.get(change.name),
            compute_dtype=torch.float32,
        )
    made, now = weights_in(other), weights_in(model)
    changed = {change.name for change in result.changes}
    assert all(torch.equal(now[name], made[name]) for name in changed)
    assert all(torch.equal(now[name], before[name]) for name in before if name not in changed)
    for name, columns in state.column_weights.items():
        expected = measured.mean_square if name in changed else columns_before
        assert columns is expected[name]
    for name, (identity, value) in adapters_in(model).items():
        assert adapters[name][0] == identity
        assert torch.equal(adapters[name][1], value)


def test_the_bytes_never_pass_the_cap_by_more_than_a_matrix(monkeypatch):
    from colab_qlora.quantization import remaking

    model = dynamic_llama(share=0.15)
    state = dynamic_state(model)
    seen = []

    def watched(model, item, rung, weight, **options):
        place(model, item, rung, weight, **options)
        now = rungs_in(model)
        options = {i.name: i for i in ladder_items(model, state.prices)}
        seen.append(sum(options[name].option(now[name]).bytes for name in now))

    monkeypatch.setattr(remaking, "place", watched)
    dear = [name for name, rung in state.map.rungs.items() if rung == NF4_64][-2:]
    prices = scaled(state.prices, dict.fromkeys(dear, 1e6))
    result = move_map(model, state, LivePrices(prices, {}), NEW, step=1)
    assert len(seen) == len(result.changes) > 1
    # demotions come first, so that they are even below it
    assert max(seen) <= state.cap_bytes


def test_loading_never_passes_the_cap(monkeypatch):
    from colab_qlora.quantization import dynamic

    seen = []

    def watched(model, item, rung, weight, **options):
        place(model, item, rung, weight, **options)
        seen.append(sum(rung_bytes(shape_of(i), rung_of(i)) for i in weight_items(model)))

    monkeypatch.setattr(dynamic, "place", watched)
    # the head in 16 bit gives bytes away, and stands last in the model
    state = dynamic_state(dynamic_llama(share=0.0, tied=False))
    assert state.map["lm_head"].rung == "int8"
    assert len(seen) > 10 and max(seen) <= state.cap_bytes


def test_the_same_prices_change_nothing():
    model = dynamic_llama(share=0.15)
    state = dynamic_state(model)
    before, rungs = weights_in(model), state.map.rungs
    result = move_map(model, state, LivePrices(state.prices, {}), NEW, step=3)
    assert result.changes == ()
    assert result.words() == "no weight changed precision"
    assert state.map.rungs == rungs
    assert not state.history
    assert all(torch.equal(w, before[name]) for name, w in weights_in(model).items())


@pytest.mark.parametrize(("hysteresis", "moves"), [(1.0, True), (1.5, False)])
def test_hysteresis_keeps_what_is_hardly_better(hysteresis, moves):
    """Two equal weights, of which one fits, and the other becomes 1.2 times as dear."""
    model, source = nf4_llama()
    first, second = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"
    prices = {}
    for item in weight_items(model):
        if item.name in (first, second):
            bonus = 1.01 if item.name == first else 1.0
            prices[item.name] = {
                NF4_64: RungPrice((), bonus, 0.0),
                INT8: RungPrice((), bonus * 1e-3, 0.0),
            }
    ladder = ladder_items(model, prices)
    cap = ladder[0].option(NF4_64).bytes + ladder[0].option(INT8).bytes
    chosen = choose_rungs(ladder, cap)
    assert chosen.rungs == {first: INT8, second: NF4_64}
    adapted = dynamic_llama()
    state = replace(
        dynamic_state(adapted), map=chosen, cap_bytes=cap, prices=prices, column_weights={}
    )
    items = {item.name: item for item in weight_items(adapted)}
    for name, rung in chosen.rungs.items():
        place(adapted, items[name], rung, source(name), compute_dtype=torch.float32)
    settings = replace(NEW, hysteresis=hysteresis)
    now = LivePrices(scaled(prices, {second: 1.2}), {})
    result = move_map(adapted, state, now, settings, step=1)
    assert bool(result.changes) == moves
    assert state.map.rungs == ({first: NF4_64, second: INT8} if moves else chosen.rungs)


def test_smoothing_remembers_the_earlier_prices():
    model = dynamic_llama(share=0.15)
    state = dynamic_state(model)
    earlier = state.prices
    now = scaled(earlier, {DOWN: 3.0})
    move_map(model, state, LivePrices(now, {}), ScheduleSettings(smoothing=0.5), step=1)
    assert state.prices[DOWN][NF4_64].price == pytest.approx(2 * earlier[DOWN][NF4_64].price)
    # prices that stood in for want of data are no prices
    state.has_data = False
    move_map(model, state, LivePrices(now, {}), ScheduleSettings(smoothing=0.5), step=2)
    assert state.prices == now
    assert state.has_data


def test_a_weight_that_trains_keeps_what_it_has():
    model = dynamic_llama(share=0.15)
    state = dynamic_state(model)
    head = next(item for item in weight_items(model) if item.name == "lm_head")
    place(model, head, SIXTEEN_BIT, state.source("lm_head"), compute_dtype=torch.float32)
    head = next(item for item in weight_items(model) if item.name == "lm_head")
    head.weight.requires_grad_(True)
    cheap = scaled(state.prices, {"lm_head": 0.0, DOWN: 1e6})
    before = state.map["lm_head"]
    result = move_map(model, state, LivePrices(cheap, {}), NEW, step=1)
    assert result.changes
    assert state.map["lm_head"] == before
    assert head.weight is model.get_output_embeddings().weight
    assert state.map.bytes <= state.cap_bytes


def test_a_source_that_goes_in_between_leaves_a_map_that_is_true():
    model = dynamic_llama(share=0.15)
    state = dynamic_state(model)
    dear = [name for name, rung in state.map.rungs.items() if rung == NF4_64][-1]
    prices = scaled(state.prices, {dear: 1e6})
    state.source.gone.add(dear)
    result = move_map(model, state, LivePrices(prices, {}), NEW, step=1)
    assert isinstance(result.stopped_by, SourceGone)
    assert result.changes
    assert dear not in {change.name for change in result.changes}
    assert rungs_in(model) == state.map.rungs
    assert state.map.bytes <= state.cap_bytes
    assert state.history == list(result.changes)


def test_tied_weights_change_together():
    model = dynamic_llama(share=0.0, tied=True)
    state = dynamic_state(model)
    name = "model.embed_tokens"
    dear = scaled(state.prices, {name: 1e9})
    state.map = choose_rungs(ladder_items(model, dear), state.cap_bytes)
    apply_rungs(model, weight_items(model), state.map.rungs, state)
    assert rungs_in(model)[name] == SIXTEEN_BIT
    cheap = scaled(state.prices, {name: 1e-9})
    result = move_map(model, state, LivePrices(cheap, {}), NEW, step=1)
    assert result.changes[0].name == name
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embedding.weight is head.weight
    assert rungs_in(model)[name] == INT8


def test_the_words_name_the_largest_changes():
    model = dynamic_llama(share=0.15)
    state = dynamic_state(model)
    dear = [name for name, rung in state.map.rungs.items() if rung == NF4_64][-1]
    result = move_map(model, state, LivePrices(scaled(state.prices, {dear: 1e6}), {}), NEW, 1)
    words = result.words(most=1)
    count = len(result.changes)
    assert words.startswith(f"{count} weights changed precision: {dear.removeprefix('model.')} ")
    assert f"-> {state.map[dear].rung}, {count - 1} more; price -" in words
    assert words.endswith("%")


def test_a_checkpoints_map_is_made_again(tmp_path):
    model = dynamic_llama(share=0.15)
    state = dynamic_state(model)
    dear = [name for name, rung in state.map.rungs.items() if rung == NF4_64][-1]
    measured = measure_live(model, state.source, BATCHES)
    prices = scaled(measured.prices, {dear: 1e6})
    assert move_map(model, state, LivePrices(prices, measured.mean_square), NEW, 4).changes
    save_map(state, tmp_path)
    said = []
    other = dynamic_llama(share=0.15)
    follow_map(other, tmp_path, said.append)
    assert dynamic_state(other).map == state.map
    assert dynamic_state(other).history == state.history
    expected = weights_in(model)
    assert all(torch.equal(w, expected[name]) for name, w in weights_in(other).items())
    assert rungs_in(other) == state.map.rungs
    follow_map(other, tmp_path, said.append)
    follow_map(other, tmp_path / "none", said.append)
    assert not said
    # a smaller budget, or a source that is gone, is said
    small = dynamic_llama(share=0.0)
    rungs = rungs_in(small)
    follow_map(small, tmp_path, said.append)
    assert rungs_in(small) == dynamic_state(small).map.rungs == rungs
    gone = dynamic_llama(share=0.15)
    dynamic_state(gone).source.gone.update(rungs)
    follow_map(gone, tmp_path, said.append)
    assert rungs_in(gone) == dynamic_state(gone).map.rungs
    assert ["budget" in said[0], "cannot be read" in said[1]] == [True, True]


def promoted(model, step=4):
    """Move a map for one weight that became dear, by statistics of other rows; the old state."""
    state, before = dynamic_state(model), MapCopy.of(model)
    dear = [name for name, rung in state.map.rungs.items() if rung == NF4_64][-1]
    measured = measure_live(model, state.source, [batch_of(9)])
    prices = scaled(measured.prices, {dear: 1e6})
    assert move_map(model, state, LivePrices(prices, measured.mean_square), NEW, step).changes
    return before


def test_weights_of_other_statistics_are_made_again(tmp_path):
    """The same rungs are not the same bits: scales were searched for by other rows."""
    model = dynamic_llama(share=0.15)
    state = dynamic_state(model)
    save_map(state, tmp_path)
    other = dynamic_llama(share=0.15, batches=[batch_of(7)])
    follow_map(other, tmp_path, pytest.fail)
    now, expected = weights_in(other), weights_in(model)
    assert all(torch.equal(weight, expected[name]) for name, weight in now.items())
    columns = dynamic_state(other).column_weights
    assert columns.keys() == state.column_weights.keys()
    assert all(torch.equal(v, state.column_weights[n]) for n, v in columns.items())
    # and without statistics, as one is that was loaded without rows
    state.column_weights.clear()
    save_map(state, tmp_path)
    follow_map(other, tmp_path, pytest.fail)
    assert not dynamic_state(other).column_weights
    plain, _ = nf4_llama()
    for item in weight_items(plain):
        weight = state.source(item.name)
        place(plain, item, state.map[item.name].rung, weight, compute_dtype=torch.float32)
    now, expected = weights_in(other), weights_in(plain)
    assert all(torch.equal(weight, expected[name]) for name, weight in now.items())


def test_what_is_as_it_was_is_not_made_again(tmp_path):
    model = dynamic_llama(share=0.15)
    save_map(dynamic_state(model), tmp_path)
    other = dynamic_llama(share=0.15)
    dynamic_state(other).source.gone.update(dynamic_state(other).map.rungs)
    follow_map(other, tmp_path, pytest.fail)
    # what does not depend on E[x_j^2] needs no source either
    state = dynamic_state(model)
    eight = [name for name in state.column_weights if state.map[name].rung == INT8]
    assert eight
    state.column_weights.update({name: 2 * state.column_weights[name] for name in eight})
    save_map(state, tmp_path)
    follow_map(other, tmp_path, pytest.fail)


def test_the_history_has_only_what_was_made(tmp_path):
    model = dynamic_llama(share=0.15)
    promoted(model)
    state = dynamic_state(model)
    save_map(state, tmp_path)
    assert len(state.history) > 1
    gone = state.history[-1].name
    other = dynamic_llama(share=0.15)
    dynamic_state(other).source.gone.add(gone)
    said = []
    follow_map(other, tmp_path, said.append)
    (line,) = said
    assert f"the 16-bit weight of {gone} cannot be read" in line
    found = dynamic_state(other)
    assert found.history == [change for change in state.history if change.name != gone]
    assert rungs_in(other) == found.map.rungs
    # the rest is made once it can be read
    found.source.gone.clear()
    follow_map(other, tmp_path, pytest.fail)
    assert found.history == state.history
    assert found.map == state.map


def test_a_copy_brings_the_base_back():
    model = dynamic_llama(share=0.15)
    first = weights_in(model)
    before = promoted(model)
    state = dynamic_state(model)
    assert any(not torch.equal(w, first[name]) for name, w in weights_in(model).items())
    follow_or_say(model, before, pytest.fail)
    assert all(torch.equal(w, first[name]) for name, w in weights_in(model).items())
    assert MapCopy.of(model).map.rungs == before.map.rungs
    assert state.history == []
    follow_or_say(model, None, pytest.fail)
    follow_or_say(nf4_llama()[0], before, pytest.fail)


def test_what_keeps_the_base_from_coming_back_is_said_and_no_error(tmp_path, monkeypatch):
    from colab_qlora.quantization import remaking

    model = dynamic_llama(share=0.15)
    before = promoted(model)
    said = []
    dynamic_state(model).source.gone.update(before.map.rungs)
    follow_or_say(model, before, said.append)
    dynamic_state(model).source.gone.clear()

    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(remaking, "place", full)
    follow_or_say(model, before, said.append)
    (tmp_path / "quantization_map.safetensors").write_bytes(b"no map")
    follow_or_say(model, tmp_path, said.append)
    assert rungs_in(model) == dynamic_state(model).map.rungs
    starts = "weights do not have the precision that they had"
    assert said[0].startswith(f"{starts} when the adapter was copied: the 16-bit weight of ")
    assert said[1] == (
        f"{starts} when the adapter was copied: there is not enough memory (CUDA out of memory)"
    )
    assert said[2].startswith(f"{starts} in {tmp_path}: {tmp_path}/quantization_map.safetensors")


def test_a_model_of_one_precision_is_told_what_to_do_with_a_map(tmp_path):
    save_map(dynamic_state(dynamic_llama(share=0.15)), tmp_path)
    said = []
    follow_map(nf4_llama()[0], tmp_path, said.append)
    assert said == [
        f"the adapter in {tmp_path} was trained over weights of mixed precision, which this model "
        f'does not have: load it with FastLanguageModel.from_pretrained("{tmp_path}")'
    ]


def test_a_weight_under_dora_stays_where_it_is():
    from peft import LoraConfig

    model = dynamic_llama(share=0.15)
    state = dynamic_state(model)
    few = [name for name, rung in state.map.rungs.items() if rung == NF4_64]
    dora, free = few[:-1], few[-1]
    model.add_adapter("dora", LoraConfig(r=2, target_modules=dora, use_dora=True))
    model.set_adapter("dora")
    before = state.map
    prices = scaled(state.prices, {**dict.fromkeys(dora, 1e6), free: 1e3})
    result = move_map(model, state, LivePrices(prices, {}), NEW, step=1)
    changed = {change.name for change in result.changes}
    assert dora
    assert not changed & set(dora)
    assert {name: state.map[name] for name in dora} == {name: before[name] for name in dora}
    # the room is for the others
    assert free in changed
    assert rungs_in(model) == state.map.rungs


@pytest.mark.parametrize("rung", [INT8, SIXTEEN_BIT, NF4_32, NF4_64])
def test_the_fused_path_reads_a_weight_that_was_swapped(rung):
    """Loss and adapters' gradients as those of the model's own code with the same weights."""
    model = dynamic_llama()
    fuse(model)
    state = dynamic_state(model)
    batch = BATCHES[0]

    def loss_and_gradients():
        model.zero_grad()
        loss = model(**batch, use_cache=False, skip_logits=False).loss
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in model.parameters() if p.requires_grad]

    loss_and_gradients()  # the layers have been read once
    measure_live(model, state.source, BATCHES)
    item = next(item for item in weight_items(model) if item.name == DOWN)
    place(model, item, rung, state.source(DOWN), compute_dtype=torch.float32)
    fused = loss_and_gradients()
    shared = state_of(model)
    assert not shared.stock_passes
    from colab_qlora.models.fuse import unfused

    with unfused(model):
        stock = loss_and_gradients()
    assert float(fused[0]) == pytest.approx(float(stock[0]), rel=1e-5)
    for one, other in zip(fused[1], stock[1], strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-6)
