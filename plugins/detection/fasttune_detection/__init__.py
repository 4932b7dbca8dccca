"""Object detection for fasttune."""
