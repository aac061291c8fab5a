"""The best adapter on disk: whole at every moment, with the step that belongs to it."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

from colab_qlora import UserError  # noqa: E402
from colab_qlora.quantization.dynamic import (  # noqa: E402
    ATTRIBUTE,
    DynamicQuantization,
    MapChange,
)
from colab_qlora.quantization.map_file import read_map  # noqa: E402
from colab_qlora.quantization.precision_map import PrecisionMap  # noqa: E402
from colab_qlora.training.adapter_state import (  # noqa: E402
    adapter_name,
    adapter_tensors,
    is_finite,
)
from colab_qlora.training.best_adapter import BestAdapter, move_aside  # noqa: E402


class Two(torch.nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(5, 4), torch.nn.Linear(4, 3)

    def forward(self, x: Any) -> Any:
        return self.second(self.first(x))


def adapted(value: float, r: int = 2, **options: Any) -> Any:
    """A model whose adapter is full of one value."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(Two(), LoraConfig(r=r, target_modules=["first"], **options))
    fill(model, value)
    return model


@torch.no_grad()
def fill(model: Any, value: float) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.fill_(value)


def values(model: Any) -> set[float]:
    return {v for t in adapter_tensors(model).values() for v in t.unique().tolist()}


def test_it_comes_back_with_step_and_loss(tmp_path: Path) -> None:
    model = adapted(1.0)
    best = BestAdapter(tmp_path / "best")
    assert (best.step, best.eval_loss) == (None, math.inf)
    best.save(model, 7, 0.1 + 0.2)
    fill(model, 2.0)
    addresses = [p.data_ptr() for p in model.parameters()]
    again = BestAdapter(tmp_path / "best", is_resumed=True)
    assert (again.step, again.eval_loss) == (7, 0.1 + 0.2)
    again.put_back_(model)
    assert values(model) == {1.0}
    assert [p.data_ptr() for p in model.parameters()] == addresses
    assert os.listdir(tmp_path) == ["best"]


def test_peft_loads_it(tmp_path: Path) -> None:
    from peft import PeftModel

    # modules that are trained whole belong to the adapter too
    model = adapted(3.0, modules_to_save=["second"])
    BestAdapter(tmp_path / "best").save(model, 1, 1.0)
    loaded = PeftModel.from_pretrained(Two(), tmp_path / "best")
    assert values(loaded) == {3.0}
    assert adapter_tensors(loaded).keys() == adapter_tensors(model).keys()
    assert any("second" in name for name in adapter_tensors(model))
    written = json.loads((tmp_path / "best" / "adapter_config.json").read_text("utf-8"))
    assert written["inference_mode"] is True
    assert not model.peft_config["default"].inference_mode


