"""Networks that turn scaled pixels into embeddings, one file per kind; how they are run is `engine.runtimes`."""
