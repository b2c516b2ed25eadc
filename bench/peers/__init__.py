"""``python -m bench.peers`` compares the same training by peftlab and other engines, ``bench.peers.distillation`` the same
distillation."""
