"""What the method rooms share: trees, matrices, bases, task boundaries, checks."""
