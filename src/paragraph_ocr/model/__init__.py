"""The network: a ResNet encodes the page, a Transformer decoder writes its text."""
