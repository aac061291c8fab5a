"""The planner against exact solvers and its own accounts, on random and on Llama-like costs.

Sizes in most tests are small whole numbers: the planner knows nothing of real units.
"""

from __future__ import annotations

import itertools
import math
import pickle
import random
import time
from dataclasses import replace

import pytest
from exact import dynamic_programme, enumerate_all

from colab_qlora.activations.plan import BudgetTooSmall, CopyLimits, Item, Setting
from colab_qlora.activations.planner import SAME_WORTH, make_plan
from colab_qlora.errors import UserError

SMALL_SETTINGS = [
    [Setting("weights", 50)],
    [Setting("whole", 9), Setting("half", 4, 0.5), Setting("quarter", 0, 1.3)],
]
# name, units of 2,048 bytes a token, million FLOP a token (o: 8,192 FLOP a token of the sequence)
LLAMA = [
    ("h0", 4, 0.0),
    ("q", 4, 33.81),
    ("k", 1, 8.55),
    ("v", 1, 8.55),
    ("o", 4, None),
    ("h1", 4, 33.81),
    ("gate", 14, 118.03),
    ("up", 14, 118.03),
]
SMALL_TENSORS = ("rstd1", "rstd2", "xa_qkv", "xa_o", "xa_gate_up", "xa_down")
T4 = (30e12, 13e12)
H100 = (800e12, 450e12)


def llama_items(layers, tokens, sequence, rates, *, small_tensors=False):
    """Items of Llama-3-8B for `tokens` in sequences of `sequence`; FLOP/s of GEMM, attention."""
    gemm, attention = rates
    items = []
    for layer in range(layers):
        for name, units, flops in LLAMA:
            seconds = 8192 * sequence / attention if flops is None else flops * 1e6 / gemm
            size = 2048 * units * tokens
            items.append(Item(layer, name, size, tokens * seconds, True, name == "h0"))
        for name in SMALL_TENSORS if small_tensors else ():
            items.append(Item(layer, name, 32 * tokens, tokens * 1e-8, False, name[0] == "r"))
    return items


def total(items):
    return sum(item.bytes for item in items)


def dearest(items):
    return max(item.recompute_s for item in items)


def random_items(rng, *, alike):
    """A few layers; all with the same costs if `alike`, else each with its own."""
    layers, names = rng.choice([(1, 6), (2, 3), (3, 2)])
    has_root = rng.random() < 0.8

    def costs():
        return rng.randint(1, 20), rng.uniform(0.1, 3.0), rng.random() < 0.7

    common = [costs() for _ in range(names)]
    return [
        Item(layer, "abcdef"[n], *(common[n] if alike else costs()), n == 0 and has_root)
        for layer in range(layers)
        for n in range(names)
    ]


def random_limits(rng, items):
    per_layer = rng.random() * total(items) / (1 + items[-1].layer)
    # rates of 10 and 8: each direction is the narrower one at times
    forward_s, backward_s = per_layer / 8 * rng.uniform(0.8, 1.2), per_layer / 6.4
    cap = int(rng.random() * total(items))
    return CopyLimits(10.0, 8.0, forward_s, backward_s, cap, layers_in_flight=rng.choice([0, 1, 2]))


def random_case(seed, *, alike=True, offload=True):
    rng = random.Random(seed)
    items = random_items(rng, alike=alike)
    limits = random_limits(rng, items) if offload else None
    return items, limits, 50 + int(rng.uniform(0, 1.1) * total(items))


