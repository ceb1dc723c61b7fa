"""From a snapshot to records: filters, resolution of names and hashes, drop funnel."""
