"""The ops that a training step is made of: one op a file, each with a torch reference.

Every op has the same face on every machine. On a GPU it launches Triton kernels, elsewhere it runs
the torch reference that stands beside them (`backend.py` decides). Nothing here is imported
before it is used.
"""
