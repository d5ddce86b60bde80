"""Data files of the package; NOTE.md says where each is from."""
