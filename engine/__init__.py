"""The training machinery."""