def assert_accounts(plan, items, settings, budget_bytes, limits):
    """Everything that a plan says of itself, added up again, and every limit."""
    keep, offload, again = [], [], []
    for item in items:
        in_sets = [item.name in names[item.layer] for names in (plan.keep, plan.offload)]
        assert [*in_sets, item.name in plan.recompute[item.layer]].count(True) == 1
        (keep if in_sets[0] else offload if in_sets[1] else again).append(item)
    assert sum(map(len, plan.keep + plan.offload + plan.recompute)) == len(items)
    assert all(item.can_offload for item in offload)
    assert not any(item.must_keep_or_offload for item in again)
    chosen = [
        next(setting for setting in choice if setting.name == name)
        for choice, name in zip(settings, plan.settings, strict=True)
    ]
    by_layer = {}
    for item in offload:
        by_layer[item.layer] = by_layer.get(item.layer, 0) + item.bytes
    in_flight = limits.layers_in_flight * max(by_layer.values()) if by_layer else 0
    assert plan.gpu_bytes == total(keep) + in_flight + sum(s.fixed_bytes for s in chosen)
    assert plan.gpu_bytes <= budget_bytes
    assert plan.host_bytes == total(offload)
    assert not offload or plan.host_bytes <= limits.host_bytes_cap
    assert plan.recompute_s == pytest.approx(sum(item.recompute_s for item in again), abs=1e-12)
    assert plan.setting_s == pytest.approx(sum(s.extra_s for s in chosen))
    late_s = 0.0
    for size in by_layer.values():
        late_s += max(0.0, size / limits.bytes_down_per_s - limits.share * limits.forward_s)
        late_s += max(0.0, size / limits.bytes_up_per_s - limits.share * limits.backward_s)
    assert plan.exposed_s == pytest.approx(late_s, abs=1e-9)
    assert plan.seconds == plan.recompute_s + plan.exposed_s + plan.setting_s


@pytest.mark.parametrize("offload", [False, True], ids=["resident", "offload"])
@pytest.mark.parametrize("alike", [True, False], ids=["alike", "unlike"])
def test_small_cases_are_within_one_item_of_all_plans(alike, offload):
    solved = 0
    for seed in range(150):
        items, limits, budget = random_case(seed, alike=alike, offload=offload)
        best_s = enumerate_all(items, SMALL_SETTINGS, budget, limits)
        try:
            plan = make_plan(items, SMALL_SETTINGS, budget, limits)
        except BudgetTooSmall:
            assert best_s == math.inf
            continue
        assert_accounts(plan, items, SMALL_SETTINGS, budget, limits)
        assert plan.exposed_s or plan.seconds >= best_s - 1e-9
        assert plan.seconds <= best_s + dearest(items) + 1e-9
        solved += not plan.exposed_s
    assert solved > 100


def test_the_two_exact_solvers_agree():
    compared = 0
    for seed in range(40):
        items, limits, budget = random_case(seed, alike=seed % 2 == 0, offload=seed % 4 < 2)
        best_s = enumerate_all(items, SMALL_SETTINGS, budget, limits)
        assert dynamic_programme(items, SMALL_SETTINGS, budget, limits) == pytest.approx(best_s)
        compared += best_s < math.inf
    assert compared > 20


@pytest.mark.parametrize(
    ("layers", "has_copies", "rates", "sequence"),
    [
        (32, False, T4, 512),
        (32, False, T4, 4096),
        (80, False, H100, 2048),
        (8, True, T4, 4096),
        (8, True, H100, 2048),
    ],
)
def test_llama_is_within_one_item_of_the_optimum(layers, has_copies, rates, sequence):
    tokens = 2048
    items = llama_items(layers, tokens, sequence, rates)
    unit, second = 2048 * tokens, dearest(items)
    settings = [
        [Setting("weights", 50 * unit)],
        [Setting("whole", 9 * unit), Setting("half", 4 * unit, 0.4 * second)],
        [Setting("once", 7 * unit), Setting("twice", 0, 2 * second)],
    ]
    for seed in range(6):
        rng = random.Random(seed)
        hidden = rng.uniform(1, 40) * unit / CopyLimits.share
        cap = int(rng.uniform(0, 0.7) * total(items))
        limits = CopyLimits(1e9, 1e9, hidden / 1e9, hidden / 1e9, cap) if has_copies else None
        budget = 50 * unit + int(rng.uniform(0.15, 1) * total(items))
        plan = make_plan(items, settings, budget, limits)
        assert_accounts(plan, items, settings, budget, limits)
        best_s = dynamic_programme(items, settings, budget, limits)
        assert plan.exposed_s == 0
        assert best_s - 1e-9 <= plan.seconds <= best_s + second


@pytest.mark.parametrize("offload", [False, True], ids=["resident", "offload"])
def test_more_memory_is_never_slower(offload):
    for seed in range(60):
        items, limits, _ = random_case(seed, alike=seed % 2 == 0, offload=offload)
        previous_s = math.inf
        for budget in range(40, 60 + total(items)):
            try:
                plan = make_plan(items, SMALL_SETTINGS, budget, limits)
            except BudgetTooSmall:
                assert previous_s == math.inf
                continue
            assert plan.seconds <= previous_s + SAME_WORTH * dearest(items)
            previous_s = plan.seconds
        assert previous_s == 0


