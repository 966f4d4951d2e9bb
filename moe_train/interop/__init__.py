"""Models of the rest of the world: Hugging Face folders read and written, dense models made into experts."""
