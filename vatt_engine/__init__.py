"""VATT on PyTorch: self-supervised learning from raw video, audio and text."""
