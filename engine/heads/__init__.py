"""Classifiers on embeddings, one file per kind, and their published form; how they are trained is `engine.training`."""
