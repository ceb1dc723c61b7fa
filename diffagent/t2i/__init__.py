"""The language of text-to-image: samplers, base models, weight files, catalogue, metadata."""
