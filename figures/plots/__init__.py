"""One module per plot kind; each has `build(table, plot)`, which returns a matplotlib figure."""
