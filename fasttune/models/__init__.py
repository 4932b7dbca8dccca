"""For task plugins: opening pretrained transformers models, and the loss of language models.

What is wrong with a folder or hub id becomes a ModelError in plain words. Importing a module of this package
imports torch and transformers: a task does so inside its methods.
"""
