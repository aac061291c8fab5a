"""The fused decoder layer: one autograd.Function over plain functions for its two halves.

`linear.py` reads what a linear layer is made of, `linear_group.py` computes the linears that share
an input in one GEMM with LoRA inside it, `attention_half.py` and `mlp_half.py` are the halves of a
layer, `decoder_layer.py` is the Function, `saved.py` names what it can keep. `graph_recorder.py`
makes CUDA graphs, `layer_graph.py` is a layer's two passes as such, `gradient_rows.py` where their
gradients stand, `recorded_layer.py` their Function; `colab_qlora.models.pass_graphs` decides which
batches run so. Nothing here knows a planner, and nothing changes a model: `colab_qlora.models.fuse`
does.
"""
