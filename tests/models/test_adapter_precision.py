"""What a quantised model learns is in float32 in every training batch, whoever cast it before."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "quantization"))

from small_checkpoint import TOKENS, load_nf4, load_plain, write_llama  # noqa: E402

from colab_qlora.models.adapters import attach_lora  # noqa: E402
from colab_qlora.models.fuse import fused_layers  # noqa: E402

TABLES = ["embed_tokens", "lm_head"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("precision") / "llama", tied=False)


def _adapted(base: Any, **options: Any) -> Any:
    model = attach_lora(base, r=2, use_gradient_checkpointing=False, **options)
    assert fused_layers(model)
    return model


def _trained(model: Any) -> dict[str, Any]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _cast(parameters: Any, dtype: Any = torch.bfloat16) -> None:
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)


def _batch(model: Any) -> Any:
    return model(input_ids=TOKENS, labels=TOKENS).loss


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tables_and_adapters_are_cast_back(folder: Path, dtype: Any, capsys: Any) -> None:
    model = _adapted(load_nf4(folder, torch.float32), modules_to_save=TABLES)
    trained = _trained(model)
    assert {name.split(".modules_to_save")[0].rsplit(".", 1)[-1] for name in trained} >= {*TABLES}
    _cast(trained.values(), dtype)
    for _ in range(3):
        _batch(model).backward()
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {p.grad.dtype for p in trained.values()} == {torch.float32}
    assert capsys.readouterr().out.count("are in float32 again") == 1
    # the same objects, which an optimiser may hold
    assert all(parameter is trained[name] for name, parameter in _trained(model).items())


def test_those_behind_a_first_one_in_float32_too(folder: Path) -> None:
    model = _adapted(load_nf4(folder, torch.float32))
    first, *others = _trained(model).values()
    _cast(others)
    _batch(model)
    assert {p.dtype for p in (first, *others)} == {torch.float32}


def test_all_weights_are_looked_through_once(folder: Path) -> None:
    model = _adapted(load_nf4(folder, torch.float32), modules_to_save=TABLES)
    causal, walks = model.get_base_model(), []
    every = causal.parameters

    def parameters(recurse: bool = True) -> Any:
        walks.append(recurse)
        return every(recurse)

    causal.parameters = parameters
    for _ in range(3):
        _batch(model)
    once = len(walks)
    assert once > 0
    # a second trainer casts them once more
    _cast(_trained(model).values())
    _batch(model)
    assert {p.dtype for p in _trained(model).values()} == {torch.float32}
    assert len(walks) > once
    before = len(walks)
    _batch(model)
    assert len(walks) == before


def test_another_adapter_that_takes_its_turn(folder: Path) -> None:
    model = _adapted(load_nf4(folder, torch.float32))
    _batch(model)
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    second = _trained(model)
    assert all(".second." in name for name in second)
    _cast(second.values())
    _batch(model)
    assert {p.dtype for p in second.values()} == {torch.float32}


def test_a_copy_casts_its_own(folder: Path) -> None:
    model = _adapted(load_nf4(folder, torch.float32))
    twin = copy.deepcopy(model)
    for each in (model, twin):
        _cast(_trained(each).values())
    _batch(twin)
    assert {p.dtype for p in _trained(twin).values()} == {torch.float32}
    assert {p.dtype for p in _trained(model).values()} == {torch.bfloat16}


def test_a_base_in_16_bits_is_left_alone(folder: Path, capsys: Any) -> None:
    model = _adapted(load_plain(folder, dtype=torch.bfloat16))
    _cast(_trained(model).values())
    for _ in range(2):
        _batch(model)
    assert {p.dtype for p in _trained(model).values()} == {torch.bfloat16}
    assert "float32" not in capsys.readouterr().out


@pytest.mark.parametrize("saved", [TABLES[:1], TABLES[1:], TABLES])
@pytest.mark.parametrize("is_fused", [True, False])
def test_tables_in_float32_over_a_model_in_bfloat16(
    folder: Path, saved: list[str], is_fused: bool
) -> None:
    model = attach_lora(
        load_nf4(folder, torch.bfloat16),
        r=2,
        modules_to_save=saved,
        use_fused_layers=is_fused,
        use_gradient_checkpointing=False,
    ).eval()
    with torch.no_grad():
        before = model(input_ids=TOKENS).logits.float()
    for parameter in _trained(model).values():
        parameter.data = parameter.data.float()
    answers = model.generate(input_ids=TOKENS[:, :5], max_new_tokens=3, do_sample=False)
    assert answers.shape[1] > 5
    with torch.no_grad():
        after = model(input_ids=TOKENS).logits.float()
    # 8 bits of mantissa through two layers
    assert (after - before).norm() <= 0.02 * before.norm()
    _batch(model.train()).backward()
    assert all(p.grad.isfinite().all() for p in _trained(model).values())
