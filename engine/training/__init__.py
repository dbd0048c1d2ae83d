"""From labelled embeddings to a published head: labels, split, step, loop, metrics; imports no Ray."""
