"""The page on which one tries a model in a browser."""
