"""One form for each meaning: constants folded, equal ops merged, shapes normalised, transposes moved into
weights.
"""
