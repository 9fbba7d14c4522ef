"""DiffusionGemma as ONNX: the same graph, written out.

graph, arrays      a graph that is being written, and values that are not there yet
primitives, ops    the Ops contract in ONNX; experts, head, packed: its larger ops
graphs, weights    encode, denoise and the others; where in the checkpoint's files their weights lie
exporter, target   a folder with them, and where it may be; manifest: the JSON beside them; report: what was made
check, probe       onnx's checker, and what the onnxruntime installed here can run
"""
