"""verify(): compare an exported file with the model it was made from."""
