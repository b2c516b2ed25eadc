"""What one does with adapters after training: show, shrink, combine, extract, convert; each result is verified."""
