"""Read paragraphs of handwriting: a ResNet looks at the page, a Transformer writes its text."""
