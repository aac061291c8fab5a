"""What a quantised model learns stays in float32, whatever a trainer casts it to.

TRL's DPO, GRPO and KTO trainers cast all trainable weights of a 4-bit or 8-bit model to bfloat16:
adapters, and the tables of `modules_to_save`. A T4 has no bfloat16, and its loss scaling cannot
unscale such gradients; elsewhere an update of less than 1/256 of a weight rounds to nothing. The
parameters stay the same objects, so an optimiser that holds them already follows.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from colab_qlora.quantization.quantised_weights import is_quantised

_HALF = (torch.bfloat16, torch.float16)


class TrainedWeights:
    """The trainable weights of one model, which are looked for once and then remembered.

    A trainer casts all of them or none, so those that are known show whether it did. They are
    looked for again when one of them was cast, or is trained no longer.
    """

    def __init__(self) -> None:
        self._model: Any = None
        self._known: list[torch.nn.Parameter] | None = None

    def watch(self, causal: Any) -> None:
        """Say whose weights they are: a transformers model, its head included."""
        # weakly: the model holds this, and its memory should be free as soon as it is let go
        self._model, self._known = weakref.ref(causal), None

    def in_float32_(self, trunk: Any) -> bool:
        """Cast what a quantised model learns back to float32, if something cast it.

        Args:
            trunk: the model's decoder, which is all that there is to look through in a copy that
                nobody watches. The weights of a model that is not quantised are left alone.

        Returns:
            Whether there was anything to cast.
        """
        if self._known is not None and all(
            parameter.requires_grad and parameter.dtype not in _HALF for parameter in self._known
        ):
            return False
        model = self._model() if self._model is not None else None
        whole = trunk if model is None else model
        trained = [parameter for parameter in whole.parameters() if parameter.requires_grad]
        if not is_quantised(whole):
            # nothing to watch over
            self._known = []
            return False
        self._known = trained or None
        cast = [parameter for parameter in trained if parameter.dtype in _HALF]
        for parameter in cast:
            parameter.data = parameter.data.float()
        return bool(cast)
