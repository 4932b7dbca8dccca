"""Extractive question answering for fasttune."""