def test_enough_memory_keeps_everything_with_the_fastest_settings():
    items = llama_items(32, 4096, 2048, T4, small_tensors=True)
    limits = CopyLimits(10e9, 10e9, 0.06, 0.12, total(items))
    budget = total(items) + 59
    plan = make_plan(items, SMALL_SETTINGS, budget, limits)
    assert plan.seconds == 0
    assert plan.host_bytes == 0
    assert plan.gpu_bytes == budget
    assert plan.settings == ("weights", "whole")
    assert not any(plan.offload) and not any(plan.recompute)
    # one byte less costs one item
    plan = make_plan(items, SMALL_SETTINGS, budget - 1)
    assert 0 < plan.seconds <= dearest(items)
    assert sum(map(len, plan.recompute)) == 1


def test_slower_settings_are_taken_where_their_memory_saves_more():
    items = [Item(0, "a", 10, 2.0)]
    settings = [[Setting("whole", 10), Setting("half", 5, 1.0), Setting("quarter", 0, 3.0)]]
    found = {b: make_plan(items, settings, b) for b in (0, 5, 9, 10, 14, 15, 20)}
    # with 5 bytes: half and recompute 3 s, or quarter and recompute 5 s; with 10: whole and
    # recompute 2 s; with 15: half and keep 1 s
    assert [plan.seconds for plan in found.values()] == [5.0, 3.0, 3.0, 2.0, 2.0, 1.0, 0.0]
    assert [plan.settings[0][0] for plan in found.values()] == ["q", "h", "h", "w", "w", "h", "w"]
    # an alternative that is worse in both ways hides no better one
    settings[0].insert(1, Setting("bad", 7, 9.0))
    assert make_plan(items, settings, 20).settings == ("whole",)


def test_nothing_that_can_be_rebuilt_is_offloaded_without_time_to_hide():
    items = llama_items(32, 1024, 2048, T4)
    smallest = min(item.bytes for item in items)
    budget = total(items) // 2
    seconds = (smallest - 1) / CopyLimits.share / 1e9
    too_short = CopyLimits(1e9, 1e9, seconds, 9.0, total(items))
    for limits in (too_short, replace(too_short, forward_s=9.0, backward_s=seconds)):
        plan = make_plan(items, [], budget, limits)
        assert plan == make_plan(items, [], budget)
    long_enough = replace(too_short, forward_s=9.0)
    plan = make_plan(items, [], budget, long_enough)
    assert plan.host_bytes > 0
    assert plan.seconds < make_plan(items, [], budget).seconds
    assert_accounts(plan, items, [], budget, long_enough)


def test_no_more_is_offloaded_than_the_host_holds_or_than_helps():
    items = llama_items(32, 1024, 2048, T4)
    budget = total(items) // 2
    limits = CopyLimits(1e9, 1e9, 9.0, 9.0, 0)
    previous_s = make_plan(items, [], budget).seconds
    assert make_plan(items, [], budget, limits).seconds == previous_s
    for share in (0.01, 0.1, 0.3, 0.5):
        capped = replace(limits, host_bytes_cap=int(share * total(items)))
        plan = make_plan(items, [], budget, capped)
        assert 0 < plan.host_bytes <= capped.host_bytes_cap
        assert plan.seconds < previous_s
        previous_s = plan.seconds
    # a little less than all fits: one layer's worth of copies is plenty
    nearly = total(items) - 1
    plan = make_plan(items, [], nearly, replace(limits, host_bytes_cap=total(items)))
    assert plan.seconds == 0
    assert 0 < plan.host_bytes <= total(items) // 8


