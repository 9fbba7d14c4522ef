"""The model graph, the sampler and the engine. Nothing here imports a framework other than NumPy."""