@pytest.mark.parametrize("is_first", [True, False])
def test_a_write_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_first: bool
) -> None:
    import safetensors.torch

    model, best = adapted(1.0), BestAdapter(tmp_path / "best")
    if not is_first:
        best.save(model, 1, 2.0)
    fill(model, 9.0)
    stock = safetensors.torch.save_file

    def half(tensors: Any, path: Path, **options: Any) -> None:
        stock(tensors, path, **options)
        os.truncate(path, path.stat().st_size // 2)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", half)
    with pytest.raises(OSError, match="No space left"):
        best.save(model, 2, 1.0)
    found = BestAdapter(tmp_path / "best", is_resumed=True)
    assert (found.step, best.step) == ((None, None) if is_first else (1, 1))
    assert os.listdir(tmp_path) == ([] if is_first else ["best"])


def test_a_kill_between_any_two_calls_leaves_a_whole_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every change of a name the folder is loadable, and its weights are those of its step."""
    folder = tmp_path / "best"
    seen: list[int | None] = []
    stock = os.replace

    def watched(source: Any, target: Any) -> None:
        for move in (lambda: None, lambda: stock(source, target)):
            move()
            found = BestAdapter(folder, is_resumed=True)
            seen.append(found.step)
            if found.step is not None:
                model = adapted(0.0)
                found.put_back_(model)
                assert values(model) == {float(found.step)}
                assert (folder / "adapter_config.json").is_file()

    monkeypatch.setattr(os, "replace", watched)
    best = BestAdapter(folder)
    for step in (1, 2):
        best.save(adapted(float(step)), step, 1.0 / step)
    assert seen == [None, 1, 1, 2]


def over_map(model: Any, changes: int) -> Any:
    """The model as one whose base changed its precision so many times."""
    state = DynamicQuantization(
        PrecisionMap({}, 0), {}, 0, {}, lambda name: torch.ones(1), torch.float32, "+5%", True
    )
    state.history = [MapChange(n, "a", "nf4_64", "int8", 1, "why") for n in range(changes)]
    setattr(model, ATTRIBUTE, state)
    return model


def test_weights_and_map_are_replaced_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill before or after any change of a name leaves weights with the map of their step."""
    run, killed = tmp_path / "run", tmp_path / "killed"
    killed.mkdir()
    stock = os.replace

    def watched(source: Any, target: Any) -> None:
        shutil.copytree(run, killed / f"{len(os.listdir(killed)):02}")
        stock(source, target)
        shutil.copytree(run, killed / f"{len(os.listdir(killed)):02}")

    best = BestAdapter(run / "best")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", watched)
        # the map changes before step 3, and before the fourth none is left
        for step, changes in ((1, 0), (2, 0), (3, 1)):
            best.save(over_map(adapted(float(step)), changes), step, 1.0 / step)
        best.save(adapted(4.0), 4, 0.1)
    seen = []
    # between two renames there is none, until it is looked for
    assert sum(not (copy / "best").exists() for copy in killed.iterdir() if int(copy.name) > 3) == 4
    for copy in sorted(killed.iterdir()):
        found = BestAdapter(copy / "best", is_resumed=True)
        seen.append(found.step)
        if found.step is not None:
            model, recorded = adapted(0.0), read_map(copy / "best")
            found.put_back_(model, lambda line: None)
            assert values(model) == {float(found.step)}
            changes = None if recorded is None else len(recorded.history)
            assert changes == {1: 0, 2: 0, 3: 1, 4: None}[found.step]
    numbers = [step or 0 for step in seen]
    assert numbers == sorted(numbers)
    assert set(numbers) == {0, 1, 2, 3, 4}
    assert os.listdir(run) == ["best"]


def test_a_folder_that_waits_beside_its_place_is_moved_aside_too(tmp_path: Path) -> None:
    BestAdapter(tmp_path / "best_adapter").save(adapted(1.0), 5, 1.0)
    (tmp_path / "best_adapter").rename(tmp_path / ".best_adapter.before")
    (tmp_path / "earlier").mkdir()
    move_aside(tmp_path, tmp_path / "earlier")
    assert os.listdir(tmp_path) == ["earlier"]
    assert BestAdapter(tmp_path / "earlier" / "best_adapter", is_resumed=True).step == 5


def test_a_replacement_that_fails_leaves_the_folder_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = BestAdapter(tmp_path / "best")
    best.save(over_map(adapted(1.0), 0), 1, 2.0)
    stock = os.replace

    def refused(source: Any, target: Any) -> None:
        if str(source).endswith(".part"):
            raise OSError(5, "Input/output error")
        stock(source, target)

    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(OSError, match="Input/output error"):
        best.save(over_map(adapted(2.0), 1), 2, 1.0)
    assert (best.step, os.listdir(tmp_path)) == (1, ["best"])
    assert BestAdapter(tmp_path / "best", is_resumed=True).step == 1


@pytest.mark.parametrize("content", [b"", b"\0" * 40, None])
def test_what_somebody_else_left_is_no_best_adapter(tmp_path: Path, content: bytes | None) -> None:
    model = adapted(1.0)
    model.save_pretrained(tmp_path / "best")
    if content is not None:
        (tmp_path / "best" / "adapter_model.safetensors").write_bytes(content)
    best = BestAdapter(tmp_path / "best", is_resumed=True)
    assert best.step is None
    # and it is replaced as a whole
    (tmp_path / "best" / "notes.txt").write_text("old")
    best.save(model, 4, 1.0)
    assert sorted(os.listdir(tmp_path / "best")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_an_adapter_of_another_rank_is_refused_whole(tmp_path: Path) -> None:
    BestAdapter(tmp_path / "best").save(adapted(1.0, r=4), 1, 1.0)
    model = adapted(2.0)
    with pytest.raises(UserError, match="best is of another adapter: got 2 weights that differ"):
        BestAdapter(tmp_path / "best", is_resumed=True).put_back_(model)
    assert values(model) == {2.0}


def test_models_without_adapters_have_no_name() -> None:
    assert adapter_name(Two()) is None
    assert adapter_name(adapted(1.0)) == "default"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_number_is_found(dtype: Any, bad: float) -> None:
    good = torch.full((507, 3), -60000.0).to(dtype)
    assert is_finite({"a": good, "b": torch.ones(2), "c": torch.tensor([1])})
    broken = good.clone()
    broken[506, 2] = bad
    assert not is_finite({"a": good, "b": broken})
    assert is_finite({})
