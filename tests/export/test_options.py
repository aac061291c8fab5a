"""Arguments of the saving functions in tutorials: honoured, without an effect, or unknown."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
pytest.importorskip("gguf")

from model_files import adapted, byte_level, write_model  # noqa: E402
from small_checkpoint import load_nf4  # noqa: E402

from colab_qlora import UserError  # noqa: E402
from colab_qlora import export as functions  # noqa: E402
from colab_qlora.export import options  # noqa: E402
from colab_qlora.export.hub import open_repository  # noqa: E402
from colab_qlora.models.peer_arguments import HONOURED, as_markdown  # noqa: E402

SAVING = (
    "tokenizer token is_main_process state_dict save_function max_shard_size safe_serialization "
    "variant save_peft_format tags temporary_location maximum_memory_usage"
)
PUSHING = (
    "repo_id tokenizer use_temp_dir commit_message private token max_shard_size create_pr "
    "safe_serialization revision commit_description tags temporary_location maximum_memory_usage"
)
# every argument of the saving functions in the tutorials' cells of the last two years
IN_TUTORIALS = {
    options.MERGED: f"save_directory save_method push_to_hub datasets {SAVING}",
    options.GGUF: (
        f"save_directory quantization_method first_conversion push_to_hub private "
        f"quantization_type {SAVING}"
    ),
    options.PUSH: "repo_id tokenizer token private commit_message use_temp_dir create_pr revision",
    options.PUSH_MERGED: f"save_method datasets {PUSHING}",
    options.PUSH_GGUF: f"quantization_method first_conversion quantization_type {PUSHING}",
}
# taken by open_repository for all that push, and by the saving function that they call
OF_A_COMMIT = {"commit_message", "commit_description", "create_pr", "revision"}
OF_SAVING = {"maximum_memory_usage", "max_shard_size"}


def rows(where: str, verdict: str) -> list[Any]:
    return [row for row in options.TABLE if where in row.where and row.verdict == verdict]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_level("smollm")


@pytest.fixture(scope="module")
def model(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = write_model(tmp_path_factory.mktemp("options") / "tiny", "llama", tokenizer)
    return adapted(load_nf4(folder))


@pytest.mark.parametrize("where", IN_TUTORIALS)
def test_every_argument_of_the_tutorials_is_in_the_table_once(where: str) -> None:
    names = [row.name for row in options.TABLE if where in row.where]
    assert len(names) == len(set(names))
    assert set(IN_TUTORIALS[where].split()) <= set(names)


@pytest.mark.parametrize("where", IN_TUTORIALS)
def test_what_is_honoured_is_taken_by_somebody(where: str) -> None:
    own = set(inspect.signature(getattr(functions, where)).parameters)
    pushed = OF_A_COMMIT | OF_SAVING if where.startswith("push") else set()
    assert {row.name for row in rows(where, HONOURED)} <= own | pushed
    # an argument of the function's own is never left without an effect
    assert not own & {row.name for row in rows(where, options.WITHOUT_EFFECT)}


@pytest.mark.parametrize("where", [options.MERGED, options.GGUF])
def test_what_has_no_effect_changes_nothing_and_is_said(
    model: Any, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    names = [row.name for row in rows(where, options.WITHOUT_EFFECT)]
    save = getattr(functions, where)
    save(model, tmp_path / "plain", tokenizer)
    assert capsys.readouterr().out == ""
    save(model, tmp_path / "silent", tokenizer, **dict.fromkeys(names, True))
    assert capsys.readouterr().out == ""
    save(model, tmp_path / "said", tokenizer, **dict.fromkeys(names, "something"))
    [line] = capsys.readouterr().out.splitlines()
    for row in rows(where, options.WITHOUT_EFFECT):
        assert f"{row.name} ({row.what})" in line
    plain = {file.name: file.read_bytes() for file in (tmp_path / "plain").iterdir()}
    for folder in ("silent", "said"):
        other = {file.name: file.read_bytes() for file in (tmp_path / folder).iterdir()}
        assert other == plain


def test_a_push_refuses_before_it_asks_for_a_token() -> None:
    with pytest.raises(UserError, match="unknown keyword argument: got max_shrad"):
        open_repository("ada/gguf", None, None, {"max_shrad": "5GB"})


def test_the_table_in_the_documents_is_this_one(model: Any) -> None:
    path = Path(__file__).resolve().parents[2] / "docs" / "coming_from_unsloth.md"
    text = path.read_text(encoding="utf-8")
    before, line, table = text.rpartition("## Saving\n\n")[2].partition("\n\n")
    assert table == as_markdown(options.TABLE) and line
    missing = [word for word in before.split("`") if "_" in word]
    assert len(missing) == 3
    assert not any(hasattr(functions, name) for name in missing)
