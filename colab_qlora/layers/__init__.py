"""The fused decoder layer: one autograd.Function over plain functions for its two halves.

`linear.py` reads what a linear layer is made of, `linear_group.py` computes the linears that share
an input in one GEMM with LoRA inside it, `attention_half.py` and `mlp_half.py` are the halves of a
layer, `decoder_layer.py` is the Function, `saved.py` names what it can keep. Nothing here knows a
planner, and nothing changes a model: `colab_qlora.models.fuse` does.
"""
