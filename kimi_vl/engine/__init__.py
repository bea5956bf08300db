"""Model inputs → token ids."""
