"""Linears that read the same input, with their LoRA, as one GEMM.

For linears W_i with adapters (A_i, B_i, s_i) that share the input X (tokens, in):

    forward    Y  = [X | X A^T] [W | s B]^T
    backward   dX = [dY | dY s B] [W ; A]     dA = (dY s B)^T X     dB = s dY^T (X A^T)

where W stacks the W_i, A stacks the A_i and B is block-diagonal. The rank-r work rides in a few
columns more of the big GEMM, which cost nothing measurable there (0.5 % at 64 columns), where
separate GEMMs beside it cost up to a fifth of it, and the sum is rounded once instead of twice.

The weight is decoded from NF4 into a scratch buffer whose rows are wide enough for B; the input
buffer is wide enough for X A^T, and the gradient buffer for dY s B. A linear that cannot be
decoded (`kind == "module"`) is called as it is, and differentiated by autograd in the backward
pass. LoRA dropout draws its mask from a seed, so that the backward pass can draw it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from colab_qlora.kernels.lora_borders import Border, lora_borders_
from colab_qlora.layers.decode import decode_weights
from colab_qlora.layers.gemm import accumulate, multiply_into, parameter_gradient
from colab_qlora.layers.gradients import Gradients
from colab_qlora.layers.linear import LinearPart, LoraBlock
from colab_qlora.layers.lora_dropout import drop, dropped_gradient_
from colab_qlora.layers.module_call import ModuleCall
from colab_qlora.layers.scratch import Scratch
from colab_qlora.layers.span import Span, spans_of

# GEMM tiles on tensor cores are 64 deep: fewer spare columns would cost the same
PADDING = {"cuda": 64}


@dataclass
class GroupCall:
    """What one forward pass of a group has to remember besides tensors: seeds and module calls."""

    autocast: tuple[bool, torch.dtype]
    seeds: dict[int, int] = field(default_factory=dict)
    modules: dict[int, ModuleCall] = field(default_factory=dict)


class LinearGroup:
    """One pass over linears with a common input.

    Args:
        parts: the linears, in the order of their outputs.
        scratch: where weights are decoded and inputs are widened.
        slot: name of the weight's buffer; groups of the same slot overwrite each other's.
        max_weight_bytes: decode at most this much at a time, but never less than one linear.
    """

    def __init__(
        self,
        parts: Sequence[LinearPart],
        scratch: Scratch,
        slot: str = "weight",
        max_weight_bytes: int | None = None,
    ) -> None:
        self.parts = tuple(parts)
        self.scratch = scratch
        self.slot = slot
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

    def spare_columns(self, device: torch.device) -> int:
        """Columns beside the input or the output gradient that the rank-r products need."""
        padding = PADDING.get(device.type, 1)
        return -(-self.rank // padding) * padding

    def wide(self, slot: str, tokens: int, width: int, like: torch.Tensor) -> torch.Tensor:
        """A scratch buffer (tokens, width + spare columns) in the dtype of `like`."""
        shape = (tokens, width + self.spare_columns(like.device))
        return self.scratch.get(slot, shape, like.dtype, like.device)

    def trainable(self) -> list[torch.nn.Parameter]:
        """Parameters whose gradients `parameter_gradients` returns, in its order, each once."""
        return list({id(p): p for part in self.parts for p in part.trainable()}.values())

    def forward(
        self,
        x_wide: torch.Tensor,
        out: torch.Tensor,
        call: GroupCall,
        *,
        residual: torch.Tensor | None = None,
        only: frozenset[int] | None = None,
        lead: tuple[int, ...] | None = None,
    ) -> torch.Tensor:
        """Compute Y into `out` (+ residual) and return X A^T, a view of the input's spare columns.

        Args:
            x_wide: (tokens, in + spare), X in the first columns; the spare ones are written.
            out: (tokens, out_features), any row stride.
            residual: (tokens, out_features) that is added before the one rounding.
            only: indices of the parts to compute; None for all.
            lead: leading shape of the model's tensors, for parts that are called as modules.
        """
        x, spare = x_wide[:, : self.in_features], x_wide[:, self.in_features :]
        spans = self._spans(only, x)
        self._fill_products(x, spare, call, spans[0] if spans else None)
        for span in spans:
            rows = slice(span.first_row, span.last_row)
            weight = self._decoded(span, x_wide)[: rows.stop - rows.start]
            bias = self._bias(span, x)
            multiply_into(x_wide, weight, out[:, rows], bias, _columns(residual, rows))
        for index in self._modules(only):
            rows = slice(self.rows[index], self.rows[index + 1])
            y = call.modules.setdefault(index, ModuleCall(call.autocast)).forward(
                self.parts[index].module, x, lead
            )
            out[:, rows] = y if residual is None else y + residual[:, rows]
        return spare[:, : self.rank]

    def input_gradient(
        self, dy_wide: torch.Tensor, dx: torch.Tensor | None, call: GroupCall
    ) -> None:
        """dY s B into the spare columns, and dX = [dY | dY s B] [W ; A] into `dx`.

        Args:
            dy_wide: (tokens, out_features + spare), dY in the first columns; the spare ones are
                written.
            dx: (tokens, in_features), or None where nothing below the input learns. Parts that are
                modules add theirs in `parameter_gradients`.
        """
        spare = dy_wide[:, self.out_features :]
        spans = self._spans(None, dy_wide)
        if dx is not None and not spans:
            dx.zero_()
        if dx is None and not self.rank:
            return
        for number, span in enumerate(spans):
            is_last = number == len(spans) - 1
            self._through_span(span, dy_wide, spare, dx, is_first=number == 0, is_last=is_last)
        if dx is None:
            return
        for _, column, block in self.blocks:
            if column in call.seeds:
                ds = spare[:, column : column + block.rank]
                dropped_gradient_(dx, ds, block.a, block.dropout, call.seeds[column])

    def parameter_gradients(
        self,
        dy_wide: torch.Tensor,
        x: torch.Tensor,
        products: torch.Tensor | None,
        call: GroupCall,
        *,
        dx: torch.Tensor | None = None,
        lead: tuple[int, ...] | None = None,
    ) -> list[torch.Tensor | None]:
        """Gradients of `trainable()`, after `input_gradient` has filled the spare columns.

        Args:
            x: (tokens, in_features), the input again.
            products: (tokens, rank), what `forward` returned; None computes it again.
            dx: where parts that are called as modules add their input gradient.
        """
        dy, spare = dy_wide[:, : self.out_features], dy_wide[:, self.out_features :]
        if products is None:
            products = self.products(x, call)
        gradients = Gradients()
        self._a_gradients(spare, x, call, gradients)
        for index, column, block in self.blocks:
            if block.b.requires_grad:
                own = dy[:, self.rows[index] : self.rows[index + 1]]
                product = products[:, column : column + block.rank]
                found = parameter_gradient(own, product, block.b, block.scaling)
                gradients.add(block.b, found)
        for index, part in enumerate(self.parts):
            own = dy[:, self.rows[index] : self.rows[index + 1]]
            if part.kind == "module":
                call.modules[index].backward(part.module, x, own, dx, lead, gradients)
            elif isinstance(part.bias, torch.nn.Parameter) and part.bias.requires_grad:
                gradients.add(part.bias, own.sum(0, dtype=part.bias.dtype))
        return [gradients.of(p) for p in self.trainable()]

    def _a_gradients(
        self, spare: torch.Tensor, x: torch.Tensor, call: GroupCall, gradients: Gradients
    ) -> None:
        """(dY s B)^T x of every block; one GEMM where no block has a dropout of its own."""
        blocks = [(column, block) for _, column, block in self.blocks if block.a.requires_grad]
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
        """X A^T, (tokens, rank), with the dropout of this call."""
        spare = x.new_empty((x.shape[0], self.spare_columns(x.device)))
        self._fill_products(x, spare, call, None)
        return spare[:, : self.rank]

    @property
    def has_modules(self) -> bool:
        """True if a part is called as a module, so that gradients need the input itself."""
        return any(part.kind == "module" for part in self.parts)

    def _through_span(
        self,
        span: Span,
        dy_wide: torch.Tensor,
        spare: torch.Tensor,
        dx: torch.Tensor | None,
        *,
        is_first: bool,
        is_last: bool,
    ) -> None:
        weight = self._decoded(span, dy_wide)
        height, width = span.last_row - span.first_row, self.in_features
        dy = dy_wide[:, span.first_row : span.last_row]
        if spare.shape[1]:
            accumulate(spare, dy, weight[:height, width:], is_first)
        if dx is None:
            return
        if is_last and span.last_row == self.out_features:
            # the spare columns stand right beside these rows' gradient, and A under their weight
            accumulate(dx, dy_wide[:, span.first_row :], weight[:, :width], is_first)
            return
        accumulate(dx, dy, weight[:height, :width], is_first)
        if is_last and spare.shape[1]:
            accumulate(dx, spare, weight[height:, :width], False)

    def _fill_products(
        self, x: torch.Tensor, spare: torch.Tensor, call: GroupCall, span: Span | None
    ) -> None:
        """X A^T into the spare columns; zeros where no adapter stands."""
        if not spare.shape[1]:
            return
        if span is None:
            span = Span((), 0, 0)  # no weight, but its border holds A all the same
        height = span.last_row - span.first_row
        stacked = self._decoded(span, x)[height:, : self.in_features]
        torch.mm(x, stacked.t(), out=spare)
        for _, column, block in self.blocks:
            if not block.dropout:
                continue
            if column not in call.seeds:
                call.seeds[column] = int(torch.empty((), dtype=torch.int64).random_())
            seen = drop(x, block.dropout, call.seeds[column])
            spare[:, column : column + block.rank] = seen @ block.a.to(x.dtype).t()

    def _decoded(self, span: Span, like: torch.Tensor) -> torch.Tensor:
        """[W | s B ; A] of a span, (rows + spare, in + spare), in the dtype of `like`.

        Blocks with dropout have no A here: what they see of the input is not what the others see.
        """
        spare, width = self.spare_columns(like.device), self.in_features
        height = span.last_row - span.first_row
        shape = (height + spare, width + spare)
        slot = self.slot if span.parts else "lora_a"
        content = (id(self), span, shape)
        if self.scratch.holds(slot, content):
            return self.scratch.peek(slot, shape, like.dtype, like.device)
        buffer = self.scratch.get(slot, shape, like.dtype, like.device)
        firsts = [self.rows[index] - span.first_row for index in span.parts]
        parts = [self.parts[index] for index in span.parts]
        decode_weights(
            parts,
            [
                buffer[first : first + part.out_features, :width]
                for first, part in zip(firsts, parts, strict=True)
            ],
        )
        lora_borders_(buffer, height, width, self._borders(span))
        self.scratch.label(slot, content)
        return buffer

    def _borders(self, span: Span) -> list[Border]:
        """Where the adapters stand beside and under the span's weight; all of them have an A."""
        borders = []
        for index, column, block in self.blocks:
            here = index in span.parts
            b = block.b.detach()
            borders.append(
                Border(
                    first_row=self.rows[index] - span.first_row if here else 0,
                    column=column,
                    a=block.a.detach(),
                    b=b if here else b[:0],
                    scale=block.scaling,
                    has_a=not block.dropout,
                )
            )
        return borders

    def _bias(self, span: Span, x: torch.Tensor) -> torch.Tensor | None:
        parts = [self.parts[index] for index in span.parts]
        if all(part.bias is None for part in parts):
            return None
        pieces = [x.new_zeros(p.out_features) if p.bias is None else p.bias.detach() for p in parts]
        return torch.cat(pieces).to(x.dtype)

    def _modules(self, only: frozenset[int] | None) -> list[int]:
        return [
            index
            for index, part in enumerate(self.parts)
            if part.kind == "module" and (only is None or index in only)
        ]

    def _spans(self, only: frozenset[int] | None, like: torch.Tensor) -> list[Span]:
        row_bytes = (self.in_features + self.spare_columns(like.device)) * like.element_size()
        return spans_of(self.parts, self.rows, row_bytes, self.max_weight_bytes, only)


def _columns(tensor: torch.Tensor | None, columns: slice) -> torch.Tensor | None:
    return None if tensor is None else tensor[:, columns]
