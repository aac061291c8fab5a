"""The ladder against exact solvers, on random and on Llama-like weights, and its re-pricing."""

from __future__ import annotations

import itertools
import math
import random
import time
from dataclasses import replace

import pytest
from exact_ladder import enumerate_all, front, least_price, options_of

from colab_qlora.errors import UserError
from colab_qlora.quantization.budget import INT8, NF4_32, NF4_64, RUNGS, SIXTEEN_BIT, rung_bytes
from colab_qlora.quantization.ladder import LadderItem, Option, changes, choose_rungs, reprice

ROUNDING = 1e-9
# MSE relative to nf4_64 on real weights (facts/quantisation.md, C2)
RELATIVE = {NF4_64: 1.0, NF4_32: 0.88, INT8: 0.011, SIXTEEN_BIT: 0.0}
LLAMA_SHAPES = {"q": (32, 32), "k": (8, 32), "o": (32, 32), "gate": (112, 32), "down": (32, 112)}


def item(name, *options, plain=None):
    """An item of (bytes, price) pairs on the rungs in their order."""
    made = tuple(Option(rung, *pair) for rung, pair in zip(RUNGS, options, strict=False))
    return LadderItem(name, made, plain or made[0].rung)


def random_items(rng, count, *, noisy=True):
    """Bytes rise with the rung; prices fall on the whole, or are in any order if `noisy`."""
    items = []
    for index in range(count):
        sizes = sorted(rng.sample(range(1, 40), rng.randint(1, 4)))
        prices = [rng.uniform(0, 5) * rng.choice([0.1, 1, 10]) for _ in sizes]
        if not noisy:
            prices.sort(reverse=True)
        items.append(item(f"w{index}", *zip(sizes, prices, strict=True)))
    return items


def llama_items(rng, layers=8, unit=64):
    """A small Llama: shapes in `unit`s, prices over three decades, an embedding to sell."""
    items = []
    for layer, (kind, (rows, columns)) in itertools.product(range(layers), LLAMA_SHAPES.items()):
        shape, price = (rows * unit, columns * unit), 10 ** rng.uniform(-3, 0)
        options = [
            Option(rung, rung_bytes(shape, rung), price * RELATIVE[rung] * rng.uniform(0.8, 1.2))
            for rung in RUNGS
        ]
        items.append(LadderItem(f"{layer}.{kind}", tuple(options)))
    shape = (256 * unit, 32 * unit)
    table = [Option(rung, rung_bytes(shape, rung), 0.02 * RELATIVE[rung]) for rung in RUNGS[2:]]
    return [*items, LadderItem("embedding", tuple(table), SIXTEEN_BIT)]


def floor_of(items):
    return sum(min(option.bytes for option in item.options) for item in items)


def ceiling_of(items):
    return sum(max(option.bytes for option in item.options) for item in items)


def dearest_item(items):
    """Most that one weight can save: the bound on what greedy may miss."""
    return max(
        max(price for _, price in options) - min(price for _, price in options)
        for options in options_of(items)
    )


@pytest.mark.parametrize("noisy", [False, True])
def test_against_all_combinations(noisy):
    rng = random.Random(7 + noisy)
    exact = greedy_won = 0
    for _ in range(150):
        items = random_items(rng, rng.randint(1, 6), noisy=noisy)
        cap = rng.randint(floor_of(items), ceiling_of(items) + 5)
        found = choose_rungs(items, cap)
        best = enumerate_all(items, cap)
        assert found.bytes <= cap
        assert best - ROUNDING <= found.price_after <= best + dearest_item(items)
        exact += 1
        greedy_won += found.price_after <= best + ROUNDING
    # what the fill-in is for: measured 117 to 125 of 150
    assert greedy_won > 0.7 * exact


