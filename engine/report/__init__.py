"""A page about a bundle, for people: `page.py` puts it together, `plots.py` draws, the others say what it tells.

Not for: computing anything that `metrics.json` does not hold. It knows bundles by their JSON documents alone.
"""
