"""Ops of the adapter matmuls and the losses: one folder per op. Imports torch, never peftlab."""
