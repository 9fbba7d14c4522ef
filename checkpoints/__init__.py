"""Checkpoints as they lie on a disk: files and folders, names, safetensors and GGUF, quantized formats."""
