"""Upload an adapter, a merged model, or GGUF files to a model hub.

The token and the repository are tried before anything is written. Then the files are written into
a temporary folder, whole or not at all, and uploaded in one commit: a push that breaks off leaves
the repository as it was.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from colab_qlora.export.gguf_methods import Wanted, find_methods
from colab_qlora.export.hub_errors import readable_hub_errors
from colab_qlora.export.hub_token import find_token
from colab_qlora.export.merged import check_save_method, save_pretrained_merged
from colab_qlora.export.options import refuse_unknown
from colab_qlora.export.save_gguf import save_pretrained_gguf
from colab_qlora.whole_files import PARTIAL_FILES

# of a commit; the rest of the keyword arguments is for the files
_COMMIT = ("commit_message", "commit_description", "create_pr")
_SAVING = ("base_model", "maximum_memory_usage", "max_shard_size")


def push_to_hub(
    model: Any,
    repo_id: str,
    tokenizer: Any = None,
    *,
    token: str | None = None,
    private: bool | None = None,
    **options: Any,
) -> str:
    """Upload the adapter (a few MB); of a model without one, its 16-bit weights.

    Args:
        model: as of `save_pretrained_merged`; it stays as it is.
        repo_id: "user/name", or "name" for your own; made if it is not there.
        tokenizer: is uploaded with its chat template too.
        token: with write permission; None for HF_TOKEN of the environment, Colab's secret
            HF_TOKEN, or a saved login.
        private: of a repository that is made; None for the hub's default.
        **options: commit_message, commit_description, revision (a branch, made if it is not there),
            create_pr; endpoint, another address than HF_ENDPOINT's; and those of
            `save_pretrained_merged`.

    Returns:
        The repository's address.

    Raises:
        UserError: no token or a refused one, a network that fails, or what
            `save_pretrained_merged` refuses.

    Example:
        >>> push_to_hub(model, "user/my-adapter", tokenizer, token="...")
    """
    method = "lora" if getattr(model, "peft_config", None) else "merged_16bit"
    return push_to_hub_merged(
        model, repo_id, tokenizer, method, token=token, private=private, **options
    )


def push_to_hub_merged(
    model: Any,
    repo_id: str,
    tokenizer: Any = None,
    save_method: str = "merged_16bit",
    *,
    token: str | None = None,
    private: bool | None = None,
    **options: Any,
) -> str:
    """Upload what `save_pretrained_merged` writes; arguments as of it and of `push_to_hub`."""
    method = check_save_method(save_method)
    repository, options = open_repository(repo_id, token, private, options)

    def save(folder: Path) -> None:
        save_pretrained_merged(model, folder, tokenizer, method, token=token, **options)

    return _push(repository, save)


def push_to_hub_gguf(
    model: Any,
    repo_id: str,
    tokenizer: Any = None,
    quantization_method: Wanted = None,
    *,
    quantization_type: Wanted = None,
    token: str | None = None,
    private: bool | None = None,
    **options: Any,
) -> str:
    """Upload what `save_pretrained_gguf` writes; arguments as of it and of `push_to_hub`."""
    found = find_methods(quantization_method, quantization_type)
    methods = [method.name for method in found]
    repository, options = open_repository(repo_id, token, private, options)

    def save(folder: Path) -> None:
        save_pretrained_gguf(model, folder, tokenizer, methods, token=token, **options)

    return _push(repository, save)


@dataclass(frozen=True)
class Repository:
    """One that is there and can be written to.

    Attributes:
        api: huggingface_hub's, with the token.
        repo_id: "user/name".
        address: of its page.
        revision: branch, or None for the main one.
        commit: commit_message and the like.
    """

    api: Any
    repo_id: str
    address: str
    revision: str | None = None
    commit: dict[str, Any] = field(default_factory=dict)

    def upload(self, folder: Path, only: Sequence[str] | None = None) -> str:
        """Commit the files of a folder at once; gives the repository's address.

        Args:
            folder: with the files.
            only: names of those that are meant; None for all.

        Raises:
            UserError: the hub refuses, or the network fails.
        """
        with readable_hub_errors(self.repo_id, self.api.endpoint):
            self.api.upload_folder(
                repo_id=self.repo_id,
                folder_path=folder,
                revision=self.revision,
                allow_patterns=None if only is None else list(only),
                ignore_patterns=_unwelcome(folder),
                **{"commit_message": "Upload by colab_qlora", **self.commit},
            )
        return self.address


def open_repository(
    repo_id: str, token: str | None, private: bool | None, options: dict[str, Any]
) -> tuple[Repository, dict[str, Any]]:
    """Make the repository if it is not there.

    Args:
        repo_id, token, private: as of `push_to_hub`.
        options: all keyword arguments.

    Returns:
        The repository, and the options that are not about it.

    Raises:
        UserError: an unknown keyword argument, no token, one that is refused, or no connection.
    """
    from huggingface_hub import HfApi

    rest = dict(options)
    endpoint, revision = rest.pop("endpoint", None), rest.pop("revision", None)
    commit = {name: rest.pop(name) for name in _COMMIT if rest.get(name) is not None}
    rest = {name: value for name, value in rest.items() if name not in _COMMIT}
    # where a caller's own folder would be; there is a temporary one always
    rest.pop("use_temp_dir", None)
    refuse_unknown({name: value for name, value in rest.items() if name not in _SAVING})
    api = HfApi(endpoint=endpoint, token=find_token(token))
    with readable_hub_errors(repo_id, api.endpoint):
        made = api.create_repo(repo_id, private=private, exist_ok=True)
        _check_write(api, made.repo_id)
        if revision is not None:
            api.create_branch(made.repo_id, branch=revision, exist_ok=True)
    return Repository(api, made.repo_id, str(made), revision, commit), rest


def _check_write(api: Any, repo_id: str) -> None:
    """Ask whether the token may write; a repository that is there already hides a refusal."""
    if "write" in inspect.signature(api.auth_check).parameters:
        api.auth_check(repo_id, write=True)


def _push(repository: Repository, save: Callable[[Path], Any]) -> str:
    with tempfile.TemporaryDirectory(prefix="colab_qlora-") as scratch:
        folder = Path(scratch) / repository.repo_id.rpartition("/")[2]
        save(folder)
        return repository.upload(folder)


def _unwelcome(folder: Path) -> list[str]:
    """What is not uploaded: what a killed export left, and a model card that the hub refuses.

    PEFT's card may name a folder of this machine as base model; a hub takes none but model ids.
    """
    card = folder / "README.md"
    if not card.is_file():
        return [PARTIAL_FILES]
    for line in card.read_text(encoding="utf-8").splitlines():
        key, _, name = line.partition(":")
        if key.strip() == "base_model" and Path(name.strip().strip("'\"")).is_absolute():
            return [PARTIAL_FILES, "README.md"]
    return [PARTIAL_FILES]
