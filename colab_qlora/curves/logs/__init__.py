"""Loss logs as files: formats, names, where one run ends, and from records to arrays."""
