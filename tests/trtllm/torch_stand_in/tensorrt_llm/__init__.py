"""A stand-in for what XShare touches of TensorRT-LLM's PyTorch backend, which needs NVIDIA's index and a
GPU: the same names, signatures, attributes and order of calls, on the host.

Read from the public repository NVIDIA/TensorRT-LLM; each file names the paths and commits. The release that a
commit belongs to is known where version.py is stored with it: 000a01de66 is 1.0.0rc4, b35ac1b643 is 1.2.0rc2.
Bodies are our own and as small as the contract allows.
"""
