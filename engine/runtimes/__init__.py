"""How a frozen network is run, one file per kind: uint8 pixels in, float32 embeddings out."""
