"""Model files: the cache of downloads, folders of models, references to files."""
