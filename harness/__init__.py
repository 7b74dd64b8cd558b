"""The harness: finds datasets, runs trials and searches, judges claims, keeps provenance; it knows systems only by name."""