def test_the_two_exact_solvers_agree():
    rng = random.Random(3)
    for _ in range(40):
        items = random_items(rng, 5)
        solved = front(items, ceiling_of(items))
        for cap in range(floor_of(items) - 1, ceiling_of(items) + 1, 7):
            assert least_price(solved, cap) == pytest.approx(enumerate_all(items, cap), rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_a_llama_is_near_the_optimum_at_every_budget(seed):
    items = llama_items(random.Random(seed), layers=3)
    plain = sum(item.option(item.plain_rung).bytes for item in items)
    solved = front(items, int(1.1 * plain))
    for share in (0.0, 0.01, 0.02, 0.05, 0.1):
        cap = int((1 + share) * plain)
        found, best = choose_rungs(items, cap), least_price(solved, cap)
        assert found.bytes <= cap
        assert best - ROUNDING <= found.price_after <= best + dearest_item(items)
        assert found.price_after <= found.price_before


@pytest.mark.parametrize("noisy", [False, True])
def test_more_bytes_never_cost_more(noisy):
    rng = random.Random(11 + noisy)
    for _ in range(60):
        items = random_items(rng, rng.randint(2, 9), noisy=noisy)
        before = math.inf
        for cap in range(floor_of(items), ceiling_of(items) + 2):
            found = choose_rungs(items, cap)
            assert found.bytes <= cap
            assert found.price_after <= before + ROUNDING
            before = found.price_after
        # with room for everything each weight has its best rung
        ideal = sum(min(price for _, price in options) for options in options_of(items))
        assert before == pytest.approx(ideal, abs=ROUNDING)


def test_the_order_of_items_is_nothing():
    rng = random.Random(5)
    items = random_items(rng, 8) + [item("a", (1, 2.0), (3, 1.0)), item("b", (1, 2.0), (3, 1.0))]
    cap = floor_of(items) + 30
    first = choose_rungs(items, cap)
    for _ in range(5):
        rng.shuffle(items)
        assert choose_rungs(items, cap).rungs == first.rungs


def test_what_a_large_move_leaves_is_filled_off_the_hull():
    # int8 saves most a byte and does not fit; nf4_32 is above the hull, and fits
    only = [item("w", (10, 9.0), (13, 8.0), (20, 0.0))]
    assert choose_rungs(only, 15).rungs == {"w": NF4_32}
    assert choose_rungs(only, 12).rungs == {"w": NF4_64}
    assert choose_rungs(only, 20).rungs == {"w": INT8}


def test_equal_prices_go_by_output_error():
    def twin(name, error):
        options = (Option(NF4_64, 10, 1.0, error), Option(INT8, 20, 0.0, 0.0))
        return LadderItem(name, options)

    found = choose_rungs([twin("a", 1.0), twin("b", 3.0), twin("c", 2.0)], 40)
    assert found.rungs == {"a": NF4_64, "b": INT8, "c": NF4_64}


def test_an_embedding_is_sold_where_linears_need_the_bytes():
    items = llama_items(random.Random(0))
    plain = sum(item.option(item.plain_rung).bytes for item in items)
    found = choose_rungs(items, plain)
    table = found["embedding"]
    assert (table.plain_rung, table.rung) == (SIXTEEN_BIT, INT8)
    assert found.bytes <= plain and found.price_after < 0.7 * found.price_before
    assert sum(placement.rung == INT8 for placement in found.placements.values()) > 5


def test_the_reasons_say_what_was_done_and_what_was_missing():
    items = [item("big", (10, 9.0), (13, 8.9), (200, 0.0)), item("small", (1, 1.0), (2, 0.5))]
    found = choose_rungs([*items, item("done", (4, 0.0), (9, 0.0))], 18)
    assert found["small"].why.startswith("promoted: saves 0.5 (5.24e+05 a MiB), +1 B")
    assert found["big"].why == "stays: int8 would save 9 (4.97e+04 a MiB), but +190 B do not fit"
    assert found["done"].why == "stays: nothing saves more"


def test_a_model_of_many_layers_takes_no_time():
    items = llama_items(random.Random(1), layers=80, unit=256)
    plain = sum(item.option(item.plain_rung).bytes for item in items)
    start = time.perf_counter()
    found = choose_rungs(items, int(1.05 * plain))
    reprice(found, llama_items(random.Random(2), layers=80, unit=256), found.cap_bytes)
    # 401 weights; 0.02 s and a few swaps when this was written
    assert time.perf_counter() - start < 20


# re-pricing -------------------------------------------------------------------------------------


def noisy_prices(items, rng, spread):
    """Each weight's prices times one factor: all rungs are measured on the same tokens."""
    moved = []
    for item in items:
        factor = 10 ** rng.uniform(-spread, spread)
        options = tuple(replace(option, price=option.price * factor) for option in item.options)
        moved.append(replace(item, options=options))
    return moved


def test_changes_name_what_differs():
    items = [item("a", (10, 5.0), (20, 1.0)), item("b", (10, 4.0), (20, 1.0))]
    low, high = choose_rungs(items, 30), choose_rungs(items, 40)
    (change,) = changes(low, high)
    assert (change.name, change.before, change.after) == ("b", NF4_64, NF4_32)
    assert change.added_bytes == 10 and change.why.startswith("promoted: saves 3")
    assert changes(high, high) == ()
    with pytest.raises(UserError, match="not of the same weights: got missing b; new c"):
        changes(low, choose_rungs([items[0], replace(items[1], name="c")], 30))


@pytest.mark.parametrize(("gain", "swapped"), [(2.0, False), (2.99, False), (3.01, True)])
def test_a_swap_needs_one_and_a_half_times_the_price(gain, swapped):
    old = [item("a", (10, 2.0), (20, 0.0)), item("b", (10, 1.0), (20, 0.0))]
    current = choose_rungs(old, 30)
    assert current.rungs == {"a": NF4_32, "b": NF4_64}
    new = [old[0], item("b", (10, gain), (20, 0.0))]
    moved = reprice(current, new, 30)
    assert moved.rungs == ({"a": NF4_64, "b": NF4_32} if swapped else current.rungs)
    if swapped:
        assert moved["a"].why == "demoted for b: saved only 2 (2.1e+05 a MiB)"
        assert {change.name for change in changes(current, moved)} == {"a", "b"}
    # without hysteresis any gain will do
    assert (reprice(current, new, 30, ratio=1.0).rungs != current.rungs) == (gain > 2)


def test_what_is_demoted_may_not_be_worth_more_in_all():
    # b is worth more a byte, but room for its 2 bytes is made only by giving up all 20 of a
    old = [item("a", (10, 20.0), (30, 0.0)), item("b", (10, 0.0), (12, 0.0))]
    current = choose_rungs(old, 40)
    new = [old[0], item("b", (10, 4.0), (12, 0.0))]
    assert reprice(current, new, 40).rungs == current.rungs == {"a": NF4_32, "b": NF4_64}


@pytest.mark.parametrize("seed", range(8))
def test_repricing_improves_within_the_cap_and_comes_to_rest(seed):
    rng = random.Random(seed)
    items = llama_items(rng, layers=4) if seed % 2 else random_items(rng, 12)
    cap = floor_of(items) + rng.randint(0, ceiling_of(items) - floor_of(items))
    current = choose_rungs(items, cap)
    for spread in (0.05, 0.3, 1.0):
        items = noisy_prices(items, rng, spread)
        kept = sum(i.option(current.rungs[i.name]).price for i in items)
        moved = reprice(current, items, cap)
        assert moved.bytes <= cap
        assert moved.price_after <= kept + ROUNDING
        assert reprice(moved, items, cap).rungs == moved.rungs
        current = moved


def test_hysteresis_leaves_weights_where_they_are():
    """Prices that flicker by less than 1.5 re-encode nothing; starting anew would."""
    anew = held = 0
    for seed in range(6):
        rng = random.Random(seed)
        items = llama_items(rng, layers=16)
        cap = int(1.05 * sum(item.option(item.plain_rung).bytes for item in items))
        current = choose_rungs(items, cap)
        flicker = noisy_prices(items, rng, math.log10(1.2))
        anew += moved_bytes(current, choose_rungs(flicker, cap))
        held += moved_bytes(current, reprice(current, flicker, cap))
    assert held == 0 < anew


def moved_bytes(old, new):
    return sum(new[change.name].bytes for change in changes(old, new))


def test_a_lower_cap_demotes_what_saves_least():
    items = [item("a", (10, 9.0), (20, 0.0)), item("b", (10, 5.0), (20, 0.0))]
    current = choose_rungs(items, 40)
    moved = reprice(current, items, 35)
    assert moved.rungs == {"a": NF4_32, "b": NF4_64} and moved.bytes <= 35
    assert moved["b"].why == "demoted: the cap is lower than what the weights had"


# bad input --------------------------------------------------------------------------------------


def test_a_cap_below_the_smallest_rungs():
    items = [item("a", (10, 1.0), (20, 0.0)), item("b", (7, 1.0))]
    with pytest.raises(UserError, match="cap is below .*: got 16 bytes; allowed: 17 bytes or more"):
        choose_rungs(items, 16)
    assert choose_rungs(items, 17).bytes == 17


@pytest.mark.parametrize("price", [float("nan"), float("inf"), -1.0])
def test_prices_that_are_no_numbers(price):
    with pytest.raises(UserError, match="cannot use the price of a on nf4_32: got 20 bytes"):
        choose_rungs([item("a", (10, 1.0), (20, price))], 30)


def test_items_that_are_not_complete():
    with pytest.raises(UserError, match="on the ladder twice: got a"):
        choose_rungs([item("a", (1, 1.0)), item("a", (1, 1.0))], 9)
    with pytest.raises(UserError, match="rungs of a are not complete: got nf4_64; .*int8 among"):
        choose_rungs([item("a", (1, 1.0), plain=INT8)], 9)
    with pytest.raises(UserError, match="rungs of a are not complete: got none"):
        choose_rungs([LadderItem("a", ())], 9)


def test_repricing_checks_its_arguments():
    items = [item("a", (10, 1.0), (20, 0.0))]
    current = choose_rungs(items, 20)
    with pytest.raises(UserError, match="below 1: got 0.9; allowed: 1 or more"):
        reprice(current, items, 20, ratio=0.9)
    with pytest.raises(UserError, match="not of the same weights: got missing a; new b"):
        reprice(current, [replace(items[0], name="b")], 20)
    with pytest.raises(UserError, match="a stands on a rung that has no price: got nf4_32"):
        reprice(current, [item("a", (10, 1.0))], 20)


def test_no_items_are_an_empty_map():
    found = choose_rungs([], 0)
    assert (found.bytes, found.price_after, found.rungs) == (0, 0, {})
