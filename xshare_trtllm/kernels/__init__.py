"""The CUDA kernels without nvcc: compiled when a layer's setting is first used, launched from Python."""
