"""``python -m bench.peers``: the same training by peftlab and by other engines. ``bench.peers.distillation``: the same distillation."""
