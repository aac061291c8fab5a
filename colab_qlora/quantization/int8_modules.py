"""Linears and embeddings with int8 weights, one float32 scale a row; inputs stay as they are.

    Int8Linear       y = x W^T + b        W = codes * SCB / 127, decoded for the product and let go
    Int8Embedding    y = codes[token] * (SCB[token] / 127)

Names and layout of the tensors are those of bitsandbytes' Linear8bitLt (`weight` int8, `SCB`
float32), whose forward quantises its input to int8 as well; this one does not. Codes never become
floats and scales never leave float32, whatever cast a model gets: a cast sets `compute_dtype`.

PEFT finds an `nn.Linear` and puts its plain LoRA around it, which trains and runs. Its own merging
would write into the codes, and its DoRA take their norms; neither can be refused from in here.
`instance_methods.py` refuses merging on a dynamic model (`merge_16_bit` is the way), and
`get_peft_model` refuses DoRA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from colab_qlora.errors import UserError
from colab_qlora.kernels.int8_decode import Int8Weight, row_scales
from colab_qlora.kernels.int8_linear import int8_decoded, int8_linear
from colab_qlora.quantization.int8_weight import encode_int8


class _Int8Module(torch.nn.Module):
    """What both modules share: codes, scales, and how they are moved, copied and loaded."""

    weight: torch.Tensor
    SCB: torch.Tensor
    compute_dtype: torch.dtype

    def _set_up(self, weight: Int8Weight, compute_dtype: torch.dtype) -> None:
        codes = weight.codes
        if not isinstance(codes, torch.nn.Parameter):
            codes = torch.nn.Parameter(codes, requires_grad=False)
        self.weight = codes
        self.register_buffer("SCB", weight.absmax)
        self.compute_dtype = compute_dtype

    def int8_weight(self) -> Int8Weight:
        """The module's own tensors, nothing copied."""
        return Int8Weight(self.weight, self.SCB)

    def decoded(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight as a new tensor (rows, columns); in `compute_dtype` if no dtype is given."""
        return int8_decoded(self.int8_weight(), dtype or self.compute_dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Move the tensors; a cast is for `compute_dtype` and the bias alone.

        Tensors keep their identity where torch allows it, so that a tied head stays tied.
        """
        held = {"weight": self.weight, "SCB": self.SCB}
        # what a cast would make of a parameter; a move leaves the dtype
        probe = fn(torch.empty(0, dtype=self.compute_dtype, device=self.SCB.device))
        if probe.dtype.is_floating_point:
            self.compute_dtype = probe.dtype
        super()._apply(
            lambda tensor: tensor if any(tensor is own for own in held.values()) else fn(tensor),
            recurse,
        )
        for name, tensor in held.items():
            with torch.no_grad():
                moved = fn(tensor)
                if moved.dtype != tensor.dtype:
                    moved = tensor.to(moved.device)
            if torch._has_compatible_shallow_copy_type(tensor, moved):
                tensor.data = moved
            elif name == "weight":  # from or to the meta device
                self.weight = torch.nn.Parameter(moved, requires_grad=False)
            else:
                self.SCB = moved
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        for name, dtype in (("weight", torch.int8), ("SCB", torch.float32)):
            given = state_dict.get(prefix + name)
            # torch would cast floats to int8 without a word
            if isinstance(given, torch.Tensor) and given.dtype != dtype:
                raise UserError(
                    f"{prefix}{name} of the state dict is of another dtype",
                    got=given.dtype,
                    allowed=dtype,
                    do=f"Encode it first: {type(self).__name__}.from_weight(weight)",
                )
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Int8Linear(_Int8Module, torch.nn.Linear):
    """A linear with an int8 weight, which does not train.

    Args:
        in_features, out_features: sizes.
        bias: whether there is one, zeros, in `compute_dtype`.
        device: of the tensors.
        compute_dtype: what the weight is decoded to where nobody asks for another dtype; torch's
            default dtype if None.

    Attributes:
        weight: codes, int8, shape (out_features, in_features); all 0 until they are loaded.
        SCB: the rows' absmax, float32, shape (out_features,).
        bias: shape (out_features,), or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        dtype = compute_dtype or torch.get_default_dtype()
        codes = torch.zeros((out_features, in_features), dtype=torch.int8, device=device)
        absmax = torch.zeros(out_features, dtype=torch.float32, device=device)
        self._set_up(Int8Weight(codes, absmax), dtype)
        zeros = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        self._set_bias(zeros)

    def _set_bias(self, bias: torch.Tensor | None) -> None:
        if bias is not None and not isinstance(bias, torch.nn.Parameter):
            bias = torch.nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", bias)

    @classmethod
    def from_codes(
        cls,
        codes: torch.Tensor,
        absmax: torch.Tensor,
        bias: torch.Tensor | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> Int8Linear:
        """A linear around these very tensors.

        Args:
            codes: int8, shape (out_features, in_features).
            absmax: float32, shape (out_features,).
            bias: any float dtype, shape (out_features,); a Parameter stays the same one.
            compute_dtype: the bias's, or torch's default dtype, if None.

        Raises:
            UserError: tensors of other dtypes, shapes or devices.
        """
        weight = Int8Weight(codes, absmax)
        dtype = compute_dtype or (bias.dtype if bias is not None else None)
        made = cls(codes.shape[1], codes.shape[0], False, "meta", dtype)
        made._set_up(weight, made.compute_dtype)
        if bias is not None and bias.shape != codes.shape[:1]:
            got, allowed = tuple(bias.shape), f"({codes.shape[0]},)"
            raise UserError("bias does not fit the codes", got=got, allowed=allowed)
        made._set_bias(bias)
        return made

    @classmethod
    def from_weight(
        cls,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> Int8Linear:
        """Encode a weight (out_features, in_features); `compute_dtype` is the weight's if None.

        Raises:
            UserError: not a matrix of finite floating-point numbers.
        """
        return cls.from_codes(*encode_int8(weight), bias, compute_dtype or weight.dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., in_features) to (..., out_features), in the input's dtype or autocast's."""
        return int8_linear(input, self.int8_weight(), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, compute_dtype={self.compute_dtype}"


class Int8Embedding(_Int8Module, torch.nn.Embedding):
    """An embedding with an int8 table, which does not train.

    Args:
        num_embeddings, embedding_dim: sizes.
        padding_idx: as of `nn.Embedding`; a name only, since nothing trains.
        device, compute_dtype: as of `Int8Linear`; outputs are in `compute_dtype`.

    Attributes:
        weight: codes, int8, shape (num_embeddings, embedding_dim).
        SCB: the rows' absmax, float32, shape (num_embeddings,).
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        device: Any = None,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        torch.nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = padding_idx
        # what torch's own attributes of an embedding are by default
        self.max_norm, self.norm_type = None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        codes = torch.zeros((num_embeddings, embedding_dim), dtype=torch.int8, device=device)
        absmax = torch.zeros(num_embeddings, dtype=torch.float32, device=device)
        dtype = compute_dtype or torch.get_default_dtype()
        self._set_up(Int8Weight(codes, absmax), dtype)

    @classmethod
    def from_codes(
        cls,
        codes: torch.Tensor,
        absmax: torch.Tensor,
        padding_idx: int | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> Int8Embedding:
        """An embedding around these very tensors; as `Int8Linear.from_codes`."""
        weight = Int8Weight(codes, absmax)
        made = cls(codes.shape[0], codes.shape[1], padding_idx, "meta", compute_dtype)
        made._set_up(weight, made.compute_dtype)
        return made

    @classmethod
    def from_weight(
        cls,
        weight: torch.Tensor,
        padding_idx: int | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> Int8Embedding:
        """Encode a table (num_embeddings, embedding_dim); as `Int8Linear.from_weight`."""
        return cls.from_codes(*encode_int8(weight), padding_idx, compute_dtype or weight.dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Token ids (...) to rows (..., embedding_dim), scaled in float32, in `compute_dtype`."""
        codes = torch.nn.functional.embedding(input, self.weight)
        scales = row_scales(torch.nn.functional.embedding(input, self.SCB[:, None]))
        return (codes.float() * scales).to(self.compute_dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, compute_dtype={self.compute_dtype}"


def tie(embedding: Int8Embedding, head: Int8Linear) -> None:
    """Give the head the embedding's own codes and scales; copies, pickles and moves keep them one.

    (Not a move from or to the meta device: call it again then.)

    Raises:
        UserError: the two differ in shape.
    """
    if embedding.weight.shape != head.weight.shape:
        raise UserError(
            "head and embedding cannot share a weight",
            got=f"{tuple(head.weight.shape)} and {tuple(embedding.weight.shape)}",
            allowed="the same shape",
        )
    head.weight, head.SCB = embedding.weight, embedding.SCB
