"""Decoding of answers with one launch a token: the whole pass of a token is a CUDA graph.

A token's pass through an 8B with adapters is thousands of kernels of a few microseconds each (an
estimate), and the host needs longer to launch one than the GPU to run it. Here everything that
changes from token to token lies in buffers that never move (`fixed_cache.py`, `decode_step.py`), so
that the pass is captured once and then replayed.

What cannot be captured is left to transformers' `generate`; `why_not_graphed(model)` says why.

The floor is what has to be read: every weight once a token, for one row or for a few.

    seconds a token >= bytes of weights / bandwidth of the memory

A Llama of 8B has 6.98e9 numbers in the layers' linears, in NF4 with double quantisation 4.13 bits
each, 3.60 GB; its head in 16 bits is another 1.05 GB. So 4.65 GB a token, by the data sheets'
bandwidths 1.0 ms on an H200 (4.8 TB/s) and 15 ms on a T4 (0.32 TB/s), adapters, keys and values
aside. `python -m benchmarks.decoding` prints it beside what was measured.
"""

from __future__ import annotations

from colab_qlora.decoding.decode import decode
from colab_qlora.decoding.eligibility import eager_on_cpu, why_not_graphed
from colab_qlora.decoding.kept_steps import free_decoding

__all__ = ["decode", "eager_on_cpu", "free_decoding", "why_not_graphed"]
