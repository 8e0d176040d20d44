"""Models the studies train, as pure functions of plain parameter trees."""
