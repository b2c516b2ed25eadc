"""Ops for adapter matmuls and losses, one folder per op. They import torch, never peftlab."""
