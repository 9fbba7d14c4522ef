"""ONNX Runtime on the CPU and on CUDA: whole passes as sessions."""
