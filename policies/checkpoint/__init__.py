"""The checkpoint folder: manifest, model card, golden answers, reading and writing."""
