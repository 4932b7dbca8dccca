"""The demo's model, and the questions that it learns from."""
