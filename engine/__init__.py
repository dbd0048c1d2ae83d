"""Image archives to embeddings, classifiers and labels: the library behind the `engine` command."""

__version__ = "0.1.0"
