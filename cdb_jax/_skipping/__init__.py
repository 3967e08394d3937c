"""A backward pass that does not compute what a selection drops."""
