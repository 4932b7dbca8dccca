"""The demo's model, and the docstrings that it learns from."""
