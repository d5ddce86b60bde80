"""The graph that every part of llmc agrees on: values, ops, types, text form, and what runs them for
reference.
"""
