"""A page about a bundle, for people: `page.py` puts it together, `plots.py` draws, the others say what it tells; and in
`night.py` one about a night.

Not for: computing anything that `metrics.json`, or the night's summary, does not hold. It knows both by their JSON
documents alone.
"""
