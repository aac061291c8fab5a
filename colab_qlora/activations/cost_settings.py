"""How a training step runs, as far as its bytes and FLOPs depend on it."""

from __future__ import annotations

from dataclasses import dataclass

from colab_qlora.activations.model_shape import ModelShape, Rank, group_rank
from colab_qlora.errors import UserError
from colab_qlora.kernels.attention_choice import FEATURES
from colab_qlora.layers.linear_group import PADDING

_MIB = 2**20
# torch hands cuBLAS a workspace out of its allocator: 32 MiB from compute capability 9.0 on (as
# NVIDIA advises, pytorch pull request 120925), 8,519,680 bytes below (seen in allocator snapshots).
# One for each thread that multiplies, here forward and backward, is an assumption
GEMM_WORKSPACE_BYTES = 2 * 32 * _MIB
GEMM_WORKSPACE_BYTES_BEFORE_HOPPER = 2 * 8_519_680


@dataclass(frozen=True)
class CostSettings:
    """How the step runs, as far as costs depend on it.

    Attributes:
        itemsize: bytes of an activation: 2, 4 or 8.
        mlp_tokens, max_weight_bytes, holds_gate_up: as in `models.fused_state.FusedState`.
        has_dropout: adapters draw a dropout, which keeps the MLP from working in chunks.
        spare_multiple: columns beside inputs and weights come in multiples of this: 64 on a GPU,
            16 on a CPU (`layers.linear_group.PADDING`).
        attention: the backend, a name of `kernels.attention_choice`.
        logits_budget_bytes: for a chunk of logits; None: 256 MiB.
        is_4bit: weights in NF4 with double quantisation; otherwise `itemsize` each.
        optimizer_bits: 8 or 32, of the two moments.
        has_gradients: gradients of earlier micro-batches are there (gradient accumulation).
        gemm_workspace_bytes: what cuBLAS has; 0 on a CPU.
        records_layers: layers may be recorded as CUDA graphs where the host is slow.
        holds_weights: weights may stay decoded where memory is left over.
        embedding: where its table is: "gpu", "host", or "either", which leaves it to the planner
            (and counts as "gpu" elsewhere).
    """

    itemsize: int = 2
    mlp_tokens: int | None = None
    max_weight_bytes: int | None = None
    holds_gate_up: bool = False
    has_dropout: bool = False
    spare_multiple: int = PADDING["cuda"]
    attention: str = "flash"
    logits_budget_bytes: int | None = None
    is_4bit: bool = True
    optimizer_bits: int = 8
    has_gradients: bool = False
    gemm_workspace_bytes: int = GEMM_WORKSPACE_BYTES
    embedding: str = "gpu"
    records_layers: bool = True
    holds_weights: bool = True

    def __post_init__(self) -> None:
        for name, allowed in (
            ("itemsize", (2, 4, 8)),
            ("optimizer_bits", (8, 32)),
            ("attention", tuple(FEATURES)),
            ("embedding", ("gpu", "host", "either")),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"{name} is not known",
                    got=repr(getattr(self, name)),
                    allowed=", ".join(map(str, allowed)),
                )

    @property
    def statistic_bytes(self) -> int:
        """Bytes of a norm's rstd or an attention's lse: float32, or float64 beside float64."""
        return 8 if self.itemsize == 8 else 4

    def spare(self, shape: ModelShape, rank: Rank, group: str) -> int:
        """Columns beside a group's inputs for the products of its adapters."""
        return -(-group_rank(shape, rank, group) // self.spare_multiple) * self.spare_multiple


DEFAULT = CostSettings()