def test_copies_are_exposed_only_for_what_cannot_be_rebuilt():
    exposed, forced = 0, 0
    for seed in range(150):
        rng = random.Random(seed)
        root, a = rng.randint(4, 9), rng.randint(1, 9)
        only_root = seed % 2 == 0
        items = [Item(layer, "root", root, 0.0, True, True) for layer in range(3)]
        items += [Item(layer, "a", a, 0.2 * a, not only_root) for layer in range(3)]
        # an exposed byte waits 1/2 + 1/4 s, more than any rebuild of a byte takes
        room = rng.uniform(0, 9)
        limits = CopyLimits(2.0, 4.0, room / 2, room / 3, 20, 0.5, rng.choice([0, 1]))
        budget = rng.randint(0, total(items) + 2)
        best_s = enumerate_all(items, [], budget, limits, may_expose=True)
        try:
            plan = make_plan(items, [], budget, limits)
        except BudgetTooSmall:
            assert best_s == math.inf
            continue
        assert_accounts(plan, items, [], budget, limits)
        assert plan.seconds >= best_s - 1e-9
        # while it exposes copies, the planner offloads nothing else
        assert not only_root or plan.seconds <= best_s + dearest(items) + 1e-9
        if plan.exposed_s:
            exposed += 1
            assert set().union(*plan.offload) == {"root"}
            hidden_s = enumerate_all(items, [], budget, limits)
            assert plan.seconds <= hidden_s + dearest(items) + 1e-9
            forced += hidden_s == math.inf
    assert exposed > forced > 10


def too_small(items, settings, budget, limits=None):
    with pytest.raises(BudgetTooSmall) as caught:
        make_plan(items, settings, budget, limits)
    return caught.value


