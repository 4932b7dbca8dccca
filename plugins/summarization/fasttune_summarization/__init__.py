"""Summarization and other text-to-text tasks for fasttune."""
