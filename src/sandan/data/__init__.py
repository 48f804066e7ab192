"""Data files: read, checked, loaded; and how text becomes chat turns."""
