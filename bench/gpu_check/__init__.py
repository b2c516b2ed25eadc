"""``python -m bench.gpu_check``: what a machine with a CUDA device can confirm."""
