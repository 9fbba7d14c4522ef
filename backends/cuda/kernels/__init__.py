"""Triton kernels, one file each, with shapes, bytes, FLOP, floor and tolerance on top. See docs/cuda.md.

Wrappers are plain functions on torch tensors: they allocate what they return, launch, and read nothing back, so that a
CUDA graph captures them. They import Triton: nothing outside `backends/cuda` may import this package.
"""
