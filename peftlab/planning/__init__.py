"""Plans a training before it runs: memory term by term, disk, work and time, from configuration alone."""
