"""How good an indexer's choices are, beside arms that are not trained."""
