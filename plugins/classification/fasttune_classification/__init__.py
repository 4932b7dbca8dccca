"""Text, image and audio classification for fasttune."""