def test_the_error_names_a_floor_that_is_enough_and_its_parts():
    gib = 2**30
    settings = [
        [Setting("weights", 6 * gib)],
        [Setting("loss 1024", gib, 0.0, True), Setting("loss 256", gib // 4, 0.1, True)],
    ]
    items = llama_items(32, 4096, 2048, T4, small_tensors=True)
    error = too_small(items, settings, 6 * gib + gib // 2)
    h0, rstd = gib, 2 * 32 * 32 * 4096
    assert error.floor_bytes == 6 * gib + gib // 4 + h0 + rstd
    assert error.parts == {
        "weights": 6 * gib, "h0": h0, "loss 256": gib // 4, "rstd1": rstd // 2, "rstd2": rstd // 2
    }  # fmt: skip
    assert list(error.parts)[:3] == ["weights", "h0", "loss 256"]
    assert error.host_bytes_needed is None
    assert error.tokens_share == pytest.approx(0.5 * gib / (error.floor_bytes - 6 * gib))
    assert str(error) == (
        "no plan fits in the GPU memory: got a budget of 6.50 GiB; allowed: 7.26 GiB or more "
        "(weights 6.00 GiB, h0 1.00 GiB, loss 256 0.25 GiB). Train on at most 39 % of the tokens "
        "in a micro-batch, or free 0.76 GiB of GPU memory."
    )
    assert make_plan(items, settings, error.floor_bytes).gpu_bytes == error.floor_bytes
    assert too_small(items, settings, error.floor_bytes - 1).floor_bytes == error.floor_bytes
    assert too_small(items, settings, 6 * gib).tokens_share is None
    assert isinstance(error, UserError)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.parts) == (str(error), error.parts)


@pytest.mark.parametrize("hidden_s", [0.0, 9.0], ids=["exposed", "hidden"])
def test_the_error_says_how_much_host_memory_would_do(hidden_s):
    items = llama_items(16, 64, 2048, T4)
    h0 = 8192 * 64
    limits = CopyLimits(1e9, 1e9, hidden_s, hidden_s, 3 * h0)
    # 7 of 16 on the GPU, where 2 more are in flight
    error = too_small(items, [], 9 * h0, limits)
    assert error.floor_bytes == 15 * h0
    assert error.parts == {"h0": 13 * h0, "copies in flight": 2 * h0}
    assert error.host_bytes_needed == 9 * h0
    assert "Allow 0.01 GiB of pinned host memory, or train" in str(error)
    assert make_plan(items, [], 9 * h0, replace(limits, host_bytes_cap=9 * h0)).host_bytes == 9 * h0
    too_small(items, [], 9 * h0, replace(limits, host_bytes_cap=9 * h0 - 1))
    assert make_plan(items, [], error.floor_bytes, limits).host_bytes == 3 * h0


def test_layers_whose_costs_differ_by_noise_look_alike():
    rng = random.Random(0)
    items = [
        replace(item, recompute_s=item.recompute_s * rng.uniform(0.996, 1.004))
        for item in llama_items(32, 4096, 2048, T4)
    ]
    limits = CopyLimits(10e9, 10e9, 0.06, 0.12, 6 * 2**30)
    for share, copies in itertools.product((0.2, 0.3, 0.5, 0.7, 0.9), (None, limits)):
        plan = make_plan(items, [], int(share * total(items)), copies)
        assert len(plan.describe().splitlines()) <= 5
    # two tensors worth the same: all of the first name, then the second from the last layer back
    twins = [Item(layer, name, 10, 1.0) for name in "ba" for layer in range(4)]
    assert make_plan(twins, [], 60).describe() == (
        "layers 0-1: keep a; recompute b\nlayers 2-3: keep a b"
    )


def test_the_order_of_the_items_does_not_matter():
    items = llama_items(12, 1024, 2048, T4, small_tensors=True)
    limits = CopyLimits(10e9, 10e9, 0.01, 0.02, total(items) // 3)
    budget = total(items) // 3
    plan = make_plan(items, [], budget, limits)
    for seed in range(5):
        shuffled = random.Random(seed).sample(items, len(items))
        assert make_plan(shuffled, [], budget, limits) == plan


def test_describe_groups_layers_with_one_choice():
    items = [Item(layer, "root", 4, 0.0, True, True) for layer in (0, 1, 2, 4)]
    items += [Item(layer, "a", 2, 1.0) for layer in (1, 2)]
    assert make_plan(items, [], 18).describe() == (
        "layers 0, 4: keep root\n"
        "layer 1: keep root; recompute a\n"
        "layer 2: keep a root\n"
        "layer 3: nothing to save"
    )
    limits = CopyLimits(1.0, 1.0, 99.0, 99.0, 99, layers_in_flight=1)
    assert make_plan(items, [], 4, limits).describe() == (
        "layers 0, 4: offload root\nlayers 1-2: offload root; recompute a\nlayer 3: nothing to save"
    )


def test_without_layers_only_settings_are_chosen():
    plan = make_plan([], SMALL_SETTINGS, 55, CopyLimits(1.0, 1.0, 1.0, 1.0, 9))
    assert (plan.settings, plan.seconds, plan.gpu_bytes) == (("weights", "half"), 0.5, 54)
    assert plan.keep == plan.offload == plan.recompute == ()
    assert plan.describe() == ""
    assert make_plan([], [], 0).gpu_bytes == 0
    assert too_small([], SMALL_SETTINGS, 49).floor_bytes == 50
    assert too_small([], [], -1).parts == {}


def test_eighty_layers_take_little_time():
    items = llama_items(80, 4096, 2048, T4, small_tensors=True)
    settings = [
        [Setting(f"mlp {n}", 700 * 2**20 // n, 0.01 * n) for n in (1, 2, 4)],
        [Setting(f"loss {n}", n * 1_300_000, 8 / n) for n in (4096, 2048, 1024, 512)],
        [Setting("once", 230 * 2**20), Setting("twice", 0, 0.05)],
    ]
    limits = CopyLimits(10e9, 10e9, 0.06, 0.12, 6 * 2**30)
    times = []
    for _ in range(5):
        start = time.process_time()
        make_plan(items, settings, 10 * 2**30, limits)
        times.append(time.process_time() - start)
    # about 0.03 s on one slow core
    assert min(times) < 0.15


@pytest.mark.parametrize(
    ("items", "settings", "words"),
    [
        ([Item(0, "q", 1, 1.0)] * 2, [], "q of layer 0"),
        ([Item(-1, "q", 1, 1.0)], [], "count from 0"),
        ([Item(0, "q", -1, 1.0)], [], "q of layer 0: got -1 bytes"),
        ([Item(0, "q", 1, math.nan)], [], "nan s"),
        ([Item(0, "q", 1, math.inf)], [], "inf s"),
        ([], [[Setting("weights", 1)], []], "no alternatives"),
        ([], [[Setting("weights", 1, -1.0)]], "costs of weights"),
    ],
)
def test_costs_that_mean_nothing_are_refused(items, settings, words):
    with pytest.raises(UserError, match=words):
        make_plan(items, settings, 100)


@pytest.mark.parametrize("rates", [(0.0, 1.0), (1.0, 0.0), (1.0, -1.0), (math.nan, 1.0)])
def test_copies_need_a_rate(rates):
    with pytest.raises(UserError, match="more than 0"):
        make_plan([Item(0, "q", 1, 1.0, True)], [], 0, CopyLimits(*rates, 1.0, 1.0, 9))
