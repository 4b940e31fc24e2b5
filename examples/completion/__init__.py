"""Python completed as one types: the data, the training, what it saves."""
