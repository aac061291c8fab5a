"""Watches how large the tensors are that operations make."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that is made while this is entered; views are none.

    Attributes:
        nbytes: of the largest.
        kept: bytes of results, which do not count.
    """

    def __init__(self, *kept):
        super().__init__()
        self.nbytes, self.kept = 0, set(kept)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        for tensor in _tensors(found):
            is_new = tensor.untyped_storage().data_ptr() not in given
            if is_new and tensor.nbytes not in self.kept:
                self.nbytes = max(self.nbytes, tensor.nbytes)
        return found


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
