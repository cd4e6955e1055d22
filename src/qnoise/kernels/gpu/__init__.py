"""Triton kernels, for tensors on a CUDA or ROCm device; one file an operation. Imported only where one is used."""
