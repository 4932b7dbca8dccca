"""The demo's model, and the conversations that it learns from."""
