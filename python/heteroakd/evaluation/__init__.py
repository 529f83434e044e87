"""Inference, IoU and pictures of a network."""
