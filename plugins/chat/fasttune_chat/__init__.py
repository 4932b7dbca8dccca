"""Chat, instructions and continued pretraining of decoder-only language models for fasttune."""
