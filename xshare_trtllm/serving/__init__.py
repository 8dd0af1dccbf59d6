"""Serving: a Triton model repository, the engine behind its `cpu` back end, metrics.

Nothing is imported before it is asked for: Triton's Python processes for the text models need no torch.
"""
