"""Object detection and segmentation for fasttune."""
