"""Where the library meets others. Each file imports its library when it is imported, and nothing else does."""
