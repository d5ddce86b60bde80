"""Small programs that use llmc as a stranger would."""
