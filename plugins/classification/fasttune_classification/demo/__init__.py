"""What the demo needs and no hub serves: a small pretrained encoder and labelled text."""
