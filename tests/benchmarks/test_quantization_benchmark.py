"""The statistics of the quantisation benchmark on tables whose answer is known, and a dry run."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.quantization import _schedules
from benchmarks.quantization_metrics import (
    Predictions,
    divergence,
    gap_interval,
    interval,
    ratio_interval,
)

ROOT = Path(__file__).resolve().parents[2]


def predictions(*rows):
    logs = [torch.tensor(row, dtype=torch.float32).log() for row in rows]
    return Predictions(logs, [0.0] * len(rows))


def test_divergence_of_known_distributions():
    p = predictions([[0.5, 0.5], [0.9, 0.1]], [[0.2, 0.8]])
    q = predictions([[0.25, 0.75], [0.1, 0.9]], [[0.2, 0.8]])
    kls, flips = divergence(p, q)
    first = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    second = 0.9 * math.log(9) + 0.1 * math.log(1 / 9)
    assert kls == pytest.approx([(first + second) / 2, 0.0], abs=1e-6)
    # the first token of p is a tie, which argmax gives to the first word
    assert flips == [1.0, 0.0]


def test_intervals_cover_what_they_should():
    draw = np.random.default_rng(5)
    hits = 0
    for _ in range(40):
        mean, low, high = interval(draw.normal(1.0, 0.3, (3, 40)).tolist())
        assert low < mean < high
        hits += low <= 1.0 <= high
    assert hits >= 34
    mean, low, high = ratio_interval([[1.0, 2.0]] * 3, [[2.0, 4.0]] * 3)
    assert (mean, low, high) == (0.5, 0.5, 0.5)


def test_the_share_of_a_gap_and_of_none():
    best, worst = [[1.0, 1.1, 0.9]] * 3, [[2.0, 2.1, 1.9]] * 3
    share, low, high = gap_interval([[1.25, 1.35, 1.15]] * 3, worst, best)
    assert share == pytest.approx(0.75) and low == pytest.approx(0.75) == high
    # a method worse than plain NF4, where that happens to be better than 16 bit, closes nothing
    assert gap_interval([[2.2, 2.3, 2.1]] * 3, best, worst) is None
    noise = np.random.default_rng(0).normal(0, 1, (3, 20)).tolist()
    assert gap_interval(noise, noise[::-1], noise) is None


@pytest.mark.model
def test_a_dry_run_measures_three_methods(tiny_model_folder):
    command = [sys.executable, "-m", "benchmarks.quantization", "--dry"]
    command += ["--model", str(tiny_model_folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    table = lines[next(i for i, line in enumerate(lines) if line[:1] == ["method"]) :]
    assert [line[0] for line in table[1:4]] == ["16bit", "nf4", "dynamic"]


@pytest.mark.model
def test_a_dry_run_of_merging_finds_it_near_16_bit(tiny_model_folder):
    command = [sys.executable, "-m", "benchmarks.merging", "--dry", "--dtype", "float32"]
    command += ["--model", str(tiny_model_folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    row = next(line for line in done.stdout.splitlines() if line.startswith("nf4 "))
    unmerged, merged, _ = (float(part.split()[-1]) for part in row.split(" (")[:3])
    assert merged < 0.05 * unmerged


def test_a_schedule_is_held_against_the_fixed_map_row_by_row():
    rows = [
        {"method": method, "seed": seed, "by_row": {"kl_after": values}}
        for method, seed, values in (
            ("dynamic +5%", 1, [3.0, 3.0]),
            ("dynamic +10%", 2, [0.5, 0.5]),
            ("dynamic +10%", 1, [0.5, 0.5]),
            ("dynamic +10% schedule", 1, [0.25, 0.5]),
            ("dynamic +10% schedule", 2, [0.25, 0.25]),
        )
    ]
    said = _schedules(rows)
    assert said.startswith(
        "\ndynamic +10% schedule against dynamic +10%: KL after lower by 0.1875 ("
    )
    assert said.endswith("), in 1, 2 of 2 rows by seed")
    assert said.count("\n") == 1
    assert not _schedules(rows[:3])
