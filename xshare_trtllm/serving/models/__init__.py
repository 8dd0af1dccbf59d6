"""The Python models of the repository. They run inside Triton's Python back end, which brings the module
`triton_python_backend_utils`; the repository's model.py files only import them."""
