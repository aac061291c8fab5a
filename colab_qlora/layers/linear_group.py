"""Linears that read the same input, with their LoRA, as one GEMM.

For linears W_i with adapters (A_i, B_i, s_i) that share the input X (tokens, in):

    forward    Y  = [X | X sA^T] [W | B]^T
    backward   dX = [dY | dY sB] [W ; A]      dA = (dY sB)^T X      dB = dY^T (X sA^T)

where W stacks the W_i, A stacks the A_i and B is block-diagonal. The rank-r work rides in a few
columns more of the big GEMM, which cost nothing measurable there (0.5 % at 64 columns), where
separate GEMMs beside it cost up to a fifth of it, and the sum is rounded once instead of twice.

The scale s goes with A forward and with B backward, so that neither gradient has to be scaled.

The weight is decoded from NF4 into a scratch buffer whose rows are wide enough for B; the input
buffer is wide enough for X sA^T, and the gradient buffer for dY sB. A linear that cannot be
decoded (`kind == "module"`) is called as it is, and differentiated by autograd in the backward
pass. LoRA dropout draws its mask from a seed, so that the backward pass can draw it again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from colab_qlora.layers.decode import GroupDecoder
from colab_qlora.layers.gemm import accumulate, multiply_into, parameter_gradient
from colab_qlora.layers.gradients import Gradients
from colab_qlora.layers.held_weights import HeldGroup, HoldKey
from colab_qlora.layers.linear import LinearPart, LoraBlock
from colab_qlora.layers.lora_dropout import drop, dropped_gradient_
from colab_qlora.layers.module_call import ModuleCall
from colab_qlora.layers.scratch import Scratch, Wide
from colab_qlora.layers.span import Span, spans_of

# GEMM tiles on tensor cores are 64 deep: fewer spare columns would cost the same. On a CPU rows
# then start at cache lines; where they do not, MKL sums in an order that depends on their stride,
# and a layer that recomputes gives other bits than one that keeps
PADDING = {"cuda": 64, "cpu": 16}


@dataclass
class GroupCall:
    """What one forward pass of a group has to remember besides tensors: seeds and module calls."""

    autocast: tuple[bool, torch.dtype]
    seeds: dict[int, int] = field(default_factory=dict)
    modules: dict[int, ModuleCall] = field(default_factory=dict)


class LinearGroup:
    """Linears with a common input, as long as what `watch_linear` watches is as it was.

    Args:
        parts: the linears, in the order of their outputs.
        scratch: where weights are decoded and inputs are widened.
        slot: name of the weight's buffer; groups of the same slot overwrite each other's.
        max_weight_bytes: decode at most this much at a time, but never less than one linear.
        hold_key: the group's name in `scratch.held`, if its decoded weight may stay.
    """

    def __init__(
        self,
        parts: Sequence[LinearPart],
        scratch: Scratch,
        slot: str = "weight",
        max_weight_bytes: int | None = None,
        hold_key: HoldKey | None = None,
    ) -> None:
        self.parts = tuple(parts)
        self.scratch = scratch
        self.max_weight_bytes = max_weight_bytes
        self.in_features = self.parts[0].in_features
        self.rows = [0]
        for part in self.parts:
            self.rows.append(self.rows[-1] + part.out_features)
        self.out_features = self.rows[-1]
        self.blocks: list[tuple[int, int, LoraBlock]] = []  # (part, first column, block)
        column = 0
        for index, part in enumerate(self.parts):
            for block in part.blocks:
                self.blocks.append((index, column, block))
                column += block.rank
        self.rank = column
        self.has_modules = any(part.kind == "module" for part in self.parts)
        # modules are never decoded; and PEFT merges into a dense weight's `data`, and only there,
        # which no counter tells
        if any(part.kind in ("module", "dense") for part in self.parts):
            hold_key = None
        self._decoder = GroupDecoder(self.parts, self.rows, self.blocks, scratch, slot, hold_key)
        self._spans_by: dict[Any, list[Span]] = {}
        self._trainable = list({id(p): p for q in self.parts for p in q.trainable()}.values())

    def is_held_stale(self) -> bool:
        """True if the decoded weight that should be held is missing, or that of another weight."""
        return self._decoder.is_held_stale()

    def held_now(self) -> HeldGroup | None:
        """The decoded weight that is held; None if none is."""
        return self._decoder.held_now()

    def is_current(self, held: HeldGroup) -> bool:
        """True if a held, decoded weight is still that of this group."""
        return self._decoder.is_current(held)

    def spare_columns(self, device: torch.device) -> int:
        """Columns beside the input or the output gradient that the rank-r products need."""
        padding = PADDING.get(device.type, 1)
        return -(-self.rank // padding) * padding

    def holding(self, outputs: frozenset[int] | None) -> frozenset[int] | None:
        """The parts that compute these outputs: the only one, where there is one for all."""
        return frozenset({0}) if outputs and len(self.parts) == 1 else outputs

    def wide(self, slot: str, tokens: int, width: int, like: torch.Tensor) -> Wide:
        """A scratch buffer (tokens, width + spare columns) in the dtype of `like`."""
        return self.scratch.wide(slot, tokens, width, self.spare_columns(like.device), like)

    def trainable(self) -> list[torch.nn.Parameter]:
        """Parameters whose gradients `parameter_gradients` returns, in its order, each once."""
        return self._trainable

    def forward(
        self,
        x: Wide,
        out: torch.Tensor,
        call: GroupCall,
        *,
        residual: torch.Tensor | None = None,
        only: frozenset[int] | None = None,
        lead: tuple[int, ...] | None = None,
    ) -> torch.Tensor:
        """Compute Y into `out` (+ residual) and return X sA^T, a view of the input's spare columns.

        Args:
            x: (tokens, in + spare), X in the main columns; the spare ones are written.
            out: (tokens, out_features), any row stride.
            residual: (tokens, out_features) that is added before the one rounding.
            only: indices of the parts to compute; None for all.
            lead: leading shape of the model's tensors, for parts that are called as modules.
        """
        spans = self._spans(only, x.main)
        self._fill_products(x.main, x.spare, call, spans[0] if spans else None)
        for span in spans:
            weight = self._decoder.decoded(span, x.whole, x.spare.shape[1], is_backward=False)
            bias = self._bias(span, x.main)
            rows = slice(span.first_row, span.last_row)
            is_all = len(spans) == 1 and rows == slice(0, self.out_features)
            part = out if is_all else out[:, rows]
            beside = residual if is_all or residual is None else residual[:, rows]
            multiply_into(x.whole, weight.beside_b, part, bias, beside)
        if self.has_modules:
            self._call_modules(x.main, out, call, residual, only, lead)
        return x.spare if x.spare.shape[1] == self.rank else x.spare[:, : self.rank]

    def input_gradient(self, dy: Wide, dx: torch.Tensor | None, call: GroupCall) -> None:
        """dY sB into the spare columns, and dX = [dY | dY sB] [W ; A] into `dx`.

        Args:
            dy: (tokens, out_features + spare), dY in the main columns; the spare ones are written.
            dx: (tokens, in_features), or None where nothing below the input learns. Parts that are
                modules add theirs in `parameter_gradients`.
        """
        spans = self._spans(None, dy.whole)
        if dx is not None and not spans:
            dx.zero_()
        if dx is None and not self.rank:
            return
        for number, span in enumerate(spans):
            is_last = number == len(spans) - 1
            self._through_span(span, dy, dx, is_first=number == 0, is_last=is_last)
        if dx is None or not call.seeds:
            return
        for _, column, block in self.blocks:
            if column in call.seeds:
                ds = dy.spare[:, column : column + block.rank]
                dropped_gradient_(dx, ds, block.a, block.dropout, call.seeds[column])

    def parameter_gradients(
        self,
        dy: Wide,
        x: torch.Tensor,
        products: torch.Tensor | None,
        call: GroupCall,
        *,
        dx: torch.Tensor | None = None,
        lead: tuple[int, ...] | None = None,
        known: Mapping[tuple[int, str], torch.Tensor] | None = None,
    ) -> list[torch.Tensor | None]:
        """Gradients of `trainable()`, after `input_gradient` has filled the spare columns.

        Args:
            x: (tokens, in_features), the input again; not looked at where `known` has all of A.
            products: (tokens, rank), what `forward` returned; None computes it again.
            dx: where parts that are called as modules add their input gradient.
            known: gradients that some kernel had on its way, in float32, by a block's first column
                and "a" or "b".
        """
        known = known or {}
        if products is None:
            products = self.products(x, call)
        gradients = Gradients()
        for _, column, block in self.blocks:
            for name, parameter in (("a", block.a), ("b", block.b)) if known else ():
                if (column, name) in known and parameter.requires_grad:
                    gradients.add(parameter, known[column, name].to(parameter.dtype))
        self._a_gradients(dy.spare, x, call, gradients, known)
        for index, column, block in self.blocks:
            if block.b.requires_grad and (column, "b") not in known:
                own = self._rows_of(dy.main, index)
                product = products
                if len(self.blocks) > 1:
                    product = products[:, column : column + block.rank]
                gradients.add(block.b, parameter_gradient(own, product, block.b))
        for index, part in enumerate(self.parts):
            if part.kind == "module":
                own = self._rows_of(dy.main, index)
                call.modules[index].backward(part.module, x, own, dx, lead, gradients)
            elif isinstance(part.bias, torch.nn.Parameter) and part.bias.requires_grad:
                gradients.add(
                    part.bias, self._rows_of(dy.main, index).sum(0, dtype=part.bias.dtype)
                )
        return [gradients.of(p) for p in self._trainable]

    def _rows_of(self, dy: torch.Tensor, index: int) -> torch.Tensor:
        """The columns of a gradient (tokens, out_features) that are those of one part."""
        return dy if len(self.parts) == 1 else dy[:, self.rows[index] : self.rows[index + 1]]

    def _a_gradients(
        self,
        spare: torch.Tensor,
        x: torch.Tensor,
        call: GroupCall,
        gradients: Gradients,
        known: Mapping[tuple[int, str], torch.Tensor],
    ) -> None:
        """(dY sB)^T x of every block; one GEMM where no block has a dropout of its own."""
        blocks = [
            (column, block)
            for _, column, block in self.blocks
            if block.a.requires_grad and (column, "a") not in known
        ]
        if len(blocks) > 1 and not call.seeds and len({b.a.dtype for _, b in blocks}) == 1:
            together = parameter_gradient(spare[:, : self.rank], x, blocks[0][1].a)
            for column, block in blocks:
                gradients.add(block.a, together[column : column + block.rank])
            return
        for column, block in blocks:
            seed = call.seeds.get(column)
            seen = x if seed is None else drop(x, block.dropout, seed)
            ds = spare[:, column : column + block.rank]
            gradients.add(block.a, parameter_gradient(ds, seen, block.a))

    def products(self, x: torch.Tensor, call: GroupCall) -> torch.Tensor:
        """X sA^T, (tokens, rank), with the dropout of this call."""
        spare = x.new_empty((x.shape[0], self.spare_columns(x.device)))
        self._fill_products(x, spare, call, None)
        return spare[:, : self.rank]

    def _through_span(
        self, span: Span, dy: Wide, dx: torch.Tensor | None, *, is_first: bool, is_last: bool
    ) -> None:
        spare = dy.spare.shape[1]
        weight = self._decoder.decoded(span, dy.whole, spare, is_backward=True)
        is_all = span.first_row == 0 and span.last_row == self.out_features
        own = dy.main if is_all else dy.main[:, span.first_row : span.last_row]
        if spare:
            accumulate(dy.spare, own, weight.b, is_first)
        if dx is None:
            return
        if is_all:
            accumulate(dx, dy.whole, weight.above_a, is_first)
        elif is_last and span.last_row == self.out_features:
            # the spare columns stand right beside these rows' gradient, and A under their weight
            accumulate(dx, dy.whole[:, span.first_row :], weight.above_a, is_first)
        else:
            accumulate(dx, own, weight.alone, is_first)
            if is_last and spare:
                accumulate(dx, dy.spare, weight.a, False)

    def _fill_products(
        self, x: torch.Tensor, spare: torch.Tensor, call: GroupCall, span: Span | None
    ) -> None:
        """X sA^T into the spare columns; zeros where no adapter stands."""
        if not spare.shape[1]:
            return
        if span is None:
            span = Span((), 0, 0)  # no weight, but its border holds A all the same
        weight = self._decoder.decoded(span, x, spare.shape[1], is_backward=False)
        torch.mm(x, weight.a_transposed, out=spare)
        for _, column, block in self.blocks:
            if not block.dropout:
                continue
            if column not in call.seeds:
                call.seeds[column] = int(torch.empty((), dtype=torch.int64).random_())
            seen = drop(x, block.dropout, call.seeds[column])
            scaled = (block.a.detach() * block.scaling).to(x.dtype)
            spare[:, column : column + block.rank] = seen @ scaled.t()

    def _call_modules(
        self,
        x: torch.Tensor,
        out: torch.Tensor,
        call: GroupCall,
        residual: torch.Tensor | None,
        only: frozenset[int] | None,
        lead: tuple[int, ...] | None,
    ) -> None:
        for index, part in enumerate(self.parts):
            if part.kind != "module" or (only is not None and index not in only):
                continue
            rows = slice(self.rows[index], self.rows[index + 1])
            y = call.modules.setdefault(index, ModuleCall(call.autocast)).forward(
                part.module, x, lead
            )
            out[:, rows] = y if residual is None else y + residual[:, rows]

    def _bias(self, span: Span, x: torch.Tensor) -> torch.Tensor | None:
        parts = [self.parts[index] for index in span.parts]
        if all(part.bias is None for part in parts):
            return None
        pieces = [x.new_zeros(p.out_features) if p.bias is None else p.bias.detach() for p in parts]
        return torch.cat(pieces).to(x.dtype)

    def _spans(self, only: frozenset[int] | None, like: torch.Tensor) -> list[Span]:
        key = (only, like.dtype, like.device)
        found = self._spans_by.get(key)
        if found is None:
            row_bytes = (self.in_features + self.spare_columns(like.device)) * like.element_size()
            found = spans_of(self.parts, self.rows, row_bytes, self.max_weight_bytes, only)
            self._spans_by[key] = found
        return found
