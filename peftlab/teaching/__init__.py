"""Teachers: the recipe's teacher names, the loaded models, their stored targets, and their part in the loss."""
