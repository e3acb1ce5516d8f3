"""verify(): an artefact against the model it was made from."""
