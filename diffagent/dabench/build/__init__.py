"""From records to a dataset: splits, their history, shards and the data card."""
