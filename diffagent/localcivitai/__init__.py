"""A local server that speaks the Civitai API, and the record folders that it reads."""
