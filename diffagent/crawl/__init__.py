"""The crawl of a Civitai site into a snapshot, and its refresh."""
