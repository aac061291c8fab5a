"""Functions that tutorials import from other kits; they do little or nothing here."""

from __future__ import annotations

from typing import Any, NoReturn

from colab_qlora.errors import UserError

_NOTHING = (
    "colab_qlora: {name} does nothing, as nothing is patched here: TRL's trainers take the model "
    "as it is, and colab_qlora.SFTTrainer is the one to import instead of TRL's"
)


def PatchDPOTrainer() -> None:  # noqa: N802  # the name that tutorials call
    """Say that nothing is patched: `trl.DPOTrainer` takes our models as it is."""
    print(_NOTHING.format(name="PatchDPOTrainer()"), flush=True)


def PatchFastRL(algorithm: str | None = None, FastLanguageModel: Any = None) -> None:  # noqa: N802, N803
    """Say that nothing is patched: `trl.GRPOTrainer` and its like take our models as they are.

    Args:
        algorithm, FastLanguageModel: not used; tutorials pass them.
    """
    print(_NOTHING.format(name="PatchFastRL()"), flush=True)


class FastVisionModel:
    """Images are not trained on here: loading such a model says so."""

    @staticmethod
    def from_pretrained(model_name: str | None = None, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse.

        Raises:
            UserError: always.
        """
        raise UserError(
            "models for images are not to be had here",
            got=f"FastVisionModel.from_pretrained({model_name!r})",
            allowed="models that read and write text",
            do="Take FastLanguageModel and a text model, or another kit for images",
        )


def is_bfloat16_supported() -> bool:
    """Whether the GPU computes in bfloat16 natively; a T4 does not, though torch says so.

    False without a GPU, as `torch.cuda.is_bf16_supported()` is: transformers' TrainingArguments
    refuses bf16=True there. What a CPU computes in is chosen when the model is loaded.
    """
    import torch

    from colab_qlora.dtypes import pick_compute_dtype

    return torch.cuda.is_available() and pick_compute_dtype() == torch.bfloat16


is_bf16_supported = is_bfloat16_supported


def unsloth_train(trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """`trainer.train(...)`: its accumulated steps equal whole batches as they are."""
    return trainer.train(*args, **kwargs)
