"""Small models that are asked what a layer knows, all layers and seeds of a task at once."""
