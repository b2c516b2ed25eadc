"""``python -m bench.gpu_check``: checks and measurements for a machine with a CUDA device."""
