"""The shapes of everything that crosses a boundary: configs, payloads, records, manifests."""
