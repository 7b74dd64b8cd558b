"""Several replicas behind one address: `replicas` (their processes), `front` (who gets a request), `life` (start to end)."""
