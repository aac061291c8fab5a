"""What `SFTTrainer` refuses before it looks at a row."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from colab_qlora.errors import UserError
from colab_qlora.training.early_stopping import EarlyStopping


def checked_tokenizer(model: Any, tokenizer: Any, processing_class: Any) -> Any:
    """The tokenizer, whichever name it came under; an error if it or the model is not usable."""
    if model is None or isinstance(model, str):
        raise UserError(
            "the trainer needs a loaded model",
            got=repr(model),
            do="Load it first: FastLanguageModel.from_pretrained(...)",
        )
    if tokenizer is not None and processing_class not in (None, tokenizer):
        raise UserError("tokenizer and processing_class differ", do="Pass one of them")
    return processing_class if processing_class is not None else tokenizer


def check_one_eval_set(early_stopping: bool | EarlyStopping, eval_dataset: Any) -> None:
    """Refuse early stopping over several eval sets.

    Raises:
        UserError: there are several.
    """
    if early_stopping and isinstance(eval_dataset, dict):
        raise UserError(
            "early stopping follows one eval loss",
            got=f"{len(eval_dataset)} eval sets ({', '.join(map(str, eval_dataset))})",
            do="Pass the one that counts as eval_dataset",
        )


def check_completions(args: Any, rows: Any) -> None:
    """Refuse completion_only_loss=True over rows that have no completion: TRL would not say so.

    Raises:
        UserError: the rows have neither "completion" nor "completion_mask".
    """
    if not getattr(args, "completion_only_loss", None) or not isinstance(rows, Dataset):
        return
    if not {"completion", "completion_mask"} & set(rows.column_names):
        raise UserError(
            "completion_only_loss=True needs rows with a prompt and a completion",
            got=", ".join(rows.column_names),
            do="Leave it out, or mask the rest with train_on_responses_only(trainer)",
        )
