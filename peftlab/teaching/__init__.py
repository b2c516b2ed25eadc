"""Teachers: what a recipe names as one, the loaded model, its stored targets, and what the loss asks of it."""
