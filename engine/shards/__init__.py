"""Readers of image shards, one file per kind: storage bytes in, samples out, in order; decodes no image."""
