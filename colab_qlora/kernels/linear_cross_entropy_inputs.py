"""What `linear_cross_entropy` is given: the checks, the labelled rows, and the divisor n.

Everything here looks at labels and shapes only; no logit is computed. The host reads from the
device once: the count of labelled rows and the range of their labels, together. Who has the labels
before the hidden states asks for that read early (`count_labels`): by the time that the head is
reached it has long arrived, and nobody waits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from colab_qlora.errors import UserError
from colab_qlora.kernels.int8_decode import Int8Weight
from colab_qlora.kernels.label_count import label_count

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True, eq=False)
class LabelledRows:
    """The rows that meet the head.

    Attributes:
        index: their places among all rows, int64, shape (labelled,); None if every row is labelled.
        targets: the token that each has to predict, int64, shape (labelled,).
    """

    index: torch.Tensor | None
    targets: torch.Tensor


def check_tensors(
    hidden: torch.Tensor,
    weight: torch.Tensor | Int8Weight,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    """Raise a ValueError that names the first tensor whose shape, dtype or device does not fit."""
    if hidden.ndim < 2 or hidden.dtype not in _FLOATS:
        raise UserError(
            "hidden is not a float tensor of rows",
            got=f"{hidden.dtype}, shape {tuple(hidden.shape)}",
            allowed="float16, bfloat16, float32 or float64, shape (..., tokens, width)",
        )
    width = hidden.shape[-1]
    if len(weight.shape) != 2 or weight.shape[1] != width or not weight.shape[0]:
        raise UserError(
            "weight does not fit hidden",
            got=f"shape {tuple(weight.shape)}",
            allowed=f"(vocab, {width}), vocab 1 or more",
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise UserError(
            "bias does not fit weight",
            got=f"shape {tuple(bias.shape)}",
            allowed=f"({weight.shape[0]},)",
        )
    # int8 codes are decoded to hidden's dtype
    codes = weight.codes if isinstance(weight, Int8Weight) else None
    if codes is not None and codes.device != hidden.device:
        got = f"codes on {codes.device}"
        raise UserError("weight and hidden differ in device", got=got, allowed=hidden.device)
    dense = None if isinstance(weight, Int8Weight) else weight
    for name, tensor in (("weight", dense), ("bias", bias)):
        if tensor is not None and (tensor.dtype, tensor.device) != (hidden.dtype, hidden.device):
            raise UserError(
                f"{name} and hidden differ in dtype or device",
                got=f"{name} {tensor.dtype} on {tensor.device}",
                allowed=f"{hidden.dtype} on {hidden.device}",
                do=f"Cast one of them, e.g. hidden.to({name}.dtype)",
            )
    if labels.dtype not in _INTEGERS or labels.shape != hidden.shape[:-1]:
        raise UserError(
            "labels are not one token a row of hidden",
            got=f"{labels.dtype}, shape {tuple(labels.shape)}",
            allowed=f"an integer dtype, shape {tuple(hidden.shape[:-1])}",
        )


@dataclass(frozen=True, eq=False)
class CountedLabels:
    """Labels whose count and range are on their way to the host.

    Attributes:
        given: as they came, integers, shape (..., tokens).
        flat: int64, shape (tokens of all sequences,), shifted.
        ignore_index, shift: as they were counted with.
        numbers: int64, shape (3,): ignored rows, lowest and highest label; pinned if it is copied.
        arrival: what to wait for before `numbers` is read; None if it is there.
    """

    given: torch.Tensor
    ignore_index: int
    shift: bool
    flat: torch.Tensor
    numbers: torch.Tensor
    arrival: torch.cuda.Event | None


def count_labels(
    labels: torch.Tensor, ignore_index: int = -100, shift: bool = True
) -> CountedLabels:
    """Have the device count the labelled rows, without waiting for it.

    Args:
        labels: an integer dtype, shape (..., tokens).
        ignore_index: the label of rows that have none.
        shift: position i has the label of position i + 1 of its sequence; the last has none.
    """
    if not labels.numel():
        flat = labels.detach().long().reshape(-1)
        return CountedLabels(labels, ignore_index, shift, flat, flat.new_zeros(3), None)
    # kernels start on the current device, which need not be the labels'
    with torch.cuda.device_of(labels):
        flat, numbers = label_count(labels.detach(), ignore_index, shift)
    arrival = None
    if numbers.is_cuda:
        on_host = torch.empty(3, dtype=torch.int64, pin_memory=True)
        numbers = on_host.copy_(numbers, non_blocking=True)
        arrival = torch.cuda.Event()
        arrival.record(torch.cuda.current_stream(flat.device))
    return CountedLabels(labels, ignore_index, shift, flat, numbers, arrival)


def find_labelled(
    counted: CountedLabels, ignore_index: int, vocab: int, device: torch.device
) -> LabelledRows:
    """The labelled rows, in order, by one read from the device.

    Args:
        ignore_index: as given to `count_labels`.
        vocab: every other label lies in [0, vocab).
        device: where the result is needed.

    Raises:
        ValueError: a label outside the vocabulary.
    """
    labels = counted.flat
    if not labels.numel():
        return LabelledRows(None, labels.to(device))
    if counted.arrival is not None:
        counted.arrival.synchronize()
    ignored_rows, low, high = counted.numbers.tolist()
    count = labels.numel() - ignored_rows
    if count and not 0 <= low <= high < vocab:
        raise UserError(
            "labels hold a token that the head does not have",
            got=f"labels from {low} to {high}",
            allowed=f"0 to {vocab - 1}, and {ignore_index} for no label",
            do="Tokenise with the model's own tokenizer",
        )
    if not ignored_rows:
        return LabelledRows(None, labels.to(device))
    # nonzero would read the count from the device once more
    index = torch.nonzero_static(labels != ignore_index, size=count).squeeze(1)
    return LabelledRows(index.to(device), labels.index_select(0, index).to(device))


def loss_divisor(
    num_items_in_batch: int | torch.Tensor | None, labelled: int, like: torch.Tensor
) -> float | torch.Tensor:
    """n as a number or, if it comes from a GPU, as a 0-dim tensor that nobody waits for."""
    if not labelled:
        return 1.0
    if num_items_in_batch is None:
        return float(labelled)
    if isinstance(num_items_in_batch, torch.Tensor):
        if num_items_in_batch.numel() != 1:
            raise UserError(
                "num_items_in_batch is not one number",
                got=f"shape {tuple(num_items_in_batch.shape)}",
                allowed="an int, or a tensor with one element",
            )
        if num_items_in_batch.is_cuda:
            return num_items_in_batch.detach().reshape(()).to(like.device, loss_dtype(like.dtype))
    items = float(num_items_in_batch)
    if items <= 0:
        raise UserError(
            "num_items_in_batch is not positive, yet some labels are not ignored",
            got=items,
            allowed="1 or more",
        )
    return items


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    """What losses and sums of gradients are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
